"""Methods side by side at one budget, and the settings of each, chosen on images held out of training."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualprune.errors import DualpruneError, FormatError
from dualprune.files import read_json, write_json
from dualprune.progress import Progress
from dualprune.recipe import Recipe, check_seed
from dualprune.report import paper_number, render_comparison

if TYPE_CHECKING:
    from rich.table import Table

OWN_TRIALS = "each method's own trials"
KEPT = "the finished runs are kept"


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
        The contents of compare.json: recipe, split, paper, and one row a method, with the seeds whose runs diverged.

    Raises:
        DualpruneError: an unknown method, unequal budgets, or no settings tuned for this recipe.
    """
    labels, seeds = _labels(recipe, methods), _seeds(recipe, seeds)
    root = Path(folder) if folder is not None else Path(out) / recipe.name
    if not unequal:
        check_budgets(recipe, labels)
    if tuned:
        recipe = _with_tuned(recipe, labels, root / "tune.json")
    from dualprune.run_folder import saving

    settings: dict[str, Any] = {"split": split, "resume": resume, "progress": progress, "device": device}
    settings["folder"] = root
    rows = []
    for label in labels:
        results = {seed: _run_or_none(recipe, label, seed=seed, **settings) for seed in seeds}
        rows.append(summarise(recipe, label, results))
    table = {"recipe": recipe.name, "split": split, "tuned": tuned, "rows": rows, "paper": recipe.paper}
    with saving(root, KEPT):
        write_json(root / "compare.json", table)
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
    judge: Callable[[Path], float] | None = None,
) -> dict[str, Any]:
    """Choose each method's settings on training images held out for it, and write tune.json.

    A trial ends at the cut: nothing is retrained. A one-shot cut has nothing to choose and is left out. The test set is not
    touched.

    Args:
        recipe: What to run.
        methods: Labels of the recipe's methods; all of them by default.
        lrs: One grid of learning rates for all; without it, every method has its own `trials` of the recipe.
        seeds: The recipe's seed by default, each once; a trial's score is the mean over them.
        out: Results lie in ``out/<recipe.name>``.
        resume: False runs everything again.
        progress: Told about steps and epochs.
        device: Where to compute.
        judge: Called with the folder of each finished trial, its pruned.safetensors in it, and returns what it is chosen by,
            more being better; by default that is the accuracy measured on the part held out. It is for data of one's own.

    Returns:
        The contents of tune.json: recipe, split, held_out, seeds, grid, and a method's lr, settings, scores
        {trial: [accuracy, or None where the run diverged]}, and what that was for: trials, recipe_sha256, weights_sha256 and
        data_sha256.

    Raises:
        DualpruneError: an unknown method, an impossible grid, or neither a grid nor trials.
        RunError: every trial of a method diverged.
    """
    labels = [label for label in _labels(recipe, methods) if recipe.epochs(label)]
    seeds, root = _seeds(recipe, seeds), Path(out) / recipe.name
    trials = {label: _trials(recipe, label, lrs) for label in labels}
    chosen: dict[str, Any] = {}
    # one dense model serves all trials
    settings: dict[str, Any] = {"split": "validation", "dense_folder": root, "resume": resume}
    settings |= {"progress": progress, "device": device}
    from dualprune.run_folder import saving

    today = _made_of(recipe)
    for label in labels:
        scores: dict[str, list[float | None]] = {}
        for name, trial in trials[label].items():
            tried, place = recipe.with_trial(label, trial).without_retraining(), root / "tune" / _folder(name)
            runs = [_run_or_none(tried, label, seed=seed, folder=place, **settings) for seed in seeds]
            scores[name] = [
                None if result is None else judge(place / f"{label}-seed{seed}") if judge else result["cut"]
                for seed, result in zip(seeds, runs, strict=True)
            ]
        trial = trials[label][best_trial(label, scores)]
        chosen[label] = {"lr": trial["lr"], "settings": trial, "scores": scores, "trials": list(trials[label].values())}
        chosen[label] |= {"recipe_sha256": recipe.tuning_fingerprint(label, trial), **today}
    grid = list(lrs) or OWN_TRIALS
    table = {"recipe": recipe.name, "split": "validation", "held_out": recipe.data.validation, "seeds": seeds}
    table |= {"grid": grid, "methods": _earlier_choices(recipe, root / "tune.json", grid, seeds, today) | chosen}
    with saving(root, KEPT):
        write_json(root / "tune.json", table)
    return table


def comparison_table(table: dict[str, Any]) -> Table:
    """A comparison as a rich table: mean ± std of the accuracy right after the cut, with what it cost."""
    from rich.table import Table

    rows = table["rows"]
    dense = _number(_mean([row["dense"] for row in rows if row["dense"] is not None]), ".2f")
    title = f"{table['recipe']}: accuracy in % right after the cut ({table['split']}; dense {dense})"
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
    best = max((row["mean"] for row in rows if row["mean"] is not None), default=None)
    for row in rows:
        cells = [_cut(row)]
        cells += [_mean_std(row["retrained"], row["retrained_std"])] * retrained + [_number(row["paper"], ".2f")] * papers
        cells += [str(row["n"]), _number(row["rate"], ".1f") + "×" * (row["rate"] is not None)]
        forms = {"epochs": "", "updates": "", "lr": "g", "seconds_mean": ".0f"}
        cells += [_number(row[key], form) for key, form in forms.items()]
        shown.add_row(row["label"], *cells, style="bold" if row["mean"] is not None and row["mean"] == best else "")
    return shown


def tuning_table(table: dict[str, Any]) -> Table:
    """The scores of `tune`: one row a trial, that of each method which was chosen in bold."""
    from rich.table import Table

    shown = Table(title=f"{table['recipe']}: cut accuracy in % on the {table['held_out']:.0%} held out of training")
    shown.add_column("method")
    shown.add_column("lr, settings")
    shown.add_column("cut", justify="right")
    for label, choice in table["methods"].items():
        means = {name: _mean(values) for name, values in choice["scores"].items()}
        best = _trial_name(_chosen(choice))
        for number, (name, mean) in enumerate(means.items()):
            last = number == len(means) - 1
            cut = "diverged" if mean is None else f"{mean:.2f}"
            shown.add_row(label, name, cut, style="bold" if name == best else "", end_section=last)
    return shown


def _run_or_none(recipe: Recipe, label: str, *, progress: Progress | None, **settings: Any) -> dict[str, Any] | None:
    from dualprune.train import run

    return unless_diverged(partial(run, recipe, label, progress=progress, **settings), progress)


def unless_diverged(go: Callable[[], dict[str, Any]], progress: Progress | None) -> dict[str, Any] | None:
    """The result of a run, or None if it diverged, which is a result too: others go on."""
    from dualprune.run_folder import Diverged

    try:
        return go()
    except Diverged as error:
        if progress is not None:
            progress.note(f"diverged, going on without it: {error}")
        return None


def best_trial(label: str, scores: Mapping[str, Sequence[float | None]]) -> str:
    """The name of the trial of the highest mean, without those that diverged.

    Raises:
        RunError: every trial did.
    """
    from dualprune.run_folder import RunError

    means = {name: mean for name, values in scores.items() if (mean := _mean(values)) is not None}
    if not means:
        raise RunError(f"every trial of {label!r} diverged ({'; '.join(scores)}); give it lower learning rates")
    return max(means, key=lambda name: means[name])


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None of nothing, and where a run diverged."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _seeds(recipe: Recipe, seeds: Sequence[int] | None) -> list[int]:
    return [check_seed(seed) for seed in dict.fromkeys(seeds or [recipe.seed])]


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
    table = _read_tuned(path)
    chosen = table["methods"]
    today = _made_of(recipe) if any(choice.get("data_sha256") for choice in chosen.values()) else {}
    for label in labels:
        if recipe.epochs(label):
            if label not in chosen:
                raise DualpruneError(f"--tuned: {path} has no {label!r}, only {', '.join(chosen)}; tune it first")
            if what := _other(recipe, label, chosen[label], table["grid"], today):
                raise DualpruneError(f"--tuned: {path}: {label!r} was tuned {what}; run 'dualprune tune' again")
            recipe = recipe.with_trial(label, _chosen(chosen[label]))
    return recipe


def _trials(recipe: Recipe, label: str, lrs: Sequence[float]) -> dict[str, dict[str, Any]]:
    """A method's trials by name, each with its learning rate: the grid's, or its own."""
    if lrs and min(lrs) <= 0:
        raise DualpruneError(f"a grid of learning rates above 0 is needed, as in --lr 0.02,0.05; got {list(lrs)}")
    trials = [{"lr": lr} for lr in lrs] or _own_trials(recipe, label)
    if not trials:
        raise DualpruneError(f"nothing to try for {label!r}: give --lr 0.02,0.05, or trials in [methods.{label}]")
    return {_trial_name(trial): trial for trial in trials}


def _own_trials(recipe: Recipe, label: str) -> list[dict[str, Any]]:
    return [{"lr": recipe.lr(label)} | trial for trial in recipe.method(label).trials]


def _trial_name(trial: Mapping[str, Any]) -> str:
    """``0.05, s0 0.3``: the learning rate, then what else is set."""
    return ", ".join([f"{trial['lr']:g}", *(f"{key} {value}" for key, value in trial.items() if key != "lr")])


def _folder(name: str) -> str:
    return "lr" + re.sub(r"[^\w.+-]+", "-", name).strip("-")


def _chosen(choice: Mapping[str, Any]) -> dict[str, Any]:
    """What tune.json chose; of earlier versions it has the learning rate alone."""
    return dict(choice.get("settings") or {"lr": choice["lr"]})


def _made_of(recipe: Recipe) -> dict[str, str | None]:
    """What a choice is made on besides what the recipe says: the starting weights and the data."""
    from dualprune.tasks import build_task

    return {"weights_sha256": recipe.weights_sha256(), "data_sha256": build_task(recipe).data_sha256()}


def _read_tuned(path: Path) -> dict[str, Any]:
    table = read_json(path, {"methods": dict, "seeds": list}) or {}
    if missing := [key for key in ("methods", "grid", "seeds") if key not in table]:
        raise FormatError(f"{path}: {missing[0]!r} is missing; delete it and run 'dualprune tune' again")
    return table


def _other(
    recipe: Recipe, label: str, choice: Mapping[str, Any], grid: list[float] | str, today: Mapping[str, str | None]
) -> str | None:
    """What a choice was made under, if not for this recipe; one of an earlier version says less, and is taken at its word."""
    if "recipe_sha256" not in choice:
        return None
    if label not in recipe.methods or choice["recipe_sha256"] != recipe.tuning_fingerprint(label, _chosen(choice)):
        return "under other settings"
    for key, what in (("weights_sha256", "from other starting weights"), ("data_sha256", "on other data")):
        if choice.get(key) and choice[key] != today.get(key):
            return what
    if grid == OWN_TRIALS and "trials" in choice and choice["trials"] != _own_trials(recipe, label):
        return "among other trials"
    return None


def _earlier_choices(
    recipe: Recipe, path: Path, grid: list[float] | str, seeds: list[int], today: Mapping[str, str | None]
) -> dict[str, Any]:
    """What an earlier call chose for other methods, if it had the same grid, seeds and recipe."""
    if not path.exists():
        return {}
    earlier = _read_tuned(path)
    if (earlier["grid"], earlier["seeds"]) != (grid, seeds):
        return {}
    methods = earlier["methods"].items()
    return {label: choice for label, choice in methods if _other(recipe, label, choice, grid, today) is None}


def summarise(recipe: Recipe, label: str, results: Mapping[int, dict[str, Any] | None]) -> dict[str, Any]:
    """One method's line, of its results by seed, None where a run diverged: cut accuracies, and what they cost."""
    runs = [result for result in results.values() if result is not None]
    cut = [result["cut"] for result in runs]
    retrained = [result["retrained"] for result in runs if result["retrained"] is not None]
    shared = ("lr", "epochs", "steps", "updates", "batch_size", "rate", "rate_model")
    return {
        "label": label,
        "method": runs[0]["method"] if runs else repr(recipe.method(label).build()),
        "importance": runs[0].get("importance") if runs else recipe.importance(label),
        "seeds": [result["seed"] for result in runs],
        "n": len(cut),
        "mean": _mean(cut),
        "std": statistics.stdev(cut) if len(cut) > 1 else None,
        "cut": cut,
        "retrained": _mean(retrained),
        "retrained_std": statistics.stdev(retrained) if len(retrained) > 1 else None,
        "dense": _mean([result["dense"] for result in runs]),
        "paper": paper_number(recipe.paper, label),
        **{key: runs[0][key] if runs else None for key in shared},
        "seconds_mean": _mean([result["seconds"] for result in runs]),
        "peak_memory_mb": max((result["peak_memory_mb"] for result in runs), default=None),
        "recipe_sha256": [result["recipe_sha256"] for result in runs],
        "diverged": [seed for seed, result in results.items() if result is None],
    }


def _cut(row: Mapping[str, Any]) -> str:
    diverged = len(row.get("diverged") or ())
    if row["mean"] is None:
        return "diverged" if diverged else "–"
    return _mean_std(row["mean"], row["std"]) + f" ({diverged} diverged)" * bool(diverged)


def _mean_std(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"
