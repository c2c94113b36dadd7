"""Exact selection of the k-th largest magnitude, without sorting and without copying the tensors.

A strided sample brackets the answer between two values; one pass counts what lies above the bracket and collects
what lies inside it; the answer is then the right order statistic of those few candidates (Floyd & Rivest 1975).
Magnitudes are compared as the integers their bits spell, which order finite floats of one dtype exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualprune import kernels
from dualprune.scratch import Scratch

# stride ↦ every stride-th value of each part, in flat pieces of one dtype; with stride 1 on a CPU, a piece may lie where the
# last one lay
Values = Callable[[int], Iterable[Tensor]]

_SAMPLE = 1 << 16
_CHUNK = 1 << 18  # elements; a chunk and its scratch stay in a core's second-level cache
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def memory_order(t: Tensor) -> Tensor:
    """View a dense tensor of any layout (channels_last, …) as 1-D in the order of its memory; copies only if it has gaps."""
    strides = t.stride()
    order = sorted(range(t.ndim), key=lambda d: (-strides[d], d))
    flat = t.permute(order)
    return flat.view(-1) if flat.is_contiguous() else t.reshape(-1)


def kth_largest_magnitude(parts: Sequence[Tensor], k: int) -> Tensor:
    """Return the k-th largest |x| over all elements of all `parts`, exactly.

    Args:
        parts: floating tensors of one dtype and device, any shapes; magnitudes are compared across all of them.
        k: 1 ≤ k ≤ total number of elements.

    Returns:
        A 0-dim tensor of the parts' dtype. NaN counts as larger than infinity.

    Raises:
        ValueError: k is out of range.
    """
    return _kth_largest([memory_order(p.detach()) for p in parts], k).value


class Kth(NamedTuple):
    """The k-th largest magnitude, and of the elements that equal it how many are among the k and how many are not."""

    value: Tensor
    ties: int
    surplus: int


def kth_largest(values: Values, k: int, total: int) -> Kth:
    """Return the k-th largest magnitude of values that are formed piece by piece.

    They are walked through twice, once by a sample's stride; on a GPU they are all formed, and counted by the digits of
    their bits (`kernels.radix_select`).

    Args:
        values: may be called several times, and gives the same each time.
        k: 1 ≤ k ≤ total.
        total: the number of values.
    """
    first = next(iter(values(max(total, 1))))
    integers = BITS[first.dtype.itemsize]
    if first.device.type == "cuda":
        kth, counts = kernels.radix_select([v.contiguous().view(integers) for v in values(1)], k)
        return Kth(kth.view(first.dtype), *counts.tolist())

    def bits(stride: int) -> Iterator[Tensor]:
        return (v.view(integers) for v in values(stride))

    low, high = _bracket(bits, k, total)
    while True:
        above, inside = _split(bits, low, high)
        candidates = torch.cat(inside)
        if above >= k:  # the bracket lies too low: a sample can mislead on structured data
            low, high = high, None
        elif above + candidates.numel() < k:
            low, high = None, low
        else:
            kth = candidates.kthvalue(candidates.numel() - (k - above) + 1).values
            surplus = above + int(torch.count_nonzero(candidates >= kth)) - k
            return Kth(kth.view(first.dtype), int(torch.count_nonzero(candidates == kth)) - surplus, surplus)


class Cut:
    """The k largest magnitudes as a threshold instead of a mask; ties at it are kept from the first one on.

    A cut is used once: called with the values, piece by piece in row-major order, it puts zeros where they
    are dropped. Unlike a mask it takes no memory, and one pass less.
    """

    def __init__(self, values: Values, k: int, total: int) -> None:
        self.threshold, self.below, self.ties, self.surplus = 0.0, -1.0 if k else math.inf, 0, 0
        self._room = Scratch()
        if 0 < k < total:
            kth, ties, surplus = kth_largest(values, k, total)
            self.threshold = float(kth)
            if self.threshold:  # zeros that tie are zeros, kept or dropped
                self.ties, self.surplus = ties, surplus
                self.below = float((kth.view(BITS[kth.itemsize]) - 1).view(kth.dtype))  # the next smaller float

    def __call__(self, v: Tensor) -> Tensor:
        """Cut the next piece, in place, and return it."""
        if self.surplus and self.ties <= 0:  # all ties that stay have been met
            return torch.hardshrink(v, self.threshold, out=v)  # |v| > threshold
        kept = torch.hardshrink(v, self.below, out=v)  # |v| ≥ threshold
        if self.surplus:
            magnitude = torch.abs(v, out=self._room.like(v, "magnitude"))
            tied = torch.eq(magnitude, self.threshold, out=magnitude)
            if tied.any():  # in few pieces only
                places = tied.nonzero(as_tuple=True)
                kept[tuple(place[self.ties :] for place in places)] = 0
                self.ties -= len(places[0])
        return kept


def _kth_largest(flats: Sequence[Tensor], k: int) -> Kth:
    total = sum(f.numel() for f in flats)
    if not 1 <= k <= total:
        raise ValueError(f"expected 1 <= k <= {total} (the number of elements), got k = {k}")
    flats = [f for f in flats if f.numel()]
    return kth_largest(lambda stride: (f[::stride] for f in flats) if stride > 1 else _chunks(flats), k, total)


def _bracket(bits: Values, k: int, total: int) -> tuple[int | None, int | None]:
    """Return integers low ≤ answer < high, very likely; None stands for no bound on that side."""
    if total <= 2 * _SAMPLE:
        return None, None
    stride = total // _SAMPLE
    sample = torch.cat([_magnitude(b) for b in bits(stride)])
    size = sample.numel()
    centre = size * k / total
    spread = 3 * (centre * (1 - k / total)) ** 0.5 + 8
    left, right = int(centre - spread), int(centre + spread)  # ranks from the largest, counted from 0
    high = int(sample.kthvalue(size - left).values) if left >= 0 else None
    low = int(sample.kthvalue(size - right).values) if right < size else None
    return low, (high + 1 if high is not None else None)


def _split(bits: Values, low: int | None, high: int | None) -> tuple[int, list[Tensor]]:
    """Count the magnitudes ≥ high and collect those in [low, high)."""
    above, inside, room = 0, [], Scratch()
    for piece in bits(1):
        if low is None and high is None:
            inside.append(_magnitude(piece))
            continue
        magnitude = torch.bitwise_and(piece, torch.iinfo(piece.dtype).max, out=room.like(piece, "magnitude"))
        # flags are 1 and 0 in the magnitudes' own dtype: on a CPU booleans cost several times as much
        wanted = torch.ge(magnitude, 0 if low is None else low, out=room.like(piece, "wanted"))
        if high is not None:
            over = torch.ge(magnitude, high, out=room.like(piece, "over"))
            above += int(over.sum(dtype=torch.int32))
            wanted -= over
        inside.append(_gather(magnitude, wanted))
    return above, inside


def _gather(values: Tensor, wanted: Tensor) -> Tensor:
    """Return values[wanted == 1] of few wanted: eight flags are a 64-bit word, and only words that are not zero are opened."""
    if values.numel() % 8:
        return values[wanted.bool()]
    flags = wanted.to(torch.int8)
    words = flags.view(torch.int64).nonzero().squeeze(1)
    opened, flags = (t.view(-1, 8).index_select(0, words) for t in (values, flags))
    return opened[flags.view(torch.bool)]


def _magnitude(bits: Tensor) -> Tensor:
    return bits & torch.iinfo(bits.dtype).max  # all bits but the sign


def _chunks(flats: Sequence[Tensor]) -> Iterator[Tensor]:
    for b in flats:
        yield from b.split(_CHUNK) if b.device.type == "cpu" else (b,)


def keep_largest(parts: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return boolean masks, shaped and laid out like `parts`, that keep exactly the k largest magnitudes over all parts.

    Ties are kept by index: earlier parts first, and within a part the lower row-major index. NaN has no rank: callers
    make sure that there is none.
    """
    total = sum(p.numel() for p in parts)
    if not 0 <= k <= total:
        raise ValueError(f"expected 0 <= k <= {total} (the number of elements), got k = {k}")
    if k in (0, total):
        return [torch.full_like(p, k > 0, dtype=torch.bool) for p in parts]
    parts = [p.detach() for p in parts]
    threshold, _, surplus = _kth_largest([memory_order(p) for p in parts], k)
    masks = [torch.empty_like(p, dtype=torch.bool) for p in parts]
    for p, mask in zip(parts, masks, strict=True):
        _at_least(p, threshold, mask)
    for p, mask in zip(reversed(parts), reversed(masks), strict=True):
        surplus = _drop_ties(p, threshold, mask, surplus)
    return masks


def _drop_ties(p: Tensor, threshold: Tensor, mask: Tensor, surplus: int) -> int:
    """Clear the last `surplus` places of `mask`, in row-major order, where |p| = threshold; return how many are still to go."""
    flat, keep = p.flatten(), mask.flatten()  # copies where the memory is not row-major
    for source, target in zip(reversed(list(_chunks([flat]))), reversed(list(_chunks([keep]))), strict=True):
        if not surplus:
            break
        ties = (source.abs() == threshold).nonzero().squeeze(1)[-surplus:]
        target[ties] = False
        surplus -= ties.numel()
    if not mask.is_contiguous():
        mask.copy_(keep.view_as(mask))
    return surplus


def _at_least(p: Tensor, threshold: Tensor, out: Tensor) -> None:
    """Fill `out` with |p| ≥ threshold."""
    if p.stride() != out.stride():
        out.copy_(p.abs() >= threshold)
        return
    step = _CHUNK if p.device.type == "cpu" else max(p.numel(), 1)
    for source, target in zip(memory_order(p).split(step), memory_order(out).split(step), strict=True):
        torch.ge(source.abs(), threshold, out=target)
