"""Carry finished runs into the repository: results/*.json, docs/figures/*.svg and the tables of docs/results.md.

    python benchmarks/publish.py runs/resnet20-cifar10-10x runs/table1_resnet56-cifar10-small

Every number comes from the runs' own result.json; nothing is typed by hand. Unfinished runs are left out, and so are
runs on the validation split.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from dualprune import plots
from dualprune.files import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
PER_RUN = [
    "method",
    "seed",
    "split",
    "dense",
    "cut",
    "retrained",
    "kept_model",
    "total_model",
    "rate",
    "rate_model",
    "epochs",
    "steps",
    "batch_size",
    "lr",
    "seconds",
    "peak_memory_mb",
    "versions",
    "device",
    "recipe_sha256",
    "command",
    "sizes",
]
HEAD = "method|after cutting, %|n (seeds)|dense|paper|rate, pruned layers|rate, all weights|lr|epochs|updates|minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="recipe folders under runs/")
    for folder in parser.parse_args().folders:
        publish(folder)


def publish(folder: Path) -> None:
    """Publish one recipe's runs."""
    places = [place for place in sorted(folder.glob("*-seed*")) if (place / "result.json").exists()]
    runs = [run for run in map(read_run, places) if run["split"] == "test"]
    tune = folder / "tune.json"
    if not runs and not tune.exists():
        raise SystemExit(f"{folder}: no finished run (<label>-seed<n>/result.json) and no tune.json in it")
    target = ROOT / "results" / f"{folder.name}.json"
    grid = json.loads(tune.read_text()) if tune.exists() else None
    write_json(target, {"recipe": folder.name, "tune": grid, "runs": runs})
    if runs:
        table = markdown(runs, grid)
        insert(ROOT / "docs" / "results.md", folder.name, "\n\n".join([table, *draw(folder.name, runs)]))
        seeds = [r["seed"] for r in runs if r["label"] == "slr"]
        if seeds:  # the first seed's weights, not the best seed's
            shutil.copy(folder / f"slr-seed{min(seeds)}" / "pruned.safetensors", target.with_suffix(".safetensors"))
        print(table)
    print(f"wrote {target.relative_to(ROOT)}")


def read_run(place: Path) -> dict[str, Any]:
    """Return what is worth keeping of a run: its result, its epochs and its history."""
    result = json.loads((place / "result.json").read_text())
    files = {"curve": place / "epochs.jsonl", "history": place / "history.jsonl"}
    rows = {k: [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else [] for k, file in files.items()}
    return {"label": result["label"], **{key: result.get(key) for key in PER_RUN}, "paper": result.get("paper"), **rows}


def markdown(runs: list[dict[str, Any]], tune: dict[str, Any] | None) -> str:
    """Return the comparison as a Markdown table, best first."""
    labels = {r["label"]: [s for s in runs if s["label"] == r["label"]] for r in runs}
    ranked = sorted(labels.items(), key=lambda item: -statistics.fmean(r["cut"] for r in item[1]))
    lines = ["| " + HEAD.replace("|", " | ") + " |", "|---" * (HEAD.count("|") + 1) + "|"]
    for label, same in ranked:
        cuts, first = [r["cut"] for r in same], same[0]
        spread = f" ± {statistics.stdev(cuts):.2f}" if len(cuts) > 1 else ""
        paper = (first["paper"] or {}).get(label)
        seeds = ", ".join(str(r["seed"]) for r in same)
        choice = tune["methods"].get(label) if tune else None
        tuned = "*" if choice and all(r["lr"] == choice["lr"] for r in same) else ""
        lr = f"{first['lr']:g}{tuned}" if first["epochs"] else "–"
        cells = [
            label,
            f"{statistics.fmean(cuts):.2f}{spread}",
            f"{len(cuts)} ({seeds})",
            f"{first['dense']:.2f}",
            "–" if paper is None else paper,
            f"{first['rate']:.2f}×",
            f"{first['rate_model']:.2f}×",
            lr,
            first["epochs"],
            len(first["history"]),
            f"{statistics.fmean(r['seconds'] for r in same) / 60:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if tune:
        lines += ["", f"\\* chosen on {tune['held_out']:.0%} of the training images held out, from {tune['grid']}:"]
        for label, choice in tune["methods"].items():
            scores = ", ".join(f"lr {lr}: {statistics.fmean(values):.2f}" for lr, values in choice["scores"].items())
            lines.append(f"{label} ({scores});")
    return "\n".join(lines)


CAPTIONS = {
    "fig1": "Accuracy after cutting by epoch (Fig. 1 of the paper, from our runs)",
    "fig9": "Surrogate conditions over the updates (Fig. 9 of the paper, from our runs)",
    "violation": "Distance between weights and sparse copies",
}


def draw(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """Draw Fig. 1 (accuracy after cutting by epoch) and Fig. 9 (conditions) of the SLR paper from these runs; return links."""
    epochs: dict[str, list[Any]] = {}
    histories: dict[str, list[Any]] = {}
    for run in runs:
        if run["curve"]:
            epochs.setdefault(run["label"], []).append(run["curve"])
            histories.setdefault(run["label"], []).append(run["history"])
    folder = ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    figures = {"fig1": plots.accuracy_after_cutting(epochs, metric="top-1 %", dense=runs[0]["dense"])} if epochs else {}
    if plots.has(histories, "condition_w"):
        figures["fig9"] = plots.conditions({k: v for k, v in histories.items() if plots.has({k: v}, "condition_w")})
    if plots.has(histories, "violation"):
        figures["violation"] = plots.violation({k: v for k, v in histories.items() if plots.has({k: v}, "violation")})
    for which, figure in figures.items():
        svg = plots.to_svg(figure, which, f"{name}: {CAPTIONS[which]}")
        if "xmlns=" not in svg:  # a file of its own needs the name space that a page lends
            svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        write_text(folder / f"{name}-{which}.svg", svg)
    return [f"![{CAPTIONS[which]}](figures/{name}-{which}.svg)" for which in figures]


def insert(page: Path, name: str, table: str) -> None:
    """Put `table` between the page's markers for `name`."""
    text = page.read_text()
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in text:
        raise SystemExit(f"{page} has no marker {begin}; add it where the table shall stand")
    write_text(page, re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
