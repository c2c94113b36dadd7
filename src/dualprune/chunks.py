"""Matching pieces of tensors that stay in a CPU's cache while several operations pass over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dualprune.distributed import local
from dualprune.selection import memory_order

_CHUNK = 1 << 19  # elements: few enough for a shared cache, and enough that starting an operator is little beside it


def chunks(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching flat pieces of the tensors; whole tensors where layouts differ or the memory is not the CPU's."""
    for whole in zip(*lists, strict=True):
        group = tuple(local(t) for t in whole)
        first = group[0]
        same = all(t.stride() == first.stride() and t.device.type == "cpu" for t in group)
        if not same or first.numel() <= _CHUNK or not dense(first):
            yield group
        else:
            yield from zip(*(memory_order(t).split(_CHUNK) for t in group), strict=True)


def dense(t: Tensor) -> bool:
    """Tell whether the memory of `t` has no gaps and no overlaps, in whatever order."""
    return torch.empty_like(t, device="meta").stride() == t.stride()
