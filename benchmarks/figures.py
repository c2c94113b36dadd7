"""Draw a figure of the SLR paper (Zhou et al. 2024) from runs into docs/figures/, and show it in docs/results.md.

    python benchmarks/figures.py 1 results/table1-twins.json runs/table1_resnet56-cifar10-small
    python benchmarks/figures.py 5 runs/table6_ufld-*-small
    python benchmarks/figures.py --all runs

Runs come from the folders that `dualprune compare` wrote, or from what `publish.py` kept of them in results/: without the
weights' maps of Figure 6 and, in a table of several recipes, without the updates of Figure 9. `--all` draws every figure that
the runs under a folder allow, and says which not, and why. Runs that are unfinished, or on the validation split, are left out.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import publish
from publish import RecipeRuns, Run

from dualprune import plots
from dualprune.errors import DualpruneError
from dualprune.export import load_sparse

CONSTANTS = {"s0": "s₀", "M": "M", "r": "r"}


class CannotDraw(DualpruneError):
    """The runs given lack what the figure shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("number", nargs="?", type=int, choices=FIGURES, help="which figure of the paper")
    parser.add_argument("folders", nargs="*", type=Path, help="recipe folders under runs/, or results/NAME.json")
    parser.add_argument("--all", type=Path, metavar="RUNS", help="draw all that the runs under this folder allow")
    parser.add_argument("--methods", metavar="A,B", help="labels to draw in figures 1 to 7; SLR's and ADMM's by default")
    parser.add_argument("--layer", help="figure 6: the layer, where the run kept several; its first one by default")
    given = parser.parse_args()
    options = Options(tuple(given.methods.split(",")) if given.methods else (), given.layer)
    if given.all:
        draw_all(given.all, options)
    elif given.number and given.folders:
        try:
            print(f"wrote {draw(given.number, read(given.number, given.folders), options)}")
        except CannotDraw as error:
            raise SystemExit(f"Figure {given.number}: {error}") from error
    else:
        parser.error("give a figure's number and recipe folders, or --all RUNS")


def read(number: int, places: Sequence[Path]) -> list[RecipeRuns]:
    """The runs of folders, and of files in results/ what the figure is of: a table may hold other recipes too."""
    recipes = []
    for place in places:
        if place.is_dir():
            recipes.append(publish.read_recipe(place))
        else:
            recipes += [one for one in publish.read_results(place) if re.match(FIGURES[number].recipes, one.name)]
    return recipes


@dataclass(frozen=True)
class Options:
    """What of the runs to draw: labels, or SLR's and ADMM's if none are given; a layer, or the first one."""

    methods: tuple[str, ...] = ()
    layer: str | None = None

    def shows(self, label: str) -> bool:
        """Whether a label is drawn; variants of constants are for figure 8 alone."""
        if self.methods:
            return label in self.methods
        return bool(re.match(r"(slr|admm)(-published|-paper)?$", label))


@dataclass(frozen=True)
class Wanted:
    """A figure: its file's name, what it shows, the recipes that `--all` takes, and how it is drawn."""

    name: str
    caption: str
    recipes: str
    draw: Callable[[Sequence[RecipeRuns], Options], plots.Figure]


def draw(number: int, recipes: Sequence[RecipeRuns], options: Options = Options()) -> Path:
    """Draw a figure and put it between its markers of docs/results.md.

    Raises:
        CannotDraw: the runs lack what it shows.
    """
    wanted = FIGURES[number]
    recipes = [recipe for recipe in recipes if recipe.runs]
    if not recipes:
        raise CannotDraw("no finished run on the test split")
    figure = wanted.draw(recipes, options)
    names = ", ".join(recipe.name for recipe in recipes)
    if number in (5, 7):
        names = f"{publish.family(recipes[0].name)} at {', '.join(f'{rate:.2f}×' for rate in sorted(r.rate for r in recipes))}"
    path = publish.save(figure, f"fig{number}-{wanted.name}", f"{wanted.caption}: {names}", f"fig{number}")
    link = f"![{wanted.caption}](figures/{path.name})\n\nFrom the runs of {names}; {seeds(number, recipes, options)}."
    publish.insert(publish.ROOT / "docs" / "results.md", f"fig{number}", link)
    return path.relative_to(publish.ROOT)


def draw_all(runs: Path, options: Options = Options()) -> None:
    """Draw every figure that the recipe folders in `runs` allow; print which not, and why."""
    folders = [place for place in sorted(runs.iterdir()) if any(place.glob("*-seed*/result.json"))]
    recipes = [publish.read_recipe(folder) for folder in folders]
    for number, wanted in FIGURES.items():
        fitting = [recipe for recipe in recipes if re.match(wanted.recipes, recipe.name) and recipe.runs]
        try:
            if not fitting:
                raise CannotDraw(f"no finished runs of a recipe {wanted.recipes}")
            print(f"Figure {number}: {draw(number, chosen(number, fitting), options)}")
        except CannotDraw as error:
            print(f"Figure {number}: not drawn: {error}")


def chosen(number: int, recipes: Sequence[RecipeRuns]) -> list[RecipeRuns]:
    """What `--all` draws of the fitting recipes: all, those of one network, or the one of its highest rate."""
    if number < 5:
        return list(recipes)
    of_one = largest_family(recipes)
    return of_one if number in (5, 7) else [max(of_one, key=lambda recipe: recipe.rate)]


def largest_family(recipes: Sequence[RecipeRuns]) -> list[RecipeRuns]:
    """The recipes of one network: where there are several, of two rates or more, and the paper's own before small twins."""
    sizes = Counter(publish.family(recipe.name) for recipe in recipes)
    best = max(sizes, key=lambda name: (min(sizes[name], 2), not name.endswith("-small"), sizes[name]))
    return [recipe for recipe in recipes if publish.family(recipe.name) == best]


def seeds(number: int, recipes: Sequence[RecipeRuns], options: Options) -> str:
    """How many seeds are behind what is drawn, as words."""
    if number == 6:
        return "first seeds"
    labels = [item for recipe in recipes for item in recipe.labels().items()]
    counts = {len(runs) for label, runs in labels if (label.startswith("slr-") if number == 8 else options.shows(label))}
    if counts == {1}:
        return "n = 1"
    return f"n = {min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"n = {min(counts)} seeds"


# --- what the figures show ------------------------------------------------------------------------------------


def shown(recipe: RecipeRuns, options: Options) -> dict[str, list[Run]]:
    """The runs to draw by label."""
    return {label: runs for label, runs in ordered(recipe) if options.shows(label)}


def ordered(recipe: RecipeRuns) -> list[tuple[str, list[Run]]]:
    """Labels and runs, SLR first, so that the legends of all figures agree."""
    return sorted(recipe.labels().items(), key=lambda item: (not item[0].startswith("slr"), item[0]))


def pruning_epochs(run: Run) -> list[dict[str, Any]]:
    """The rows of the epochs before the cut; those of masked retraining are another curve."""
    return [row for row in run["curve"] if row.get("stage", "train") == "train"]


def curves(recipes: Sequence[RecipeRuns], options: Options) -> plots.Figure:
    """Figures 1 to 4: the first metric after cutting by epoch, a panel a recipe."""
    panels, dense = {}, {}
    for recipe in recipes:
        lines = {label: [pruning_epochs(run) for run in runs] for label, runs in shown(recipe, options).items()}
        if lines := {label: rows for label, rows in lines.items() if plots.has({label: rows}, "accuracy_cut")}:
            panels[recipe.name], dense[recipe.name] = lines, recipe.runs[0]["dense"]
    if not panels:
        raise CannotDraw("no run of SLR or ADMM with epochs (epochs.jsonl)")
    return plots.curves(panels, metric=one_metric(recipes), dense=dense)


def one_metric(recipes: Sequence[RecipeRuns]) -> str:
    """The metric's name, which all runs of a figure must share."""
    names = {run["metric"] for recipe in recipes for run in recipe.runs}
    if len(names) > 1:
        raise CannotDraw(f"the runs have different metrics ({', '.join(sorted(names))}); draw them apart")
    return str(names.pop())


def one_family(recipes: Sequence[RecipeRuns]) -> None:
    """Refuse rates of different networks on one line."""
    names = sorted({publish.family(recipe.name) for recipe in recipes})
    if len(names) > 1:
        raise CannotDraw(f"rates of one network are wanted, got {', '.join(names)}; draw them apart")
    if len(recipes) < 2:
        raise CannotDraw(f"at least two rates are wanted, got {recipes[0].name} alone")


def metric_by_rate(recipes: Sequence[RecipeRuns], options: Options) -> plots.Figure:
    """Figure 5: the first metric after cutting by rate."""
    name = one_metric(recipes)
    return rates(recipes, options, {publish.headline(recipes[0].runs[0]): publish.family(recipes[0].name)}, name)


def levels_by_rate(recipes: Sequence[RecipeRuns], options: Options) -> plots.Figure:
    """Figure 7: 3D AP after cutting by rate, a panel a difficulty."""
    return rates(recipes, options, {f"3D {level} mAP": level for level in ("easy", "moderate", "hard")}, "3D mAP %")


def rates(recipes: Sequence[RecipeRuns], options: Options, panels: Mapping[str, str], metric: str) -> plots.Figure:
    """Draw metrics, given as {metric: panel's title}, by the rate over all weights; the paper's numbers beside them."""
    one_family(recipes)
    ours: dict[str, dict[str, dict[float, list[float]]]] = {}
    theirs: dict[str, dict[str, dict[float, float]]] = {}
    for key, title in panels.items():
        for recipe in recipes:
            for label, runs in shown(recipe, options).items():
                row = publish.Row(recipe, label, runs)
                if values := row.values("cut", key):
                    ours.setdefault(title, {}).setdefault(label, {})[recipe.rate] = values
                if (paper := row.paper("cut", key)) is not None:
                    theirs.setdefault(title, {}).setdefault(label, {})[recipe.rate] = paper
    if not ours:
        raise CannotDraw(f"no run of SLR or ADMM that has {' or '.join(panels)}")
    return plots.by_rate(ours, metric=f"{metric}, after cutting", paper=theirs)


def one_recipe(recipes: Sequence[RecipeRuns]) -> RecipeRuns:
    """The only recipe."""
    if len(recipes) > 1:
        raise CannotDraw(f"one recipe folder is wanted, got {', '.join(recipe.name for recipe in recipes)}")
    return recipes[0]


def heat_maps(recipes: Sequence[RecipeRuns], options: Options) -> plots.Figure:
    """Figure 6: one layer's weights, dense and after SLR and ADMM at one rate; the first seeds."""
    recipe = one_recipe(recipes)
    labels = shown(recipe, options)
    kinds = {kind: next((label for label in labels if label.startswith(kind)), None) for kind in ("slr", "admm")}
    picked = list(labels) if options.methods else [label for label in kinds.values() if label]
    if len(picked) < 2:
        raise CannotDraw(f"{recipe.name} has no runs of both SLR and ADMM")
    stored = {label: load_maps(recipe, label, min(run["seed"] for run in labels[label])) for label in picked}
    names = [key.removeprefix("before.") for key in stored[picked[0]] if key.startswith("before.")]
    layer = options.layer or (names[0] if names else "")
    if layer not in names:
        raise CannotDraw(f"{recipe.name} keeps no map of layer {layer!r}; it has {', '.join(names) or 'none'}")
    maps = {"dense": stored[picked[0]][f"before.{layer}"]}
    return plots.weight_maps(
        maps | {label: stored[label][f"after.{layer}"] for label in picked}, name=f"{recipe.name}: {layer}"
    )


def load_maps(recipe: RecipeRuns, label: str, seed: int) -> dict[str, Any]:
    """Read a run's matrices of its first and last pruned layer, as the report does, in the layers' order."""
    path = recipe.folder / f"{label}-seed{seed}" / "heatmaps.safetensors"
    if not path.exists():
        raise CannotDraw(f"{path} is not there")
    return {name: tensor.float().numpy() for name, tensor in load_sparse(path).items()}


def ablation(recipes: Sequence[RecipeRuns], options: Options) -> plots.Figure:
    """Figure 8: curves of the labels slr-s0-…, slr-M-… and slr-r-…, each panel with slr-paper; values are the method's own."""
    recipe = one_recipe(recipes)
    labels = recipe.labels()
    panels: dict[str, dict[str, list[Any]]] = {}
    for constant, sign in CONSTANTS.items():
        variants = {label: runs for label, runs in labels.items() if label.startswith(f"slr-{constant}-")}
        at = {value_of(runs[0], constant): runs for runs in (*variants.values(), *filter(None, [labels.get("slr-paper")]))}
        if variants and len(at) > 1:
            panels[sign] = {f"{sign} = {value:g}": [pruning_epochs(run) for run in at[value]] for value in sorted(at)}
    if not panels:
        raise CannotDraw(f"{recipe.name} has no two values of s0, M or r (labels slr-s0-…, slr-M-…, slr-r-…, slr-paper)")
    return plots.curves(panels, metric=one_metric(recipes), ramp=True)


def value_of(run: Run, constant: str) -> float:
    """A constant's value as the run's method says it."""
    found = re.search(rf"\b{constant}=([\d.e+-]+)", str(run["method"]))
    if found is None:
        raise CannotDraw(f"{run['label']}: its method names no {constant} ({run['method']})")
    return float(found[1])


def conditions(recipes: Sequence[RecipeRuns], options: Options) -> plots.Figure:
    """Figure 9: where the surrogate conditions held, by update."""
    recipe = one_recipe(recipes)
    found = {label: [run["history"] for run in runs] for label, runs in shown(recipe, options).items()}
    found = {label: rows for label, rows in found.items() if plots.has({label: rows}, "condition_w")}
    if not found:
        raise CannotDraw(f"{recipe.name} has no SLR run with conditions (history.jsonl)")
    return plots.conditions(found)


FIGURES = {
    1: Wanted("accuracy-by-epoch", "Figure 1: accuracy after cutting by epoch, SLR and ADMM", r"table1_", curves),
    2: Wanted("mixer-by-epoch", "Figure 2: MLP-Mixer, top-1 (the paper: top-5) after cutting by epoch", r"table3_", curves),
    3: Wanted("swin-by-epoch", "Figure 3: Swin-T, top-1 (the paper: top-5) after cutting by epoch", r"table4_", curves),
    4: Wanted("yolov3-by-epoch", "Figure 4: YOLOv3, AP50 after cutting by epoch", r"fig4_|table5_yolov3-tiny", curves),
    5: Wanted("lanes-by-rate", "Figure 5: lane accuracy after cutting by rate", r"table6_", metric_by_rate),
    6: Wanted("heat-maps", "Figure 6: one layer's weights before and after SLR and ADMM", r"table6_", heat_maps),
    7: Wanted("points-by-rate", "Figure 7: PointPillars, AP after cutting by rate and difficulty", r"table7_", levels_by_rate),
    8: Wanted("ablation", "Figure 8: accuracy after cutting by epoch for values of s₀, M and r", r"fig8_", ablation),
    9: Wanted("conditions", "Figure 9: surrogate conditions by update", r"table1_resnet(18|56)-cifar10", conditions),
}

if __name__ == "__main__":
    main()
