"""What an update of 25 million fp32 weights costs, and the exact selection alone, in plain copies of the tensor.

    python benchmarks/update.py --json update.json      # goals: update at most 30 copies, selection at most 13

A plain copy is `b.copy_(a)` of the same tensor in the same process; all are timed in turn, round by round. Beside the
selection stand the usual ways to find the k-th magnitude. The timed SLR updates take both multiplier steps, the worst
case, and the figures say so; "SLR" is the default, whose Z follows W and which ranks by v^¼·|w|, with the set at its final
size.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import torch
from common import alternate, arguments, ratios, report, table
from torch import nn
from torch.nn.utils import prune

import dualprune
from dualprune.selection import keep_largest, kth_largest_magnitude

RATE, COPIES = 10, 5  # one copy alone is too short to time


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    side = 1500 if args.quick else 5000
    torch.manual_seed(0)
    layer = nn.Linear(side, side, bias=False, device=args.device)
    nn.init.normal_(layer.weight, std=0.02)
    w = layer.weight.detach()
    copy, kept, dropped = torch.empty_like(w), w.numel() // RATE, w.numel() - w.numel() // RATE

    slr, papers, admm = dualprune.SLR(rho=0.1, ramp=0, hold=0), dualprune.SLR.paper(), dualprune.ADMM.paper()
    methods = {"SLR": slr, "SLR, by magnitude": slr, "SLR, papers": papers, "ADMM": admm}
    pruners = {name: _pruner(layer, method, "adaptive" if name == "SLR" else None) for name, method in methods.items()}
    falling = itertools.count()

    def update(name: str) -> None:
        pruners[name].observe(-float(next(falling)))  # ever lower, so that eq. 6 holds
        pruners[name].update()

    def l1_unstructured() -> None:
        holder = nn.Module()
        holder.weight = layer.weight
        prune.l1_unstructured(holder, "weight", amount=dropped)

    def copies() -> None:
        for _ in range(COPIES):
            copy.copy_(w)

    ours = {
        "copies": copies,
        **{f"{name} update": partial(update, name) for name in pruners},
        "selection: k-th magnitude": lambda: kth_largest_magnitude([w], kept),
        "selection: mask of exactly k": lambda: keep_largest([w], kept),
    }
    others = {
        "copies": copies,
        "torch.topk": lambda: torch.topk(w.abs().flatten(), kept, sorted=False),
        "torch.kthvalue": lambda: torch.kthvalue(w.abs().flatten(), dropped),
        "numpy.percentile": lambda: np.percentile(w.abs().cpu().numpy(), 100 * dropped / w.numel()),
        "torch.nn.utils.prune.l1_unstructured": l1_unstructured,
    }
    rounds = (3, 1) if args.quick else (15, 5)
    timed = [alternate(things, n, args.device) for things, n in zip((ours, others), rounds, strict=True)]
    rows: dict[str, Any] = {name: row for seconds in timed for name, row in ratios(seconds, "copies", COPIES).items()}
    table(f"{w.numel():,} {str(w.dtype).removeprefix('torch.')} weights, in plain copies", rows)
    history = [row for name in ("SLR", "SLR, papers") for row in pruners[name].history]
    both = sum(row["condition_w"] and row["condition_z"] for row in history) / len(history)
    report(args, "update", {"weights": w.numel(), "rate": RATE, "copies": rows, "updates_with_both_steps": both})


def _pruner(layer: nn.Linear, method: dualprune.SLR | dualprune.ADMM, importance: str | None) -> dualprune.Pruner:
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    pruner = dualprune.attach(layer, optimizer, method, rate=RATE, ignore=(), importance=importance)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()  # makes the mean squared gradients, where they rank
    layer.weight.grad = None
    return pruner


if __name__ == "__main__":
    main()
