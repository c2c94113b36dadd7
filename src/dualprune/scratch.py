"""Memory that is made once and used again: fresh memory costs page faults, which cost more than the arithmetic in it."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Buffers by role, dtype and device; each grows to the largest tensor it has stood in for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, t: Tensor, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return contiguous memory of t's shape, with whatever the last user of this role left in it."""
        key = (role, dtype or t.dtype, t.device)
        if key not in self._made or self._made[key].numel() < t.numel():
            self._made[key] = torch.empty(t.numel(), dtype=key[1], device=t.device)
        return self._made[key][: t.numel()].view(t.shape)
