"""What benchmarks/publish.py puts into tables is what the run folders hold, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dualprune.files import write_json, write_jsonl, write_text
from dualprune.recipe import load_recipe
from dualprune.train import run
from helpers import TINY_RECIPE

ROOT = Path(__file__).resolve().parents[1]

METHODS = "".join(f"[methods.{label}]\n" for label in ("slr", "admm", "slr-paper"))


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, writing into a repository of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("publish", None)
    import publish

    monkeypatch.setattr(publish, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    for name in ("a-2x", "b-2x"):
        write_text(tmp_path / f"recipes/{name}.toml", METHODS)
    write_text(tmp_path / "docs/results.md", "before\n<!-- begin t -->\nNot run yet.\n<!-- end t -->\nafter\n")
    return publish


def make_run(root: Path, recipe: str, label: str, seed: int, cut: float | dict[str, float], **changes: Any) -> Path:
    """A finished run's folder; `changes` go into result.json."""
    place = root / recipe / f"{label}-seed{seed}"
    after = cut if isinstance(cut, dict) else {"top-1": cut}
    first = next(iter(after))
    write_text(place / "recipe.toml", f"[prune]\nbits = 4\n{METHODS}")
    write_jsonl(place / "epochs.jsonl", [{"epoch": 1, "stage": "train", "loss": 0.123456, "accuracy_cut": 50.0, "lr": 0.1}])
    write_jsonl(place / "history.jsonl", [{"step": 1, "update": 1}])
    write_text(place / "pruned.safetensors", f"{label} {seed}")
    result = {
        "label": label, "method": "M()", "seed": seed, "split": "test", "metric": f"{first} %", "dense": 95.0,
        "cut": after[first],
        "metrics": {"dense": dict.fromkeys(after, 95.0), "cut": after}, "kept_model": 1000, "rate": 2.0, "rate_model": 1.9,
        "epochs": 3, "retrain_epochs": 0, "updates": 1, "lr": 0.1, "seconds": 90.0, "paper": {},
        "sizes": {"dense_bytes": 4000, "sparse_bytes": 1000},
    }  # fmt: skip
    write_json(place / "result.json", result | changes)
    return place


def table(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def shown(tmp_path: Path) -> str:
    text = (tmp_path / "docs/results.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    return text


def test_rows_are_by_rate_and_then_best_first(publish: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for recipe, rate in (("net-10x-small", 10.0), ("net-2.5x-small", 2.5)):
        for label, cut in (("admm", 90.0), ("slr", 91.0)):
            make_run(runs, recipe, label, 1, cut - rate, rate_model=rate)
    make_run(runs, "net-2.5x-small", "admm", 2, 92.5, rate_model=2.5)
    publish.publish_table("t", [runs / "net-10x-small", runs / "net-2.5x-small"])
    rows = table(shown(tmp_path))
    assert [(row["recipe"], row["method"]) for row in rows] == [
        ("net-2.5x-small", "dense, not pruned"),  # and once only: the dense model is the same
        ("net-2.5x-small", "admm"), ("net-2.5x-small", "slr"), ("net-10x-small", "slr"), ("net-10x-small", "admm"),
    ]  # fmt: skip
    admm, slr = rows[1:3]
    assert admm["after cutting: top-1 %"] == "90.00 ± 3.54" and admm["n (seeds)"] == "2 (1, 2)"  # 87.5 and 92.5
    assert slr["after cutting: top-1 %"] == "88.50" and slr["n (seeds)"] == "n = 1 (1)"
    assert "Not run yet" not in shown(tmp_path)


def test_networks_stay_together_whatever_their_rates(publish: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    names = ["b-9x", "a-5x", "b-3x"]
    for name, rate in zip(names, (9.0, 5.0, 3.0), strict=True):
        make_run(runs, name, "slr", 1, 80.0, rate_model=rate)
    publish.publish_table("t", [runs / name for name in names])
    order = [row["recipe"] for row in table(shown(tmp_path)) if row["method"] == "slr"]
    assert order == ["b-3x", "b-9x", "a-5x"]


def test_validation_and_unfinished_runs_never_enter(publish: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "net", "slr", 1, 90.0)
    make_run(runs, "net", "slr", 2, 99.25, split="validation")
    make_run(runs, "net", "slr", 3, 98.5, split=None)
    (make_run(runs, "net", "admm", 1, 97.75) / "result.json").unlink()
    make_run(runs, "held-out", "slr", 1, 96.5, split="validation")
    make_run(runs / "net", "tune", "slr", 1, 95.5, split="validation")
    publish.publish_table("t", [runs / "net", runs / "held-out"])
    rows = table(shown(tmp_path))
    assert [row["method"] for row in rows] == ["dense, not pruned", "slr"] and rows[1]["after cutting: top-1 %"] == "90.00"
    written = shown(tmp_path) + (tmp_path / "results/t.json").read_text()
    assert not any(number in written for number in ("99.25", "98.5", "97.75", "96.5", "95.5"))
    assert "Not run yet: held-out." in written
    said = capsys.readouterr().out
    assert "slr-seed2 (on the validation split)" in said and "admm-seed1 (unfinished)" in said
    with pytest.raises(SystemExit, match="no finished run on the test split"):
        publish.publish_table("t", [runs / "held-out"])


def test_the_paper_stands_beside_ours_also_where_we_have_nothing(publish: Any, tmp_path: Path) -> None:
    paper = {"source": "Table 7", "rate": 9.0, "dense": 78.5, "slr-paper": 65.6, "other_network": 3.34}
    paper |= {"retrained": {"slr": 75.8}, "easy": {"dense": 80.7, "slr": 68.0, "slr-retrained": 79.9}, "hard": {"slr": 46.1}}
    levels = {"3D moderate mAP": 60.0, "3D easy mAP": 70.0, "3D hard mAP": 50.0, "BEV easy mAP": 71.0, "3D easy mAP11": 72.0}
    both = {"dense": levels, "cut": levels, "retrained": levels}
    make_run(tmp_path / "runs", "points-9x", "slr", 1, levels, metrics=both, paper=paper, retrain_epochs=2)
    publish.publish_table("t", [tmp_path / "runs/points-9x"])
    dense, slr, missing = table(shown(tmp_path))
    assert "recipe" not in dense and dense["after cutting: 3D easy mAP %"] == "70.00 (paper: 80.7)"
    assert dense["retrained: 3D easy mAP %"] == "–"
    assert slr["after cutting: 3D moderate mAP %"] == "60.00"  # the paper's is slr-paper's
    assert slr["after cutting: 3D hard mAP %"] == "50.00 (paper: 46.1)"
    assert slr["retrained: 3D moderate mAP %"] == "60.00 (paper: 75.8)"
    assert slr["retrained: 3D easy mAP %"] == "70.00 (paper: 79.9)"
    assert "retrained: 3D hard mAP %" not in slr and slr["epochs"] == "3 + 2"
    assert not any("BEV" in title or "mAP11" in title for title in slr)
    assert (missing["method"], missing["after cutting: 3D moderate mAP %"]) == ("slr-paper", "not run (paper: 65.6)")
    assert "The paper: Table 7; other network 3.34." in shown(tmp_path)


def test_lanes_have_their_false_rates_and_robust_runs_the_gain_over_admm(publish: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs, "lanes-2x", "slr", 1, {"accuracy": 90.0, "false_positive_rate": 5.0, "false_negative_rate": 6.0})
    publish.publish_table("t", [runs / "lanes-2x"])
    assert (
        table(shown(tmp_path))[1] | {"after cutting: FP % ↓": "5.00", "after cutting: FN % ↓": "6.00"}
        == table(shown(tmp_path))[1]
    )
    for label, robust in (("slr", 44.0), ("admm", 40.5)):
        make_run(runs, "robust", label, 1, {"top-1": 80.0, "clean": 79.0, "pgd-10": robust, "pgd-50x2": 1.0, "worst": 0.5})
    publish.publish_table("t", [runs / "robust"])
    gains = {row["method"]: row["pgd-10 over admm"] for row in table(shown(tmp_path))}
    assert gains == {"dense, not pruned": "–", "slr": "+3.50", "admm": "–"}
    assert table(shown(tmp_path))[1]["after cutting: clean %"] == "79.00"


def test_sizes_are_shown_when_asked_for(publish: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "net", "slr", 1, 90.0)
    publish.publish_table("t", [tmp_path / "runs/net"])
    assert "stored bytes" not in table(shown(tmp_path))[0]
    publish.publish_table("t", [tmp_path / "runs/net"], sizes=True)
    dense, slr = table(shown(tmp_path))
    assert (dense["stored bytes"], slr["stored bytes"]) == ("4,000", "1,000 (4.0×)")
    assert (slr["bits"], slr["weights kept"], dense["bits"]) == ("4", "1,000", "–")


def test_the_json_is_small_and_weights_are_copied_only_when_asked_for(publish: Any, tmp_path: Path) -> None:
    for seed in (2, 3):
        make_run(tmp_path / "runs", "net", "slr", seed, 90.0 + seed)
    publish.publish_table("t", [tmp_path / "runs/net"])
    assert not list((tmp_path / "results").glob("*.safetensors"))
    (recipe,) = json.loads((tmp_path / "results/t.json").read_text())["recipes"]
    run = recipe["runs"][0]
    assert run["curve"] == {"epoch": [1], "stage": ["train"], "loss": [0.1235], "accuracy_cut": [50.0]} and "history" not in run
    publish.publish_table("t", [tmp_path / "runs/net"], weights="slr")
    assert (tmp_path / "results/net.safetensors").read_text() == "slr 2"  # the first seed, not the best


def test_what_cannot_be_published_says_why(publish: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "net", "slr", 1, 90.0)
    with pytest.raises(SystemExit, match="net given more than once"):
        publish.publish_table("t", [tmp_path / "runs/net", tmp_path / "runs/net"])
    with pytest.raises(SystemExit, match="no marker <!-- begin u -->"):
        publish.publish_table("u", [tmp_path / "runs/net"])
    with pytest.raises(SystemExit, match="is no folder"):
        publish.publish_table("t", [tmp_path / "runs/nte"])


def test_weights_are_measured_again_with_a_setting_changed(publish: Any, tmp_path: Path) -> None:
    write_text(tmp_path / "tiny.toml", TINY_RECIPE)
    run(load_recipe(tmp_path / "tiny.toml"), "slr", out=tmp_path / "runs")
    folder = next((tmp_path / "runs").iterdir())
    publish.publish_table("t", [folder], also=("again", "training.lr=0.5"))
    dense, pruned = table(shown(tmp_path))
    for row in (dense, pruned):  # a learning rate changes nothing about a measurement
        assert row["after cutting: again: top-1 %"] == row["after cutting: top-1 %"]
    assert dense["after cutting: top-1 %"] != pruned["after cutting: top-1 %"]


def test_what_was_measured_again_stays_in_the_table_after_retraining(publish: Any, tmp_path: Path) -> None:
    write_text(tmp_path / "tiny.toml", TINY_RECIPE)
    recipe = load_recipe(tmp_path / "tiny.toml", ["prune.retrain_epochs=1"])
    run(recipe, "slr", out=tmp_path / "runs")
    publish.publish_table("t", [tmp_path / "runs" / recipe.name], also=("again", "training.lr=0.5"))
    _, pruned = table(shown(tmp_path))
    assert pruned["retrained: again: top-1 %"] == pruned["retrained: top-1 %"]


def test_a_dense_model_that_a_run_trained_is_not_measured_again_at_its_start(publish: Any, tmp_path: Path) -> None:
    write_text(tmp_path / "tiny.toml", TINY_RECIPE + "\n[dense]\nepochs = 1\nlr = 0.1\n")
    recipe = load_recipe(tmp_path / "tiny.toml")
    run(recipe, "slr", out=tmp_path / "runs")
    with pytest.raises(SystemExit, match=r"trained by \[dense\]"):
        publish.publish_table("t", [tmp_path / "runs" / recipe.name], also=("again", "training.lr=0.5"))


def test_a_trial_that_diverged_is_named(publish: Any) -> None:
    methods = {"slr": {"scores": {"0.1": [91.0, 92.0], "5": [None, 10.0]}}}
    assert "slr (lr 0.1: 91.50, lr 5: diverged);" in publish.held_out({"held_out": 0.1, "grid": "0.1, 5", "methods": methods})


def test_a_table_grows_by_runs_of_another_machine(publish: Any, tmp_path: Path) -> None:
    here, there = tmp_path / "runs", tmp_path / "of another machine"
    for label, cut in (("slr", 90.0), ("admm", 80.0)):
        make_run(there, "a-2x", label, 1, cut)
    make_run(there, "b-2x", "slr", 1, 70.0)
    publish.publish_table("t", [there / "a-2x", there / "b-2x"])
    before = shown(tmp_path), (tmp_path / "results/t.json").read_text()
    make_run(here, "a-2x", "slr", 1, 91.0)  # again: in the place of the published one
    make_run(here, "a-2x", "slr", 2, 93.0)
    publish.publish_table("t", [here / "a-2x"], keep=True)
    rows = table(shown(tmp_path))
    assert [(row["recipe"], row["method"], row["after cutting: top-1 %"]) for row in rows] == [
        ("a-2x", "dense, not pruned", "95.00"), ("a-2x", "slr", "92.00 ± 1.41"), ("a-2x", "admm", "80.00"),
        ("b-2x", "dense, not pruned", "95.00"), ("b-2x", "slr", "70.00"),
    ]  # fmt: skip
    publish.publish_table("t", [there / "a-2x"], keep=True)
    make_run(there, "a-2x", "slr", 2, 93.0)
    publish.publish_table("t", [there / "a-2x", there / "b-2x"])
    alone = shown(tmp_path), (tmp_path / "results/t.json").read_text()
    publish.publish_table("t", [there / "b-2x"], keep=True)
    assert (shown(tmp_path), (tmp_path / "results/t.json").read_text()) == alone != before


def test_a_recipe_alone_grows_by_runs_of_another_machine(publish: Any, tmp_path: Path) -> None:
    here, there = tmp_path / "runs", tmp_path / "of another machine"
    write_text(tmp_path / "docs/results.md", "before\n<!-- begin a-2x -->\nNot run yet.\n<!-- end a-2x -->\nafter\n")
    make_run(there, "a-2x", "slr", 1, 90.0)
    publish.publish(there / "a-2x")
    curve = (tmp_path / "docs/figures/a-2x-fig1.svg").read_text()
    make_run(here, "a-2x", "gradual", 1, 91.0)
    publish.publish(here / "a-2x", keep=True)
    assert [(row["method"], row["after cutting: top-1 %"]) for row in table(shown(tmp_path))] == [
        ("dense, not pruned", "95.00"), ("gradual", "91.00"), ("slr", "90.00"),
    ]  # fmt: skip
    both = json.loads((tmp_path / "results/a-2x.json").read_text())
    assert [run["history"] for run in both["runs"]] == [[{"step": 1, "update": 1}]] * 2
    assert (tmp_path / "results/a-2x.safetensors").read_text() == "slr 1"  # stays, as this folder has no slr
    assert (tmp_path / "docs/figures/a-2x-fig1.svg").read_text() != curve
    publish.publish(there / "a-2x", keep=True)
    assert json.loads((tmp_path / "results/a-2x.json").read_text()) == both


def test_runs_from_another_dense_model_do_not_join_a_table(publish: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "a-2x", "slr", 1, 90.0)
    with pytest.raises(SystemExit, match=r"there is no .*t\.json yet; publish without --keep"):
        publish.publish_table("t", [tmp_path / "runs/a-2x"], keep=True)
    publish.publish_table("t", [tmp_path / "runs/a-2x"])
    make_run(tmp_path / "other", "a-2x", "admm", 1, 80.0, metrics={"dense": {"top-1": 94.0}, "cut": {"top-1": 80.0}})
    with pytest.raises(
        SystemExit, match=r"start from a dense model of \{'top-1': 95.0\}, those in .* one of \{'top-1': 94.0\}"
    ):
        publish.publish_table("t", [tmp_path / "other/a-2x"], keep=True)
    assert [row["method"] for row in table(shown(tmp_path))] == ["dense, not pruned", "slr"]


def test_a_published_recipe_that_is_gone_is_named(publish: Any, tmp_path: Path) -> None:
    for name in ("a-2x", "b-2x"):
        make_run(tmp_path / "runs", name, "slr", 1, 90.0)
    publish.publish_table("t", [tmp_path / "runs/a-2x", tmp_path / "runs/b-2x"])
    (tmp_path / "recipes/b-2x.toml").unlink()
    with pytest.raises(SystemExit, match=r"published runs are of b-2x, but recipes/ has it no more"):
        publish.publish_table("t", [tmp_path / "runs/a-2x"], keep=True)
