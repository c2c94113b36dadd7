"""How far an optimizer step moves a weight per unit of its gradient: what a penalty has to be measured in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dualprune.distributed import local, total
from dualprune.importance import SECOND_MOMENTS


class Stride:
    """η = lr, over √v for optimizers that divide by the root of a mean squared gradient v; and what momentum adds to it.

    Others count as plain gradient descent. Of several parameter groups the one with the longest stride is meant.
    """

    def __init__(self, optimizer: Optimizer, weights: Sequence[nn.Parameter]) -> None:
        self.optimizer, self.weights = optimizer, weights

    def noise(self) -> float:
        """Return the root mean square gradient of the weights, by the optimizer's own second moments; 1 where it has none."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        weights, sums = [], []
        for weight in self.weights:
            state, beta = self.optimizer.state.get(weight, {}), _memory(groups[id(weight)])
            if beta is None:
                continue
            for name in state.keys() & set(SECOND_MOMENTS):
                seen = 1 - beta ** max(float(state.get("step", 1)), 1)  # a mean that starts at zero is that much too small
                weights.append(weight)
                sums.append(local(state[name]).double().sum() / seen)
        mean = float(total(sums, weights)) / sum(w.numel() for w in weights) if weights else 0.0
        return math.sqrt(mean) or 1.0

    def length(self, noise: float) -> float:
        """Return η at today's learning rate."""
        return (self.lr or 0.0) / noise

    @property
    def lr(self) -> float | None:
        """The learning rate, the largest of the groups'; None where no group has one."""
        lr = self._longest.get("lr")
        return None if lr is None else float(lr)

    @property
    def gain(self) -> float:
        """How many steps' worth of a steady gradient momentum makes of one: 1/(1 − momentum)."""
        momentum = float(self._longest.get("momentum", 0.0))
        return (1 - float(self._longest.get("dampening", 0.0))) / (1 - min(momentum, 0.999)) if momentum else 1.0

    @property
    def _longest(self) -> dict[str, Any]:
        return max(self.optimizer.param_groups, key=lambda group: float(group.get("lr", 0.0)))


def _memory(group: Mapping[str, Any]) -> float | None:
    """Return the β by which a running mean of squared gradients forgets; None of an optimizer that divides by none."""
    beta = group["betas"][1] if "betas" in group else group.get("alpha")
    return None if beta is None else float(beta)
