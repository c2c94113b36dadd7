"""How much each layer keeps: one rate for all (uniform), more for small layers (ERK), one threshold for all (global, LAMP)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dualprune.errors import DualpruneError, suggest
from dualprune.patterns import Shape, check_sparsity

BUDGETS = ("uniform", "erk", "global", "lamp")


def check_budget(name: str) -> str:
    """Return `name` if it is a budget, else raise with a suggestion."""
    if name not in BUDGETS:
        raise DualpruneError(f"expected budget to be one of {', '.join(BUDGETS)}; got {name!r}{suggest(str(name), BUDGETS)}")
    return name


def compression_rate(sparsity: float) -> float:
    """Return the compression rate 1/(1 − sparsity): 0.9 → 10."""
    return 1 / (1 - sparsity) if sparsity < 1 else math.inf


def resolve_sparsity(rate: float | None, sparsity: float | None) -> float | None:
    """Return the asked sparsity from `rate` (10 = ten times fewer weights) or `sparsity` (0.9), not both."""
    if rate is not None and sparsity is not None:
        raise DualpruneError(f"give rate or sparsity, not both: got rate={rate}, sparsity={sparsity}")
    if sparsity is not None:
        return check_sparsity(sparsity)
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (1 <= rate < math.inf):
        raise DualpruneError(f"rate is how many times fewer weights, at least 1 (rate=10 keeps a tenth), got {rate!r}")
    return 1 - 1 / rate


def erk_sparsities(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Return per-layer sparsities by Erdős–Rényi-Kernel (Evci et al. 2020): density ∝ Σ dims / Π dims, capped at 1.

    The kept weights add up to (1 − sparsity) of all, up to rounding.
    """
    sizes = [math.prod(s) for s in shapes]
    raw = [sum(s) / max(math.prod(s), 1) for s in shapes]
    budget = (1 - sparsity) * sum(sizes)
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        rest = budget - sum(sizes[i] for i in dense)
        scale = rest / sum(raw[i] * sizes[i] for i in free) if free else 0.0
        over = {i for i in free if raw[i] * scale > 1}
        if not over:
            return [0.0 if i in dense else 1 - raw[i] * scale for i in range(len(shapes))]
        dense |= over


def lamp_scores(w: Tensor) -> Tensor:
    """Return every weight's share w² / Σ v² in the energy of those that are not smaller (Lee et al. 2021, eq. 4).

    The shares rank the weights of a layer as their magnitudes do, the first among equals highest. The largest weight of a
    layer has share 1, so that one threshold over the layers leaves none of them empty.

    Args:
        w: one layer's weights, of any shape.

    Returns:
        float64, shaped like `w`; 0 where a weight is 0.
    """
    energies, order = w.detach().flatten().flip(0).double().square().sort(stable=True)
    shares = energies / energies.flip(0).cumsum(0).flip(0).clamp_(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(shares).index_copy_(0, order, shares).flip(0).view(w.shape)
