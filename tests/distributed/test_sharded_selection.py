"""Selection over shards: the masks of one process, bit for bit, and no weight on the wire."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from ranks import counted, run
from torch import Tensor

from dualprune import NM, Block, Channel, Column, DualpruneError, Filter, Kernel, KernelPattern, Unstructured, selection

SHAPES = [(5, 4, 3, 3), (3, 8), (1, 12), (16, 2)]  # over four ranks: uneven, one rank with nothing, three with nothing, even


def values(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    if kind == "ties":  # few magnitudes, both signs, zeros of both signs
        return (torch.randint(-3, 4, shape, generator=generator) * torch.tensor(-0.5)).to(dtype)
    if kind == "wide":  # from subnormals to infinity
        exponents = torch.randint(-45, 39, shape, generator=generator).double()
        return (torch.randn(shape, generator=generator).double() * 10**exponents).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def layouts(size: int, ndim: int):
    """Yield a mesh and placements: by rows, by columns, and both at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    line = init_device_mesh("cpu", (size,))
    yield from ((line, [Shard(d)]) for d in range(min(ndim, 2)))
    if size == 4:
        square = init_device_mesh("cpu", (2, 2))
        yield square, [Shard(0), Shard(1)]
        yield square, [Shard(1), Shard(1)]
        yield square, [Replicate(), Shard(0)]


def masks_of_all_layouts(rank: int, size: int) -> list[str]:
    from torch.distributed.tensor import distribute_tensor

    from dualprune.distributed import keep_largest

    wrong = []
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float16, torch.float64), ("plain", "ties", "wide"))
    for dtype, kind in kinds:
        whole = [values(shape, dtype, kind) for shape in SHAPES]
        total = sum(w.numel() for w in whole)
        for mesh, placements in layouts(size, 2):
            parts = [distribute_tensor(w, mesh, placements) for w in whole]
            for k in (0, 1, 7, total // 10, total // 2, total - 1, total):
                for here, there in ((parts, whole), (parts[:1], whole[:1])):
                    k = min(k, sum(t.numel() for t in there))
                    found = [m.full_tensor() for m in keep_largest(here, k)]
                    if not all(torch.equal(a, b) for a, b in zip(found, selection.keep_largest(there, k), strict=True)):
                        wrong.append(f"{dtype} {kind} {placements} k={k}")
    # some weights are cut up, some are not: one ranking
    mixed = [distribute_tensor(whole[0], mesh, placements), *whole[1:]]
    found = keep_largest(mixed, 50)
    if not all(
        torch.equal(getattr(a, "full_tensor", lambda a=a: a)(), b)
        for a, b in zip(found, selection.keep_largest(whole, 50), strict=True)
    ):
        wrong.append("mixed")
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_masks_are_those_of_one_process_to_the_bit(size, tmp_path):
    assert run(masks_of_all_layouts, size, tmp_path) == [[]] * size


PATTERNS = [
    (Unstructured(), (5, 4, 3, 3)), (NM(2, 4), (6, 8)), (NM(1, 2, axis=0), (8, 3)), (Filter(), (5, 4, 3, 3)),
    (Filter(), (7, 6)), (Channel(), (5, 4, 3, 3)), (Column(), (6, 4, 3, 3)), (Column(), (5, 7)), (Kernel(), (5, 6, 3, 3)),
    (Block(2, 2), (12, 8)), (Block(4, 1), (12, 6)), (Block(3, 5), (9, 10)), (Block(2, 3), (6, 4, 3, 1)),
    (Block(1, 18), (4, 6, 3, 3)),
]  # fmt: skip


def masks_of_all_patterns(rank: int, size: int) -> list[str]:
    from torch.distributed.tensor import distribute_tensor

    from dualprune import sharded

    wrong = []
    for (pattern, shape), kind in itertools.product(PATTERNS, ("plain", "ties")):
        whole = values(shape, torch.float32, kind)
        for mesh, placements in layouts(size, 2):
            w = distribute_tensor(whole, mesh, placements)
            try:
                sharded.check(pattern, w)
            except DualpruneError as error:
                if not isinstance(pattern, NM) or "cuts through them: shard another axis" not in str(error):
                    wrong.append(f"{pattern} {placements}: {error}")
                continue
            said = f"{pattern} {shape} {kind} {placements}"
            for sparsity in (0.0, 0.3, 0.7, 1.0):
                mask, expected = sharded.mask(pattern, w, sparsity), pattern.mask(whole, sparsity)
                cut = distribute_tensor(whole * expected, mesh, placements)
                if mask.placements != w.placements or not torch.equal(mask.full_tensor(), expected):
                    wrong.append(f"{said} at {sparsity}")
                if sharded.contains(pattern, w, sparsity) != pattern.contains(whole, sparsity):
                    wrong.append(f"{said} contains the whole at {sparsity}")
                if not sharded.contains(pattern, cut, sparsity):
                    wrong.append(f"{said} does not contain the cut at {sparsity}")
            if not isinstance(pattern, Unstructured | NM):
                score = pattern.scores(whole)
                torch.testing.assert_close(sharded.energies(pattern, w), score, rtol=1e-14, atol=0)
                keep = score > score.median()
                if not torch.equal(sharded.spread(pattern, keep, w).full_tensor(), pattern.expand(keep, shape).expand(shape)):
                    wrong.append(f"{said} spreads otherwise")
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_patterns_mask_as_in_one_process(size, tmp_path):
    assert run(masks_of_all_patterns, size, tmp_path) == [[]] * size


def refused(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    from dualprune import distributed, sharded

    mesh, errors = init_device_mesh("cpu", (size,)), []

    def catch(call, *arguments):
        try:
            call(*arguments)
            errors.append("")
        except DualpruneError as error:
            errors.append(str(error))

    catch(sharded.check, NM(2, 4), distribute_tensor(torch.ones(4, 12), mesh, [Shard(1)]))
    catch(sharded.check, NM(2, 4), distribute_tensor(torch.ones(4, 16), mesh, [Shard(1)]))
    catch(sharded.check, KernelPattern(), distribute_tensor(torch.ones(4, 4, 3, 3), mesh, [Shard(0)]))
    summands = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]).sum(0)
    assert summands.placements == (Partial(),)
    catch(distributed.span, summands)
    catch(distributed.empty_like, distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]), None, "meta")
    return errors


def test_what_cannot_be_sharded_is_refused_with_a_way_out(tmp_path):
    for cut, whole, kernels, summands, device in run(refused, 2, tmp_path):
        assert "groups of 4 along axis 1" in cut and "shard another axis" in cut
        assert whole == ""
        assert "learns its patterns from all kernels" in kernels and "use kernel or 2:4" in kernels
        assert "expected a tensor that is sharded or replicated" in summands
        assert "leave state_device out" in device


def wire(rank: int, size: int) -> dict[str, list[int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from dualprune.distributed import keep_largest

    mesh, traffic = init_device_mesh("cpu", (size,)), {}
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for numel in (1000, 100_000):
            w = distribute_tensor(torch.randn(numel, 1, dtype=torch.float64).to(dtype), mesh, [Shard(0)])
            with counted() as counter:
                keep_largest([w], numel // 10)
            traffic.setdefault(str(dtype), []).append(counter.bytes)
    return traffic


def test_a_selection_sends_histograms_and_no_weights(tmp_path):
    rounds = {"torch.float32": [11, 11, 9], "torch.bfloat16": [11, 4], "torch.float64": [11] * 5 + [8]}
    for traffic in run(wire, 2, tmp_path):
        for dtype, digits in rounds.items():
            least = sum(8 * 2**d for d in digits) + 8  # and how many ties there are
            for sent in traffic[dtype]:  # of a thousand weights and of a hundred thousand
                if dtype == "torch.bfloat16":  # ties at the threshold, if not all stay, take rounds for their places
                    assert least <= sent <= least + 2 * 8 * 2**11
                else:  # distinct numbers have none
                    assert sent == least
