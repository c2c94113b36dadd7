"""Averages of the weights (EMA, SWA): cut where they are evaluated, whole where they go on averaging."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dualprune.finish import batch_norm_restored, recalibrate_batch_norm
from dualprune.pruner import Pruner
from dualprune.scope import parameter_name


@contextmanager
def evaluate_average(pruner: Pruner, average: nn.Module, calibrate: Iterable[Any] | None = None) -> Iterator[nn.Module]:
    """Give a context in which an average of the model's weights is cut as the model would be; then it is as before.

    Args:
        pruner: the pruner of the model that is averaged.
        average: a module of the same parameters, such as timm's `ema.module` or torch's `AveragedModel`.
        calibrate: batches to re-estimate its batch norm with inside the context.
    """
    saved = snapshot(pruner, average)
    try:
        with batch_norm_restored(average):
            pruner.cut_average(average)
            if calibrate is not None:
                recalibrate_batch_norm(average, calibrate)
            yield average
    finally:
        restore_(saved)


def snapshot(pruner: Pruner, average: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of `average` that the pruner prunes in its model, each with a copy."""
    names = {target.name for target in pruner.problem.targets}
    weights = (p.detach() for name, p in average.named_parameters() if parameter_name(name) in names)
    return [(w, w.clone()) for w in weights]


@torch.no_grad()
def restore_(saved: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put back what `snapshot` saw."""
    for weight, old in saved:
        weight.copy_(old)
