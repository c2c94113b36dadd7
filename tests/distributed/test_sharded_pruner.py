"""The pruner on weights that are cut up over ranks, by fully_shard and by tensor parallelism: equal to one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import counted, run
from torch import Tensor, nn

import dualprune
from dualprune import ADMM, SLR, Block, Channel, DualpruneError, Filter, GradualMagnitude, Magnitude, Reweighted, attach
from dualprune.integrations.common import refuse_shards
from helpers import batch

STEPS, EVERY = 12, 3
GROUPS = {"1.weight": Channel(), "3.weight": Block(2, 4), "5.weight": Filter()}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "slr": (SLR.paper(), {"rate": 5, "budget": "global"}),
    "slr-held": (SLR(rho=0.3), {"rate": 4, "patterns": {"3.weight": "2:4"}}),
    "slr-default": (SLR(), {"rate": 4, "budget": "global"}),
    "admm-groups": (ADMM.paper(), {"sparsity": 0.5, "patterns": GROUPS}),
    "pooled-filters": (ADMM(hold=0.3), {"sparsity": 0.5, "budget": "global", "patterns": {"[135].weight": Filter()}}),
    "gradual": (GradualMagnitude(), {"rate": 5}),
    "oneshot": (Magnitude(), {"rate": 5, "keep_zeros": True}),
}  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 18), nn.ReLU(),
        nn.Linear(18, 14), nn.ReLU(), nn.Linear(14, 10),
    )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, pruner: Any, rank: int = 0, size: int = 1) -> None:
    for step in steps:
        x, y = (t.chunk(size)[rank] for t in batch(step))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()


def started(name: str, split: str = "") -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = net()
    if split:
        shard(model, split)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    method, options = CASES[name]
    return model, optimizer, attach(model, optimizer, method, ignore=(), every=EVERY, total_steps=STEPS, **options)


def shard(model: nn.Module, split: str) -> None:
    """Cut the model up: fully_shard, tensor parallel, or both in a square."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = dist.get_world_size()
    sizes = {"fsdp": {"dp": size}, "tp": {"tp": size}, "both": {"dp": size // 2, "tp": 2}}[split]
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if split in ("tp", "both"):
        plan = {"1": ColwiseParallel(), "3": RowwiseParallel(), "5": ColwiseParallel(), "7": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    if split in ("fsdp", "both"):
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])


def full(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: getattr(v, "full_tensor", lambda v=v: v)().detach().clone() for k, v in values.items()}


def report(model: nn.Module, pruner: Any) -> dict[str, Any]:
    state = {k: v for k, v in pruner.state_dict().items() if k not in ("meta", "loss_sum")}
    return {
        "weights": full(dict(model.named_parameters())), "masks": full(pruner.masks), "layers": pruner.layers,
        "state": full(state), "history": list(pruner.history), "summary": pruner.summary(),
    }  # fmt: skip


def whole_run(model: nn.Module, optimizer: Any, pruner: Any, folder: Path, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Train, look, finish, train on, save: everything a user does, told as plain tensors."""
    train(model, optimizer, range(STEPS - 3), pruner, rank, size)
    middle = report(model, pruner)
    x, _ = batch(99)
    with pruner.evaluate() as cut, torch.no_grad():
        output = cut(x)
    with torch.no_grad():
        outside = model(x)
    after = report(model, pruner)
    assert all(torch.equal(after["weights"][k], v) for k, v in middle["weights"].items())
    train(model, optimizer, range(STEPS - 3, STEPS), pruner, rank, size)
    pruner.finish()
    end = report(model, pruner)
    train(model, optimizer, range(STEPS, STEPS + 2), pruner, rank, size)  # masks are held
    dualprune.save_sparse(model, folder / f"{size}.safetensors")
    with torch.no_grad():
        last = model(x)
    return {"middle": middle, "end": end, "output": output, "outside": outside, "last": last, "held": report(model, pruner)}


def close(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, float) and a == pytest.approx(b, rel=1e-4, abs=1e-6))


def many_runs(rank: int, size: int, split: str, names: list[str], folder: Path) -> dict[str, Any]:
    results = {}
    for name in names:
        share = (rank // 2, size // 2) if split == "both" else (0, 1) if split == "tp" else (rank, size)
        (folder / name).mkdir(exist_ok=True)
        results[name] = whole_run(*started(name, split), folder / name, *share) | {"size": share[1]}
    return results


@pytest.mark.parametrize(("split", "size"), [("fsdp", 2), ("fsdp", 4), ("tp", 2), ("both", 4)])
def test_a_sharded_run_is_that_of_one_process(split, size, tmp_path):
    ranks = run(many_runs, size, tmp_path, split, list(CASES), tmp_path)
    for name in CASES:
        (tmp_path / "one" / name).mkdir(parents=True)
        one = whole_run(*started(name), tmp_path / "one" / name)
        for result in ranks:
            many = result[name]
            for when in ("middle", "end", "held"):
                assert all(torch.equal(many[when]["masks"][k], v) for k, v in one[when]["masks"].items()), (name, when)
                assert many[when]["layers"] == one[when]["layers"] and many[when]["summary"] == one[when]["summary"]
                for part in ("weights", "state"):
                    assert many[when][part].keys() == one[when][part].keys()
                    for k, v in one[when][part].items():
                        torch.testing.assert_close(many[when][part][k], v, rtol=1e-4, atol=1e-6, msg=f"{name} {when} {k}")
                for mine, theirs in zip(many[when]["history"], one[when]["history"], strict=True):
                    assert mine.keys() == theirs.keys()
                    assert all(close(value, theirs[key]) for key, value in mine.items()), (name, mine, theirs)
            for what in ("output", "outside", "last"):
                torch.testing.assert_close(many[what], one[what], rtol=1e-4, atol=1e-5)
            # what must be the same to the bit on all ranks is
            assert many["end"]["history"] == ranks[0][name]["end"]["history"]
            assert all(torch.equal(v, ranks[0][name]["end"]["state"][k]) for k, v in many["end"]["state"].items())
        saved = dualprune.load_sparse(tmp_path / name / f"{ranks[0][name]['size']}.safetensors")
        assert all(torch.equal(saved[k], v) for k, v in ranks[0][name]["held"]["weights"].items())


def traffic(rank: int, size: int) -> dict[str, Any]:
    model, optimizer, pruner = started("slr", "fsdp")
    train(model, optimizer, range(EVERY - 1), pruner, rank, size)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    with counted() as step, torch.no_grad():
        pruner.solver.penalty_(None)
    with counted() as update:
        pruner.update()
    kinds = [type(t).__name__ for tensors in pruner.solver.tensors.values() for t in tensors]
    held = sum(t.to_local().nbytes for tensors in pruner.solver.tensors.values() for t in tensors)
    return {"step": step.calls, "update": update.calls, "kinds": set(kinds), "held": held}


def test_bytes_and_memory_of_an_update(tmp_path):
    weights = sum(p.nbytes for p in net().parameters() if p.ndim > 1)
    results = run(traffic, 4, tmp_path)
    for result in results:
        assert result["step"] == [] and result["kinds"] == {"DTensor"}
        sizes = [n for _, n in result["update"]]
        assert [n for n in sizes if n > 512] == [8 * 2**11, 8 * 2**11, 8 * 2**9]  # the digits of the threshold
        assert sum(n for n in sizes if n <= 512) <= 128  # loss, finite, sums, ties
    assert sum(result["held"] for result in results) == 2 * weights


# ---------------------------------------------------------------------- checkpoints


def save(rank: int, size: int, folder: str, steps: int) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer, pruner = started("slr-held", "fsdp")
    train(model, optimizer, range(steps), pruner, rank, size)
    weights, momenta = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": momenta, "pruner": pruner.state_dict()}, checkpoint_id=folder)
    saved = report(model, pruner) | {"loss": float(pruner._loss_sum)}
    train(model, optimizer, range(steps, STEPS), pruner, rank, size)
    pruner.finish()
    return {"saved": saved, "end": report(model, pruner)}


def resume(rank: int, size: int, folder: str, steps: int, split: str = "fsdp") -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer, pruner = started("slr-held", split)
    weights, momenta = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": momenta}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=momenta)
    pruner.load_checkpoint(folder)
    saved = report(model, pruner) | {"loss": float(pruner._loss_sum)}
    train(model, optimizer, range(steps, STEPS), pruner, rank, size)
    pruner.finish()
    return {"saved": saved, "end": report(model, pruner)}


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(v, b[k]) for k, v in a.items())
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("steps", [4, 11])  # between two updates, and while the masks are held
def test_a_checkpoint_of_two_ranks_is_resumed_on_two_four_and_one(steps, tmp_path):
    folder = str(tmp_path / "checkpoint")
    first = run(save, 2, tmp_path, folder, steps)
    for size in (2, 4):
        for rank, result in enumerate(run(resume, size, tmp_path, folder, steps)):
            saved, before = dict(result["saved"]), dict(first[rank % 2]["saved"])
            if size == 4:  # the mean over ranks is what counts
                assert saved.pop("loss") == pytest.approx(sum(r["saved"]["loss"] for r in first) / 2, rel=1e-6)
                before.pop("loss")
            assert same_bits(saved, before)
            if size == 2:
                assert same_bits(result["end"], first[rank]["end"])
            assert same_bits(result["end"]["masks"], first[0]["end"]["masks"])
    with pytest.warns(UserWarning, match="single process"):  # that torch reads the model alone
        alone = resume(0, 1, folder, steps, "")
    for what in ("weights", "state", "masks", "history"):
        assert same_bits(alone["saved"][what], first[0]["saved"][what])
    assert same_bits(alone["end"]["masks"], first[0]["end"]["masks"])


def test_a_checkpoint_that_is_not_there_is_an_error(tmp_path):
    import torch.distributed.checkpoint as dcp

    _, _, pruner = started("slr")
    with pytest.raises(DualpruneError, match=r"no torch.distributed.checkpoint folder .*nowhere"):
        pruner.load_checkpoint(tmp_path / "nowhere")
    with pytest.warns(UserWarning):
        dcp.save({"pruning": pruner.state_dict()}, checkpoint_id=tmp_path / "other")
    with pytest.raises(DualpruneError, match="the checkpoint has no 'pruner', did you mean 'pruning'"):
        pruner.load_checkpoint(tmp_path / "other")


# ---------------------------------------------------------------------- refused


def mistakes(rank: int, size: int, folder: Path) -> dict[str, str]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    said = {}

    def catch(what: str, call: Any) -> None:
        try:
            call()
            said[what] = ""
        except DualpruneError as error:
            said[what] = str(error)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = attach(model, optimizer, SLR.paper(), rate=5)
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(model, mesh=mesh)
    catch("step", optimizer.step)
    catch("finish", pruner.finish)
    catch("follow", lambda: pruner.follow(torch.optim.SGD(model.parameters(), 0.1)))

    def fresh(**options: Any) -> Any:
        model = net()
        shard(model, "fsdp")
        options = {"method": SLR.paper(), "rate": 5} | options
        return attach(model, torch.optim.SGD(model.parameters(), 0.1), options.pop("method"), **options)

    catch("callback", lambda: refuse_shards(fresh()))
    catch("bits", lambda: fresh(bits=4))
    catch("state_device", lambda: fresh(state_device="meta"))
    catch("reweighted", lambda: fresh(method=Reweighted(), total_steps=100))
    catch("2:4 by rows", lambda: fresh(patterns={"3.weight": "2:4"}))

    state = fresh().state_dict()
    torch.save(state, folder / f"{rank}-of-{size}.pt")
    dist.barrier()
    catch("another rank", lambda: fresh().load_state_dict(torch.load(folder / "0-of-2.pt", weights_only=False)))
    catch("this rank", lambda: fresh().load_state_dict(torch.load(folder / f"{rank}-of-2.pt", weights_only=False)))
    whole = full(state) | {"loss_sum": torch.zeros(())}
    one = fresh()
    one.load_state_dict(whole)  # of one process: cut up here
    said["whole"] = str(same_bits(full(one.state_dict()) | {"loss_sum": 0}, whole | {"loss_sum": 0}))

    plain = net()
    alone = attach(plain, torch.optim.SGD(plain.parameters(), 0.1), SLR.paper(), rate=5)
    catch("to one", lambda: alone.load_state_dict(state))
    catch("fsdp1", lambda: attach(FullyShardedDataParallel(net(), device_id=torch.device("cpu")), None, Magnitude(), rate=2))
    return said


def test_mistakes_say_what_to_do(tmp_path):
    for rank, said in enumerate(run(mistakes, 2, tmp_path, tmp_path)):
        for what in ("step", "finish"):
            assert "1.weight" not in said[what] and "fully_shard has replaced its parameters since attach()" in said[what]
        assert "lacks pruned parameters" in said["follow"]
        assert "use a plain loop with torch.distributed.checkpoint" in said["callback"]
        assert "3.weight, 5.weight is cut up over ranks, and a grid needs all" in said["bits"]
        assert "leave state_device out" in said["state_device"]
        assert "Reweighted needs whole weights" in said["reweighted"]
        assert said["2:4 by rows"] == "" and said["whole"] == "True"
        assert "it was saved on 2 ranks" in said["to one"] and "load_checkpoint" in said["to one"]
        assert said["this rank"] == "" and ("or by another rank" in said["another rank"]) == (rank == 1)
        assert "use its successor, torch.distributed.fsdp.fully_shard" in said["fsdp1"]
