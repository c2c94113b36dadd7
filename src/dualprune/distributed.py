"""Several devices: sums, selection and checks over ranks. The only user of torch.distributed.

A model lies on the ranks of a job in one of two ways, and the rest of the library need not know which:

- *replicated* (DistributedDataParallel): every rank has all of it and does the same with it, so that all there is to
  exchange is the loss, once an update.
- *sharded* (`fully_shard`, tensor parallel): weights are DTensors, and so are Z, Λ and masks, in the same shards. Passes
  over memory go over `local` parts; sums (`total`) and the k-th magnitude (`keep_largest`) exchange counts, never weights.

Whatever is sharded is a collective matter: every rank has to call it.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dualprune import selection
from dualprune.errors import DualpruneError, suggest

Group = Any  # a ProcessGroup, or None
Span = tuple[Group, ...]  # the groups over which a tensor is cut up: one a sharded dimension of its mesh
DIGIT = 11  # bits a round of the selection settles, by a histogram of 2^11 counts
_CHUNK = 1 << 18


# ---------------------------------------------------------------------- parts of tensors


def local(t: Tensor) -> Tensor:
    """Return what this rank has of a tensor, as a view: all of it, unless it is a DTensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def span(t: Tensor) -> Span:
    """Return the groups of ranks over which `t` is cut up; () where this rank has all of it.

    Raises:
        DualpruneError: the ranks hold summands of it, not parts.
    """
    placements = getattr(t, "placements", ())
    if any(p.is_partial() for p in placements):
        raise DualpruneError(f"expected a tensor that is sharded or replicated, got placements {placements}")
    mesh = _mesh(t)
    return tuple(mesh.get_group(d) for d, p in enumerate(placements) if not p.is_replicate() and mesh.size(d) > 1)


def _mesh(t: Tensor) -> Any:
    return getattr(t, "device_mesh", None)


def like(t: Tensor, part: Tensor) -> Tensor:
    """Return the tensor that is cut up as `t` is and of which this rank has `part`."""
    if not hasattr(t, "to_local"):
        return part
    whole = torch.empty_like(t, dtype=part.dtype)
    local(whole).copy_(part)
    return whole


def empty_like(t: Tensor, dtype: torch.dtype | None, device: str | torch.device | None) -> Tensor:
    """Return an uninitialised tensor of t's shape, memory layout and shards.

    Raises:
        DualpruneError: the parts of a DTensor shall lie on another device than it.
    """
    if hasattr(t, "to_local") and device is not None and torch.device(device).type != local(t).device.type:
        raise DualpruneError(
            f"state_device {str(device)!r}: weights that are DTensors keep Z and Λ beside their shards, which are on "
            f"{local(t).device.type}; leave state_device out, or let fully_shard offload (CPUOffloadPolicy)"
        )
    return torch.empty_like(t, dtype=dtype, device=None if hasattr(t, "to_local") else device)


class Part(NamedTuple):
    """A rank's box of a tensor of shape `whole`, and the groups that have the other boxes."""

    values: Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    span: Span

    @staticmethod
    def of(t: Tensor) -> Part:
        """Return this rank's part of `t`."""
        values = local(t)
        if values is t:
            return Part(values, (0,) * t.ndim, tuple(t.shape), ())
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(t.shape, _mesh(t), getattr(t, "placements", ()))
        return Part(values, tuple(offset), tuple(t.shape), span(t))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where in the whole the box is."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.values.shape, strict=True))

    def places(self, where: Tensor) -> Tensor:
        """Return the row-major indices in the whole of the elements at which a mask over the box is True."""
        index = torch.zeros(int(where.sum()), dtype=torch.int64, device=where.device)
        for coordinate, offset, size in zip(where.nonzero(as_tuple=True), self.offset, self.whole, strict=True):
            index = index * size + coordinate + offset
        return index


# ---------------------------------------------------------------------- sums


def each(rows: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    """Return every row summed over the ranks that share the tensor it is of; all rows have one shape.

    One all-reduce for all tensors that are cut up over the same ranks, none where none is.
    """
    spans = [span(t) for t in of]
    if not any(spans):
        return list(rows)
    result: dict[int, Tensor] = {}
    for groups in dict.fromkeys(spans):
        members = [i for i, s in enumerate(spans) if s == groups]
        device = rows[members[0]].device  # Z and Λ may lie beside their weights' device
        summed = _all_reduce(torch.stack([rows[i].to(device) for i in members]), groups)
        result |= zip(members, summed, strict=True)
    return [result[i] for i in range(len(rows))]


def total(rows: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """Return the sum of all rows over all ranks, each row being this rank's share for one tensor of `of`."""
    return _total(rows, [span(t) for t in of])


def count_nonzero(tensors: Sequence[Tensor]) -> list[int]:
    """Return how many elements of each tensor, over all its shards, are not zero."""
    counts = each([torch.count_nonzero(local(t)) for t in tensors], tensors)
    return [int(c) for c in counts]


def agree(ok: bool, of: Sequence[Tensor]) -> bool:
    """Tell whether `ok` holds on every rank that has a part of one of the tensors."""
    for groups in dict.fromkeys(span(t) for t in of):
        if groups:
            here = next(local(t).device for t in of if span(t) == groups)
            ok = not int(_all_reduce(torch.tensor(int(not ok), device=here), groups))
    return ok


def _total(rows: Sequence[Tensor], spans: Sequence[Span]) -> Tensor:
    sums = []
    for groups in dict.fromkeys(spans):
        members = [row for row, s in zip(rows, spans, strict=True) if s == groups]
        first = members[0]
        sums.append(_all_reduce(torch.stack([row.to(first.device) for row in members]).sum(0), groups))
    return sum((s.to(sums[0].device) for s in sums[1:]), sums[0])


def _all_reduce(t: Tensor, groups: Span) -> Tensor:
    """Return the sum over the groups, on t's device; NCCL takes none of a CPU's tensors, Gloo takes all."""
    for group in groups:
        there = t.to(_device(group)) if t.device.type == "cpu" else t
        dist.all_reduce(there, group=group)
        t = there.to(t.device)
    return t


# ---------------------------------------------------------------------- selection


def keep_largest(parts: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return masks that keep exactly the k largest magnitudes over all tensors: `selection.keep_largest`, sharded or not.

    The masks are those of one process, bit for bit, ties included. No weight leaves its rank: rounds of `DIGIT` bits
    each add up a histogram of 8·2^11 bytes, three rounds for float32, two for 16 bits, six for float64; ties at the
    threshold cost as many rounds again as it takes to tell their indices apart.
    """
    if not any(hasattr(p, "to_local") for p in parts):
        return selection.keep_largest(parts, k)
    return [like(p, mask) for p, mask in zip(parts, keep_largest_parts([Part.of(p) for p in parts], k), strict=True)]


def keep_largest_parts(parts: Sequence[Part], k: int) -> list[Tensor]:
    """Return this rank's boxes of the masks that keep exactly the k largest magnitudes over all parts of all ranks."""
    sizes = [math.prod(p.whole) for p in parts]
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"expected 0 <= k <= {sum(sizes)} (the number of elements), got k = {k}")
    if k in (0, sum(sizes)):
        return [torch.full_like(p.values, k > 0, dtype=torch.bool) for p in parts]
    spans = [p.span for p in parts]
    dtype = parts[0].values.dtype
    magnitudes = [selection.memory_order(p.values.detach()).view(selection.BITS[dtype.itemsize]) for p in parts]
    bits, above = _kth_largest(magnitudes, spans, k, 8 * dtype.itemsize - 1)
    threshold = torch.tensor(bits, dtype=selection.BITS[dtype.itemsize]).view(dtype).item()
    ties = [p.values.abs() == threshold for p in parts]
    masks = [p.values.abs() > threshold for p in parts]
    columns = torch.eye(len(parts), dtype=torch.int64)
    tied = _total([torch.count_nonzero(t) * c.to(t.device) for t, c in zip(ties, columns, strict=True)], spans).tolist()
    left = k - above
    for part, mask, tie, count in zip(parts, masks, ties, tied, strict=True):
        if 0 < left < count:
            tie = _first(part, tie, left)
        if left > 0:
            mask |= tie
        left -= count
    return masks


def _first(part: Part, tie: Tensor, wanted: int) -> Tensor:
    """Return the first `wanted` places, in row-major order of the whole, of those that are True on any rank."""
    most = math.prod(part.whole) - 1
    places = part.places(tie)
    last = most - _kth_largest([most - places], [part.span], wanted, max(most.bit_length(), 1))[0]
    first = torch.zeros_like(tie)
    first[tie] = places <= last
    return first


def _kth_largest(keys: Sequence[Tensor], spans: Sequence[Span], k: int, bits: int) -> tuple[int, int]:
    """Return the k-th largest of the lowest `bits` bits of integers over all ranks, and how many are larger, digit by digit."""
    prefix, above, shift = 0, 0, bits
    while shift:
        width = min(DIGIT, shift)
        shift -= width
        counts = _total([_histogram(key, prefix, shift, width, bits) for key in keys], spans)
        at_least = counts.flip(0).cumsum(0).flip(0).tolist()
        digit = next(d for d in range(len(at_least) - 1, -1, -1) if above + at_least[d] >= k)
        above += at_least[digit + 1] if digit + 1 < len(at_least) else 0
        prefix = prefix << width | digit
    return prefix, above


def _histogram(keys: Tensor, prefix: int, shift: int, width: int, bits: int) -> Tensor:
    """Count the next `width` bits of those keys that begin with `prefix`."""
    counts = torch.zeros(1 << width, dtype=torch.int64, device=keys.device)
    for chunk in keys.split(_CHUNK) if keys.device.type == "cpu" else (keys,):
        chunk = chunk & ((1 << bits) - 1)
        if shift + width < bits:
            chunk = chunk[chunk >> (shift + width) == prefix]
        counts += torch.bincount(chunk >> shift & ((1 << width) - 1), minlength=1 << width)
    return counts


# ---------------------------------------------------------------------- replicas


def group_of(model: nn.Module, asked: Group = None) -> Group:
    """Return the group of ranks that train `model` together; None for this process alone.

    Args:
        model: wrapped or not.
        asked: a group; None takes that of DistributedDataParallel, or all ranks of the job; False: this rank alone.
    """
    if asked is False or not dist.is_available() or not dist.is_initialized():
        return None
    if asked is None:
        wrapper = next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
        asked = dist.group.WORLD if wrapper is None else wrapper.process_group
    return asked if dist.get_world_size(asked) > 1 else None


def first(asked: Group = None) -> bool:
    """Tell whether this rank speaks for all that train the model together."""
    if asked is False or not dist.is_available() or not dist.is_initialized():
        return True
    return dist.get_rank(asked) == 0


def summed(values: Sequence[float], group: Group) -> list[float]:
    """Return every number summed over the group, in double precision: one all-reduce."""
    if group is None:
        return list(values)
    t = torch.tensor(values, dtype=torch.float64, device=_device(group))
    dist.all_reduce(t, group=group)
    return t.tolist()


def average_(tensors: Sequence[Tensor], weight: float, group: Group) -> float:
    """Replace float tensors by their means over the group, each rank counting `weight` times; return the sum of weights."""
    if group is None:
        return weight
    device = _device(group)
    means = [t.double().flatten().to(device) * weight for t in tensors]
    flat = torch.cat([torch.tensor([weight], dtype=torch.float64, device=device), *means])
    dist.all_reduce(flat, group=group)
    whole = float(flat[0])
    for t, mean in zip(tensors, (flat[1:] / max(whole, 1)).split([t.numel() for t in tensors]), strict=True):
        t.copy_(mean.view_as(t))
    return whole


def check_replicas(tensors: Mapping[str, Tensor], group: Group) -> None:
    """Make sure that every rank of the group has the same bits: hashes are gathered, 8 bytes a tensor.

    Raises:
        DualpruneError: some rank has others; the message names the first tensor that differs, and the ranks.
    """
    if group is None or not tensors:
        return
    device = _device(group)  # state_device keeps Z and Λ elsewhere than weights
    hashes = torch.stack(each([_hash(local(t)).to(device) for t in tensors.values()], list(tensors.values())))
    everyone = [torch.empty_like(hashes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, hashes, group=group)
    for i, name in enumerate(tensors):
        if odd := [rank for rank, theirs in enumerate(everyone) if theirs[i] != everyone[0][i]]:
            raise DualpruneError(
                f"{name} is not the same on all ranks: rank {', '.join(map(str, odd))} differs from rank 0. Something that "
                "only some ranks did has moved it; make the model, the data order and the learning rate alike on all"
            )


def _hash(t: Tensor) -> Tensor:
    """Return Σ bits_i · odd_i mod 2^64: any change of one element, and of its place, changes it."""
    flat = t.detach().reshape(-1)
    flat = flat.view(selection.BITS[t.itemsize]) if t.itemsize > 1 else flat.to(torch.int16)
    sums = torch.zeros((), dtype=torch.int64, device=t.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].long()
        place = torch.arange(start, start + chunk.numel(), device=t.device)
        sums += ((chunk + 1) * (2 * place + 1) * 0x5851F42D4C957F2D).sum()
    return sums


def _device(group: Group) -> torch.device:
    """Return where a group's small messages have to lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")


# ---------------------------------------------------------------------- wrappers


def bare(model: nn.Module) -> nn.Module:
    """Return the module in a DistributedDataParallel, whose forward would copy rank 0's buffers to all; else `model`."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return bare(inner.module) if isinstance(inner, DistributedDataParallel) else model


def reshard(model: nn.Module) -> None:
    """Make `fully_shard` modules let go of gathered weights, so that the next forward sees what was written to the shards."""
    for module in _fully_sharded(model):
        module.reshard()


def check_model(model: nn.Module) -> None:
    """Refuse what hides its parameters.

    Raises:
        DualpruneError: the first FSDP, which keeps flat parameters, is somewhere in the model.
    """
    flat = _fsdp("FullyShardedDataParallel")
    if flat is not None and any(isinstance(m, flat) for m in model.modules()):
        raise DualpruneError(
            "FullyShardedDataParallel keeps weights in flat pieces that have no layers: use its successor, "
            "torch.distributed.fsdp.fully_shard, then make the optimizer, then attach"
        )


def is_fully_sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` has been at the model, or at a part of it."""
    return any(True for _ in _fully_sharded(model))


def _fully_sharded(model: nn.Module) -> Iterator[Any]:
    kind = _fsdp("FSDPModule")
    return (m for m in model.modules() if kind is not None and isinstance(m, kind))


def _fsdp(name: str) -> Any:
    # nobody has wrapped anything in what was never imported
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)


# ---------------------------------------------------------------------- saving and loading


def per_rank(value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return a number that every rank has its own of: an entry each of a DTensor where weights are, else itself."""
    mesh = next((_mesh(w) for w in weights if hasattr(w, "to_local")), None)
    if mesh is None:
        return value
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(value.reshape(1).to(mesh.device_type), mesh, [Shard(0)] * mesh.ndim, run_check=False)


def own(value: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return this rank's number of what `per_rank` made; the mean of all where the number of ranks has changed."""
    mine = local(value).cpu()
    if mine.ndim == 0 or hasattr(value, "to_local"):
        return mine.reshape(()).clone()
    mesh = next((_mesh(w) for w in weights if hasattr(w, "to_local")), None)
    if mesh is not None and mesh.size() == mine.numel():
        return mine[mesh.mesh.flatten().tolist().index(dist.get_rank())].clone()
    return mine.mean()


def placed(saved: Tensor, t: Tensor, what: str) -> Tensor:
    """Return a saved tensor of t's shape as `t` lies on the ranks: a whole one is cut up.

    Raises:
        DualpruneError: it is cut up otherwise, as by another number of ranks, or another rank saved it.
    """
    if not hasattr(t, "to_local") and not hasattr(saved, "to_local"):
        return saved
    if not hasattr(saved, "to_local"):
        return like(t, saved[Part.of(t).slices])
    there, here = getattr(saved, "placements", ()), getattr(t, "placements", ())
    alike = tuple(here) == tuple(there) and local(saved).shape == local(t).shape
    if not alike or _mesh(saved).get_coordinate() != _mesh(t).get_coordinate():
        raise DualpruneError(
            f"state {what}: it was saved on {_mesh(saved).size()} ranks as {there} or by another rank, here "
            f"it is {here or 'on one rank'}. Save by torch.distributed.checkpoint and read it by "
            "pruner.load_checkpoint(path), which cuts it up anew"
        )
    return saved


def read_checkpoint(path: str | Path, weights: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """Read a pruner's state from a torch.distributed.checkpoint folder, cut up as `weights` are, from any number of ranks.

    Raises:
        DualpruneError: there is no such checkpoint, or no such entry in it.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        there = FileSystemReader(path).read_metadata().state_dict_metadata
    except OSError as error:
        raise DualpruneError(f"no torch.distributed.checkpoint folder {str(path)!r} ({error.strerror or error})") from error
    saved = {k.removeprefix(f"{key}."): v for k, v in there.items() if k.startswith(f"{key}.")}
    if not saved:
        keys = sorted({k.split(".", 1)[0] for k in there})
        raise DualpruneError(f"the checkpoint has no {key!r}{suggest(key, keys)}; it has {', '.join(keys)}")
    state = {}
    for name, entry in saved.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DualpruneError(f"the checkpoint's {key}.{name} is no tensor: save pruner.state_dict() under {key!r}")
        w = weights.get(name.split(".", 1)[-1])
        fits = w is not None and w.shape == entry.size
        dtype = entry.properties.dtype
        state[name] = torch.empty_like(w, dtype=dtype) if fits else torch.empty(entry.size, dtype=dtype)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process need not be told that it is alone
        load({key: state}, checkpoint_id=path)
    return state


def writes(tensors: Iterable[Tensor]) -> bool:
    """Tell whether this rank is the one that writes what the ranks put together; of plain tensors, every one is."""
    meshes = [_mesh(t) for t in tensors if hasattr(t, "to_local")]
    return all(not any(mesh.get_coordinate()) for mesh in meshes)


def whole(t: Tensor) -> Tensor:
    """Return all of a tensor on every rank."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


# ---------------------------------------------------------------------- a job of ranks


class Ranks(NamedTuple):
    """The ranks of a job that runs one recipe: this one's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def shared(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank."""
        everyone: list[Any] = [value]
        if self.size > 1:
            everyone = [None] * self.size
            dist.all_gather_object(everyone, value)
        return everyone

    def mean(self, value: float) -> float:
        """Return the mean over the ranks."""
        return summed([value], None if self.size == 1 else dist.group.WORLD)[0] / self.size

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is up on some rank."""
        return flag if self.size == 1 else bool(summed([flag], dist.group.WORLD)[0])

    def copy_(self, model: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers."""
        for t in model.state_dict().values() if self.size > 1 else ():
            moved = t.detach().contiguous().to(_device(dist.group.WORLD))
            dist.broadcast(moved, src=0)
            t.copy_(moved)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training: gradients are averaged over the ranks."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def share(self, batch: tuple[Any, Any], cut: Callable[[tuple[Any, Any], int, int], Any]) -> tuple[Any, float]:
        """Return this rank's part of a batch, and what the mean loss over it counts in the mean of the ranks' losses.

        Parts are equal where the number of samples divides; then every weight is 1.

        Args:
            batch: its first item has one entry a sample.
            cut: `cut(batch, start, stop)` returns the samples from start up to stop; only the batch's task knows how.

        Raises:
            DualpruneError: there are fewer samples than ranks.
        """
        if self.size == 1:
            return batch, 1.0
        count = len(batch[0])
        if count < self.size:
            raise DualpruneError(f"{self.size} ranks cannot share a batch of {count}: raise training.batch_size, or use fewer")
        start, stop = count * self.rank // self.size, count * (self.rank + 1) // self.size
        return cut(batch, start, stop), (stop - start) * self.size / count

    def turn(self, batches: Iterable[Any] | None) -> Iterator[Any] | None:
        """Return this rank's share of batches: every `size`-th."""
        return None if batches is None else (b for i, b in enumerate(batches) if i % self.size == self.rank)


def launched() -> bool:
    """Tell whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def local_rank() -> int:
    """Return the number of this process on its machine, as torchrun counts."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def job(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started, by NCCL on GPUs and Gloo on CPUs; one process alone joins nobody."""
    if not launched():
        yield Ranks()
        return
    joined = dist.is_initialized()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if not joined:
            dist.destroy_process_group()
