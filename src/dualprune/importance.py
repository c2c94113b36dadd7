"""What a weight's magnitude is multiplied by before it is ranked: how much the loss feels the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import ASGD, Adamax, Optimizer

from dualprune.errors import DualpruneError, suggest

IMPORTANCES = ("magnitude", "second-moment")
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")  # as Adam and its kin, and RMSprop, call them
_LOOKALIKES = (Adamax, ASGD)  # have a β₂, or an α, for something else


class SecondMoment:
    """√v, v the running mean of squared gradients that Adam or RMSprop keeps (ELSA, Lee et al. 2025).

    v stands for the diagonal of the loss's curvature, so that the sets are projected onto in its metric: of all Z in the
    set, Z = Π(W) has the least Σ v (w − z)², which keeps the weights of largest √v·|w|, or the groups of largest Σ v w².

    Args:
        optimizer: the optimizer of the loop; its state is read where it lies, and costs no memory of its own.

    Raises:
        DualpruneError: the optimizer keeps no second moments; at its first step that leaves a state, where only that tells.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        keeps = optimizer is not None and bool({"betas", "alpha"} & optimizer.defaults.keys())
        if optimizer is None or not keeps or isinstance(optimizer, _LOOKALIKES):
            raise _no_moments(optimizer)
        self.optimizer = optimizer
        self._looked = False
        self.check()

    def weigh(self, weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> list[Tensor]:
        """Return `values`, one tensor a weight, times √v in float32; as they are before the first step, which makes v."""
        states = [self.optimizer.state.get(weight, {}) for weight in weights]
        if not any(states):
            return list(values)
        return [_rooted(self._second_moment(s), v) * v for s, v in zip(states, values, strict=True)]

    def check(self) -> None:
        """Raise if the optimizer's state, once there is one, has no second moments; asked after every step, it looks once."""
        if self._looked:
            return
        states = [state for state in self.optimizer.state.values() if state]
        self._looked = bool(states)
        if states and not any(name in state for state in states for name in SECOND_MOMENTS):
            raise _no_moments(self.optimizer)

    def _second_moment(self, state: dict[str, Tensor]) -> Tensor | None:
        if not state:
            return None  # never had a gradient: the loss does not feel it
        for name in SECOND_MOMENTS:
            if name in state:
                return state[name]
        raise _no_moments(self.optimizer)


def check_importance(name: str) -> str:
    """Return `name` if it is a measure of importance, else raise with a suggestion."""
    if name not in IMPORTANCES:
        near = suggest(str(name), IMPORTANCES)
        raise DualpruneError(f"expected importance to be one of {', '.join(IMPORTANCES)}; got {name!r}{near}")
    return name


def _rooted(moment: Tensor | None, like: Tensor) -> Tensor:
    if moment is None:
        return torch.zeros_like(like, dtype=torch.float32)
    return moment.to(like.device, torch.float32).sqrt()


def _no_moments(optimizer: Optimizer | None) -> DualpruneError:
    got = "no optimizer" if optimizer is None else type(optimizer).__name__
    return DualpruneError(
        f"importance='second-moment' reads the running mean of squared gradients that Adam, AdamW or RMSprop keep, got {got}: "
        "take one of these, or importance='magnitude'"
    )
