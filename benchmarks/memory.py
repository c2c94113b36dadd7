"""What pruning holds in memory per pruned weight, and what an update needs on top while it runs.

    python benchmarks/memory.py --json memory.json      # goal: at most two tensors of the weights' size, Z and Λ, and a
                                                        # third for the means of squared gradients where the optimizer has none

The peak is the sum of torch's own allocations during one update, from its memory profile (on a GPU, the allocator's
count). Nothing here is a time.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from common import arguments, report
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dualprune

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SLR": (dualprune.SLR.paper(), {}),
    "SLR, bf16 state": (dualprune.SLR.paper(), {"state_dtype": torch.bfloat16}),
    "SLR, default, means of squared gradients included": (dualprune.SLR(), {"total_steps": 1000}),
    "SLR, state on the CPU": (dualprune.SLR.paper(), {"state_device": "cpu"}),
    "ADMM": (dualprune.ADMM.paper(), {}),
    "gradual magnitude": (dualprune.GradualMagnitude(), {"total_steps": 1000}),
    "one-shot": (dualprune.Magnitude(), {}),
}


def measure(side: int, device: str, method: Any, options: dict[str, Any]) -> dict[str, float]:
    """Return bytes per pruned weight: held between updates, and allocated on top at the worst moment of an update."""
    torch.manual_seed(0)
    layer = nn.Linear(side, side, bias=False, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    pruner = dualprune.attach(layer, optimizer, method, rate=10, ignore=(), **options)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    layer.weight.grad = None
    tensors = [t for kind in pruner.solver.tensors.values() for t in kind]
    if pruner.problem.importance is not None:
        tensors += pruner.problem.importance.means
    weights = layer.weight.numel()
    pruner.update()
    return {
        "held": sum(t.nbytes for t in tensors) / weights,
        "held_on_the_weights_device": sum(t.nbytes for t in tensors if t.device == layer.weight.device) / weights,
        "peak_of_an_update": peak(pruner, device) / weights,
    }


def peak(pruner: dualprune.Pruner, device: str) -> int:
    """Return the most bytes that one update had allocated at once."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pruner.update()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        pruner.update()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    side = 1000 if args.quick else 5000
    figures = {name: measure(side, args.device, method, options) for name, (method, options) in CASES.items()}
    print(f"bytes per pruned fp32 weight, {side * side:,} weights{'held':>14}{'peak of an update':>20}")
    for name, row in figures.items():
        print(f"  {name:<48}{row['held']:>11.2f}{row['peak_of_an_update']:>17.2f}")
    print()
    report(args, "memory", {"weights": side * side, "bytes_per_weight": figures})


if __name__ == "__main__":
    main()
