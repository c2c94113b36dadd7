"""What a training step costs with SLR attached, as a ratio to the plain step of the same process, in alternation.

    python benchmarks/overhead.py --json overhead.json            # goals: ResNet-18 at most 1.02, MLP-Mixer at most 1.03

Both loops train one model (learning rate 0, so that it stays put) through an optimizer each; one has a pruner. The hook
adds far less than a machine's mood does, so it is measured twice: as the ratio of whole steps, and as the difference of
the two `optimizer.step()` calls over the plain step, which repeats better. An update every `every` steps comes on top and
is given beside them. Operators, allocations and reads by the host are counted: attached step less plain step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, arguments, ratios, report, table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dualprune
from dualprune.tasks.classification.models import build_model


class Ledger(TorchDispatchMode):
    """Counts operators, results in fresh memory, and reads of values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"operators": 0, "allocations": 0, "host_reads": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        fresh = [t for t in _tensors(out) if not t.is_meta and t.untyped_storage().data_ptr() not in given]
        self.counts["operators"] += 1
        self.counts["allocations"] += len(fresh)
        self.counts["host_reads"] += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return out


def measure(model: nn.Module, x: Tensor, y: Tensor, rounds: int, device: str, method: dualprune.SLR) -> dict[str, Any]:
    """Return the ratios and counts of one model at one batch."""
    model, x, y = model.to(device).train(), x.to(device), y.to(device)
    plain, pruned = (torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9) for _ in range(2))
    pruner = dualprune.attach(model, pruned, method, rate=10, ignore=(), every=10**9)
    pruner.update()  # the default pulls from then on

    def step(optimizer: torch.optim.Optimizer, observe: Callable[[Tensor], None]) -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        observe(loss)
        optimizer.step()

    whole = alternate(
        {"plain": lambda: step(plain, lambda _: None), "attached": lambda: step(pruned, pruner.observe)}, rounds, device
    )
    alone = alternate({"plain": plain.step, "attached": pruned.step}, 5 * rounds, device)
    update = alternate({"update": pruner.update}, max(2, rounds // 3), device)
    base = statistics.median(whole["plain"])
    hook = [a - p for p, a in zip(alone["plain"], alone["attached"], strict=True)]
    counts = {k: v - _count(plain)[k] for k, v in _count(pruned).items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pruned": sum(w.numel() for w in pruner.problem.weights),
        "batch": list(x.shape),
        "plain_step_seconds": base,
        "whole_steps": ratios(whole, "plain")["attached"],
        "one_plus_hook_over_step": {
            "median": 1 + statistics.median(hook) / base, "min": 1 + min(hook) / base, "max": 1 + max(hook) / base,
        },
        "update_over_step": statistics.median(update["update"]) / base,
        "update_share_at_default_period": statistics.median(update["update"]) / base / dualprune.SLR.default_every,
        "counted_in_the_hook": counts,
    }  # fmt: skip


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    cases = {
        "resnet18": (lambda: build_model("resnet18", 10), (8 if args.quick else 128, 3, 32, 32), 10),
        "mixer": (
            lambda: build_model("timm:mixer_s32_224" if args.quick else "timm:mixer_b16_224"),
            (2 if args.quick else 16, 3, 224, 224),
            1000,
        ),
    }
    figures = {}
    for name, (make, shape, classes) in cases.items():
        torch.manual_seed(0)
        x, y = torch.randn(shape), torch.randint(classes, shape[:1])
        for label, method in (("", dualprune.SLR(ramp=0, hold=0)), (", the papers' SLR", dualprune.SLR.paper())):
            found = measure(make(), x, y, rounds=3 if args.quick else 12, device=args.device, method=method)
            figures[name + label] = found
            rows = {key: found[key] for key in ("whole_steps", "one_plus_hook_over_step")}
            table(f"{name}{label}, {found['parameters']:,} parameters, {tuple(shape)}", rows)
            report(args, "overhead", figures)  # after each, so that an interrupted run keeps what it has


def _count(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    with Ledger() as ledger:
        optimizer.step()
    return ledger.counts


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


if __name__ == "__main__":
    main()
