"""Run a function on several ranks of this machine, over Gloo, and count the bytes they exchange."""

from __future__ import annotations

import faulthandler
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def run(function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(rank, size, *arguments)` returns on every rank; an error on one is raised here.

    The ranks are forked from a server that has imported torch once, so that each test does not pay for it.
    """
    # the server is asked to start with the first test; later calls change nothing
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torch.distributed.fsdp", "dualprune.pruner"])
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder / f"meeting-{uuid4().hex}"
    torch.multiprocessing.start_processes(_main, (function, size, meeting, arguments), size, start_method="forkserver")
    return [torch.load(f"{meeting}.{rank}", weights_only=False) for rank in range(size)]


def _main(rank: int, function: Callable[..., Any], size: int, meeting: Path, arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a rank that dies of a signal says where it was
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        torch.save(function(rank, size, *arguments), f"{meeting}.{rank}")
    finally:
        dist.destroy_process_group()


class Wire(TorchDispatchMode):
    """Counts collectives and the bytes this rank hands in, below anything the library could count itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    @property
    def bytes(self) -> int:
        return sum(n for _, n in self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(t, "placements") or t.__name__ == "DTensor" for t in types):
            return NotImplemented  # its parts come by here again
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.", "c10d_functional.")) and "wait" not in name:
            self.calls.append((name, _bytes(args[0])))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


@contextmanager
def counted() -> Iterator[Wire]:
    with Wire() as wire:
        yield wire
