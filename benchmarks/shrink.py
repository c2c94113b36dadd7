"""What removing filters physically gives, on ResNet-56 with half of its free filters zero, beside zeros left in place.

    python benchmarks/shrink.py --json shrink.json
    python benchmarks/shrink.py --filters pruned.safetensors --unstructured other.safetensors

Free are the inner filters of the blocks: the zero-padded shortcuts fix all other widths. Without files the weights are random,
and the unstructured twin has as many left as the shrunk model; with files they are those of real runs, whose accuracies
`dualprune evaluate` gives. All are timed in turn, round by round, in one process.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import alternate, arguments, ratios, report, table
from torch import Tensor, nn

import dualprune
from dualprune.tasks.classification.models import build_model

BATCHES = (1, 128)


def main() -> None:
    files = {
        "filters": "sparse file of a ResNet-56 with inner filters that are zero; random weights without it",
        "unstructured": "sparse file of one with zeros at other places; random weights without it",
    }
    args = arguments(__doc__.splitlines()[0], **files)
    torch.manual_seed(0)
    depth, side, batches = ("resnet20", 8, (1, 4)) if args.quick else ("resnet56", 32, BATCHES)
    dense = build_model(depth).to(args.device).eval()
    example = torch.randn(1, 3, side, side, device=args.device)
    filters = copy.deepcopy(dense)
    if args.filters:
        filters.load_state_dict(dualprune.load_sparse(args.filters))
    else:
        prune(filters, {"*.conv1.weight": (dualprune.Filter(), 0.5)})
    dualprune.silence(filters, example)
    shrunk = dualprune.shrink(filters, example)
    unstructured = copy.deepcopy(dense)
    if args.unstructured:
        unstructured.load_state_dict(dualprune.load_sparse(args.unstructured))
    else:
        prune(unstructured, {"*": (dualprune.Unstructured(), 1 - nonzero(shrunk) / nonzero(dense))})
    models = {"dense": dense, "filters zero, in place": filters, "filters removed": shrunk, "unstructured zeros": unstructured}

    rows: dict[str, dict[str, Any]] = {name: facts(model, example) for name, model in models.items()}
    for batch in batches:
        x = torch.randn(batch, 3, side, side, device=args.device)
        with torch.inference_mode():
            seconds = alternate({name: partial(m, x) for name, m in models.items()}, 2 if args.quick else 30, args.device)
        table(f"{depth}, batch {batch}: time over that of dense", ratios(seconds, "dense"))
        for name, times in seconds.items():
            rows[name][f"milliseconds, batch {batch}"] = 1000 * statistics.median(times)
            rows[name][f"of dense, batch {batch}"] = ratios(seconds, "dense").get(name)
    show(rows, [f"milliseconds, batch {batch}" for batch in batches])
    with torch.inference_mode():
        outputs = filters(example)
        error = float((shrunk(example) - outputs).abs().max() / outputs.abs().max())
    figures = {"model": depth, "side": side, "models": rows, "largest_difference_over_largest_output": error}
    weights = {name: path.name if (path := getattr(args, name)) else "random" for name in files}
    report(args, "shrink", {**figures, "weights": weights})


def prune(model: nn.Module, rule: Any) -> None:
    """Cut by magnitude, at once, what `rule` (globs to patterns) names."""
    dualprune.attach(model, None, dualprune.Magnitude(), patterns=rule).finish()


def nonzero(model: nn.Module) -> int:
    """Count the weights of convolutions and linear layers that are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)


def facts(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Count parameters, multiplications and bytes in a file."""
    with tempfile.TemporaryDirectory() as folder:
        size = dualprune.save_sparse(model, Path(folder) / "model.safetensors")
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "nonzero": nonzero(model), "macs": macs(model, example), "file_bytes": size}


@torch.no_grad()
def macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiplications that dense kernels do for one image in convolutions and linear layers."""
    total = 0

    def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += layer.weight[0].numel() * output[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    model(example)
    for hook in hooks:
        hook.remove()
    return total


def show(rows: dict[str, dict[str, Any]], times: list[str]) -> None:
    """Print one line a model."""
    columns = ["parameters", "nonzero", "macs", "file_bytes"]
    print(f"{'':<26}" + "".join(f"{c:>14}" for c in columns) + "".join(f"{t:>26}" for t in times))
    for name, row in rows.items():
        print(f"{name:<26}" + "".join(f"{row[c]:>14,}" for c in columns) + "".join(f"{row[t]:>26.3f}" for t in times))
    print()


if __name__ == "__main__":
    main()
