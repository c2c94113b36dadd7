"""Directions that docs/research.md asks about, each a few lines around a plain training loop: does it help the default?

    dualprune run recipes/slr-2024/resnet20-cifar10-10x-clean.toml --split validation   # trains the dense network, once
    python benchmarks/arena/directions.py --dense runs/resnet20-cifar10-10x-clean/dense-*/dense.safetensors \
        --variants plain,restart --methods slr,gradual --seeds 1,2 --rate 30 --json runs/directions.json

ResNet-20, 5 epochs of 10,000 of the 45,000 images that the dense network was trained on; accuracy after cutting on the 5,000
that it has not seen, batch norm re-estimated. Never on the test images. A run that is in the JSON file already is not redone.

    plain                the method's default
    restart              the learning rate's cosine ends where the masks are fixed, and a second one starts at half the height
    long-tail            the learning rate stays at a tenth through the last fifth
    average              an average over the last fifth of the steps, under a learning rate that ends at a tenth, cut
    drop-momentum        a weight that leaves the support leaves its momentum behind, at every update
    sharpness            sharpness-aware steps (radius 0.05): two gradients a step, so half the steps
    without-multipliers  SLR with a step size of almost nothing
    large-multipliers    SLR with the step size of ADMM (cap 1, s0 1)
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualprune
from dualprune.files import write_json
from dualprune.finish import recalibrate_batch_norm
from dualprune.tasks.classification import calibration_batches, eval_batches, load_data, split_validation, train_batches
from dualprune.tasks.classification.data import ImageData
from dualprune.tasks.classification.models import CifarResNet

EPOCHS, BATCH, IMAGES, UPDATES = 5, 128, 10_000, 16
FORMAT = torch.channels_last
VARIANTS = (
    "plain", "restart", "long-tail", "average", "drop-momentum", "sharpness", "without-multipliers", "large-multipliers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, required=True, help="the dense network's weights")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; all by default")
    parser.add_argument("--methods", default="slr", help="slr, gradual (slr)")
    parser.add_argument("--seeds", default="1", help="comma-separated (1)")
    parser.add_argument("--rate", type=float, default=30, help="over all convolutions but the first, and the classifier (30)")
    parser.add_argument("--lr", type=float, default=0.1, help="of SGD with momentum (0.1)")
    parser.add_argument("--importance", help="what ranks the weights: magnitude, adaptive, second-moment (the method's own)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, required=True, help="the runs; read before and written after each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = split_validation(load_data("cifar10"), 0.1, seed=1)
    for seed in map(int, args.seeds.split(",")):
        for label in args.methods.split(","):
            for variant in args.variants.split(","):
                key = f"{label} {variant} {args.rate:g}x lr {args.lr:g} seed {seed}"
                key += f" by {args.importance}" * bool(args.importance)
                rows = json.loads(args.json.read_text()) if args.json.exists() else {}
                if key not in rows:
                    settings = {"rate": args.rate, "lr": args.lr, "seed": seed, "importance": args.importance}
                    row = run(data, args.dense, label, variant, **settings)
                    rows = json.loads(args.json.read_text()) if args.json.exists() else {}
                    write_json(args.json, rows | {key: row})
                    print(key, row, flush=True)


def run(
    data: ImageData, dense: Path, label: str, variant: str, *, rate: float, lr: float, seed: int, importance: str | None
) -> dict[str, float]:
    """Prune with one variant; return the accuracy on the held-out images after cutting, the last epoch's loss, minutes."""
    torch.manual_seed(seed)
    began = time.monotonic()
    model = CifarResNet(20)
    model.load_state_dict(dualprune.load_sparse(dense))
    model = model.to(memory_format=FORMAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    indices = torch.randperm(len(data.labels("train")), generator=torch.Generator().manual_seed(1))[:IMAGES]
    a_epoch = IMAGES // BATCH
    steps = EPOCHS * a_epoch // (2 if variant == "sharpness" else 1)
    every = max(1, steps // (EPOCHS * UPDATES))
    pruner = dualprune.attach(
        model, optimizer, _method(label, variant), rate=rate, ignore=("conv1.weight",), budget="global",
        importance=importance, every=every, total_steps=steps,
    )  # fmt: skip
    average, averaged, losses, step = copy.deepcopy(model), 0, [], 0
    while step < steps:
        batches = train_batches(
            data, batch_size=BATCH, seed=seed, epoch=step // a_epoch, augment=True, memory_format=FORMAT, indices=indices
        )
        for images, labels in batches:
            for group in optimizer.param_groups:
                group["lr"] = lr * _factor(variant, step / steps)
            loss = _loss(model, images, labels)
            loss.backward()
            if variant == "sharpness":
                with dualprune.perturbed(optimizer, 0.05, pruner.dropped):
                    _loss(model, images, labels).backward()
            pruner.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.item())
            if variant == "drop-momentum" and step % every == 0:
                _drop_momentum(model, optimizer, pruner)
            if variant == "average" and step > 0.8 * steps:
                averaged += 1
                _blend(average, model, 1 / averaged)
            if step == steps:
                break
    pruner.finish()
    cut = pruner.cut_average(average) if variant == "average" else model
    with torch.autocast("cpu", torch.bfloat16):
        recalibrate_batch_norm(cut, calibration_batches(data, 4096, memory_format=FORMAT))
    return {
        "accuracy": _accuracy(cut, data),
        "loss": round(sum(losses[-a_epoch:]) / len(losses[-a_epoch:]), 4),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def _method(label: str, variant: str) -> dualprune.SLR | dualprune.GradualMagnitude:
    if label == "gradual":
        return dualprune.GradualMagnitude()
    options: dict[str, Any] = {"without-multipliers": {"s0": 1e-9}, "large-multipliers": {"s0": 1.0, "cap": 1.0}}
    return dualprune.SLR(**options.get(variant, {}))


def _factor(variant: str, progress: float) -> float:
    """The learning rate at `progress`, as a share of the highest."""

    def cosine(t: float) -> float:
        return (1 + math.cos(math.pi * t)) / 2

    if variant == "restart":
        return cosine(progress / 0.8) if progress < 0.8 else 0.5 * cosine((progress - 0.8) / 0.2)
    if variant in ("long-tail", "average"):
        return 0.1 + 0.9 * cosine(progress / 0.8) if progress < 0.8 else 0.1
    return cosine(progress)


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(images), labels)


def _drop_momentum(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: dualprune.Pruner) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in pruner.masks.items():
        optimizer.state[parameters[name]]["momentum_buffer"].mul_(mask)


@torch.no_grad()
def _blend(average: nn.Module, model: nn.Module, share: float) -> None:
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, share)


@torch.no_grad()
def _accuracy(model: nn.Module, data: ImageData) -> float:
    model.eval()
    right = total = 0
    for images, labels in eval_batches(data, memory_format=FORMAT):
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return round(100 * right / total, 2)


if __name__ == "__main__":
    main()
