"""What a weight's magnitude is multiplied by before it is ranked: how much the loss feels the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer, RAdam, RMSprop
from torch.optim.adam import Adam

from dualprune.chunks import chunks
from dualprune.distributed import empty_like, local
from dualprune.errors import DualpruneError, suggest

# of v, the running mean of squared gradients, the power that magnitudes are multiplied by
POWERS = {"magnitude": 0.0, "adaptive": 0.25, "second-moment": 0.5}
IMPORTANCES = tuple(POWERS)
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")  # as Adam and its kin, and RMSprop, call them
MEMORY = 0.98  # of the mean that is kept where the optimizer keeps none: some fifty steps
_TINY = 1e-36  # with it, weights that the loss does not feel are ranked by magnitude among themselves, below all others
_KEEPERS = (Adam, NAdam, RAdam, RMSprop)  # AdamW is an Adam


class SecondMoment:
    """v to a power, v the running mean of squared gradients (docs/theory.md, "In whose metric").

    Sets are projected onto in the metric D = diag(v^2p): of all Z in the set, Π(W) has the least Σ v^2p (w − z)², which
    keeps the weights of largest v^p·|w|, or the groups of largest Σ v^2p w². With p = 1/2 ("second-moment"; ELSA, Lee et
    al. 2025) D is the diagonal of the Fisher matrix; with p = 1/4 ("adaptive") it is the metric √v in which AdaGrad and Adam
    take their steps.

    v is the optimizer's own where it keeps one (Adam, AdamW, NAdam, RAdam, RMSprop and what names it like them), and costs
    nothing; for others, such as SGD, a mean over some fifty steps is kept here: a tensor of a weight's shape for each.

    Args:
        name: "adaptive" or "second-moment".
        optimizer: the optimizer of the loop.
        weights: the parameters that are ranked.
        dtype: of the means that are kept here; of less than 32 bits it becomes bfloat16, as squares need the range.
        device: where they lie; None: beside the weights.

    Raises:
        DualpruneError: there is no optimizer.
    """

    def __init__(
        self, name: str, optimizer: Optimizer | None, weights: Sequence[nn.Parameter],
        dtype: torch.dtype | None = None, device: str | torch.device | None = None,
    ) -> None:  # fmt: skip
        if optimizer is None:
            raise DualpruneError(
                f"importance={name!r} goes by the gradients of a training loop, got no optimizer: pass that of the loop, or "
                "importance='magnitude'"
            )
        self.name, self.optimizer, self.weights = name, optimizer, list(weights)
        self.means: list[Tensor] = []
        self.dtype = torch.bfloat16 if dtype is not None and dtype.itemsize < 4 else torch.float32
        self._device = device

    def watch(self, grad_scale: Tensor | None) -> bool:
        """Take in the gradients of a step to be made, before a penalty is added to them; tell whether there were any.

        Args:
            grad_scale: what they are to be divided by, where a fused optimizer unscales them by itself.
        """
        if isinstance(self.optimizer, _KEEPERS) or any(moment is not None for moment in self._kept_by_optimizer()):
            self.means.clear()
            return True
        if all(weight.grad is None for weight in self.weights):
            return False
        self.begin()
        for mean, weight in zip(self.means, self.weights, strict=True):
            mean = local(mean)
            if weight.grad is None:
                mean.mul_(MEMORY)
                continue
            grad = local(weight.grad.detach())
            if grad.is_sparse:
                grad = grad.to_dense()
            if grad_scale is not None:  # may have overflowed, and then the step will be skipped
                grad = torch.nan_to_num(grad / grad_scale.to(grad.device), 0.0, 0.0, 0.0)
            for m, g in chunks([mean], [grad.to(mean.device)]):
                m.mul_(MEMORY).addcmul_(g, g, value=1 - MEMORY)
        return True

    def begin(self) -> None:
        """Make room for the means that are kept here, if there is none."""
        if not self.means:
            self.means = [empty_like(w.detach(), self.dtype, self._device).zero_() for w in self.weights]

    def take(self, means: Sequence[Tensor]) -> None:
        """Put back means that were saved, one for each weight or none at all."""
        self.means = []
        if means:
            self.begin()
        for mine, saved in zip(self.means, means, strict=True):
            mine.copy_(saved)

    def weigh(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return `values`, one tensor a weight, times v^p in single precision; as they are before a first step has made v."""
        if not self.known:
            return list(values)
        return [self._factor(moment, v) * v for moment, v in zip(self.moments, values, strict=True)]

    @property
    def moments(self) -> list[Tensor] | list[Tensor | None]:
        """The mean v of every weight, the optimizer's or the one kept here; None where there was no gradient to make one."""
        return self.means or self._kept_by_optimizer()

    @property
    def known(self) -> bool:
        """Whether there is any v yet."""
        return any(moment is not None for moment in self.moments)

    def root(self, moment: Tensor, out: Tensor | None = None) -> Tensor:
        """Return v^p in single precision, of any piece of v."""
        root = torch.add(moment if out is not None else moment.float(), _TINY, out=out).sqrt_()
        return root if POWERS[self.name] == 0.5 else root.sqrt_()

    def _factor(self, moment: Tensor | None, like: Tensor) -> Tensor:
        if moment is None:  # never had a gradient: the loss does not feel it
            return torch.full_like(like, _TINY ** POWERS[self.name], dtype=torch.float32)
        return self.root(moment.to(like.device))

    def _kept_by_optimizer(self) -> list[Tensor | None]:
        states = (self.optimizer.state.get(weight, {}) for weight in self.weights)
        return [next((state[name] for name in SECOND_MOMENTS if name in state), None) for state in states]


def check_importance(name: str) -> str:
    """Return `name` if it is a measure of importance, else raise with a suggestion."""
    if name not in IMPORTANCES:
        near = suggest(str(name), IMPORTANCES)
        raise DualpruneError(f"expected importance to be one of {', '.join(IMPORTANCES)}; got {name!r}{near}")
    return name
