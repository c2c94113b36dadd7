"""The reference loop: a whole run, and the promise that a broken one ends bit for bit like an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dualprune import SLR, load_sparse, report, run_folder, train
from dualprune.errors import DualpruneError, FormatError, NonFiniteError
from dualprune.loop import Interrupted, Loop
from dualprune.progress import Lines, Silent
from dualprune.recipe import parse_recipe
from dualprune.recipe_tables import MethodTable
from dualprune.run_folder import Diverged, RunError
from dualprune.tasks import build_task
from dualprune.tasks.classification.task import Classification
from dualprune.train import run
from helpers import TINY_RECIPE as TINY

DROPOUT_NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 10),
    )

class Poisoned(nn.Module):
    # diverges in its 9th training step: in the second epoch of five or six steps
    def __init__(self):
        super().__init__()
        self.inner, self.calls = net(), 0

    def forward(self, x):
        self.calls += self.training and torch.is_grad_enabled()
        return self.inner(x) * (float("nan") if self.calls == 9 else 1.0)
"""


class KillAfter(Silent):
    """Sends this process a signal when it has taken some steps."""

    def __init__(self, steps, number=signal.SIGINT):
        self.left, self.number = steps, number

    def step(self, loss):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a, b):
    """Equal to the bit, whatever is nested."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_bit_identical(one, other, *, but=()):
    """Weights, masks, optimizer, multipliers, histories of two finished run folders; of the epochs all `but` some keys."""
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other))
    for key in ("model", "optimizer", "pruner", "rng", "epoch", "step"):
        assert same(first[key], second[key]), key
    assert (one / "pruned.safetensors").read_bytes() == (other / "pruned.safetensors").read_bytes()
    assert (one / "history.jsonl").read_bytes() == (other / "history.jsonl").read_bytes()
    a, b = ([row | dict.fromkeys(("seconds", *but)) for row in rows(folder / "epochs.jsonl")] for folder in (one, other))
    assert a == b and a
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    for key in ("dense", "cut", "retrained", "kept", "layers", "steps", "recipe_sha256"):
        assert a[key] == b[key], key


@pytest.fixture
def tiny():
    return parse_recipe(TINY)


@pytest.fixture
def dropout_net(tmp_path, monkeypatch):
    (tmp_path / "dropout_net.py").write_text(DROPOUT_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "dropout_net", raising=False)
    return tmp_path


def test_a_run_leaves_what_it_says(tiny, tmp_path):
    result = run(tiny, "slr", out=tmp_path)
    folder = tmp_path / "tiny" / "slr-seed0"
    names = {"recipe.toml", "checkpoint.pt", "history.jsonl", "epochs.jsonl", "result.json", "pruned.safetensors"}
    assert names | {"heatmaps.safetensors", "report.html"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob(".*.tmp"))
    assert result == json.loads((folder / "result.json").read_text())
    assert (result["label"], result["split"], result["epochs"], result["retrained"]) == ("slr", "test", 2, None)
    # the first and last layers are left alone by default
    assert [layer["name"] for layer in result["layers"]] == ["fc2.weight"]
    assert (result["total"], result["kept"]) == (24 * 16, round(24 * 16 / 5))
    assert result["total_model"] - result["kept_model"] == result["total"] - result["kept"]
    weights = load_sparse(folder / "pruned.safetensors")
    assert int(weights["fc2.weight"].count_nonzero()) == result["kept"]
    found = train.evaluate(tiny, folder / "pruned.safetensors")
    assert found["accuracy"] == result["cut"]
    assert result["sizes"]["sparse_bytes"] == found["bytes"]
    assert parse_recipe((folder / "recipe.toml").read_text()) == tiny


def test_the_epochs_are_those_of_the_recipe(tiny, tmp_path):
    result = run(tiny, "gradual", out=tmp_path)
    epochs = rows(tmp_path / "tiny" / "gradual-seed0" / "epochs.jsonl")
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert epochs[-1]["step"] == result["steps"]
    # what the last epoch measured under evaluate() is what finish() leaves
    assert epochs[-1]["accuracy_cut"] == result["cut"]
    assert epochs[0]["lr"] > epochs[1]["lr"] > 0


def test_one_shot_takes_no_step(tiny, tmp_path):
    result = run(tiny, "oneshot", out=tmp_path)
    assert (result["epochs"], result["steps"], result["seconds"], result["lr"]) == (0, 0, 0, None)
    before = build_task(tiny).model().state_dict()["fc1.weight"]
    assert torch.equal(load_sparse(tmp_path / "tiny" / "oneshot-seed0" / "pruned.safetensors")["fc1.weight"], before)


def test_a_finished_run_is_not_redone(tiny, tmp_path):
    first = run(tiny, "slr", out=tmp_path)
    stamp = (tmp_path / "tiny" / "slr-seed0" / "result.json").stat().st_mtime_ns
    watch = KillAfter(1, signal.SIGINT)
    assert run(tiny, "slr", out=tmp_path, progress=watch) == first
    assert watch.left == 1
    assert (tmp_path / "tiny" / "slr-seed0" / "result.json").stat().st_mtime_ns == stamp
    again = run(tiny, "slr", out=tmp_path, resume=False)
    assert again["cut"] == first["cut"] and (tmp_path / "tiny" / "slr-seed0" / "result.json").stat().st_mtime_ns != stamp


def test_another_recipe_in_the_folder_is_refused(tiny, tmp_path):
    run(tiny, "oneshot", out=tmp_path)
    changed = parse_recipe(TINY, ["prune.rate=6"])
    with pytest.raises(DualpruneError, match=r"holds a run of other settings .* --fresh"):
        run(changed, "oneshot", out=tmp_path)
    with pytest.raises(DualpruneError, match="holds a run of other settings"):
        run(tiny, "oneshot", out=tmp_path, split="validation")
    assert run(changed, "oneshot", out=tmp_path, resume=False)["kept"] == round(24 * 16 / 6)


def test_a_default_that_has_changed_is_another_run(tiny, tmp_path, monkeypatch):
    run(tiny, "slr", out=tmp_path)
    with pytest.raises(Interrupted):
        run(tiny, "slr", out=tmp_path / "broken", progress=KillAfter(2))
    with monkeypatch.context() as changed:
        changed.setattr(MethodTable, "build", lambda table: SLR(s0=0.07))
        for out in (tmp_path, tmp_path / "broken"):
            with pytest.raises(DualpruneError, match=r"a run of another method, .* s0=.* there, .*s0=0\.07.* here.*--fresh"):
                run(tiny, "slr", out=out)
    assert run(tiny, "slr", out=tmp_path / "broken")["epochs"] == 2


def test_results_of_earlier_versions_stay_valid(tiny, tmp_path):
    result = run(parse_recipe(TINY, ["methods.slr.base=paper"]), "slr", out=tmp_path)
    path = tmp_path / "tiny" / "slr-seed0" / "result.json"
    assert "pull='everywhere', " in result["method"] and "curve='geometric', " in result["method"]
    before = result["method"].replace("curve='geometric', ", "")  # no set shrinks here
    for older in (result | {"method": before.replace("pull='everywhere', ", "")}, result | {"method": before}, dict(result)):
        if older == result:
            del older["method"], older["weights_sha256"]
        path.write_text(json.dumps(older))
        assert run(parse_recipe(TINY, ["methods.slr.base=paper"]), "slr", out=tmp_path) == older
    # before there was a choice, the default pulled everywhere and shrank the set cubically: what it does now is another run
    now = run(tiny, "slr", out=tmp_path / "now")
    path = tmp_path / "now" / "tiny" / "slr-seed0" / "result.json"
    for since in ("pull='outside', ", "curve='geometric', "):
        assert since in now["method"]
        path.write_text(json.dumps(now | {"method": now["method"].replace(since, "")}))
        with pytest.raises(DualpruneError, match="another method"):
            run(tiny, "slr", out=tmp_path / "now")
    cubic = parse_recipe(TINY, ["methods.slr.curve=cubic"])
    now = run(cubic, "slr", out=tmp_path / "cubic")
    path = tmp_path / "cubic" / "tiny" / "slr-seed0" / "result.json"
    path.write_text(json.dumps(older := now | {"method": now["method"].replace("curve='cubic', ", "")}))
    assert run(cubic, "slr", out=tmp_path / "cubic") == older
    # before there was a choice, reweighting pushed everything
    pushed = parse_recipe(TINY, ["methods.pushed={kind='reweighted', spare=false}"])
    now = run(pushed, "pushed", out=tmp_path / "pushed")
    path = tmp_path / "pushed" / "tiny" / "pushed-seed0" / "result.json"
    path.write_text(json.dumps(older := now | {"method": now["method"].replace("spare=False, ", "")}))
    assert older != now and run(pushed, "pushed", out=tmp_path / "pushed") == older


def test_other_starting_weights_are_another_run(tiny, tmp_path):
    weights, model = tmp_path / "w.safetensors", build_task(tiny).model()
    recipe = parse_recipe(TINY, [f"model.weights={weights}"])

    def write(scale):
        save_file({name: scale * value for name, value in model.state_dict().items()}, weights)

    write(1.0)
    first = run(recipe, "oneshot", out=tmp_path)
    with pytest.raises(Interrupted):
        run(recipe, "slr", out=tmp_path, progress=KillAfter(2))
    write(2.0)
    for label in ("oneshot", "slr"):
        with pytest.raises(DualpruneError, match=f"of other starting weights, .*{first['weights_sha256']} there"):
            run(recipe, label, out=tmp_path)
    write(1.0)
    assert run(recipe, "oneshot", out=tmp_path) == first and run(recipe, "slr", out=tmp_path)["epochs"] == 2


def test_a_dense_model_is_of_its_starting_weights(tiny, tmp_path):
    weights, model = tmp_path / "w.safetensors", build_task(tiny).model()
    recipe = parse_recipe(TINY, [f"model.weights={weights}", "dense={epochs=1, lr=0.1, batch_size=256}"])
    results = []
    for scale in (1.0, 2.0):
        save_file({name: scale * value for name, value in model.state_dict().items()}, weights)
        results.append(run(recipe, "oneshot", seed=int(scale), out=tmp_path))
    assert len(list((tmp_path / "tiny").glob("dense-*"))) == 2
    assert results[0]["metrics"]["dense"] != results[1]["metrics"]["dense"]


def test_starting_again_leaves_nothing_of_the_earlier_run(tmp_path):
    place = tmp_path / "slr-seed0"
    files = ("result.json", "checkpoint.pt", ".checkpoint.pt.x1.tmp", "tensorboard/events.1", "pictures/00-cut.png")
    for name in (*files, "pictures/.00-cut.png.x2.tmp", "mine.txt"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("")
    run_folder.wipe(place)
    assert [path.name for path in sorted(place.rglob("*"))] == ["mine.txt", "pictures"]


def test_dense_training_is_done_once_for_all(tmp_path):
    recipe = parse_recipe(TINY, ["dense={epochs=10, lr=0.1, batch_size=64}"])
    first = run(recipe, "oneshot", out=tmp_path)
    (folder,) = (tmp_path / "tiny").glob("dense-*")
    stamp = (folder / "dense.safetensors").stat().st_mtime_ns
    second = run(recipe, "gradual", seed=1, out=tmp_path)
    assert (folder / "dense.safetensors").stat().st_mtime_ns == stamp
    assert first["dense"] == second["dense"] > 70
    # held-out images must not have been trained on, so the validation split has a dense model of its own
    run(recipe, "oneshot", out=tmp_path / "other", split="validation", dense_folder=tmp_path / "tiny")
    assert len(list((tmp_path / "tiny").glob("dense-*"))) == 2


def test_curves_may_be_measured_less_often_and_nothing_else_changes(tmp_path, capsys):
    whole = parse_recipe(TINY, ["training.epochs=3", "prune.retrain_epochs=3"])
    sparse = parse_recipe(TINY, ["training.epochs=3", "prune.retrain_epochs=3", "training.measure_every=2"])
    places = [tmp_path / name / "tiny" / "slr-seed0" for name in ("whole", "sparse")]
    for recipe, place in zip((whole, sparse), places, strict=True):
        run(recipe, "slr", out=place.parents[1], progress=Lines())
    assert_bit_identical(*places, but=("accuracy_cut",))
    every, some = ([row["accuracy_cut"] for row in rows(place / "epochs.jsonl")] for place in places)
    assert some == [None, every[1], every[2], None, every[4], every[5]]  # the last of each stage is always measured
    assert capsys.readouterr().out.count("cut") == 3 + 3 + 2 + 2


def test_the_dense_model_is_measured_once_for_all(tiny, tmp_path, monkeypatch):
    measured = []
    dear = Classification.final_metrics
    monkeypatch.setattr(Classification, "final_metrics", lambda self, model: measured.append(1) or dear(self, model))
    first, second = (run(tiny, label, out=tmp_path) for label in ("oneshot", "gradual"))
    assert first["metrics"]["dense"] == second["metrics"]["dense"] and len(measured) == 3
    run(parse_recipe(TINY, ["model={name='mlp', options={hidden=[24, 17]}}"]), "oneshot", out=tmp_path / "other")
    (kept,) = (tmp_path / "tiny").glob("measured-*.json")
    kept.write_text("{")
    with pytest.raises(FormatError, match=r"measured-\w+\.json"):
        run(tiny, "slr", out=tmp_path)
    run(tiny, "slr", out=tmp_path, resume=False)
    assert json.loads(kept.read_text()) == first["metrics"]["dense"]


def test_retraining_keeps_the_masks(tmp_path):
    recipe = parse_recipe(TINY, ["prune.retrain_epochs=2", "prune.retrain_lr=0.2"])
    result = run(recipe, "oneshot", out=tmp_path)
    folder = tmp_path / "tiny" / "oneshot-seed0"
    weight = load_sparse(folder / "pruned.safetensors")["fc2.weight"]
    assert 0 < int(weight.count_nonzero()) <= result["kept"] < weight.numel()
    assert result["retrained"] > result["cut"]
    assert [row["stage"] for row in rows(folder / "epochs.jsonl")] == ["retrain", "retrain"]


def test_retraining_does_not_warm_up_again(tmp_path):
    recipe = parse_recipe(TINY, ["training.epochs=3", "training.warmup_epochs=1", "prune.retrain_epochs=1"])
    run(recipe, "gradual", out=tmp_path)
    *_, row = rows(tmp_path / "tiny" / "gradual-seed0" / "epochs.jsonl")
    steps = build_task(recipe).steps_per_epoch(256)
    cold = recipe.training.model_copy(update={"warmup_epochs": 0.0})
    assert row["stage"] == "retrain" and row["lr"] == cold.lr_at(steps - 1, steps, steps, 0.05 / 10) < 0.0005


def test_steps_go_on_in_retraining_after_half_steps(tmp_path):
    recipe = parse_recipe(TINY + '[methods.safe]\nkind = "safe"\nupdates_per_epoch = 2\n', ["prune.retrain_epochs=1"])
    result = run(recipe, "safe", out=tmp_path)
    steps, per_epoch = (
        [row["step"] for row in rows(tmp_path / "tiny/safe-seed0/epochs.jsonl")],
        build_task(recipe).steps_per_epoch(256),
    )
    assert steps == [per_epoch // 2, result["steps"], result["steps"] + per_epoch]


def test_waiting_for_losses_is_time_of_the_epoch(tiny, tmp_path, monkeypatch):
    # as on a GPU, where a loss is there when the device is done
    read = Loop._read_losses

    def slow(loop):
        time.sleep(0.3 * bool(loop._pending))
        read(loop)

    monkeypatch.setattr(Loop, "_note_loss", lambda loop, loss: loop._pending.append(loss))
    monkeypatch.setattr(Loop, "_read_losses", slow)
    assert run(tiny, "gradual", out=tmp_path)["seconds"] > 0.6


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_the_peak_memory_is_that_of_the_run(tiny, tmp_path):
    earlier = bytearray(os.urandom(1)) * (400 * 2**20)
    before = run_folder.peak_memory(torch.device("cpu"))
    del earlier
    assert run(tiny, "oneshot", out=tmp_path)["peak_memory_mb"] < before - 200


def test_peak_memory_without_a_way_to_reset_it(monkeypatch):
    def absent(path, *_):
        raise PermissionError(path)

    monkeypatch.setattr(run_folder.Path, "write_text", absent)
    monkeypatch.setattr(run_folder.Path, "read_text", absent)
    run_folder.reset_peak_memory(torch.device("cpu"))
    assert run_folder.peak_memory(torch.device("cpu")) > 50


def test_a_seed_decides_the_run_and_the_global_random_state_does_not(tiny, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(tiny, "slr", out=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    run(tiny, "slr", out=tmp_path / "b")
    assert_bit_identical(*(tmp_path / place / "tiny" / "slr-seed0" for place in "ab"))
    run(tiny, "slr", seed=1, out=tmp_path / "a")
    one, two = (load_sparse(tmp_path / "a" / "tiny" / f"slr-seed{seed}" / "pruned.safetensors") for seed in (0, 1))
    assert not torch.equal(one["fc1.weight"], two["fc1.weight"])


@pytest.mark.parametrize("label", ["slr", "gradual"])
def test_ctrl_c_saves_and_the_same_call_continues(dropout_net, label):
    recipe = parse_recipe(TINY, ["model={name='dropout_net:net'}", "prune.retrain_epochs=1"])
    handler = signal.getsignal(signal.SIGINT)
    run(recipe, label, out=dropout_net / "whole")
    # at the first step, the last of an epoch, in the second, and in the retraining
    for steps in (1, 4, 3, 4):
        with pytest.raises(Interrupted, match=r"saved at .* the same command continues"):
            run(recipe, label, out=dropout_net / "broken", progress=KillAfter(steps))
        assert not (dropout_net / "broken" / "tiny" / f"{label}-seed0" / "result.json").exists()
    run(recipe, label, out=dropout_net / "broken")
    assert_bit_identical(*(dropout_net / place / "tiny" / f"{label}-seed0" for place in ("whole", "broken")))
    # the caller's own handler is back
    assert signal.getsignal(signal.SIGINT) is handler


KILLER = """
import os, random, signal, sys, time
import torch
import sklearn.datasets, dualprune.plots, dualprune.report
import dualprune.train as train
from dualprune.progress import Silent
from dualprune.recipe import load_recipe

torch.set_num_threads(1)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

class AtStep(Silent):
    def __init__(self, n): self.n = n
    def step(self, loss):
        self.n -= 1
        if self.n == 0: die()

def half_written(nth):
    whole, count = torch.save, [0]
    def save(state, path):
        count[0] += 1
        whole(state, path)
        if count[0] == nth:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    return save

def attempt(label, how, value):
    # forked before anything was computed: only the import is shared
    pid = os.fork()
    if pid == 0:
        if how == "write": torch.save = half_written(value)
        if how == "results": train._write_results = lambda *_: die()
        progress = AtStep(value) if how == "step" else Silent()
        train.run(load_recipe(sys.argv[1]), label, out=sys.argv[2], progress=progress)
        os._exit(0)
    if how == "time":
        time.sleep(value)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

draw = random.Random(sys.argv[3])
for label in ("slr", "gradual"):
    kills = [("step", draw.randint(2, 7)), ("write", draw.randint(1, 3)), ("step", draw.randint(2, 7))]
    kills += [("time", draw.uniform(0.05, 0.5)), ("results", 0)]
    codes = [attempt(label, *kill) for kill in kills]
    assert codes == [-9] * 5, (kills, codes)
    assert attempt(label, "never", 0) == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_a_run_ends_bit_for_bit_like_an_unbroken_one(dropout_net):
    # a checkpoint after every step, so that kills fall between, before and into them
    text = TINY.replace("epochs = 2", "epochs = 3\ncheckpoint_minutes = 1e-9")
    text = text.replace('name = "mlp"\noptions = { hidden = [24, 16] }', 'name = "dropout_net:net"')
    text = text.replace("calibrate = 64", "calibrate = 64\nretrain_epochs = 1")
    path = dropout_net / "tiny.toml"
    path.write_text(text)
    for label in ("slr", "gradual"):
        run(parse_recipe(text), label, out=dropout_net / "whole")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(dropout_net), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLER), str(path), str(dropout_net / "broken")]
    done = subprocess.run([*command, "11"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for label in ("slr", "gradual"):
        assert_bit_identical(*(dropout_net / place / "tiny" / f"{label}-seed0" for place in ("whole", "broken")))
        assert not (dropout_net / "broken" / "tiny" / f"{label}-seed0" / "result.json.tmp").exists()


def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(dropout_net):
    recipe = parse_recipe(TINY, ["model={name='dropout_net:Poisoned'}"])
    with pytest.raises(RunError, match=r"the loss is nan at step \d+ of epoch 2; the last good checkpoint is kept"):
        run(recipe, "slr", out=dropout_net)
    state = torch.load(dropout_net / "tiny" / "slr-seed0" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and state["step"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    # the poison is gone from a new process's first steps, and the run goes on from there
    assert run(recipe, "slr", out=dropout_net)["epochs"] == 2


def test_diverged_weights_are_never_saved(tmp_path):
    with pytest.raises(RunError, match="nothing was saved yet; try a lower lr"):
        run(parse_recipe(TINY, ["training.lr=1e30"]), "gradual", out=tmp_path)
    assert not (tmp_path / "tiny" / "gradual-seed0" / "checkpoint.pt").exists()


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny, tmp_path):
    with pytest.raises(Interrupted):
        run(tiny, "slr", out=tmp_path, progress=KillAfter(2))
    path = tmp_path / "tiny" / "slr-seed0" / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"cannot be read .* start again with --fresh"):
        run(tiny, "slr", out=tmp_path)
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"version": 99}, path)
    with pytest.raises(FormatError, match="has version 99, this dualprune reads 1"):
        run(tiny, "slr", out=tmp_path)


def test_an_unwritable_folder_is_said_before_any_time_is_spent(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DualpruneError, match=r"cannot write the run folder .*Not a directory; choose another with --out"):
        run(tiny, "slr", out=tmp_path / "file")


def test_a_full_disk_is_a_clear_error_and_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    whole, count = torch.save, []

    def fills_up(state, path):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        whole(state, path)

    monkeypatch.setattr(torch, "save", fills_up)
    with pytest.raises(RunError, match=r"cannot write to .*No space left on device; the last good checkpoint is kept"):
        run(tiny, "slr", out=tmp_path)
    folder = tmp_path / "tiny" / "slr-seed0"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not list(folder.glob(".*.tmp"))


def test_compiling_and_clipping_and_adam_keep_the_names(tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    overrides = ["training.compile=true", "training.clip_norm=1.0", "training.optimizer=adamw", "training.lr=0.01"]
    run(parse_recipe(TINY, overrides), "slr", out=tmp_path)
    assert len(compiled) == 1
    assert set(load_sparse(tmp_path / "tiny" / "slr-seed0" / "pruned.safetensors")) == {
        f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")
    }


def test_bfloat16_and_channels_last(dropout_net):
    overrides = ["model={name='dropout_net:net'}", "training.precision=bfloat16", "training.channels_last=true"]
    recipe = parse_recipe(TINY, overrides)
    run(recipe, "slr", out=dropout_net / "whole")
    with pytest.raises(Interrupted):
        run(recipe, "slr", out=dropout_net / "broken", progress=KillAfter(4))
    run(recipe, "slr", out=dropout_net / "broken")
    assert_bit_identical(*(dropout_net / place / "tiny" / "slr-seed0" for place in ("whole", "broken")))
    weights = load_sparse(dropout_net / "whole" / "tiny" / "slr-seed0" / "pruned.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("has", "precision", "warned"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, "bfloat16", True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, "float32", False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, "bfloat16", False),
        ({"architecture": "arm64"}, "bfloat16", False),
    ],
)
def test_bfloat16_without_instructions_for_it_is_said_to_be_slow(has, precision, warned, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    said = []
    progress = Silent()
    progress.note = said.append
    recipe = parse_recipe(TINY, [f"training.precision={precision}", "training.epochs=1"])
    run(recipe, "oneshot", out=tmp_path, progress=progress)
    assert any("no bfloat16 instructions" in note and "training.precision=float32" in note for note in said) is warned


def test_distillation_adds_the_softened_divergence_from_the_dense_answers(tiny):
    taught = parse_recipe(TINY, ["training.distill={weight=0.7,temperature=3}"])
    task, plain = build_task(taught), build_task(tiny)
    model, teacher = task.model(), task.model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    x, y = batch = next(task.train_batches(batch_size=32, seed=0, epoch=0))
    alone = task.loss(model, batch, taught.training)
    assert torch.equal(alone, plain.loss(model, batch, tiny.training))
    task.teacher = teacher
    with torch.no_grad():
        ours, theirs = (net(x).div(3).softmax(1).double() for net in (model, teacher))
        apart = float((theirs * (theirs / ours).log()).sum()) / len(y)
    assert task.loss(model, batch, taught.training).item() == pytest.approx(0.3 * alone.item() + 0.7 * 9 * apart, rel=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_broken_distilled_run_learns_from_the_dense_model_and_not_from_the_checkpoint(dropout_net):
    recipe = parse_recipe(TINY, ["model={name='dropout_net:net'}", "training.distill={}"])
    plain = run(parse_recipe(TINY, ["model={name='dropout_net:net'}"]), "slr", out=dropout_net / "plain")
    whole = run(recipe, "slr", out=dropout_net / "whole")
    assert whole["dense"] == plain["dense"]
    with pytest.raises(Interrupted):
        run(recipe, "slr", out=dropout_net / "broken", progress=KillAfter(8))
    run(recipe, "slr", out=dropout_net / "broken")
    assert_bit_identical(*(dropout_net / place / "tiny" / "slr-seed0" for place in ("whole", "broken")))
    histories = [rows(dropout_net / place / "tiny" / "slr-seed0" / "epochs.jsonl") for place in ("plain", "whole")]
    assert histories[0][0]["loss"] != histories[1][0]["loss"]


def test_tensorboard_gets_the_curves(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tiny, "slr", out=tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tiny" / "slr-seed0" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("epoch/accuracy_cut")) == 2
    assert len(events.Scalars("update/rho")) == len(rows(tmp_path / "tiny" / "slr-seed0" / "history.jsonl"))


def test_a_broken_run_logs_every_update_once(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (8, 2):  # in the second epoch, before and after its first update
        with pytest.raises(Interrupted):
            run(tiny, "slr", out=tmp_path, tensorboard=True, progress=KillAfter(steps))
    run(tiny, "slr", out=tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tiny" / "slr-seed0" / "tensorboard"))
    events.Reload()
    history = rows(tmp_path / "tiny" / "slr-seed0" / "history.jsonl")
    assert [event.step for event in events.Scalars("update/rho")] == [row["step"] for row in history]


def test_dry_run_trains_nothing(tiny):
    said = train.dry_run(tiny, "slr")
    assert "fc2.weight" in said and str(24 * 16) in said


def test_dry_run_says_when_its_weights_are_not_those_of_a_run():
    dense = ["dense={epochs=1, lr=0.1}"]
    assert "not those that [dense] trains" in train.dry_run(parse_recipe(TINY, [*dense, "prune.budget=global"]), "slr")
    assert "a global budget" not in train.dry_run(parse_recipe(TINY, dense), "slr")
    assert "a global budget" not in train.dry_run(parse_recipe(TINY, ["prune.budget=global"]), "slr")
    pretrained = ["model.pretrained=true", "prune.budget=global"]
    assert "not those that pretrained = true loads" in train.dry_run(parse_recipe(TINY, pretrained), "slr")


# --- what a run is made of ------------------------------------------------------------------------------------------------


def npz(path, seed):
    """A tiny MNIST: what `seed` changes is the pixels, not the labels."""
    draw = np.random.default_rng(seed)
    parts = {f"x_{part}": draw.integers(0, 255, (40, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    np.savez(path, **parts, **{f"y_{part}": np.arange(40) % 10 for part in ("train", "test")})


def mnist(root, *overrides):
    sizes = ["data={name='mnist'}", "training.batch_size=20", "dense={epochs=1, lr=0.1, batch_size=20}"]
    return parse_recipe(TINY, [*sizes, f"data.root={root.as_posix()}", *overrides])


def test_other_data_are_another_run_and_have_a_dense_model_of_their_own(tmp_path):
    one, other, copied = (tmp_path / f"{name}.npz" for name in ("a", "b", "c"))
    npz(one, 0)
    npz(other, 1)
    npz(copied, 0)
    first = run(mnist(one), "oneshot", out=tmp_path)
    with pytest.raises(Interrupted):
        run(mnist(one), "slr", out=tmp_path, progress=KillAfter(2))
    for label in ("oneshot", "slr"):
        with pytest.raises(DualpruneError, match=rf"of other data, .*data_sha256 {first['data_sha256']} there"):
            run(mnist(other), label, out=tmp_path)
    assert run(mnist(copied), "oneshot", out=tmp_path) == first, "where they lie does not matter"
    run(mnist(other), "oneshot", seed=1, out=tmp_path)
    assert len(list((tmp_path / "tiny").glob("dense-*"))) == 2


def test_folders_of_a_version_that_did_not_look_at_the_data_go_on(tmp_path, monkeypatch):
    one = tmp_path / "a.npz"
    npz(one, 0)
    with monkeypatch.context() as earlier:
        earlier.setattr(Classification, "data_sha256", lambda task: None)
        first = run(mnist(one), "oneshot", out=tmp_path)
        with pytest.raises(Interrupted):
            run(mnist(one), "slr", out=tmp_path, progress=KillAfter(3))
    (dense,) = (tmp_path / "tiny").glob("dense-*")
    result = tmp_path / "tiny" / "oneshot-seed0" / "result.json"
    result.write_text(json.dumps({key: value for key, value in first.items() if key != "data_sha256"}))
    state = torch.load(result.parents[1] / "slr-seed0" / "checkpoint.pt", weights_only=True)
    del state["data_sha256"]
    torch.save(state, result.parents[1] / "slr-seed0" / "checkpoint.pt")
    assert run(mnist(one), "oneshot", out=tmp_path)["cut"] == first["cut"]
    assert run(mnist(one), "slr", out=tmp_path)["data_sha256"] == build_task(mnist(one)).data_sha256()
    assert list((tmp_path / "tiny").glob("dense-*")) == [dense]


@pytest.mark.parametrize(
    "override", ["data.root=nowhere", "model.options={hiden=[3]}", "prune.patterns={'fc9*'=0.5}", "model.weights=no.pt"]
)
def test_starting_again_with_a_wrong_recipe_costs_nothing(tiny, tmp_path, override):
    first = run(tiny, "oneshot", out=tmp_path)
    with pytest.raises(DualpruneError):
        run(parse_recipe(TINY, [override]), "oneshot", out=tmp_path, resume=False)
    assert run(tiny, "oneshot", out=tmp_path) == first


def test_a_fresh_run_that_was_interrupted_goes_on_without_fresh(tiny, tmp_path):
    with pytest.raises(Interrupted, match=r"the same command without --fresh continues the run"):
        run(tiny, "slr", out=tmp_path, progress=KillAfter(2), resume=False)
    with pytest.raises(Interrupted, match=r"the same command continues the run"):
        run(tiny, "slr", out=tmp_path, progress=KillAfter(2))


def test_a_report_made_of_a_run_under_way_is_made_again_at_its_end(tiny, tmp_path):
    page = tmp_path / "tiny" / "slr-seed0" / "report.html"
    with pytest.raises(Interrupted):
        run(tiny, "slr", out=tmp_path, progress=KillAfter(7))
    assert "not finished" in report.render_run(page.parent).read_text()
    unfinished = page.read_text()
    run(tiny, "slr", out=tmp_path)
    assert "not finished" not in page.read_text()
    # killed between the result and the page
    page.write_text(unfinished)
    os.utime(page, (0, 0))
    run(tiny, "slr", out=tmp_path)
    assert "not finished" not in page.read_text()


@pytest.mark.parametrize("name", ["dense.safetensors", "checkpoint.pt"])
def test_an_unreadable_dense_model_names_the_folder_to_delete(tmp_path, name):
    recipe = parse_recipe(TINY, ["dense={epochs=1, lr=0.1, batch_size=256}"])
    run(recipe, "oneshot", out=tmp_path)
    (place,) = (tmp_path / "tiny").glob("dense-*")
    (place / "dense.safetensors").unlink()
    (place / name).write_bytes(b"PK")
    with pytest.raises(FormatError, match=rf"delete the folder {place} to train"):
        run(recipe, "oneshot", seed=1, out=tmp_path)


def test_a_result_that_was_cut_short_is_named(tiny, tmp_path):
    run(tiny, "oneshot", out=tmp_path)
    path = tmp_path / "tiny" / "oneshot-seed0" / "result.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(FormatError, match=r"result\.json, line \d+: not JSON"):
        run(tiny, "oneshot", out=tmp_path)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_are_what_generators_take(tiny, tmp_path, seed):
    with pytest.raises(DualpruneError, match=rf"a seed is a whole number from 0 to 2\*\*63 - 1, got {seed}"):
        run(tiny, "oneshot", seed=seed, out=tmp_path)


def test_a_figure_that_is_no_number_stops_the_run_like_a_loss(tiny, tmp_path, monkeypatch):
    calls, measure = [], Classification.measure

    def diverged(task, model):
        calls.append(1)
        if len(calls) == 3:  # the dense model, the first epoch, the second
            raise NonFiniteError("the loss on the text is inf")
        return measure(task, model)

    monkeypatch.setattr(Classification, "measure", diverged)
    with pytest.raises(Diverged, match=r"slr seed 0: the loss on the text is inf; the last good checkpoint is kept"):
        run(tiny, "slr", out=tmp_path)


def test_runs_started_together_share_a_folder(tmp_path):
    """The dense model of one recipe lies in a folder that its seeds share."""
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(run_folder.make_folder, [tmp_path / "dense"] * 16))
    assert not list((tmp_path / "dense").iterdir())
