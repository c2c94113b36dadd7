"""The arena: every method on every cell, tuned alike, three seeds; `dualprune` against its rivals.

    python benchmarks/arena/run.py [--cells resnet20-10x-5e,…] [--methods slr,gradual,…] [--out runs/arena]

A cell is a recipe in benchmarks/arena/cells. For every method: its trials on data held out of training (one seed), then the
chosen settings on the test set (seeds 1, 2, 3), right after the cut and after two epochs under the masks. Finished
runs are never redone and broken ones go on, so the same command goes on after any interruption. After every method
results/arena/<cell>.json and the tables of docs/arena.md are written. A method that fails is reported and the rest goes on;
the exit code is then 1. Every cell has a small twin, `<cell>-small`, whose epochs are shorter (`TWINS`), in float32: what
has bfloat16 arithmetic and what has not then add rows to the same table.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dualprune import plots
from dualprune.compare import best_trial, check_budgets, compare, summarise, tune, unless_diverged
from dualprune.errors import DualpruneError
from dualprune.files import write_json, write_text
from dualprune.loop import Interrupted
from dualprune.progress import Lines, Progress
from dualprune.recipe import Recipe, load_recipe
from dualprune.run_folder import RunError

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pat
from unseen import Unseen, unseen

ROOT = Path(__file__).resolve().parents[2]
CELLS = Path(__file__).resolve().parent / "cells"
SEEDS = (1, 2, 3)
BEGIN, END = "<!-- begin arena -->", "<!-- end arena -->"
SMALL = "-small"
# by data: what a small twin's epoch is made of, and how a recipe says so
TWINS = {
    "cifar10": ("10,000 training images", ["data.options.subset=10000"]),
    "mnist": ("10,000 training images", ["data.options.subset=10000"]),
    "tinyimagenet": ("2,500 training images", ["data.options.subset=2500"]),
    "tinyshakespeare": (
        "2,000 windows of the text, with a model of 0.8 million weights",
        ["data.options.windows=2000", "model.options={width=128, depth=4, heads=4, length=128}", "dense.epochs=24"],
    ),
}
HEAD = "method|after cutting, %|after 2 epochs more, %|n|rate|lr|minutes|peak memory, MB|settings"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", help="comma-separated; all by default")
    parser.add_argument("--methods", help="comma-separated labels; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/arena"), help="where the runs lie (runs/arena)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the runs on the test set (1,2,3)")
    parser.add_argument("--device", help="cpu, cuda, …; a GPU if there is one by default")
    args = parser.parse_args()
    jobs = []
    for name in args.cells.split(",") if args.cells else names():
        recipe = load_cell(name)
        jobs += [(recipe, label) for label in (args.methods.split(",") if args.methods else methods(recipe))]
    if len(jobs) == 1:
        ((recipe, label),) = jobs
        try:
            seeds = [int(seed) for seed in args.seeds.split(",")]
            run_cell(recipe, [label], seeds, args.out, device=args.device, progress=Lines())
        except Interrupted as error:
            print(error, file=sys.stderr)
            raise SystemExit(130) from None
        except DualpruneError as error:
            raise SystemExit(str(error)) from None
        return
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the process that trains: it saves, and says so by 130
    failed = False
    for recipe, label in jobs:  # a process each: not every system can forget what a process once took at its peak
        command = [sys.executable, __file__, "--cells", recipe.name, "--methods", label, "--out", str(args.out)]
        command += ["--seeds", args.seeds, *(["--device", args.device] if args.device else [])]
        code = subprocess.run(command).returncode
        if code in (130, -signal.SIGINT):
            raise SystemExit(130)
        failed |= code != 0
    if failed:
        raise SystemExit(1)


def names(cells: Path = CELLS) -> list[str]:
    """The cells, without the small twins."""
    return sorted(path.stem for path in cells.glob("*.toml"))


def load_cell(name: str, cells: Path = CELLS) -> Recipe:
    """A cell by name; with "-small" behind it, its twin: the same trials, seeds and epochs, but of less data (`TWINS`).

    Raises:
        SystemExit: there is no such cell.
    """
    full = name.removesuffix(SMALL)
    if full not in names(cells):
        raise SystemExit(f"no cell {name!r}; there are {', '.join(names(cells))}, and each with {SMALL} behind it")
    recipe = load_recipe(cells / f"{full}.toml")
    if full == name:
        return recipe
    epoch, smaller = TWINS[recipe.data.name]
    changes = [f"name={name}", f"description={json.dumps(f'{recipe.description}, of {epoch}')}", *smaller]
    # more held out, as there is less to choose on; and no cut measured on the way, which takes a third of such an epoch
    changes += ["data.validation=0.2", f"training.measure_every={math.ceil(recipe.training.epochs)}"]
    changes += ["training.precision=float32"]  # a cell takes days of many processors, and not all have bfloat16
    return load_recipe(cells / f"{full}.toml", changes)


def methods(recipe: Recipe) -> list[str]:
    """The labels of a cell: those of its recipe, and PAT where it can do what is asked."""
    plain = not any(layer.pattern not in (None, "filter") for layer in recipe.prune.patterns.values())
    return [*recipe.methods, *([pat.LABEL] if plain else [])]


def run_cell(
    recipe: Recipe, labels: Sequence[str], seeds: Sequence[int], out: Path, *, root: Path = ROOT, **options: Any
) -> dict[str, Any]:
    """Tune and run the methods one after the other; after each, write what is known. A method that fails is reported.

    Raises:
        DualpruneError: the cell's methods have unequal budgets; or, when all the others are done, some failed.
    """
    check_budgets(recipe, list(recipe.methods))
    failed, seeds = [], list(dict.fromkeys(seeds))
    for label in labels:
        go = run_pat if label == pat.LABEL else partial(run_method, label=label)
        try:
            row = go(recipe, seeds=seeds, out=out, **options)
        except Interrupted:
            raise
        except DualpruneError as error:
            print(f"{recipe.name}, {label}: {error}", file=sys.stderr)
            failed.append(label)
            continue
        table = read(root, recipe.name)  # only now: others may have written in the hours that this took
        known = {row["label"]: row for row in table["rows"]} | {label: row}
        table["rows"] = [known[name] for name in methods(recipe) if name in known]
        write_json(root / "results" / "arena" / f"{recipe.name}.json", table)
        write_page(root)
    if failed:
        raise DualpruneError(f"{recipe.name}: {', '.join(failed)} failed")
    return read(root, recipe.name)


def run_method(
    recipe: Recipe, label: str, seeds: Sequence[int], out: Path, *, device: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Return a method's row: its choice on the validation split, then its runs on the test set."""
    settings: dict[str, Any] = {"out": out, "device": device, "progress": progress}
    tuned = recipe.epochs(label) > 0  # a one-shot cut has nothing to choose
    choice = None
    if tuned:
        judge = unseen(recipe, device)
        choice = tune(recipe, [label], judge=judge, **settings)["methods"][label] | judged_on(judge)
    (row,) = compare(recipe, [label], seeds, tuned=tuned, **settings)["rows"]
    return row | {"choice": choice} | provenance(out / recipe.name, row)


def run_pat(
    recipe: Recipe, seeds: Sequence[int], out: Path, *, device: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """`run_method` for PAT."""
    place = out / recipe.name
    options: dict[str, Any] = {"dense_folder": place, "device": device, "progress": progress}
    scores: dict[str, list[float | None]] = {}
    trials = {f"{trial['lr']:g}, heal {trial['heal']:g}": trial for trial in pat.trials(recipe)}
    cutting, judge = recipe.without_retraining(), unseen(recipe, device)
    for name, trial in trials.items():
        folder = place / "tune" / f"lr{trial['lr']:g}-heal-{trial['heal']:g}"
        tried = unless_diverged(partial(pat.run, cutting, trial, recipe.seed, folder, split="validation", **options), progress)
        place_of_it = folder / f"{pat.LABEL}-seed{recipe.seed}"
        scores[name] = [None if tried is None else judge(place_of_it) if judge else tried["cut"]]
    best = trials[best_trial(pat.LABEL, scores)]
    runs = {seed: unless_diverged(partial(pat.run, recipe, best, seed, place, **options), progress) for seed in seeds}
    row = summarise(recipe, pat.LABEL, runs)
    return row | {"choice": {"lr": best["lr"], "settings": best, "scores": scores} | judged_on(judge)} | provenance(place, row)


def judged_on(judge: Unseen | None) -> dict[str, int]:
    """Return of how many images the scores are, where they are not of the part that the trials held out."""
    return {"judged_on": judge.count} if judge is not None else {}


def provenance(root: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return on what a method's runs were made, from the result.json of the first that did not diverge."""
    if not row["seeds"]:
        raise RunError(f"all runs of {row['label']!r} by the chosen settings diverged; give it lower learning rates")
    result = json.loads((root / f"{row['label']}-seed{row['seeds'][0]}" / "result.json").read_text(encoding="utf-8"))
    return {key: result[key] for key in ("metric", "versions", "device", "recipe_sha256")}


# --- the page -----------------------------------------------------------------------------------------------


def read(root: Path, name: str) -> dict[str, Any]:
    """Return what results/arena has of a cell."""
    path = root / "results" / "arena" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cell": name, "rows": []}


def write_page(root: Path = ROOT, cells: Path = CELLS) -> None:
    """Put a figure of all cells and their tables between the markers of docs/arena.md."""
    page = root / "docs" / "arena.md"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no markers {BEGIN} and {END}")
    twins = [name + SMALL for name in names(cells) if read(root, name + SMALL)["rows"]]
    recipes = [load_cell(name, cells) for name in sorted(names(cells) + twins)]
    tables = {recipe.name: read(root, recipe.name)["rows"] for recipe in recipes}
    parts = [*figure(root, tables), *(section(recipe, tables[recipe.name]) for recipe in recipes)]
    write_text(page, before + "\n\n".join([BEGIN, *parts, END]) + after)


def figure(root: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Draw how far every method is from SLR, and return what shows it; nothing while no cell has SLR and a rival."""
    known = {name: {row["label"]: (row["mean"], row["std"] or 0.0) for row in rows} for name, rows in tables.items()}
    cells = {name: rows for name, rows in known.items() if "slr" in rows and len(rows) > 1}
    if not cells:
        return []
    title = "Points from SLR right after cutting, mean and standard deviation"
    svg = plots.to_svg(plots.standings(cells), "arena", f"{title}; the tables below have the numbers")
    write_text(root / "docs/figures/arena.svg", svg)
    return [f"![{title}](figures/arena.svg)"]


def section(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a cell's heading and table: one row a method, the best of a column in bold, "not run yet" where it is not."""
    if not rows:
        return f"### {recipe.name}\n\n{recipe.description}: not run yet."
    known = {row["label"]: row for row in rows}
    bests = {key: max((row[key] for row in rows if row[key] is not None), default=None) for key in ("mean", "retrained")}
    columns = HEAD.count("|") + 1
    lines = ["| " + HEAD.replace("|", " | ") + " |", "|---" * columns + "|"]
    for label in methods(recipe):
        cells = row_cells(known[label], bests) if label in known else ["not run yet", *["–"] * (columns - 2)]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    dense = f"dense {rows[0]['dense']:.2f} %, in {rows[0]['metric'].removesuffix(' %')}"
    return "\n".join([f"### {recipe.name}", "", f"{recipe.description}; {dense}.", "", *lines])


def row_cells(row: Mapping[str, Any], bests: Mapping[str, float | None]) -> list[str]:
    """Return a method's cells but the first."""
    settings = (row["choice"] or {}).get("settings", {})
    own = ", ".join(f"{key} {short(value)}" for key, value in settings.items() if key != "lr")
    return [
        number(row["mean"], row["std"], bests["mean"]),
        number(row["retrained"], row["retrained_std"], bests["retrained"]),
        f"{row['n']}" + (f", and {len(row['diverged'])} diverged" if row["diverged"] else ""),
        f"{row['rate']:.1f}×",
        f"{row['lr']:g}" if row["lr"] else "–",
        f"{row['seconds_mean'] / 60:.1f}",
        f"{row['peak_memory_mb']:.0f}",
        own or "–",
    ]


def number(mean: float | None, std: float | None, best: float | None) -> str:
    """Return ``91.23 ± 0.04``, in bold where it is the best."""
    if mean is None:
        return "–"
    text = f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"
    return f"**{text}**" if mean == best else text


def short(value: Any) -> str:
    """Return a setting in few characters: a schedule as ``0.1→1``, another table as ``closing 4``."""
    if not isinstance(value, Mapping):
        return f"{value}"
    return f"{value['start']:g}→{value['end']:g}" if "start" in value else ", ".join(f"{key} {v:g}" for key, v in value.items())


if __name__ == "__main__":
    main()
