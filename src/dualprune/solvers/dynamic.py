"""Masks that move both ways while training: RigL (Evci et al. 2020) and AC/DC (Peste et al. 2021). Two more rivals to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dualprune.distributed import count_nonzero, span
from dualprune.errors import DualpruneError
from dualprune.patterns import NM, KernelPattern
from dualprune.problem import Problem
from dualprune.schedules import check_fraction
from dualprune.solvers.base import Clock, Method, Row, Solver, Store, dense_gradient


@dataclass(frozen=True)
class RigL(Method):
    """Train sparse throughout: at every update drop the smallest weights of a layer and grow those of largest |gradient|.

    The first masks are by magnitude, at the final sparsity; a layer's count never changes, so the budget ("erk" in the
    paper) decides it. Grown weights start at 0; the share of a layer that moves is α/2 (1 + cos πt) (Evci et al. 2020, §3).
    Units of a pattern are dropped and grown whole. What has no gradient is not grown: a layer moves by no more than has
    one, and not at all where the loss does not reach it.

    Difference from the paper: it starts from trained weights, not at random, and an update follows an optimizer step
    instead of taking its place.

    Args:
        fraction: α, the share of the kept weights that moves at the first update.
        until: fraction of the run after which the masks stay.

    Raises:
        DualpruneError: a fraction is out of its range; on `start`, a pattern has no free units, or units are tied.
    """

    default_every = 100
    fraction: float = 0.3
    until: float = 0.75

    def __post_init__(self) -> None:
        check_fraction("RigL(fraction)", self.fraction)
        check_fraction("RigL(until)", self.until)

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return True

    def moving(self, progress: float) -> float:
        """Return which share of the kept weights moves at `progress`."""
        return self.fraction / 2 * (1 + math.cos(math.pi * progress / self.until)) if progress < self.until else 0.0

    def start(self, problem: Problem, store: Store) -> Solver:  # noqa: D102
        for target in problem.targets:
            if isinstance(target.pattern, NM | KernelPattern):
                raise DualpruneError(f"RigL moves units one by one, which {target.pattern} of {target.name} does not allow")
            if span(target.weight):
                raise DualpruneError(f"RigL needs whole weights, {target.name} is cut up over ranks: use SLR(), or DDP")
        if problem.ties:
            raise DualpruneError("RigL ranks every layer by itself and cannot keep ties; use another method, or no ties")
        return RigLSolver(problem, self, store)


class MaskedSolver(Solver):
    """Holds what is dropped; the optimizer sees no gradient there, so that no momentum gathers for weights that are not."""

    masks_weights = True
    penalises = True  # in the sense of the pruner: changes gradients before the step

    def penalty_(self, grad_scale: Tensor | None) -> None:
        """W.grad ← 0 where W is dropped."""
        for target, drop in zip(self.problem.targets, self.tensors["drop"], strict=True):
            if (grad := dense_gradient(target)) is not None:
                grad.masked_fill_(drop, 0)

    def keep(self, masks: list[Tensor]) -> float:
        """Keep only what the masks hold and what is not frozen at zero; return the share of weights that changed sides."""
        drops, new = self.tensors["drop"], [~mask for mask in masks]
        for now, zeros in zip(new, self.problem.frozen or (), strict=self.problem.frozen is not None):
            now |= zeros
        flips = sum(count_nonzero([old ^ now for old, now in zip(drops, new, strict=True)]))
        for old, now in zip(drops, new, strict=True):
            old.copy_(now)
        return flips / max(sum(drop.numel() for drop in drops), 1)


class RigLSolver(MaskedSolver):
    """Holds the masks and the last gradient of every weight, which the optimizer does not see where the weight is dropped."""

    fixed_size = True

    def __init__(self, problem: Problem, method: RigL, store: Store) -> None:
        drop = [~mask for mask in problem.masks(problem.weights)]
        super().__init__(problem, {"drop": drop, "grad": [store.like(w).zero_() for w in problem.weights]}, {})
        self.method = method

    def penalty_(self, grad_scale: Tensor | None) -> None:  # noqa: D102
        for target, last in zip(self.problem.targets, self.tensors["grad"], strict=True):
            grad = dense_gradient(target)
            if grad is None:
                last.zero_()
            else:
                last.copy_(grad)
        for last, zeros in zip(self.tensors["grad"], self.problem.frozen or (), strict=self.problem.frozen is not None):
            last.masked_fill_(zeros.to(last.device), 0)  # nothing is grown there
        super().penalty_(grad_scale)

    def update(self, clock: Clock) -> Row:  # noqa: D102
        share, masks, ranked = self.method.moving(clock.progress), [], self.problem.ranked(self.problem.weights)
        for target, v, drop, grad in zip(self.problem.targets, ranked, self.tensors["drop"], self.tensors["grad"], strict=True):
            pattern, w = target.pattern, target.weight.detach()
            active = pattern.scores((~drop).to(w.dtype)) != 0
            keep = rigl_update(pattern.scores(v), pattern.scores(grad.to(w.device, w.dtype)), active, share)
            masks.append(pattern.expand(keep, tuple(w.shape)).expand(w.shape))
        return {"support_change": self.keep(masks), "moving": share}


def rigl_update(w: Tensor, grad: Tensor, active: Tensor, share: float) -> Tensor:
    """Return the new mask over units: `share` of the active ones, the smallest |w|, make room for the largest |grad|.

    What was dropped may be grown again at once, and then keeps its value (Evci et al. 2020, Algorithm 1). Where fewer than
    `share` have a gradient to be grown for, the largest of those that made room stay.
    """
    kept = int(torch.count_nonzero(active))
    moved = round(share * kept)
    stays = largest(w, kept - moved, active)
    grown = largest(grad, moved, ~stays & (grad != 0))
    new = stays | grown
    return new | largest(w, kept - int(torch.count_nonzero(new)), active & ~new)


def largest(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """Return the mask of the k largest |scores| where `among` is True, or of all there; the first of equals."""
    order = scores.abs().masked_fill(~among, -1).flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:k]] = True
    return mask.view(scores.shape) & among


@dataclass(frozen=True)
class ACDC(Method):
    """Alternating compressed and decompressed training: phases under a mask by magnitude, phases in which all may move.

    All are fractions of the run. The defaults are the paper's of 100 epochs (Peste et al. 2021): 10 dense, then 5
    compressed and 5 dense in turn, the last dense phase twice as long, 15 compressed at the end. A phase begins at the
    first update that falls into it: let `every` be well below period · total_steps.

    Difference from the paper: in a compressed phase the optimizer sees no gradient of dropped weights, so that their
    momentum dies out, where the paper resets all momentum.

    Args:
        warmup: dense at the start.
        period: length of a phase.
        tail: compressed at the end.

    Raises:
        DualpruneError: a fraction is out of its range, or they leave no room.
    """

    default_every = 20
    warmup: float = 0.1
    period: float = 0.05
    tail: float = 0.15

    def __post_init__(self) -> None:
        for name in ("warmup", "period", "tail"):
            check_fraction(f"ACDC({name})", getattr(self, name))
        if not self.period or not self.tail or self.warmup + self.tail > 1:
            raise DualpruneError(
                "ACDC expects a period and a tail above 0, and warmup + tail of at most 1; "
                f"got warmup={self.warmup}, period={self.period}, tail={self.tail}"
            )

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return True

    def compressed(self, progress: float) -> bool:
        """Tell whether the phase at `progress` is under a mask."""
        left = 1 - self.tail - progress
        if left <= 1e-9 or progress < self.warmup:
            return left <= 1e-9
        return left > 2 * self.period + 1e-9 and int((progress - self.warmup) / self.period + 1e-9) % 2 == 0

    def start(self, problem: Problem, store: Store) -> Solver:  # noqa: D102
        return ACDCSolver(problem, self)


class ACDCSolver(MaskedSolver):
    """Its only state is the masks; in a dense phase nothing is dropped."""

    def __init__(self, problem: Problem, method: ACDC) -> None:
        drop = [torch.zeros_like(w, dtype=torch.bool) for w in problem.weights]
        super().__init__(problem, {"drop": drop}, {"compressed": False})
        self.method = method

    def update(self, clock: Clock) -> Row:  # noqa: D102
        compressed, flips = self.method.compressed(clock.progress), 0.0
        if compressed != self.scalars["compressed"]:
            W = self.problem.weights
            masks = self.problem.masks(W) if compressed else [torch.ones_like(w, dtype=torch.bool) for w in W]
            flips = self.keep(masks)
        self.scalars["compressed"] = compressed
        return {"support_change": flips, "compressed": compressed}
