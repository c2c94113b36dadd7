"""What the loop tests share: a tiny network, a deterministic training loop on the digits, comparison bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import dualprune

METHODS = {
    "slr": dualprune.SLR(),
    "slr-paper": dualprune.SLR.paper(),
    "admm": dualprune.ADMM(hold=0.2),
    "gradual": dualprune.GradualMagnitude(),
    "oneshot": dualprune.Magnitude(),
}


# a run of seconds that has all a run has
TINY_RECIPE = """
name = "tiny"
[model]
name = "mlp"
options = { hidden = [24, 16] }
[data]
name = "digits"
[training]
epochs = 2
lr = 0.05
batch_size = 256
[prune]
rate = 5
calibrate = 64
[methods.slr]
kind = "slr"
updates_per_epoch = 2
[methods.gradual]
kind = "gradual"
updates_per_epoch = 3
[methods.oneshot]
kind = "oneshot"
"""


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 handwritten digits, scaled to [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)


def tiny_net(seed: int = 0) -> nn.Sequential:
    """Three convolutions, batch norm, dropout and a classifier: everything the cut has to do with, 3,000 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10),
    )  # fmt: skip


def batch(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return the batch of a step, always the same one."""
    x, y = digits()
    index = torch.randint(1400, (size,), generator=torch.Generator().manual_seed(step))
    return x[index], y[index]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: Iterable[int],
    pruner: dualprune.Pruner | None = None,
    after_step: Callable[[int], Any] = lambda step: None,
) -> list[float]:
    """Run a plain loop whose every step depends on nothing but the state and the step's number; return the losses."""
    losses = []
    for step in steps:
        torch.manual_seed(step)  # dropout
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if pruner is not None:
            pruner.observe(loss)
        optimizer.step()
        losses.append(loss.item())
        after_step(step)
    return losses


def before_step(pruner: dualprune.Pruner) -> None:
    """What the hook does before an optimizer step, without the step."""
    pruner._before_step(pruner.optimizer, (pruner.optimizer,), {})


def sgd(model: nn.Module, lr: float = 0.05) -> Optimizer:
    """Return SGD with momentum on all parameters."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def snapshot(tensors: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a state_dict."""
    state = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    return {name: value.detach().clone() for name, value in state.items()}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Tell whether two state_dicts are equal in every bit: −0.0 is not 0.0, and NaN equals itself."""

    def raw(t: Tensor) -> Tensor:
        return t.detach().contiguous().flatten().view(torch.uint8)

    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(raw(a[k]), raw(b[k])) for k in a)


def accuracy(model: nn.Module) -> float:
    """Return the top-1 accuracy, in [0, 1], on the digits that no batch holds."""
    x, y = digits()
    mode = model.training
    with torch.no_grad():
        hits = (model.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    model.train(mode)
    return hits


def fit(task, model, batch_size: int, epochs: int) -> None:
    """Train on a recipe's task by Adam at 0.01, on its own batches and loss."""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(epochs):
        for batch in task.train_batches(batch_size=batch_size, seed=0, epoch=epoch):
            optimizer.zero_grad()
            task.loss(model, batch, task.recipe.training).backward()
            optimizer.step()
