"""SAFE (Lee et al. 2025): sparse by an augmented Lagrangian, flat by gradients taken a little uphill. A rival to beat."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualprune.errors import DualpruneError
from dualprune.problem import Problem
from dualprune.schedules import check_positive
from dualprune.solvers.base import Clock, DualMethod, DualSolver, Row, Store
from dualprune.solvers.vector import Shifted, ascend_, lagrangian_terms, replace_


@dataclass(frozen=True)
class SAFE(DualMethod):
    """ADMM in its scaled form, under a penalty that grows as a cosine, on sharpness-aware gradients (Lee et al. 2025, Alg. 1).

        min max f(W + ε) + ρ/2 ‖W − Z + U‖²,     ‖ε‖ ≤ rho_sam;     Z ← Π(W + U), U ← U + W − Z;     ρ_t = ρ/2 (1 − cos πt)

    The loop takes the gradients, so it is the loop that takes the second one (`perturbed`), and two gradients a step make
    half the steps of the same budget:

        loss(model(x), y).backward()
        with dualprune.perturbed(optimizer, method.rho_sam):
            loss(model(x), y).backward()
        optimizer.step()

    Without the second gradient this is ADMM with a cosine penalty. Difference from the paper: ρ_t moves at updates, not at
    every step. The paper calls the penalty λ and the radius ρ.

    Args:
        rho: penalty at the end of the run.
        rho_sam: radius of the ball in which the worst loss is looked for.
        ramp: fraction of the run over which the set shrinks to its final size; 0 as published.
        hold: fraction at the end of the run that is trained under the fixed mask; 0 as published.
        curve: how the set shrinks, "geometric" or "cubic" (`schedules.ramped`).

    Raises:
        DualpruneError: a constant is out of its range.
    """

    default_every = 32
    rho: float = 0.1
    rho_sam: float = 0.1

    def __post_init__(self) -> None:
        self._check()
        check_positive("SAFE(rho)", self.rho)
        check_positive("SAFE(rho_sam)", self.rho_sam)

    @classmethod
    def paper(cls, rho: float = 1e-3, rho_sam: float = 0.1) -> SAFE:
        """Return the paper's constants for 200 epochs of CIFAR-10: ρ = 0.001 at the end, a radius of 0.1, `every` 32 steps."""
        return cls(rho=rho, rho_sam=rho_sam)

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return True

    @property
    def sharpness(self) -> float:  # noqa: D102
        return self.rho_sam

    def penalty(self, progress: float) -> float:
        """Return ρ_t at `progress`."""
        return self.rho / 2 * (1 - math.cos(math.pi * progress))

    def start(self, problem: Problem, store: Store) -> SAFESolver:  # noqa: D102
        return SAFESolver(problem, self, store)


class SAFESolver(DualSolver):
    """Keeps Λ = ρU, whose gradient is that of the scaled form: where ρ grows, Λ grows with it and U stays."""

    def __init__(self, problem: Problem, method: SAFE, store: Store) -> None:
        super().__init__(problem, method, store, rho=method.penalty(0.0))
        self.safe = method
        if any(t.dtype is torch.float16 for t in self.tensors["lam"]):
            raise DualpruneError("SAFE's first multipliers are too small for float16: give state_dtype=torch.float32")

    def update(self, clock: Clock) -> Row:  # noqa: D102
        W, Z, lam = self.problem.weights, self.tensors["Z"], self.tensors["lam"]
        rho, last = self.safe.penalty(clock.progress), self.scalars["rho"]
        before = math.sqrt(lagrangian_terms(W, Z, lam)[1])
        if rho == 0:  # an update before the first step: there is no penalty yet, nor a multiplier
            return {"rho": 0.0, "violation_before": before, "violation": before, "z_change": 0.0, "support_change": 0.0}

        for multiplier in lam:
            multiplier.mul_(rho / last if last else 0.0)
        V = Shifted(W, lam, rho)
        z_change, flips, inner, square = replace_(Z, V, self.project(clock.progress)(V))
        ascend_(lam, rho, W, Z)

        self.scalars["rho"] = rho
        return {
            "rho": rho,
            "s": rho,
            "loss_known": clock.loss is not None,
            "lagrangian": (clock.loss or 0.0) + inner + 1.5 * rho * square,
            "violation_before": before,
            "violation": math.sqrt(square),
            "z_change": z_change,
            "support_change": flips,
        }


@contextmanager
def perturbed(optimizer: Optimizer, radius: float, dropped: Iterable[tuple[Tensor, Tensor]] = ()) -> Iterator[None]:
    """Give a context in which the weights stand at W + radius · g/‖g‖, to take a second gradient there (Foret et al. 2021).

    On entering, the gradients of the optimizer's parameters are used up; on leaving, the weights are back to the last bit
    and the gradients are those of the perturbed place. Works with any method that has a penalty. Batch-norm statistics
    move in both passes: re-estimate them (`finish(calibrate=…)`). Scaled gradients (GradScaler) give the same direction;
    where they have overflowed, which skips the step, the weights stay where they are.

    Args:
        optimizer: the one of the loop, after `backward()`.
        radius: the length of the step uphill, over all parameters together.
        dropped: `pruner.dropped`, so that what its masks have dropped stays zero there.

    Raises:
        DualpruneError: there are no gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if not parameters:
        raise DualpruneError("perturbed() goes along the gradient: call loss.backward() before it")
    with torch.no_grad():
        for weight, drop in dropped:
            if weight.grad is not None:
                weight.grad.masked_fill_(drop, 0)
        here = [p.detach().clone() for p in parameters]
        lengths = [torch.linalg.vector_norm(g).to(here[0].device, torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(lengths))
        scale = torch.where(norm.isfinite(), radius / (norm + 1e-12), 0)
        for p, g in zip(parameters, gradients, strict=True):
            p.add_((g * scale.to(g.device, g.dtype)).nan_to_num_())  # 0 · inf
    optimizer.zero_grad()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, w in zip(parameters, here, strict=True):
                p.copy_(w)
