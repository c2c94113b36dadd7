"""Magnitude pruning: once at the end, or gradually along a cubic schedule (Zhu & Gupta 2018). The rivals to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from dualprune.distributed import count_nonzero
from dualprune.errors import DualpruneError
from dualprune.problem import Problem
from dualprune.schedules import check_curve, check_fraction, ramped
from dualprune.solvers.base import Clock, Method, Row, Solver, Store


@dataclass(frozen=True)
class Magnitude(Method):
    """One shot: nothing happens until `finish` cuts the smallest units."""

    def start(self, problem: Problem, store: Store) -> Solver:  # noqa: D102
        return OneShotSolver(problem, {}, {})


class OneShotSolver(Solver):
    """Has no state; an update has nothing to do."""

    def update(self, clock: Clock) -> Row:  # noqa: D102
        return {"support_change": 0.0}


@dataclass(frozen=True)
class GradualMagnitude(Method):
    """Raise the sparsity over the first `over` of the run, re-ranking at every update; pruned weights stay zero.

    Args:
        over: fraction of the run after which the final sparsity is reached and the masks no longer move.
        curve: "cubic" as published; "geometric" gives factors of the rate their time (`schedules.ramped`).
    """

    default_every = 100
    over: float = 0.75
    curve: str = "cubic"

    def __post_init__(self) -> None:
        check_fraction("GradualMagnitude(over)", self.over)
        check_curve("GradualMagnitude(curve)", self.curve)
        if not self.over:
            raise DualpruneError("GradualMagnitude(over) is a fraction above 0; for a cut at once use Magnitude()")

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return True

    def asked(self, progress: float, sparsity: float) -> float:  # noqa: D102
        return ramped(sparsity, progress, self.over, self.curve)

    def start(self, problem: Problem, store: Store) -> Solver:  # noqa: D102
        return GradualSolver(problem, self)


class GradualSolver(Solver):
    """Its only state is the masks, as what is dropped."""

    masks_weights = True

    def __init__(self, problem: Problem, method: GradualMagnitude) -> None:
        super().__init__(problem, {"drop": [torch.zeros_like(w, dtype=torch.bool) for w in problem.weights]}, {})
        self.method = method

    def update(self, clock: Clock) -> Row:  # noqa: D102
        masks = self.problem.masks(self.problem.weights, partial(self.method.asked, clock.progress))
        drops = self.tensors["drop"]
        flips = sum(count_nonzero([drop == mask for drop, mask in zip(drops, masks, strict=True)]))
        for drop, mask in zip(drops, masks, strict=True):
            drop.copy_(~mask)
        return {"support_change": flips / max(sum(drop.numel() for drop in drops), 1)}
