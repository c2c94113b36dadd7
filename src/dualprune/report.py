"""What came out: one self-contained HTML page from a run folder or a comparison, and the sparsity of any model.

The pages hold their style and their figures as inline CSS and SVG, run no script and load nothing. Every string from a
file is escaped. What a folder does not hold is said in the page; a file that is not what it should be is a FormatError.
"""

from __future__ import annotations

import base64
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dualprune.errors import FormatError
from dualprune.files import NUMBER, check_object, read_json, read_rows, read_text, write_text
from dualprune.markup import (
    DASH,
    Html,
    el,
    facts,
    html_figure,
    html_page,
    html_table,
    in_bytes,
    in_hundredths,
    in_short,
    in_thousands,
    in_time,
    in_times,
    join,
    or_dash,
    remark,
    unit_of,
    with_sign,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dualprune.plots import Runs

HONEST = (
    "Unstructured sparsity makes the file smaller; it does not make this network faster on an ordinary CPU or GPU, "
    "which multiplies by the zeros all the same."
)

# ------------------------------------------------------------------ reading a run folder

Row = dict[str, Any]
_RESULT: dict[str, Any] = {
    **dict.fromkeys(("recipe", "label", "method", "metric", "split", "budget", "device", "recipe_sha256"), str),
    **dict.fromkeys(("importance", "command", "weights_sha256", "data_sha256"), str),
    **dict.fromkeys(("dense", "cut", "retrained", "rate", "rate_model", "lr", "seconds", "peak_memory_mb"), NUMBER),
    **dict.fromkeys(("seed", "kept", "total", "kept_model", "total_model", "epochs", "steps", "updates"), int),
    **dict.fromkeys(("retrain_epochs", "batch_size"), int),
    **dict.fromkeys(("versions", "paper", "sizes", "metrics"), dict),
    "layers": list,
}
_LAYER = {"name": str, "shape": list, "pattern": str, "kept": int, "total": int}
_SIZES = {"dense_bytes": int, "sparse_bytes": int}
_HISTORY: dict[str, Any] = {
    **dict.fromkeys(("step", "update"), int),
    **dict.fromkeys(("rho", "s", "violation", "z_change", "support_change", "dual_bound"), NUMBER),
    **dict.fromkeys(("condition_w", "condition_z", "loss_known"), bool),
}
_EPOCHS: dict[str, Any] = {
    **dict.fromkeys(("epoch", "step"), int),
    **dict.fromkeys(("loss", "lr", "accuracy", "accuracy_cut", "seconds"), NUMBER),
}
_COMPARED: dict[str, Any] = {
    "label": str,
    **dict.fromkeys(("n", "epochs"), int),
    **dict.fromkeys(("mean", "std", "dense", "lr", "seconds_mean", "rate", "paper"), NUMBER),
    **dict.fromkeys(("recipe_sha256", "diverged"), list),
}
_FILES = ("result.json", "history.jsonl", "epochs.jsonl", "recipe.toml")
_NAME = re.compile(r"(?P<label>.+)-seed(?P<seed>\d+)")


@dataclass(frozen=True)
class _Run:
    folder: Path
    label: str
    seed: int | None
    result: Row | None  # None: the run has not finished
    history: list[Row]
    epochs: list[Row]
    recipe: str

    @property
    def split(self) -> str | None:
        return self.result.get("split") if self.result else None

    @property
    def pruning_epochs(self) -> list[Row]:
        return [row for row in self.epochs if row.get("stage") != "retrain"]


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _read_run(folder: Path) -> _Run:
    if not _holds_run(folder):
        raise FormatError(f"no run in {str(folder)!r}: expected a folder that holds some of {', '.join(_FILES)}")
    result = read_json(folder / "result.json", _RESULT)
    for key, types in (("layers", _LAYER), ("sizes", _SIZES)):
        parts = (result or {}).get(key) or []
        for place, part in enumerate(parts if key == "layers" else [parts] if parts else [], 1):
            check_object(part, types, f"{folder / 'result.json'}, {key}{f' row {place}' if key == 'layers' else ''}", types)
    named = _NAME.fullmatch(folder.resolve().name)
    found = result or {}
    return _Run(
        folder,
        label=found.get("label") or (named["label"] if named else folder.resolve().name),
        seed=found.get("seed", int(named["seed"]) if named else None),
        result=result,
        history=read_rows(folder / "history.jsonl", _HISTORY, ("step", "update")),
        epochs=read_rows(folder / "epochs.jsonl", _EPOCHS, ("epoch",)),
        recipe=read_text(folder / "recipe.toml"),
    )


def _read_heat_maps(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        maps = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} is no safetensors file: {error}") from error
    for name, values in maps.items():
        if not re.fullmatch(r"(before|after)\..+", name) or values.ndim != 2 or values.dtype.kind != "f":
            raise FormatError(
                f"{path}: expected 2-D floats named before.NAME and after.NAME, got {name!r}, "
                f"{values.dtype} of shape {values.shape}"
            )
    return {name: values for name, values in maps.items() if values.size}


def paper_number(paper: Mapping[str, Any] | None, label: str) -> float | None:
    """Return what a recipe's `[paper]` has for a label; None where it is no yardstick, because the recipe is scaled down."""
    value = None if _scaled_down(paper) else (paper or {}).get(label)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _scaled_down(paper: Mapping[str, Any] | None) -> bool:
    return (paper or {}).get("scaled_down") is True


def _gap(value: float) -> Html:
    """Return by how much ours is above the paper's number; a miss says so."""
    missed = value < 0
    return el("span", with_sign(value) + ", missed" * missed, class_="bad" if missed else "good")


def _model_name(run: _Run) -> str:
    """Return the model's name from the recipe as people write it, or the recipe's name."""
    try:
        model = tomllib.loads(run.recipe).get("model")
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{run.folder / 'recipe.toml'} is not TOML: {error}") from error
    name = model.get("name") if isinstance(model, dict) else model
    if not isinstance(name, str):
        return (run.result or {}).get("recipe") or run.folder.resolve().parent.name
    known = re.fullmatch(r"(resnet|vgg|lenet)-?(\d[\d-]*)", name)
    return f"{ {'resnet': 'ResNet', 'vgg': 'VGG', 'lenet': 'LeNet'}[known[1]] }-{known[2]}" if known else name


# ------------------------------------------------------------------ the figures both pages share


def _plots(histories: Runs, epochs: Runs, *, metric: str, dense: float | None, paper: Mapping[str, float]) -> Html:
    from dualprune import plots

    spread = " Lines are means over seeds, bands run from the lowest to the highest."
    spread = spread if any(len(seeds) > 1 for seeds in epochs.values()) else ""
    shown: list[Html] = []
    missing: list[str] = []

    def add(name: str, key: str, title: str, caption: str, draw: Callable[[], Figure], runs: Runs) -> None:
        if plots.has(runs, key):
            shown.append(html_figure(name, draw(), title, caption + (spread if name != "conditions" else "")))
        else:
            missing.append(title.lower() if title[0].isascii() else title)

    add(
        "accuracy", "accuracy_cut", "Accuracy after cutting, by epoch",
        f"{metric} of the cut model with batch-norm statistics re-estimated, without any gradient step after the cut.",
        lambda: plots.accuracy_after_cutting(epochs, metric=metric, dense=dense, paper=paper), epochs,
    )  # fmt: skip
    add(
        "conditions", "condition_w", "Surrogate optimality conditions over the updates",
        "Filled where the condition held and the multipliers moved; at the right, the share of updates."
        + _loss_words(histories),
        lambda: plots.conditions(histories), histories,
    )  # fmt: skip
    add(
        "violation", "violation", "Distance between weights and their sparse copies",
        "‖W − Z‖ is what the cut will remove; ‖Zᵏ − Zᵏ⁻¹‖ is how far the sparse copies still move at an update.",
        lambda: plots.violation(histories), histories,
    )  # fmt: skip
    add(
        "steps", "rho", "Step size and penalty",
        "The step size s of the multipliers and the penalty ρ.",
        lambda: plots.step_and_penalty(histories), histories,
    )  # fmt: skip
    add(
        "bound", "dual_bound", "Overestimate of the dual value",
        "γ s ‖W − Z‖² + L for SLR and γ ρ ‖W − Z‖² + L for ADMM (Theorem 2), with γ = 1.",
        lambda: plots.dual_bound(histories), histories,
    )  # fmt: skip
    add(
        "support", "support_change", "Support change per update",
        "Share of the weights whose mask flipped; updates in which none did are left out of the log axis.",
        lambda: plots.support_change(histories), histories,
    )  # fmt: skip
    note = [remark(f"Not recorded by what ran here: {', '.join(missing)}.")] if missing else []
    return join([el("div", *shown, class_="plots") if shown else "", *note])


def _loss_words(histories: Runs) -> str:
    known = [
        row["loss_known"]
        for seeds in histories.values()
        for rows in seeds
        for row in rows
        if row.get("loss_known") is not None and row.get("condition_w") is not None
    ]
    if not known or all(known):
        return ""
    return f" The training loss was known in {sum(known)} of {len(known)} updates, else the quadratic part decided."


# ------------------------------------------------------------------ the page of a run


def render_run(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    What the folder does not hold (an interrupted run has no result, a one-shot cut no epochs) is said in the page.

    Raises:
        FormatError: there is no run in the folder, or a file in it is damaged; the message names file and line.
    """
    run = _read_run(Path(run_dir))
    maps = _read_heat_maps(run.folder / "heatmaps.safetensors")
    title = f"{_model_name(run)}, {run.label}" + (f", seed {run.seed}" if run.seed is not None else "")
    result = run.result or {}
    paper = paper_number(result.get("paper"), run.label)
    plots = _plots(
        {run.label: [run.history]}, {run.label: [run.pruning_epochs]}, metric=result.get("metric") or "accuracy",
        dense=result.get("dense"), paper={} if paper is None else {run.label: paper},
    )  # fmt: skip
    page = html_page(
        title,
        el("header", el("h1", title), el("p", _verdict(run, paper), class_="verdict")),
        _status(run),
        _key_figures(run, paper),
        el("p", HONEST, class_="honest") if _unstructured(result) else "",
        _metrics_table(result),
        _pictures(run.folder / "pictures"),
        _section("Course of the run", plots),
        _section("Layers", _weights(run, maps), _layers(run)),
        _section("Epoch by epoch", _epochs_table(run)),
        _section("Provenance", _provenance(run)),
    )
    path = run.folder / "report.html"
    write_text(path, page)
    return path


def _section(title: str, *body: object) -> Html:
    return el("section", el("h2", title), *body)


def _verdict(run: _Run, paper: float | None) -> str:
    result = run.result
    last = next((row for row in reversed(run.pruning_epochs) if row.get("accuracy_cut") is not None), None)
    if result is None:
        if last is None:
            return f"{_model_name(run)}: not finished, and not measured after cutting yet"
        return f"{_model_name(run)}: not finished; {last['accuracy_cut']:.1f} after cutting in epoch {last['epoch']}"
    unit = unit_of(result.get("metric") or "")
    words = [_model_name(run)]
    if result.get("rate") is not None:
        words.append(f"{in_times(result['rate'])} smaller in the pruned layers")
    for key, word in (("cut", "after cutting"), ("retrained", "after retraining")):
        if result.get(key) is not None:
            words.append(f"{result[key]:.1f}{unit} {word}")
    if result.get("dense") is not None:
        words.append(f"dense {result['dense']:.1f}{unit}")
    if paper is not None:
        words.append(f"paper {paper:g}{unit}")
    if paper is not None and result.get("cut") is not None and result["cut"] < paper:
        words.append(f"which is missed by {in_hundredths(paper - result['cut'])}")
    return ", ".join(words)


def _status(run: _Run) -> Html:
    if run.result is not None:
        return Html("")
    return remark(
        f"This run has no result.json: it was interrupted or is still going, after {len(run.epochs)} recorded "
        "epochs. The same command continues it. Figures below are those of an unfinished run."
    )


def _key_figures(run: _Run, paper: float | None) -> Html:
    result = run.result
    if result is None:
        return Html("")
    unit, cut, dense = unit_of(result.get("metric") or ""), result.get("cut"), result.get("dense")
    sizes = result.get("sizes") or {}
    size = f"{in_bytes(sizes['dense_bytes'])} → {in_bytes(sizes['sparse_bytes'])}" if sizes else None
    drop = None if cut is None or dense is None else cut - dense
    measured = f"{result.get('metric') or 'accuracy'} after cutting, {result.get('split') or 'unnamed'} split"
    pairs = [
        (measured, None if cut is None else in_hundredths(cut) + unit),
        ("against dense, points" if unit else "against dense", None if drop is None else with_sign(drop)),
        ("the paper's number", None if paper is None else f"{paper:g}{unit}"),
        ("against the paper", None if paper is None or cut is None else _gap(cut - paper)),
        (
            "after masked retraining",
            or_dash(result.get("retrained"), in_hundredths) + unit if result.get("retrained") else None,
        ),
        ("fewer weights in the pruned layers", None if result.get("rate") is None else in_times(result["rate"])),
        ("fewer weights in the whole model", None if result.get("rate_model") is None else in_times(result["rate_model"])),
        ("file, dense → sparse", size),
    ]
    return facts(pairs, "key")


def _unstructured(result: Row) -> bool:
    return any(layer["pattern"] == "unstructured" for layer in result.get("layers") or ())


def _metrics_table(result: Row) -> Html:
    """Return every metric of the task before and after cutting; nothing where there is but one, which stands above."""
    metrics: dict[str, dict[str, float]] = result.get("metrics") or {}
    names = list(dict.fromkeys(name for measured in metrics.values() for name in measured))
    if len(names) < 2:
        return Html("")
    words = {"dense": "dense", "cut": "after cutting", "retrained": "after retraining"}
    rows = [(name, *(or_dash(metrics[when].get(name), in_hundredths) for when in metrics)) for name in names]
    return html_table("All metrics, shares in %", ("metric", *(words.get(when, when) for when in metrics)), rows)


def _pictures(folder: Path) -> Html:
    """Return the task's pictures side by side: what the dense model predicts, and what the cut one does."""
    from PIL import Image

    words = {"dense": "dense", "cut": "after cutting", "retrained": "after retraining"}
    order = list(words)
    shown = []
    for path in sorted(folder.glob("*-*.png"), key=lambda p: (p.stem[:2], order.index(p.stem[3:]))):
        with Image.open(path) as image:
            title = str(image.info.get("Title") or path.stem)
        caption = f"{title}, {words[path.stem[3:]]}"
        source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        shown.append(el("figure", el("img", src=source, alt=caption, style="width:100%"), el("figcaption", caption)))
    return _section("Predictions", el("div", *shown, class_="plots")) if shown else Html("")


def _layers(run: _Run) -> Html:
    layers = (run.result or {}).get("layers")
    if not layers:
        return remark("No table of layers: the run recorded none.")
    rows = [
        (str(number), layer["name"], "×".join(map(str, layer["shape"])), layer["pattern"], in_thousands(layer["kept"]),
         in_thousands(layer["total"]), f"{100 * (share := layer['kept'] / max(layer['total'], 1)):.3g} %", _bar(share))
        for number, layer in enumerate(layers, 1)
    ]  # fmt: skip
    head = ("#", "parameter", "shape", "pattern", "kept", "of", "share kept", "")
    return html_table("What each pruned layer keeps", head, rows, text=(1, 2, 3, 7))


def _bar(share: float) -> Html:
    return el("span", el("span", style=f"width:{100 * share:.1f}%"), class_="bar", aria_hidden="true")


def _weights(run: _Run, maps: Mapping[str, Any]) -> Html:
    from dualprune import plots

    layers = (run.result or {}).get("layers")
    shown = []
    if layers:
        shown.append(html_figure("density", plots.density_bars(layers, label=run.label), "Share of weights kept by layer",
                             "In percent of the layer's weights."))  # fmt: skip
    if maps:
        caption = "Blue is positive, orange negative, strength the magnitude; zeros are blank. Large layers: one corner."
        shown.append(html_figure("heat", plots.heat_maps(maps), "Weights before and after", caption))
    missing = [] if maps else [remark("No weight heat maps: the run recorded none.")]
    return join([el("div", *shown, class_="plots"), *missing])


def _epochs_table(run: _Run) -> Html:
    if not run.epochs:
        return remark("No epochs: this method cuts without training, or no epoch was finished.")
    columns = {"loss": "training loss", "lr": "learning rate", "accuracy": "uncut", "accuracy_cut": "after cutting"}
    forms = {"loss": lambda v: f"{v:.4f}", "lr": lambda v: f"{v:.3g}", "accuracy": in_hundredths, "accuracy_cut": in_hundredths}
    shown = [key for key in columns if any(row.get(key) is not None for row in run.epochs)]
    stages = len({row.get("stage") for row in run.epochs}) > 1
    rows = [
        (str(row["epoch"]), *([row.get("stage") or DASH] * stages), *(or_dash(row.get(k), forms[k]) for k in shown),
         or_dash(row.get("seconds"), in_time))
        for row in run.epochs
    ]  # fmt: skip
    head = ("epoch", *["stage"] * stages, *(columns[key] for key in shown), "time")
    table = html_table("Epochs", head, rows, text=())
    return el("details", el("summary", f"{len(rows)} epochs as a table"), table)


def _provenance(run: _Run) -> Html:
    result = run.result or {}
    n = "1 (one seed; the comparison shows the spread)"
    budget = [("epochs", "epochs"), ("steps", "optimizer steps"), ("updates", "updates"), ("batch_size", "batch size")]
    spent = ", ".join(
        f"{word} {result[key]:,}" if word == "batch size" else f"{result[key]:,} {word}"
        for key, word in budget
        if result.get(key) is not None
    )
    versions = ", ".join(f"{name} {value}" for name, value in (result.get("versions") or {}).items())
    paper = ", ".join(map(": ".join, _paper_pairs(result.get("paper") or {})))
    scaled_down = " (of another network, data or budget)" if _scaled_down(result.get("paper")) else ""
    pairs = [
        ("recipe", result.get("recipe")),
        ("method", result.get("method")),
        ("seed", run.seed),
        ("n", n),
        ("measured on", result.get("split")),
        ("training budget", spent),
        ("learning rate", None if result.get("lr") is None else in_short(result["lr"])),
        ("layer budget", result.get("budget")),
        ("weights ranked by", result.get("importance")),
        ("time", None if result.get("seconds") is None else in_time(result["seconds"])),
        ("peak memory", None if result.get("peak_memory_mb") is None else f"{result['peak_memory_mb']:,.0f} MB"),
        ("device", result.get("device")),
        ("versions", versions),
        ("the paper", paper and paper + scaled_down),
        ("recipe SHA-256", result.get("recipe_sha256") and el("code", result["recipe_sha256"])),
        ("weights SHA-256", result.get("weights_sha256") and el("code", result["weights_sha256"])),
        ("data SHA-256", result.get("data_sha256") and el("code", result["data_sha256"])),
        ("command", result.get("command") and el("code", result["command"])),
    ]
    recipe = el("details", el("summary", "the recipe as run"), el("pre", run.recipe)) if run.recipe else ""
    return join([facts(pairs, "facts"), recipe])


# ------------------------------------------------------------------ the page of a comparison


def render_comparison(recipe_dir: str | Path) -> Path:
    """Write ``compare.html`` from ``compare.json`` and the run folders ``<label>-seed<n>`` beside it; return its path.

    A method that compare.json does not hold is computed from its finished runs, unless compare.json says which runs it
    compared: then any other is named and left out. Unfinished runs are named and left out of the table; those of another
    split are named and left out.

    Raises:
        FormatError: there is neither a comparison nor a run, or a file is damaged; the message names file and line.
    """
    folder = Path(recipe_dir)
    table = read_json(folder / "compare.json", {"recipe": str, "split": str, "rows": list, "paper": dict}) or {}
    for number, row in enumerate(table.get("rows") or [], 1):
        check_object(row, _COMPARED, f"{folder / 'compare.json'}, row {number}", ("label",))
    places = sorted(path for path in folder.glob("*-seed*") if _NAME.fullmatch(path.name) and _holds_run(path))
    runs = [_read_run(path) for path in places]
    runs.sort(key=lambda run: (run.label, run.seed if run.seed is not None else -1))
    split = table.get("split") or next((run.split for run in runs if run.split), None)
    others = [run for run in runs if run.split not in (None, split)]
    strangers = [run for run in runs if run not in others and not _compared(run, table)]
    runs = [run for run in runs if run not in others and run not in strangers]
    rows = _compared_rows(table, runs)
    if not rows and not runs:
        raise FormatError(f"nothing to compare in {str(folder)!r}: expected compare.json or folders LABEL-seedN")
    rows.sort(key=lambda row: -row["mean"] if row["mean"] is not None else 0.0)
    first: Row = next((run.result for run in runs if run.result), {})
    metric = first.get("metric") or "accuracy"
    paper = table.get("paper") or first.get("paper") or {}
    levels = {row["label"]: row["paper"] for row in rows if row["paper"] is not None}
    dense = [row["dense"] for row in rows if row["dense"] is not None]
    order = list(dict.fromkeys([row["label"] for row in rows] + [run.label for run in runs]))
    by_label = {label: [run for run in runs if run.label == label] for label in order}
    title = f"{table.get('recipe') or first.get('recipe') or folder.resolve().name}: methods side by side"
    page = html_page(
        title,
        el("header", el("h1", title), el("p", _comparison_verdict(rows, metric), class_="verdict")),
        _comparison_table(rows, metric, split),
        *(remark(f"{run.folder.name} was measured on the {run.split} split and is left out.") for run in others),
        *(
            remark(f"{run.folder.name} is not among the runs that were compared (another recipe or seed) and is left out.")
            for run in strangers
        ),
        *(remark(note) for note in _comparison_notes(rows, runs)),
        el("p", HONEST, class_="honest"),
        _section(
            "Curves",
            _plots(
                {label: [run.history for run in of_label] for label, of_label in by_label.items()},
                {label: [run.pruning_epochs for run in of_label] for label, of_label in by_label.items()},
                metric=metric,
                dense=fmean(dense) if dense else None,
                paper=levels,
            ),
        ),
        _section("Runs", _runs_table(folder, by_label)),
        _paper_section(paper) if paper else "",
        _section("Provenance", _shared_provenance(runs)),
    )
    path = folder / "compare.html"
    write_text(path, page)
    return path


def _paper_section(paper: Mapping[str, Any]) -> Html:
    note = remark("The recipe is scaled down: the paper's numbers are of another network, data or budget.")
    return _section("The paper", note if _scaled_down(paper) else "", facts(_paper_pairs(paper), "facts"))


def _paper_pairs(paper: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in paper.items() if key != "scaled_down"]


def _compared(run: _Run, table: Row) -> bool:
    """Whether compare.json counts a finished run by its recipe's hash; one of an earlier version does not say."""
    rows = [row for row in table.get("rows") or [] if row.get("recipe_sha256") is not None]
    return run.result is None or not rows or any(run.result.get("recipe_sha256") in row["recipe_sha256"] for row in rows)


def _compared_rows(table: Row, runs: Sequence[_Run]) -> list[Row]:
    """Return one row a method, with every key that the page reads: compare.json's, completed from the runs."""
    results: dict[str, list[Row]] = {}
    for run in runs:
        if run.result is not None and run.result.get("cut") is not None:
            results.setdefault(run.label, []).append(run.result)
    given = {row["label"]: row for row in table.get("rows") or []}
    return [_compared_row(label, results.get(label, []), given.get(label, {})) for label in {**given, **results}]


def _compared_row(label: str, results: Sequence[Row], given: Row) -> Row:
    cut = [result["cut"] for result in results]
    computed: Row = {"label": label} | {key: _mean(results, key) for key in ("dense", "rate", "lr", "epochs")}
    computed |= {
        "n": len(cut),
        "mean": fmean(cut) if cut else None,
        "std": stdev(cut) if len(cut) > 1 else None,
        "seconds_mean": _mean(results, "seconds"),
        "paper": paper_number(results[0].get("paper"), label) if results else None,
    }
    if given.get("mean") is None:
        return computed | {key: value for key, value in given.items() if value is not None} | {"runs": len(cut)}
    # a row of compare.json is taken whole: the runs that are here now have another spread
    return {**computed, "std": None, **given, "runs": len(cut)}


def _mean(results: Sequence[Row], key: str) -> float | None:
    values = [result[key] for result in results if result.get(key) is not None]
    return fmean(values) if values else None


def _comparison_verdict(rows: Sequence[Row], metric: str) -> str:
    best = max((row for row in rows if row["mean"] is not None), key=lambda row: row["mean"], default=None)
    if best is None:
        return "No run has finished yet"
    unit = unit_of(metric)
    words = [f"{best['label']} is first of {len(rows)}" if len(rows) > 1 else best["label"]]
    words.append(f"{best['mean']:.1f}{unit} after cutting" + (f" at {in_times(best['rate'])}" if best["rate"] else ""))
    if best["dense"] is not None:
        words.append(f"dense {best['dense']:.1f}{unit}")
    missed = [row["label"] for row in rows if None not in (row["paper"], row["mean"]) and row["mean"] < row["paper"]]
    if missed:
        words.append(f"the paper's number is missed by {' and '.join(missed)}")
    return ", ".join(words)


def _comparison_table(rows: Sequence[Row], metric: str, split: str | None) -> Html:
    best = max((row["mean"] for row in rows if row["mean"] is not None), default=None)
    dense = [row["dense"] for row in rows if row["dense"] is not None]
    published = any(row["paper"] is not None for row in rows)
    shown: list[Sequence[object]] = []
    if dense:
        shown.append(("dense, not pruned", in_hundredths(fmean(dense)), *[""] * (6 + published), {"class_": "level"}))
    for row in rows:
        mean, paper = row["mean"], row["paper"]
        shown.append((
            row["label"],
            _mean_cell(row),
            str(row["n"]),
            DASH if None in (mean, row["dense"]) else with_sign(mean - row["dense"]),
            *[_published(paper, mean)] * published,
            or_dash(row["rate"], in_times),
            or_dash(row["lr"], in_short),
            or_dash(row["epochs"], in_short),
            or_dash(row["seconds_mean"], lambda v: f"{v:,.0f}" if v >= 10 else f"{v:.2g}"),
            {"class_": "best" if mean is not None and mean == best else None},
        ))  # fmt: skip
    where = f", {split} split" if split else ""
    caption = f"{metric} right after cutting, mean ± standard deviation over n seeds{where}; the best in bold"
    head = ("method", "after cutting", "n", "from dense", *["paper"] * published, "rate", "lr", "epochs", "seconds")
    return html_table(caption, head, shown)


def _mean_cell(row: Row) -> str:
    mean, std, diverged = row["mean"], row["std"], len(row.get("diverged") or ())
    if mean is None:
        return "diverged" if diverged else DASH
    spread = "" if std is None else f" ± {in_hundredths(std)}"
    return in_hundredths(mean) + spread + f" ({diverged} diverged)" * bool(diverged)


def _published(paper: float | None, mean: float | None) -> str:
    if paper is None or mean is None:
        return or_dash(paper, in_short)
    return join((f"{paper:g} (", _gap(mean - paper), ")"))


def _comparison_notes(rows: Sequence[Row], runs: Sequence[_Run]) -> list[str]:
    notes = [f"{run.folder.name} has not finished: its curve is drawn, its number is not in the table."
             for run in runs if run.result is None]  # fmt: skip
    notes += [
        f"The table counts {row['n']} runs of {row['label']}, the folder holds {row['runs']} finished ones."
        for row in rows
        if row["n"] != row["runs"]
    ]
    epochs = {row["epochs"] for row in rows if row["epochs"]}
    if len(epochs) > 1:
        notes.append(f"The budgets are unequal: {', '.join(map(in_short, sorted(epochs)))} epochs.")
    return notes


def _runs_table(folder: Path, by_label: Mapping[str, Sequence[_Run]]) -> Html:
    if not any(by_label.values()):
        return remark("The run folders are not here: only compare.json was read.")
    shown = []
    for run in (run for of_label in by_label.values() for run in of_label):
        result = run.result or {}
        page = run.folder / "report.html"
        link = quote(page.relative_to(folder).as_posix())
        name = el("a", run.folder.name, href=link) if page.is_file() else run.folder.name
        shown.append((
            name, or_dash(result.get("cut"), in_hundredths), or_dash(result.get("dense"), in_hundredths),
            or_dash(result.get("rate"), in_times), or_dash(result.get("rate_model"), in_times),
            or_dash((result.get("sizes") or {}).get("sparse_bytes"), in_bytes), or_dash(result.get("seconds"), in_time),
            result.get("method") or "not finished",
        ))  # fmt: skip
    head = ("run", "after cutting", "dense", "rate, pruned layers", "rate, whole model", "sparse file", "time", "method")
    return html_table("Every run; its own page where there is one", head, shown, text=(0, 7))


def _shared_provenance(runs: Sequence[_Run]) -> Html:
    """Return what the runs were made with; more than one value under a name is shown, as it limits the comparison."""
    results = [run.result for run in runs if run.result is not None]
    if not results:
        return remark("No finished run folder is here to say with what the numbers were made.")

    def values(read: Callable[[Row], Any]) -> str:
        return " | ".join(dict.fromkeys(str(found) for result in results if (found := read(result)) is not None))

    names = dict.fromkeys(name for result in results for name in result.get("versions") or {})
    pairs = [
        ("seeds", values(lambda r: r.get("seed"))),
        ("layer budget", values(lambda r: r.get("budget"))),
        ("weights ranked by", values(lambda r: r.get("importance"))),
        ("batch size", values(lambda r: r.get("batch_size"))),
        ("optimizer steps", values(lambda r: r.get("steps"))),
        ("device", values(lambda r: r.get("device"))),
        *((name, values(lambda r, name=name: (r.get("versions") or {}).get(name))) for name in names),  # type: ignore[misc]
    ]
    return facts(pairs, "facts")
