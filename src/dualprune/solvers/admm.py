"""ADMM pruning (Zhang et al. 2018), the baseline SLR is measured against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dualprune.errors import DualpruneError
from dualprune.problem import Problem
from dualprune.schedules import Geometric, as_schedule
from dualprune.solvers.base import Clock, ConstantOrSchedule, DualMethod, DualSolver, Row, Store, first_penalty
from dualprune.solvers.vector import Shifted, ascend_, replace_


@dataclass(frozen=True)
class ADMM(DualMethod):
    """Alternating direction method of multipliers: Z ← Π(W + Λ/ρ), Λ ← Λ + ρ(W − Z), at every update.

    Args:
        rho: penalty, a number or a schedule over the run. The squared norm ρ/2 ‖W − Z‖² is meant.
        ramp: fraction of the run over which the set shrinks to its final size; 0: final from the start, as published.
        hold: fraction at the end of the run that is trained under the fixed mask; 0 as published.
        curve: how the set shrinks, "geometric" or "cubic" (`schedules.ramped`).
        pull: "everywhere" as published, or "outside" as in `SLR`.
    """

    rho: ConstantOrSchedule = Geometric(0.01, 1.0, over=0.8)
    pull: str = "everywhere"  # type: ignore[misc]  # a field here, a constant in the base

    def __post_init__(self) -> None:
        self._check()
        as_schedule(self.rho, "ADMM(rho)")

    @classmethod
    def paper(cls, rho: float = 0.1) -> ADMM:
        """Return the SLR papers' baseline: constant ρ = 0.1; its dual period, several epochs, is `every` of attach."""
        return cls(rho=rho)

    def start(self, problem: Problem, store: Store) -> ADMMSolver:  # noqa: D102
        return ADMMSolver(problem, self, store)


class ADMMSolver(DualSolver):
    """One update is one screen: project, then ascend with step ρ."""

    def __init__(self, problem: Problem, method: ADMM, store: Store) -> None:
        super().__init__(problem, method, store, first_penalty(method.rho), k=1)
        self.admm = method
        if self.decoupled and any(t.dtype is torch.float16 for t in self.tensors["lam"]):
            raise DualpruneError("ADMM's multipliers under Closing grow beyond float16: give state_dtype=torch.float32")

    def update(self, clock: Clock) -> Row:  # noqa: D102
        W, Z, lam = self.problem.weights, self.tensors["Z"], self.tensors["lam"]
        rho = self.penalty(self.admm.rho, clock)
        before = math.sqrt(self.catch_up(rho)[1])

        V = Shifted(W, lam, rho)
        z_change, flips, inner, square = replace_(Z, V, self.project(clock.progress)(V))
        if self.scalars.get("fastest", 1.0):  # an optimizer that has not moved has no ρ to measure, as at a warm-up's start
            ascend_(lam, rho, W, Z)

        self.scalars |= {"rho": rho, "k": self.scalars["k"] + 1}
        lagrangian = (clock.loss or 0.0) + inner + rho * square + rho / 2 * square
        return {
            "rho": rho,
            "s": rho,
            "loss_known": clock.loss is not None,
            "lagrangian": lagrangian,
            "dual_bound": lagrangian + rho * square,  # eq. 21 with γ = 1
            "violation_before": before,
            "violation": math.sqrt(square),
            "z_change": z_change,
            "support_change": flips,
            "condition_w": None,
            "condition_z": None,
        }
