"""What the trainers' callbacks share: batches for the end, and a pruner's state as a file beside a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dualprune import distributed
from dualprune.errors import DualpruneError
from dualprune.files import atomic_write
from dualprune.pruner import Pruner

STATE = "dualprune.safetensors"

Batches = int | Iterable[Any]  # so many of the trainer's own, or these


def batches(calibrate: Batches, loader: Any) -> Iterable[Any] | None:
    """Return what `Pruner.finish` should calibrate with: the first batches of the trainer's loader, others, or none.

    Raises:
        DualpruneError: batches of the trainer are asked for, and it has several loaders.
    """
    if not isinstance(calibrate, int):
        return calibrate
    if calibrate and isinstance(loader, Mapping | list | tuple):
        raise DualpruneError("this trainer has several training loaders: pass calibrate=batches, or calibrate=0 for none")
    return islice(loader, calibrate) if calibrate else None


def refuse_shards(pruner: Pruner) -> None:
    """Let go of a pruner whose state no single rank can save.

    Raises:
        DualpruneError: weights are cut up over ranks.
    """
    if any(distributed.span(target.weight) for target in pruner.problem.targets):
        pruner.detach()
        raise DualpruneError(
            "the weights are cut up over ranks, but one rank writes this trainer's checkpoints: use a plain loop with "
            "torch.distributed.checkpoint and pruner.load_checkpoint, or DDP"
        )


def save_state(pruner: Pruner, path: Path) -> None:
    """Write the pruner's state to `path`, a safetensors file that is whole or not there, with the weights' `fingerprint`."""
    with atomic_write(path) as temporary:
        save_file(pruner.state_dict(), temporary, metadata={"weights": fingerprint(pruner)})


def load_state(pruner: Pruner, path: Path, advice: str, exact: bool = False) -> None:
    """Put a state that `save_state` wrote back onto a pruner attached in the same way.

    Args:
        pruner: of a model that is loaded already.
        path: the file.
        advice: what to do where the file is not there, or not the right one.
        exact: the trainer loads the very weights that it saved, so that others mean another run or another step.

    Raises:
        DualpruneError: there is no such file, it is damaged, of another run, or (`exact`) was saved with other weights.
    """
    if not path.is_file():
        raise DualpruneError(f"this run is resumed, but the pruner's state is not at {path}: {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            weights = (file.metadata() or {}).get("weights")
        state = load_file(path)
    except SafetensorError as error:
        raise DualpruneError(f"{path} is damaged ({error}): resume from another checkpoint") from error
    if exact and weights != fingerprint(pruner):
        raise DualpruneError(
            f"{path} was saved with other weights than those resumed from: it is of another run or another step; {advice}"
        )
    pruner.load_state_dict(state)


def fingerprint(pruner: Pruner) -> str:
    """Return a hash of the weights that are pruned, by their names, shapes and bits."""
    digest = hashlib.sha256()
    for target in pruner.problem.targets:
        weight = distributed.local(target.weight).detach().cpu()
        digest.update(f"{target.name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
