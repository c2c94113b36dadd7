"""Methods side by side at one budget, and the settings of each, chosen on images held out of training."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualprune.errors import DualpruneError
from dualprune.files import write_json
from dualprune.progress import Progress
from dualprune.recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table

OWN_TRIALS = "each method's own trials"


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
        seeds: The recipe's seed by default; one that is named twice counts once.
        out: Results lie in ``out/<recipe.name>``.
        folder: Where results lie, in place of that.
        split: What accuracy is measured on, "test" or "validation".
        tuned: Take each method's settings from tune.json, which `tune` wrote.
        unequal: Allow methods with different numbers of epochs; the table says how many each had.
        resume: False runs everything again.
        progress: Told about steps and epochs.
        device: Where to compute.

    Returns:
        The contents of compare.json: recipe, split, paper, and one row a method.

    Raises:
        DualpruneError: an unknown method, unequal budgets, or no settings tuned for this recipe.
    """
    labels, seeds = _labels(recipe, methods), list(dict.fromkeys(seeds or [recipe.seed]))
    root = Path(folder) if folder is not None else Path(out) / recipe.name
    if not unequal:
        check_budgets(recipe, labels)
    if tuned:
        recipe = _with_tuned(recipe, labels, root / "tune.json")
    from dualprune.train import run

    settings: dict[str, Any] = {"split": split, "resume": resume, "progress": progress, "device": device}
    settings["folder"] = root
    results = {label: [run(recipe, label, seed=seed, **settings) for seed in seeds] for label in labels}
    rows = [summarise(recipe, label, runs) for label, runs in results.items()]
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
    """Choose each method's settings on training images held out for it, and write tune.json.

    A one-shot cut has nothing to choose and is left out. The test set is not touched.

    Args:
        recipe: What to run.
        methods: Labels of the recipe's methods; all of them by default.
        lrs: One grid of learning rates for all; without it, every method has its own `trials` of the recipe.
        seeds: The recipe's seed by default, each once; a trial's score is the mean over them.
        out: Results lie in ``out/<recipe.name>``.
        resume: False runs everything again.
        progress: Told about steps and epochs.
        device: Where to compute.

    Returns:
        The contents of tune.json: recipe, split, held_out, seeds, grid, and a method's lr, settings, scores
        {trial: [accuracy]} and recipe_sha256, which says for what recipe that was.

    Raises:
        DualpruneError: an unknown method, an impossible grid, or neither a grid nor trials.
    """
    labels = [label for label in _labels(recipe, methods) if recipe.epochs(label)]
    seeds, root = list(dict.fromkeys(seeds or [recipe.seed])), Path(out) / recipe.name
    trials = {label: _trials(recipe, label, lrs) for label in labels}
    chosen: dict[str, Any] = {}
    # one dense model serves all trials
    settings: dict[str, Any] = {"split": "validation", "dense_folder": root, "resume": resume}
    settings |= {"progress": progress, "device": device}
    from dualprune.train import run

    for label in labels:
        scores: dict[str, list[float]] = {}
        for name, trial in trials[label].items():
            tried, place = recipe.with_trial(label, trial), root / "tune" / _folder(name)
            runs = [run(tried, label, seed=seed, folder=place, **settings) for seed in seeds]
            scores[name] = [result["cut"] for result in runs]
        best = max(scores, key=lambda name: statistics.fmean(scores[name]))
        trial = trials[label][best]
        chosen[label] = {"lr": trial["lr"], "settings": trial, "scores": scores}
        chosen[label]["recipe_sha256"] = recipe.tuning_fingerprint(label, trial)
    grid = list(lrs) or OWN_TRIALS
    table = {"recipe": recipe.name, "split": "validation", "held_out": recipe.data.validation, "seeds": seeds}
    table |= {"grid": grid, "methods": _earlier_choices(recipe, root / "tune.json", grid, seeds) | chosen}
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
        cells += [_mean_std(row["retrained"], row["retrained_std"])] * retrained + [_number(row["paper"], ".2f")] * papers
        cells += [str(row["n"]), f"{row['rate']:.1f}×", str(row["epochs"]), str(row["updates"])]
        cells += [_number(row["lr"], "g"), f"{row['seconds_mean']:.0f}"]
        shown.add_row(row["label"], *cells, style="bold" if row["mean"] == best else "")
    return shown


def tuning_table(table: dict[str, Any]) -> Table:
    """The scores of `tune`: one row a trial, that of each method which was chosen in bold."""
    from rich.table import Table

    shown = Table(title=f"{table['recipe']}: cut accuracy in % on the {table['held_out']:.0%} held out of training")
    shown.add_column("method")
    shown.add_column("lr, settings")
    shown.add_column("cut", justify="right")
    for label, choice in table["methods"].items():
        means = {name: statistics.fmean(values) for name, values in choice["scores"].items()}
        best = _trial_name(_chosen(choice))
        for number, (name, mean) in enumerate(means.items()):
            last = number == len(means) - 1
            shown.add_row(label, name, f"{mean:.2f}", style="bold" if name == best else "", end_section=last)
    return shown


def _labels(recipe: Recipe, methods: Sequence[str] | None) -> list[str]:
    labels = list(dict.fromkeys(methods or recipe.methods))
    for label in labels:
        recipe.method(label)
    return labels


def check_budgets(recipe: Recipe, labels: Sequence[str]) -> None:
    """Refuse methods that train for different numbers of epochs.

    Raises:
        DualpruneError: they do; the message lists them.
    """
    epochs = {label: recipe.epochs(label) for label in labels if recipe.epochs(label)}
    if len(set(epochs.values())) > 1:
        listed = ", ".join(f"{label} {count}" for label, count in epochs.items())
        raise DualpruneError(f"the methods have unequal budgets in epochs ({listed}); make them equal, or --unequal")


def _with_tuned(recipe: Recipe, labels: Sequence[str], path: Path) -> Recipe:
    """The recipe with the settings of tune.json, which must have been chosen for it."""
    if not path.exists():
        raise DualpruneError(f"--tuned: no {path}; run 'dualprune tune' first")
    chosen = json.loads(path.read_text(encoding="utf-8"))["methods"]
    for label in labels:
        if recipe.epochs(label):
            if label not in chosen:
                raise DualpruneError(f"--tuned: {path} has no {label!r}, only {', '.join(chosen)}; tune it first")
            if not _chosen_for(recipe, label, chosen[label]):
                raise DualpruneError(f"--tuned: {path}: {label!r} was tuned under other settings; run 'dualprune tune' again")
            recipe = recipe.with_trial(label, _chosen(chosen[label]))
    return recipe


def _trials(recipe: Recipe, label: str, lrs: Sequence[float]) -> dict[str, dict[str, Any]]:
    """A method's trials by name, each with its learning rate: the grid's, or its own."""
    if lrs and min(lrs) <= 0:
        raise DualpruneError(f"a grid of learning rates above 0 is needed, as in --lr 0.02,0.05; got {list(lrs)}")
    own = [{"lr": recipe.lr(label)} | trial for trial in recipe.method(label).trials]
    trials = [{"lr": lr} for lr in lrs] or own
    if not trials:
        raise DualpruneError(f"nothing to try for {label!r}: give --lr 0.02,0.05, or trials in [methods.{label}]")
    return {_trial_name(trial): trial for trial in trials}


def _trial_name(trial: Mapping[str, Any]) -> str:
    """``0.05, s0 0.3``: the learning rate, then what else is set."""
    return ", ".join([f"{trial['lr']:g}", *(f"{key} {value}" for key, value in trial.items() if key != "lr")])


def _folder(name: str) -> str:
    return "lr" + re.sub(r"[^\w.+-]+", "-", name).strip("-")


def _chosen(choice: Mapping[str, Any]) -> dict[str, Any]:
    """What tune.json chose; of earlier versions it has the learning rate alone."""
    return dict(choice.get("settings") or {"lr": choice["lr"]})


def _chosen_for(recipe: Recipe, label: str, choice: Mapping[str, Any]) -> bool:
    """Whether the choice was made for this recipe; one of an earlier version does not say, and is taken at its word."""
    if "recipe_sha256" not in choice:
        return True
    return label in recipe.methods and choice["recipe_sha256"] == recipe.tuning_fingerprint(label, _chosen(choice))


def _earlier_choices(recipe: Recipe, path: Path, grid: list[float] | str, seeds: list[int]) -> dict[str, Any]:
    """What an earlier call chose for other methods, if it had the same grid, seeds and recipe."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if (earlier["grid"], earlier["seeds"]) != (grid, seeds):
        return {}
    return {label: choice for label, choice in earlier["methods"].items() if _chosen_for(recipe, label, choice)}


def summarise(recipe: Recipe, label: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
        "retrained_std": statistics.stdev(retrained) if len(retrained) > 1 else None,
        "dense": statistics.fmean(result["dense"] for result in runs),
        "paper": paper if isinstance(paper, int | float) else None,
        "lr": first["lr"],
        "epochs": first["epochs"],
        "steps": first["steps"],
        "updates": first["updates"],
        "batch_size": first["batch_size"],
        "seconds_mean": statistics.fmean(result["seconds"] for result in runs),
        "peak_memory_mb": max(result["peak_memory_mb"] for result in runs),
        "rate": first["rate"],
        "rate_model": first["rate_model"],
    }


def _mean_std(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
