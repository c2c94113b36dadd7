"""The reference loop: a whole run, and the promise that a broken one ends bit for bit like an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from dualprune import load_sparse, train
from dualprune.errors import DualpruneError, FormatError
from dualprune.progress import Silent
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.train import Interrupted, RunError, run
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


def assert_bit_identical(one, other):
    """Weights, masks, optimizer, multipliers, histories of two finished run folders."""
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other))
    for key in ("model", "optimizer", "pruner", "rng", "epoch", "step"):
        assert same(first[key], second[key]), key
    assert (one / "pruned.safetensors").read_bytes() == (other / "pruned.safetensors").read_bytes()
    assert (one / "history.jsonl").read_bytes() == (other / "history.jsonl").read_bytes()
    a, b = ([row | {"seconds": 0} for row in rows(folder / "epochs.jsonl")] for folder in (one, other))
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


def test_retraining_keeps_the_masks(tmp_path):
    recipe = parse_recipe(TINY, ["prune.retrain_epochs=2", "prune.retrain_lr=0.2"])
    result = run(recipe, "oneshot", out=tmp_path)
    folder = tmp_path / "tiny" / "oneshot-seed0"
    weight = load_sparse(folder / "pruned.safetensors")["fc2.weight"]
    assert 0 < int(weight.count_nonzero()) <= result["kept"] < weight.numel()
    assert result["retrained"] > result["cut"]
    assert [row["stage"] for row in rows(folder / "epochs.jsonl")] == ["retrain", "retrain"]


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


def test_dry_run_trains_nothing(tiny):
    said = train.dry_run(tiny, "slr")
    assert "fc2.weight" in said and str(24 * 16) in said
