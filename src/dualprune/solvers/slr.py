"""Surrogate Lagrangian relaxation (SLR; Gurevin et al. 2021, Zhou et al. 2024; equation numbers are the latter's)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualprune.errors import DualpruneError, suggest
from dualprune.problem import Problem
from dualprune.schedules import Closing, as_schedule, check_positive, slr_alpha
from dualprune.solvers.base import Clock, ConstantOrSchedule, DualMethod, DualSolver, Row, Store, first_penalty
from dualprune.solvers.vector import Kept, Shifted, Tensors, ascend_, lagrangian_terms, replace_

STEP_RULES = ("contraction", "as_printed")


@dataclass(frozen=True)
class SLR(DualMethod):
    """Weights W and sparse copies Z, pulled together by multipliers Λ and a penalty ρ/2 ‖W − Z‖² (eq. 4).

    Args:
        rho: penalty, a number or a schedule over the run, for the gradient; `Closing` moves the weights by itself.
        s0: first step size of the multipliers.
        M: constant of the step factor α_k (eq. 13), above 1.
        r: the other constant of α_k, between 0 and 1.
        step_rule: "contraction" keeps s_k‖g_k‖ = α_k s_{k−1}‖g_{k−1}‖, on which the convergence proof rests;
            "as_printed" takes eq. 8 and 13 literally, which can diverge (docs/theory.md).
        cap: the step size never exceeds cap·ρ (ADMM's step is ρ); None lifts the limit.
        ramp: fraction of the run over which the set shrinks to its final size; 0: final from the start.
            While it shrinks, the step size stays s0 (below `cap`): a set that moves makes new violation, which the contraction
            would answer with ever smaller steps.
        hold: fraction at the end of the run that is trained under the fixed mask.
        curve: how the set shrinks, "geometric" or "cubic" (`schedules.ramped`).
        pull: "outside" lets Z follow W on its support between updates, so that the penalty pulls only what is to go;
            "everywhere" leaves Z where the last update put it, as published, which also brakes the weights that stay.

    Raises:
        DualpruneError: a constant is out of its range.
    """

    rho: ConstantOrSchedule = Closing(4.0)
    s0: float = 0.1
    M: float = 300.0
    r: float = 0.1
    step_rule: str = "contraction"
    cap: float | None = 0.1
    ramp: float = 0.6
    hold: float = 0.2
    pull: str = "outside"  # type: ignore[misc]  # a field here, a constant in the base

    def __post_init__(self) -> None:
        self._check()
        as_schedule(self.rho, "SLR(rho)")
        for name in ("s0", "M", "r"):
            check_positive(f"SLR({name})", getattr(self, name))
        if not (self.M > 1 and self.r < 1):
            raise DualpruneError(f"SLR expects M > 1 and r < 1, got M={self.M}, r={self.r}")
        if self.step_rule not in STEP_RULES:
            near = suggest(str(self.step_rule), STEP_RULES)
            raise DualpruneError(f"SLR(step_rule) is one of {STEP_RULES}, got {self.step_rule!r}{near}")
        if self.cap is not None:
            check_positive("SLR(cap), a multiple of rho,", self.cap, " or None")

    @classmethod
    def paper(cls, s0: float = 0.01, M: float = 300.0, r: float = 0.1, rho: float = 0.1) -> SLR:
        """Return the papers' constants: ρ = 0.1, M = 300, r = 0.1, s₀ = 0.01, no ramp, cap or hold, Z at rest meanwhile."""
        return cls(rho=rho, s0=s0, M=M, r=r, cap=None, ramp=0.0, hold=0.0, pull="everywhere")

    @property
    def importance(self) -> str:
        """What ranks the weights: "adaptive" with the pull of `Closing`, "magnitude" where it goes through the gradient.

        The pull of `Closing` is the gradient of ½ Σ √v (w − z)² stepped along as Adam steps, divided by √v: in its metric the
        projection keeps the largest v^¼·|w| (docs/theory.md, "In whose metric").
        """
        return "adaptive" if isinstance(self.rho, Closing) else "magnitude"

    def start(self, problem: Problem, store: Store) -> SLRSolver:  # noqa: D102
        return SLRSolver(problem, self, store)


def slr_update(
    W: Tensors,
    Z: Tensors,
    lam: Tensors,
    project: Callable[[Shifted], Sequence[Kept]],
    *,
    terms: tuple[float, float],
    rho: float,
    f: float,
    L_prev: float,
    step: Callable[[float], float],
) -> Row:
    """One iteration of Algorithm 1 after the weights have moved: Z and Λ change in place.

    `terms` are ⟨Λ, W − Z⟩ and ‖W − Z‖², `f` is the loss at W, `L_prev` the Lagrangian at the last W, `step` maps ‖g‖ to the
    step size and remembers it.
    """
    inner, square = terms
    before = math.sqrt(square)
    condition_w = f + inner + rho / 2 * square < L_prev  # eq. 6
    if condition_w:
        s = step(before)  # eq. 8
        ascend_(lam, s, W, Z)  # eq. 7
        inner += s * square

    V = Shifted(W, lam, rho)
    z_change, flips, inner_z, square_z = replace_(Z, V, project(V))  # eq. 10

    after = math.sqrt(square_z)
    # eq. 11; both sides are one number where Z stays where it is, and then rounding must not decide
    condition_z = z_change > 0 and inner_z + rho / 2 * square_z < inner + rho / 2 * square
    if condition_z:
        s = step(after)  # eq. 13
        ascend_(lam, s, W, Z)  # eq. 12
        inner_z += s * square_z
    return {
        "violation_before": before,
        "violation": after,
        "z_change": z_change,
        "support_change": flips,
        "condition_w": condition_w,
        "condition_z": condition_z,
        "inner": inner_z,
    }


class SLRSolver(DualSolver):
    """Keeps the books of `slr_update`: k, s, the last violation and the last Lagrangian."""

    def __init__(self, problem: Problem, method: SLR, store: Store) -> None:
        super().__init__(
            problem, method, store, first_penalty(method.rho), s=method.s0, k=1, g_last=None, inner=0.0, square=None, f=None
        )
        _, square = lagrangian_terms(problem.weights, self.tensors["Z"], self.tensors["lam"])
        self.scalars |= {"g_last": math.sqrt(square), "square": square}
        self.slr = method

    def update(self, clock: Clock) -> Row:  # noqa: D102
        books, method = self.scalars, self.slr
        rho = self.penalty(method.rho, clock)
        known = clock.loss is not None and (books["f"] is not None or books["k"] == 1)
        f, f_prev = (clock.loss or 0.0, books["f"]) if known else (0.0, 0.0)
        # L at the last weights with today's ρ: Λ has not moved since, nor has Z but where it follows W, which only lowers the
        # other side; so two scalars hold all of it
        L_prev = math.inf if f_prev is None else f_prev + books["inner"] + rho / 2 * books["square"]
        terms = self.catch_up(rho)
        row = slr_update(
            self.problem.weights,
            self.tensors["Z"],
            self.tensors["lam"],
            self.project(clock.progress),
            terms=terms,
            rho=rho,
            f=f,
            L_prev=L_prev,
            step=lambda violation: self._step(violation, rho, clock.progress),
        )
        inner, violation = row.pop("inner"), row["violation"]
        if method.step_rule == "as_printed":
            books["g_last"] = violation
        books |= {"rho": rho, "f": clock.loss, "inner": inner, "square": violation**2, "k": books["k"] + 1}
        lagrangian = f + inner + rho / 2 * violation**2
        bound = lagrangian + books["s"] * violation**2  # eq. 18 with γ = 1
        return {"rho": rho, "s": books["s"], "loss_known": known, "lagrangian": lagrangian, "dual_bound": bound, **row}

    def _step(self, violation: float, rho: float, progress: float) -> float:
        """Return s_k with s_k‖g_k‖ = α_k s_{k−1}‖g_last‖ (the contraction), or s₀ while the set shrinks; capped at cap·ρ."""
        books, method = self.scalars, self.slr
        if progress < method.ramp:
            s = method.s0
        elif violation == 0:
            return 0.0  # nothing to correct
        else:
            s = slr_alpha(books["k"], method.M, method.r) * books["s"] * (books["g_last"] or violation) / violation
        if method.cap is not None:
            s = min(s, method.cap * rho)
        books["s"] = s
        if method.step_rule == "contraction":
            books["g_last"] = violation
        return s
