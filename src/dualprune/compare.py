"""Methods side by side at one budget, and a learning rate for each, chosen on images held out of training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualprune.errors import DualpruneError
from dualprune.files import write_json
from dualprune.progress import Progress
from dualprune.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table


def compare(
    recipe: Recipe,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    out: str | Path = "runs",
    folder: str | Path | None = None,
    split: str = "test",
    tuned: bool = False,
    unequal: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run every method with every seed, finished runs excepted, and write compare.json and compare.html.

    Args:
        recipe: What to run.
        methods: Labels of the recipe's methods; all of them by default.
        seeds: The recipe's seed by default.
        out: Results lie in ``out/<recipe.name>``.
        folder: Where results lie, in place of that.
        split: What accuracy is measured on, "test" or "validation".
        tuned: Take each method's learning rate from tune.json, which `tune` wrote.
        unequal: Allow methods with different numbers of epochs; the table says how many each had.
        resume: False runs everything again.
        progress: Told about steps and epochs.
        device: Where to compute.

    Returns:
        The contents of compare.json: recipe, split, paper, and one row a method.

    Raises:
        DualpruneError: an unknown method, unequal budgets, or no tuned learning rate.
    """
    labels, seeds = _labels(recipe, methods), list(seeds or [recipe.seed])
    root = Path(folder) if folder is not None else Path(out) / recipe.name
    if not unequal:
        _check_budgets(recipe, labels)
    if tuned:
        recipe = _with_tuned(recipe, labels, root / "tune.json")
    from dualprune.train import run

    settings: dict[str, Any] = {"split": split, "resume": resume, "progress": progress, "device": device}
    settings["folder"] = root
    results = {label: [run(recipe, label, seed=seed, **settings) for seed in seeds] for label in labels}
    rows = [_row(recipe, label, runs) for label, runs in results.items()]
    table = {"recipe": recipe.name, "split": split, "tuned": tuned, "rows": rows, "paper": recipe.paper}
    write_json(root / "compare.json", table)
    from dualprune.report import render_comparison

    render_comparison(root)
    return table


def tune(
    recipe: Recipe,
    methods: Sequence[str] | None = None,
    lrs: Sequence[float] = (),
    seeds: Sequence[int] | None = None,
    *,
    out: str | Path = "runs",
    resume: bool = True,
    progress: Progress | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Choose each method's learning rate from one grid, on training images held out for it, and write tune.json.

    A one-shot cut has no learning rate and is left out. The test set is not touched.

    Returns:
        The contents of tune.json: recipe, split, held_out, seeds, grid, and a method's lr and scores {lr: [accuracy]}.

    Raises:
        DualpruneError: an unknown method, or an empty or impossible grid.
    """
    labels = [label for label in _labels(recipe, methods) if recipe.epochs(label)]
    if not lrs or min(lrs) <= 0:
        raise DualpruneError(f"a grid of learning rates above 0 is needed, as in --lr 0.02,0.05; got {list(lrs)}")
    seeds, root = list(seeds or [recipe.seed]), Path(out) / recipe.name
    chosen: dict[str, Any] = {}
    # one dense model serves the whole grid
    settings: dict[str, Any] = {"split": "validation", "dense_folder": root, "resume": resume}
    settings |= {"progress": progress, "device": device}
    from dualprune.train import run

    for label in labels:
        scores: dict[str, list[float]] = {}
        for lr in lrs:
            tried, place = recipe.with_lr(label, lr), root / "tune" / f"lr{lr:g}"
            runs = [run(tried, label, seed=seed, folder=place, **settings) for seed in seeds]
            scores[f"{lr:g}"] = [result["cut"] for result in runs]
        best = max(lrs, key=lambda lr: statistics.fmean(scores[f"{lr:g}"]))
        chosen[label] = {"lr": best, "scores": scores}
    table = {"recipe": recipe.name, "split": "validation", "held_out": recipe.data.validation, "seeds": seeds}
    table |= {"grid": list(lrs), "methods": _earlier_choices(root / "tune.json", list(lrs), seeds) | chosen}
    write_json(root / "tune.json", table)
    return table


def comparison_table(table: dict[str, Any]) -> Table:
    """A comparison as a rich table: mean ± std of the accuracy right after the cut, with what it cost."""
    from rich.table import Table

    rows = table["rows"]
    dense = statistics.fmean(row["dense"] for row in rows)
    title = f"{table['recipe']}: accuracy in % right after the cut ({table['split']}; dense {dense:.2f})"
    # which optional columns have anything to say
    papers, retrained = any(row["paper"] is not None for row in rows), any(row["retrained"] is not None for row in rows)
    shown = Table(title=title, title_justify="left")
    shown.add_column("method")
    columns = [
        "cut",
        *["retrained"] * retrained,
        *["paper"] * papers,
        "n",
        "rate",
        "epochs",
        "updates",
        "lr",
        "seconds",
    ]
    for column in columns:
        shown.add_column(column, justify="right")
    best = max(row["mean"] for row in rows)
    for row in rows:
        cells = [_mean_std(row["mean"], row["std"])]
        cells += [_mean_std(row["retrained"], None)] * retrained + [_number(row["paper"], ".2f")] * papers
        cells += [str(row["n"]), f"{row['rate']:.1f}×", str(row["epochs"]), str(row["updates"])]
        cells += [_number(row["lr"], "g"), f"{row['seconds_mean']:.0f}"]
        shown.add_row(row["label"], *cells, style="bold" if row["mean"] == best else "")
    return shown


def tuning_table(table: dict[str, Any]) -> Table:
    """The scores of `tune`: one row a method, one column a learning rate, the chosen one in bold."""
    from rich.table import Table

    shown = Table(title=f"{table['recipe']}: cut accuracy in % on the {table['held_out']:.0%} held out of training")
    shown.add_column("method")
    for lr in table["grid"]:
        shown.add_column(f"lr {lr:g}", justify="right")
    for label, choice in table["methods"].items():
        means = {lr: statistics.fmean(choice["scores"][f"{lr:g}"]) for lr in table["grid"]}
        cells = [f"[bold]{mean:.2f}[/]" if lr == choice["lr"] else f"{mean:.2f}" for lr, mean in means.items()]
        shown.add_row(label, *cells)
    return shown


def _labels(recipe: Recipe, methods: Sequence[str] | None) -> list[str]:
    labels = list(dict.fromkeys(methods or recipe.methods))
    for label in labels:
        recipe.method(label)
    return labels


def _check_budgets(recipe: Recipe, labels: Sequence[str]) -> None:
    epochs = {label: recipe.epochs(label) for label in labels if recipe.epochs(label)}
    if len(set(epochs.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in epochs.items())
        raise DualpruneError(f"the methods have unequal budgets in epochs ({listed}); make them equal, or --unequal")


def _with_tuned(recipe: Recipe, labels: Sequence[str], path: Path) -> Recipe:
    """The recipe with the learning rates of tune.json."""
    if not path.exists():
        raise DualpruneError(f"--tuned: no {path}; run 'dualprune tune' first")
    chosen = json.loads(path.read_text(encoding="utf-8"))["methods"]
    for label in labels:
        if recipe.epochs(label):
            if label not in chosen:
                raise DualpruneError(f"--tuned: {path} has no {label!r}, only {', '.join(chosen)}; tune it first")
            recipe = recipe.with_lr(label, chosen[label]["lr"])
    return recipe


def _earlier_choices(path: Path, grid: list[float], seeds: list[int]) -> dict[str, Any]:
    """What an earlier call chose for other methods, if it had the same grid and seeds."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    return earlier["methods"] if (earlier["grid"], earlier["seeds"]) == (grid, seeds) else {}


def _row(recipe: Recipe, label: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's line: the cut accuracies over its seeds, and what they cost."""
    cut, first = [result["cut"] for result in runs], runs[0]
    retrained = [result["retrained"] for result in runs if result["retrained"] is not None]
    paper = recipe.paper.get(label)
    return {
        "label": label,
        "method": first["method"],
        "seeds": [result["seed"] for result in runs],
        "n": len(cut),
        "mean": statistics.fmean(cut),
        "std": statistics.stdev(cut) if len(cut) > 1 else None,
        "cut": cut,
        "retrained": statistics.fmean(retrained) if retrained else None,
        "dense": statistics.fmean(result["dense"] for result in runs),
        "paper": paper if isinstance(paper, int | float) else None,
        "lr": first["lr"],
        "epochs": first["epochs"],
        "steps": first["steps"],
        "updates": first["updates"],
        "batch_size": first["batch_size"],
        "seconds_mean": statistics.fmean(result["seconds"] for result in runs),
        "rate": first["rate"],
        "rate_model": first["rate_model"],
    }


def _mean_std(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
