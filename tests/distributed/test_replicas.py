"""The pruner under DistributedDataParallel: replicas stay the same to the bit, and all they exchange is the loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import counted, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dualprune
from dualprune import SLR, DualpruneError, GradualMagnitude, attach, distributed, recalibrate_batch_norm
from helpers import batch, tiny_net

STEPS, EVERY = 12, 4
OPTIONS: dict[str, Any] = {"rate": 5, "every": EVERY, "total_steps": STEPS}


def plain_net() -> nn.Sequential:
    """No batch norm, no dropout: shares of a batch average to the whole batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, pruner: Any, rank: int = 0, size: int = 1) -> None:
    for step in steps:
        torch.manual_seed(step)
        x, y = (t.chunk(size)[rank] for t in batch(step))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()


def started(wrap: str, net: Any = plain_net, method: Any = None, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    wrapped = model
    if wrap == "before":
        pruner = attach(model, optimizer, method or SLR.paper(), **OPTIONS | options)
    for _ in range({"twice": 2, "": 0}.get(wrap, 1)):
        wrapped = DistributedDataParallel(wrapped)
    if wrap == "compiled":
        wrapped = torch.compile(wrapped, backend="eager")
    if wrap != "before":
        pruner = attach(wrapped, optimizer, method or SLR.paper(), **OPTIONS | options)
    return wrapped, optimizer, pruner


def result(model: nn.Module, pruner: Any) -> dict[str, Any]:
    weights = [p.detach().clone() for p in model.parameters()]
    state = {k: v for k, v in pruner.state_dict().items() if k != "loss_sum"}
    return {"weights": weights, "state": state, "masks": pruner.masks, "history": list(pruner.history)}


def runs(rank: int, size: int) -> dict[str, Any]:
    results = {}
    for wrap in ("before", "after", "twice", "compiled"):
        model, optimizer, pruner = started(wrap, check_replicas=True)
        train(model, optimizer, range(STEPS), pruner, rank, size)
        results[wrap] = result(model, pruner)
    model, optimizer, pruner = started("after", method=GradualMagnitude())
    train(model, optimizer, range(STEPS), pruner, rank, size)
    results["gradual"] = result(model, pruner)
    return results


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("size", [2, 4])
def test_replicas_are_the_same_to_the_bit_and_equal_to_one_process(size, tmp_path):
    first, *others = run(runs, size, tmp_path)
    assert all(same_bits(first, other) for other in others)
    assert all(same_bits(first["before"], first[wrap]) for wrap in ("after", "twice", "compiled"))
    for name, method in {"after": None, "gradual": GradualMagnitude()}.items():
        model, optimizer, pruner = started("", method=method)
        train(model, optimizer, range(STEPS), pruner)
        one = result(model, pruner)
        assert same_bits(first[name]["masks"], one["masks"])
        for mine, theirs in zip(first[name]["weights"], one["weights"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        for mine, theirs in zip(first[name]["history"], one["history"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # of all ranks, not of one
            assert mine.get("condition_w") == theirs.get("condition_w")


def traffic(rank: int, size: int) -> list[Any]:
    counts = []
    for options in ({}, {"check_replicas": True}, {"process_group": False}):
        _, _, pruner = started("after", **options)
        pruner.observe(torch.tensor(1.0 + rank))
        pruner._before_step(pruner.optimizer, (), {})
        with counted() as wire:
            row = pruner.update()
        counts.append((wire.calls, row["loss"]))
    return counts


def test_an_update_is_one_small_all_reduce(tmp_path):
    for rank, (plain, checked, alone) in enumerate(run(traffic, 2, tmp_path)):
        (call,) = plain[0]
        assert "allreduce" in call[0] and call[1] == 16 and plain[1] == 1.5
        assert sum(n for name, n in checked[0] if "allgather" not in name) == 16
        assert alone == ([], 1.0 + rank)


def diverged(rank: int, size: int) -> list[str]:
    said = []
    for what in ("6.weight", "lam of 3.weight"):
        model, optimizer, pruner = started("after", net=tiny_net, check_replicas=True)
        train(model, optimizer, range(EVERY), pruner, rank, size)
        tensors = {t.name: t.weight for t in pruner.problem.targets} | {"lam of 3.weight": pruner.solver.tensors["lam"][0]}
        with torch.no_grad():
            value = tensors[what].view(-1)[7]
            value.add_(rank * max(abs(float(value)), 1e-3) * 2**-20)
        try:
            pruner.update()
            said.append("")
        except DualpruneError as error:
            said.append(str(error))
    return said


def test_a_replica_that_has_gone_its_own_way_is_named(tmp_path):
    for weight, multiplier in run(diverged, 2, tmp_path):
        assert "6.weight is not the same on all ranks: rank 1 differs from rank 0" in weight
        assert "lam of 3.weight is not the same on all ranks: rank 1 differs from rank 0" in multiplier


def not_finite(rank: int, size: int) -> str:
    _, _, pruner = started("after", net=tiny_net, check_replicas=True)
    if rank:
        pruner.problem.weights[0].data.view(-1)[3] = torch.nan
    with pytest.raises(DualpruneError) as caught:
        pruner.update()
    return str(caught.value)


def test_a_nan_on_one_rank_stops_all(tmp_path):
    for said in run(not_finite, 2, tmp_path):
        assert "3.weight is not the same on all ranks: rank 1 differs from rank 0" in said


def batches(rank: int, size: int) -> list[torch.Tensor]:
    """Seven batches, shared unevenly: four ranks have two, two, two and one."""
    return [batch(100 + i)[0] for i in range(7) if i % size == rank]


def calibrated(rank: int, size: int) -> dict[str, Any]:
    model, _, pruner = started("after", net=tiny_net)
    before = [b.clone() for b in model.buffers()]
    with pruner.evaluate(calibrate=batches(rank, size)) as cut, torch.no_grad():
        inside = [b.clone() for b in model.buffers()]
        output = cut.eval()(batch(0)[0])
    restored = same_bits(before, [b.clone() for b in model.buffers()])
    with pytest.raises(DualpruneError, match="got no batches"):
        pruner.finish(calibrate=[])
    pruner.finish(calibrate=batches(rank, size) if rank else [])
    return {"inside": inside, "output": output, "restored": restored, "finish": list(model.buffers())}


def test_batch_norm_is_estimated_from_the_batches_of_all_ranks(tmp_path):
    for size in (2, 4):
        first, *others = run(calibrated, size, tmp_path)
        assert first["restored"] and all(same_bits(first, other) for other in others)
        model, _, pruner = started("", net=tiny_net)
        with pruner.evaluate(calibrate=batches(0, 1)):
            for mine, theirs in zip(first["inside"], model.buffers(), strict=True):
                torch.testing.assert_close(mine, theirs)
        pruner.finish()
        recalibrate_batch_norm(model, [b for rank in range(1, size) for b in batches(rank, size)])
        for mine, theirs in zip(first["finish"], model.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs)


def synchronised(rank: int, size: int) -> dict[str, Any]:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny_net())
    seen = recalibrate_batch_norm(model, batches(rank, size), torch.distributed.group.WORLD)
    return {"seen": seen, "buffers": list(model.buffers()), "forwards": sum("forward" in vars(m) for m in model.modules())}


def test_synchronised_batch_norm_does_not_wait_for_ranks_with_fewer_batches(tmp_path):
    first, *others = run(synchronised, 2, tmp_path)  # four batches and three
    assert all(same_bits(first, other) for other in others) and (first["seen"], first["forwards"]) == (7, 0)
    model = tiny_net()
    recalibrate_batch_norm(model, batches(0, 1))
    for mine, theirs in zip(first["buffers"], model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
def test_tensors_on_two_devices_are_compared(tmp_path):
    """Weights on a GPU, Z and Λ beside the CPU (`state_device`), and a group that takes tensors of the GPU only."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        world = torch.distributed.group.WORLD
        distributed.check_replicas({"weight": torch.ones(3, device="cuda"), "lam of weight": torch.ones(3)}, world)
        summed = distributed._all_reduce(torch.ones(2), (world,))
        assert summed.device.type == "cpu" and summed.tolist() == [1.0, 1.0]
    finally:
        torch.distributed.destroy_process_group()


def test_without_a_process_group_nothing_is_exchanged(net, optimizer):
    pruner = dualprune.attach(net, optimizer, SLR.paper(), rate=5, check_replicas=True)
    pruner.observe(2.0)
    assert pruner.update()["loss"] == 2.0


def test_a_state_on_meta_asks_to_be_materialised():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    with pytest.raises(DualpruneError, match=r"not materialised .*to_empty"):
        attach(model, torch.optim.SGD(model.parameters(), 0.1), SLR.paper(), rate=2, ignore=())


def test_one_file_of_the_library_knows_torch_distributed():
    source = Path(dualprune.__file__).parent
    uses = re.compile(r"(import|from) torch\.distributed")
    users = {p.name for p in source.glob("**/*.py") if uses.search(p.read_text(encoding="utf-8"))}
    assert users == {"distributed.py"}
