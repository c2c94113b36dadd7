"""`torchrun … -m dualprune run RECIPE`: equal to one process, and a killed rank loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dualprune
from dualprune import DualpruneError
from dualprune.distributed import Ranks
from dualprune.loop import share_of
from helpers import TINY_RECIPE


def start(folder: Path, size: int, *options: str) -> subprocess.Popen[str]:
    (folder / "recipe.toml").write_text(TINY_RECIPE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    command = [sys.executable, *launcher, "-m", "dualprune", "run", "recipe.toml", "--device", "cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def outcome(folder: Path) -> dict[str, Any]:
    place = folder / "runs/tiny/slr-seed0"
    weights = dualprune.load_sparse(place / "pruned.safetensors")
    rows = [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
    return {"weights": weights, "rows": rows, "result": json.loads((place / "result.json").read_text())}


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_killed_one_loses_nothing(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "two", "killed")}
    for folder in folders.values():
        folder.mkdir()
    for name, size in (("one", 1), ("two", 2)):
        process = start(folders[name], size)
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        assert out.count("report: ") == 1  # rank 0 alone speaks

    process = start(folders["killed"], 2)
    assert process.stdout is not None
    for line in process.stdout:  # after the first epoch, one of the two is shot
        if "epoch 1" in line:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    process.communicate(timeout=400)
    assert process.returncode != 0 and not (folders["killed"] / "runs/tiny/slr-seed0/result.json").exists()
    process = start(folders["killed"], 2)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0 and "continuing" in out and "after epoch 1, step 0" in out, out + err

    one, two, killed = (outcome(folder) for folder in folders.values())
    assert killed["rows"] == two["rows"]
    assert all(torch.equal(v, two["weights"][k]) for k, v in killed["weights"].items())
    assert two["result"]["device"].endswith(", 2 ranks")
    for key, value in one["weights"].items():
        assert torch.equal(two["weights"][key] != 0, value != 0)
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(two["rows"], one["rows"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("command", ["demo", "compare recipe.toml", "tune recipe.toml --lr 0.1"])
def test_only_run_takes_several_ranks(command, monkeypatch):
    from dualprune.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2


def test_ranks_share_every_batch():
    x, y = torch.arange(10.0), list(range(10))

    def cut(batch, start, stop):
        return tuple(item[start:stop] for item in batch)

    shares = [Ranks(rank, 4).share((x, y), cut) for rank in range(4)]
    assert torch.cat([part[0] for part, _ in shares]).equal(x)
    assert [label for part, _ in shares for label in part[1]] == y
    # the mean of the weighted means is the mean
    assert sum(float(part[0].mean()) * weight for part, weight in shares) / 4 == pytest.approx(4.5)
    assert Ranks().share((x, y), cut) == ((x, y), 1.0)
    with pytest.raises(DualpruneError, match="4 ranks cannot share a batch of 3"):
        Ranks(0, 4).share((x[:3], y[:3]), cut)


def test_a_run_goes_on_with_another_number_of_ranks():
    saved = [{"loss_sum": float(i), "observed": torch.tensor(2.0 * i), "rng": i} for i in range(4)]
    assert share_of(saved, Ranks(3, 4)) == saved[3]
    assert share_of(saved, Ranks(1, 2)) == {"loss_sum": 1.5, "observed": torch.tensor(3.0), "rng": 1}
    assert share_of([{}], Ranks()) == {"observed": None}
