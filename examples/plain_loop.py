"""Prune a convolutional network 30× in a plain PyTorch loop: the three lines are marked.

Runs in some seconds on scikit-learn's handwritten digits:  python examples/plain_loop.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dualprune

EPOCHS, RATE = 8, 30


def data() -> tuple[DataLoader[tuple[Tensor, ...]], Tensor, Tensor]:
    """Return batches of 1,400 digits, and the 397 others with their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels)
    return DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True), x[1400:], y[1400:]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], prune: bool) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if prune:
        pruner = dualprune.attach(model, optimizer, dualprune.SLR(), rate=RATE, total_steps=steps)  # line one
    for _ in range(EPOCHS):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if prune:
                pruner.observe(loss)  # line two, optional
    if prune:
        pruner.finish(calibrate=loader)  # line three
        print(pruner.summary())


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model.eval()(x).argmax(1) == y).float().mean().item()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    loader, x, y = data()
    model = network()
    train(model, loader, prune=False)
    found = {"dense": accuracy(model, x, y)}

    cut = copy.deepcopy(model)
    dualprune.attach(cut, None, dualprune.Magnitude(), rate=RATE).finish(calibrate=loader)
    found["cut at once"] = accuracy(cut, x, y)

    train(model, loader, prune=True)
    found["SLR"] = accuracy(model, x, y)
    for name, value in found.items():
        print(f"{name:<12}{value:8.1%}")
    return found


if __name__ == "__main__":
    main()
