"""What a method is (a frozen value), what a solver is (its state over one problem), and the contract between them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dualprune.chunks import chunks
from dualprune.distributed import empty_like, local
from dualprune.errors import DualpruneError, suggest
from dualprune.kernels import add_penalty_
from dualprune.patterns import Filter
from dualprune.problem import Asked, Problem, Target
from dualprune.schedules import Closing, Geometric, Schedule, as_schedule, check_curve, check_fraction, ramped
from dualprune.solvers.vector import Kept, RankedCut, Ranking, Scratch, Shifted, follow_, pull_, pull_outside_
from dualprune.stride import Stride

Row = dict[str, Any]


@dataclass(frozen=True)
class Method(ABC):
    """A way to prune, with its constants; `start` makes the solver that carries it out."""

    default_every: ClassVar[int] = 50  # optimizer steps between updates, where the caller does not say
    penalises: ClassVar[bool] = False  # adds a penalty's gradient to the loss's

    @abstractmethod
    def start(self, problem: Problem, store: Store) -> Solver:
        """Return a solver at its starting point on `problem`."""

    @property
    def needs_total_steps(self) -> bool:
        """Whether anything in the method moves with the progress of the run."""
        return any(isinstance(getattr(self, f.name), Geometric) for f in fields(self))

    @property
    def importance(self) -> str:
        """What ranks the weights where `attach` is not told."""
        return "magnitude"

    @property
    def sharpness(self) -> float:
        """How far uphill the loop shall take its gradients (`perturbed`), which makes two of them a step; 0: one, in place."""
        return 0.0

    def asked(self, progress: float, sparsity: float) -> float:
        """Return which sparsity a set has at `progress` on its way to `sparsity`."""
        return sparsity

    @property
    def hold_from(self) -> float:
        """The progress from which the weights are cut and the masks held for the rest of the run; infinity: never."""
        return math.inf


@dataclass(frozen=True)
class Clock:
    """What an update may depend on besides tensors: the mean observed loss, the progress, and how the optimizer steps.

    None: the loss was not handed in; there is no optimizer.
    """

    loss: float | None
    progress: float
    stride: Stride | None = None
    steps: int = 1  # of the optimizer, from one update to the next

    @property
    def lr(self) -> float | None:
        """The optimizer's learning rate, the largest of its groups'; None where there is none."""
        return None if self.stride is None else self.stride.lr


class Solver:
    """State per target and scalars; saved and loaded by name, so a solver declares and never writes I/O."""

    def __init__(self, problem: Problem, tensors: dict[str, list[Tensor]], scalars: dict[str, Any]) -> None:
        self.problem = problem
        self.tensors = tensors
        self.scalars = scalars

    penalises = False  # has a penalty, whose gradient `penalty_` adds at every step
    decoupled = False  # has a penalty that `pull_` applies to the weights after every step, instead
    masks_weights = False  # moves masks itself at every update
    fixed_size = False  # and these always keep what is asked for, so that a cut keeps to them

    def update(self, clock: Clock) -> Row:
        """Move the solver's state once; return the history row."""
        raise NotImplementedError

    def penalty_(self, grad_scale: Tensor | None) -> None:
        """Add the penalty's gradient to `.grad` in place, times `grad_scale` where a fused optimizer unscales by itself."""
        raise NotImplementedError

    def pull_(self) -> None:
        """Move the weights themselves, after the optimizer's step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Store:
    """Where Z and Λ live: dtype and device, None for those of the weights."""

    dtype: torch.dtype | None = None
    device: str | torch.device | None = None

    def like(self, w: Tensor) -> Tensor:
        """Return an uninitialised tensor of w's shape and memory layout."""
        return empty_like(w, self.dtype, self.device)


@dataclass(frozen=True)
class DualMethod(Method):
    """What SLR and ADMM share: a penalty schedule, a shrinking set, and a tail under the fixed mask."""

    penalises = True
    ramp: float = 0.0
    hold: float = 0.0
    curve: str = "geometric"
    pull: ClassVar[str] = "everywhere"  # where the penalty acts; a field of methods whose Z can follow W

    def _check(self) -> None:
        if self.pull not in PULLS:
            near = suggest(str(self.pull), PULLS)
            raise DualpruneError(f"{type(self).__name__}(pull) is one of {PULLS}, got {self.pull!r}{near}")
        check_fraction(f"{type(self).__name__}(ramp)", self.ramp)
        check_fraction(f"{type(self).__name__}(hold)", self.hold)
        check_curve(f"{type(self).__name__}(curve)", self.curve)
        if self.ramp + self.hold > 1 + 1e-9:
            raise DualpruneError(
                f"{type(self).__name__}: ramp={self.ramp} and hold={self.hold} are parts of one run and sum to at most 1: "
                "the masks would be fixed before the set has its final size; lower one of them"
            )

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return bool(self.ramp or self.hold) or super().needs_total_steps

    def asked(self, progress: float, sparsity: float) -> float:  # noqa: D102
        return ramped(sparsity, progress, self.ramp, self.curve)

    @property
    def hold_from(self) -> float:  # noqa: D102
        return 1 - self.hold if self.hold else math.inf


class DualSolver(Solver):
    """Z = Π(W), Λ = 0 at the start, and the penalty ρ that the gradient hook reads; 0 until an update has found it."""

    penalises = True

    def __init__(self, problem: Problem, method: DualMethod, store: Store, rho: float, **scalars: Any) -> None:
        self.method = method
        self.decoupled = isinstance(getattr(method, "rho", None), Closing)
        W = problem.weights
        points, masks = problem.project(W, partial(method.asked, 0.0), self._on_grid)
        Z = [store.like(w).copy_(torch.where(m, p, 0)) for w, p, m in zip(W, points, masks, strict=True)]
        lam = [store.like(w).zero_() for w in W]
        super().__init__(problem, {"Z": Z, "lam": lam}, {"rho": rho, **scalars})
        self._room = Scratch()
        self._by: dict[float, Tensor] = {}  # −κ/ρ on the device

    def penalty_(self, grad_scale: Tensor | None) -> None:
        """W.grad += Λ + ρ(W − Z), the penalty's gradient (eq. 5); where Z follows W, only outside Z's support."""
        if not self.decoupled:
            self._add([dense_gradient(t) for t in self.problem.targets], grad_scale)

    def pull_(self) -> None:
        """W −= κ/ρ · (Λ + ρ(W − Z)): the same direction, in a step of its own; nothing before the first update.

        Whole filters have a κ of their own (`Closing`).
        """
        for shared, filters in (("share", False), ("share_of_filters", True)):
            moving = [t.weight.requires_grad and self._closes_as_filters(t) is filters for t in self.problem.targets]
            if (share := self.scalars.get(shared)) and any(moving):
                weights = [w.detach() if moves else None for w, moves in zip(self.problem.weights, moving, strict=True)]
                self._add(weights, self._factor(-share / self.scalars["rho"]))

    def _closes_as_filters(self, target: Target) -> bool:
        return self._follows(target) and isinstance(target.pattern, Filter)

    def _factor(self, by: float) -> Tensor:
        """Return the number on the weights' device, where it stays until the next update."""
        if by not in self._by:
            self._by[by] = torch.tensor(by, device=self.problem.weights[0].device)
        return self._by[by]

    def _add(self, to: Sequence[Tensor | None], scale: Tensor | None) -> None:
        """Add scale · (Λ + ρ(W − Z)) in place, for every target to what `to` has for it."""
        rho = self.scalars["rho"]
        for outside in (False, True):
            rows = [
                (local(there), local(t.weight.detach()), local(z), local(lam))
                for there, t, z, lam in zip(to, self.problem.targets, self.tensors["Z"], self.tensors["lam"], strict=True)
                if self._follows(t) is outside and there is not None
            ]
            left = add_penalty_(rows, rho, scale, outside) if rows else []
            for there, w, z, lam in chunks(*zip(*left, strict=True)) if left else ():
                z, lam = z.to(w.device), lam.to(w.device)
                here = None if scale is None else scale.to(w.device)
                (pull_outside_ if outside else pull_)(there, w, z, lam, rho, here, self._room)

    def penalty(self, rho: float | Schedule, clock: Clock) -> float:
        """Return ρ for an update at `clock`."""
        schedule = as_schedule(rho, "rho")
        if not isinstance(schedule, Closing):
            return schedule(clock.progress)
        if clock.stride is None:
            raise DualpruneError("Closing measures ρ in optimizer steps, and there is none here: give rho=Geometric(0.1, 1.0)")
        books = self.scalars
        # the gradient's own size, before a penalty adds to it
        books["noise"] = books.get("noise") or clock.stride.noise()
        eta = clock.stride.length(books["noise"])
        books["fastest"] = max(eta, books.get("fastest", 0.0))
        self._by.clear()
        books |= {"share": schedule.share(clock.steps), "share_of_filters": schedule.share(clock.steps, of_filters=True)}
        return schedule.penalty(eta, books["fastest"], clock.steps * clock.stride.gain)

    def catch_up(self, rho: float) -> tuple[float, float]:
        """Bring Z, where it follows W on its support between updates, to where W is now; return `lagrangian_terms` there."""
        follows = [self._follows(target) for target in self.problem.targets]
        return follow_(self.tensors["Z"], self.problem.weights, self.tensors["lam"], rho, follows)

    def _follows(self, target: Target) -> bool:
        return self.method.pull == "outside" and not self._on_grid(target)

    def _on_grid(self, target: Target) -> bool:
        """Whether Z is on the target's grid, and pulls W to its levels: not where W comes there in the hold."""
        return target.bits is not None and not (self.method.pull == "outside" and self.method.hold)

    def project(self, progress: float) -> Callable[[Shifted], Sequence[Kept]]:
        """Return V ↦ what its projection at this progress keeps."""
        asked = partial(self.method.asked, progress)
        onto = partial(self.problem.project, asked=asked, on_grid=self._on_grid)
        return lambda V: _cuts(self.problem, V, asked) or list(zip(*onto(list(V)), strict=True))


def _cuts(problem: Problem, V: Shifted, asked: Asked) -> Sequence[Kept] | None:
    """Return the projection of V as thresholds where that is all of it, so that neither V nor a mask is held."""
    pools, ranking = problem.magnitude_pools(asked), None
    if problem.importance is not None and problem.importance.known:
        moments = problem.importance.moments
        if any(m is None or m.device != w.device for m, w in zip(moments, V.W, strict=True)):
            return None
        ranking = Ranking([m for m in moments if m is not None], problem.importance.root)
    cuts: dict[int, Kept] = {}
    for members, k in pools or ():
        cut = V.cut(members, k, ranking)
        if cut is None:
            return None
        cuts |= {i: cut if ranking is None else RankedCut(cut, ranking.moments[i], ranking.root) for i in members}
    return [cuts[i] for i in sorted(cuts)] if pools else None


def first_penalty(rho: float | Schedule) -> float:
    """Return ρ before the first update: 0 where only that can measure it."""
    schedule = as_schedule(rho, "rho")
    return 0.0 if isinstance(schedule, Closing) else schedule(0.0)


def dense_gradient(target: Target) -> Tensor | None:
    """Return the gradient of a target's weight, to be added to; None where it has none.

    Raises:
        DualpruneError: the gradient is sparse, or is not cut up over ranks as the weight is.
    """
    grad = target.weight.grad
    if grad is not None and grad.is_sparse:
        raise DualpruneError("a pruned parameter has sparse gradients: use sparse=False, or ignore this parameter")
    if grad is not None and getattr(grad, "placements", None) != getattr(target.weight, "placements", None):
        raise DualpruneError(
            f"{target.name} is cut up as {getattr(target.weight, 'placements', 'one piece')} and its gradient as "
            f"{getattr(grad, 'placements', 'one piece')}: redistribute the gradient before optimizer.step()"
        )
    return grad


PULLS = ("everywhere", "outside")
OF_OPTIMIZER = ("noise", "fastest")  # scalars that `penalty` has measured on the optimizer at hand
ConstantOrSchedule = float | Schedule
