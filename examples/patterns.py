"""Give every layer a sparsity set of its own: 2:4, whole filters, blocks, kernels and single weights in one model.

python examples/patterns.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dualprune
from dualprune import NM, Block, Filter, Kernel

STEPS = 300


class Net(nn.Module):
    """Three convolutions and two linear layers, named so that globs can tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(128, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.deep(self.wide(self.stem(x).relu()).relu()).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


def main() -> dualprune.Pruner:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    pruner = dualprune.attach(
        model,
        optimizer,
        dualprune.SLR(),
        patterns={
            "stem": (Filter(), 0.25),  # a quarter of the filters goes
            "wide": (Kernel(), 0.5),  # half of the 3×3 kernels
            "deep": (Block(4, 4), 0.75),  # three of four 4×4 tiles
            "hidden": NM(2, 4),  # two of every four inputs: its sparsity is in its name
            "head": 0.8,  # single weights
        },
        total_steps=STEPS,
    )
    for _ in range(STEPS):
        index = torch.randint(1400, (64,))
        loss = F.cross_entropy(model(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.observe(loss)
    pruner.finish()

    print(pruner.summary())
    right = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    print(f"accuracy after cutting {right:.1%}")
    return pruner


if __name__ == "__main__":
    main()
