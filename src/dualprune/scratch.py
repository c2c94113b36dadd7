"""Memory that is made once and used again: fresh memory costs page faults, which cost more than the arithmetic in it."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Buffers by role, dtype and device; each grows to the largest tensor it has stood in for."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device, torch.Size], Tensor] = {}  # cutting one costs as much as a sum

    def like(self, t: Tensor, role: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return contiguous memory of t's shape, with whatever the last user of this role left in it."""
        dtype, device, shape = dtype or t.dtype, t.device, t.shape
        view = self._views.get((role, dtype, device, shape))
        return view if view is not None else self._view(role, dtype, device, shape)

    def _view(self, role: str, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Tensor:
        key, size = (role, dtype, device), shape.numel()
        if key not in self._made or self._made[key].numel() < size:
            self._made[key] = torch.empty(size, dtype=dtype, device=device)
            self._views = {k: view for k, view in self._views.items() if k[:3] != key}  # they are of the smaller one
        view = self._views[(*key, shape)] = self._made[key][:size].view(shape)
        return view
