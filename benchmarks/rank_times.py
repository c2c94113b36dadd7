"""What pruning adds to training on 1 and 2 ranks of this machine: periods with SLR over plain ones, in alternation.

    python benchmarks/rank_times.py --json rank_times.json      # goal: ranks add at most 5 %

A period is `EVERY` optimizer steps and, with SLR attached, one update of multipliers. Both train one model (learning rate 0)
through an optimizer each, on every rank, under DistributedDataParallel and under fully_shard, on Gloo with one thread a rank.
What ranks add is the ratio on 2 ranks over the ratio on 1. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from common import alternate, arguments, ratios, report
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dualprune

RANKS = (1, 2)
EVERY = 25


def period(rank: int, ranks: int, meeting: str, sharded: bool, quick: bool) -> None:
    """Run on a rank: time plain periods and pruned ones in turn, and let rank 0 write the ratio."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    side, batch, every = (64, 16, 3) if quick else (1024, 256, EVERY)
    net: nn.Module = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(side, side), nn.GELU())))
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
    elif ranks > 1:
        net = DistributedDataParallel(net)
    plain, pruned = (torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9) for _ in range(2))
    method = dualprune.SLR(rho=0.1, ramp=0.0, hold=0.0)
    pruner = dualprune.attach(net, pruned, method, rate=10, budget="global", ignore=(), every=every)
    x = torch.randn(batch, side)

    def steps(optimizer: torch.optim.Optimizer, *, observed: bool) -> None:
        for _ in range(every):
            loss = net(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if observed:
                pruner.observe(loss)
            optimizer.step()
        dist.barrier()

    things = {"plain": lambda: steps(plain, observed=False), "pruned": lambda: steps(pruned, observed=True)}
    seconds = alternate(things, 2 if quick else 7)
    if rank == 0:
        figures = ratios(seconds, "plain")["pruned"] | {
            "plain_step_seconds": sorted(seconds["plain"])[len(seconds["plain"]) // 2] / every
        }
        torch.save(figures, f"{meeting}.times")
    dist.destroy_process_group()


def measured(ranks: int, *, sharded: bool, quick: bool) -> dict[str, float]:
    """Return pruned over plain: median, least, most."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(period, (ranks, meeting, sharded, quick), ranks)
        return torch.load(f"{meeting}.times")


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    rows = []
    for way, sharded in (("DDP", False), ("fully_shard", True)):
        alone, *others = (measured(ranks, sharded=sharded, quick=args.quick) for ranks in RANKS)
        for ranks, figures in zip(RANKS, (alone, *others), strict=True):
            added = figures["median"] / alone["median"] - 1
            rows.append({"ranks": ranks, "way": way, "added_by_ranks": added, **figures})
            spread = f"{figures['median']:.3f} ({figures['min']:.3f} to {figures['max']:.3f})"
            print(f"{way:<12}{ranks} ranks: {spread}, added {added:+.1%}")
    report(args, "rank_times", {"every": EVERY, "rows": rows})


if __name__ == "__main__":
    main()
