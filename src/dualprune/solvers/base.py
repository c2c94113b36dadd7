"""What a method is (a frozen value), what a solver is (its state over one problem), and the contract between them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualprune.problem import Problem
from dualprune.schedules import Constant, Geometric, check_fraction, cubic

Row = dict[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """A way to prune, with its constants; `start` makes the solver that carries it out."""

    default_every: ClassVar[int] = 50  # optimizer steps between updates, where the caller does not say

    @abstractmethod
    def start(self, problem: Problem, store: Store) -> Solver:
        """Return a solver at its starting point on `problem`."""

    @property
    def needs_total_steps(self) -> bool:
        """Whether anything in the method moves with the progress of the run."""
        return any(isinstance(getattr(self, f.name), Geometric) for f in fields(self))

    def sparsity_scale(self, progress: float) -> float:
        """Return which share of the final sparsity the sets have at `progress`."""
        return 1.0

    @property
    def hold_from(self) -> float:
        """The progress from which the weights are cut and the masks held for the rest of the run; infinity: never."""
        return math.inf


@dataclass(frozen=True)
class Clock:
    """What an update may depend on besides tensors: the mean observed loss (None: not handed in) and the progress."""

    loss: float | None
    progress: float


class Solver:
    """State per target and scalars; saved and loaded by name, so a solver declares and never writes I/O."""

    def __init__(self, problem: Problem, tensors: dict[str, list[Tensor]], scalars: dict[str, Any]) -> None:
        self.problem = problem
        self.tensors = tensors
        self.scalars = scalars

    penalises = False  # adds Λ + ρ(W − Z) to gradients
    masks_weights = False  # moves masks itself at every update

    def update(self, clock: Clock) -> Row:
        """Move the solver's state once; return the history row."""
        raise NotImplementedError


@dataclass(frozen=True)
class Store:
    """Where Z and Λ live: dtype and device, None for those of the weights."""

    dtype: torch.dtype | None = None
    device: str | torch.device | None = None

    def like(self, w: Tensor) -> Tensor:
        """Return an uninitialised tensor of w's shape and memory layout."""
        return torch.empty_like(w, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class DualMethod(Method):
    """What SLR and ADMM share: a penalty schedule, a shrinking set, and a tail under the fixed mask."""

    ramp: float = 0.0
    hold: float = 0.0

    def _check(self) -> None:
        check_fraction(f"{type(self).__name__}(ramp)", self.ramp)
        check_fraction(f"{type(self).__name__}(hold)", self.hold)

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return bool(self.ramp or self.hold) or super().needs_total_steps

    def sparsity_scale(self, progress: float) -> float:  # noqa: D102
        return cubic(progress, self.ramp) if self.ramp else 1.0

    @property
    def hold_from(self) -> float:  # noqa: D102
        return 1 - self.hold if self.hold else math.inf


class DualSolver(Solver):
    """Z = Π(W), Λ = 0 at the start, and the penalty ρ that the gradient hook reads."""

    penalises = True

    def __init__(self, problem: Problem, method: DualMethod, store: Store, rho: float, **scalars: Any) -> None:
        self.method = method
        W = problem.weights
        masks = problem.masks(W, method.sparsity_scale(0.0))
        Z = [store.like(w).copy_(torch.where(m, w, 0)) for w, m in zip(W, masks, strict=True)]
        lam = [store.like(w).zero_() for w in W]
        super().__init__(problem, {"Z": Z, "lam": lam}, {"rho": rho, **scalars})

    def project(self, progress: float) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Return values ↦ masks of their projection at this progress."""
        scale = self.method.sparsity_scale(progress)
        return lambda values: self.problem.masks(values, scale)


ConstantOrSchedule = float | Constant | Geometric
