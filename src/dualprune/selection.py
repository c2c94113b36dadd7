"""Exact selection of the k-th largest magnitude, without sorting and without copying the tensors.

A strided sample brackets the answer between two values; one pass counts what lies above the bracket and collects
what lies inside it; the answer is then the right order statistic of those few candidates (Floyd & Rivest 1975).
Magnitudes are compared as the integers their bits spell, which order finite floats of one dtype exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_SAMPLE = 1 << 15
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
    flats = [memory_order(p.detach()) for p in parts]
    total = sum(f.numel() for f in flats)
    if not 1 <= k <= total:
        raise ValueError(f"expected 1 <= k <= {total} (the number of elements), got k = {k}")
    dtype = flats[0].dtype
    bits = [f.view(BITS[dtype.itemsize]) for f in flats if f.numel()]
    return _kth_largest(bits, k, total).view(dtype)


def _kth_largest(bits: list[Tensor], k: int, total: int) -> Tensor:
    low, high = _bracket(bits, k, total)
    while True:
        above, inside = _split(bits, low, high)
        candidates = torch.cat(inside)
        if above >= k:  # the bracket lies too low: a sample can mislead on structured data
            low, high = high, None
        elif above + candidates.numel() < k:
            low, high = None, low
        else:
            rank = k - above
            return candidates.kthvalue(candidates.numel() - rank + 1).values


def _bracket(bits: list[Tensor], k: int, total: int) -> tuple[int | None, int | None]:
    """Return integers low ≤ answer < high, very likely; None stands for no bound on that side."""
    if total <= 2 * _SAMPLE:
        return None, None
    stride = total // _SAMPLE
    sample = torch.cat([_magnitude(b[::stride]) for b in bits]).sort(descending=True).values
    centre = sample.numel() * k / total
    spread = 4 * (centre * (1 - k / total)) ** 0.5 + 8
    left, right = int(centre - spread), int(centre + spread)
    high = int(sample[left]) if left >= 0 else None
    low = int(sample[right]) if right < sample.numel() else None
    return low, (high + 1 if high is not None else None)


def _split(bits: list[Tensor], low: int | None, high: int | None) -> tuple[int, list[Tensor]]:
    """Count the magnitudes ≥ high and collect those in [low, high)."""
    above, inside = 0, [bits[0].new_empty(0)]
    for chunk in _chunks(bits):
        magnitude = _magnitude(chunk)
        wanted = None if low is None else magnitude >= low
        if high is not None:
            over = magnitude >= high
            above += int(torch.count_nonzero(over))
            wanted = ~over if wanted is None else wanted ^ over
        inside.append(magnitude if wanted is None else magnitude[wanted])
    return above, inside


def _magnitude(bits: Tensor) -> Tensor:
    return bits & torch.iinfo(bits.dtype).max  # all bits but the sign


def _chunks(bits: list[Tensor]) -> Iterator[Tensor]:
    for b in bits:
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
    threshold = kth_largest_magnitude(parts, k)
    masks = [torch.empty_like(p, dtype=torch.bool) for p in parts]
    surplus = sum(_at_least(p, threshold, mask) for p, mask in zip(parts, masks, strict=True)) - k
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


def _at_least(p: Tensor, threshold: Tensor, out: Tensor) -> int:
    """Fill `out` with |p| ≥ threshold and return how many are."""
    if p.stride() != out.stride():
        out.copy_(p.abs() >= threshold)
        return int(torch.count_nonzero(out))
    count = 0
    step = _CHUNK if p.device.type == "cpu" else max(p.numel(), 1)
    for source, target in zip(memory_order(p).split(step), memory_order(out).split(step), strict=True):
        torch.ge(source.abs(), threshold, out=target)
        count += int(torch.count_nonzero(target))
    return count
