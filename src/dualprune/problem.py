"""What is pruned: the parameters, the set each shall end in, and the masks and projections that take them there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dualprune import sharded
from dualprune.budget import compression_rate, lamp_scores
from dualprune.distributed import count_nonzero, keep_largest
from dualprune.errors import DualpruneError
from dualprune.importance import SecondMoment
from dualprune.patterns import KernelPattern, Pattern, Unstructured
from dualprune.quantise import snap

Member = tuple[Pattern, Tensor]  # of a tie: how its values fall into units, and the values
Asked = Callable[[float], float]  # of a final sparsity: what is asked for now


def _final(sparsity: float) -> float:
    return sparsity


@dataclass(frozen=True)
class Target:
    """One parameter to prune, the set it shall end in, and the other names it goes by (tied weights)."""

    name: str
    weight: nn.Parameter
    pattern: Pattern
    sparsity: float
    pooled: bool = False  # shares one threshold with the other pooled targets of its pattern
    aliases: tuple[str, ...] = ()
    bits: int | None = None  # its nonzeros shall end on a grid of so many bits


@dataclass
class Problem:
    """The targets in model order, and why every other parameter is left alone."""

    targets: list[Target]
    skipped: dict[str, str] = field(default_factory=dict)
    frozen: list[Tensor] | None = None  # per target, True = a zero that stays one
    ties: list[tuple[int, ...]] = field(default_factory=list)  # targets that share one mask over their units
    budget: str = "uniform"
    importance: SecondMoment | None = None  # what magnitudes are multiplied by before they are ranked

    @property
    def weights(self) -> list[Tensor]:
        """The live parameters, detached: writing to them writes to the model."""
        return [t.weight.detach() for t in self.targets]

    @property
    def tied_names(self) -> list[list[str]]:
        """The ties by the names of their targets."""
        return [[self.targets[i].name for i in tie] for tie in self.ties]

    def ranked(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the values whose magnitudes are compared: themselves, or times the importance of the weights."""
        return values if self.importance is None else self.importance.weigh(values)

    def masks(self, values: Sequence[Tensor], asked: Asked = _final) -> list[Tensor]:
        """Return the masks (True = keep) of the projection of `values` onto the sets, at what is `asked` of each sparsity."""
        values = self.ranked(values)
        if self.frozen is not None:
            values = [v.masked_fill(f, 0) for v, f in zip(values, self.frozen, strict=True)]
        masks: dict[int, Tensor] = {}
        pools: dict[tuple[Pattern, float, torch.device, torch.dtype], list[tuple[int, ...]]] = {}
        for group in self._groups():
            head, value = self.targets[group[0]], values[group[0]]
            if head.pooled:
                pools.setdefault((head.pattern, head.sparsity, value.device, value.dtype), []).append(group)
            elif len(group) == 1:
                masks[group[0]] = sharded.mask(head.pattern, value, asked(head.sparsity))
            else:
                kept = head.pattern.kept(tuple(value.shape), asked(head.sparsity))
                masks |= zip(group, _tied_masks(self._members(group, values), kept), strict=True)
        for (_, sparsity, _, _), groups in pools.items():
            if self.budget == "lamp":
                shares = [lamp_scores(values[i]) for group in groups for i in group]
                pooled = _largest(shares, asked(sparsity))
            else:
                pooled = _pool_masks([self._members(group, values) for group in groups], asked(sparsity))
            masks |= zip((i for group in groups for i in group), pooled, strict=True)
        if self.frozen is not None:
            masks = {i: mask & ~self.frozen[i] for i, mask in masks.items()}
        return [masks[i] for i in range(len(self.targets))]

    def project(
        self, values: Sequence[Tensor], asked: Asked = _final, on_grid: Callable[[Target], bool] = lambda _: True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the projections of `values` onto "sparse and on the grid", and their masks.

        Where a mask is False the projection is 0, whatever the first list has there. Zero is a level: a weight that is
        rounded to it is not kept. Where `on_grid` denies it, a quantised target's projection is onto "sparse" alone.
        """
        points, masks = list(values), self.masks(values, asked)
        for i, target in enumerate(self.targets):
            if target.bits is not None and on_grid(target):
                points[i] = snap(torch.where(masks[i], values[i], 0), target.bits)
                masks[i] = points[i] != 0
        return points, masks

    def magnitude_pools(self, asked: Asked = _final) -> list[tuple[list[int], int]] | None:
        """Return the targets that share a threshold, and how many weights these keep; None where there is more to a mask.

        There is with other patterns than `Unstructured`, ties, zeros that stay, grids, LAMP, and weights cut up over ranks. The
        threshold is one for `ranked` values.
        """
        special = self.frozen is not None or self.ties or self.budget == "lamp"
        special = special or any(t.bits is not None for t in self.targets)
        plain = all(isinstance(t.pattern, Unstructured) and not hasattr(t.weight, "to_local") for t in self.targets)
        if special or not plain:
            return None
        pools: dict[object, list[int]] = {}
        for i, t in enumerate(self.targets):
            key = (t.sparsity, t.weight.device, t.weight.dtype) if t.pooled else i
            pools.setdefault(key, []).append(i)
        sizes = [(members, sum(self.targets[i].weight.numel() for i in members)) for members in pools.values()]
        return [(m, size - round(asked(self.targets[m[0]].sparsity) * size)) for m, size in sizes]

    def _groups(self) -> list[tuple[int, ...]]:
        """Return the ties, each where its first target stands, and every other target by itself."""
        tie_of = {i: tie for tie in self.ties for i in tie}
        return [group for i in range(len(self.targets)) if (group := tie_of.get(i, (i,)))[0] == i]

    def _members(self, group: tuple[int, ...], values: Sequence[Tensor]) -> list[Member]:
        return [(self.targets[i].pattern, values[i]) for i in group]

    def describe(self) -> str:
        """Say in a few lines what is pruned, how much of it is kept, and what is left alone."""
        total = sum(t.weight.numel() for t in self.targets)
        kept = sum(t.weight.numel() * (1 - t.sparsity) for t in self.targets)
        asked = f"{compression_rate(1 - kept / total):.4g}x" if kept else "all removed"
        lines = [f"pruning {len(self.targets)} parameters, {total:,} weights, to {asked} fewer"]
        lines += [f"  {t.name} is also {', '.join(t.aliases)} (tied): pruned once" for t in self.targets if t.aliases]
        widths = sorted({t.bits for t in self.targets if t.bits is not None})
        lines += [f"  on a grid of {b} bits: {some([t.name for t in self.targets if t.bits == b])}" for b in widths]
        lines += [f"  tied, with one mask over their units: {', '.join(names)}" for names in self.tied_names]
        pools: dict[tuple[Pattern, float], set[str]] = {}
        for t in self.targets:
            if t.pooled:
                kind = f"{str(t.weight.dtype).removeprefix('torch.')} on {t.weight.device}"
                pools.setdefault((t.pattern, t.sparsity), set()).add(kind)
        for kinds in (kinds for kinds in pools.values() if len(kinds) > 1):
            lines.append(f"  no threshold is shared between {' and '.join(sorted(kinds))}: each keeps its own share")
        if self.frozen is not None:
            lines.append(f"  {sum(count_nonzero(self.frozen)):,} weights are zero already and stay zero")
        lines += [f"  left alone, {reason}: {some(names)}" for reason, names in by_reason(self.skipped).items()]
        return "\n".join(lines)


def _energies(group: Sequence[Member]) -> Tensor:
    """Return the energy of every unit, summed over the members."""
    first, *others = (sharded.energies(pattern, v) for pattern, v in group)
    return sum((s.to(first.device) for s in others), first)


def _tied_masks(group: Sequence[Member], kept: int) -> list[Tensor]:
    return _spread(keep_largest([_energies(group)], kept)[0], group)


def _spread(keep: Tensor, group: Sequence[Member]) -> list[Tensor]:
    return [sharded.spread(pattern, keep, v) for pattern, v in group]


def _largest(values: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    total = sum(v.numel() for v in values)
    return keep_largest(values, total - round(sparsity * total))


def _pool_masks(groups: Sequence[Sequence[Member]], sparsity: float) -> list[Tensor]:
    """Rank units of all layers together, by magnitude or, where units differ in size, by energy per weight."""
    pattern, values = groups[0][0][0], [v for group in groups for _, v in group]
    if isinstance(pattern, Unstructured):
        return _largest(values, sparsity)
    if isinstance(pattern, KernelPattern):
        return pattern.masks(values, sparsity, all_alive=True)
    size = [sum(p.weights_per_unit(tuple(v.shape)) for p, v in group) for group in groups]
    scores = [_energies(group) / n for group, n in zip(groups, size, strict=True)]
    # the strongest unit of every layer stays, so that no layer dies and cuts the network
    floor = [int(s.argmax()) for s in scores]
    for s, i in zip(scores, floor, strict=True):
        s[i] = math.inf
    costs = torch.cat([torch.full_like(s, n, dtype=torch.float64) for s, n in zip(scores, size, strict=True)])
    order = torch.cat(scores).argsort(descending=True, stable=True)
    spent = costs[order].cumsum(0)
    budget = (1 - sparsity) * float(costs.sum())
    count = max(len(groups), int((spent <= budget + 0.5).sum()))
    keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    keep[order[:count]] = True
    parts = keep.split([s.numel() for s in scores])
    return [mask for k, group in zip(parts, groups, strict=True) for mask in _spread(k, group)]


def check_frozen(problem: Problem) -> None:
    """Refuse zeros beyond those asked for; a stray one in a thousand weights is forgiven."""
    sizes = [t.pattern.weights_per_unit(tuple(t.weight.shape)) for t in problem.targets]
    together = {i: sum(sizes[j] for j in group) for group in problem._groups() for i in group}
    asked: dict[object, list[int]] = {}
    for i, t in enumerate(problem.targets):
        asked.setdefault((t.pattern, t.sparsity, t.weight.device, t.weight.dtype) if t.pooled else i, []).append(i)
    zeros = count_nonzero(problem.frozen or [])
    for members in asked.values():
        layers = [problem.targets[i] for i in members]
        total, there = sum(t.weight.numel() for t in layers), sum(zeros[i] for i in members)
        head = layers[0]
        if head.pooled:  # the cut goes on until what is left fits, so the last unit may take it below what was asked
            removed, over = head.sparsity * total, max(together[i] for i in members)
        else:
            removed, over = total - head.pattern.kept(tuple(head.weight.shape), head.sparsity) * sizes[members[0]], 0.0
        if there > removed + over + total // 1000:
            names = ", ".join(t.name for t in layers[:3]) + (", …" if len(layers) > 3 else "")
            raise DualpruneError(
                f"{names}: {there / total:.4f} of the weights are zero already and keep_zeros keeps them, but sparsity "
                f"{removed / total:.4f} is asked for: ask for more (it counts against the dense size), or leave keep_zeros out"
            )


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Turn names → reasons into reasons → names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def some(names: Sequence[str]) -> str:
    """Return the first few names, and how many there are."""
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")
