"""Reweighted regularisation: one objective, one λ, every sparsity (the unified framework of the 2025 abstract).

    min f(W) + λ Σ_g P_g R(W_g),        P_g = 1 / (R(W_g) + ε) from the weights of the last refresh

Small units are pushed ever harder, large ones hardly: the few refreshes minimise Σ log(R(W_g) + ε) by its tangents
(Candès, Wakin & Boyd 2008), a smooth stand-in for the count of nonzero units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dualprune.chunks import chunks
from dualprune.errors import DualpruneError, suggest
from dualprune.patterns import Pattern, Unstructured
from dualprune.problem import Problem
from dualprune.schedules import check_fraction, check_positive
from dualprune.solvers.base import Clock, Method, Row, Solver, Store, dense_gradient
from dualprune.solvers.penalty import Penalty, grouped, unit_norms
from dualprune.solvers.vector import Tensors

NORMS = ("plain", "squared")
FIRST_PUSH = 1.0  # the first λ: the norm of the penalty's gradient over that of the loss's
LARGEST_FACTOR = 2.0  # by which an update may move λ
LARGEST_RISE = 1e4  # of λ over the first one: where the optimizer cannot go faster (Adam), more λ only blinds it
_TINY = 1e-300


@dataclass(frozen=True)
class Reweighted(Method):
    """Pull units towards zero by λ Σ P_g R(W_g) while training, then cut to the asked rate and train on under the mask.

    R is |w| where a unit is one weight, ‖W_g‖² for groups; P is refreshed at equal distances. docs/reweighted.md has the table.

    Differences from the papers: |w| and ‖W_g‖ are rounded to a parabola below ε (Huber), where a unit counts as dead
    anyway: the corner's constant push would make a dead weight jump to and fro by lr·λ/ε at every step.
    And ε is a fraction of the layer's mean R at the start, not a number, because ε decides what is small, and the scales of
    layers differ by orders of magnitude: weights of a wide layer, norms of large groups. `paper` takes ε as a number.

    Args:
        lam: λ, in units of the loss; None finds it during the run (`feedback`), shown in the history.
        eps: ε as a fraction of the mean of R over a layer's units at the start; absolute where `relative` is False.
        relative: whether `eps` is such a fraction.
        norm: "plain" for R = ‖W_g‖, "squared" for R = ‖W_g‖²; None: plain for single weights, squared for groups.
        spare: push only units outside the asked set of the last refresh; None: for all patterns but `Unstructured`.
        refreshes: how often P is taken anew from the weights, besides the start; no more often than there are updates.
        target: what the search for λ aims at: the energy outside the asked set over that inside, when the weights are cut.
        hold: fraction at the end of the run that is trained under the fixed mask, without the penalty.

    Raises:
        DualpruneError: a constant is out of its range.
    """

    penalises = True
    lam: float | None = None
    eps: float = 0.1
    relative: bool = True
    norm: str | None = None
    spare: bool | None = None
    refreshes: int = 8
    target: float = 1e-3
    hold: float = 0.5

    def __post_init__(self) -> None:
        if self.lam is not None:
            check_positive("Reweighted(lam)", self.lam, " or None, which finds it")
        check_positive("Reweighted(eps)", self.eps)
        check_positive("Reweighted(target)", self.target)
        if self.norm not in (None, *NORMS):
            near = suggest(str(self.norm), NORMS)
            raise DualpruneError(f"Reweighted(norm) is one of {NORMS} or None, got {self.norm!r}{near}")
        if isinstance(self.refreshes, bool) or not isinstance(self.refreshes, int) or self.refreshes < 1:
            raise DualpruneError(f"Reweighted(refreshes) is a whole number of at least 1, got {self.refreshes!r}")
        if not isinstance(self.relative, bool):
            raise DualpruneError(f"Reweighted(relative) is True or False, got {self.relative!r}")
        if not isinstance(self.spare, bool | None):
            raise DualpruneError(f"Reweighted(spare) is True, False or None, got {self.spare!r}")
        check_fraction("Reweighted(hold)", self.hold)
        if self.hold == 1:
            raise DualpruneError("Reweighted(hold) is a fraction below 1: nothing would be regularised; try 0.3")

    @classmethod
    def paper(cls, lam: float | None = None, eps: float = 1e-3, refreshes: int = 4) -> Reweighted:
        """Return the papers' constants: an absolute ε of 1e-3 to 1e-2, every unit pushed, and P refreshed 3 to 5 times."""
        return cls(lam=lam, eps=eps, relative=False, spare=False, refreshes=refreshes)

    @property
    def needs_total_steps(self) -> bool:  # noqa: D102
        return True

    @property
    def hold_from(self) -> float:  # noqa: D102
        return 1 - self.hold if self.hold else math.inf

    def start(self, problem: Problem, store: Store) -> ReweightedSolver:  # noqa: D102
        return ReweightedSolver(problem, self, store)


def feedback(odds: float, last: float, goal: float, passed: float, left: float) -> float:
    """Return the factor for λ: the fall of the log-odds that is needed over the one that was measured.

    The log-odds log(‖W − Π(W)‖² / ‖Π(W)‖²) shall fall in a straight line to `goal`, whatever the scale of loss, weights
    and learning rate: too slow a fall raises λ, too fast a one lowers it, by at most a factor of two either way.

    Args:
        odds: where they are now.
        last: where they were at the last update.
        goal: where they shall be when the regularised part of the run ends.
        passed: progress since the last update.
        left: progress until that end.
    """
    if passed <= 0:
        return 1.0
    need, fell = (odds - goal) / max(left, passed), (last - odds) / passed
    if need <= 0:
        return 1 / LARGEST_FACTOR
    return min(max(need / fell, 1 / LARGEST_FACTOR), LARGEST_FACTOR) if fell > 0 else LARGEST_FACTOR


class ReweightedSolver(Solver):
    """Holds P (one number a unit), the last mask (`keep`), every layer's ε and λ, and the books of the feedback.

    A search has one λ per budget, as a constraint has one multiplier: one for all layers that share a threshold (budget
    "global"), one a layer where every layer has its own sparsity.
    """

    penalises = True

    def __init__(self, problem: Problem, method: Reweighted, store: Store) -> None:
        self.method, self.budgets = method, _budgets(problem)
        norms = [unit_norms(t.weight.detach(), t.pattern) for t in problem.targets]
        P = [torch.empty_like(n, dtype=store.dtype, device=store.device) for n in norms]
        keep = [torch.zeros_like(w, dtype=torch.bool, device=store.device) for w in problem.weights]
        books = {"lam": [method.lam] * len(self.budgets), "most": [None] * len(self.budgets)}
        super().__init__(problem, {"P": P, "keep": keep}, books | {"refreshed": 0, "progress": 0.0, "lr": None})
        self.scalars["eps"] = [self._eps(i, n) for i, n in enumerate(norms)]
        self.scalars["odds"] = [_log_odds(*part) for part in self._split()[0]]
        self._refresh(norms)

    @property
    def penalties(self) -> list[Penalty]:
        """The layers' penalties."""
        return [
            Penalty(t.pattern, self._squared(t.pattern), e)
            for t, e in zip(self.problem.targets, self.scalars["eps"], strict=True)
        ]

    def penalty_(self, grad_scale: Tensor | None) -> None:  # noqa: D102
        penalties, lr = self.penalties, self.scalars["lr"]
        steepest = 0.5 / lr if lr else math.inf  # one step brings no weight further than halfway to zero
        for b, members in enumerate(self.budgets):
            if not self.problem.targets[members[0]].sparsity:
                continue  # nothing is to go there
            grads = [(i, grad) for i in members if (grad := dense_gradient(self.problem.targets[i])) is not None]
            lam = self.scalars["lam"][b] or self._first_lam(b, grads, grad_scale)
            if not lam:
                continue
            for i, grad in grads:
                w = self.problem.targets[i].weight.detach()
                scale = None if grad_scale is None else grad_scale.to(w.device)
                penalties[i].pull_(grad, w, self.tensors["P"][i].to(w.device), lam, scale, steepest)

    def update(self, clock: Clock) -> Row:  # noqa: D102
        books, method, end = self.scalars, self.method, min(self.method.hold_from, 1.0)
        norms = [unit_norms(t.weight.detach(), t.pattern) for t in self.problem.targets]
        energies, flips = self._split()
        dead, odds, before = self._dead(norms), [_log_odds(*part) for part in energies], list(books["lam"])

        due = min(int(clock.progress / end * (method.refreshes + 1) + 1e-9), method.refreshes)
        if refresh := due > books["refreshed"]:
            self._refresh(norms)
        passed, goal = clock.progress - books["progress"], math.log(method.target)
        for b, lam in enumerate(before if method.lam is None else ()):
            factor = feedback(odds[b], books["odds"][b], goal, passed, end - clock.progress)
            # more than half of what is to be kept is dead too: the odds say nothing then, and λ is too large
            starved = dead[b] > (1 + self.problem.targets[self.budgets[b][0]].sparsity) / 2
            if lam is not None:
                books["lam"][b] = min(lam * (min(factor, 1 / LARGEST_FACTOR) if starved else factor), books["most"][b])
        books |= {"odds": odds, "progress": clock.progress, "lr": clock.lr, "refreshed": max(due, books["refreshed"])}
        outside, inside = (sum(part) for part in zip(*energies, strict=True))
        return {
            "lam": _mean(before),
            "violation": math.sqrt(outside),
            "outside": outside / max(outside + inside, _TINY),
            "dead": sum(d * n for d, n in zip(dead, self._sizes(), strict=True)) / sum(self._sizes()),
            "support_change": flips,
            "refreshed": refresh,
        }

    def _first_lam(self, budget: int, grads: list[tuple[int, Tensor]], grad_scale: Tensor | None) -> float | None:
        """Set the first λ of a budget by the loss's gradient at the first step that has one; None: not yet."""
        loss, penalty = 0.0, 0.0
        for i, grad in grads:
            target = self.problem.targets[i]
            loss += float(grad.double().square().sum())
            penalty += self.penalties[i].strength(unit_norms(target.weight.detach(), target.pattern), self.tensors["P"][i])
        lam = FIRST_PUSH * math.sqrt(loss / (penalty or 1.0)) / (1.0 if grad_scale is None else float(grad_scale))
        if not 0 < lam < math.inf:  # the gradient is zero, or it overflowed
            return None
        self.scalars["lam"][budget], self.scalars["most"][budget] = lam, LARGEST_RISE * lam
        return lam

    def _refresh(self, norms: Tensors) -> None:
        for P, penalty, n, keep in zip(self.tensors["P"], self.penalties, norms, self.tensors["keep"], strict=True):
            fresh = penalty.reweigh(n)
            spares = penalty.pattern != Unstructured() if self.method.spare is None else self.method.spare
            if spares:
                fresh[unit_norms(keep.to(n.device, n.dtype), penalty.pattern) > 0] = 0
            P.copy_(fresh)

    def _split(self) -> tuple[list[tuple[float, float]], float]:
        """Return ‖W − Π(W)‖² and ‖Π(W)‖² of every budget, and the share of weights whose mask changed."""
        W, rows, flips = self.problem.weights, [], 0
        for w, mask, old in zip(W, self.problem.masks(W), self.tensors["keep"], strict=True):
            parts = [(v.masked_fill(m, 0), v.masked_fill(~m, 0)) for v, m in chunks((w,), (mask,))]
            rows.append(torch.stack([_energy(side) for part in parts for side in part]).view(-1, 2).sum(0).cpu())
            flips += int(torch.count_nonzero(mask.to(old.device) ^ old))
            old.copy_(mask)
        energies = [torch.stack([rows[i] for i in members]).sum(0).tolist() for members in self.budgets]
        return [(out, kept) for out, kept in energies], flips / sum(w.numel() for w in W)

    def _dead(self, norms: Tensors) -> list[float]:
        """Return the share of every budget's weights in units of R ≤ ε."""
        shares = [
            int(torch.count_nonzero(penalty.measure(n) <= penalty.eps)) / n.numel() * t.weight.numel()
            for t, penalty, n in zip(self.problem.targets, self.penalties, norms, strict=True)
        ]
        return [sum(shares[i] for i in members) / n for members, n in zip(self.budgets, self._sizes(), strict=True)]

    def _sizes(self) -> list[int]:
        return [sum(self.problem.targets[i].weight.numel() for i in members) for members in self.budgets]

    def _squared(self, pattern: Pattern) -> bool:
        return self.method.norm == "squared" or (self.method.norm is None and grouped(pattern))

    def _eps(self, index: int, norms: Tensor) -> float:
        if not self.method.relative:
            return self.method.eps
        mean = float((norms.double().square() if self._squared(self.problem.targets[index].pattern) else norms.double()).mean())
        return self.method.eps * (mean or 1.0)  # a layer of zeros has no scale


def _budgets(problem: Problem) -> list[list[int]]:
    """Return the targets that share one threshold together, and every other one by itself."""
    members: dict[object, list[int]] = {}
    for i, t in enumerate(problem.targets):
        members.setdefault((t.pattern, t.sparsity) if t.pooled else i, []).append(i)
    return list(members.values())


def _log_odds(outside: float, inside: float) -> float:
    return math.log(max(outside, _TINY)) - math.log(max(inside, _TINY))


def _mean(lams: list[float | None]) -> float | None:
    """Return the geometric mean of those that are set; the number itself where all are the same."""
    known = [lam for lam in lams if lam is not None]
    if len(set(known)) <= 1:
        return known[0] if known else None
    return math.exp(sum(map(math.log, known)) / len(known))


def _energy(w: Tensor) -> Tensor:
    return w.double().square().sum()
