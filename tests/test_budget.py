from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dualprune import SLR, DualpruneError, attach, compression_rate
from dualprune.budget import check_budget, erk_sparsities, lamp_scores, resolve_sparsity
from dualprune.scope import build_problem


def test_rate_and_sparsity_are_two_words_for_one_thing() -> None:
    assert resolve_sparsity(10, None) == 0.9
    assert resolve_sparsity(None, 0.9) == 0.9
    assert resolve_sparsity(1, None) == 0.0
    assert resolve_sparsity(None, None) is None
    assert resolve_sparsity(None, 1) == 1.0
    assert compression_rate(0.9) == pytest.approx(10)
    assert compression_rate(1.0) == math.inf


@pytest.mark.parametrize(
    ("rate", "sparsity", "message"),
    [
        (0.5, None, r"rate is how many times fewer weights, at least 1 \(rate=10 keeps a tenth\), got 0\.5"),
        (0, None, r"at least 1 .*got 0$"),
        (-3, None, r"at least 1 .*got -3"),
        (math.nan, None, r"got nan"),
        (math.inf, None, r"got inf"),
        (True, None, r"got True"),
        ("10", None, r"got '10'"),
        (None, 90, r"sparsity is a fraction in \[0, 1\], got 90; did you mean 0\.9\?"),
        (None, -0.1, r"got -0\.1"),
        (None, math.nan, r"got nan"),
        (None, True, r"got True \(bool\)"),
        (10, 0.9, r"give rate or sparsity, not both: got rate=10, sparsity=0\.9"),
    ],
)
def test_impossible_rates(rate: object, sparsity: object, message: str) -> None:
    with pytest.raises(DualpruneError, match=message):
        resolve_sparsity(rate, sparsity)  # type: ignore[arg-type]


def test_budget_names() -> None:
    assert [check_budget(name) for name in ("uniform", "erk", "global")] == ["uniform", "erk", "global"]
    with pytest.raises(DualpruneError, match=r"one of uniform, erk, global, lamp; got 'globl', did you mean 'global'"):
        check_budget("globl")


shapes = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(shapes, st.floats(0, 1))
def test_erk_spends_the_budget_and_follows_the_formula(sizes: list[tuple[int, ...]], sparsity: float) -> None:
    spread = erk_sparsities(sizes, sparsity)
    weights = [math.prod(s) for s in sizes]
    assert all(0 <= s <= 1 for s in spread)
    kept = sum(n * (1 - s) for n, s in zip(weights, spread, strict=True))
    assert kept == pytest.approx((1 - sparsity) * sum(weights), rel=1e-9, abs=1e-9)
    scale = [(1 - s) * math.prod(shape) / sum(shape) for s, shape in zip(spread, sizes, strict=True)]
    below_one = [c for c, s in zip(scale, spread, strict=True) if s > 0]
    for c in below_one:
        assert c == pytest.approx(below_one[0], rel=1e-6, abs=1e-9), "density ∝ Σ dims / Π dims"
    for c, s in zip(scale, spread, strict=True):
        assert s > 0 or not below_one or c <= below_one[0] * (1 + 1e-6), "only layers that would exceed 1 are dense"


def test_erk_of_a_small_and_a_large_layer() -> None:
    small, large = erk_sparsities([(16, 16, 3, 3), (64, 64, 3, 3)], 0.9)
    assert small < 0.9 < large
    assert erk_sparsities([(4, 4)], 0.25) == [0.25]
    assert erk_sparsities([(2, 2), (100, 100)], 0.5)[0] == 0.0, "a tiny layer stays dense"
    assert erk_sparsities([], 0.5) == []


def test_lamp_scores_are_the_slow_twins_and_keep_the_order_of_magnitudes() -> None:
    w = torch.tensor([[3.0, -1.0, 0.0], [2.0, 1.0, -3.0]])
    # 3 and −3 tie: the first ranks higher, so that the second's share is of both
    slow = [9 / 9, 1 / (9 + 9 + 4 + 1), 0.0, 4 / (9 + 9 + 4), 1 / (9 + 9 + 4 + 1 + 1), 9 / (9 + 9)]
    assert lamp_scores(w).flatten().tolist() == pytest.approx(slow)
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]
    many = torch.randn(300)
    assert torch.equal(lamp_scores(many).argsort(), many.abs().argsort())


def test_lamp_keeps_the_asked_number_over_all_layers_and_empties_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 6), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)  # a threshold over magnitudes would leave nothing of it
    problems = {b: build_problem(model, sparsity=0.98, ignore=(), budget=b) for b in ("global", "lamp")}
    kept = {b: [int(m.sum()) for m in p.masks(p.weights)] for b, p in problems.items()}
    assert kept["global"][1] == 0 and min(kept["lamp"]) > 0
    assert sum(kept["lamp"]) == sum(kept["global"]) == 2318 - round(0.98 * 2318)
    values = problems["lamp"].weights
    scores = torch.cat([lamp_scores(v).flatten() for v in values])
    threshold = scores.sort(descending=True).values[sum(kept["lamp"]) - 1]
    for v, mask in zip(values, problems["lamp"].masks(values), strict=True):
        assert torch.equal(mask, lamp_scores(v) >= threshold)


def test_lamp_is_for_single_weights_and_is_part_of_a_state() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(DualpruneError, match=r"'lamp' ranks single weights of whole layers, 0\.weight is pruned by filter"):
        build_problem(model, patterns={"*": "filter"}, sparsity=0.5, ignore=(), budget="lamp")
    pruners = [
        attach(model, torch.optim.SGD(model.parameters(), 0.1), SLR(), rate=4, ignore=(), budget=b, total_steps=50)
        for b in ("lamp", "global")
    ]
    pruners[0].update()
    with pytest.raises(DualpruneError, match="made with budget lamp, this pruner has global"):
        pruners[1].load_state_dict(pruners[0].state_dict())
