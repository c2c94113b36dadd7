"""benchmarks/figures.py draws the paper's figures from run folders, and says what it cannot draw."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dualprune.files import write_json, write_jsonl, write_text

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "".join(f"<!-- begin fig{number} -->\nNot run yet.\n<!-- end fig{number} -->\n" for number in range(1, 10))


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, writing into a repository of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("figures", "publish"):
        sys.modules.pop(name, None)
    import figures

    monkeypatch.setattr(figures.publish, "ROOT", tmp_path)
    write_text(tmp_path / "docs/results.md", MARKERS)
    return figures


def make_run(root: Path, recipe: str, label: str, cut: float | dict[str, float], seed: int = 1, **changes: Any) -> Path:
    """A finished run's folder with a curve that retraining ends, a history and heat maps."""
    place = root / recipe / f"{label}-seed{seed}"
    after = cut if isinstance(cut, dict) else {"top-1": cut}
    first, value = next(iter(after.items()))
    stages = ("train", "train", "retrain")
    rows = [{"epoch": e, "stage": stage, "accuracy_cut": value + e, "loss": 1.0} for e, stage in enumerate(stages, 1)]
    write_jsonl(place / "epochs.jsonl", rows)
    write_jsonl(place / "history.jsonl", [{"step": 1, "update": 1, "condition_w": label.startswith("slr") or None}])
    weights = np.arange(-8, 8, dtype=np.float32).reshape(4, 4)
    kept = np.where(abs(weights) > (6 if label == "slr" else 4), weights, 0)
    save_file({"before.conv": weights, "after.conv": kept}, place / "heatmaps.safetensors")
    result = {
        "label": label, "method": "SLR(s0=0.01, M=300.0, r=0.1)", "seed": seed, "split": "test", "metric": f"{first} %",
        "dense": 95.0, "cut": value, "metrics": {"dense": after, "cut": after}, "rate_model": 2.0, "paper": {},
    }  # fmt: skip
    write_json(place / "result.json", result | changes)
    return root / recipe


def read(figures: Any, *folders: Path) -> list[Any]:
    return [figures.publish.read_recipe(folder) for folder in folders]


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_have_a_panel_a_recipe_and_end_at_the_cut(figures: Any, tmp_path: Path) -> None:
    for recipe in ("table1_a", "table1_b"):
        for label in ("slr", "admm", "gradual"):
            make_run(tmp_path, recipe, label, 80.0)
    make_run(tmp_path, "table1_a", "slr", 90.0, seed=2)
    make_run(tmp_path, "table1_a", "slr", 99.0, seed=3, split="validation")
    recipes = read(figures, tmp_path / "table1_a", tmp_path / "table1_b")
    figure = figures.curves(recipes, figures.Options())
    assert [axes.get_title("left") for axes in figure.axes] == ["table1_a", "table1_b"]
    first = lines(figure.axes[0])
    assert first["slr"] == ([1, 2], [86, 87]) and first["admm"] == ([1, 2], [81, 82])  # retraining is no part of it
    assert list(first) == ["slr", "admm", "dense"]
    assert "gradual" in lines(figures.curves(recipes, figures.Options(("gradual",))).axes[0])


def test_a_figure_is_written_and_linked_between_its_markers(figures: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path, "table1_a", "slr", 80.0)
    assert figures.draw(1, read(figures, folder)) == Path("docs/figures/fig1-accuracy-by-epoch.svg")
    ET.parse(tmp_path / "docs/figures/fig1-accuracy-by-epoch.svg")
    page = (tmp_path / "docs/results.md").read_text()
    assert "(figures/fig1-accuracy-by-epoch.svg)\n\nFrom the runs of table1_a; n = 1.\n<!-- end fig1 -->" in page
    assert page.count("Not run yet.") == 8


def test_rates_are_a_line_with_the_paper_s_beside_it(figures: Any, tmp_path: Path) -> None:
    for rate, cut, paper in ((2.5, 90.0, 94.6), (10.0, 70.0, 94.5)):
        make_run(tmp_path, f"table6_net-{rate:g}x", "slr", {"accuracy": cut}, rate_model=rate, paper={"slr": paper})
    recipes = read(figures, tmp_path / "table6_net-10x", tmp_path / "table6_net-2.5x")
    (axes,) = figures.metric_by_rate(recipes, figures.Options()).axes
    assert lines(axes) == {"slr": ([2.5, 10], [90, 70]), "paper, slr": ([2.5, 10], [94.6, 94.5])}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2.5×", "10×"]
    make_run(tmp_path, "table6_other-3x", "slr", {"accuracy": 1.0})
    with pytest.raises(figures.CannotDraw, match=r"one network are wanted, got table6_net, table6_other"):
        figures.metric_by_rate(read(figures, *tmp_path.glob("table6_*")), figures.Options())


def test_difficulties_are_panels(figures: Any, tmp_path: Path) -> None:
    for rate in (5.0, 9.0):
        levels = {"3D moderate mAP": 60 - rate, "3D easy mAP": 70 - rate, "3D hard mAP": 40 - rate}
        make_run(tmp_path, f"table7_net-{rate:g}x", "slr", levels, rate_model=rate, paper={"easy": {"slr": 50.0}})
    figure = figures.levels_by_rate(read(figures, *sorted(tmp_path.glob("table7_*"))), figures.Options())
    ends = {axes.get_title("left"): lines(axes)["slr"][1] for axes in figure.axes}
    assert ends == {"easy": [65, 61], "moderate": [55, 51], "hard": [35, 31]}
    assert [len(lines(axes)) for axes in figure.axes] == [2, 1, 1]


def test_heat_maps_are_one_layer_before_and_after_both_methods(figures: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "table6_net-2x", "admm", 80.0)
    recipe = read(figures, make_run(tmp_path, "table6_net-2x", "slr", 90.0))
    figure = figures.heat_maps(recipe, figures.Options())
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["dense: 6.2% zero", "slr: 81.2% zero", "admm: 56.2% zero"]
    with pytest.raises(figures.CannotDraw, match="no map of layer 'fc'; it has conv"):
        figures.heat_maps(recipe, figures.Options(layer="fc"))


def test_ablations_take_their_values_from_the_methods(figures: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "fig8_net", "slr-paper", 80.0)
    make_run(tmp_path, "fig8_net", "slr-s0-large", 70.0, method="SLR(s0=0.1, M=300.0, r=0.1)")
    folder = make_run(tmp_path, "fig8_net", "slr-s0-small", 75.0, method="SLR(s0=1e-05, M=300.0, r=0.1)")
    (axes,) = figures.ablation(read(figures, folder), figures.Options()).axes
    assert {label: y for label, (_, y) in lines(axes).items()} == {
        "s₀ = 1e-05": [76, 77], "s₀ = 0.01": [81, 82], "s₀ = 0.1": [71, 72],
    }  # fmt: skip
    colours = {line.get_color() for line in axes.lines}
    assert len(colours) == 3


def test_published_results_are_drawn_as_their_folders_are(figures: Any, tmp_path: Path) -> None:
    for recipe in ("table1_a", "table1_b", "table7_c"):
        write_text(tmp_path / f"recipes/{recipe}.toml", f'name = "{recipe}"')
        for label in ("slr", "admm"):
            make_run(tmp_path, recipe, label, 80.0)
    a, b, other = (tmp_path / name for name in ("table1_a", "table1_b", "table7_c"))
    write_text(tmp_path / "results/table.json", figures.publish.compact("table", read(figures, b, other)))
    alone = read(figures, a)[0]
    write_json(tmp_path / "results/table1_a.json", {"recipe": a.name, "tune": None, "paper": {}, "runs": alone.runs})
    published = figures.read(1, [tmp_path / "results/table1_a.json", tmp_path / "results/table.json"])
    assert [recipe.name for recipe in published] == ["table1_a", "table1_b"]  # a point cloud is none of Figure 1
    drawn, wanted = (figures.curves(recipes, figures.Options()) for recipes in (published, read(figures, a, b)))
    assert [lines(axes) for axes in drawn.axes] == [lines(axes) for axes in wanted.axes]
    assert figures.read(9, [a])[0].runs == published[0].runs  # alone published, it keeps its history
    with pytest.raises(SystemExit, match=r"no .*none\.json; expected"):
        figures.read(1, [tmp_path / "none.json"])


def test_all_draws_what_can_be_drawn_and_says_what_cannot(figures: Any, tmp_path: Path, capsys: Any) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "table1_resnet18-cifar10-small", "slr", 80.0)
    make_run(runs, "table6_net-2x", "slr", 80.0)
    make_run(runs, "table7_net-2x", "slr", 80.0, split="validation")
    figures.draw_all(runs)
    said = capsys.readouterr().out
    written = {path.name for path in (tmp_path / "docs/figures").iterdir()}
    assert written == {"fig1-accuracy-by-epoch.svg", "fig9-conditions.svg"}
    assert "Figure 2: not drawn: no finished runs of a recipe table3_" in said
    assert "Figure 5: not drawn: at least two rates are wanted" in said
    assert "Figure 6: not drawn: table6_net-2x has no runs of both SLR and ADMM" in said
    assert "Figure 7: not drawn: no finished runs" in said
