"""Carry finished runs into the repository: results/*.json, docs/figures/*.svg and the tables of docs/results.md.

    python benchmarks/publish.py runs/resnet20-cifar10-10x runs/table1_resnet56-cifar10-small
    python benchmarks/publish.py --table table6-lanes runs/table6_ufld-*-small
    python benchmarks/publish.py --table quantise --sizes runs/quantise_*
    python benchmarks/publish.py --table table6-lanes --keep runs/table6_ufld-tusimple-77.67x-small

A recipe folder alone gives a table, figures and the weights of one method; `--table` puts several into one table. Every
number comes from the runs' own result.json; nothing is typed by hand. Unfinished runs are left out, and so are runs on
the validation split. A method for which only the paper has a number has a row without ours. Results may grow over several
machines: with `--keep`, runs that results/NAME.json already has and the folders have not stay in it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dualprune import plots
from dualprune.files import write_json, write_text
from dualprune.recipe import load_recipe
from dualprune.tasks import build_task
from dualprune.train import evaluate

ROOT = Path(__file__).resolve().parent.parent
PER_RUN = [
    "method",
    "importance",
    "seed",
    "split",
    "task",
    "metric",
    "metrics",
    "dense",
    "cut",
    "retrained",
    "kept_model",
    "total_model",
    "rate",
    "rate_model",
    "epochs",
    "retrain_epochs",
    "steps",
    "updates",
    "batch_size",
    "lr",
    "seconds",
    "peak_memory_mb",
    "versions",
    "device",
    "recipe_sha256",
    "weights_sha256",
    "command",
    "sizes",
]
CURVE = ("epoch", "stage", "loss", "accuracy_cut")  # what a table's JSON keeps of an epoch
SHORT = {"false_positive_rate": "FP", "false_negative_rate": "FN"}
LOWER_IS_BETTER = {"false_positive_rate", "false_negative_rate", "bits per character", "perplexity"}
NO_PERCENTAGE = {"bits per character", "perplexity"}
# keys of [paper] that are no method's result
NO_RESULT = {"rate", "epochs", "weights", "kept", "retrain_epochs", "scaled_down"}
DASH = "–"
Run = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="recipe folders under runs/")
    parser.add_argument("--table", metavar="NAME", help="put all folders into one table, at this marker of docs/results.md")
    parser.add_argument("--keep", action="store_true", help="runs that are published and in no folder stay")
    parser.add_argument("--sizes", action="store_true", help="with stored bytes, bits and weights kept")
    parser.add_argument("--weights", metavar="LABEL", help="copy this method's weights (first seed); slr for a recipe alone")
    parser.add_argument("--also", nargs=2, metavar=("TITLE", "KEY=VALUE"), help="measure the weights with this setting too")
    given = parser.parse_args()
    if given.table:
        publish_table(given.table, given.folders, keep=given.keep, sizes=given.sizes, weights=given.weights, also=given.also)
    else:
        for folder in given.folders:
            publish(folder, keep=given.keep, sizes=given.sizes, weights=given.weights or "slr")


def publish(folder: Path, *, keep: bool = False, sizes: bool = False, weights: str = "slr") -> None:
    """Publish one recipe's runs: its table with figures and held-out scores, its histories, one method's weights.

    `keep` adds the runs that are published already.
    """
    given = recipe = read_recipe(folder)
    if not recipe.runs and recipe.tune is None:
        raise SystemExit(f"{folder}: no finished run (<label>-seed<n>/result.json) and no tune.json in it")
    target = ROOT / "results" / f"{folder.name}.json"
    if keep:
        (recipe,) = with_published(target, [recipe])
    write_json(target, {"recipe": folder.name, "tune": recipe.tune, "paper": recipe.paper, "runs": recipe.runs})
    if recipe.runs:
        table = markdown([recipe], sizes=sizes)
        if recipe.tune:
            table += "\n" + held_out(recipe.tune)
        insert(ROOT / "docs" / "results.md", folder.name, "\n\n".join([table, *draw(folder.name, recipe.runs)]))
        copy_weights(given, weights)
        print(table)
    print(f"wrote {target.relative_to(ROOT)}")


def publish_table(
    name: str,
    folders: Sequence[Path],
    *,
    keep: bool = False,
    sizes: bool = False,
    weights: str | None = None,
    also: Sequence[str] = (),
) -> None:
    """Publish several recipes' runs as one table; its JSON has the epochs' curves and no histories.

    `keep` adds what the table has already, `also` is a title and an override of the recipe, with which all weights in the
    folders are measured once more.
    """
    names = [folder.name for folder in folders]
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise SystemExit(f"--table {name}: {', '.join(twice)} given more than once; a recipe has one folder of runs")
    recipes = [read_recipe(folder) for folder in folders]
    empty, recipes = [r.name for r in recipes if not r.runs], [r for r in recipes if r.runs]
    if not recipes:
        raise SystemExit(f"--table {name}: no finished run on the test split in {', '.join(map(str, folders))}")
    for recipe in recipes if also else []:
        measure_also(recipe, *also)
    given = recipes
    if keep:
        recipes = with_published(ROOT / "results" / f"{name}.json", recipes)
        empty = [one for one in empty if one not in {recipe.name for recipe in recipes}]
    table = markdown(recipes, sizes=sizes)
    if "*" in table:
        table += f"\n\\* chosen on held-out training images; grids and scores are in `results/{name}.json`.\n"
    if empty:
        table += f"\nNot run yet: {', '.join(empty)}.\n"
    insert(ROOT / "docs" / "results.md", name, table.rstrip("\n"))
    target = ROOT / "results" / f"{name}.json"
    write_text(target, compact(name, recipes))
    for recipe in given if weights else []:
        copy_weights(recipe, weights or "")
    print(table + f"\nwrote {target.relative_to(ROOT)}")


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeRuns:
    """The finished runs of one recipe's folder on the test split; `methods` and `bits` are what recipe.toml says."""

    folder: Path
    runs: list[Run]
    tune: dict[str, Any] | None = None
    paper: Mapping[str, Any] | None = None
    methods: tuple[str, ...] = ()
    bits: Any = None

    @property
    def name(self) -> str:
        """The folder's, which is the recipe's."""
        return self.folder.name

    @property
    def rate(self) -> float:
        """Over all weights, the mean of the runs; what gets lost in rounding differs between methods."""
        return fmean(run["rate_model"] for run in self.runs)

    def labels(self) -> dict[str, list[Run]]:
        """Runs by label, in the order in which labels are first met."""
        return {run["label"]: [other for other in self.runs if other["label"] == run["label"]] for run in self.runs}


def read_recipe(folder: Path) -> RecipeRuns:
    """Read a recipe's folder; what is left out (unfinished runs, those on another split) is printed."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder; expected a recipe's folder of runs, such as runs/resnet20-cifar10-10x")
    runs: list[Run] = []
    table: dict[str, Any] = {}
    for place in sorted(folder.glob("*-seed*")):
        run = read_run(place) if (place / "result.json").exists() else None
        if run is None or run["split"] != "test":
            print(f"left out: {place} ({'unfinished' if run is None else 'on the ' + str(run['split']) + ' split'})")
            continue
        runs.append(run)
        table = tomllib.loads(text.read_text()) if (text := place / "recipe.toml").exists() else table
    tune = folder / "tune.json"
    return RecipeRuns(
        folder,
        runs,
        tune=json.loads(tune.read_text()) if tune.exists() else None,
        paper=next((run["paper"] for run in runs if run["paper"]), None),
        methods=tuple(table.get("methods", {})),
        bits=table.get("prune", {}).get("bits"),
    )


def read_run(place: Path) -> Run:
    """Return what is worth keeping of a run: its result, its epochs and its history."""
    result = json.loads((place / "result.json").read_text())
    files = {"curve": place / "epochs.jsonl", "history": place / "history.jsonl"}
    rows = {k: [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else [] for k, file in files.items()}
    run = {"label": result["label"], **{key: result.get(key) for key in PER_RUN}, "paper": result.get("paper"), **rows}
    if run["metrics"] is None:  # from before a run kept all metrics
        values = {when: result[when] for when in ("dense", "cut", "retrained") if result.get(when) is not None}
        run["metrics"] = {when: {headline(run): value} for when, value in values.items()}
    return run


def read_results(file: Path) -> list[RecipeRuns]:
    """Read what was published of one recipe or of a table (results/NAME.json)."""
    if not file.is_file():
        raise SystemExit(f"there is no {file}; expected a folder of runs, or a file of results/ that publish.py wrote")
    content = json.loads(file.read_text())
    return [published_runs(recipe) for recipe in content.get("recipes", [content])]


def published_runs(old: Mapping[str, Any]) -> RecipeRuns:
    """Return a recipe's published runs as `read_recipe` would; a table has no histories, and epochs as columns."""
    of_name = sorted((ROOT / "recipes").rglob(f"{old['recipe']}.toml"))
    if not of_name:
        raise SystemExit(f"published runs are of {old['recipe']}, but recipes/ has it no more")
    methods = tuple(tomllib.loads(of_name[0].read_text()).get("methods", {}))
    of_table = {"paper": old["paper"], "history": []}  # what the runs of a table's JSON lack
    runs = [of_table | run | {"curve": rows_of(run["curve"])} for run in old["runs"]]
    return RecipeRuns(Path(old["recipe"]), runs, old["tune"], old["paper"], methods, old.get("bits"))


def with_published(file: Path, recipes: Sequence[RecipeRuns]) -> list[RecipeRuns]:
    """Return what `file` has published, in its order, and `recipes`, whose runs replace those of the same label and seed."""
    if not file.exists():
        raise SystemExit(f"--keep: there is no {file} yet; publish without --keep first")
    new = {recipe.name: recipe for recipe in recipes}
    merged = [joined(old, new.pop(old.name, None)) for old in read_results(file)]
    return [*merged, *new.values()]


def joined(old: RecipeRuns, new: RecipeRuns | None) -> RecipeRuns:
    """Return a recipe's published runs and its new ones, which must have the same dense model."""
    if new is None:
        return old
    again = {(run["label"], run["seed"]) for run in new.runs}
    kept = [run for run in old.runs if (run["label"], run["seed"]) not in again]
    dense = [run["metrics"]["dense"] for run in (*kept, *new.runs)]
    if different := next((one for one in dense if one != dense[-1]), None):
        raise SystemExit(
            f"--keep: the published runs of {new.name} start from a dense model of {different}, those in {new.folder} from "
            f"one of {dense[-1]}; one table compares methods on one model, so publish without --keep, or run them all again"
        )
    return replace(
        new, runs=sorted((*kept, *new.runs), key=lambda run: f"{run['label']}-seed{run['seed']}"), tune=new.tune or old.tune
    )


def rows_of(curve: Mapping[str, Sequence[Any]] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Epochs as rows, from the columns of a table's JSON or, of a recipe published alone, rows already."""
    if isinstance(curve, list):
        return curve
    return [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]


def measure_also(recipe: RecipeRuns, title: str, override: str) -> None:
    """Measure the dense and the pruned weights of all runs with a setting changed, such as the data; adds metrics `title …`."""
    dense: dict[str, float] = {}
    for run in recipe.runs:
        place = recipe.folder / f"{run['label']}-seed{run['seed']}"
        changed = load_recipe(place / "recipe.toml", [override])
        if changed.dense is not None:
            raise SystemExit(f"--also measures published weights; those of {recipe.name} are trained by [dense]")
        if not dense:
            # made by the run's own recipe: data that are for measuring only may lack what a pretrained model asks for
            dense = build_task(changed).measure(build_task(load_recipe(place / "recipe.toml")).model())
        when = "cut" if run["retrained"] is None else "retrained"
        for stage, found in (("dense", dense), (when, evaluate(changed, place / "pruned.safetensors")["metrics"])):
            run["metrics"][stage] |= {f"{title}: {metric}": round(value, 4) for metric, value in found.items()}


def headline(run: Run) -> str:
    """The key of the task's first metric."""
    return str(run["metric"]).removesuffix(" %")


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method on one recipe. `label` None: the dense model; no runs: only the paper has a number."""

    recipe: RecipeRuns
    label: str | None
    runs: list[Run]

    def values(self, when: str, metric: str) -> list[float]:
        """The runs' values of a metric "cut" or "retrained"; a dense row has its own in place of those after cutting."""
        if self.label is None and when != "cut":
            return []
        found = (run["metrics"].get("dense" if self.label is None else when, {}) for run in self.runs)
        return [metrics[metric] for metrics in found if metrics.get(metric) is not None]

    def paper(self, when: str, metric: str) -> float | None:
        """The paper's number for the same."""
        return published(self.recipe.paper or {}, self.label or "dense", when, metric, headline(self.recipe.runs[0]))

    def cut(self) -> float:
        """What rows are ranked by: the mean of the first metric after cutting."""
        values = self.values("cut", headline(self.recipe.runs[0]))
        return fmean(values) if values else float("-inf")


def published(paper: Mapping[str, Any], label: str, when: str, metric: str, first: str) -> float | None:
    """The number that ``[paper]`` has for a label ("dense" too) "cut" or "retrained"; `first` is the task's first metric."""
    table, key = paper, label
    if metric == first:
        table = paper if when == "cut" else paper.get("retrained", {})
    elif metric == "top-5":
        table = paper.get("top5" if when == "cut" else "retrained_top5", {})
    elif level := re.fullmatch(r"3D (easy|hard) mAP", metric):
        table, key = paper.get(level[1], {}), label + "-retrained" * (when == "retrained")
    else:
        return None
    value = table.get(key)
    return float(value) if isinstance(value, int | float) else None


def markdown(recipes: Sequence[RecipeRuns], *, sizes: bool = False) -> str:
    """Return the runs as a Markdown table: by network, then rate, the dense model first, then the best first."""
    rows = list(ranked(recipes))
    shown = columns(recipes, rows, sizes=sizes)
    cells = {title: [cell(row) for row in rows] for title, cell in shown.items()}
    cells = {title: column for title, column in cells.items() if set(column) != {DASH}}
    lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    lines += ["| " + " | ".join(line) + " |" for line in zip(*cells.values(), strict=True)]
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes(recipes, rows))


def ranked(recipes: Sequence[RecipeRuns]) -> Iterator[Row]:
    """Yield a table's rows in order. A dense model of the same figures as the one above it is not repeated."""
    families = list(dict.fromkeys(family(recipe.name) for recipe in recipes))
    above: Any = None
    for recipe in sorted(recipes, key=lambda recipe: (families.index(family(recipe.name)), recipe.rate)):
        dense = family(recipe.name), recipe.runs[0]["metrics"]["dense"]
        if dense != above:
            yield Row(recipe, None, recipe.runs)
        above = dense
        known: dict[str, list[Run]] = {label: [] for label in recipe.methods if (recipe.paper or {}).get(label) is not None}
        of_label = known | recipe.labels()
        yield from sorted((Row(recipe, *item) for item in of_label.items()), key=Row.cut, reverse=True)


def family(name: str) -> str:
    """A recipe's name without its rate, sparsity and bits, in which alone the recipes of one family differ."""
    return re.sub(r"-([\d.]+(x|bit|pct)|\dof\d)(?=-|$)", "", name)


def columns(recipes: Sequence[RecipeRuns], rows: Sequence[Row], *, sizes: bool) -> dict[str, Callable[[Row], str]]:
    """Return the cells by title; what no row has is dropped later."""
    shown: dict[str, Callable[[Row], str]] = {"recipe": lambda row: row.recipe.name} if len(recipes) > 1 else {}
    shown["method"] = lambda row: row.label or "dense, not pruned"
    for when, words in (("cut", "after cutting"), ("retrained", "retrained")):
        for metric in metrics_shown(rows, when):
            shown[f"{words}: {title_of(metric)}"] = lambda row, when=when, metric=metric: number(row, when, metric)  # type: ignore[misc]
    if attack := next((m for m in metrics_shown(rows, "cut") if m.startswith("pgd")), None):
        shown[f"{attack} over admm"] = lambda row: over_admm(row, attack)
    shown["n (seeds)"] = seeds
    if sizes:
        shown["stored bytes"] = stored
        shown["weights kept"] = lambda row: trained(row, lambda run: f"{run['kept_model']:,}")
        shown["bits"] = lambda row: DASH if row.label is None or row.recipe.bits is None else str(row.recipe.bits)
    shown["rate, pruned layers"] = lambda row: trained(row, lambda run: f"{run['rate']:.2f}×")
    shown["rate, all weights"] = lambda row: trained(row, lambda run: f"{run['rate_model']:.2f}×")
    shown["lr"] = learning_rate
    shown["epochs"] = lambda row: trained(row, lambda run: epochs_of(run))
    shown["updates"] = lambda row: trained(row, lambda run: str(updates_of(run)))
    shown["minutes"] = lambda row: DASH if not row.runs or row.label is None else minutes(row.runs)
    return shown


def metrics_shown(rows: Sequence[Row], when: str) -> list[str]:
    """The metrics of a table, of KITTI's twelve the 3D ones; after retraining, the first and those of a paper or `--also`."""
    found = dict.fromkeys(metric for row in rows for run in row.runs for metric in run["metrics"].get(when, {}))
    named = [metric for metric in found if not re.match(r"BEV|2D|.*mAP11$", metric)]
    if when == "cut":
        return named
    first = {headline(run) for row in rows for run in row.runs}
    return [m for m in named if m in first or ": " in m or any(row.paper(when, m) is not None for row in rows)]


def title_of(metric: str) -> str:
    """The metric as a heading, with its unit, and an arrow where lower is better."""
    return SHORT.get(metric, metric) + ("" if metric in NO_PERCENTAGE else " %") + (" ↓" if metric in LOWER_IS_BETTER else "")


def number(row: Row, when: str, metric: str) -> str:
    """Mean ± standard deviation over the seeds, and the paper's number."""
    values, paper = row.values(when, metric), row.paper(when, metric)
    ours = DASH if not values else f"{fmean(values):.2f}"
    if not row.runs:
        ours = "not run"
    elif len(values) > 1 and (row.label is not None or len(set(values)) > 1):
        ours += f" ± {stdev(values):.2f}"
    return ours if paper is None else f"{ours} (paper: {paper:g})"


def over_admm(row: Row, attack: str) -> str:
    """By how much the mean robust accuracy lies above that of `admm` on the same recipe."""
    base, values = Row(row.recipe, "admm", row.recipe.labels().get("admm", [])).values("cut", attack), row.values("cut", attack)
    if row.label in (None, "admm") or not base or not values:
        return DASH
    return f"{fmean(values) - fmean(base):+.2f}"


def seeds(row: Row) -> str:
    """How many runs, and their seeds; a single one says so."""
    if row.label is None or not row.runs:
        return DASH
    count = len(row.runs)
    return f"{'n = 1' if count == 1 else count} ({', '.join(str(run['seed']) for run in row.runs)})"


def stored(row: Row) -> str:
    """Bytes of the file, and how many times fewer than dense."""
    sizes = [run["sizes"] for run in row.runs if run["sizes"]]
    if not sizes:
        return DASH
    dense, sparse = (fmean(size[key] for size in sizes) for key in ("dense_bytes", "sparse_bytes"))
    return f"{dense:,.0f}" if row.label is None else f"{sparse:,.0f} ({dense / sparse:.1f}×)"


def trained(row: Row, cell: Callable[[Run], str]) -> str:
    """The different values over a row's runs, one as a rule; the dense model has none."""
    return ", ".join(dict.fromkeys(map(cell, row.runs))) if row.label is not None and row.runs else DASH


def epochs_of(run: Run) -> str:
    """The epochs of pruning, and those of masked retraining."""
    return f"{run['epochs']} + {run['retrain_epochs']}" if run["retrain_epochs"] else str(run["epochs"])


def updates_of(run: Run) -> int:
    """How often a run's method updated its sparse copies, multipliers or thresholds."""
    return len(run["history"]) or run["updates"] or 0


def minutes(runs: Sequence[Run]) -> str:
    """Mean training time."""
    mean = fmean(run["seconds"] for run in runs) / 60
    return f"{mean:.0f}" if mean >= 10 else f"{mean:.1f}"


def learning_rate(row: Row) -> str:
    """The learning rate, with a star where it is the one that tuning chose."""
    choice = (row.recipe.tune or {}).get("methods", {}).get(row.label)
    star = "*" if choice and all(run["lr"] == choice["lr"] for run in row.runs) else ""
    return trained(row, lambda run: f"{run['lr']:g}{star}" if run["epochs"] else DASH)


def notes(recipes: Sequence[RecipeRuns], rows: Sequence[Row]) -> Iterator[str]:
    """Yield what stands under a table: where a paper's numbers come from, and its numbers for other networks."""
    sources: dict[str, dict[str, float]] = {}
    for recipe in recipes:
        paper = recipe.paper or {}
        known = {*recipe.methods, *(row.label for row in rows), "dense", *NO_RESULT}
        others = {key: value for key, value in paper.items() if key not in known and isinstance(value, int | float)}
        sources.setdefault(str(paper.get("source", "")), {}).update(others)
    for source, others in sources.items():
        if source:
            also = "".join(f"; {key.replace('_', ' ')} {value:g}" for key, value in others.items())
            yield f"The paper: {source}{also}."


def held_out(tune: Mapping[str, Any]) -> str:
    """Return what tuning tried, and the scores by which it chose."""
    lines = [f"\\* chosen on {tune['held_out']:.0%} of the training images held out, from {tune['grid']}:"]
    for label, choice in tune["methods"].items():
        scores = ", ".join(f"lr {trial}: {mean_or_diverged(values)}" for trial, values in choice["scores"].items())
        lines.append(f"{label} ({scores});")
    return "\n".join(lines)


def mean_or_diverged(values: Sequence[float | None]) -> str:
    """The mean over a trial's seeds, one of which may have ended in NaN."""
    found = [value for value in values if value is not None]
    return f"{fmean(found):.2f}" if len(found) == len(values) else "diverged"


# --- writing ------------------------------------------------------------------------------------------------


def compact(name: str, recipes: Sequence[RecipeRuns]) -> str:
    """Return a table's JSON, a line a run: epochs as columns, no histories."""
    parts = []
    for recipe in recipes:
        head = {"recipe": recipe.name, "tune": recipe.tune, "paper": recipe.paper, "bits": recipe.bits}
        runs = ",\n".join(json.dumps(small(run), ensure_ascii=False, allow_nan=False) for run in recipe.runs)
        parts.append(json.dumps(head, ensure_ascii=False, allow_nan=False)[:-1] + f', "runs": [\n{runs}\n]}}')
    return f'{{"table": {json.dumps(name)}, "recipes": [\n' + ",\n".join(parts) + "\n]}\n"


def small(run: Run) -> Run:
    """Return a run without its history and the paper's numbers, its epochs as columns."""
    kept = {key: value for key, value in run.items() if key not in ("history", "paper", "curve")}
    kept["updates"] = updates_of(run)
    curve = {key: [row.get(key) for row in run["curve"]] for key in CURVE}
    curve["loss"] = [None if loss is None else round(loss, 4) for loss in curve["loss"]]
    return {**kept, "curve": curve}


def copy_weights(recipe: RecipeRuns, label: str) -> None:
    """Copy a method's weights to results/: the first seed's, not the best seed's."""
    found = [run["seed"] for run in recipe.runs if run["label"] == label]
    if found:
        source = recipe.folder / f"{label}-seed{min(found)}" / "pruned.safetensors"
        shutil.copy(source, ROOT / "results" / f"{recipe.name}.safetensors")
    else:
        print(f"{recipe.name}: no finished run of {label}, so no weights are copied")


CAPTIONS = {
    "fig1": "Accuracy after cutting by epoch (Fig. 1 of the paper, from our runs)",
    "fig9": "Surrogate conditions over the updates (Fig. 9 of the paper, from our runs)",
    "violation": "Distance between weights and sparse copies",
}


def draw(name: str, runs: list[Run]) -> list[str]:
    """Draw Fig. 1 (accuracy after cutting by epoch) and Fig. 9 (conditions) of the SLR paper from these runs; return links."""
    epochs: dict[str, list[Any]] = {}
    histories: dict[str, list[Any]] = {}
    for run in runs:
        if run["curve"]:
            epochs.setdefault(run["label"], []).append(run["curve"])
            histories.setdefault(run["label"], []).append(run["history"])
    figures = {"fig1": plots.accuracy_after_cutting(epochs, metric=runs[0]["metric"], dense=runs[0]["dense"])} if epochs else {}
    if plots.has(histories, "condition_w"):
        figures["fig9"] = plots.conditions({k: v for k, v in histories.items() if plots.has({k: v}, "condition_w")})
    if plots.has(histories, "violation"):
        figures["violation"] = plots.violation({k: v for k, v in histories.items() if plots.has({k: v}, "violation")})
    links = []
    for which, figure in figures.items():
        file = save(figure, f"{name}-{which}", f"{name}: {CAPTIONS[which]}", which)
        links.append(f"![{CAPTIONS[which]}](figures/{file.name})")
    return links


def save(figure: plots.Figure, name: str, description: str, prefix: str) -> Path:
    """Write `figure` as docs/figures/<name>.svg and return the path."""
    svg = plots.to_svg(figure, prefix, description)
    if "xmlns=" not in svg:  # a file of its own needs the name space that a page lends
        svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    target = ROOT / "docs" / "figures" / f"{name}.svg"
    target.parent.mkdir(exist_ok=True)
    write_text(target, svg)
    return target


def insert(page: Path, name: str, table: str) -> None:
    """Put `table` between the page's markers for `name`."""
    text = page.read_text()
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in text:
        raise SystemExit(f"{page} has no marker {begin}; add it where the table shall stand")
    between = f"{re.escape(begin)}.*?{re.escape(end)}"
    write_text(page, re.sub(between, lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
