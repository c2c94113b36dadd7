"""Lists of tensors as one long vector: the few operations the updates are made of.

On a CPU they walk through the memory in chunks that stay in its last cache, so that no full-size temporary is made.
Of tensors that are cut up over ranks (DTensors) every rank walks through its own part, and sums are of all parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualprune.chunks import chunks, dense
from dualprune.distributed import agree, local, total
from dualprune.scratch import Scratch
from dualprune.selection import BITS, Cut, memory_order

Tensors = Sequence[Tensor]
Root = Callable[[Tensor, Tensor | None], Tensor]  # a piece of v, and memory for the answer ↦ what magnitudes are multiplied by


def lagrangian_terms(W: Tensors, Z: Tensors, lam: Tensors) -> tuple[float, float]:
    """Return ⟨Λ, W − Z⟩ and ‖W − Z‖², accumulated in double precision over chunks."""
    return follow_(Z, W, lam, 1.0, [False] * len(Z))  # no Z moves


def ascend_(lam: Tensors, s: float, W: Tensors, Z: Tensors) -> None:
    """Λ ← Λ + s(W − Z), in place."""
    room = Scratch()
    for multiplier, w, z in chunks(lam, W, Z):
        gap = _gap(w, z, room)
        multiplier.add_(gap.to(multiplier.device), alpha=s)


def pull_(grad: Tensor, w: Tensor, z: Tensor, lam: Tensor, rho: float, scale: Tensor | None, room: Scratch) -> None:
    """Add scale·(Λ + ρ(W − Z)) to the gradient, in place.

    The pull is formed first: what cancels in it would round a narrow gradient away, were it to pass through that.
    """
    gap = _gap(w, z, room)
    pull = torch.add(lam.float(), gap, alpha=rho) if _narrow(gap) else torch.add(lam, gap, alpha=rho, out=gap)
    if scale is None:
        grad.add_(pull)
    else:
        grad.addcmul_(pull, scale)


def pull_outside_(grad: Tensor, w: Tensor, z: Tensor, lam: Tensor, rho: float, scale: Tensor | None, room: Scratch) -> None:
    """Add scale·(Λ + ρW) to the gradient where Z is zero, in place, the pull formed first."""
    wide = torch.float32 if _narrow(w) else None
    outside = torch.eq(z, 0, out=_laid_out(w, "outside", room, wide))
    if scale is not None:
        outside.mul_(scale)
    pull = torch.add(lam if wide is None else lam.to(wide), w, alpha=rho, out=_laid_out(w, "pull", room, wide or lam.dtype))
    grad.addcmul_(outside, pull)


def follow_(Z: Tensors, W: Tensors, lam: Tensors, rho: float, follows: Sequence[bool]) -> tuple[float, float]:
    """Z ← W + Λ/ρ where Z is not zero, the best Z with this support (eq. 10), of those tensors that follow.

    Return the `lagrangian_terms` of all there, which are taken in the same pass.
    """
    rows, room, V = [], Scratch(), Shifted(W, lam, rho)
    for z_whole, w_whole, lam_whole, moves in zip(Z, W, lam, follows, strict=True):
        terms = []
        for z, w, multiplier in chunks([z_whole], [w_whole], [lam_whole]):
            if moves:
                kept = torch.ne(z, 0, out=room.like(z, "kept")).to(w.device)
                point = V.form(w, multiplier, room.like(w, "v"))
                if z.device == w.device:
                    torch.mul(point, kept, out=z)
                else:
                    z.copy_(point.mul_(kept))
            gap = _gap(w, z, room)
            terms.append(torch.stack([_dot(multiplier.to(w.device), gap), _dot(gap, gap)]).double())
        rows.append(torch.stack(terms).sum(0))
    inner, square = total(rows, W).tolist() if rows else (0.0, 0.0)
    return inner, square


class Shifted:
    """V = W + Λ/ρ, the point that is projected (eq. 10): formed piece by piece where it is needed, never held."""

    def __init__(self, W: Tensors, lam: Tensors, rho: float) -> None:
        self.W, self.lam, self.rho = W, lam, rho

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.form, self.W, self.lam)

    def form(self, w: Tensor, multiplier: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the piece of V at a piece of W and the same of Λ, in memory of w's dtype if given."""
        if _narrow(w):
            return torch.add(w.float(), multiplier.to(w.device), alpha=1 / self.rho).to(w.dtype)
        return torch.add(w, multiplier.to(w.device), alpha=1 / self.rho, out=out).to(w.dtype)

    def cut(self, members: Sequence[int], k: int, ranking: Ranking | None = None) -> Cut | None:
        """Return the cut that keeps the k largest of the tensors with the indices `members`; None if a mask must.

        It must where elements at the threshold tie and the memory of a tensor is not in the order in which ties are kept.
        """
        lists = (self.W, self.lam) if ranking is None else (self.W, self.lam, ranking.moments)
        W, lam, *moments = ([tensors[i] for i in members if self.W[i].numel()] for tensors in lists)
        room = Scratch()

        def rank(w: Tensor, multiplier: Tensor, *moment: Tensor, out: Tensor | None = None) -> Tensor:
            v = self.form(w, multiplier, out)
            return _rank(v, moment[0], ranking.root, None if out is None else room, v) if ranking is not None else v

        def values(stride: int) -> Iterable[Tensor]:
            if stride == 1:
                return (rank(w, *rest, out=_reused(room, w)).reshape(-1) for w, *rest in chunks(W, lam, *moments))
            rows = zip(W, lam, *moments, strict=True)
            return (rank(*(_flat(t, w)[::stride] for t in (w, *rest))) for w, *rest in rows)

        cut = Cut(values, k, sum(w.numel() for w in W))
        return cut if not cut.surplus or all(w.is_contiguous() for w in W) else None


class Ranking(NamedTuple):
    """What ranks the weights in place of magnitude alone: v of each tensor, and the power of it."""

    moments: Tensors
    root: Root


class RankedCut(NamedTuple):
    """A cut of what ranks one tensor, and v of that tensor, of which the rank is made."""

    cut: Cut
    moment: Tensor
    root: Root

    def __call__(self, v: Tensor, moment: Tensor, room: Scratch) -> Tensor:
        """Cut the next piece, in place, and return it."""
        left = self.cut(_rank(v, moment, self.root, room, None))
        return v.mul_(torch.ne(left, 0, out=left))


Kept = Cut | RankedCut | tuple[Tensor, Tensor]  # what a projection keeps of one tensor: a threshold, or a point and its mask


class Moved(NamedTuple):
    """What `replace_` did: ‖Z_new − Z_old‖, the fraction of weights whose support changed, ⟨Λ, W − Z_new⟩, ‖W − Z_new‖²."""

    z_change: float
    support_change: float
    inner: float
    square: float


def replace_(Z: Tensors, V: Shifted, kept: Sequence[Kept]) -> Moved:
    """Z ← what is kept of V, and 0 elsewhere: one pass over W, Λ and Z, which also takes the sums at the new Z."""
    rows, room = [], Scratch()
    for z_whole, w_whole, lam_whole, keep in zip(Z, V.W, V.lam, kept, strict=True):
        beside = () if isinstance(keep, Cut) else (keep.moment,) if isinstance(keep, RankedCut) else keep
        terms = []
        for z, w, multiplier, *rest in chunks(*([t] for t in (z_whole, w_whole, lam_whole, *beside))):
            if isinstance(keep, Cut):
                new = keep(V.form(w, multiplier, room.like(w, "new")))
            elif isinstance(keep, RankedCut):
                new = keep(V.form(w, multiplier, room.like(w, "new")), rest[0], room)
            else:
                new = _masked(*rest)
            new = new.to(z.device, z.dtype)
            # 1 for nonzero in the dtype of the numbers themselves: on a CPU booleans cost several times as much
            were, are = (torch.ne(t, 0, out=room.like(t, role)) for t, role in ((z, "were"), (new, "are")))
            flips, step = were.sub_(are), z.sub_(new)
            gap = _gap(w, new, room)
            sums = (_dot(step, step), _dot(flips, flips), _dot(multiplier.to(w.device), gap), _dot(gap, gap))
            terms.append(torch.stack([t.to(w.device) for t in sums]).double())
            z.copy_(new)
        rows.append(torch.stack(terms).sum(0))
    moved, changed, inner, square = total(rows, Z).tolist() if rows else (0.0, 0.0, 0.0, 0.0)
    return Moved(math.sqrt(moved), changed / max(sum(z.numel() for z in Z), 1), inner, square)


def all_finite(tensors: Tensors) -> bool:
    """Tell whether every element is finite (one pass: NaN and infinities survive a sum)."""
    parts = [local(t) for t in tensors]
    sums = (t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in parts)
    # huge finite values overflow the sum, so only a failed test is repeated element by element
    finite = all(bool(torch.isfinite(s)) or bool(torch.isfinite(t).all()) for s, t in zip(sums, parts, strict=True))
    return agree(finite, tensors)


def _rank(v: Tensor, moment: Tensor, root: Root, room: Scratch | None, out: Tensor | None) -> Tensor:
    """Return v times the root of its moment in single precision, in `out` if that is as wide."""
    factor = root(moment, None if room is None else room.like(v, "factor", torch.float32))
    wide = torch.promote_types(v.dtype, torch.float32)
    if out is not None and out.dtype == wide:
        return torch.mul(v, factor, out=out)
    return torch.mul(v, factor, out=factor) if wide is torch.float32 else v * factor


def _masked(point: Tensor, mask: Tensor) -> Tensor:
    bits = mask.to(BITS[point.itemsize]).neg_()  # all ones where kept: without branches, unlike a masked fill
    return bits.bitwise_and_(point.view(bits.dtype)).view(point.dtype)


def _narrow(t: Tensor) -> bool:
    return t.dtype is torch.float16  # which ends at 65504, and neither ρ nor 1/ρ need do so


def _gap(w: Tensor, z: Tensor, room: Scratch) -> Tensor:
    return torch.sub(w, z.to(w.device), out=_laid_out(w, "gap", room, z.dtype))


def _laid_out(w: Tensor, role: str, room: Scratch, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory of w's shape and, where it has no gaps, w's strides, as wide as w and `dtype`."""
    out = room.like(w, role, torch.promote_types(w.dtype, dtype or w.dtype))
    return out if w.is_contiguous() or not dense(w) else out.as_strided(w.shape, w.stride())


def _reused(room: Scratch, w: Tensor) -> Tensor | None:
    return room.like(w, "v") if w.device.type == "cpu" else None  # a GPU's selection holds all pieces at once


def _flat(t: Tensor, like: Tensor) -> Tensor:
    """View `t` as 1-D in an order that it shares with `like`, which has its shape; copies where they are laid out unlike."""
    return memory_order(t) if t.stride() == like.stride() and dense(like) else t.reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype is not b.dtype or a.itemsize < 4:
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(wide), b.to(wide)
    return torch.dot(a.view(-1), b.view(-1)) if a.is_contiguous() and b.is_contiguous() else (a * b).sum()
