"""Selecting a tenth by magnitude, and the penalty of a step, beside the usual ways, in plain copies of the tensor.

    python benchmarks/selection.py --json selection.json      # 1, 25 and 250 million weights; --device cuda on a GPU

A plain copy, one pass that reads and one that writes, is `b.copy_(a)` of the same tensor in the same process; all are timed
in turn, round by round. A way that finds a threshold is beside ours that does, a way that makes a mask or a pruned tensor
beside ours that makes a mask. The last two rows add the penalty's gradient: in place, as the hook does, and as a term of
the loss that autograd differentiates, as public code does. At 250 million weights 16 GB of memory are needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, ratios, report, table
from torch import Tensor, nn
from torch.nn.utils import prune

import dualprune
from dualprune.selection import keep_largest, kth_largest_magnitude

RATE, RHO = 10, 0.1
Things = dict[str, Callable[[], Any]]


def thresholds(w: Tensor, kept: int) -> Things:
    """The k-th largest magnitude, in several ways."""
    dropped = w.numel() - kept
    ways: Things = {
        "dualprune: k-th magnitude": lambda: kth_largest_magnitude([w], kept),
        "torch.topk": lambda: torch.topk(w.abs().flatten(), kept, sorted=False),
        "torch.kthvalue": lambda: torch.kthvalue(w.abs().flatten(), dropped),
    }
    if w.dtype in (torch.float32, torch.float64):
        ways["numpy.percentile"] = lambda: np.percentile(w.abs().cpu().numpy(), 100 * dropped / w.numel())
    return ways


def masks(w: Tensor, kept: int) -> Things:
    """A mask of exactly k, or the tensor without what it drops."""

    def l1_unstructured() -> None:
        holder = nn.Module()
        holder.weight = nn.Parameter(w)
        prune.l1_unstructured(holder, "weight", amount=w.numel() - kept)

    ways: Things = {
        "dualprune: mask of exactly k": lambda: keep_largest([w], kept),
        "torch.nn.utils.prune.l1_unstructured": l1_unstructured,
    }
    if importlib.util.find_spec("torchao"):
        from torchao.prototype.pat.optim.min_sparsity import MinSparsityConstraint

        constraint = MinSparsityConstraint(0.0, 1 - kept / w.numel())
        ways["torchao PAT: MinSparsityConstraint"] = lambda: constraint.apply_(w.clone().view(-1, 1), 1.0)
    return ways


def penalties(w: Tensor) -> Things:
    """The gradient of ⟨Λ, W − Z⟩ + ρ/2 ‖W − Z‖², added to a gradient that is there."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = weight = nn.Parameter(w)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    pruner = dualprune.attach(layer, optimizer, dualprune.SLR.paper(rho=RHO), rate=RATE, ignore=())
    z, lam = (pruner.solver.tensors[name][0] for name in ("Z", "lam"))
    weight.grad = torch.zeros_like(weight)

    def hook() -> None:
        with torch.no_grad():
            pruner.solver.penalty_(None)

    def loss_term() -> None:
        gap = weight - z
        ((lam * gap).sum() + RHO / 2 * torch.norm(gap, p=2) ** 2).backward()

    return {"dualprune: penalty in the step's hook": hook, "penalty as a term of the loss": loss_term}


def measure(millions: float, dtype: torch.dtype, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return the ratios to a plain copy for one size."""
    w = (torch.randn(round(millions * 1e6) // 1000, 1000, device=device) * 0.02).to(dtype)
    copy, kept = torch.empty_like(w), w.numel() // RATE
    repeats = max(1, round(25 / millions))  # one copy of a small tensor is too short to time

    def copies() -> None:
        for _ in range(repeats):
            copy.copy_(w)

    rows: dict[str, dict[str, float]] = {}
    for ways in (thresholds(w, kept), masks(w, kept), penalties(w)):
        rows |= ratios(alternate({"copies": copies, **ways}, rounds, device), "copies", repeats)
    return rows


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    sizes = (0.1, 0.5) if args.quick else (1, 25, 250)
    cases = [(millions, torch.float32) for millions in sizes]
    cases[2:2] = [(sizes[1], dtype) for dtype in (torch.bfloat16, torch.float16)]
    figures = {}
    for millions, dtype in cases:
        name = f"{millions:g} million {str(dtype).removeprefix('torch.')} weights"
        figures[name] = measure(millions, dtype, args.device, rounds=5 if millions < 100 and not args.quick else 1)
        table(f"{name}, in plain copies", figures[name])
        report(args, "selection", {"rate": RATE, "copies": figures})  # after each, so that an interrupted run keeps what it has


if __name__ == "__main__":
    main()
