"""Lists of tensors as one long vector: the few operations the updates are made of.

On a CPU they walk through the memory in chunks that stay in a core's cache, so that no full-size temporary is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dualprune.selection import BITS, memory_order

Tensors = Sequence[Tensor]
_CHUNK = 1 << 17  # elements


def chunks(*lists: Tensors) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching flat pieces of the tensors; whole tensors where layouts differ or the memory is not the CPU's."""
    for group in zip(*lists, strict=True):
        first = group[0]
        same = all(t.stride() == first.stride() and t.device.type == "cpu" for t in group)
        if not same or first.numel() <= _CHUNK or not _dense(first):
            yield group
        else:
            yield from zip(*(memory_order(t).split(_CHUNK) for t in group), strict=True)


def lagrangian_terms(W: Tensors, Z: Tensors, lam: Tensors) -> tuple[float, float]:
    """Return ⟨Λ, W − Z⟩ and ‖W − Z‖², accumulated in double precision over chunks."""
    inner, square = [], []
    for w, z, multiplier in chunks(W, Z, lam):
        gap = w - z.to(w.device)
        inner.append(_dot(multiplier.to(w.device), gap))
        square.append(_dot(gap, gap))
    return _total(inner), _total(square)


def ascend_(lam: Tensors, s: float, W: Tensors, Z: Tensors) -> None:
    """Λ ← Λ + s(W − Z), in place."""
    for multiplier, w, z in chunks(lam, W, Z):
        multiplier.add_((w - z.to(w.device)).to(multiplier.device), alpha=s)


def shifted(W: Tensors, lam: Tensors, rho: float) -> list[Tensor]:
    """Return W + Λ/ρ, the point that is projected (eq. 10)."""
    return [torch.add(w, multiplier.to(w.device), alpha=1 / rho).to(w.dtype) for w, multiplier in zip(W, lam, strict=True)]


def replace_(Z: Tensors, V: Tensors, masks: Tensors) -> tuple[float, float]:
    """Z ← V on the masks and 0 elsewhere; return ‖Z_new − Z_old‖ and the fraction of weights whose support changed."""
    moved, flips, total = [], 0, 0
    for z, v, mask in chunks(Z, V, masks):
        bits = mask.to(BITS[v.itemsize]).neg_()  # all ones where kept: without branches, unlike a masked fill
        new = bits.bitwise_and_(v.view(bits.dtype)).view(v.dtype).to(z.device, z.dtype)
        flips += int(torch.count_nonzero((z != 0) ^ mask.to(z.device)))
        total += z.numel()
        step = z.sub_(new)
        moved.append(_dot(step, step))
        z.copy_(new)
    return math.sqrt(_total(moved)), flips / max(total, 1)


def all_finite(tensors: Tensors) -> bool:
    """Tell whether every element is finite (one pass: NaN and infinities survive a sum of squares)."""
    norms = (torch.linalg.vector_norm(t.float() if t.itemsize < 4 else t) for t in tensors)
    # huge finite values overflow the sum, so only a failed test is repeated element by element
    return all(bool(torch.isfinite(n)) or bool(torch.isfinite(t).all()) for n, t in zip(norms, tensors, strict=True))


def _dense(t: Tensor) -> bool:
    return torch.empty_like(t, device="meta").stride() == t.stride()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    return torch.dot(a.reshape(-1), b.reshape(-1)) if a.is_contiguous() and b.is_contiguous() else (a * b).sum()


def _total(terms: list[Tensor]) -> float:
    return float(torch.stack([t.double() for t in terms]).sum()) if terms else 0.0
