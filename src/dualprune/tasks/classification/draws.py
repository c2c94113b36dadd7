"""Draws that are the same on every machine and leave the global random state alone: which images, in which order."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from dualprune.errors import DualpruneError


def stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Every so-manyth image of a random order sorted by class: exactly round(fraction · n), sorted."""
    count = round(fraction * len(labels)) if math.isfinite(fraction) else 0
    if not 0 < count < len(labels):
        raise DualpruneError(
            f"the held-out fraction is between 0 and 1 with an image in both parts, got {fraction} of {len(labels)}"
        )
    return _evenly(labels, count, generator_of("split", seed))


def draw(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Which images to train on: `count` of them, of each class its share, drawn by `seed`; None is all."""
    if count is None:
        return torch.arange(len(labels))
    if not 0 < count <= len(labels):
        raise DualpruneError(f"subset is how many of the {len(labels)} training images to take, got {count!r}")
    return _evenly(labels, count, generator_of("subset", seed))


def others(held: Tensor, count: int) -> Tensor:
    """Every number below `count` that is not in `held`, sorted."""
    rest = torch.ones(count, dtype=torch.bool)
    rest[held] = False
    return rest.nonzero().flatten()


def _evenly(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    return order[(torch.arange(count) * 2 + 1) * len(labels) // (2 * count)].sort().values


def generator_of(*parts: object) -> torch.Generator:
    """A generator of its own for these parts."""
    return torch.Generator().manual_seed(seed_of(*parts))


def seed_of(*parts: object) -> int:
    """A seed that differs, in all its bits, for different parts; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())
