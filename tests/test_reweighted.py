"""Reweighted regularisation: the penalty as written, its slow twin, the search for λ, and what stays untouched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dualprune import (
    NM,
    Block,
    Channel,
    Column,
    DualpruneError,
    Filter,
    Kernel,
    KernelPattern,
    Magnitude,
    Reweighted,
    Unstructured,
    attach,
    chunks,
)  # fmt: skip
from dualprune.patterns import Pattern
from dualprune.scope import build_problem
from dualprune.solvers.base import Clock, Store
from dualprune.solvers.reweighted import ReweightedSolver, feedback
from dualprune.stride import Stride
from helpers import accuracy, batch, before_step, digits, sgd, snapshot, tiny_net, train
from reference import ReweightedTwin
from test_loops import FUSED, OPTIMIZERS, scaled_steps, scaler
from test_resume import BREAKS, STEPS, fresh, identical, resumed, saved

SHAPE = (4, 6, 2, 2)
# how the unit of a weight is found from its place (f, c, y, x)
UNIT: dict[Pattern, Callable[[int, int, int, int], Any]] = {
    Unstructured(): lambda f, c, y, x: (f, c, y, x),
    NM(2, 3): lambda f, c, y, x: (f, c, y, x),
    Filter(): lambda f, c, y, x: f,
    Channel(): lambda f, c, y, x: c,
    Column(): lambda f, c, y, x: (c, y, x),
    Kernel(): lambda f, c, y, x: (f, c),
    Block(2, 3): lambda f, c, y, x: (f // 2, (4 * c + 2 * y + x) // 3),
    Block(1, 24): lambda f, c, y, x: f,
}
BY_PATTERN = pytest.mark.parametrize("pattern", UNIT, ids=str)
BY_NORM = pytest.mark.parametrize("norm", ["plain", "squared"])


def units(pattern: Pattern) -> list[list[int]]:
    """Return the units of a weight of `SHAPE` as lists of flat indices."""
    found: dict[Any, list[int]] = {}
    for i, place in enumerate(itertools.product(*map(range, SHAPE))):
        found.setdefault(UNIT[pattern](*place), []).append(i)
    return list(found.values())


def layers(
    pattern: Pattern, method: Reweighted, dtype: torch.dtype = torch.float64, pooled: bool = False
) -> tuple[nn.Module, ReweightedSolver]:
    """Two convolutions of very different scales."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 2), nn.Conv2d(6, 4, 2)).to(dtype)
    model[1].weight.data.mul_(0.03)
    problem = build_problem(model, patterns={"*": (pattern, 0.5)}, ignore=())
    problem.targets[:] = [replace(t, pooled=pooled) for t in problem.targets]
    return model, method.start(problem, Store())  # type: ignore[return-value]


def set_grads(model: nn.Module, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 0.01
    return [p.grad.clone() for p in model.parameters()]


def written(
    w: Tensor, at: Tensor, groups: list[list[int]], squared: bool, eps: float, lam: float, delta: float,
    spared: Tensor,
) -> Tensor:  # fmt: skip
    """Return λ Σ P_g R(W_g) with P from the weights `at`, 0 for what is in `spared`; the norm is a parabola below δ."""
    total = w.new_zeros(())
    for g in groups:
        v, old = w.flatten()[g], at.flatten()[g]
        if squared:
            R, P = v.square().sum(), 1 / (old.square().sum() + eps)
        else:
            norm = v.square().sum().sqrt()
            R, P = (norm if norm > delta else norm**2 / (2 * delta) + delta / 2), 1 / (old.square().sum().sqrt() + eps)
        total = total + (0 if spared.flatten()[g].any() else lam) * P * R
    return total


# ---------------------------------------------------------------------- the penalty


@BY_PATTERN
@BY_NORM
@pytest.mark.parametrize("eps", [0.02, 0.9])  # few units below ε, and many
@pytest.mark.parametrize("spare", [False, True])
def test_the_gradient_is_that_of_the_penalty_as_written(pattern: Pattern, norm: str, eps: float, spare: bool) -> None:
    model, solver = layers(pattern, Reweighted(lam=0.3, norm=norm, eps=eps, spare=spare))
    at = [w.clone() for w in solver.problem.weights]
    spared = [mask & spare for mask in solver.problem.masks(at)]
    for w in solver.problem.weights:  # P stays that of the weights at the start
        w.mul_(torch.rand_like(w) + 0.2)
    own = set_grads(model)
    with torch.no_grad():
        solver.penalty_(None)
    expected = []
    for target, old, kept in zip(solver.problem.targets, at, spared, strict=True):
        mean = torch.tensor([old.flatten()[g].norm() ** (2 if norm == "squared" else 1) for g in units(pattern)]).mean()
        w = target.weight.detach().clone().requires_grad_()
        penalty = written(w, old, units(pattern), norm == "squared", eps * float(mean), 0.3, eps * float(mean), kept)
        expected.append(torch.autograd.grad(penalty, w)[0])
    for conv, grads, pull in zip(model, (own[:2], own[2:]), expected, strict=True):
        torch.testing.assert_close(conv.weight.grad, grads[0] + pull, rtol=1e-6, atol=1e-9)
        assert torch.equal(conv.bias.grad, grads[1]), "a bias is not pruned"


def clock(progress: float, solver: ReweightedSolver, lr: float) -> Clock:
    weights = solver.problem.weights
    return Clock(None, progress, Stride(torch.optim.SGD(weights, lr=lr), weights))


@BY_NORM
def test_a_weight_of_zeros_gets_no_gradient(norm: str) -> None:
    for pattern in UNIT:
        model, solver = layers(pattern, Reweighted(lam=0.3, norm=norm))
        model[0].weight.data.zero_()
        own = set_grads(model)
        with torch.no_grad():
            solver.penalty_(None)
        assert torch.equal(model[0].weight.grad, own[0])
        assert ReweightedSolver(solver.problem, solver.method, Store()).scalars["eps"][0] == 0.1, "zeros have no scale"


@pytest.mark.parametrize(
    ("pattern", "spares"), [(Unstructured(), False), (Filter(), True), (NM(2, 3), True), (KernelPattern(), True)], ids=str
)
def test_only_freely_chosen_weights_are_all_pushed(pattern: Pattern, spares: bool) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(6, 4, 3)
    solver = Reweighted(lam=0.3).start(build_problem(model, patterns={"*": pattern}, sparsity=0.75, ignore=()), Store())
    model.weight.grad = torch.zeros_like(model.weight)
    solver.penalty_(None)
    (kept,) = solver.problem.masks(solver.problem.weights)
    assert (model.weight.grad[~kept] != 0).all()
    assert (model.weight.grad[kept] == 0).all() if spares else (model.weight.grad[kept] != 0).all()


@pytest.mark.parametrize(
    ("pattern", "pooled"),
    [(Unstructured(), False), (Unstructured(), True), (Block(2, 3), False), (Kernel(), False), (Column(), False)],
    ids=str,
)
@pytest.mark.parametrize(("norm", "lam"), [("plain", None), ("squared", None), (None, 0.02), ("plain", 5.0)])
@pytest.mark.parametrize("spare", [False, True, None])
def test_it_follows_its_slow_twin(
    pattern: Pattern, pooled: bool, norm: str | None, lam: float | None, spare: bool | None
) -> None:
    method = Reweighted(lam=lam, norm=norm, eps=0.3, spare=spare, refreshes=7, target=1e-3, hold=0.2)
    model, solver = layers(pattern, method, pooled=pooled)
    squared = norm == "squared" or (norm is None and pattern != Unstructured())
    W = as_lists(solver.problem.weights)
    spared = pattern != Unstructured() if spare is None else spare
    twin = ReweightedTwin(W, [units(pattern)] * 2, 0.5, squared, 0.3, 7, 1e-3, 0.8, lam, pooled, spared)
    factors, noise = set(), torch.Generator().manual_seed(5)
    for update in range(1, 51):
        lr = 0.3 if update % 9 else 3.0
        set_grads(model, seed=update)
        own = as_lists([conv.weight.grad for conv in model])
        with torch.no_grad():
            solver.penalty_(None)
        grads = [conv.weight.grad for conv in model]
        assert_same(grads, twin.gradient(as_lists(solver.problem.weights), own))
        for w, g in zip(solver.problem.weights, grads, strict=True):
            w.sub_(g, alpha=0.3).add_(torch.randn(w.shape, generator=noise, dtype=w.dtype), alpha=1e-3)
        was = solver.scalars["lam"][0]
        row = solver.update(clock(update / 50 * 0.8, solver, lr))
        slow = twin.update(as_lists(solver.problem.weights), update / 50 * 0.8, lr)
        assert {k: row[k] for k in slow} == pytest.approx(slow, rel=1e-7)
        assert solver.scalars["lam"] == pytest.approx(twin.lam, rel=1e-7)
        factors.add(round(solver.scalars["lam"][0] / was, 6))
        for P, slow_P, e in zip(solver.tensors["P"], twin.P, solver.scalars["eps"], strict=True):
            torch.testing.assert_close(P.flatten() / e, torch.tensor(slow_P, dtype=P.dtype), rtol=1e-7, atol=0)
    assert twin.count == 7
    assert factors == {1.0} if lam else len(factors) > 3, "the walk must exercise the search"


def as_lists(tensors: list[Tensor]) -> list[list[float]]:
    return [t.detach().flatten().tolist() for t in tensors]


def assert_same(mine: list[Tensor], theirs: list[list[float]]) -> None:
    for tensor, layer in zip(mine, theirs, strict=True):
        torch.testing.assert_close(tensor.flatten(), torch.tensor(layer, dtype=tensor.dtype), rtol=1e-8, atol=1e-12)


@BY_PATTERN
@BY_NORM
def test_no_step_brings_a_weight_beyond_halfway_to_zero(pattern: Pattern, norm: str) -> None:
    """Absurdly large λ and learning rate: an unrounded |w| would throw every weight across zero and far out."""
    model, solver = layers(pattern, Reweighted(lam=1e6, norm=norm, spare=False))
    solver.update(clock(0.0, solver, lr=0.7))
    before = [w.clone() for w in solver.problem.weights]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        solver.penalty_(None)
    for w, p in zip(before, (model[0].weight, model[1].weight), strict=True):
        ratio = (w - 0.7 * p.grad) / w
        assert ratio.min() >= 0.5 - 1e-9 and ratio.max() < 1


def test_refreshes_come_at_equal_distances_and_p_rests_in_between(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pruner = attach(net, optimizer, Reweighted(refreshes=3, hold=0.2), rate=5, every=5, total_steps=100)
    P = [[p.clone() for p in pruner.solver.tensors["P"]]]
    train(net, optimizer, range(79), pruner, after_step=lambda step: P.append([p.clone() for p in pruner.solver.tensors["P"]]))
    assert [row["step"] for row in pruner.history if row["refreshed"]] == [20, 40, 60]
    moved = [i for i, (a, b) in enumerate(itertools.pairwise(P), 1) if not all(map(torch.equal, a, b))]
    assert moved == [20, 40, 60]
    assert all(float(p.min()) > 0 and float(p.max()) <= 1 for p in P[-1]), "ε·P is in (0, 1]"


def test_the_mask_is_held_without_penalty_at_the_end(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pruner = attach(net, optimizer, Reweighted(lam=1e-3, hold=0.25), rate=5, every=4, total_steps=40)
    train(net, optimizer, range(30), pruner)
    zeros = [w == 0 for w in pruner.problem.weights]
    assert sum(int(z.sum()) for z in zeros) == sum(round(0.8 * z.numel()) for z in zeros)
    assert not any(pruner.solver.tensors.values()) and pruner.history[-1]["step"] == 28
    own = set_grads(net)
    before_step(pruner)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), own, strict=True))
    train(net, optimizer, range(30, 45), pruner)
    assert all(torch.equal(w == 0, z) for w, z in zip(pruner.problem.weights, zeros, strict=True))


def test_gradients_of_what_is_not_pruned_are_untouched(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pruner = attach(net, optimizer, Reweighted(lam=0.1), rate=5, total_steps=40)
    own = dict(zip((n for n, _ in net.named_parameters()), set_grads(net), strict=True))
    before_step(pruner)
    pruned = {t.name for t in pruner.problem.targets}
    assert pruned == {"3.weight", "6.weight"}
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, own[name]) is (name not in pruned)


@pytest.mark.parametrize("lam", [None, 0.1])
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_a_layer_that_keeps_everything_is_not_penalised(net: nn.Module, budget: str, lam: float | None) -> None:
    """Neither is it asked for λ, nor for the history's."""
    rules = {"3.weight": 0.0, "6.weight": 0.8}
    optimizer = sgd(net)
    pruner = attach(net, optimizer, Reweighted(lam=lam), patterns=rules, budget=budget, total_steps=40, every=5)
    own = dict(zip((n for n, _ in net.named_parameters()), set_grads(net), strict=True))
    before_step(pruner)
    assert torch.equal(net[3].weight.grad, own["3.weight"]) and not torch.equal(net[6].weight.grad, own["6.weight"])
    assert pruner.solver.scalars["lam"][0] == lam and pruner.solver.scalars["lam"][1] > 0
    if lam is None:
        train(net, optimizer, range(25), pruner)
        assert pruner.solver.scalars["lam"][0] is None and pruner.history[-1]["lam"] > 0
        pruner.finish()
        assert [row["kept"] for row in pruner.layers] == [576, 230]


def test_nothing_is_penalised_where_all_is_kept(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pruner = attach(net, optimizer, Reweighted(), patterns={"*": 0.0}, bits=4, total_steps=40, every=5)
    own = set_grads(net)
    before_step(pruner)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), own, strict=True))
    train(net, optimizer, range(15), pruner)
    assert pruner.history[-1]["lam"] is None


def test_parameters_without_a_gradient_are_given_none(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pruner = attach(net, optimizer, Reweighted(), rate=5, total_steps=40)
    optimizer.step()
    assert all(p.grad is None for p in net.parameters()) and pruner.solver.scalars["lam"][0] is None
    train(net, optimizer, range(2), pruner)
    assert pruner.solver.scalars["lam"][0] > 0


# ---------------------------------------------------------------------- scalers, dtypes, memory


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["unstructured", "filter"])
@BY_NORM
def test_under_a_scaler_the_result_is_that_of_unscaled_training(name: str, pattern: str, norm: str) -> None:
    runs = []
    for _ in range(2):
        net = tiny_net()
        optimizer = OPTIMIZERS[name](net.parameters())
        rules = {"*": (pattern, 0.5)}
        runs.append(
            (net, optimizer, attach(net, optimizer, Reweighted(norm=norm), patterns=rules, ignore=(), every=3, total_steps=30))
        )
    train(*runs[0][:2], range(10))
    scaled_steps(*runs[1][:2], scaler(2.0**12), range(10))
    for p, q in zip(*(run[2].problem.weights for run in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    for a, b in zip(runs[0][2].history, runs[1][2].history, strict=True):
        assert (a["lam"], a["violation"]) == pytest.approx((b["lam"], b["violation"]), rel=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_a_first_step_that_overflows_sets_no_lam(name: str) -> None:
    net = tiny_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = 0  # torch's fused SGD makes its buffers of garbage in a first step that it skips
    pruner = attach(net, optimizer, Reweighted(), rate=5, total_steps=30)
    amp = scaler(2.0**12)
    scaled_steps(net, optimizer, amp, [0], factor=1e38)
    assert pruner.solver.scalars["lam"][0] is None
    scaled_steps(net, optimizer, amp, [1])
    assert 0 < pruner.solver.scalars["lam"][0] < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BY_NORM
def test_narrow_weights_and_state_stay_finite(dtype: torch.dtype, norm: str) -> None:
    for pattern, state in itertools.product(UNIT, (None, dtype)):
        model, solver = layers(pattern, Reweighted(lam=1e-3, norm=norm, eps=1e-4), dtype)
        solver = ReweightedSolver(solver.problem, solver.method, Store(state))
        set_grads(model)
        with torch.no_grad():
            solver.penalty_(None)
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
        assert all(p.dtype == (state or torch.float32) for p in solver.tensors["P"])


class Largest(TorchDispatchMode):
    """Remembers the size of the largest result in fresh memory, and counts reads of device values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and not out.is_meta and out.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "block:5x4", "2:4"])
@BY_NORM
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_step_allocates_cache_sized_pieces_at_most_and_never_waits(pattern: str, norm: str, scale: float | None) -> None:
    net = nn.Sequential(nn.Linear(800, 800))
    optimizer = sgd(net)
    pruner = attach(
        net, optimizer, Reweighted(lam=1e-3, norm=norm), patterns={"*": (pattern, 0.5)}, ignore=(), every=9, total_steps=90
    )
    net(torch.ones(2, 800)).sum().backward()
    pruner.update()
    if scale:
        optimizer.grad_scale = torch.tensor(scale)
    with Largest() as seen:
        before_step(pruner)
    assert seen.elements <= chunks._CHUNK < 800 * 800 and seen.syncs == 0


def test_state_is_one_number_a_unit_and_one_byte_a_weight() -> None:
    _, solver = layers(Filter(), Reweighted())
    assert [tuple(p.shape) for p in solver.tensors["P"]] == [(4,), (4,)]
    assert [(k.dtype, tuple(k.shape)) for k in solver.tensors["keep"]] == [(torch.bool, SHAPE)] * 2


def test_channels_last_weights_give_the_same_gradient() -> None:
    for pattern, norm in itertools.product(UNIT, ("plain", "squared")):
        grads = []
        for layout in (torch.contiguous_format, torch.channels_last):
            model, solver = layers(pattern, Reweighted(lam=0.3, norm=norm))
            model.to(memory_format=layout)
            for conv in model:
                conv.weight.grad = torch.zeros_like(conv.weight)
            with torch.no_grad():
                solver.penalty_(None)
            grads.append([conv.weight.grad for conv in model])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "options", [{}, {"patterns": {"3.weight": "filter", "6.weight": ("block:2x4", 0.5)}}, {"budget": "global"}]
)
@pytest.mark.parametrize("method", [Reweighted(), Reweighted(lam=1e-3, norm="plain", hold=0.0)], ids=["found", "given"])
def test_a_run_broken_anywhere_ends_like_an_unbroken_one(method: Reweighted, options: dict[str, Any]) -> None:
    whole = fresh(method, **options)
    blobs: dict[int, bytes] = {}

    def keep(step: int) -> None:
        if step + 1 in BREAKS:
            blobs[step + 1] = saved(*whole)

    train(*whole[:2], range(STEPS), whole[2], after_step=keep)
    whole[2].finish(calibrate=[batch(0)])
    for step, blob in blobs.items():
        broken = resumed(blob, method, **options)
        train(*broken[:2], range(step, STEPS), broken[2])
        broken[2].finish(calibrate=[batch(0)])
        identical(whole, broken)


def test_a_state_with_another_shape_of_p_is_refused() -> None:
    state = fresh(Reweighted(), patterns={"6.weight": "filter"})[2].state_dict()
    assert state["P.6.weight"].shape == (16,)
    pruner = fresh(Reweighted(), patterns={"6.weight": "filter"})[2]
    before = snapshot(pruner.state_dict())
    with pytest.raises(DualpruneError, match=r"P.6.weight: expected torch.float32 of shape \(16,\), got .*\(9,\)"):
        pruner.load_state_dict(state | {"P.6.weight": torch.ones(9)})
    assert all(torch.equal(a, b) for a, b in zip(before.values(), pruner.state_dict().values(), strict=True))


# ---------------------------------------------------------------------- λ, and what comes of it


@cache
def dense_state() -> dict[str, Tensor]:
    model = mlp(None)
    optimizer = sgd(model, 0.1)
    for step in range(300):
        descend(model, optimizer, step)
    return snapshot(model)


def mlp(state: dict[str, Tensor] | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    if state is not None:
        model.load_state_dict(state)
    return model


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, scale: float = 1.0) -> None:
    x, y = batch(step, 64)
    optimizer.zero_grad()
    (scale * F.cross_entropy(model(x), y)).backward()
    optimizer.step()


def pruned(method: Any, optimizer: str = "sgd", lr: float = 0.1, scale: float = 1.0, steps: int = 300, **options: Any) -> Any:
    model = mlp(dense_state())
    make = {"sgd": lambda p: torch.optim.SGD(p, lr, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr)}
    options = {"rate": 10, "budget": "global"} | options
    steered = make[optimizer](model.parameters())
    pruner = attach(model, steered, method, ignore=(), total_steps=steps, every=5, **options)
    for step in range(steps):
        descend(model, steered, 1000 + step, scale)
    pruner.finish()
    return model, pruner


@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 0.1}, {"lr": 0.02}, {"lr": 0.1 / 64, "scale": 64.0}, {"lr": 6.4, "scale": 1 / 64},
        {"optimizer": "adam", "lr": 3e-3}, {"optimizer": "adam", "lr": 1e-2, "scale": 64.0},
        {"patterns": {"1.weight": ("filter", 0.5), "3.weight": ("filter", 0.3)}},
        {"patterns": {"*": ("block:2x2", 0.75)}},
    ],
    ids=str,
)  # fmt: skip
@BY_NORM
def test_the_lam_found_leaves_under_a_hundredth_of_the_energy_to_cut(setting: dict[str, Any], norm: str) -> None:
    _, pruner = pruned(Reweighted(norm=norm), **({"rate": None} if "patterns" in setting else {}), **setting)
    rows = pruner.history
    assert rows[0]["outside"] > 0.05, "there was something to do"
    assert rows[-1]["outside"] < 0.01
    assert all(0.499 < b["lam"] / a["lam"] < 2.001 for a, b in itertools.pairwise(rows)), "bounded factors"
    assert all(math.isfinite(row["lam"]) for row in rows)


def test_a_lam_of_the_users_is_left_alone() -> None:
    _, pruner = pruned(Reweighted(lam=2e-5), steps=100)
    assert {row["lam"] for row in pruner.history} == {2e-5}


def test_equal_problems_in_other_units_take_the_same_course() -> None:
    """Loss times 64 at a learning rate 64 times smaller is the same problem for SGD, and 64 times the λ its solution."""
    rows = [pruned(Reweighted(), lr=0.1 / c, scale=c, steps=100)[1].history for c in (1.0, 64.0)]
    for a, b in zip(*rows, strict=True):
        assert b["lam"] == pytest.approx(64 * a["lam"], rel=1e-3)
        assert b["violation"] == pytest.approx(a["violation"], rel=1e-3)


def test_digits_at_ten_times_fewer_weights_beat_one_shot() -> None:
    model, pruner = pruned(Reweighted())
    kept = sum(layer["kept"] for layer in pruner.layers)
    assert kept == 6464 - round(0.9 * 6464) == sum(int(torch.count_nonzero(w)) for w in pruner.problem.weights)
    cut = mlp(dense_state())
    attach(cut, None, Magnitude(), rate=10, budget="global", ignore=()).finish()
    dense = accuracy(mlp(dense_state()))
    assert accuracy(cut) < dense - 0.04
    assert accuracy(model) > dense - 0.025
    assert digits()[0].shape[0] == 1797


@pytest.mark.parametrize(
    ("odds", "last", "passed", "left", "factor"),
    [
        (-1.0, 0.0, 0.1, 0.5, 1.2),  # fell by 10 a run, needs (−1 + 7)/0.5 = 12
        (-1.0, 0.0, 0.1, 0.75, 0.8),
        (-1.0, 0.0, 0.1, 0.1, 2.0),  # bounded
        (-6.0, 0.0, 0.1, 0.5, 0.5),
        (0.1, 0.0, 0.1, 0.5, 2.0),  # rises
        (-8.0, -8.5, 0.1, 0.5, 0.5),  # is there already
        (-1.0, 0.0, 0.0, 0.5, 1.0),  # updated twice at one step
        (-1.0, 0.0, 0.6, 0.0, 2.0),  # the end is here
    ],
)
def test_feedback_by_hand(odds: float, last: float, passed: float, left: float, factor: float) -> None:
    assert feedback(odds, last, -7.0, passed, left) == pytest.approx(factor)


# ---------------------------------------------------------------------- refused


def test_paper_constants() -> None:
    paper = Reweighted.paper(lam=1e-4)
    assert (paper.lam, paper.eps, paper.relative, paper.refreshes) == (1e-4, 1e-3, False, 4)
    _, solver = layers(Unstructured(), paper)
    assert solver.scalars["eps"] == [1e-3, 1e-3]
    assert Reweighted(hold=0.25).hold_from == 0.75 and Reweighted(hold=0.0).hold_from == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0}, r"Reweighted\(lam\) expects a positive finite number or None, which finds it, got 0"),
        ({"lam": -1e-4}, "lam.*got -0.0001"),
        ({"lam": math.nan}, "lam.*got nan"),
        ({"lam": math.inf}, "lam.*got inf"),
        ({"lam": "auto"}, "lam.*got 'auto'"),
        ({"lam": True}, "lam.*got True"),
        ({"eps": 0.0}, r"Reweighted\(eps\) expects a positive finite number, got 0.0"),
        ({"eps": -1}, "eps.*got -1"),
        ({"eps": math.nan}, "eps.*got nan"),
        ({"target": 0}, "target.*got 0"),
        ({"refreshes": 0}, r"Reweighted\(refreshes\) is a whole number of at least 1, got 0"),
        ({"refreshes": 2.5}, "refreshes.*got 2.5"),
        ({"norm": "sqared"}, r"Reweighted\(norm\) is one of .*got 'sqared', did you mean 'squared'\?"),
        ({"hold": 30}, r"Reweighted\(hold\) is a fraction of the run in \[0, 1\], got 30"),
        ({"hold": 1.0}, "hold.*below 1"),
        ({"relative": "no"}, "relative.*True or False.*got 'no'"),
        ({"spare": "no"}, "spare.*True, False or None.*got 'no'"),
    ],
)
def test_impossible_options_are_answered_in_words(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DualpruneError, match=message):
        Reweighted(**options)


def test_what_attach_refuses(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(DualpruneError, match=r"Reweighted moves with the run: pass total_steps"):
        attach(net, optimizer, Reweighted.paper(lam=1e-4), rate=5)
    with pytest.raises(DualpruneError, match=r"did you mean Reweighted\(\)\?"):
        attach(net, optimizer, Reweighted, rate=5, total_steps=10)  # type: ignore[arg-type]
    with pytest.raises(DualpruneError, match="works through an optimizer's steps"):
        attach(net, None, Reweighted(), rate=5, total_steps=10)
    climbing = torch.optim.SGD(net.parameters(), 0.1, maximize=True)
    with pytest.raises(DualpruneError, match="maximize=True would climb"):
        attach(net, climbing, Reweighted(), rate=5, total_steps=10)


def test_sparse_gradients_are_refused() -> None:
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    attach(net, optimizer, Reweighted(), sparsity=0.5, ignore=(), total_steps=10)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(DualpruneError, match="sparse gradients: use sparse=False"):
        optimizer.step()
