"""How sparse a model is: the table `sparsity_report` makes of any module or state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualprune.errors import DualpruneError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSparsity:
    """One parameter of two or more dimensions.

    Attributes:
        name: of the parameter.
        shape: as stored.
        kept: nonzero weights.
        total: all weights.
        zero_filters: output slices (dim 0) that are all zero.
        zero_channels: input slices (dim 1) that are all zero.
        two_of_four: whether 2:4 along dim 1 holds: at most two nonzeros in every four, and four divides it.
        aliases: further names of the same tensor; it is counted once.
        bits: of the smallest grid, of 2 to 8 bits, that all weights are on; None: on none, or nothing is kept.
        levels: distinct values among the weights on the grid, zero included where there is one; 0: on none.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    zero_filters: int
    zero_channels: int
    two_of_four: bool
    aliases: tuple[str, ...] = ()
    bits: int | None = None
    levels: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.kept / self.total if self.total else 0.0

    @property
    def structure(self) -> str:
        """The structure found, in words."""
        found = [f"{self.bits} bits, {self.levels} levels"] * bool(self.bits)
        found += ["2:4"] * self.two_of_four
        found += [f"{self.zero_filters} of {self.shape[0]} filters zero"] * bool(self.zero_filters)
        found += [f"{self.zero_channels} of {self.shape[1]} channels zero"] * bool(self.zero_channels)
        found += [f"tied to {', '.join(self.aliases)}"] * bool(self.aliases)
        return "; ".join(found)


@dataclass(frozen=True)
class SparsityReport:
    """How sparse each parameter of two or more dimensions is; ``str()`` gives a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def kept(self) -> int:
        """Nonzero weights."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """All weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def rate(self) -> float:
        """Compression rate total / kept; infinite if nothing is kept."""
        return self.total / self.kept if self.kept else float("inf")

    def __str__(self) -> str:
        rows = [("parameter", "shape", "kept", "of", "sparsity", "structure")]
        for layer in self.layers:
            shape = "×".join(map(str, layer.shape))
            rows.append((layer.name, shape, f"{layer.kept:,}", f"{layer.total:,}", f"{layer.sparsity:.4f}", layer.structure))
        sparsity = 1 - self.kept / self.total if self.total else 0.0
        rows.append(("all", "", f"{self.kept:,}", f"{self.total:,}", f"{sparsity:.4f}", f"rate {self.rate:.2f}×"))
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        align = "<<>>><"
        return "\n".join(
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, wide, strict=True)).rstrip()
            for row in rows
        )


def sparsity_report(model_or_state_dict: nn.Module | Mapping[str, Tensor]) -> SparsityReport:
    """Count the zeros of a model's parameters, or of a state dict's floating tensors, of two or more dimensions.

    Tied tensors are counted once, under their first name. A state dict does not say which tensors are buffers, so its
    floating buffers of two or more dimensions are counted with the parameters.

    Raises:
        DualpruneError: it is neither, holds no such tensor, or holds a lazy one without a shape or one on the meta device.
    """
    from torch import nn
    from torch.nn.parameter import is_lazy

    named = _named_tensors(model_or_state_dict)
    if lazy := [name for name, tensor in named if is_lazy(tensor)]:
        raise DualpruneError(f"{lazy[0]} has no shape yet: run one batch through the model first")
    names: dict[tuple[Any, ...], list[str]] = {}
    tensors: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in named:
        if tensor.ndim > 1 and tensor.is_floating_point():
            if tensor.is_meta:
                raise DualpruneError(f"{name} is on the meta device and has no values: load the weights first, then count")
            key = _identity(name, tensor)
            names.setdefault(key, []).append(name)
            tensors.setdefault(key, tensor.detach())
    if not tensors:
        what = "parameter" if isinstance(model_or_state_dict, nn.Module) else "floating tensor"
        raise DualpruneError(f"sparsity_report found no {what} of two or more dimensions in what it was given")
    return SparsityReport(tuple(_layer_sparsity(names[key], tensor) for key, tensor in tensors.items()))


def _named_tensors(source: nn.Module | Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    from torch import Tensor, nn

    if isinstance(source, nn.Module):
        return list(source.named_parameters(remove_duplicate=False))
    if isinstance(source, Mapping):
        return [(str(name), value) for name, value in source.items() if isinstance(value, Tensor)]
    raise DualpruneError(f"sparsity_report expects a torch.nn.Module or a state dict, got {type(source).__name__}")


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Return what two names of one tensor share; an empty tensor is only itself."""
    place = tensor.data_ptr() if tensor.numel() else 0
    return (tensor.device, place, tensor.shape, tensor.stride()) if place else (name,)


def _layer_sparsity(names: list[str], tensor: Tensor) -> LayerSparsity:
    from dualprune.patterns import NM
    from dualprune.quantise import find_grid

    nonzero, shape = tensor != 0, tuple(tensor.shape)
    grid = find_grid(tensor) if tensor.itemsize > 1 else None
    return LayerSparsity(
        name=names[0],
        shape=shape,
        kept=int(nonzero.sum()),
        total=tensor.numel(),
        zero_filters=int((~nonzero.flatten(1).any(1)).sum()),
        zero_channels=int((~nonzero.transpose(0, 1).flatten(1).any(1)).sum()),
        two_of_four=bool(tensor.numel()) and shape[1] % 4 == 0 and NM(2, 4).contains(tensor, 0.5),
        aliases=tuple(names[1:]),
        bits=grid.bits if grid else None,
        levels=len(tensor.unique()) if grid else 0,
    )
