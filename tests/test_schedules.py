from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest

from dualprune import Constant, DualpruneError, Geometric
from dualprune.schedules import as_schedule, check_fraction, ramped, slr_alpha


def test_geometric_grows_by_equal_factors_and_stays() -> None:
    rho = Geometric(0.01, 1.0, over=0.8)
    assert rho(0.0) == 0.01
    assert rho(0.4) == pytest.approx(0.1)
    assert [rho(p) for p in (0.8, 0.9, 1.0)] == pytest.approx([1.0] * 3)
    factors = [rho((i + 1) / 100) / rho(i / 100) for i in range(80)]
    assert factors == pytest.approx([factors[0]] * 80)


def test_geometric_may_fall_and_may_jump() -> None:
    assert Geometric(1.0, 0.01, over=1.0)(0.5) == pytest.approx(0.1)
    assert Geometric(0.01, 1.0, over=0.0)(0.0) == pytest.approx(1.0)
    assert Constant(0.3)(0.0) == Constant(0.3)(1.0) == 0.3


def test_as_schedule_takes_numbers_and_schedules() -> None:
    rho = Geometric(0.1, 1.0)
    assert as_schedule(rho, "rho") is rho
    assert as_schedule(2, "rho") == Constant(2.0)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True])
def test_values_must_be_positive_and_finite(bad: float) -> None:
    for make in (
        lambda v: Constant(v),
        lambda v: Geometric(v, 1.0),
        lambda v: Geometric(1.0, v),
        lambda v: as_schedule(v, "x"),
    ):
        with pytest.raises(DualpruneError, match=rf"expects a positive .*got {bad}"):
            make(bad)


@pytest.mark.parametrize("bad", ["0.1", None, [0.1]])
def test_only_numbers_and_schedules(bad: object) -> None:
    with pytest.raises(DualpruneError, match=r"rho expects a positive number or a schedule such as Geometric\(0.01, 1.0\)"):
        as_schedule(bad, "rho")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-0.1, 1.1, 80, math.nan, True, "0.8", None])
def test_fractions(bad: object) -> None:
    for make in (lambda: Geometric(0.1, 1.0, over=bad), lambda: check_fraction("Geometric(over)", bad)):
        with pytest.raises(DualpruneError, match=r"Geometric\(over\) is a fraction of the run in \[0, 1\], got"):
            make()


@pytest.mark.parametrize("curve", ["cubic", "geometric"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1 - 1 / 630, 1 - 1e-9, 1.0])
def test_ramps_rise_from_nothing_to_all(curve: str, sparsity: float) -> None:
    assert [ramped(sparsity, p, 0.75, curve) for p in (0.0, 0.75, 0.8, 1.0)] == [0.0, sparsity, sparsity, sparsity]
    asked = [ramped(sparsity, i / 100, 0.75, curve) for i in range(101)]
    assert asked == sorted(asked) and max(asked) == sparsity
    assert ramped(sparsity, 0.0, 0.0, curve) == sparsity


def test_halfway_of_each_ramp() -> None:
    assert ramped(0.9, 0.375, 0.75, "cubic") == 0.9 * (1 - 0.5**3)
    assert ramped(0.99, 0.375, 0.75, "geometric") == pytest.approx(1 - 0.01**0.75)
    assert ramped(1.0, 0.375, 0.75, "geometric") == 1 - 0.5**3, "nothing kept has no logarithm"


def test_the_geometric_ramp_is_by_factors_at_any_rate_and_near_the_cubic_at_ten() -> None:
    """Halfway, three quarters of the way to the rate in logarithms; by the cubic, at 630 times, four per cent of the rate."""
    for rate in (2, 10, 630):
        assert 1 / (1 - ramped(1 - 1 / rate, 0.5, 1.0, "geometric")) == pytest.approx(rate**0.75)
    kept = {curve: [1 - ramped(0.9, i / 20, 1.0, curve) for i in range(21)] for curve in ("geometric", "cubic")}
    assert max(abs(a - b) for a, b in zip(*kept.values(), strict=True)) < 0.13
    assert 1 / (1 - ramped(1 - 1 / 630, 0.75, 1.0, "cubic")) < 60 < 400 < 1 / (1 - ramped(1 - 1 / 630, 0.75, 1.0, "geometric"))


@pytest.mark.parametrize(("M", "r"), [(300, 0.1), (150, 0.05), (1.5, 0.9)])
def test_alpha_is_equation_13(M: float, r: float) -> None:
    getcontext().prec = 40
    for k in (1, 2, 3, 10, 100, 12345):
        power = Decimal(k) ** (1 - 1 / Decimal(k) ** Decimal(str(r)))
        assert slr_alpha(k, M, r) == pytest.approx(float(1 - 1 / (Decimal(str(M)) * power)), rel=1e-14)


def test_alpha_contracts_and_approaches_one() -> None:
    alphas = [slr_alpha(k, 300, 0.1) for k in range(1, 5000)]
    assert alphas[0] == 1 - 1 / 300
    assert all(0 < a < 1 for a in alphas)
    assert alphas == sorted(alphas)
    assert slr_alpha(10**9, 300, 0.1) > 1 - 1e-8
