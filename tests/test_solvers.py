from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dualprune import ADMM, SLR, Constant, DualpruneError, Geometric, GradualMagnitude, Magnitude
from dualprune.problem import Problem
from dualprune.schedules import as_schedule
from dualprune.scope import build_problem
from dualprune.solvers.base import Clock, DualSolver, Method, Store
from dualprune.solvers.slr import slr_update
from dualprune.solvers.vector import lagrangian_terms
from reference import ADMMTwin, GradualTwin, Layers, SLRTwin

SPARSITY = 0.7
UPDATES = 100
RHO = Geometric(0.05, 1.0, over=0.8)


def two_layers(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Problem]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Linear(5, 4, bias=False)).to(dtype)
    return model, build_problem(model, sparsity=SPARSITY, ignore=())


def as_lists(tensors: list[Tensor]) -> Layers:
    return [t.detach().flatten().tolist() for t in tensors]


def random_walk(problem: Problem, seed: int = 1) -> Iterator[float]:
    """Move W a little, as an optimizer would, and yield the progress; some steps are large, so that conditions vary."""
    random = torch.Generator().manual_seed(seed)
    for update in range(UPDATES):
        for w in problem.weights:
            w.add_(torch.randn(w.shape, generator=random, dtype=w.dtype), alpha=0.3 if update % 3 == 0 else 0.03)
        yield update / UPDATES


def losses(kind: str, seed: int = 2) -> Callable[[int], float | None]:
    values = torch.rand(UPDATES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    if kind == "none":
        return lambda update: None
    if kind == "gaps":  # a loop that observes now and then
        return lambda update: None if update % 7 == 3 else values[update]
    return lambda update: values[update]


def assert_same(mine: list[Tensor], theirs: Layers) -> None:
    for tensor, layer in zip(mine, theirs, strict=True):
        torch.testing.assert_close(tensor.flatten(), torch.tensor(layer, dtype=tensor.dtype), rtol=1e-9, atol=1e-11)


def slr(**changes: object) -> SLR:
    settings = {"rho": 0.3, "s0": 0.05, "M": 20.0, "r": 0.3, "cap": None, "ramp": 0.0, "hold": 0.0, "pull": "everywhere"}
    return SLR(**settings | changes)


# ---------------------------------------------------------------------- against the slow twins


@pytest.mark.parametrize("loss", ["none", "every", "gaps"])
@pytest.mark.parametrize(
    "method",
    [
        slr(),
        slr(cap=1.0),
        slr(rho=RHO),
        slr(rho=RHO, ramp=0.4, cap=0.5),
        slr(step_rule="as_printed"),
        slr(rho=RHO, ramp=0.4, cap=0.5, pull="outside"),
        slr(rho=RHO, ramp=0.4, cap=0.5, curve="geometric"),
    ],
    ids=["constant", "capped", "rho grows", "set shrinks", "as printed", "Z follows", "set shrinks by factors"],
)
def test_slr_follows_its_slow_twin(method: SLR, loss: str) -> None:
    _, problem = two_layers()
    solver = method.start(problem, Store())
    cap = math.inf if method.cap is None else method.cap
    twin = SLRTwin(
        as_lists(problem.weights), SPARSITY, method.s0, method.M, method.r, method.step_rule, cap, method.ramp,
        follows=method.pull == "outside", curve=method.curve,
    )  # fmt: skip
    assert_same(solver.tensors["Z"], twin.Z)
    loss_at = losses(loss)
    seen = {"condition_w": set(), "condition_z": set()}
    for update, progress in enumerate(random_walk(problem)):
        f = loss_at(update)
        row = solver.update(Clock(f, progress))
        expected = twin.update(as_lists(problem.weights), as_schedule(method.rho, "rho")(progress), progress, f)
        for key, value in expected.items():
            assert row[key] == (value if isinstance(value, bool) else pytest.approx(value, rel=1e-8)), (update, key)
        assert_same(solver.tensors["Z"], twin.Z)
        assert_same(solver.tensors["lam"], twin.lam)
        for key, values in seen.items():
            values.add(row[key])
    assert seen["condition_w"] == {True, False}, "the walk must exercise both answers"
    assert solver.scalars["k"] == twin.k == UPDATES + 1


@pytest.mark.parametrize(
    "method", [ADMM(rho=0.3), ADMM(rho=RHO), ADMM(rho=RHO, ramp=0.5), ADMM(rho=RHO, ramp=0.5, curve="geometric")], ids=repr
)
def test_admm_follows_its_slow_twin(method: ADMM) -> None:
    _, problem = two_layers()
    solver = method.start(problem, Store())
    twin = ADMMTwin(as_lists(problem.weights), SPARSITY, method.ramp, method.curve)
    for progress in random_walk(problem):
        row = solver.update(Clock(None, progress))
        expected = twin.update(as_lists(problem.weights), as_schedule(method.rho, "rho")(progress), progress)
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-8)
        assert_same(solver.tensors["Z"], twin.Z)
        assert_same(solver.tensors["lam"], twin.lam)


@pytest.mark.parametrize("curve", ["cubic", "geometric"])
def test_gradual_magnitude_follows_its_slow_twin(curve: str) -> None:
    _, problem = two_layers()
    solver = GradualMagnitude(over=0.6, curve=curve).start(problem, Store())
    twin = GradualTwin(SPARSITY, over=0.6, curve=curve)
    last = [torch.zeros_like(w, dtype=torch.bool) for w in problem.weights]
    for progress in random_walk(problem):
        row = solver.update(Clock(None, progress))
        expected = twin.update(as_lists(problem.weights), progress)
        drops = solver.tensors["drop"]
        flipped = sum(int((a != b).sum()) for a, b in zip(drops, last, strict=True))
        assert row["support_change"] == pytest.approx(flipped / sum(d.numel() for d in drops))
        last = [d.clone() for d in drops]
        for w, drop in zip(problem.weights, drops, strict=True):
            w.masked_fill_(drop, 0)
        assert as_lists(problem.weights) == expected
    kept = [int((~d).sum()) for d in last]
    assert kept == [d.numel() - round(SPARSITY * d.numel()) for d in last]


def test_one_shot_has_nothing_to_carry() -> None:
    _, problem = two_layers()
    solver = Magnitude().start(problem, Store())
    assert (solver.tensors, solver.scalars) == ({}, {})
    assert solver.update(Clock(None, 0.5)) == {"support_change": 0.0}


# ---------------------------------------------------------------------- what the proof needs


def test_contraction_holds_to_rounding() -> None:
    """s_k‖g_k‖ = α_k s_{k−1}‖g_{k−1}‖ at every ascent, g recomputed from W and Z."""
    _, problem = two_layers()
    method = slr()
    solver = method.start(problem, Store())
    length = method.s0 * _violation(solver)
    ascents = 0
    for k, progress in enumerate(random_walk(problem), 1):
        row = solver.update(Clock(None, progress))
        ups = row["condition_w"] + row["condition_z"]
        length *= (1 - 1 / (method.M * k ** (1 - 1 / k**method.r))) ** ups
        ascents += ups
        g = _violation(solver) if row["condition_z"] else row["violation_before"]
        if ups:
            assert row["s"] * g == pytest.approx(length, rel=1e-12)
    assert ascents > UPDATES, "some updates must ascend twice"


@pytest.mark.parametrize(("rule", "longest"), [("contraction", 1.0), ("as_printed", 1e3)])
def test_as_printed_breaks_the_contraction(rule: str, longest: float) -> None:
    """With an optimizer that brings W halfway to Z, steps as printed grow; contracting ones never exceed the first."""
    _, problem = two_layers()
    solver = slr(step_rule=rule).start(problem, Store())
    first, lengths = 0.05 * _violation(solver), []
    for update in range(30):
        for w, z in zip(problem.weights, solver.tensors["Z"], strict=True):
            w.lerp_(z, 0.5)
        row = solver.update(Clock(None, update / 30))
        if row["condition_z"]:
            lengths.append(row["s"] * row["violation"] / first)
    assert lengths
    assert max(lengths) <= 1 if rule == "contraction" else max(lengths) > longest


@pytest.mark.parametrize("rule", ["contraction", "as_printed"])
def test_conditions_are_those_of_the_definition(rule: str) -> None:
    """L_ρ recomputed on whole copies of the last W, with a ρ that grows, against the solver's two scalars."""
    _, problem = two_layers()
    method = slr(rho=RHO, step_rule=rule)
    solver = method.start(problem, Store())
    W_prev, f_prev, loss_at = [w.clone() for w in problem.weights], math.inf, losses("every")
    for update, progress in enumerate(random_walk(problem)):
        f, rho = loss_at(update), RHO(progress)
        Z, lam = ([t.clone() for t in solver.tensors[name]] for name in ("Z", "lam"))
        row = solver.update(Clock(f, progress))
        expected = f + _penalty(problem.weights, Z, lam, rho) < f_prev + _penalty(W_prev, Z, lam, rho)
        assert row["condition_w"] is expected
        W_prev, f_prev = [w.clone() for w in problem.weights], f


@pytest.mark.parametrize(
    "method", [slr(rho=2.0), slr(cap=1.0), slr(rho=RHO, cap=0.3), slr(rho=RHO, ramp=0.6, cap=0.01, s0=9.0)]
)
def test_cap_limits_the_step(method: SLR) -> None:
    _, problem = two_layers()
    solver = method.start(problem, Store())
    rows = [solver.update(Clock(None, progress)) for progress in random_walk(problem)]
    moved = [r for r in rows if r["condition_w"] or r["condition_z"]]
    within = all(r["s"] <= method.cap * r["rho"] * (1 + 1e-12) for r in moved) if method.cap else None
    assert moved
    assert within is not False


def test_step_stays_at_s0_while_the_set_shrinks_and_contracts_after() -> None:
    _, problem = two_layers()
    solver = slr(rho=0.3, s0=0.07, ramp=0.5).start(problem, Store())
    steps = [(p, solver.update(Clock(None, p))["s"]) for p in random_walk(problem)]
    assert {s for p, s in steps if p < 0.5} == {0.07}
    assert len({s for p, s in steps if p >= 0.5}) > 10


@pytest.mark.parametrize("curve", ["cubic", "geometric"])
def test_the_set_shrinks_and_masks_are_nested_in_size(curve: str) -> None:
    _, problem = two_layers()
    solver = slr(ramp=0.5, curve=curve).start(problem, Store())
    kept = []
    for progress in random_walk(problem):
        solver.update(Clock(None, progress))
        kept.append(sum(int(torch.count_nonzero(z)) for z in solver.tensors["Z"]))
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (44, 44 - round(0.7 * 24) - round(0.7 * 20))


def test_already_sparse_weights_do_not_freeze_the_step() -> None:
    """W⁰ in the set has no violation; the first one to appear must be answered with about s₀, not with 0."""
    _, problem = two_layers()
    for w, mask in zip(problem.weights, problem.masks(problem.weights), strict=True):
        w.mul_(mask)
    solver = slr(s0=0.05).start(problem, Store())
    assert solver.scalars["g_last"] == 0
    assert solver.update(Clock(None, 0.0))["s"] == 0.05  # W has not moved: nothing to correct
    rows = [solver.update(Clock(0.0, p)) for p in random_walk(problem)]
    assert 0.005 < rows[0]["s"] < 0.1
    assert all(r["s"] > 0 for r in rows)


def test_dual_bound_and_lagrangian_of_admm_and_slr() -> None:
    for method in (slr(), ADMM(rho=0.3)):
        _, problem = two_layers()
        solver = method.start(problem, Store())
        for progress in random_walk(problem):
            row = solver.update(Clock(2.5, progress))
            L = 2.5 + _penalty(problem.weights, solver.tensors["Z"], solver.tensors["lam"], row["rho"])
            assert row["lagrangian"] == pytest.approx(L, rel=1e-9)
            assert row["dual_bound"] == pytest.approx(L + row["s"] * row["violation"] ** 2, rel=1e-9)


def test_support_change_counts_flipped_masks() -> None:
    _, problem = two_layers()
    solver = ADMM(rho=0.3).start(problem, Store())
    last = [z != 0 for z in solver.tensors["Z"]]
    seen = set()
    for progress in random_walk(problem):
        row = solver.update(Clock(None, progress))
        now = [z != 0 for z in solver.tensors["Z"]]
        assert row["support_change"] == pytest.approx(sum(int((a ^ b).sum()) for a, b in zip(now, last, strict=True)) / 44)
        seen.add(row["support_change"])
        last = now
    assert len(seen) > 1


# ---------------------------------------------------------------------- the traps of public code


@pytest.mark.parametrize("method", [SLR(rho=RHO), SLR.paper(), ADMM(), ADMM.paper()], ids=repr)
def test_state_shares_no_memory_with_the_model(method: Method) -> None:
    model, problem = two_layers()
    solver = method.start(problem, Store())
    for progress in random_walk(problem):
        solver.update(Clock(1.0, progress))
        places = {p.untyped_storage().data_ptr() for p in model.parameters()}
        state = [t for tensors in solver.tensors.values() for t in tensors]
        assert len({t.untyped_storage().data_ptr() for t in state}) == len(state) == 4
        assert not places & {t.untyped_storage().data_ptr() for t in state}
    kept = [t.clone() for t in state]
    for p in model.parameters():
        p.detach().fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert set(solver.tensors) == {"Z", "lam"}, "two tensors a weight and no more"


@pytest.mark.parametrize("method", [slr(), ADMM(rho=0.3), GradualMagnitude()], ids=lambda m: type(m).__name__)
def test_update_keeps_no_graph_and_leaves_the_weights_alone(method: Method) -> None:
    model, problem = two_layers()
    solver = method.start(problem, Store())
    for progress in random_walk(problem):
        weights = [p.detach().clone() for p in model.parameters()]
        model[1](torch.ones(5, dtype=torch.float64)).sum().backward()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        solver.update(Clock(1.0, progress))  # grad mode is on
        assert all(t.grad_fn is None and not t.requires_grad for ts in solver.tensors.values() for t in ts)
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert all(g is None or torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("method", [slr(), ADMM(rho=0.3)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [None, torch.bfloat16, torch.float32])
def test_state_dtype(method: Method, weights: torch.dtype, state: torch.dtype | None) -> None:
    _, problem = two_layers(weights)
    solver = method.start(problem, Store(state))
    for progress in random_walk(problem):
        row = solver.update(Clock(1.0, progress))
        assert all(t.dtype == (state or weights) for ts in solver.tensors.values() for t in ts)
        assert math.isfinite(row["lagrangian"])
        kept = [z.numel() - round(SPARSITY * z.numel()) for z in solver.tensors["Z"]]
        assert all(int(torch.count_nonzero(z)) <= k for z, k in zip(solver.tensors["Z"], kept, strict=True))


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_penalty_leaves_the_gradient_on_the_support_as_it_is(weights: torch.dtype, scale: float | None) -> None:
    """W = Z and Λ = 0 there; ρW and ρZ, added one after the other, would round a narrow gradient to 0."""
    model, problem = two_layers(weights)
    solver = ADMM(rho=1.0).start(problem, Store())
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-4)
    with torch.no_grad():
        solver.penalty_(None if scale is None else torch.tensor(scale))
    for p, z in zip(model.parameters(), solver.tensors["Z"], strict=True):
        assert torch.equal(p.grad[z != 0], torch.full_like(p.grad[z != 0], 1e-4))
        torch.testing.assert_close(p.grad[z == 0], (scale or 1.0) * p.detach()[z == 0], rtol=0.01, atol=2e-4)


def test_channels_last_weights_give_the_same_numbers() -> None:
    rows = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False)).to(memory_format=layout).double()
        problem = build_problem(model, sparsity=SPARSITY, ignore=())
        solver = slr().start(problem, Store())
        assert solver.tensors["Z"][0].stride() == model[0].weight.stride()
        rows.append([solver.update(Clock(None, p)) for p in random_walk(problem)])
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


# ---------------------------------------------------------------------- the frozen values


def test_paper_constants() -> None:
    published = {"step_rule": "contraction", "pull": "everywhere", "cap": None, "ramp": 0, "hold": 0}
    assert SLR.paper() == SLR(rho=0.1, s0=0.01, M=300, r=0.1, **published)
    assert ADMM.paper() == ADMM(rho=0.1)
    assert not SLR.paper().needs_total_steps
    assert not ADMM.paper().needs_total_steps
    assert not Magnitude().needs_total_steps
    assert all(m.needs_total_steps for m in (SLR(), ADMM(), GradualMagnitude(), slr(hold=0.1), slr(ramp=0.1)))
    assert (SLR(hold=0.25).hold_from, SLR.paper().hold_from) == (0.75, math.inf)
    assert slr(rho=Constant(0.3)).start(two_layers()[1], Store()).scalars["rho"] == 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SLR(M=1.0), r"1|M > 1"),
        (lambda: SLR(r=1.0), r"r < 1, got .*r=1.0"),
        (lambda: SLR(s0=0.0), r"SLR\(s0\) expects a positive finite number, got 0.0"),
        (lambda: SLR(s0=math.nan), r"SLR\(s0\) .*got nan"),
        (lambda: SLR(s0=math.inf), r"SLR\(s0\) .*got inf"),
        (lambda: SLR(s0="a"), r"SLR\(s0\) .*got 'a'"),
        (lambda: SLR(cap="x"), r"SLR\(cap\).*or None, got 'x'"),
        (lambda: SLR(ramp=0.6, hold=0.5), r"ramp=0.6 and hold=0.5 .* sum to at most 1"),
        (lambda: SLR(rho=0), r"SLR\(rho\) expects a positive finite number, got 0"),
        (lambda: SLR(rho="0.1"), r"SLR\(rho\) expects a positive number or a schedule .*got '0.1'"),
        (lambda: ADMM(rho=-1.0), r"ADMM\(rho\) expects a positive finite number, got -1.0"),
        (lambda: ADMM(rho=True), r"ADMM\(rho\)"),
        (lambda: SLR(step_rule="as_prnted"), r"step_rule.*did you mean 'as_printed'"),
        (lambda: SLR(curve="cubik"), r"SLR\(curve\) is one of .*did you mean 'cubic'"),
        (lambda: GradualMagnitude(curve="geometry"), r"GradualMagnitude\(curve\) is one of .*did you mean 'geometric'"),
        (lambda: SLR(pull="outsid"), r"SLR\(pull\) is one of .*did you mean 'outside'"),
        (lambda: SLR(cap=0), r"cap.*got 0"),
        (lambda: SLR(cap=math.nan), r"cap.*got nan"),
        (lambda: SLR(ramp=1.5), r"SLR\(ramp\) is a fraction of the run in \[0, 1\], got 1.5"),
        (lambda: ADMM(hold=-0.1), r"ADMM\(hold\) is a fraction of the run"),
        (lambda: GradualMagnitude(over=0), r"use Magnitude\(\)"),
        (lambda: GradualMagnitude(over=75), r"GradualMagnitude\(over\) is a fraction of the run in \[0, 1\], got 75"),
    ],
)  # fmt: skip
def test_constants_out_of_range_are_refused(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(DualpruneError, match=message):
        make()


def _violation(solver: DualSolver) -> float:
    gaps = [(w - z).flatten() for w, z in zip(solver.problem.weights, solver.tensors["Z"], strict=True)]
    return float(torch.cat(gaps).norm())


def _penalty(W: list[Tensor], Z: list[Tensor], lam: list[Tensor], rho: float) -> float:
    gaps = [w - z for w, z in zip(W, Z, strict=True)]
    inner = sum(float((m * g).sum()) for m, g in zip(lam, gaps, strict=True))
    return inner + rho / 2 * sum(float(g.square().sum()) for g in gaps)


@pytest.mark.parametrize("seed", range(20))
def test_a_copy_that_stays_where_it_is_lowers_nothing_whatever_rounding_says(seed: int) -> None:
    """Both sides of eq. 11 are one number then, summed in two ways: about half of these would come out lower."""
    torch.manual_seed(seed)
    W = torch.randn(1000)
    support = W.abs() > 1.5
    Z, lam = W * support, torch.randn(1000) * 1e-3 * ~support
    terms = lagrangian_terms([W], [Z], [lam])
    settings = {"terms": terms, "rho": 0.5, "f": 0.0, "L_prev": math.inf, "step": lambda violation: 0.1}
    row = slr_update([W], [Z], [lam], lambda V: [(v, support) for v in V], **settings)
    assert row["z_change"] == 0 and row["condition_w"] and not row["condition_z"]
