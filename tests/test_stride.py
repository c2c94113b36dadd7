"""A penalty measured in optimizer steps: the same pull at every learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop

import dualprune
from dualprune import SLR, Closing, DualpruneError
from dualprune.stride import Stride

EVERY = 50


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(8, 8))


def stepped(optimizer: Optimizer, w: nn.Parameter, gradient: float, steps: int = 7) -> Stride:
    for _ in range(steps):
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
    return Stride(optimizer, [w])


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("steps", [1, 7, 300])
def test_noise_is_the_root_mean_square_gradient_however_young_the_mean(kind: type[Optimizer], steps: int) -> None:
    w = weight()
    stride = stepped(kind([w], lr=1e-3), w, 0.02, steps)
    assert stride.noise() == pytest.approx(0.02, rel=1e-3)
    assert stride.length(stride.noise()) == pytest.approx(1e-3 / 0.02, rel=1e-3)


def test_noise_is_of_all_weights_and_of_no_others() -> None:
    a, b, other = weight(), nn.Parameter(torch.randn(16, 8)), weight()
    optimizer = RMSprop([a, b, other], lr=0.1, alpha=0.9)
    for p, g in ((a, 1.0), (b, 2.0), (other, 100.0)):
        p.grad = torch.full_like(p, g)
    optimizer.step()
    assert Stride(optimizer, [a, b]).noise() == pytest.approx(math.sqrt((64 * 1 + 128 * 4) / 192), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "gain"),
    [({}, 1), ({"momentum": 0.9}, 10), ({"momentum": 0.9, "nesterov": True}, 10), ({"momentum": 0.9, "dampening": 0.5}, 5)],
)
def test_momentum_lengthens_the_stride(options: dict[str, float], gain: float) -> None:
    w = weight()
    stride = stepped(SGD([w], lr=0.01, **options), w, 3.0)
    assert (stride.noise(), stride.length(1.0)) == (1.0, 0.01)
    assert stride.gain == pytest.approx(gain)


def test_of_several_groups_the_longest_stride_counts() -> None:
    a, b = weight(), weight()
    optimizer = SGD([{"params": [a], "lr": 0.1, "momentum": 0.5}, {"params": [b], "lr": 0.05}], lr=1.0)
    stride = Stride(optimizer, [a, b])
    assert (stride.length(1.0), stride.gain) == (0.1, 2.0)


def test_an_optimizer_of_another_kind_counts_as_gradient_descent() -> None:
    w = weight()
    stride = stepped(Adadelta([w], lr=0.3), w, 1.0)
    assert (stride.noise(), stride.length(1.0)) == (1.0, 0.3)


def gaps(make: Callable[[list[nn.Parameter]], Optimizer], lrs: Callable[[int], float], steps: int) -> list[float]:
    """Return ‖W − Z‖ after every step, with no loss at all: only the penalty moves the weights."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32, bias=False)
    optimizer = make(list(model.parameters()))
    method = SLR(rho=Closing(4.0), ramp=0, hold=0, s0=1e-30)
    pruner = dualprune.attach(model, optimizer, method, sparsity=0.5, ignore=(), every=EVERY, total_steps=steps)
    found = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lrs(step)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        found.append(float(pruner.history[-1]["violation_before"]) if (step + 1) % EVERY == 0 else math.nan)
        assert torch.isfinite(model.weight).all()
    return [g for g in found if not math.isnan(g)]


@pytest.mark.parametrize("lr", [1e-1, 1e-4, 1e-12])
@pytest.mark.parametrize(
    "make",
    [lambda p: SGD(p, lr=1.0), lambda p: SGD(p, lr=1.0, momentum=0.9), Adam, lambda p: AdamW(p, weight_decay=0), RMSprop],
    ids=["sgd", "momentum", "adam", "adamw", "rmsprop"],
)
def test_the_gap_shrinks_by_e_to_the_minus_times_whatever_the_optimizer(make: Callable[..., Optimizer], lr: float) -> None:
    first, *rest = gaps(make, lambda _: lr, 4 * EVERY)
    assert [b / a for a, b in zip([first, *rest], rest, strict=False)] == pytest.approx([math.exp(-4)] * 3, rel=1e-3)


def test_a_learning_rate_that_jumps_changes_nothing_of_it() -> None:
    first, *rest = gaps(lambda p: SGD(p, lr=1.0), lambda step: 0.1 if step % 70 < 40 else 1e-9, 4 * EVERY)
    assert [b / a for a, b in zip([first, *rest], rest, strict=False)] == pytest.approx([math.exp(-4)] * 3, rel=1e-3)


def test_a_warm_up_from_zero_is_no_division_by_zero() -> None:
    found = gaps(lambda p: SGD(p, lr=0.0), lambda step: 0.0 if step < EVERY else 0.1, 4 * EVERY)
    assert found[-1] < 1e-4 * found[0]


def test_rho_is_what_gradient_descent_would_need() -> None:
    """The pull by the gradient of ρ/2 ‖W − Z‖² with plain SGD, beside the decoupled one."""
    assert Closing(4.0).penalty(0.1, 0.1, 50) * 0.1 == pytest.approx(4 / 50)
    assert Closing(4.0).penalty(1e-9, 0.1, 50) * 0.01 == pytest.approx(4 / 50)
    assert Closing(4.0).share(50) == pytest.approx(1 - math.exp(-4 / 50))


@pytest.mark.parametrize(("closing", "left"), [(Closing(4.0), 0.0), (Closing(4.0, filters=2.0), math.exp(-2))])
def test_whole_filters_go_at_once_unless_told_otherwise(closing: Closing, left: float) -> None:
    """Two layers of which one loses filters: a period after the first update, with no loss at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    before = [layer.weight.detach().clone() for layer in model]
    optimizer = SGD(model.parameters(), lr=0.1)
    method = SLR(rho=closing, ramp=0, hold=0, s0=1e-30)
    patterns = {"0.weight": (dualprune.Filter(), 0.5), "1.weight": 0.5}
    pruner = dualprune.attach(model, optimizer, method, patterns=patterns, ignore=(), every=EVERY, total_steps=10 * EVERY)
    for step in range(2 * EVERY):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        if step == EVERY and closing.filters == math.inf:
            assert torch.equal(pruner.masks["0.weight"].any(1), model[0].weight.detach().abs().amax(1) > 1e-6)
    for layer, was, expected in zip(model, before, (left, math.exp(-4)), strict=True):
        mask = pruner.masks[f"{0 if layer is model[0] else 1}.weight"]
        torch.testing.assert_close(layer.weight.detach()[mask], was[mask])
        torch.testing.assert_close(layer.weight.detach()[~mask], expected * was[~mask], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_filters_close_by_a_positive_number(wrong: float) -> None:
    with pytest.raises(DualpruneError, match=r"Closing\(filters\) expects a positive finite number or infinity, got"):
        Closing(filters=wrong)


def test_another_optimizer_is_measured_anew_and_manual_updates_count_their_own_steps() -> None:
    model = nn.Linear(16, 16)
    optimizer = Adam(model.parameters(), lr=1e-3)
    pruner = dualprune.attach(model, optimizer, SLR(rho=Closing(1.0), ramp=0, hold=0), sparsity=0.5, ignore=(), every=10**6)

    def update(optimizer: Optimizer, steps: int) -> float:
        for _ in range(steps):
            model.weight.grad = torch.full_like(model.weight, 0.01)
            optimizer.step()
        return float(pruner.update()["rho"])

    assert update(optimizer, 5) == pytest.approx(0.01 / 1e-3 / 5, rel=1e-3)
    assert pruner.solver.scalars["share"] == pytest.approx(1 - math.exp(-1 / 5))
    other = SGD(model.parameters(), lr=0.1)
    pruner.follow(other)
    assert update(other, 20) == pytest.approx(1 / 0.1 / 20)


def test_a_frozen_weight_is_not_pulled() -> None:
    model = nn.Linear(16, 16)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = dualprune.attach(model, optimizer, SLR(ramp=0), sparsity=0.5, ignore=(), every=1, total_steps=100)
    for _ in range(3):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    before = model.weight.detach().clone()
    model.weight.requires_grad_(False)
    model.weight.grad = None
    optimizer.step()
    assert torch.equal(model.weight, before)
    model.weight.requires_grad_(True)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert not torch.equal(model.weight, before) and pruner.history


@pytest.mark.parametrize("hold", [0.2, 0.0])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pull", ["outside", "everywhere"])
def test_the_pull_against_a_slow_twin(pull: str, bits: int | None, hold: float) -> None:
    model = nn.Linear(12, 6)
    optimizer = SGD(model.parameters(), lr=0.1)
    options = {"sparsity": 0.5, "ignore": (), "every": 2, "total_steps": 100, "bits": bits}
    pruner = dualprune.attach(model, optimizer, SLR(ramp=0, pull=pull, rho=Closing(2.0), hold=hold), **options)
    for _ in range(9):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
    w, z, lam = (t.tolist() for t in (model.weight.detach(), pruner.solver.tensors["Z"][0], pruner.solver.tensors["lam"][0]))
    # without a hold, the pull has to bring what stays to its levels
    rho, everywhere = pruner.solver.scalars["rho"], pull == "everywhere" or (bits is not None and not hold)
    optimizer.zero_grad()
    pruner.solver.pull_()
    share = 1 - math.exp(-2 / 2)
    for i in range(6):
        for k in range(12):
            pulled = everywhere or z[i][k] == 0
            wanted = w[i][k] - (share * (w[i][k] - z[i][k] + lam[i][k] / rho) if pulled else 0)
            assert model.weight[i, k].item() == pytest.approx(wanted, abs=1e-6)


def test_adam_gets_the_pull_of_its_own_gradient_scale() -> None:
    """Twice the loss is twice the gradient: Adam's steps stay the same, and so must what the penalty does to them."""
    rhos = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        model = nn.Linear(16, 16, bias=False)
        optimizer = Adam(model.parameters(), lr=1e-3)
        pruner = dualprune.attach(model, optimizer, SLR(), sparsity=0.5, ignore=(), every=5, total_steps=100)
        x = torch.randn(64, 16)
        for _ in range(50):
            optimizer.zero_grad()
            (scale * model(x).square().mean()).backward()
            optimizer.step()
        rhos.append([row["rho"] for row in pruner.history])
    assert [b / a for a, b in zip(*rhos, strict=True)] == pytest.approx([1000.0] * 10, rel=1e-3)


def test_there_is_no_pull_before_the_first_update() -> None:
    model = nn.Linear(16, 16)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = dualprune.attach(model, optimizer, SLR(), sparsity=0.5, ignore=(), every=5, total_steps=100)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert pruner.solver.scalars["rho"] == 0


def test_without_an_optimizer_there_is_nothing_to_measure_in() -> None:
    from dualprune.scope import build_problem
    from dualprune.solvers.base import Clock, Store

    solver = SLR().start(build_problem(nn.Linear(4, 4), sparsity=0.5, ignore=()), Store())
    with pytest.raises(DualpruneError, match=r"Closing measures ρ in optimizer steps.*give rho=Geometric\(0.1, 1.0\)"):
        solver.update(Clock(None, 0.0))
