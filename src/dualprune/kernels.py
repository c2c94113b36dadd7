"""The two things that are hot on a GPU: the penalty's gradient over many tensors at once, and the k-th magnitude by digits.

Both have a Triton kernel (`triton_kernels.py`, imported when first used) and do without it where Triton is not there, with
the same results; nothing here waits for the device, so that both can be recorded in a CUDA graph. Under `torch.compile`
the plain operators are taken, which it can trace. With TRITON_INTERPRET=1 the kernels run on CPU tensors too, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Row = tuple[Tensor, ...]  # gradient, W, Z, Λ of one weight
Addresses = tuple[tuple[int, ...], ...]

DIGIT = 11  # bits settled by a pass, at most: 3 passes for float32, 2 for 16 bits, 6 for float64
_BATCH = 1 << 22  # elements that foreach operators make results for at a time
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def add_penalty_(rows: Sequence[Row], rho: float, scale: Tensor | None, outside: bool = False) -> list[Row]:
    """Add scale·(Λ + ρ(W − Z)) to the gradients that a GPU can do all at once, in place; return the rows that are left.

    `outside` adds it only where Z is zero, which takes Triton.
    Taken are rows whose four tensors lie on one GPU, densely and in one memory layout. With Triton that is one launch for all
    rows of the same dtypes: five passes over memory, the sum formed in float32. Without it, three foreach operators for
    every 2^22 elements or larger weight, whose results the device's allocator uses again.
    """
    left: list[Row] = []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if _alike(row):
            groups.setdefault((row[0].device, *(t.dtype for t in row)), []).append(row)
        else:
            left.append(row)
    for (device, *_), group in groups.items():
        factor = None if scale is None else scale.to(device)
        if _has_triton(device) and all(t.dtype in _FLOATS for t in group[0]):
            _launch_penalty(group, rho, factor, outside)
        elif not outside and factor is None and len({t.dtype for t in group[0]}) == 1:
            for batch in _batches(group):
                grads, W, Z, lam = (list(column) for column in zip(*batch, strict=True))
                pulls = torch._foreach_add(lam, torch._foreach_sub(W, Z), alpha=rho)  # first: see `solvers.vector.pull_`
                torch._foreach_add_(grads, pulls)
        else:
            left += group
    return left


def radix_select(parts: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k-th largest magnitude of floats given as the integers their bits spell, by digits, the highest first.

    Each pass counts the next bits, `DIGIT` at most, of the magnitudes that begin with the digits settled so far. All of it
    stays on the device: the caller decides when to read the results.

    Args:
        parts: contiguous int16, int32 or int64 tensors of one dtype and device; the sign bit does not count.
        k: 1 ≤ k ≤ number of elements.

    Returns:
        The bits of the k-th magnitude, 0-dim, and two counts: of the elements that equal it, those among the k and the others.
    """
    device, dtype = parts[0].device, parts[0].dtype
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    left = torch.full((1,), k, dtype=torch.int64, device=device)  # the rank among those that begin with the prefix
    shift = 8 * dtype.itemsize - 1
    while shift:
        width = -(-shift // -(-shift // DIGIT))  # the rest in equal parts
        shift -= width
        counts = torch.zeros(1 << width, dtype=torch.int64, device=device)
        for part in parts:
            _count_digits_(counts, part, prefix, shift, width)
        falling = counts.flip(0)
        at_least = falling.cumsum(0)
        place = torch.searchsorted(at_least, left)
        equal = falling.gather(0, place)
        left = left - at_least.gather(0, place) + equal
        prefix = (prefix << width) | ((1 << width) - 1 - place)
    return prefix.to(dtype).squeeze(0), torch.cat([left, equal - left])


def _count_digits_(counts: Tensor, part: Tensor, prefix: Tensor, shift: int, width: int) -> None:
    """Add to counts[d] how many magnitudes begin with `prefix` and go on with the digit d."""
    if part.itemsize <= 4 and _has_triton(part.device):
        with torch.cuda.device_of(part):
            _triton_kernels().count_digits(counts, part, prefix, shift, width)
        return
    magnitudes = part & torch.iinfo(part.dtype).max
    digits = magnitudes >> shift & ((1 << width) - 1)
    fits = magnitudes >> shift >> width == prefix.to(part.dtype)
    if part.device.type == "cpu":
        counts += torch.bincount(digits[fits], minlength=len(counts))
    else:  # bincount would wait for the device; a digit of −1 is outside of the range and not counted
        digits = torch.where(fits, digits, -1).int()
        counts += torch.histc(digits, bins=len(counts), min=0, max=len(counts))


def _alike(row: Row) -> bool:
    """Tell whether the kernel may walk through the row's memory with one index."""
    first = row[0]
    if first.device.type != "cuda" and not _interpreted():
        return False
    same = all(t.device == first.device and t.stride() == first.stride() for t in row)
    return same and first.numel() > 0 and _dense(first)


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Split the rows, in order, into runs of at most `_BATCH` elements; a larger row is by itself."""
    runs: list[list[Row]] = []
    room = 0
    for row in rows:
        size = row[0].numel()
        if size > room:
            runs.append([])
            room = _BATCH
        runs[-1].append(row)
        room -= size
    return runs


def _dense(t: Tensor) -> bool:
    """Tell whether the memory has neither gaps nor overlaps; in Python, which torch.compile can trace."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True


def _launch_penalty(group: Sequence[Row], rho: float, scale: Tensor | None, outside: bool) -> None:
    code = _triton_kernels()
    key = tuple((*(t.data_ptr() for t in row), row[0].numel()) for row in group)
    sizes, device = tuple(t.itemsize for t in group[0]), group[0][0].device
    with torch.cuda.device_of(group[0][0]):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            table = code.segment_table(key, sizes, device)  # filled by the graph itself, which may outlive a cached one
        else:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            table = _table(key, sizes, device, stream)
        aligned = all(at % 16 == 0 for *addresses, _ in key for at in addresses)
        code.penalty(table, group[0], rho, scale, aligned, outside)


@lru_cache(maxsize=8)
def _table(key: Addresses, sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    table: Tensor = _triton_kernels().segment_table(key, sizes, device)
    return table


def _has_triton(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or not _triton_installed():
        return False
    return device.type == "cuda" or _interpreted()


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _triton_kernels() -> Any:
    from dualprune import triton_kernels

    return triton_kernels
