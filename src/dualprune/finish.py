"""The end of a run: cut the weights, hold the masks, re-estimate batch norm by forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualprune import distributed
from dualprune.distributed import local
from dualprune.errors import DualpruneError

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any], group: Any = None) -> int:
    """Re-estimate the running statistics of every batch norm as the plain average over `batches`; no gradient step.

    Only batch-norm layers are put into training mode: dropout stays off, and every layer's mode and momentum return.
    SyncBatchNorm works rank by rank meanwhile, so that ranks may have unequal numbers of batches.

    Args:
        model: the module; called as model(x), model(*…) is never used, and model(**batch) for a mapping.
        batches: tensors, (x, …) tuples or mappings; moved to the model's device.
        group: a torch.distributed group whose ranks have batches of their own each (or some of them none); all end with
            the average over all of them. Sharded models run their ranks in step: as many batches on each.

    Returns:
        The number of batches seen, on all ranks; 0 without touching anything if the model has no batch norm.

    Raises:
        DualpruneError: there are no batches, or a batch is of another kind; the statistics are as before.
    """
    if isinstance(batches, Tensor | str | Mapping):
        raise DualpruneError(f"expected an iterable of batches, got one {type(batches).__name__}: put it into a list")
    model = distributed.bare(model)
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {m: m.training for m in model.modules()}
    momenta = [layer.momentum for layer in layers]
    saved = [{k: getattr(layer, k).clone() for k in _BUFFERS} for layer in layers]
    seen = 0
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
        with _unsynchronised(layers):
            for batch in batches:
                forward_batch(model, batch, device)
                seen += 1
        if not (seen := _average(layers, seen, group)):
            raise DualpruneError(
                "batch-norm re-estimation got no batches: is the loader empty, or an iterator already used up?"
            )
    except BaseException:
        _restore(layers, saved)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return seen


@contextmanager
def batch_norm_restored(model: nn.Module) -> Iterator[None]:
    """Put every batch-norm statistic back as it was on leaving."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    saved = [{k: getattr(layer, k).clone() for k in _BUFFERS} for layer in layers]
    try:
        yield
    finally:
        _restore(layers, saved)


@contextmanager
def _unsynchronised(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let SyncBatchNorm see its own rank only: in training mode it would wait for ranks that have no batch left."""
    synchronised: list[Any] = [m for m in layers if isinstance(m, nn.SyncBatchNorm) and "forward" not in vars(m)]
    for layer in synchronised:
        layer.forward = partial(_BatchNorm.forward, layer)
    try:
        yield
    finally:
        for layer in synchronised:
            del layer.forward


def cut_(weights: Iterable[Tensor], drops: Iterable[Tensor]) -> None:
    """Zero what is dropped, in place; a positive zero whatever the sign was."""
    for w, drop in zip(weights, drops, strict=True):
        local(w).masked_fill_(local(drop), 0)


def _average(layers: Iterable[_BatchNorm], seen: int, group: Any) -> int:
    """Average the statistics over the ranks of the group, by the batches each has seen; return how many all have seen."""
    statistics = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    seen = round(distributed.average_([b for b in statistics if b is not None], seen, group))
    for layer in layers if group is not None else ():
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(seen)
    return seen


@torch.no_grad()
def _restore(layers: Iterable[_BatchNorm], saved: Iterable[Mapping[str, Tensor]]) -> None:
    for layer, buffers in zip(layers, saved, strict=True):
        for k, value in buffers.items():
            getattr(layer, k).copy_(value)


def forward_batch(model: nn.Module, batch: Any, device: torch.device) -> None:
    """Call the model with a batch, moved to the device: a tensor, a tuple that begins with one, or a mapping of arguments."""
    if isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        return
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise DualpruneError(
            f"calibration expects batches that are a tensor, a tuple that begins with one, or a mapping; "
            f"got {type(batch).__name__} beginning with {type(x).__name__}"
        )
    model(x.to(device))
