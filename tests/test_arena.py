"""The arena: its cells are recipes with trials alike for all, its page says what is not run, and one small cell runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dualprune.train
from dualprune.errors import DualpruneError
from dualprune.progress import Silent
from dualprune.recipe import digest, load_recipe, parse_recipe
from dualprune.run_folder import Diverged
from dualprune.scope import build_problem
from dualprune.tasks import build_task
from helpers import TINY_RECIPE, same_bits, tiny_net, train

ROOT = Path(__file__).resolve().parents[1]
CELLS = sorted((ROOT / "benchmarks/arena/cells").glob("*.toml"))
SMALL = TINY_RECIPE.partition("[methods.slr]")[0].replace("calibrate = 64", "calibrate = 64\nretrain_epochs = 1")
SMALL += """
[methods.oneshot]
kind = "oneshot"
[methods.gradual]
kind = "gradual"
updates_per_epoch = 3
trials = [{ lr = 1e-4 }, { lr = 0.1 }]
"""

ROW = {
    "mean": 80.0,
    "std": 0.5,
    "retrained": 90.0,
    "retrained_std": None,
    "n": 3,
    "rate": 5.0,
    "lr": 0.1,
    "seconds_mean": 90.0,
    "dense": 95.0,
    "peak_memory_mb": 512.4,
    "metric": "top-1 %",
    "choice": None,
    "diverged": [],
}


@pytest.fixture(scope="module")
def arena():
    spec = importlib.util.spec_from_file_location("arena_run", ROOT / "benchmarks/arena/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks/arena"))


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "docs/arena.md").write_text("before\n<!-- begin arena -->\nold\n<!-- end arena -->\nafter\n")
    return tmp_path


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_every_cell_tunes_all_alike_and_retrains(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem and recipe.prune.retrain_epochs == 2
    counts = {label: len(table.trials) for label, table in recipe.methods.items()}
    expected = {
        "oneshot",
        "gradual",
        "gradual-geometric",
        "gradual-adaptive",
        "admm",
        "admm-published",
        "slr",
        "reweighted",
        "acdc",
        "safe",
    }
    assert set(counts) >= expected
    assert {label: n for label, n in counts.items() if n != 6} == {"oneshot": 0}
    assert {key for trial in recipe.method("slr").trials for key in trial} == {"lr"}, "SLR's default is what is tested"
    assert not any(recipe.method(label).epochs for label in recipe.methods)
    assert recipe.method("slr").updates_per_epoch == recipe.method("admm").updates_per_epoch
    phases = recipe.training.epochs * recipe.method("acdc").updates_per_epoch * 0.05
    assert phases >= 2, "an AC/DC phase must see two updates or more"


def test_a_small_twin_differs_in_its_images_and_precision_alone(arena, empty):
    full, small = arena.load_cell("resnet20-50x-5e"), arena.load_cell("resnet20-50x-5e-small")
    assert small.name == "resnet20-50x-5e-small" and small.data.options == {"subset": 10_000}
    assert small.description.endswith("5 epochs, of 10,000 training images")
    assert small.methods == full.methods and small.prune == full.prune and small.training.epochs == full.training.epochs
    assert small.training.precision == "float32", "rows of one cell may come of processors with and without bfloat16"
    assert not any("-small" in name for name in arena.names())

    arena.write_json(empty / "results/arena/resnet20-50x-5e-small.json", {"cell": small.name, "rows": [ROW | {"label": "slr"}]})
    arena.write_page(empty)
    text = (empty / "docs/arena.md").read_text()
    assert text.index("### resnet20-50x-5e\n") < text.index("### resnet20-50x-5e-small\n"), "a twin stands behind its cell"
    assert text.count("-small\n") == 1, "twins that are not run are not shown"


def test_the_page_has_a_figure_once_slr_has_met_a_rival(arena, empty):
    arena.write_page(empty)
    assert not list((empty / "docs/figures").iterdir())

    behind = {"gradual": 79.0, "oneshot": 10.0}
    rows = [ROW | {"label": "slr"}, *(ROW | {"label": label, "mean": mean, "std": None} for label, mean in behind.items())]
    arena.write_json(empty / "results/arena/lenet5-300x-small.json", {"cell": "lenet5-300x-small", "rows": rows})
    arena.write_json(empty / "results/arena/lenet5-100x.json", {"cell": "lenet5-100x", "rows": [ROW | {"label": "gradual"}]})
    arena.write_page(empty)
    assert "<!-- begin arena -->\n\n![Points from SLR" in (empty / "docs/arena.md").read_text()
    drawn = (empty / "docs/figures/arena.svg").read_text()
    assert ">lenet5-300x-small<" in drawn and "lenet5-100x" not in drawn and "70 behind" in drawn


@pytest.mark.parametrize("name", [path.stem for path in CELLS])
def test_every_cell_has_a_small_twin_with_the_same_trials_and_epochs(arena, name):
    full, small = arena.load_cell(name), arena.load_cell(f"{name}-small")
    assert small.methods == full.methods and small.training.epochs == full.training.epochs
    assert small.prune == full.prune and small.data.options != full.data.options


@pytest.mark.parametrize("name", ["resnet20-5x-small", "resnet20-5x"])
def test_a_cell_that_is_not_there_is_refused(arena, name):
    with pytest.raises(SystemExit, match=rf"no cell '{name}'; there are chargpt-2of4"):
        arena.load_cell(name)


def test_the_page_says_what_is_best_and_what_is_not_run_yet(arena, empty):
    arena.write_page(empty)
    text = (empty / "docs/arena.md").read_text()
    assert text.startswith("before\n<!-- begin arena -->\n\n### chargpt-2of4") and text.endswith("<!-- end arena -->\nafter\n")
    assert text.count(": not run yet.") == len(CELLS) and "old" not in text

    recipe = parse_recipe(SMALL)
    rho = {"lr": 0.1, "rho": {"start": 0.1, "end": 1.0}}
    rows = [ROW | {"label": "oneshot", "mean": 50.0}, ROW | {"label": "gradual", "choice": {"settings": rho}}]
    lines = arena.section(recipe, rows).splitlines()
    assert "| oneshot | 50.00 ± 0.50 | **90.00** | 3 | 5.0× | 0.1 | 1.5 | 512 | – |" in lines
    assert "| gradual | **80.00 ± 0.50** | **90.00** | 3 | 5.0× | 0.1 | 1.5 | 512 | rho 0.1→1 |" in lines
    closing = [ROW | {"label": "gradual", "choice": {"settings": {"lr": 0.1, "ramp": 0.6, "rho": {"closing": 4.0}}}}]
    assert "| ramp 0.6, rho closing 4 |" in arena.section(recipe, closing)
    assert "| 2, and 1 diverged |" in arena.section(recipe, [ROW | {"label": "gradual", "n": 2, "diverged": [1]}])
    assert lines[-1].startswith("| pat | not run yet |") and lines[-1].count("|") == lines[4].count("|")


def test_a_small_cell_runs_and_goes_on(arena, empty, monkeypatch):
    recipe = parse_recipe(SMALL)
    table = arena.run_cell(recipe, ["gradual", "oneshot"], [1, 2], empty / "runs", root=empty, device="cpu")
    assert [row["label"] for row in table["rows"]] == ["oneshot", "gradual"], "in the recipe's order"
    gradual = table["rows"][1]
    assert gradual["choice"]["settings"] == {"lr": 0.1} and gradual["n"] == 2 and gradual["retrained"] is not None
    saved = empty / "results/arena/tiny.json"
    assert json.loads(saved.read_text()) == table
    monkeypatch.setattr(arena, "tune", None)
    again = arena.run_cell(recipe, ["oneshot"], [1, 2], empty / "runs", root=empty, device="cpu")
    assert again == table, "what another method left stays, finished runs are read"


def test_a_small_twin_is_judged_on_the_images_it_leaves_out(arena, empty):
    pytest.importorskip("torchao")
    recipe = parse_recipe(SMALL, ["data.options.subset=600", "training.epochs=1"])
    judge = arena.unseen(recipe, "cpu")
    known, asked = build_task(recipe, device=torch.device("cpu")).data.x_train, judge.data.x_test
    assert len(known) == 600 and judge.count == len(asked) == 748
    assert not (asked[:, None] == known).flatten(2).all(2).any(), "none of them is trained on"
    assert arena.unseen(parse_recipe(SMALL), "cpu") is None

    table = arena.run_cell(recipe, ["gradual", "pat"], [1], empty / "runs", root=empty, device="cpu")
    trials = {"gradual": "lr0.1/gradual-seed0", "pat": "lr0.1-heal-0.75/pat-seed0"}
    for row, name in zip(table["rows"], ("0.1", "0.1, heal 0.75"), strict=True):
        trial = empty / "runs/tiny/tune" / trials[row["label"]]
        assert row["choice"]["judged_on"] == 748 and row["choice"]["scores"][name] == [judge(trial)]
        held_out = json.loads((trial / "result.json").read_text())["cut"]
        assert abs(judge(trial) - held_out) < 8 and judge(trial) != held_out, "the same model, on other images"


def test_a_method_that_fails_is_reported_and_the_rest_goes_on(arena, empty, capsys, monkeypatch):
    recipe = parse_recipe(SMALL, ["methods.gradual.trials=[{ lr = 1e30 }]"])
    with pytest.raises(DualpruneError, match="tiny: gradual failed"):
        arena.run_cell(recipe, ["gradual", "oneshot"], [1], empty / "runs", root=empty, device="cpu")
    assert "tiny, gradual: " in capsys.readouterr().err
    assert [row["label"] for row in arena.read(empty, "tiny")["rows"]] == ["oneshot"]

    started = []
    monkeypatch.setattr(arena.signal, "signal", lambda *_: None)
    monkeypatch.setattr(arena.subprocess, "run", lambda command: SimpleNamespace(returncode=int(not started.append(command))))
    monkeypatch.setattr(sys, "argv", ["run.py", "--cells", "lenet5-100x,lenet5-300x", "--methods", "slr"])
    with pytest.raises(SystemExit) as end:
        arena.main()
    assert end.value.code == 1 and len(started) == 2
    monkeypatch.setattr(arena, "run_cell", lambda *_, **__: arena.check_budgets(parse_recipe(UNEQUAL), ["gradual", "slow"]))
    monkeypatch.setattr(sys, "argv", ["run.py", "--cells", "lenet5-100x", "--methods", "slr"])
    with pytest.raises(SystemExit, match="unequal budgets"):
        arena.main()


@pytest.mark.parametrize("label", ["gradual", "pat"])
def test_a_run_that_diverges_is_counted(arena, empty, monkeypatch, label):
    """Seed 1 does: what the runs were made on is then read from the next one."""
    pytest.importorskip("torchao")
    module, name = (arena.pat, "run") if label == "pat" else (dualprune.train, "run")
    real = getattr(module, name)

    def run(*args, **settings):
        if settings.get("split", "test") == "test" and 1 in (settings.get("seed"), *args[2:3]):
            raise Diverged("the loss is nan")
        return real(*args, **settings)

    monkeypatch.setattr(module, name, run)
    recipe = parse_recipe(SMALL, ["training.epochs=1"])
    (row,) = arena.run_cell(recipe, [label], [1, 2], empty / "runs", root=empty, device="cpu")["rows"]
    assert (row["seeds"], row["diverged"], row["n"], row["std"]) == ([2], [1], 1, None)
    assert row["mean"] == row["cut"][0] and row["device"].startswith("cpu")
    with pytest.raises(DualpruneError, match=f"tiny: {label} failed"):
        arena.run_cell(recipe, [label], [1], empty / "elsewhere", root=empty, device="cpu")


def test_trials_of_pat_that_diverge_are_passed_over(arena, empty, monkeypatch, capsys):
    pytest.importorskip("torchao")
    recipe = parse_recipe(SMALL, ["training.epochs=1"])
    real = arena.pat.run

    def run(recipe, trial, *args, **settings):
        if trial["lr"] == 0.1 or not healthy:
            raise Diverged("the loss is nan")
        return real(recipe, trial, *args, **settings)

    monkeypatch.setattr(arena.pat, "run", run)
    monkeypatch.setattr(arena.pat, "trials", lambda _: [{"lr": 0.1, "heal": 0.75}, {"lr": 0.05, "heal": 0.75}])
    healthy = True
    (row,) = arena.run_cell(recipe, ["pat"], [1], empty / "runs", root=empty, device="cpu")["rows"]
    assert row["lr"] == 0.05 and row["choice"]["scores"]["0.1, heal 0.75"] == [None]
    healthy = False
    with pytest.raises(DualpruneError, match="tiny: pat failed"):
        arena.run_cell(recipe, ["pat"], [1], empty / "runs", root=empty, device="cpu")
    assert "every trial of 'pat' diverged (0.1, heal 0.75; 0.05, heal 0.75)" in capsys.readouterr().err


UNEQUAL = SMALL + '[methods.slow]\nkind = "gradual"\nepochs = 9\n'


def test_a_cell_of_unequal_budgets_is_refused(arena, empty):
    with pytest.raises(DualpruneError, match=r"unequal budgets in epochs \(gradual 2, slow 9\)"):
        arena.run_cell(parse_recipe(UNEQUAL), ["oneshot"], [1], empty / "runs", root=empty, device="cpu")


def test_rows_that_others_write_meanwhile_stay(arena, empty, monkeypatch):
    recipe = parse_recipe(SMALL)
    (gradual,) = arena.run_cell(recipe, ["gradual"], [1, 1], empty / "runs", root=empty, device="cpu")["rows"]
    assert gradual["n"] == 1, "a seed named twice is one run"
    saved = empty / "results/arena/tiny.json"
    saved.unlink()

    def meanwhile(*_, **__):
        saved.write_text(json.dumps({"cell": "tiny", "rows": [gradual]}))
        return gradual | {"label": "oneshot"}

    monkeypatch.setattr(arena, "run_method", meanwhile)
    rows = arena.run_cell(recipe, ["oneshot"], [1], empty / "runs", root=empty)["rows"]
    assert [row["label"] for row in rows] == ["oneshot", "gradual"]


def test_pat_cuts_to_the_asked_rate_and_resumes(arena, empty):
    pytest.importorskip("torchao")
    recipe = parse_recipe(SMALL, ["training.epochs=12"])
    row = arena.run_cell(recipe, ["pat"], [1], empty / "runs", root=empty, device="cpu")["rows"][0]
    assert row["rate"] == pytest.approx(5, rel=0.02) and set(row["choice"]["scores"]) >= {"0.1, heal 0.75", "0.1, heal 0.9"}
    assert row["mean"] > 50 and row["retrained"] > 50 and row["peak_memory_mb"] > 0
    before = (empty / "runs/tiny/pat-seed1/result.json").stat().st_mtime_ns
    assert arena.run_cell(recipe, ["pat"], [1], empty / "runs", root=empty, device="cpu")["rows"] == [row]
    assert (empty / "runs/tiny/pat-seed1/result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("options", [{"budget": "global"}, {"patterns": {"3.weight": "filter"}}, {}], ids=str)
def test_pat_holds_its_masks(arena, options):
    pytest.importorskip("torchao")
    net = tiny_net().to(memory_format=torch.channels_last)
    problem = build_problem(net, sparsity=0.75, **options)
    optimizer = arena.pat.wrapped(torch.optim.SGD(net.parameters(), 0.05, momentum=0.9), problem, heal=6)
    zeros = []
    train(net, optimizer, range(10), after_step=lambda step: zeros.append([w == 0 for w in problem.weights]))
    total = sum(z.numel() for z in zeros[-1])
    assert sum(int(z.sum()) for z in zeros[-1]) == pytest.approx(0.75 * total, abs=4)
    assert all(torch.equal(a, b) for a, b in zip(zeros[5], zeros[-1], strict=True))
    assert sum(int(z.sum()) for z in zeros[0]) < total / 2, "it rises"


def test_pat_goes_on_where_it_was_interrupted(arena, tmp_path):
    pytest.importorskip("torchao")
    recipe, trial = parse_recipe(SMALL), {"lr": 0.05, "heal": 0.6}
    whole = arena.pat.run(recipe, trial, 1, tmp_path / "whole", device="cpu")

    class Stops(Silent):
        def epoch(self, row):
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            arena.pat.run(recipe, trial, 1, tmp_path / "broken", device="cpu", progress=Stops())
    broken = arena.pat.run(recipe, trial, 1, tmp_path / "broken", device="cpu")
    assert {k: broken[k] for k in ("cut", "retrained", "kept")} == {k: whole[k] for k in ("cut", "retrained", "kept")}
    one, other = (torch.load(tmp_path / name / "pat-seed1/checkpoint.pt")["model"] for name in ("whole", "broken"))
    assert same_bits(one, other)


def test_a_finished_run_of_pat_outlives_new_keys_of_recipes(arena, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    recipe, trial = parse_recipe(SMALL, ["training.epochs=1"]), {"lr": 0.05, "heal": 0.5}
    first = arena.pat.run(recipe, trial, 1, tmp_path, device="cpu")
    same = parse_recipe(SMALL, ["training.epochs=1", "training.checkpoint_minutes=9"])
    assert arena.pat.run(same, trial, 1, tmp_path, device="cpu") == first
    assert len(first["data_sha256"]) == 64
    assert first["recipe_sha256"] == digest(
        recipe.deciding() | {"trial": trial, "run_seed": 1, "split": "test", "method": "pat"}
    ) and "robust" not in recipe.deciding()  # fmt: skip


def test_pat_refuses_other_patterns(arena):
    pytest.importorskip("torchao")
    problem = build_problem(tiny_net(), patterns={"3.weight": "2:4"})
    with pytest.raises(Exception, match="not on 2:4"):
        arena.pat.wrapped(torch.optim.SGD([t.weight for t in problem.targets], 0.05), problem, heal=6)
