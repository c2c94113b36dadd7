"""Kernel patterns against enumeration and a slow twin, and inside every method and budget."""

from __future__ import annotations

import math
import pickle
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dualprune import (
    ADMM,
    SLR,
    DualpruneError,
    GradualMagnitude,
    KernelPattern,
    Magnitude,
    Reweighted,
    Unstructured,
    attach,
    parse_pattern,
    project,
)
from dualprune.scope import build_problem
from helpers import sgd, tiny_net, train

FIXED = settings(deadline=None, max_examples=60, derandomize=True)
SET = ((0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7))
OWN = 5 / 9


def integers(data: st.DataObject, kernels: int, low: int = -3, high: int = 3) -> Tensor:
    drawn = data.draw(st.lists(st.integers(low, high), min_size=9 * kernels, max_size=9 * kernels))
    return torch.tensor(drawn, dtype=torch.float64).view(kernels, 1, 3, 3)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", [KernelPattern(4, 3), KernelPattern(4, SET)])
def test_tensors_need_not_be_on_the_default_device(pattern: KernelPattern) -> None:
    w = gaussian(6, 5, 3, 3)
    expected = pattern.mask(w, 0.7)
    with torch.device("meta"):
        mask = pattern.mask(w, 0.7)
        learnt = KernelPattern.learn(w, 4, 3)
        assert pattern.contains(w * mask, 0.7)
    assert torch.equal(mask, expected)
    assert learnt == KernelPattern.learn(w, 4, 3)


# ---------------------------------------------------------------------- slow twins, on lists of floats


def nearest_member(w: Tensor, patterns: tuple[tuple[int, ...], ...], kept: int, whole: int) -> float:
    """Return the least ‖w − z‖² over every choice: `whole` kernels untouched, else `kept` kernels patterned, the rest zero."""
    rows = [[float(x) for x in row] for row in w.reshape(-1, 9)]
    choices: list[list[tuple[str, float]]] = []
    for row in rows:
        energy = sum(x * x for x in row)
        patterned = [("kept", energy - sum(row[i] ** 2 for i in p)) for p in patterns]
        choices.append([("whole", 0.0), ("none", energy), *patterned])
    best = math.inf
    for chosen in product(*choices):
        words = [word for word, _ in chosen]
        if words.count("whole") <= whole and (whole or words.count("kept") <= kept):
            best = min(best, sum(cost for _, cost in chosen))
    return best


def twin_set(w: Tensor, entries: int, count: int) -> list[tuple[int, ...]]:
    naturals = []
    for row in w.reshape(-1, 9).tolist():
        order = sorted(range(9), key=lambda i: (-abs(row[i]), i))[:entries]
        naturals.append({i for i in order if row[i] != 0})
    left, found = [n for n in naturals if n], []
    while not found or (left and len(found) < count):
        every = list(combinations(range(9), entries))
        found.append(max(every, key=lambda p: (sum(n <= set(p) for n in left), -every.index(p))))
        left = [n for n in left if not n <= set(found[-1])]
    return sorted(found)


# ---------------------------------------------------------------------- the projection


@FIXED
@given(data=st.data(), kernels=st.integers(1, 4))
def test_a_fixed_set_is_projected_on_exactly(data: st.DataObject, kernels: int) -> None:
    w, pattern = integers(data, kernels), KernelPattern(4, SET)
    for kept in range(kernels + 1):
        sparsity = 1 - 4 * kept / (9 * kernels)
        z = project(w, pattern, sparsity)
        assert float((w - z).square().sum()) == nearest_member(w, SET, kept, 0)
        assert pattern.contains(z, sparsity)
        assert torch.equal(project(z, pattern, sparsity), z)
        assert pattern.kept(tuple(w.shape), sparsity) == kept
    for whole in range(1, kernels + 1):
        sparsity = 5 * (kernels - whole) / (9 * kernels)
        z = project(w, pattern, sparsity)
        assert float((w - z).square().sum()) == nearest_member(w, SET, kernels, whole)
        assert pattern.contains(z, sparsity)
        assert torch.equal(project(z, pattern, sparsity), z)


@FIXED
@given(data=st.data(), kernels=st.integers(1, 12), entries=st.integers(1, 8), count=st.integers(1, 5))
def test_the_learnt_set_is_that_of_the_twin(data: st.DataObject, kernels: int, entries: int, count: int) -> None:
    w = integers(data, kernels)
    count = min(count, math.comb(9, entries))
    learnt = KernelPattern.learn(w, entries, count)
    assert list(learnt.patterns) == twin_set(w, entries, count)
    own = 1 - entries / 9
    if (w != 0).all():
        assert torch.equal(project(w, KernelPattern(entries, count)), project(w, learnt))
    for sparsity in (0.0, own / 2, own, (1 + own) / 2, 1.0):
        pattern = KernelPattern(entries, count)
        z = project(w, pattern, sparsity)
        assert pattern.contains(z, sparsity)
        assert torch.equal(project(z, pattern, sparsity), z), "idempotent, exact zeros among the kept or not"
        assert torch.equal(z, torch.where(z != 0, w, 0))


def test_the_set_is_the_most_frequent_natural_patterns() -> None:
    w = torch.full((7, 1, 9), 0.1)
    naturals = [(0, 1, 3, 4)] * 3 + [(4, 5, 7, 8)] * 2 + [(0, 2, 6, 8)] * 2
    for kernel, positions in zip(w[:, 0], naturals, strict=True):
        kernel[list(positions)] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    w = w.view(7, 1, 3, 3)
    assert KernelPattern.learn(w, 4, 1).patterns == ((0, 1, 3, 4),)
    assert KernelPattern.learn(w, 4, 2).patterns == ((0, 1, 3, 4), (0, 2, 6, 8)), "ties to the lexicographically first"
    assert KernelPattern.learn(w, 4, 9).patterns == ((0, 1, 3, 4), (0, 2, 6, 8), (4, 5, 7, 8)), "no more than there are"
    assert KernelPattern.learn([w[:3], w[3:5], w[4:5]], 4, 2).patterns == ((0, 1, 3, 4), (4, 5, 7, 8)), "votes are summed"
    assert KernelPattern.learn(torch.zeros(2, 2, 3, 3)).patterns == ((0, 1, 2, 3),)


def test_counts_are_those_asked_for() -> None:
    w = gaussian(16, 8, 3, 3)
    pattern = KernelPattern()
    for sparsity in (0.0, 0.1, 0.3, 0.5, OWN, 0.6, 0.75, 0.9, 0.99, 1.0):
        mask = pattern.mask(w, sparsity)
        per_kernel = mask.view(128, 9).sum(1)
        assert abs(int(mask.sum()) - (1 - sparsity) * w.numel()) <= 2.5
        assert set(per_kernel.tolist()) <= ({4, 9} if sparsity < OWN else {0, 4})
        used = {tuple(row.nonzero().flatten().tolist()) for row in mask.view(128, 9) if int(row.sum()) == 4}
        assert len(used) <= 8
    assert pattern.snap(0.3) == pytest.approx(OWN)
    assert pattern.snap(0.9) == 0.9
    assert int(pattern.mask(w, pattern.snap(0.0)).sum()) == 4 * 128
    assert int(torch.count_nonzero(project(w, pattern))) == 4 * 128, "its own sparsity, if none is asked for"


def test_patterned_first_is_what_loses_least() -> None:
    w = torch.ones(4, 1, 3, 3)
    w[1].view(9)[4:] = 0.01
    w[3].view(9)[4:] = 0.02
    one, two = (KernelPattern().mask(w, 5 * n / 36).view(4, 9).sum(1).tolist() for n in (1, 2))
    assert (one, two) == ([9, 4, 9, 9], [9, 4, 9, 4])


def test_membership_is_strict() -> None:
    pattern = KernelPattern(4, SET)
    w = project(gaussian(3, 2, 3, 3), pattern)
    assert pattern.contains(w, OWN)
    assert not pattern.contains(w, 0.9), "too many kernels"
    odd = w.clone()
    odd[1, 1] = 0
    odd[1, 1, 0, 0] = odd[1, 1, 2, 2] = 1.0
    assert not pattern.contains(odd, OWN), "no pattern holds both corners"
    assert pattern.contains(odd, 5 * 5 / (9 * 6)), "one kernel of six may be whole"
    assert KernelPattern(4, 8).contains(odd, OWN)
    assert not KernelPattern(4, 3).contains(gaussian(3, 2, 3, 3), OWN)


def test_learnt_sets_that_exact_zeros_would_change_are_settled() -> None:
    for seed in range(8):
        w = gaussian(6, 8, 3, 3, seed=seed)
        w[torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < 0.75] = 0
        for pattern in (KernelPattern(4, 2), KernelPattern(3, 3)):
            for sparsity in (0.3, pattern.snap(0.0), 0.8):
                z = project(w, pattern, sparsity)
                assert pattern.contains(z, sparsity)
                assert torch.equal(project(z, pattern, sparsity), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    base = gaussian(6, 6, 6, 6).to(dtype)
    for w in (base[:, :, :3, :3], base.permute(3, 1, 0, 2)[:, :, 1:4, ::2],
              base[:, :, :3, :3].contiguous(memory_format=torch.channels_last)):  # fmt: skip
        before = w.clone()
        for sparsity in (0.2, OWN, 0.8):
            z = project(w, "pattern:4", sparsity)
            assert (z.dtype, z.shape) == (w.dtype, w.shape)
            assert torch.equal(z, project(w.contiguous(), "pattern:4", sparsity))
            assert torch.equal(w, before)


def test_empty_and_infinite() -> None:
    for shape in ((0, 4, 3, 3), (4, 0, 3, 3)):
        for sparsity in (0.1, 0.9):
            assert project(torch.empty(shape), "pattern:4", sparsity).shape == shape
        assert KernelPattern().contains(torch.empty(shape), 0.9)
    w = gaussian(2, 2, 3, 3)
    w[1, 1, 2, 2] = -math.inf
    for sparsity in (0.3, OWN, 0.89):
        assert project(w, "pattern:4", sparsity)[1, 1, 2, 2] == -math.inf


def test_small_weights_beside_large_ones_are_not_lost() -> None:
    w = torch.zeros(1, 1, 3, 3)
    w.view(9)[[0, 1, 3, 8]] = torch.tensor([1.0, 1.0, 1.0, 1e-12])  # 3 + 1e-24 is 3, even in double precision
    pattern = KernelPattern(4, ((0, 1, 2, 3), (0, 1, 3, 8)))
    assert torch.equal(project(w, pattern), w)


# ---------------------------------------------------------------------- text and bad input


@pytest.mark.parametrize("pattern", [KernelPattern(), KernelPattern(3, 6), KernelPattern(4, SET), KernelPattern(1, ((8,),))])
def test_text_round_trip(pattern: KernelPattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert hash(parse_pattern(str(pattern))) == hash(pattern)


def test_text_is_read() -> None:
    assert parse_pattern("pattern:4") == parse_pattern(" Pattern:4x8 ") == KernelPattern(4, 8)
    assert str(KernelPattern(4, SET)) == "pattern:4[0134,1245,3467]"
    assert KernelPattern(4, [[4, 3, 1, 0]]) == KernelPattern(4, ((0, 1, 3, 4),)), "order does not matter"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"entries\) is how many of 9 positions are kept, 1 to 8, got 0"),
        ((9,), r"1 to 8, got 9"),
        ((True,), r"1 to 8, got True"),
        ((4.0,), r"1 to 8, got 4\.0"),
        ((4, 0), r"of 4 positions, 1 to 126, got 0"),
        ((1, 10), r"of 1 positions, 1 to 9, got 10"),
        ((4, ()), r"a tuple of tuples of 4 different positions from 0 to 8"),
        ((4, ((0, 1, 2),)), r"such as \(\(0, 1, 2, 3\),\), got \(\(0, 1, 2\),\)"),
        ((4, ((0, 1, 2, 2),)), r"different positions"),
        ((4, ((0, 1, 2, 9),)), r"from 0 to 8"),
        ((4, True), r"got True"),
        ((4, "0134"), r"got '0134'"),
        ((4, None), r"got None"),
    ],
)
def test_values_out_of_range(arguments: tuple, message: str) -> None:
    with pytest.raises(DualpruneError, match=message):
        KernelPattern(*arguments)


@pytest.mark.parametrize("text", ["pattern", "pattern:", "pattern:4x", "pattern:4[]", "pattern:4[01 34]", "patern:4"])
def test_text_that_is_no_kernel_pattern(text: str) -> None:
    with pytest.raises(DualpruneError, match="expected a pattern"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["pattern:4[012]", "pattern:9", "pattern:4[,]", "pattern:4[0129]"])
def test_text_of_impossible_kernel_patterns(text: str) -> None:
    with pytest.raises(DualpruneError, match="KernelPattern"):
        parse_pattern(text)


def test_learning_refuses_what_has_no_kernels() -> None:
    with pytest.raises(DualpruneError, match="got no weights"):
        KernelPattern.learn([])
    with pytest.raises(DualpruneError, match="needs 3×3 kernels"):
        KernelPattern.learn(torch.ones(4, 4, 1, 1))


# ---------------------------------------------------------------------- in a problem


def test_a_glob_that_reaches_other_kernels_names_the_layer_and_the_way_out() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3))
    with pytest.raises(
        DualpruneError, match=r"^1\.weight: pattern:4x8 needs 3×3 kernels, .*rule .*before the glob.*\"kernel\""
    ):
        build_problem(model, patterns={"*": "pattern:4"}, ignore=())
    problem = build_problem(model, rate=4, patterns={"1": "kernel", "*": "pattern:4"}, ignore=())
    assert [str(t.pattern) for t in problem.targets] == ["pattern:4x8", "kernel", "pattern:4x8"]
    assert all(abs(int(mask.sum()) - mask.numel() / 4) <= 2 for mask in problem.masks(problem.weights))
    with pytest.raises(DualpruneError, match='such as "unstructured"'):
        build_problem(nn.Linear(3, 3), patterns={"weight": "pattern:4"})


def test_without_a_rate_the_pattern_is_its_own_sparsity_and_lower_ones_are_raised_to_it() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    for asked in ({}, {"rate": 1.5}, {"sparsity": 0.2}):
        problem = build_problem(model, patterns={"*": KernelPattern()}, ignore=(), **asked)
        assert [t.sparsity for t in problem.targets] == pytest.approx([OWN, OWN])


def test_global_budget_shares_one_threshold_and_lets_no_layer_die() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 3))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(gaussian(*layer.weight.shape, seed=i) * (1e-3 if i == 1 else 1))
    problem = build_problem(model, rate=6, patterns={"*": KernelPattern(4, SET)}, ignore=(), budget="global")
    weights = problem.weights
    assert all(t.pooled for t in problem.targets)
    total = sum(w.numel() for w in weights)
    masks = problem.masks(weights)
    assert abs(sum(int(m.sum()) for m in masks) - total / 6) <= 2.5
    alive = [int(m.flatten(2).any(2).sum()) for m in masks]
    assert alive[1] == 1, "the small layer keeps its strongest kernel only"
    strongest = [KernelPattern(4, SET).scores(w) for w in weights]
    kept = torch.cat([s[m.flatten(2).any(2).flatten()] for s, m in zip(strongest[::2], masks[::2], strict=True)])
    gone = torch.cat([s[~m.flatten(2).any(2).flatten()] for s, m in zip(strongest[::2], masks[::2], strict=True)])
    assert kept.min() >= gone.max()
    halfway = problem.masks(weights, lambda s: s / 2)
    assert abs(sum(int(m.sum()) for m in halfway) - total * (1 - 0.5 * 5 / 6)) <= 2.5


def test_erk_never_asks_for_less_than_the_pattern() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3))
    problem = build_problem(model, rate=4, patterns={"*": "pattern:4"}, ignore=(), budget="erk")
    assert min(t.sparsity for t in problem.targets) == pytest.approx(OWN)


# ---------------------------------------------------------------------- in every method

RUNS = [SLR(), SLR.paper(), ADMM(), ADMM(hold=0.2, ramp=0.5), Reweighted(), GradualMagnitude(), Magnitude()]


@pytest.mark.parametrize("method", RUNS, ids=lambda m: repr(m)[:30])
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_every_method_ends_in_the_set(method: object, budget: str) -> None:
    model = tiny_net()
    optimizer = sgd(model)
    pruner = attach(model, optimizer, method, rate=5, patterns={"3": "pattern:4x4", "6": "pattern:4x4", "10": Unstructured()},
                    budget=budget, every=3, total_steps=24)  # fmt: skip
    train(model, optimizer, range(24), pruner)
    with pruner.evaluate():
        inside = [model[i].weight.detach().clone() for i in (3, 6)]
    pruner.finish()
    convs = [model[3].weight.detach(), model[6].weight.detach()]
    assert all(torch.equal(a, b) for a, b in zip(inside, convs, strict=True))
    assert abs(sum(int(torch.count_nonzero(w)) for w in convs) - sum(w.numel() for w in convs) / 5) <= 5
    for w in convs:
        supports = {tuple(k.nonzero().flatten().tolist()) for k in (w != 0).view(-1, 9) if k.any()}
        assert len(supports) <= 4
        assert {len(s) for s in supports} == {4}
    train(model, optimizer, range(24, 27), pruner)
    assert [(w != 0).sum() for w in (model[3].weight, model[6].weight)] == [(w != 0).sum() for w in inside], "held"


def test_a_set_learnt_at_the_start_stays_the_set() -> None:
    model = tiny_net()
    pattern = KernelPattern.learn([model[3].weight, model[6].weight], 4, 6)
    optimizer = sgd(model)
    pruner = attach(model, optimizer, SLR(), rate=4, patterns={"[36]": pattern}, every=3, total_steps=24)
    train(model, optimizer, range(24), pruner)
    pruner.finish()
    for w in (model[3].weight, model[6].weight):
        for support in {tuple(k.nonzero().flatten().tolist()) for k in (w != 0).view(-1, 9) if k.any()}:
            assert support in pattern.patterns
