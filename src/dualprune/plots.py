"""The figures of a run or of several: rows of history and epochs in, matplotlib figures or SVG text out.

Every function takes `Runs`, ``{label: [rows of seed 0, rows of seed 1, …]}``, draws one line a label (the mean over
the seeds that have the point) and a band from their smallest to their largest value, and leaves out what the rows do
not hold. A label has the same colour and dashes in every figure. Backgrounds are transparent and ink takes the page's
text colour, so that the SVG reads on light and on dark pages. No global matplotlib state is touched.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import StringIO
from itertools import groupby
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Sequence[Rows]]

INK = "#767676"  # 4.5 : 1 on white and on black; in the SVG it becomes currentColor
# Okabe and Ito's palette, told apart by every common kind of colour vision; its blue a little lighter for dark pages.
_STYLES: dict[str, tuple[str, Any]] = {
    "slr": ("#1F83C4", "-"),
    "slr-paper": ("#56B4E9", (0, (5, 1.5))),
    "admm": ("#D55E00", "-"),
    "admm-published": ("#E69F00", (0, (5, 1.5))),
    "gradual": ("#009E73", "-"),
    "oneshot": ("#CC79A7", (0, (1, 1.5))),
}
_MORE_COLOURS = ("#CC79A7", "#8C6BB1", "#A6761D", "#5B8C2A", "#4C8C99")
_MORE_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (3, 1.5, 1, 1.5)))
_WIDTH = 6.4  # inches: 614 px at the browser's 96 per inch, about a column of documentation
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",
    "svg.hashsalt": "dualprune",
}


def style(label: str) -> dict[str, Any]:
    """Return the colour and dashes of `label`, the same in every figure; unknown labels get theirs by checksum."""
    number = zlib.crc32(label.encode())
    other = (_MORE_COLOURS[number % 5], _MORE_DASHES[number // 5 % 3])
    colour, dashes = _STYLES.get(label, other)
    return {"color": colour, "linestyle": dashes}


def has(runs: Runs, key: str) -> bool:
    """Say whether any row of any run holds a value under `key`."""
    return any(row.get(key) is not None for seeds in runs.values() for rows in seeds for row in rows)


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return `figure` as one ``<svg>`` element to put into a page or a file.

    Args:
        figure: the figure.
        name: a word in front of every id in it, so that several can stand in one page.
        description: what a reader who cannot see it should know.
    """
    buffer = StringIO()
    with rc_context(_RC):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, sans-serif, 'DejaVu Sans'")
    label = escape(description)
    return text.replace("<svg ", f'<svg class="plot" role="img" aria-label="{label}" color="{INK}" ', 1)


@rc_context(_RC)
def accuracy_after_cutting(
    runs: Runs,
    *,
    metric: str = "accuracy",
    dense: float | None = None,
    paper: Mapping[str, float] | None = None,
) -> Figure:
    """Accuracy of the cut model by epoch (Fig. 1 of the paper), from epoch rows.

    Where the early epochs press the ends of the curves together, a second panel shows the ends closer.

    Args:
        runs: epoch rows with ``epoch`` and ``accuracy_cut``.
        metric: what the number is, with its unit.
        dense: the number before pruning, drawn as a level.
        paper: published numbers by label, drawn as levels in the label's colour.
    """
    paper = paper or {}
    levels = [*([] if dense is None else [dense]), *paper.values()]
    window = _closer(runs, levels)
    figure, panels = _panels(f"{metric}, after cutting", *(["its upper end, closer"] if window else []), side=True)
    for axes in panels:
        for label, seeds in runs.items():
            _line(axes, label, seeds, "epoch", "accuracy_cut", marker="o")
        if dense is not None:
            axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (6, 3)), label=f"dense {dense:.2f}")
        for label, value in paper.items():
            colour = style(label)["color"]
            axes.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (1, 2)), label=f"paper, {label} {value:g}")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if window:
        panels[1].set_ylim(*window)
    return _legend(figure, panels[0])


@rc_context(_RC)
def curves(
    panels: Mapping[str, Runs], *, metric: str = "accuracy", dense: Mapping[str, float] | None = None, ramp: bool = False
) -> Figure:
    """Accuracy of the cut model by epoch, one panel a title (Fig. 1 to 4 and 8 of the paper), from epoch rows.

    Args:
        panels: epoch rows with ``epoch`` and ``accuracy_cut``, by title and label.
        metric: what the number is, with its unit.
        dense: the number before pruning by title, drawn as a level.
        ramp: the labels of a panel are values of one constant: shades of one colour in their order, named in the panel.
    """
    figure, grid = _grid(tuple(panels))
    for axes, (title, runs) in zip(grid, panels.items(), strict=True):
        for place, (label, seeds) in enumerate(runs.items()):
            _line(axes, label, seeds, "epoch", "accuracy_cut", marker="o", look=_shade(place, len(runs)) if ramp else None)
        if dense and title in dense:
            axes.axhline(dense[title], color=INK, linewidth=1, linestyle=(0, (6, 3)), label="dense")
        if ramp:
            axes.legend(frameon=False, loc="best")
    _label_outer(grid, "epoch", f"{metric}, after cutting")
    return figure if ramp else _shared_legend(figure, grid)


@rc_context(_RC)
def by_rate(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    *,
    metric: str = "accuracy",
    paper: Mapping[str, Mapping[str, Mapping[float, float]]] | None = None,
) -> Figure:
    """A metric by compression rate, one panel a title (Fig. 5 and 7 of the paper).

    Args:
        panels: the metric of each seed by title, label and rate; a line goes through the means.
        metric: what the number is, with its unit.
        paper: published numbers by title, label and rate, drawn thin and dotted in the label's colour.
    """
    figure, grid = _grid(tuple(panels))
    for axes, (title, labels) in zip(grid, panels.items(), strict=True):
        for label, at in labels.items():
            _line(
                axes,
                label,
                [[{"rate": x, "value": y} for x, values in at.items() for y in values]],
                "rate",
                "value",
                marker="o",
            )
        for label, at_paper in (paper or {}).get(title, {}).items():
            look = {"color": style(label)["color"], "linestyle": (0, (1, 2)), "linewidth": 1.2, "marker": "x"}
            axes.plot(sorted(at_paper), [at_paper[rate] for rate in sorted(at_paper)], label=f"paper, {label}", **look)
        rates = sorted({rate for at in labels.values() for rate in at})
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(
            rates, [f"{round(rate, 2):g}×" for rate in rates], rotation=45 if len(rates) > 4 or len(panels) > 1 else 0
        )
    _label_outer(grid, "compression rate", metric)
    return _shared_legend(figure, grid)


@rc_context(_RC)
def weight_maps(maps: Mapping[str, np.ndarray], *, name: str = "") -> Figure:
    """One layer's weights, an image a title on a common scale (Fig. 6 of the paper); colours as in `heat_maps`.

    Args:
        maps: 2-D arrays of one shape by title, such as ``dense``, ``slr`` and ``admm``.
        name: the layer's, put above.
    """
    figure = Figure(figsize=(_WIDTH, 0.8 + _WIDTH / max(len(maps), 2)), layout="constrained")
    top = max(float(np.quantile(np.abs(values), 0.995)) for values in maps.values()) or 1.0
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False).flat, maps.items(), strict=True):
        axes.imshow(_rgba(values / top), aspect="auto", interpolation="none")
        axes.set_title(f"{title}: {float(np.mean(values == 0)):.1%} zero")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, linewidth=0.5)
    if name:
        figure.suptitle(name, fontsize=9)
    return figure


@rc_context(_RC)
def violation(runs: Runs) -> Figure:
    """‖W − Z‖ after each update and ‖Zᵏ − Zᵏ⁻¹‖ by optimizer step, on log axes, from history rows."""
    return _by_step(runs, {"violation": "‖W − Z‖", "z_change": "‖Zᵏ − Zᵏ⁻¹‖"}, log=True)


@rc_context(_RC)
def step_and_penalty(runs: Runs) -> Figure:
    """Step size s and penalty ρ by optimizer step, on log axes, from history rows."""
    return _by_step(runs, {"s": "step size s", "rho": "penalty ρ"}, log=True)


@rc_context(_RC)
def support_change(runs: Runs) -> Figure:
    """Share of the weights whose mask flipped at each update, in percent on a log axis, from history rows."""
    return _by_step(runs, {"support_change": "weights that entered or left the support, %"}, log=True, scale=100)


@rc_context(_RC)
def dual_bound(runs: Runs) -> Figure:
    """Overestimate q̄ of the dual value (Theorem 2) by optimizer step, from history rows; log where all are positive."""
    values = [value for seeds in runs.values() for value in _values(seeds, "dual_bound")]
    return _by_step(runs, {"dual_bound": "overestimate of the dual value"}, log=min(values, default=0.0) > 0)


@rc_context(_RC)
def conditions(runs: Runs) -> Figure:
    """Both surrogate optimality conditions over the updates (Fig. 9): a filled cell where one held.

    With several seeds a cell is as strong as the share of them in which it held. Labels without conditions are left
    out; the number at the right is the share of updates.
    """
    keys = {"condition_w": "W (eq. 6)", "condition_z": "Z (eq. 11)"}
    strips = [(label, key) for label, seeds in runs.items() for key in keys if has({label: seeds}, key)]
    figure, (axes,) = _panels("surrogate optimality conditions", height=0.75 + 0.26 * len(strips))
    last = 1.0
    for place, (label, key) in enumerate(strips):
        cells = _cells(runs[label], key)
        last = max(last, cells[-1][0])
        axes.broken_barh([(0.5, cells[-1][0])], (place - 0.34, 0.68), color=INK, alpha=0.13, linewidth=0)
        for start, width, share in _stretches(cells):
            axes.broken_barh(
                [(start - 0.5, width)], (place - 0.34, 0.68), color=style(label)["color"], alpha=share, linewidth=0
            )
        share = fmean(value for _, value in cells)
        axes.annotate(f"{share:.0%}", (1.01, place), xycoords=("axes fraction", "data"), va="center")
    axes.set(yticks=range(len(strips)), yticklabels=[f"{label}  {keys[key]}" for label, key in strips])
    axes.set(xlim=(0.5, last + 0.5), ylim=(max(len(strips), 1) - 0.5, -0.5), xlabel="update")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@rc_context(_RC)
def heat_maps(maps: Mapping[str, np.ndarray]) -> Figure:
    """Weights of a few layers before and after pruning (Fig. 6).

    Blue is positive, orange negative, strength the magnitude; a zero is the page itself.

    Args:
        maps: 2-D arrays under ``before.<name>`` and ``after.<name>``; both or either.
    """
    names = list(dict.fromkeys(key.partition(".")[2] for key in maps))
    figure = Figure(figsize=(_WIDTH, 0.3 + 2.5 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(grid, names, strict=True):
        pair = {when: maps[f"{when}.{name}"] for when in ("before", "after") if f"{when}.{name}" in maps}
        top = max(float(np.quantile(np.abs(values), 0.995)) for values in pair.values()) or 1.0
        for axes, when in zip(row, ("before", "after"), strict=True):
            axes.set_axis_off()
            if when in pair:
                axes.imshow(_rgba(pair[when] / top), aspect="auto", interpolation="none")
                axes.set_axis_on()
                zeros = float(np.mean(pair[when] == 0))
                axes.set_title(f"{name}, {when}: {zeros:.0%} zero")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(visible=True, linewidth=0.5)
    return figure


@rc_context(_RC)
def kernel_grid(weight: np.ndarray, mask: np.ndarray) -> Figure:
    """One convolution under a mask: a row a filter, a column a channel, each kernel a small square of its own.

    What is kept is coloured as in `heat_maps`; what is dropped is grey.

    Args:
        weight: (F, C, h, w).
        mask: booleans of the same shape, True = kept.
    """
    filters, channels, height, width = weight.shape
    top = float(np.quantile(np.abs(weight), 0.98)) or 1.0
    colours = _rgba(np.where(mask, np.sign(weight) * np.maximum(np.abs(weight) / top, 0.35), 0))
    colours[~mask] = (*(int(INK[i : i + 2], 16) for i in (1, 3, 5)), 40)
    image = np.zeros((filters, height + 1, channels, width + 1, 4), dtype=np.uint8)  # a gap of one after each kernel
    image[:, :height, :, :width] = colours.transpose(0, 2, 1, 3, 4)
    image = image.reshape(filters * (height + 1), channels * (width + 1), 4)[:-1, :-1]
    size = 2.4  # inches
    figure = Figure(figsize=(size * image.shape[1] / image.shape[0], size))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.imshow(image, interpolation="none", aspect="auto")
    return figure


@rc_context(_RC)
def density_bars(layers: Sequence[Mapping[str, Any]], *, label: str = "slr") -> Figure:
    """Share of the weights kept in each layer, in percent; named where there is room, else numbered from 1.

    Args:
        layers: rows with ``name``, ``kept`` and ``total``.
        label: the method, for its colour.
    """
    shares = [100 * layer["kept"] / max(layer["total"], 1) for layer in layers]
    places = range(1, len(shares) + 1)
    colour = style(label)["color"]
    few = len(layers) <= 16
    figure, (axes,) = _panels("weights kept, % of the layer", height=0.75 + 0.22 * len(layers) if few else 2.6)
    if few:
        axes.barh(places, shares, height=0.7, color=colour)
        axes.set(yticks=list(places), yticklabels=[layer["name"] for layer in layers], ylim=(len(shares) + 0.6, 0.4))
        for place, share in zip(places, shares, strict=True):
            axes.annotate(f" {share:.3g}", (share, place), va="center")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, max([*shares, 1e-9]) * 1.12)
    else:
        axes.bar(places, shares, width=0.75, color=colour)
        axes.set(xlim=(0, len(shares) + 1), xlabel="layer, numbered as in the table")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@rc_context(_RC)
def standings(
    cells: Mapping[str, Mapping[str, tuple[float, float]]], *, reference: str = "slr", furthest: float = 6.0
) -> Figure:
    """How far every method is from one of them, in points: a panel a cell, a dot a method with its deviation, best on top.

    The band is the reference's own deviation. Methods that are further behind than the axis reaches stand at its end, their
    distance in figures.

    Args:
        cells: ``{cell: {label: (mean, standard deviation)}}``; each has the reference.
        reference: the method that is at zero.
        furthest: points behind at which the axis ends.
    """
    gaps = {cell: {label: mean - rows[reference][0] for label, (mean, _) in rows.items()} for cell, rows in cells.items()}
    labels = {label for rows in cells.values() for label in rows}
    each = {label: [max(gap[label], -2 * furthest) for gap in gaps.values() if label in gap] for label in sorted(labels)}
    order = sorted(each, key=lambda label: fmean(each[label]))
    down = -(-len(cells) // 3)
    figure = Figure(figsize=(_WIDTH, (0.6 + 0.19 * len(order)) * down + 0.2), layout="constrained")
    panels = list(figure.subplots(down, min(len(cells), 3), squeeze=False, sharey=True).flat)
    for spare in panels[len(cells) :]:
        spare.remove()
    top = max([0.5, *(gap[label] + cells[cell][label][1] for cell, gap in gaps.items() for label in gap)])
    for axes, (cell, gap) in zip(panels, gaps.items(), strict=False):
        deviation = cells[cell][reference][1]
        axes.axvspan(-deviation, deviation, color=style(reference)["color"], alpha=0.2, linewidth=0)
        axes.axvline(0, color=style(reference)["color"], linewidth=0.8)
        for place, label in enumerate(order):
            if label not in gap:
                axes.annotate("not run", (-furthest, place), va="center", alpha=0.6, fontsize=7)
            elif gap[label] < -furthest:
                axes.annotate(f"◂ {-gap[label]:.0f} behind", (-furthest, place), va="center", fontsize=7)
            else:
                axes.errorbar(
                    gap[label], place, xerr=cells[cell][label][1], fmt="o", color=style(label)["color"], linewidth=1.2
                )
        axes.set_title(cell)
        axes.set(yticks=range(len(order)), yticklabels=order, xlim=(-furthest - 0.3, top + 0.3), ylim=(-0.6, len(order) - 0.4))
        axes.grid(axis="x", color=INK, alpha=0.18, linewidth=0.6)
        axes.tick_params(length=2.5)
    figure.supxlabel(f"points from {reference}", fontsize=9)
    return figure


def _panels(*titles: str, height: float = 2.9, side: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    shape = (1, len(titles)) if side else (len(titles), 1)
    panels = list(figure.subplots(*shape, squeeze=False, sharex=True).flat)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        axes.grid(color=INK, alpha=0.18, linewidth=0.6)
        axes.tick_params(length=2.5)
    return figure, panels


def _grid(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels in rows of up to three; names that are long for a third of the width are in rows of two."""
    across = min(len(titles), 3 if max(map(len, titles), default=0) <= 26 else 2)
    down = -(-len(titles) // max(across, 1))
    figure = Figure(figsize=(_WIDTH, 0.5 + 2.4 * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in panels[len(titles) :]:
        spare.remove()
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title)
        axes.grid(color=INK, alpha=0.18, linewidth=0.6)
        axes.tick_params(length=2.5)
    return figure, panels[: len(titles)]


def _label_outer(panels: Sequence[Axes], below: str, beside: str) -> None:
    """Name the axes where nothing else stands between the name and the figure's border."""
    for axes in panels:
        place = axes.get_subplotspec()
        if place is None or place.is_first_col():
            axes.set_ylabel(beside)
        axes.set_xlabel(below)
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """One legend above all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in found}
    names = sorted(found, key=lambda label: label == "dense")  # the level last
    return _above(figure, [found[name] for name in names], names)


def _shade(place: int, count: int) -> dict[str, Any]:
    """The `place`-th of `count` shades of blue, and dashes that differ between neighbours."""
    light, dark = np.array([0.55, 0.76, 0.93]), np.array([0.08, 0.36, 0.66])  # both readable on white and on black
    return {"color": tuple(light + (dark - light) * place / max(count - 1, 1)), "linestyle": _MORE_DASHES[place % 3]}


def _legend(figure: Figure, axes: Axes) -> Figure:
    return _above(figure, *axes.get_legend_handles_labels())


def _above(figure: Figure, handles: list[Any], labels: list[str]) -> Figure:
    if len(handles) > 1:  # one line alone is named by the page
        one_row = sum(len(label) + 7 for label in labels) < 90  # letters in the width
        columns = len(labels) if one_row else max(1, 90 // (max(map(len, labels)) + 8))
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=2.2, columnspacing=1.2
        )
    return figure


def _by_step(runs: Runs, keys: Mapping[str, str], *, log: bool, scale: float = 1.0) -> Figure:
    keys = {key: title for key, title in keys.items() if has(runs, key)} or dict(keys)
    figure, panels = _panels(*keys.values(), height=2.6 if len(keys) == 1 else 3.9)
    for axes, key in zip(panels, keys, strict=True):
        for label, seeds in runs.items():
            _line(axes, label, seeds, "step", key, positive=log, scale=scale)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            subs = (1.0, 2.0, 5.0) if high < 50 * low else (1.0,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6) if high > 5 * low else MaxNLocator(4))
            axes.yaxis.set_major_formatter(FuncFormatter(_power))
            axes.yaxis.set_minor_locator(NullLocator())
    panels[-1].set_xlabel("optimizer step")
    fullest = max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    return _legend(figure, fullest)


def _line(
    axes: Axes,
    label: str,
    seeds: Sequence[Rows],
    x: str,
    y: str,
    *,
    positive: bool = False,
    scale: float = 1.0,
    marker: str = "",
    look: Mapping[str, Any] | None = None,
) -> None:
    at: dict[float, list[float]] = defaultdict(list)
    for row in (row for rows in seeds for row in rows):
        if (value := row.get(y)) is not None and (value > 0 or not positive):
            at[row[x]].append(value * scale)
    if not at:
        return
    points = sorted(at)
    if len(points) > 60:
        marker = ""
    elif len(points) == 1:
        marker = "o"
    means = [fmean(at[point]) for point in points]
    look = look or style(label)
    # the first label on top, and dashes above solid lines, so that equal curves show
    order = 2.5 + 0.3 * (look["linestyle"] != "-") - 0.01 * len(axes.lines)
    axes.plot(points, means, label=label, marker=marker, zorder=order, **look)
    if max(map(len, at.values())) > 1:
        low, high = [min(at[p]) for p in points], [max(at[p]) for p in points]
        axes.fill_between(points, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _values(seeds: Sequence[Rows], key: str) -> Iterator[float]:
    return (row[key] for rows in seeds for row in rows if row.get(key) is not None)


def _closer(runs: Runs, levels: Sequence[float]) -> tuple[float, float] | None:
    """Return the limits of the upper end of the curves where it is less than a quarter of the whole, else None."""
    values = [list(_values([rows], "accuracy_cut")) for seeds in runs.values() for rows in seeds]
    values = [of_run for of_run in values if of_run]
    if not values:
        return None
    ends = [of_run[-1] for of_run in values]
    top, bottom = max([*ends, *levels]), min(median(ends), *levels) if levels else median(ends)
    room = 0.25 * (top - bottom) or 0.01 * abs(top)
    whole = top - min(min(of_run) for of_run in values)
    return (bottom - room, top + room) if 4 * (top - bottom + 2 * room) < whole else None


def _cells(seeds: Sequence[Rows], key: str) -> list[tuple[float, float]]:
    """Return (update, share of the seeds in which `key` held) by update."""
    at: dict[float, list[bool]] = defaultdict(list)
    for row in (row for rows in seeds for row in rows):
        if row.get(key) is not None:
            at[row["update"]].append(row[key])
    return [(update, fmean(at[update])) for update in sorted(at)]


def _stretches(cells: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float, float]]:
    """Yield (first update, number of updates, share) of neighbouring cells of equal share above zero."""
    for (share, _), group in groupby(enumerate(cells), key=lambda item: (item[1][1], item[1][0] - item[0])):
        updates = [update for _, (update, _) in group]
        if share > 0:
            yield updates[0], len(updates), share


def _rgba(values: np.ndarray) -> np.ndarray:
    """Colour by sign, opacity by magnitude in 24 levels (so that the picture packs small)."""
    image = np.empty((*values.shape, 4), dtype=np.uint8)
    image[..., :3] = np.where(values[..., None] > 0, (0, 114, 178), (213, 94, 0))
    levels = np.ceil(np.clip(np.abs(values), 0, 1) * 24) / 24
    image[..., 3] = np.round(255 * levels)
    image[values == 0] = 0
    return image


def _power(value: float, _: object = None) -> str:
    if value <= 0:
        return ""  # a plain locator may put a tick at zero, where a log axis has no place
    if 0.001 <= value <= 1000:
        return f"{value:g}"
    exponent = round(math.log10(value))
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
