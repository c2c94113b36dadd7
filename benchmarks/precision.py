"""Which precision trains faster on this machine? A step in bfloat16 autocast beside one in float32, in alternation.

    python benchmarks/precision.py --json precision.json

bfloat16 saves time where the processor has instructions for it (avx512_bf16, amx_bf16), and takes more where PyTorch has
to spell it out. The recipes say `precision = "bfloat16"`; `--set training.precision=float32` changes it.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
import torch.nn.functional as F
from common import alternate, arguments, ratios, report, table
from torch import Tensor, nn

from dualprune.tasks.classification.models import build_model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, low: bool) -> None:
    """One step of training, its forward pass in bfloat16 where `low`."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        scores = model(x)
    optimizer.zero_grad()
    F.cross_entropy(scores.float(), y).backward()
    optimizer.step()


def main() -> None:
    args = arguments("A training step in bfloat16 against float32: ResNet on 32x32 pixels, channels last.")
    name, batch, rounds = ("resnet20", 16, 2) if args.quick else ("resnet56", 128, 5)
    model = build_model(name).to(args.device, memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, 32, 32, device=args.device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    one = partial(step, model, optimizer, x, y)
    seconds = alternate({"float32": partial(one, low=False), "bfloat16": partial(one, low=True)}, rounds, args.device)
    compared = ratios(seconds, "float32")
    table(f"{name}, batch {batch}, over a step in float32", compared)
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    figures = {
        "model": name,
        "batch": batch,
        "step_seconds": {key: statistics.median(times) for key, times in seconds.items()},
        "over_float32": compared,
        "instructions": {key: has.get(key) for key in ("avx512_f", "avx512_bf16", "amx_bf16")},
    }
    report(args, "precision", figures)


if __name__ == "__main__":
    main()
