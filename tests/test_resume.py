"""A run resumed from its state ends bit for bit like one that was never broken, and no foreign state gets in."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dualprune import ADMM, SLR, DualpruneError, Filter, GradualMagnitude, Magnitude, Pruner, attach
from helpers import METHODS, batch, same_bits, sgd, snapshot, tiny_net, train

STEPS, EVERY = 24, 4
# before the first update, one step before an update, at it, one after it, in the hold, at the end of the hold
BREAKS = [1, 7, 8, 9, 21, 24]


def fresh(method: Any, seed: int = 0, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    net = tiny_net(seed)
    optimizer = sgd(net)
    options = {"rate": 5, "every": EVERY, "total_steps": STEPS} | options
    return net, optimizer, attach(net, optimizer, method, **options)


def saved(net: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> bytes:
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, file)
    return file.getvalue()


def resumed(blob: bytes, method: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    """Start as a new process would: another initialisation, attach, then load."""
    state = torch.load(io.BytesIO(blob), weights_only=True)
    net, optimizer, pruner = fresh(method, seed=99, **options)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    pruner.load_state_dict(state["pruner"])
    return net, optimizer, pruner


def identical(a: tuple[nn.Module, Any, Pruner], b: tuple[nn.Module, Any, Pruner]) -> None:
    assert same_bits(snapshot(a[0]), snapshot(b[0]))
    assert same_bits(a[2].state_dict(), b[2].state_dict()), "Z, Λ, scalars, history, masks held"
    assert same_bits(a[2].masks, b[2].masks)
    assert a[2].history == b[2].history
    assert a[2].layers == b[2].layers
    assert (a[2].step_count, a[2].finished) == (b[2].step_count, b[2].finished)


# ---------------------------------------------------------------------- bit-exact


@pytest.mark.parametrize("name", METHODS)
def test_a_run_broken_anywhere_ends_like_an_unbroken_one(name):
    whole = fresh(METHODS[name])
    blobs: dict[int, bytes] = {}

    def keep(step: int) -> None:
        if step + 1 in BREAKS:
            blobs[step + 1] = saved(*whole)

    train(*whole[:2], range(STEPS), whole[2], after_step=keep)
    whole[2].finish(calibrate=[batch(0)])
    at_end = saved(*whole)
    train(*whole[:2], range(STEPS, STEPS + 3), whole[2])
    assert list(blobs) == BREAKS
    for step, blob in blobs.items():
        broken = resumed(blob, METHODS[name])
        train(*broken[:2], range(step, STEPS), broken[2])
        broken[2].finish(calibrate=[batch(0)])
        train(*broken[:2], range(STEPS, STEPS + 3), broken[2])
        identical(whole, broken)
    after = resumed(at_end, METHODS[name])
    assert after[2].finished
    train(*after[:2], range(STEPS, STEPS + 3), after[2])
    identical(whole, after)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "global"},
        {"state_dtype": torch.bfloat16},
        {"state_device": "cpu", "state_dtype": torch.float64},
        {"patterns": {"3.weight": "filter", "6.weight": ("2:4", 0.5)}, "ignore": ()},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_resume_too(options):
    whole = fresh(SLR(), **options)
    train(*whole[:2], range(10), whole[2])
    blob = saved(*whole)
    train(*whole[:2], range(10, STEPS), whole[2])
    broken = resumed(blob, SLR(), **options)
    train(*broken[:2], range(10, STEPS), broken[2])
    identical(whole, broken)


def test_losses_observed_as_plain_numbers_resume_too():
    def observed(run: tuple[nn.Module, Any, Pruner], steps: range) -> None:
        for step in steps:
            run[2].observe(1 / (step + 3))
            train(*run[:2], [step])

    whole = fresh(SLR.paper(), every=7)
    observed(whole, range(3))
    blob = saved(*whole)
    observed(whole, range(3, 20))
    broken = resumed(blob, SLR.paper(), every=7)
    observed(broken, range(3, 20))
    identical(whole, broken)


def test_loading_into_a_run_under_way_takes_it_back():
    whole = fresh(SLR.paper())
    train(*whole[:2], range(6), whole[2])
    blob = torch.load(io.BytesIO(saved(*whole)), weights_only=True)
    train(*whole[:2], range(6, 14), whole[2])
    end = snapshot(whole[0])
    whole[0].load_state_dict(blob["model"])
    whole[1].load_state_dict(blob["optimizer"])
    whole[2].load_state_dict(blob["pruner"])
    train(*whole[:2], range(6, 14), whole[2])
    assert same_bits(end, snapshot(whole[0])) and len(whole[2].history) == 3


def test_channels_last_resumes_bit_for_bit():
    def run(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        net = tiny_net(seed).to(memory_format=torch.channels_last)
        optimizer = sgd(net)
        return net, optimizer, attach(net, optimizer, SLR.paper(), rate=5, every=EVERY)

    whole, broken = run(0), run(1)
    train(*whole[:2], range(6), whole[2])
    state = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole[:2], range(6, 14), whole[2])
    for part, values in zip(broken, state, strict=True):
        part.load_state_dict(values)
    train(*broken[:2], range(6, 14), broken[2])
    identical(whole, broken)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_resume import METHODS, STEPS, fresh, resumed, saved, train
from dualprune.files import atomic_write

path = Path({path!r})
run = resumed(path.read_bytes(), METHODS["slr"]) if path.exists() else fresh(METHODS["slr"])

def keep(step):
    if step % 3 == 2:
        with atomic_write(path) as temporary:
            temporary.write_bytes(saved(*run))
    print(step, flush=True)

train(*run[:2], range(run[2].step_count, STEPS), run[2], after_step=keep)
run[2].finish()
path.write_bytes(saved(*run))
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_end(tmp_path: Path):
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "state.pt"))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for kill_after in (4, 11, 20, None):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        for line in process.stdout:
            if kill_after is not None and int(line) >= kill_after:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == (0 if kill_after is None else -signal.SIGKILL)
        process.stdout.close()
    whole = fresh(METHODS["slr"])
    train(*whole[:2], range(STEPS), whole[2])
    whole[2].finish()
    identical(whole, resumed((tmp_path / "state.pt").read_bytes(), METHODS["slr"]))


# ---------------------------------------------------------------------- what a state is made of


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stage", ["start", "middle", "finished"])
def test_a_state_is_plain_tensors_for_torch_and_safetensors(name, stage, tmp_path):
    net, optimizer, pruner = fresh(METHODS[name])
    train(net, optimizer, range(0 if stage == "start" else 9), pruner)
    if stage == "finished":
        pruner.finish()
    state = pruner.state_dict()
    assert all(type(k) is str and type(v) is Tensor and not v.requires_grad for k, v in state.items())
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    assert same_bits(torch.load(tmp_path / "state.pt", weights_only=True), state)
    assert same_bits(load_file(tmp_path / "state.safetensors"), state)
    twin = fresh(METHODS[name])
    twin[0].load_state_dict(net.state_dict())
    twin[2].load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same_bits(twin[2].state_dict(), state)


def test_the_duals_are_in_the_state_and_the_state_is_a_copy():
    net, optimizer, pruner = fresh(SLR.paper())
    train(net, optimizer, range(9), pruner)
    state = pruner.state_dict()
    assert {"Z.3.weight", "Z.6.weight", "lam.3.weight", "lam.6.weight", "loss_sum", "meta"} == state.keys()
    assert state["lam.3.weight"].abs().max() > 0
    before = snapshot(state)
    train(net, optimizer, range(9, 14), pruner)
    assert same_bits(before, state)
    twin = fresh(SLR.paper())[2]
    twin.load_state_dict(state)
    twin.solver.tensors["lam"][0].zero_()
    assert same_bits(before, state)


def test_a_state_does_not_depend_on_wrappers():
    net, optimizer, pruner = fresh(SLR.paper())
    train(net, optimizer, range(9), pruner)
    wrapped = nn.Module()
    wrapped.module = tiny_net()
    twin = attach(wrapped, sgd(wrapped), SLR.paper(), rate=5, every=EVERY, total_steps=STEPS)
    twin.load_state_dict(pruner.state_dict())
    assert twin.history == pruner.history


# ---------------------------------------------------------------------- refused, and nothing changed


def tampered(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    meta = json.loads(bytes(state["meta"].numpy()).decode()) | changes
    return state | {"meta": torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)}


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(prefixes)}


def other(method: Any = None, **options: Any) -> Any:
    return lambda _: fresh(method or SLR.paper(), **options)[2].state_dict()


FOREIGN = {
    "no meta": (lambda s: without(s, "meta"), "'meta' is missing or damaged"),
    "empty": (lambda s: {}, "'meta' is missing or damaged"),
    "meta not a tensor": (lambda s: s | {"meta": "{}"}, "'meta' is missing or damaged"),
    "meta not text": (lambda s: s | {"meta": torch.full((9,), 255, dtype=torch.uint8)}, "'meta' is missing or damaged"),
    "meta cut short": (lambda s: s | {"meta": s["meta"][:-9]}, "'meta' is missing or damaged"),
    "meta a list": (lambda s: s | {"meta": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "'meta' is missing or damaged"),
    "no loss": (lambda s: without(s, "loss_sum"), "'meta' is missing or damaged"),
    "another format": (lambda s: tampered(s, format="elsewhere"), "expected a state of format dualprune-pruner version 1"),
    "another version": (lambda s: tampered(s, version=2), "version 1, got dualprune-pruner version 2"),
    "another method": (other(ADMM.paper()), r"made with method ADMM\(.*this pruner has SLR\("),
    "other constants": (other(SLR.paper(s0=0.02)), "made with method SLR"),
    "another period": (other(every=5), "made with every 5, this pruner has 4"),
    "another length": (other(total_steps=99), "made with total_steps 99, this pruner has 24"),
    "another rate": (other(rate=6), r"of another pruning problem: 3.weight is .*0\.83.* in the state and .*0\.8"),
    "another pattern": (other(patterns={"6.weight": Filter()}), "6.weight is .*filter"),
    "other layers": (other(ignore=()), "0.weight is .* in the state and absent here"),
    "no Z": (lambda s: without(s, "Z."), r"expected a state with \['Z', 'lam'\] or \['held'\], got \['lam'\]"),
    "one Z missing": (lambda s: without(s, "Z.6"), r"state Z.6.weight: expected torch.float32 .* got nothing"),
    "a surplus kind": (lambda s: s | {"evil.3.weight": torch.ones(1)}, "got .*evil"),
    "another shape": (lambda s: s | {"lam.6.weight": torch.ones(3)}, r"lam.6.weight: expected .*16, 8, 3, 3.* got .*\(3,\)"),
    "another dtype": (other(state_dtype=torch.bfloat16), r"expected torch.float32 .* got torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_states_are_refused_and_nothing_is_changed(what):
    make, message = FOREIGN[what]
    net, optimizer, pruner = fresh(SLR.paper())
    train(net, optimizer, range(6), pruner)
    weights, books = snapshot(net), snapshot(pruner.state_dict())
    with pytest.raises(DualpruneError, match=message):
        pruner.load_state_dict(make(pruner.state_dict()))
    assert same_bits(weights, snapshot(net)) and same_bits(books, pruner.state_dict())
    train(net, optimizer, range(6, 10), pruner)


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_pruner_does_not_go_back_silently(name):
    net, optimizer, pruner = fresh(METHODS[name])
    state = pruner.state_dict()
    train(net, optimizer, range(9), pruner)
    pruner.finish()
    books = snapshot(pruner.state_dict())
    with pytest.raises(DualpruneError, match="finished or holding; attach anew"):
        pruner.load_state_dict(state)
    assert same_bits(books, pruner.state_dict())


@pytest.mark.parametrize("method", [GradualMagnitude(), Magnitude()])
def test_the_masks_of_a_finished_state_are_held_after_loading(method):
    net, optimizer, pruner = fresh(method)
    train(net, optimizer, range(9), pruner)
    pruner.finish()
    twin = resumed(saved(net, optimizer, pruner), method)
    zeros = int((twin[0][6].weight == 0).sum())
    train(*twin[:2], range(9, 20), twin[2])
    assert int((twin[0][6].weight == 0).sum()) == zeros == 922
