"""RigL, AC/DC and SAFE against slow twins and cases worked by hand, in a loop, and resumed bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualprune
from dualprune import ACDC, NM, SAFE, SLR, DualpruneError, Filter, RigL, attach, perturbed
from dualprune.scope import build_problem
from dualprune.solvers.base import Clock, Store
from dualprune.solvers.dynamic import rigl_update
from helpers import accuracy, batch, same_bits, sgd, snapshot, tiny_net, train
from test_resume import BREAKS, STEPS, fresh, identical, resumed, saved

RIVALS = {"rigl": RigL(), "acdc": ACDC(warmup=0.2, period=0.2, tail=0.2), "safe": SAFE(rho=1.0), "safe held": SAFE(hold=0.3)}


def layers(sparsity=0.7, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Linear(5, 4, bias=False)).double()
    return build_problem(model, **({"sparsity": sparsity} | options), ignore=())


def walk(problem, updates=60, seed=1):
    """Move weights and gradients at random, as an optimizer would, and yield the progress."""
    random = torch.Generator().manual_seed(seed)
    for update in range(1, updates + 1):
        for target in problem.targets:
            noise = torch.randn((2, *target.weight.shape), generator=random, dtype=torch.float64)
            target.weight.detach().add_(noise[0], alpha=0.3)
            target.weight.grad = noise[1]
        yield update / updates


def cut(problem, solver):
    for w, drop in zip(problem.weights, solver.tensors["drop"], strict=True):
        w.masked_fill_(drop, 0)


def kept_of(solver):
    return [set((~d).flatten().nonzero().flatten().tolist()) for d in solver.tensors["drop"]]


# ---------------------------------------------------------------------- RigL


def test_rigl_by_hand():
    w = torch.tensor([4.0, -3, 2, 1, 0, 0, 0, 0])
    grad = torch.tensor([9.0, 9, 9, 0.1, 0.2, -5, 0, 1])
    active = w != 0
    # half of four move: 2 and 1 are dropped; of all that is left out, 9 (just dropped) and -5 have the largest gradients
    assert rigl_update(w, grad, active, 0.5).tolist() == [True, True, True, False, False, True, False, False]
    assert rigl_update(w, grad, active, 0.0).tolist() == active.tolist()
    assert rigl_update(w, grad, active, 1.0).nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_rigl_grows_no_more_than_has_a_gradient():
    w = torch.tensor([0.0, 0, 0, 0, 1, 2, -3, 4])
    active, none = w != 0, torch.zeros(8)
    for share in (0.0, 0.5, 1.0):
        assert rigl_update(w, none, active, share).tolist() == active.tolist()
    one = torch.tensor([0.0, 0, -1, 0, 0, 0, 0, 0])  # 1 makes room for it, 2 stays
    assert rigl_update(w, one, active, 0.5).nonzero().flatten().tolist() == [2, 5, 6, 7]
    assert rigl_update(w, one, active, 1.0).nonzero().flatten().tolist() == [2, 5, 6, 7]
    back = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0])  # dropped, and the only one with a gradient
    assert rigl_update(w, back, active, 0.5).tolist() == active.tolist()


@pytest.mark.parametrize("gradient", ["none", "zero", "no more"])
def test_rigl_leaves_a_layer_alone_that_gets_no_gradient(gradient):
    problem = layers()
    solver = RigL(fraction=1.0, until=1.0).start(problem, Store())
    lonely = problem.targets[1].weight
    for step, progress in enumerate(walk(problem, 12)):
        if gradient != "no more" or step >= 4:
            lonely.grad = torch.zeros_like(lonely) if gradient == "zero" else None
        lonely.detach().normal_()  # others are the smallest every time
        cut(problem, solver)
        before = kept_of(solver)
        solver.penalty_(None)
        solver.update(Clock(None, progress))
        after = kept_of(solver)
        assert [len(s) for s in after] == [24 - 17, 20 - 14]
        if lonely.grad is None or not lonely.grad.any():
            assert after[1] == before[1]


def test_rigl_follows_its_slow_twin():
    problem, method = layers(), RigL(fraction=0.4, until=0.8)
    solver = method.start(problem, Store())
    sets, moved = kept_of(solver), 0
    assert [len(s) for s in sets] == [24 - 17, 20 - 14], "by magnitude at the final sparsity"
    for progress in walk(problem):
        cut(problem, solver)
        gradients = [t.weight.grad.flatten().tolist() for t in problem.targets]
        solver.penalty_(None)
        for target, kept in zip(problem.targets, sets, strict=True):
            seen = set(target.weight.grad.flatten().nonzero().flatten().tolist())
            assert seen == kept, "the optimizer sees no gradient of what is dropped"
        solver.update(Clock(None, progress))
        share = 0.2 * (1 + math.cos(math.pi * progress / 0.8)) if progress < 0.8 else 0.0
        for i, (w, g) in enumerate(zip(problem.weights, gradients, strict=True)):
            n, flat = round(share * len(sets[i])), w.flatten().tolist()
            stay = set(sorted(sets[i], key=lambda j, flat=flat: (-abs(flat[j]), j))[: len(sets[i]) - n])
            others = sorted(set(range(len(g))) - stay, key=lambda j, g=g: (-abs(g[j]), j))
            moved += len(sets[i] - stay - set(others[:n]))
            sets[i] = stay | set(others[:n])
        assert kept_of(solver) == sets
    assert moved > 20
    assert len(set(map(len, sets))) == 2


def test_rigl_grows_whole_filters_and_never_frozen_zeros():
    problem = layers(sparsity=None, patterns={"0.weight": (Filter(), 1 / 3)})
    solver = RigL(fraction=0.5).start(problem, Store())
    for progress in walk(problem, 20):
        cut(problem, solver)
        solver.penalty_(None)
        solver.update(Clock(None, progress))
        assert sorted(solver.tensors["drop"][0].flatten(1).sum(1).tolist()) == [0, 0, 8]

    net = tiny_net()
    zeros = torch.rand(net[6].weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    with torch.no_grad():
        net[6].weight.masked_fill_(zeros, 0)
    optimizer = sgd(net)
    pruner = attach(net, optimizer, RigL(), rate=5, every=2, total_steps=STEPS, keep_zeros=True)
    train(net, optimizer, range(STEPS), pruner)
    assert not net[6].weight[zeros].any()
    assert any(row["support_change"] for row in pruner.history)


@pytest.mark.parametrize("budget", ["uniform", "erk", "global"])
def test_rigl_moves_in_a_loop_and_keeps_its_count(budget):
    net = tiny_net()
    optimizer = sgd(net)
    pruner = attach(net, optimizer, RigL(), rate=5, budget=budget, every=2, total_steps=STEPS)
    counts = [row["kept"] for row in pruner.layers]
    train(net, optimizer, range(STEPS), pruner)
    changed = [row["support_change"] for row in pruner.history]
    assert changed[0] > 0 == changed[-1] and [row["kept"] for row in pruner.layers] == counts
    momentum = optimizer.state[net[6].weight]["momentum_buffer"]
    assert (net[6].weight == 0).sum() >= 1152 - counts[-1]
    before = momentum.clone()
    drop = pruner.solver.tensors["drop"][-1]
    train(net, optimizer, [STEPS], pruner)
    torch.testing.assert_close(momentum[drop], 0.9 * before[drop])


def test_rigl_refuses_what_it_cannot_keep():
    with pytest.raises(DualpruneError, match=r"2:4 axis 0 of 1\.weight does not allow"):
        RigL().start(layers(None, patterns={"1.weight": NM(2, 4, axis=0)}), Store())
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))
    tied = build_problem(net, patterns={"*": Filter()}, sparsity=0.5, ignore=(), ties=[["0.weight", "1.weight"]])
    with pytest.raises(DualpruneError, match="cannot keep ties"):
        RigL().start(tied, Store())
    for bad in ({"fraction": 30}, {"until": -1}):
        with pytest.raises(DualpruneError, match="fraction of the run"):
            RigL(**bad)


# ---------------------------------------------------------------------- AC/DC


def test_acdc_phases_by_hand():
    """The paper's 100 epochs: dense to 10, then 5 and 5 in turn, dense from 75 to 85, compressed to the end."""
    phases = "".join("C" if ACDC().compressed(epoch / 100) else "d" for epoch in range(100))
    assert phases == "d" * 10 + ("C" * 5 + "d" * 5) * 6 + "C" * 5 + "d" * 10 + "C" * 15
    assert ACDC().compressed(1.0)
    short = ACDC(warmup=0.0, period=0.2, tail=0.2)
    assert "".join("C" if short.compressed(i / 10) else "d" for i in range(10)) == "CCdd" + "dddd" + "CC"


def test_acdc_masks_by_magnitude_when_a_phase_begins_and_lets_all_move_in_dense_ones():
    problem, method = layers(), ACDC(warmup=0.2, period=0.1, tail=0.2)
    solver, last = method.start(problem, Store()), False
    switches = 0
    for progress in walk(problem, 50):
        before = [w.clone() for w in problem.weights]
        row = solver.update(Clock(None, progress))
        assert row["compressed"] == method.compressed(progress)
        kept = kept_of(solver)
        if row["compressed"] and not last:
            tops = [set(w.abs().flatten().topk(n).indices.tolist()) for w, n in zip(before, (7, 6), strict=True)]
            assert kept == tops
            switches += 1
        elif not row["compressed"]:
            assert [len(k) for k in kept] == [24, 20]
        cut(problem, solver)
        last = row["compressed"]
    assert switches == 3 and last, "at 0.2, 0.4 and 0.8"


def test_acdc_refuses_phases_that_leave_no_room():
    for bad in ({"warmup": 0.6, "tail": 0.5}, {"period": 0.0}, {"tail": 0.0}, {"period": 5}):
        with pytest.raises(DualpruneError, match=r"ACDC"):
            ACDC(**bad)


# ---------------------------------------------------------------------- SAFE


def test_safe_follows_the_scaled_form():
    """Z ← Π(W + U), U ← U + W − Z with U itself; the gradient is ρ_t (W − Z + U)."""
    problem, method = layers(), SAFE(rho=0.7)
    solver = method.start(problem, Store())

    def project(values):
        bars = [v.abs().flatten().sort(descending=True).values[n - 1] for v, n in zip(values, (7, 6), strict=True)]
        return [torch.where(v.abs() >= bar, v, 0) for v, bar in zip(values, bars, strict=True)]

    Z, U = project(problem.weights), [torch.zeros_like(w) for w in problem.weights]
    for progress in walk(problem):
        row = solver.update(Clock(None, progress))
        rho = 0.35 * (1 - math.cos(math.pi * progress))
        Z = project([w + u for w, u in zip(problem.weights, U, strict=True)])
        U = [u + w - z for u, w, z in zip(U, problem.weights, Z, strict=True)]
        assert row["rho"] == pytest.approx(rho)
        plain = [t.weight.grad.clone() for t in problem.targets]
        solver.penalty_(None)
        for target, g, z, u, mine in zip(problem.targets, plain, Z, U, solver.tensors["Z"], strict=True):
            torch.testing.assert_close(mine, z)
            torch.testing.assert_close(target.weight.grad, g + rho * (target.weight.detach() - z + u))


def test_perturbed_leaves_what_masks_have_dropped_at_zero():
    model, optimizer = tiny_net(), None
    optimizer = sgd(model)
    pruner = attach(model, optimizer, SAFE(hold=0.5), rate=4, total_steps=8, every=2)
    assert pruner.dropped == []
    train(model, optimizer, range(6), pruner)
    (weight, drop), *_ = pruner.dropped
    assert 0 < int(drop.sum()) < drop.numel()
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with perturbed(optimizer, 0.5, pruner.dropped):
        assert not weight.detach()[drop].any()
        moved = [p.detach().clone() for p in model.parameters()]
        F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    lengths = [float((p.detach() - there).norm()) for p, there in zip(model.parameters(), moved, strict=True)]
    assert math.hypot(*lengths) == pytest.approx(0.5, rel=1e-4)


def test_a_cut_keeps_what_rigl_has_grown():
    model = tiny_net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer, RigL(until=1.0), rate=4, total_steps=8, every=4)
    train(model, optimizer, range(4), pruner)
    in_force = [~drop for _, drop in pruner.dropped]
    assert any(bool((w.detach()[m] == 0).any()) for (w, _), m in zip(pruner.dropped, in_force, strict=True)), "just grown"
    assert all(torch.equal(a, b) for a, b in zip(pruner.masks.values(), in_force, strict=True))
    pruner.finish()
    assert all(torch.equal(a, b) for a, b in zip(pruner.masks.values(), in_force, strict=True))


def test_safe_refuses_multipliers_that_float16_cannot_hold():
    model = tiny_net()
    with pytest.raises(DualpruneError, match="too small for float16"):
        attach(model, sgd(model), SAFE(), rate=4, total_steps=8, state_dtype=torch.float16)


def test_perturbed_takes_the_gradient_uphill_and_puts_the_weights_back():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    y = torch.tensor([0.0], requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x, y, unused], 0.1)

    def loss() -> Tensor:
        return (x**3).sum() / 3 + 0 * y.sum()

    before = x.detach().clone()
    loss().backward()
    direction = torch.tensor([9.0, 16.0]) / math.hypot(9, 16)
    with perturbed(optimizer, 0.5):
        torch.testing.assert_close(x.detach(), before + 0.5 * direction)
        assert x.grad is None
        loss().backward()
    assert torch.equal(x, before)
    torch.testing.assert_close(x.grad, (before + 0.5 * direction) ** 2)
    optimizer.zero_grad()
    with pytest.raises(DualpruneError, match="call loss"), perturbed(optimizer, 0.5):
        pass
    loss().backward()
    with pytest.raises(ZeroDivisionError), perturbed(optimizer, 0.5):
        raise ZeroDivisionError
    assert torch.equal(x, before), "after an error too"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_perturbed_goes_nowhere_along_a_gradient_that_overflowed(bad):
    net = tiny_net()
    optimizer, before = sgd(net), snapshot(net)
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    net[3].weight.grad[0, 0, 0, 0] = bad
    with perturbed(optimizer, 0.1):
        assert all(torch.equal(p.detach(), before[name]) for name, p in net.named_parameters())
        F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_batch_norm_survives_a_scaler_that_overflows_in_a_sharp_loop():
    net = tiny_net()
    optimizer, before = sgd(net), snapshot(net)
    pruner = attach(net, optimizer, SAFE(), rate=4, every=3, total_steps=STEPS)
    amp = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)

    def backward(step):
        amp.scale(100 * F.cross_entropy(net(batch(step)[0]), batch(step)[1])).backward()

    for step in range(4):
        backward(step)
        with perturbed(optimizer, 0.1, pruner.dropped):
            backward(step)
        amp.step(optimizer)
        amp.update()
        optimizer.zero_grad()
        if step == 0:
            assert amp.get_scale() == 2.0**67, "skipped"
            assert all(torch.equal(p.detach(), before[name]) for name, p in net.named_parameters())
    assert pruner.step_count == 3
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())


@pytest.mark.parametrize("method", [SAFE(rho=1.0), SLR()], ids=["safe", "slr"])
def test_a_sharp_loop_prunes(method):
    net = tiny_net()
    optimizer = sgd(net)
    pruner = attach(net, optimizer, method, rate=4, every=3, total_steps=STEPS)
    for step in range(STEPS):
        x, y = batch(step)
        F.cross_entropy(net(x), y).backward()
        with perturbed(optimizer, 0.05):
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish(calibrate=[batch(0)])
    assert accuracy(net) > 0.25, "three times what guessing gives"
    assert dualprune.sparsity_report(net).rate > 2


def test_safe_refuses_constants_out_of_range_and_climbing():
    for bad in ({"rho": 0}, {"rho_sam": -1}, {"rho": math.inf}, {"rho": True}):
        with pytest.raises(DualpruneError, match="positive finite number"):
            SAFE(**bad)
    net = tiny_net()
    with pytest.raises(DualpruneError, match="maximize=True would climb"):
        attach(net, torch.optim.SGD(net.parameters(), 0.1, maximize=True), SAFE(), rate=5, total_steps=9)
    assert SAFE.paper() == SAFE(rho=1e-3, rho_sam=0.1) and SAFE.paper().sharpness == 0.1 and SLR().sharpness == 0


# ---------------------------------------------------------------------- all three


@pytest.mark.parametrize("name", RIVALS)
def test_a_run_broken_anywhere_ends_like_an_unbroken_one(name):
    method = RIVALS[name]
    whole, blobs = fresh(method), {}

    def keep(step: int) -> None:
        if step + 1 in BREAKS:
            blobs[step + 1] = saved(*whole)

    train(*whole[:2], range(STEPS), whole[2], after_step=keep)
    whole[2].finish(calibrate=[batch(0)])
    train(*whole[:2], range(STEPS, STEPS + 3), whole[2])
    for step, blob in blobs.items():
        broken = resumed(blob, method)
        train(*broken[:2], range(step, STEPS), broken[2])
        broken[2].finish(calibrate=[batch(0)])
        train(*broken[:2], range(STEPS, STEPS + 3), broken[2])
        identical(whole, broken)
    assert same_bits(snapshot(whole[0]), snapshot(broken[0]))
    sizes = [t.weight.numel() for t in whole[2].problem.targets]
    assert [row["kept"] for row in whole[2].layers] == [n - round(0.8 * n) for n in sizes]
