"""Weights on a grid: the projection against enumeration, the scale against fine scans, and runs that end on the grid."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import reference
from dualprune import (
    ADMM,
    NM,
    SLR,
    Closing,
    DualpruneError,
    Filter,
    Geometric,
    GradualMagnitude,
    Magnitude,
    Reweighted,
    attach,
    load_sparse,
    save_sparse,
    sparsity_report,
)  # fmt: skip
from dualprune.export import describe
from dualprune.patterns import Unstructured
from dualprune.quantise import Held, check_bits, find_grid, fit_scale, nearest, snap, top_code
from dualprune.recipe import parse_recipe
from dualprune.schedules import as_schedule
from dualprune.scope import build_problem
from dualprune.solvers.base import Clock, Store
from helpers import TINY_RECIPE, accuracy, same_bits, sgd, snapshot, tiny_net, train
from test_resume import fresh, identical, resumed, saved

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
JOINT = {"slr": SLR(rho=Closing(1.0), hold=0.0), "admm": ADMM(rho=Geometric(0.1, 10.0, over=0.8))}


def error(w: Tensor, z: Tensor) -> float:
    return float((w.double() - z.double()).square().sum())


def rounded(x: float, scale: float, bits: int) -> float:
    """The nearest level, by looking at all of them."""
    top = 2 ** (bits - 1) - 1
    return min((q * scale for q in range(-top, top + 1)), key=lambda level: abs(x - level))


def least_error(w: list[float], supports: list[set[int]], scale: float, bits: int) -> float:
    """Over every support that is allowed and every choice of levels on it."""
    levels = [q * scale for q in range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))]
    outside = sum(x * x for x in w)
    return min(
        outside + sum((w[i] - q) ** 2 - w[i] ** 2 for i, q in zip(support, choice, strict=True))
        for support in supports
        for choice in itertools.product(levels, repeat=len(support))
    )


# ---------------------------------------------------------------------- the projection


@pytest.mark.parametrize("scale", [0.0625, 0.3125, 0.6875, 2.5])
@pytest.mark.parametrize("bits", [2, 3])
def test_largest_magnitudes_then_nearest_level_is_never_worse_than_enumeration(bits, scale):
    torch.manual_seed(bits)
    for kept in range(5):
        w = torch.randn(5, dtype=torch.float64)
        z = nearest(Unstructured().project(w, 1 - kept / 5), scale, bits)
        supports = [set(c) for c in itertools.combinations(range(5), kept)]
        assert error(w, z) == pytest.approx(least_error(w.tolist(), supports, scale, bits), abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3])
def test_n_of_m_too(bits):
    torch.manual_seed(bits)
    w = torch.randn(1, 4, dtype=torch.float64)
    pairs = [set(c) for c in itertools.combinations(range(4), 2)]
    z = nearest(NM(2, 4).project(w, 0.5), 0.375, bits)
    assert error(w, z) == pytest.approx(least_error(w[0].tolist(), pairs, 0.375, bits), abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("scale", [0.3125, 0.875])
def test_groups_ranked_by_energy_lose_no_more_than_the_rounding(bits, scale):
    """Ranking groups by energy is an approximation: worse than the best by at most the rounding error of what it keeps."""
    torch.manual_seed(0)
    for _ in range(20):
        w = torch.randn(4, 2, dtype=torch.float64)
        kept = Filter().project(w, 0.5)
        supports = [{2 * f + i for f in rows for i in (0, 1)} for rows in itertools.combinations(range(4), 2)]
        best = least_error(w.flatten().tolist(), supports, scale, bits)
        z = nearest(kept, scale, bits)
        assert best - 1e-12 <= error(w, z) <= best + error(kept, z) + 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_the_scale_of_few_values_is_the_best_there_is(bits, size):
    torch.manual_seed(size)
    w = torch.randn(size)
    scan = min(error(w, nearest(w, float(s), bits)) for s in torch.linspace(0.01, 1.1 * float(w.abs().max()), 4000))
    assert error(w, snap(w, bits)) <= scan * (1 + 1e-4) + 1e-12


SHAPES = {
    "normal": lambda n: torch.randn(n),
    "laplace": lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n,)),
    "sparse": lambda n: torch.where(torch.rand(n) < 0.1, torch.randn(n), 0),
    "pruned": lambda n: Unstructured().project(torch.randn(n), 0.9),
    "outlier": lambda n: torch.cat([torch.randn(n - 1), torch.tensor([60.0])]),
    "uniform": lambda n: torch.rand(n) + 3,
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1000, 150_000])
def test_the_scale_is_within_a_hundredth_of_a_fine_scan(bits, shape, size):
    torch.manual_seed(0)
    w = SHAPES[shape](size)
    most, top = float(w.abs().max()), top_code(bits)
    scan = torch.logspace(math.log10(most / top / 30), math.log10(most), 400 if size == 1000 else 80)
    assert error(w, snap(w, bits)) <= 1.01 * min(error(w, nearest(w, float(s), bits)) for s in scan)


# ---------------------------------------------------------------------- the grid


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_what_is_on_the_grid_stays(dtype, bits, spread):
    torch.manual_seed(bits)
    w = (spread * torch.randn(40, 50)).to(dtype)
    w[::3] = 0
    z = snap(w, bits)
    assert z.dtype == dtype and same_bits({"z": snap(z, bits)}, {"z": z})
    assert not torch.signbit(z[z == 0]).any() and not z[::3].any()
    grid = find_grid(z)
    assert grid is not None and grid.bits <= bits and len(z.unique()) <= 2 * top_code(bits) + 1
    assert same_bits({"z": nearest(z, grid.scale, bits)}, {"z": z})


def test_a_grid_whose_levels_are_rounding_ties_is_found():
    """One scale alone fits: the ends of what each level allows are the same number."""
    torch.manual_seed(763)
    z = snap(torch.randn(50).half(), 4)
    assert find_grid(z, 4) is not None and torch.equal(z, snap(z, 4))


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_exact_multiples(bits):
    torch.manual_seed(0)
    w = torch.randn(5000)
    scale = fit_scale(w, bits)
    codes = snap(w, bits).double() / scale
    assert torch.equal(codes, codes.round()) and codes.abs().max() == top_code(bits)
    assert scale == torch.tensor(scale).item(), "a float32"
    assert torch.equal(snap(w.double(), bits), snap(w, bits).double())


@pytest.mark.parametrize("dtype", FLOATS)
def test_layers_with_nothing_to_choose_are_settled(dtype):
    for w in (torch.zeros(3, 4), torch.full((3, 4), -0.7), torch.tensor([[0.0, 1.25, 0.0]]), torch.empty(0, 3)):
        assert torch.equal(snap(w.to(dtype), 2), w.to(dtype))
    assert fit_scale(torch.zeros(5, dtype=dtype), 3) == 1.0
    largest = torch.finfo(dtype).max
    extreme = torch.tensor([largest, -largest, largest / 3, 1e-7], dtype=dtype)
    assert snap(extreme, 4).isfinite().all()


def test_memory_layout_is_kept_and_the_input_untouched():
    w = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    before = w.clone()
    z = snap(w, 3)
    assert z.stride() == w.stride() and torch.equal(w, before)


def test_what_is_on_no_grid():
    torch.manual_seed(0)
    for values in (torch.randn(20), torch.zeros(4), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])):
        assert find_grid(values) is None
    assert find_grid(torch.arange(-127.0, 128)).bits == 8 and find_grid(torch.arange(129.0)) is None
    assert find_grid(torch.arange(8.0), bits=3) is None and find_grid(torch.arange(8.0), bits=4).top == 7
    assert find_grid(0.3 * torch.tensor([1.0, -3.0, 0.0])).top == 3
    assert find_grid(torch.tensor([2.0, -6.0, 4.0])) == find_grid(torch.tensor([2.0, 6.0, -4.0, 0.0]))


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 4.0, "4", True, None])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(DualpruneError, match="bits is a whole number from 2 to 8, got"):
        check_bits(bits)


# ---------------------------------------------------------------------- which layers


def test_bits_by_number_and_by_glob():
    net = tiny_net()

    def bits(asked, **options):
        return {t.name: t.bits for t in build_problem(net, sparsity=0.5, ignore=(), bits=asked, **options).targets}

    assert set(bits(4).values()) == {4} and set(bits(None).values()) == {None}
    assert bits({"3": 3, "*": 8}) == {"0.weight": 8, "3.weight": 3, "6.weight": 8, "10.weight": 8}
    assert bits({"6.weight": 2}) == {"0.weight": None, "3.weight": None, "6.weight": 2, "10.weight": None}
    assert "on a grid of 3 bits: 3.weight" in build_problem(net, sparsity=0.5, bits={"3": 3, "6": 8}).describe()


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (9, "bits is a whole number from 2 to 8, got 9"),
        ({"3": 1}, r"bits\['3'\] is a whole number.*got 1; one bit has no zero"),
        ({"3.wieght": 4}, "bits: '3.wieght' matches no parameter, did you mean '3.weight'"),
        ({"0.weight": 4}, r"bits: '0.weight' reaches nothing.*first layer.*patterns=\{'0.weight': 0.0\}"),
        ({"*.bias": 4}, "fewer than two dimensions"),
    ],
)
def test_bits_that_reach_nothing_are_refused(bits, said):
    with pytest.raises(DualpruneError, match=said):
        build_problem(tiny_net(), sparsity=0.5, bits=bits)


def test_the_recipe_takes_both_forms():
    assert parse_recipe(TINY_RECIPE, ["prune.bits=4"]).prune.bits == 4
    recipe = parse_recipe(TINY_RECIPE, ['prune.bits={"fc1"=3, "fc*"=8}'])
    assert recipe.prune.bits == {"fc1": 3, "fc*": 8} and parse_recipe(recipe.to_toml()) == recipe
    assert parse_recipe(TINY_RECIPE).fingerprint("slr", 0, "test") != recipe.fingerprint("slr", 0, "test")
    for wrong, said in (("bits=9", r"\[prune\] bits: bits is a whole"), ('bits={"a"=1}', "bits for 'a' is a whole")):
        with pytest.raises(DualpruneError, match=said):
            parse_recipe(TINY_RECIPE, [f"prune.{wrong}"])


# ---------------------------------------------------------------------- the solvers


def slow_project(values: reference.Layers, kept: list[int]) -> reference.Layers:
    """Keep the largest, then the best of every scale at which some code changes; three bits."""
    return [slow_snap(layer, reference.largest(layer, k)) for layer, k in zip(values, kept, strict=True)]


def slow_snap(layer: list[float], support: set[int]) -> list[float]:
    sparse = [x if i in support else 0.0 for i, x in enumerate(layer)]
    best, least = 1.0, math.inf
    for x, q in itertools.product([abs(x) for x in sparse if x], (1, 2, 3)):
        for start in (x / (q - 0.5) * 1.0000001, x / (q - 0.5) / 1.0000001):
            codes = [round(rounded(v, start, 3) / start) for v in sparse]
            if any(codes):
                scale = sum(v * c for v, c in zip(sparse, codes, strict=True)) / sum(c * c for c in codes)
                cost = sum((v - c * scale) ** 2 for v, c in zip(sparse, codes, strict=True))
                best, least = (scale, cost) if cost < least else (best, least)
    mantissa, exponent = math.frexp(best)
    return [rounded(v, round(mantissa * 2**17) / 2**17 * 2**exponent, 3) for v in sparse]


@pytest.mark.parametrize(
    "method", [SLR(rho=Geometric(0.05, 1.0, over=0.8), ramp=0.4, hold=0.0, cap=None), ADMM(rho=0.3)], ids=repr
)
def test_the_solvers_follow_their_slow_twins(method, monkeypatch):
    monkeypatch.setattr(reference, "project", slow_project)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.Linear(5, 4, bias=False)).double()
    problem = build_problem(model, sparsity=0.5, ignore=(), bits=3)
    solver = method.start(problem, Store())
    W = [t.flatten().tolist() for t in problem.weights]
    if isinstance(method, SLR):
        twin = reference.SLRTwin(W, 0.5, method.s0, method.M, method.r, ramp=method.ramp, curve=method.curve)
    else:
        twin = reference.ADMMTwin(W, 0.5, 0.0)
    for update in range(40):
        for w in problem.weights:
            w.add_(torch.randn(w.shape, dtype=w.dtype), alpha=0.1)
        solver.update(Clock(None, update / 40))
        twin.update([t.flatten().tolist() for t in problem.weights], as_schedule(method.rho, "rho")(update / 40), update / 40)
        for name, theirs in (("Z", twin.Z), ("lam", twin.lam)):
            for tensor, layer in zip(solver.tensors[name], theirs, strict=True):
                torch.testing.assert_close(tensor.flatten(), torch.tensor(layer, dtype=tensor.dtype), rtol=1e-6, atol=1e-8)


def test_where_nothing_is_quantised_nothing_changes():
    problem = build_problem(tiny_net(), sparsity=0.5)
    points, masks = problem.project(problem.weights)
    assert all(p is w or p.data_ptr() == w.data_ptr() for p, w in zip(points, problem.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(masks, problem.masks(problem.weights), strict=True))


def regression(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs, outputs and the dense solution."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 24, generator=g) @ (torch.randn(24, 24, generator=g) / 24**0.5 + torch.eye(24))
    y = x @ torch.randn(24, 4, generator=g) + 0.1 * torch.randn(256, 4, generator=g)
    return x, y, torch.linalg.lstsq(x, y).solution.T.contiguous()


def regress(seed: int, method: object, bits: int | None, steps: int = 400) -> nn.Linear:
    x, y, w = regression(seed)
    model = nn.Linear(24, 4, bias=False)
    model.weight.data = w
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    pruner = attach(
        model, optimizer, method, sparsity=0.5, ignore=(), bits=bits, importance="magnitude", total_steps=steps, every=8
    )
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / steps))
        loss = (model(x) - y).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    pruner.finish()
    return model


def loss_of(seed: int, model: nn.Linear) -> float:
    x, y, _ = regression(seed)
    return (model(x) - y).square().sum(1).mean().item()


@pytest.mark.parametrize(("name", "bits", "at_most"), [("slr", 2, 0.8), ("admm", 2, 0.8), ("admm", 3, 0.95)])
def test_one_objective_beats_pruning_and_then_rounding(name, bits, at_most):
    joint, after = [], []
    for seed in range(3):
        joint.append(loss_of(seed, regress(seed, JOINT[name], bits)))
        pruned = regress(seed, JOINT[name], None)
        pruned.weight.data = snap(pruned.weight.detach(), bits)
        after.append(loss_of(seed, pruned))
    assert sum(joint) < at_most * sum(after)


@pytest.mark.parametrize("name", JOINT)
def test_it_ends_on_the_grid_with_exactly_k(name):
    model = regress(0, JOINT[name], 4)
    (layer,) = sparsity_report(model).layers
    assert layer.kept == 48 and layer.bits == 4 and layer.levels <= 15


@pytest.mark.parametrize(
    "method", [SLR(), ADMM(), Reweighted(), GradualMagnitude(), Magnitude()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("pattern", [None, "filter", "2:4"])
def test_every_method_and_pattern_ends_on_its_grids(method, pattern, tmp_path):
    net = tiny_net()
    optimizer = None if isinstance(method, Magnitude) else sgd(net)
    patterns = {"3": pattern, "6": pattern} if pattern else None
    options = {"ignore": ("0", "10"), "patterns": patterns, "bits": {"3": 3, "6": 5}, "total_steps": 40, "every": 5}
    pruner = attach(net, optimizer, method, sparsity=0.5, **options)
    if optimizer is not None:
        train(net, optimizer, range(40), pruner)
    pruner.finish()
    for target in pruner.problem.targets:
        assert target.pattern.contains(target.weight.detach(), target.sparsity)
        assert find_grid(target.weight).bits <= target.bits
    bits = {layer.name: layer.bits for layer in sparsity_report(net).layers}
    assert bits["0.weight"] is None and bits["10.weight"] is None
    assert [layer["bits"] for layer in pruner.layers] == [3, 5] and "5 bits" in pruner.summary()
    assert same_bits({n: net.get_parameter(n) != 0 for n in pruner.masks}, pruner.masks)
    save_sparse(net, tmp_path / "f")
    rows = {row["name"]: row for row in describe(tmp_path / "f")}
    assert rows["3.weight"]["value_bits"] <= 3 and rows["6.weight"]["value_bits"] <= 5
    assert same_bits(load_sparse(tmp_path / "f"), net.state_dict())


def test_only_quantised_is_pruned_at_sparsity_zero():
    net = tiny_net()
    attach(net, None, Magnitude(), sparsity=0.0, ignore=(), bits=6).finish()
    assert [layer.bits for layer in sparsity_report(net).layers] == [6] * 4 and accuracy(net) >= 0


# ---------------------------------------------------------------------- held on the grid


def test_a_held_weight_follows_the_steps_from_level_to_level():
    held = Held(torch.tensor([0.9, 0.2, -1.4, 0.0]), 1.0, 3)
    w = held.levels
    assert w.tolist() == [1, 0, -1, 0]
    w += torch.tensor([-0.3, 0.2, -0.2, 0.0])  # an optimizer's step
    held.follow_(w)
    torch.testing.assert_close(held.latent, torch.tensor([0.6, 0.4, -1.6, 0.0]))
    assert w.tolist() == [1, 0, -2, 0]
    w += torch.tensor([-0.3, 0.2, 0.0, 0.0])
    held.follow_(w)
    assert w.tolist() == [0, 1, -2, 0]


@pytest.mark.parametrize(
    ("method", "on_grid"), [(SLR(), False), (SLR(hold=0.0), True), (SLR(pull="everywhere"), True)], ids=repr
)
def test_z_is_on_the_grid_where_no_hold_brings_the_weights_there(method, on_grid):
    net, optimizer, pruner = fresh(method, bits=3)
    train(net, optimizer, range(12), pruner)
    assert not pruner.holding and pruner.history
    for target, z in zip(pruner.problem.targets, pruner.solver.tensors["Z"], strict=True):
        grid = find_grid(z)
        assert (grid is not None and grid.bits <= 3) is on_grid, target.name
        share = float(z.count_nonzero()) / z.numel()
        assert share < 1 - method.asked(pruner.progress, target.sparsity) + 0.5 / z.numel() + 0.02


def test_a_small_grid_does_not_shrink_the_set_ahead_of_the_ramp():
    """Rounding to two bits takes most small weights; while nearly all are asked for, nearly all have to stay."""
    _, _, pruner = fresh(SLR(), bits=2)
    shares = [float(z.count_nonzero()) / z.numel() for z in pruner.solver.tensors["Z"]]
    assert min(shares) > 0.99


def test_in_the_hold_weights_are_on_one_grid_and_move():
    net, optimizer, pruner = fresh(SLR(ramp=0.5, hold=0.5), bits=3)
    seen: dict[str, list[Tensor]] = {"3.weight": [], "6.weight": []}

    def look(step: int) -> None:
        for name, weights in seen.items():
            weights.append(net.get_parameter(name).detach().clone())

    train(net, optimizer, range(24), pruner, after_step=look)
    for name, weights in seen.items():
        held = weights[12:]
        assert find_grid(torch.stack(held)).bits <= 3 and find_grid(weights[5]) is None
        assert not torch.equal(held[0], held[-1])
        dropped = pruner._drops[[t.name for t in pruner.problem.targets].index(name)]
        assert not any(w[dropped].any() for w in held)


@pytest.mark.parametrize("method", [SLR(), SLR(hold=0.0), GradualMagnitude()], ids=repr)
def test_after_finish_the_grid_stays_and_the_rest_learns(method):
    net, optimizer, pruner = fresh(method, bits={"3": 2})
    train(net, optimizer, range(24), pruner)
    pruner.finish()
    before = snapshot(net)
    train(net, optimizer, range(24, 40), pruner)
    after = snapshot(net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "3.weight" not in moved and {"3.bias", "6.weight", "0.weight", "1.weight", "10.bias"} <= moved
    assert find_grid(after["3.weight"]).bits == 2 and find_grid(after["6.weight"]) is None
    pruner.detach()
    train(net, optimizer, range(3))
    assert not torch.equal(net[3].weight, before["3.weight"]), "nothing holds it any more"


@pytest.mark.parametrize("method", [SLR(hold=0.0), SLR(), Magnitude()], ids=repr)
def test_evaluate_shows_what_finish_gives(method):
    net, optimizer, pruner = fresh(method, bits=3)
    train(net, optimizer, range(22), pruner)
    before = snapshot(net)
    with pruner.evaluate():
        inside = snapshot(net)
        assert find_grid(net[3].weight).bits <= 3
    assert same_bits(snapshot(net), before)
    masks = pruner.masks
    pruner.finish()
    assert same_bits(snapshot(net), inside) and same_bits(pruner.masks, masks)


@pytest.mark.parametrize("method", [SLR(), ADMM(hold=0.2), GradualMagnitude()], ids=lambda m: type(m).__name__)
def test_a_run_broken_anywhere_ends_like_an_unbroken_one(method):
    whole = fresh(method, bits={"3": 3, "6": 4})
    blobs = {}

    def keep(step: int) -> None:
        if step + 1 in (5, 8, 21, 23):
            blobs[step + 1] = saved(*whole)

    train(*whole[:2], range(24), whole[2], after_step=keep)
    whole[2].finish()
    at_end = saved(*whole)
    train(*whole[:2], range(24, 28), whole[2])
    for step, blob in [*blobs.items(), (24, at_end)]:
        broken = resumed(blob, method, bits={"3": 3, "6": 4})
        train(*broken[:2], range(step, 24), broken[2])
        broken[2].finish()
        train(*broken[:2], range(24, 28), broken[2])
        identical(broken, whole)


def test_a_state_of_other_bits_is_refused():
    net, optimizer, pruner = fresh(SLR(), bits=3)
    train(net, optimizer, range(22), pruner)
    for bits in (4, None, {"3": 3}):
        with pytest.raises(DualpruneError, match=r"another pruning problem.*3 bits.*bits"):
            fresh(SLR(), bits=bits)[2].load_state_dict(pruner.state_dict())
    state = pruner.state_dict()
    for change in ({"grid.3.weight": torch.zeros(2)}, {"grid.6.weight": state["grid.6.weight"].half()}):
        with pytest.raises(DualpruneError, match=r"expected torch\.float32"):
            fresh(SLR(), bits=3)[2].load_state_dict(state | change)
    with pytest.raises(DualpruneError, match=r"expected a state with .*grid"):
        fresh(SLR(), bits=3)[2].load_state_dict({k: v for k, v in state.items() if not k.startswith("grid")})
    for scales in ({}, {"3.weight": 0.0}, {"3.weight": "1"}, {"3.weight": math.nan}):
        meta = json.dumps(json.loads(bytes(state["meta"].numpy())) | {"scales": scales}).encode()
        with pytest.raises(DualpruneError, match=r"scale of 3\.weight's grid is a positive number"):
            fresh(SLR(), bits=3)[2].load_state_dict(state | {"meta": torch.frombuffer(bytearray(meta), dtype=torch.uint8)})


# ---------------------------------------------------------------------- others' int8


def test_int8_afterwards_keeps_the_zeros():
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao", exc_type=ImportError)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()
    attach(net, None, Magnitude(), sparsity=0.9, ignore=()).finish()
    zeros = {name: p == 0 for name, p in net.named_parameters() if p.ndim > 1}
    x = torch.randn(8, 64)
    before = net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own
        torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    for name, zero in zeros.items():
        weight = net.get_parameter(name)
        assert weight.qdata.dtype == torch.int8 and not weight.qdata[zero].any()
        assert not weight.dequantize()[zero].any() and zero.sum() >= 0.89 * zero.numel()
    torch.testing.assert_close(net(x), before, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [50, 200_000])  # every choice is tried, and scanned
def test_tensors_need_not_be_on_the_default_device(size: int, bits: int) -> None:
    w = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected, grid = snap(w, bits), find_grid(snap(w, bits))
    with torch.device("meta"):
        assert torch.equal(snap(w, bits), expected)
        assert find_grid(expected) == grid
