"""How scalars move over a run: penalties, cardinality and SLR's step factor. Pure functions of progress in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualprune.errors import DualpruneError, suggest


@dataclass(frozen=True)
class Constant:
    """The same value throughout; needs no total_steps."""

    value: float

    def __post_init__(self) -> None:
        check_positive("Constant(value)", self.value)

    def __call__(self, progress: float) -> float:  # noqa: D102
        return self.value


@dataclass(frozen=True)
class Geometric:
    """Grow by equal factors from `start` to `end` over the first `over` (fraction) of the run, then stay."""

    start: float
    end: float
    over: float = 0.8

    def __post_init__(self) -> None:
        check_positive("Geometric(start)", self.start)
        check_positive("Geometric(end)", self.end)
        check_fraction("Geometric(over)", self.over)

    def __call__(self, progress: float) -> float:  # noqa: D102
        reached = 1.0 if progress >= self.over else progress / self.over
        return self.start * (self.end / self.start) ** reached


@dataclass(frozen=True)
class Closing:
    """The penalty's pull shrinks ‖W − Z‖ by e^−times between two updates, whatever the optimizer and its learning rate.

    The pull acts on the weights themselves, after the optimizer's step, as decoupled weight decay does (Loshchilov and
    Hutter 2019): W ← W − κ(W − Z + Λ/ρ), κ = 1 − e^(−times/n), n the steps between updates, from the first update on.
    ρ is what would do as much through the gradient of plain descent: times/(gain · η · n), where a step moves a weight by η
    times its gradient and momentum makes gain = 1/(1 − momentum) steps of one. A learning rate below a tenth of the highest
    so far counts as that tenth. Source: docs/theory.md.

    Args:
        times: the exponent.
        filters: the same for whole filters (`Filter`) under ``pull="outside"``; infinity: all of the gap at the first step.
            A norm behind the layer divides a filter's scale out, so that it does as much as ever while it gets smaller, and
            all of that is missing at the cut.
    """

    times: float = 1.0
    filters: float = math.inf

    def __post_init__(self) -> None:
        check_positive("Closing(times)", self.times)
        if self.filters != math.inf:
            check_positive("Closing(filters)", self.filters, " or infinity")

    def penalty(self, eta: float, fastest: float, steps: float) -> float:
        """Return ρ at η, the largest η so far, and how many steps' worth of a steady pull there is between two updates."""
        return self.times / (steps * max(eta, fastest / 10, 1e-12))

    def share(self, steps: int, of_filters: bool = False) -> float:
        """Return κ, how much of the gap one step closes, at so many steps between updates."""
        return -math.expm1(-(self.filters if of_filters else self.times) / steps)


Schedule = Constant | Geometric | Closing


def as_schedule(value: float | Schedule, what: str) -> Schedule:
    """Return a schedule as it is, and a number as a constant one."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DualpruneError(f"{what} expects a positive number or a schedule such as Geometric(0.01, 1.0), got {value!r}")
    check_positive(what, value)
    return Constant(float(value))


CURVES = ("geometric", "cubic")


def ramped(sparsity: float, progress: float, over: float, curve: str) -> float:
    """Return the sparsity to ask for at `progress`, on the way from 0 to `sparsity`, which is reached at `over`.

    With t = progress/over, "cubic" is s·(1 − (1 − t)³) (Zhu & Gupta 2018, eq. 1). "geometric" keeps (1 − s)^(1 − (1 − t)²) of
    the weights: factors of the rate take their time, not shares of the weights, so that a hundred times fewer is asked for long
    before the end of a ramp to a thousand. At 10× the two are close.
    """
    if progress >= over:
        return sparsity
    left = 1 - progress / over
    if curve == "cubic" or sparsity >= 1:  # nothing kept has no logarithm
        return sparsity * (1 - left**3)
    return -math.expm1((1 - left**2) * math.log1p(-sparsity))


def check_curve(what: str, curve: str) -> None:
    """Raise unless `curve` is one that `ramped` knows."""
    if curve not in CURVES:
        raise DualpruneError(f"{what} is one of {CURVES}, got {curve!r}{suggest(str(curve), CURVES)}")


def slr_alpha(k: int, M: float, r: float) -> float:
    """Return the step factor α_k = 1 − 1/(M k^(1 − 1/k^r)) (SLR 2024, eq. 13), for the k-th multiplier update, k ≥ 1."""
    return 1 - 1 / (M * k ** (1 - 1 / k**r))


def check_fraction(what: str, value: float) -> None:
    """Raise unless `value` is a fraction in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DualpruneError(f"{what} is a fraction of the run in [0, 1], got {value!r}")


def check_positive(what: str, value: float, instead: str = "") -> None:
    """Raise unless `value` is a positive finite number; `instead` names what else would do."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DualpruneError(f"{what} expects a positive finite number{instead}, got {value!r}")
