"""Pages from run folders of every state, and the sparsity of models."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from dualprune import sparsity_report
from dualprune.errors import DualpruneError, FormatError
from dualprune.files import write_json, write_jsonl, write_text
from dualprune.report import HONEST, render_comparison, render_run
from dualprune.run_folder import write_pictures

LAYERS = [
    {"name": f"layer{stage}.{block}.conv{conv}.weight", "shape": [16 * stage, 16 * stage, 3, 3],
     "pattern": "unstructured", "kept": 230 * stage * (4 - stage + conv), "total": 2304 * stage * stage}
    for stage in (1, 2, 3) for block in range(9) for conv in (1, 2)
]  # fmt: skip
ENDS = {"slr": 92.6, "slr-paper": 84.1, "admm": 92.31, "admm-published": 88.2, "gradual": 92.25, "oneshot": 18.4}


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what a page says: its figures are not drawn, which takes most of the time."""
    from html import escape

    from dualprune import plots

    def empty(figure: None, name: str, description: str) -> str:
        return f'<svg class="plot" role="img" aria-label="{escape(description)}"></svg>'

    monkeypatch.setattr(plots, "to_svg", empty)
    for draw in (
        "accuracy_after_cutting", "violation", "step_and_penalty", "support_change", "dual_bound", "conditions",
        "heat_maps", "density_bars",
    ):  # fmt: skip
        monkeypatch.setattr(plots, draw, lambda *rows, **settings: None)


quick = pytest.mark.usefixtures("words_only")


def history_rows(label: str, updates: int = 80, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    updates = updates // 8 if label.endswith(("paper", "published")) else updates
    far = 1 + 0.6 * list(ENDS).index(label)
    rows: list[dict[str, Any]] = []
    for update in range(1, updates + 1):
        part = update / updates
        row: dict[str, Any] = {"step": 3910 * update // updates, "update": update, "loss": 0.4 - 0.3 * part, "sparsity": 0.85}
        row["support_change"] = 0.05 / far * (1 - part) ** 2 * float(rng.uniform(0.5, 1))
        if label.startswith(("slr", "admm")):
            slr = label.startswith("slr")
            row |= {"rho": 0.01 * 100 ** min(part / 0.8, 1), "s": 0.01 * 90 ** (part / far) if slr else None}
            row |= {"violation": 12 * math.exp(-5 * part / far) * float(rng.uniform(0.8, 1.2)), "loss_known": True}
            row |= {"violation_before": row["violation"] * 1.3, "z_change": 3 * math.exp(-6 * part / far)}
            row |= {"condition_w": bool(rng.random() < 0.4) if slr else None, "lagrangian": 0.5 - 0.3 * part}
            row |= {"condition_z": bool(rng.random() < 0.8) if slr else None, "dual_bound": 2 - 1.6 * part / far}
        rows.append(row)
    return rows


def epoch_rows(end: float, epochs: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"epoch": e, "step": 391 * e, "stage": "prune", "loss": 0.3 / e, "lr": 0.03 / e, "accuracy": None, "seconds": 61.2,
         "accuracy_cut": end - 40 * math.exp(-0.9 * e) + (float(rng.uniform(-0.5, 0.5)) if e < epochs else 0)}
        for e in range(1, epochs + 1)
    ]  # fmt: skip


def make_run(root: Path, label: str = "slr", seed: int = 0, **changes: Any) -> Path:
    """A whole run folder as a finished training leaves it; `changes` go into result.json."""
    place, end = root / f"{label}-seed{seed}", ENDS[label] + 0.1 * seed
    trained = label != "oneshot"
    write_text(place / "recipe.toml", 'name = "resnet56-6.5x"\n[model]\nname = "resnet56"\n')
    if trained:
        write_jsonl(place / "history.jsonl", history_rows(label, seed=seed))
        write_jsonl(place / "epochs.jsonl", epoch_rows(end, seed=seed))
    kept, total = sum(layer["kept"] for layer in LAYERS), sum(layer["total"] for layer in LAYERS)
    result = {
        "recipe": "resnet56-6.5x", "label": label, "method": f"{label.upper()}(rho=Geometric(0.01, 1.0))", "seed": seed,
        "metric": "top-1 %", "split": "test", "dense": 93.39, "cut": end, "retrained": None, "kept": kept,
        "total": total, "rate": 6.5, "kept_model": kept + 2000, "total_model": total + 2000, "rate_model": 6.42,
        "budget": "global", "epochs": 10 * trained, "retrain_epochs": 0, "steps": 3910 * trained,
        "updates": 80 * trained, "batch_size": 128, "lr": 0.03 if trained else None, "seconds": 612.4 * trained + 2.31,
        "peak_memory_mb": 1204.0, "versions": {"python": "3.12.1", "torch": "2.9.0", "dualprune": "0.1.0"},
        "device": "cpu (2 cores)", "recipe_sha256": "ab" * 32, "weights_sha256": None,
        "command": f"dualprune run recipes/resnet56.toml --method {label} --seed {seed}",
        "paper": {"slr": 92.3, "admm": 90.5, "epochs": 30, "source": "Table II"}, "layers": LAYERS,
        "sizes": {"dense_bytes": 3_441_000, "sparse_bytes": 402_000},
    }  # fmt: skip
    write_json(place / "result.json", result | changes)
    weights = np.random.default_rng(seed).normal(size=(16, 144)).astype(np.float32)
    cut = np.where(np.abs(weights) > 1.2, weights, 0)
    save_file({"before.layer1.0.conv1.weight": weights, "after.layer1.0.conv1.weight": cut}, place / "heatmaps.safetensors")
    return place


def make_comparison(root: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    rows = []
    for label in ENDS:
        of_label = seeds if label != "oneshot" else (0,)
        cut = [json.loads((make_run(root, label, seed) / "result.json").read_text())["cut"] for seed in of_label]
        rows.append({
            "label": label, "method": label.upper(), "seeds": list(of_label), "n": len(cut), "mean": float(np.mean(cut)),
            "std": float(np.std(cut, ddof=1)) if len(cut) > 1 else None, "cut": cut, "dense": 93.39,
            "paper": {"slr": 92.3, "admm": 90.5}.get(label), "lr": None if label == "oneshot" else 0.03,
            "epochs": 0 if label == "oneshot" else 10, "seconds_mean": 2.31 if label == "oneshot" else 614.71, "rate": 6.5,
        })  # fmt: skip
    paper = {"slr": 92.3, "admm": 90.5, "epochs": 30, "source": "Table II"}
    write_json(root / "compare.json", {"recipe": "resnet56-6.5x", "split": "test", "rows": rows, "paper": paper})
    return root


class Page(HTMLParser):
    """Checks that tags nest and ids are unique, and gathers the text and what would be loaded."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open
        ids = [given["id"] for _, given in self.tags if "id" in given]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [given for found, given in self.tags if found == tag]


def table_rows(page: Page) -> list[list[str]]:
    """The cells of the page's first table, row by row."""
    body = page.source.split("<tbody>")[1].split("</tbody>")[0]
    cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in body.split("</tr>"))
    return [[re.sub("<[^>]+>", "", cell) for cell in row] for row in cells if row]


# ------------------------------------------------------------------ the page of a run


def test_a_run_page_says_it_in_one_sentence_and_shows_everything(tmp_path: Path) -> None:
    path = render_run(make_run(tmp_path))
    assert path == tmp_path / "slr-seed0" / "report.html"
    page = Page(path)
    assert "ResNet-56, 6.5× smaller in the pruned layers, 92.6 % after cutting, dense 93.4 %, paper 92.3 %" in page.text
    assert HONEST in page.text
    for expected in ("3.44 MB → 402 kB", "6.42×", "−0.79", "+0.30", "ab" * 32, "batch size 128", "torch 2.9.0"):
        assert expected in page.text, expected
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("svg")) == 8
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(table_rows(page)) == len(LAYERS)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    for page in (Page(render_run(make_run(tmp_path))), Page(render_comparison(tmp_path))):
        assert not page.all("script") and not page.all("link") and not page.all("iframe")
        addresses = [value for _, given in page.tags for key, value in given.items() if key in ("href", "src", "xlink:href")]
        assert all(value and value.startswith(("#", "data:", "slr-seed0/")) for value in addresses)
        assert not re.findall(r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink))", page.source)
        assert "@import" not in page.source and not re.findall(r"url\((?!#)", page.source)


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    place = make_run(tmp_path)
    write_jsonl(place / "history.jsonl", [])
    assert render_run(place).read_bytes() == render_run(place).read_bytes()


@quick
def test_a_miss_is_printed_as_a_miss(tmp_path: Path) -> None:
    page = Page(render_run(make_run(tmp_path, cut=92.28)))
    assert "paper 92.3 %, which is missed by 0.02" in page.text
    assert "−0.02, missed" in page.text
    assert "missed" not in Page(render_run(make_run(tmp_path, cut=92.3))).text


def test_strings_from_files_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&\'"'
    layers = [{"name": evil, "shape": [2, 2], "pattern": evil, "kept": 1, "total": 4}]
    place = make_run(
        tmp_path, label="slr", method=evil, command=evil, device=evil, metric=evil, split=evil, budget=evil,
        versions={evil: evil}, paper={evil: evil, "slr": 92.3}, layers=layers, recipe_sha256=evil,
    )  # fmt: skip
    write_text(place / "recipe.toml", f"# {evil}\n[model]\nname = '''{evil.replace(chr(39), '')}'''\n")
    weights = np.ones((2, 2), dtype=np.float32)
    save_file({f"before.{evil}": weights, f"after.{evil}": weights}, place / "heatmaps.safetensors")
    rows = [row | {"stage": evil if row["epoch"] > 5 else "prune"} for row in epoch_rows(90)]
    write_jsonl(place / "epochs.jsonl", rows)
    for path in (render_run(place), render_comparison(tmp_path)):
        page = Page(path)
        assert not page.all("script") and "<script" not in page.source
        assert evil in page.text


def test_a_dollar_or_a_formula_in_a_name_stays_text(tmp_path: Path) -> None:
    layers = [{"name": "a$body$x_1$", "shape": [2, 2], "pattern": "2:4", "kept": 1, "total": 4}]
    place = make_run(tmp_path, layers=layers, device="$body ${title}")
    (place / "history.jsonl").unlink()
    page = Page(render_run(place))
    assert "$body ${title}" in page.text
    assert page.text.count("a$body$x_1$") == 2  # in the table and at the bar


@quick
def test_an_interrupted_run_shows_what_there_is(tmp_path: Path) -> None:
    place = make_run(tmp_path)
    (place / "result.json").unlink()
    (place / "heatmaps.safetensors").unlink()
    page = Page(render_run(place))
    assert "ResNet-56: not finished; 92.6 after cutting in epoch 10" in page.text
    assert "no result.json" in page.text and "No weight heat maps" in page.text
    assert len(page.all("svg")) == 6


@quick
def test_a_one_shot_run_has_no_curves_and_says_so(tmp_path: Path) -> None:
    page = Page(render_run(make_run(tmp_path, "oneshot")))
    assert "No epochs" in page.text and "Not recorded by what ran here: accuracy after cutting" in page.text
    assert "18.4 % after cutting" in page.text and len(page.all("svg")) == 2


@quick
@pytest.mark.parametrize("keep", ["result.json", "history.jsonl", "epochs.jsonl", "recipe.toml"])
def test_any_single_file_is_enough_for_a_page(tmp_path: Path, keep: str) -> None:
    place = make_run(tmp_path)
    for file in place.iterdir():
        if file.name != keep:
            file.unlink()
    assert Page(render_run(place)).all("h2")


@quick
def test_null_for_every_key_of_the_result_still_makes_a_page(tmp_path: Path) -> None:
    place = make_run(tmp_path)
    result = json.loads((place / "result.json").read_text())
    write_json(place / "result.json", dict.fromkeys(result))
    assert "resnet56" in Page(render_run(place)).text.lower()
    Page(render_comparison(tmp_path))


def test_retrained_epochs_are_no_part_of_the_curve_without_retraining(tmp_path: Path) -> None:
    place = make_run(tmp_path, retrained=93.1)
    write_jsonl(place / "history.jsonl", [])
    curve = Page(render_run(place)).source
    rows = epoch_rows(92.6)
    retrain = [row | {"stage": "retrain", "epoch": row["epoch"] + 10, "accuracy_cut": 99.0} for row in rows]
    write_jsonl(place / "epochs.jsonl", rows + retrain)
    page = Page(render_run(place))
    first = re.compile(r"<figure.*?</svg>", re.DOTALL)
    assert first.search(page.source)[0] == first.search(curve)[0]  # type: ignore[index]
    assert "93.1 % after retraining" in page.text and "retrain" in page.words


# ------------------------------------------------------------------ damaged files


@quick
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", '{\n  "dense": 93.3,\n  "cut"', r"result\.json, line 3: not JSON .* cut short or damaged"),
        ("result.json", "[]", r"result\.json: expected a JSON object, got list"),
        ("result.json", '{"cut": "92"}', r"result\.json: 'cut' should be a number, got '92'"),
        ("result.json", '{"cut": NaN}', r"result\.json holds NaN"),
        ("result.json", '{"seed": true}', r"'seed' should be of type int, got True"),
        ("result.json", '{"layers": [{"name": "a"}]}', r"layers row 1: 'shape' is missing"),
        ("result.json", '{"layers": [7]}', r"layers row 1: expected a JSON object, got int"),
        ("result.json", '{"sizes": {"dense_bytes": 1}}', r"sizes: 'sparse_bytes' is missing"),
        ("result.json", "[" * 100_000, r"result\.json, line 1: "),
        ("history.jsonl", '{"step": 1, "update": 1}\n\n{"step": 2,', r"history\.jsonl, line 3: not JSON"),
        ("history.jsonl", '{"step": 1, "update": 1}\n{"step": 2}', r"history\.jsonl, line 2: 'update' is missing"),
        ("history.jsonl", '{"step": 1, "update": 1, "rho": Infinity}', r"history\.jsonl, line 1 holds Infinity"),
        ("history.jsonl", '{"step": 1, "update": 1, "condition_w": 1}', r"line 1: 'condition_w' should be of type bool"),
        ("epochs.jsonl", '{"accuracy_cut": 91}', r"epochs\.jsonl, line 1: 'epoch' is missing"),
        ("epochs.jsonl", '{"epoch": 1, "accuracy_cut": "91"}', r"epochs\.jsonl, line 1: 'accuracy_cut' should be a number"),
        ("recipe.toml", "name = ", r"recipe\.toml is not TOML"),
        ("heatmaps.safetensors", "nothing", r"heatmaps\.safetensors is no safetensors file"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, file: str, content: str, message: str) -> None:
    place = make_run(tmp_path)
    write_text(place / file, content)
    with pytest.raises(FormatError, match=message):
        render_run(place)
    assert not (place / "report.html").exists()


def test_bytes_that_are_no_text_are_a_format_error(tmp_path: Path) -> None:
    place = make_run(tmp_path)
    (place / "history.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"history\.jsonl is no UTF-8 text"):
        render_run(place)


def test_heat_maps_of_another_shape_are_a_format_error(tmp_path: Path) -> None:
    place = make_run(tmp_path)
    save_file({"before.a": np.zeros(3, dtype=np.float32)}, place / "heatmaps.safetensors")
    with pytest.raises(FormatError, match=r"expected 2-D floats .* of shape \(3,\)"):
        render_run(place)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no run in .*expected a folder"):
        render_run(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="nothing to compare"):
        render_comparison(tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ the page of a comparison


def test_a_comparison_puts_the_table_first_and_the_best_on_top(tmp_path: Path) -> None:
    path = render_comparison(make_comparison(tmp_path))
    assert path == tmp_path / "compare.html"
    page = Page(path)
    rows = table_rows(page)
    assert rows[0][:2] == ["dense, not pruned", "93.39"]
    assert rows[1] == [
        "slr", "92.70 ± 0.10", "3", "−0.69", "92.3 (+0.40)", "6.5×", "0.03", "10", "615"
    ]  # fmt: skip
    assert [row[0] for row in rows[1:]] == ["slr", "admm", "gradual", "admm-published", "slr-paper", "oneshot"]
    assert rows[-1][1:4] == ["18.40", "1", "−74.99"]
    assert page.source.index("<table>") < page.source.index("<svg")
    assert "slr is first of 6, 92.7 % after cutting at 6.5×" in page.text
    assert len(page.all("svg")) == 6 and "bands run from the lowest to the highest" in page.text


@quick
def test_a_comparison_names_its_misses(tmp_path: Path) -> None:
    make_run(tmp_path, "slr", cut=91.0)
    page = Page(render_comparison(tmp_path))
    assert "the paper's number is missed by slr" in page.text
    assert table_rows(page)[1][4] == "92.3 (−1.30, missed)"


@quick
def test_the_papers_number_is_no_yardstick_for_a_recipe_that_is_scaled_down(tmp_path: Path) -> None:
    paper = {"slr": 92.3, "source": "Table II", "scaled_down": True}
    run = Page(render_run(make_run(tmp_path, "slr", cut=91.0, paper=paper)))
    comparison = Page(render_comparison(tmp_path))
    assert "missed" not in run.text + comparison.text and "paper, slr" not in comparison.text
    assert len(table_rows(comparison)[1]) == 8, "no column of the paper's"
    for page in (run, comparison):
        assert "of another network, data or budget" in page.text and "92.3" in page.text and "scaled_down:" not in page.text


@quick
def test_a_comparison_without_compare_json_computes_the_same_numbers(tmp_path: Path) -> None:
    with_file = table_rows(Page(render_comparison(make_comparison(tmp_path))))
    (tmp_path / "compare.json").unlink()
    assert table_rows(Page(render_comparison(tmp_path))) == with_file


@quick
def test_a_comparison_without_published_numbers_has_no_column_for_them(tmp_path: Path) -> None:
    make_run(tmp_path, "slr", paper={})
    assert "paper" not in Page(render_comparison(tmp_path)).words
    assert [len(row) for row in table_rows(Page(tmp_path / "compare.html"))] == [8, 8]


@quick
def test_a_folder_of_a_run_that_has_only_begun_is_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, "slr")
    (tmp_path / "admm-seed0").mkdir()
    assert "admm" not in Page(render_comparison(tmp_path)).text.split("The paper")[0]


@quick
def test_a_comparison_lives_without_the_run_folders(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    alone = tmp_path / "alone"
    write_text(alone / "compare.json", (tmp_path / "compare.json").read_text())
    page = Page(render_comparison(alone))
    assert "only compare.json was read" in page.text and table_rows(page)[1][0] == "slr"


@quick
def test_a_comparison_names_unfinished_runs_and_other_counts(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    (tmp_path / "slr-seed2" / "result.json").unlink()
    page = Page(render_comparison(tmp_path))
    assert "slr-seed2 has not finished" in page.text
    assert "The table counts 3 runs of slr, the folder holds 2 finished ones." in page.text


@quick
def test_a_mean_keeps_its_own_standard_deviation(tmp_path: Path) -> None:
    make_comparison(tmp_path, seeds=(0, 1))
    table = json.loads((tmp_path / "compare.json").read_text())
    slr = next(row for row in table["rows"] if row["label"] == "slr")
    slr |= {"seeds": [0], "n": 1, "mean": slr["cut"][0], "std": None, "cut": slr["cut"][:1]}
    write_json(tmp_path / "compare.json", table)
    cells = next(row for row in table_rows(Page(render_comparison(tmp_path))) if row[0] == "slr")
    assert cells[1:3] == [f"{slr['mean']:.2f}", "1"]


@quick
def test_runs_on_another_split_are_named_and_left_out(tmp_path: Path) -> None:
    make_comparison(tmp_path)
    make_run(tmp_path, "slr", 7, cut=99.0, split="validation")
    page = Page(render_comparison(tmp_path))
    assert "slr-seed7 was measured on the validation split and is left out." in page.text
    assert [row[0] for row in table_rows(page)[1:]] == ["slr", "admm", "gradual", "admm-published", "slr-paper", "oneshot"]
    assert "99.00" not in page.text and "the folder holds" not in page.text


@quick
def test_a_comparison_links_to_the_pages_of_its_runs(tmp_path: Path) -> None:
    render_run(make_run(tmp_path, "slr"))
    make_run(tmp_path, "admm")
    assert [link["href"] for link in Page(render_comparison(tmp_path)).all("a")] == ["slr-seed0/report.html"]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"rows": [{"mean": 1}]}', "row 1: 'label' is missing"), ('{"rows"\n}', "line 2: not JSON"),
     ('{"rows": [{"label": "slr", "mean": "x"}]}', "row 1: 'mean' should be a number")],
)  # fmt: skip
def test_a_damaged_comparison_is_named(tmp_path: Path, content: str, message: str) -> None:
    write_text(tmp_path / "compare.json", content)
    with pytest.raises(FormatError, match=rf"compare\.json, {message}"):
        render_comparison(tmp_path)


# ------------------------------------------------------------------ the sparsity of a model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4, bias=True)
        self.conv = nn.Conv2d(3, 5, 3)
        self.decoder = nn.Linear(8, 4)
        self.decoder.weight = self.encoder.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)


def test_sparsity_report_counts_zeros_structure_and_ties() -> None:
    model = Tied()
    with torch.no_grad():
        model.encoder.weight[:, ::2] = 0
        model.conv.weight[1:3] = 0
        model.conv.weight[:, 2] = 0
    report = sparsity_report(model)
    encoder, conv = report.layers
    assert (encoder.name, encoder.shape, encoder.kept, encoder.total) == ("encoder.weight", (4, 8), 16, 32)
    assert encoder.two_of_four and encoder.aliases == ("decoder.weight",) and encoder.zero_channels == 4
    assert (conv.zero_filters, conv.zero_channels, conv.two_of_four) == (2, 1, False)
    assert conv.kept == 3 * 2 * 9 and conv.sparsity == pytest.approx(1 - 54 / 135)
    assert (report.kept, report.total, report.rate) == (70, 167, pytest.approx(167 / 70))


def test_two_of_four_needs_every_group_of_every_filter() -> None:
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 0]]))
    assert not sparsity_report(layer).layers[0].two_of_four
    with torch.no_grad():
        layer.weight[1, 4] = 0
    assert sparsity_report(layer).layers[0].two_of_four


def test_sparsity_report_reads_state_dicts_and_prints_a_table() -> None:
    model = Tied()
    with torch.no_grad():
        model.conv.weight.zero_()
    of_state, of_model = sparsity_report(model.state_dict()), sparsity_report(model)
    assert of_state == of_model
    lines = str(of_state).splitlines()
    assert len(lines) == 4 and lines[0].split() == ["parameter", "shape", "kept", "of", "sparsity", "structure"]
    assert re.fullmatch(r"conv\.weight +5×3×3×3 +0 +135 +1\.0000 +5 of 5 filters zero; 3 of 3 channels zero", lines[2])
    assert lines[3].startswith("all ") and lines[3].endswith("rate 5.22×")


def test_sparsity_report_of_views_and_integers() -> None:
    base = torch.ones(4, 4)
    state = {"a": base[:2], "b": base[2:], "index": torch.ones(2, 2, dtype=torch.long), "half": base.half().t()}
    assert [layer.name for layer in sparsity_report(state).layers] == ["a", "b", "half"]
    assert sparsity_report({"z": torch.zeros(2, 2)}).rate == math.inf


@pytest.mark.parametrize(
    ("source", "message"),
    [({"model": {}}, "no floating tensor"), (nn.ReLU(), "no parameter"), ([1], "expects a torch.nn.Module .* got list"),
     (nn.LazyLinear(3), "weight has no shape yet"),
     (nn.Sequential(nn.ReLU(), nn.Linear(3, 3, device="meta")), "1.weight is on the meta device .*load the weights first")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_sparsity_report_refuses_what_it_cannot_count(source: Any, message: str) -> None:
    with pytest.raises(DualpruneError, match=message):
        sparsity_report(source)


def test_the_module_itself_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, dualprune.report; sys.exit(bool({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_published_settings_are_called_tuned_only_where_they_are(tmp_path, monkeypatch):
    path = Path(__file__).resolve().parents[1] / "benchmarks/publish.py"
    spec = importlib.util.spec_from_file_location("publish", path)
    assert spec is not None and spec.loader is not None
    publish = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "publish", publish)  # where its dataclasses look for their types
    spec.loader.exec_module(publish)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "draw", lambda *_: [])
    folder = tmp_path / "runs/small"
    for label, seed, changes in [
        ("slr", 0, {"lr": 0.1}), ("slr", 1, {"lr": 0.1}), ("admm", 0, {"lr": 0.1}), ("admm", 1, {"lr": 0.05}),
        ("slr", 2, {"lr": 0.1, "split": "validation", "cut": 99.0}), ("gradual", 0, {"lr": 0.1}),
    ]:  # fmt: skip
        (make_run(folder, label, seed, **changes) / "pruned.safetensors").write_bytes(b"")
    methods = {label: {"lr": 0.1, "scores": {"0.1": [90.0]}} for label in ("slr", "admm")}
    write_json(folder / "tune.json", {"held_out": 0.1, "grid": [0.1], "methods": methods})
    page = tmp_path / "docs/results.md"
    write_text(page, "<!-- begin small -->\n<!-- end small -->\n")
    (tmp_path / "results").mkdir()
    publish.publish(folder)
    rows = {line.split(" | ")[0]: line for line in page.read_text().splitlines() if line.startswith("| ")}
    assert "| 2 (0, 1) |" in rows["| slr"] and "99.00" not in page.read_text()
    assert "| 0.1* |" in rows["| slr"] and "0.1*" not in rows["| admm"] + rows["| gradual"]
    assert len(json.loads((tmp_path / "results/small.json").read_text())["runs"]) == 5


def test_a_task_s_metrics_and_pictures_stand_before_and_after_cutting(tmp_path):
    place = tmp_path / "boxes" / "slr-seed0"
    place.mkdir(parents=True)
    metrics = {"dense": {"AP50": 36.5, "AP50-95": 18.25}, "cut": {"AP50": 35.125, "AP50-95": 17.0}}
    (place / "result.json").write_text(json.dumps({"recipe": "boxes", "metric": "AP50 %", "metrics": metrics}))
    pixels = np.full((4, 6, 3), 200, np.uint8)
    for when in ("dense", "cut"):
        write_pictures(place, when, [("street <1>", pixels), ("harbour", pixels)])
    page = render_run(place).read_text()
    order = [page.index(text) for text in ("AP50-95", "18.25", "17.00")]
    assert order == sorted(order)
    captions = [f"{name}, {when}" for name in ("street &lt;1&gt;", "harbour") for when in ("dense", "after cutting")]
    places = [page.index(f"<figcaption>{caption}</figcaption>") for caption in captions]
    assert places == sorted(places) and page.count("data:image/png;base64,") == 4
