"""Figures hold what the rows say, in the same colours everywhere, and SVG that can stand in any page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from dualprune import plots

EPOCHS = {
    "slr": [[{"epoch": e, "accuracy_cut": 80.0 + e + s} for e in (1, 2, 3)] for s in (0, 2)],
    "gradual": [[{"epoch": 1, "accuracy_cut": 50.0}, {"epoch": 2, "accuracy_cut": None}, {"epoch": 3, "accuracy_cut": 70.0}]],
}


def history(**columns: list[Any]) -> list[dict[str, Any]]:
    length = len(next(iter(columns.values())))
    return [{"step": 10 * i + 10, "update": i + 1} | {k: v[i] for k, v in columns.items()} for i in range(length)]


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_accuracy_is_the_mean_over_seeds_with_a_band_from_lowest_to_highest() -> None:
    axes = plots.accuracy_after_cutting(EPOCHS).axes[0]
    assert lines(axes)["slr"] == ([1, 2, 3], [82, 83, 84])
    assert lines(axes)["gradual"] == ([1, 3], [50, 70])  # the null epoch is left out
    (band,) = axes.collections
    heights = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(1.0, 81.0), (1.0, 83.0), (3.0, 83.0), (3.0, 85.0)} <= heights


def test_dense_and_paper_are_levels_named_in_the_legend() -> None:
    figure = plots.accuracy_after_cutting(EPOCHS, dense=91.73, paper={"slr": 90.5})
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["slr", "gradual", "dense 91.73", "paper, slr 90.5"]
    assert lines(figure.axes[0])["dense 91.73"][1] == [91.73, 91.73]


def test_a_second_panel_shows_the_upper_end_only_where_it_is_pressed() -> None:
    late = [{"epoch": e, "accuracy_cut": 92 - 80 * 0.2**e} for e in range(10)]
    figure = plots.accuracy_after_cutting({"slr": [late]}, dense=93.4)
    low, high = figure.axes[1].get_ylim()
    assert 90 < low < 92 and 93.4 < high < 95
    flat = [{"epoch": e, "accuracy_cut": 90 + 0.3 * e} for e in range(10)]
    assert len(plots.accuracy_after_cutting({"slr": [flat]}, dense=93.4).axes) == 1


def test_a_label_has_one_style_in_every_figure() -> None:
    rows = history(violation=[3.0, 1.0], z_change=[1.0, 0.5], rho=[0.1, 0.2], s=[0.1, 0.2], support_change=[0.1, 0.05])
    runs = {"mine": [rows], "slr": [rows]}
    figures = [plots.violation(runs), plots.step_and_penalty(runs), plots.support_change(runs)]
    for label in runs:
        drawn = {line.get_color() for f in figures for axes in f.axes for line in axes.lines if line.get_label() == label}
        assert drawn == {plots.style(label)["color"]}
    known = ["slr", "slr-paper", "admm", "admm-published", "gradual", "oneshot"]
    assert len({plots.style(label)["color"] for label in known}) == 6


@pytest.mark.parametrize("label", ["slr", "slr-paper", "admm", "admm-published", "gradual", "oneshot", "mine", "other"])
def test_colours_are_seen_on_white_and_on_dark_pages(label: str) -> None:
    def luminance(colour: Any) -> float:
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    for page in ("#ffffff", "#12161c"):
        bright, dark = sorted((luminance(plots.style(label)["color"]), luminance(page)), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 2


def test_log_axes_leave_out_zeros_and_percent_is_percent() -> None:
    figure = plots.support_change({"slr": [history(support_change=[0.25, 0.0, 0.01])]})
    assert figure.axes[0].get_yscale() == "log"
    assert lines(figure.axes[0])["slr"] == ([10, 30], [25, 1])


def test_a_panel_without_values_is_not_drawn() -> None:
    rows = history(rho=[0.1, 0.2], s=[None, None])
    assert [axes.get_title(loc="left") for axes in plots.step_and_penalty({"admm": [rows]}).axes] == ["penalty ρ"]


def test_the_dual_bound_is_logarithmic_only_above_zero() -> None:
    assert plots.dual_bound({"slr": [history(dual_bound=[3.0, 1.0])]}).axes[0].get_yscale() == "log"
    assert plots.dual_bound({"slr": [history(dual_bound=[3.0, -1.0])]}).axes[0].get_yscale() == "linear"


def test_conditions_are_strips_with_their_share() -> None:
    slr = [history(condition_w=[True, True, False, True], condition_z=[True] * 4)]
    runs = {"slr": slr, "admm": [history(condition_w=[None] * 4, condition_z=[None] * 4)]}
    (axes,) = plots.conditions(runs).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["slr  W (eq. 6)", "slr  Z (eq. 11)"]
    assert [text.get_text() for text in axes.texts] == ["75%", "100%"]
    boxes = [[path.get_extents().intervalx.tolist() for path in strip.get_paths()] for strip in axes.collections]
    assert boxes == [[[0.5, 4.5]], [[0.5, 2.5]], [[3.5, 4.5]], [[0.5, 4.5]], [[0.5, 4.5]]]  # ground, cells; ground, cells


def test_condition_cells_are_as_strong_as_the_share_of_seeds() -> None:
    runs = {"slr": [history(condition_w=[True, True]), history(condition_w=[False, True])]}
    (axes,) = plots.conditions(runs).axes
    assert [strip.get_alpha() for strip in axes.collections[1:]] == [0.5, 1.0]


def test_heat_maps_are_blank_where_weights_are_zero() -> None:
    weights = np.array([[0.0, 2.0], [-1.0, 0.0]], dtype=np.float32)
    figure = plots.heat_maps({"before.a.weight": weights, "after.a.weight": np.zeros_like(weights)})
    before, after = (axes.images[0].get_array() for axes in figure.axes)
    assert before[0, 0, 3] == before[1, 1, 3] == 0 and before[0, 1, 3] == 255 and 120 < before[1, 0, 3] < 140
    assert before[0, 1, 2] > before[0, 1, 0] and before[1, 0, 0] > before[1, 0, 2]  # blue above zero, orange below
    assert not after.any()
    assert figure.axes[1].get_title(loc="left") == "a.weight, after: 100% zero"


def test_a_kernel_grid_has_a_gap_between_kernels_and_grey_where_dropped() -> None:
    weight, mask = np.ones((2, 3, 3, 3), dtype=np.float32), np.ones((2, 3, 3, 3), dtype=bool)
    weight[1, 2], mask[0, 1], mask[1, 0, 2, 0] = -1.0, False, False
    image = plots.kernel_grid(weight, mask).axes[0].images[0].get_array()
    assert image.shape == (7, 11, 4)
    assert not image[3].any() and not image[:, (3, 7)].any(), "gaps"
    assert (image[:3, 4:7, :3] == 0x76).all() and (image[:3, 4:7, 3] == 40).all(), "a dropped kernel"
    assert (image[6, 0] == (0x76, 0x76, 0x76, 40)).all() and image[6, 1, 2] == 178
    assert (image[4:, 8:, :3] == (213, 94, 0)).all()


def test_density_bars_are_named_while_there_is_room() -> None:
    layers = [{"name": f"layer{i}.weight", "kept": i, "total": 20} for i in range(20)]
    few, many = plots.density_bars(layers[:4]), plots.density_bars(layers)
    assert [t.get_text() for t in few.axes[0].get_yticklabels()] == [f"layer{i}.weight" for i in range(4)]
    assert [bar.get_width() for bar in few.axes[0].patches] == [0, 5, 10, 15]
    assert [bar.get_height() for bar in many.axes[0].patches][-1] == 95


def test_standings_are_points_from_one_method_and_what_is_far_behind_is_told_in_figures() -> None:
    one = {"slr": (77.0, 0.4), "gradual": (73.0, 0.6), "oneshot": (16.0, 0.0)}
    left, right = plots.standings({"one": one, "two": {"slr": (90.0, 0.1), "admm": (90.5, 0.1)}}).axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["oneshot", "gradual", "slr", "admm"]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in left.lines if line.get_marker() == "o"]
    assert dots == [(-4.0, 1), (0.0, 2)]
    assert {text.get_text() for text in left.texts} == {"◂ 61 behind", "not run"}
    assert right.get_xlim()[1] > 0.6, "who is ahead has room"


def test_svg_is_well_formed_themed_and_described() -> None:
    figure = plots.accuracy_after_cutting(EPOCHS, dense=91.73)
    svg = plots.to_svg(figure, "fig1", 'less < "more" & all')
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == 'less < "more" & all' and root.attrib["role"] == "img"
    assert "currentColor" in svg and svg.count(plots.INK) == 1  # the fallback of a page that sets no colour
    assert "#000000" not in svg and "#ffffff" not in svg  # nothing that vanishes on a dark or a light page
    ids = re.findall(r' id="([^"]+)"', svg)
    assert ids and all(name.startswith("fig1-") for name in ids) and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) == set(ids)
    assert "epoch" in svg  # words are text, not outlines


def test_svg_of_the_same_rows_is_the_same_text() -> None:
    first, second = (plots.to_svg(plots.accuracy_after_cutting(EPOCHS), "a", "b") for _ in range(2))
    assert first == second


def test_pictures_stay_whole_in_svg() -> None:
    weights = np.ones((2, 2), dtype=np.float32)
    svg = plots.to_svg(plots.heat_maps({"before.a": weights, "after.a": weights}), "heat", "weights")
    assert len(re.findall(r'href="data:image/png;base64,', svg)) == 2


def test_no_global_state_of_matplotlib_is_touched() -> None:
    before = dict(matplotlib.rcParams)
    plots.to_svg(plots.conditions({"slr": [history(condition_w=[True])]}), "a", "b")
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_gives_an_empty_figure() -> None:
    for draw in (plots.accuracy_after_cutting, plots.violation, plots.dual_bound, plots.conditions):
        for runs in ({}, {"slr": []}, {"slr": [[]]}):
            assert plots.to_svg(draw(runs), "empty", "nothing").startswith("<svg")  # type: ignore[operator]


def test_a_log_axis_with_a_tick_at_zero_is_drawn():
    rows = [{"step": 1 + i, "rho": 0.1, "s": 0.1, "violation": v, "z_change": v} for i, v in enumerate((0.9, 2.0))]
    for figure in (plots.violation({"admm": [rows]}), plots.step_and_penalty({"admm": [rows]})):
        assert "<svg" in plots.to_svg(figure, "x", "x")
    assert plots._power(0.0) == ""
