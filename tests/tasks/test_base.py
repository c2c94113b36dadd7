"""What every task has in common: how a batch is cut up among devices, and what its data are."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from lanes_helpers import RECIPE as LANES
from lanes_helpers import toy
from points_helpers import world
from test_detection_task import RECIPE as DETECTION
from test_detection_task import write_set
from test_points_task import RECIPE as POINTS
from test_text import RECIPE as TEXT

from dualprune import DualpruneError
from dualprune.distributed import Ranks
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.detection.data import train_batches
from helpers import TINY_RECIPE


def recipe(kind, folder, *overrides):
    """A tiny recipe of this task, whose data are written into `folder`."""
    if kind == "classification":
        return parse_recipe(TINY_RECIPE, overrides)
    if kind == "lanes":
        return parse_recipe(LANES % toy(folder, count=6), ["model.options.aux=true", "data.options.repeat=1", *overrides])
    if kind == "points":
        return parse_recipe(POINTS, [f"data.root={world(folder, frames=6)}", *overrides])
    if kind == "text":
        (folder / "rhyme.txt").write_text("the cat sat on the mat; " * 100)
        return parse_recipe(TEXT % (folder / "rhyme.txt").as_posix(), overrides)
    for seed, split in enumerate(("train", "val")):
        write_set(folder, split, seed=seed)
    return parse_recipe(DETECTION.format(root=folder), overrides)


def task(kind, folder, *overrides):
    return build_task(recipe(kind, folder, *overrides))


@pytest.mark.parametrize("kind", ["classification", "lanes", "points", "text"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mean_over_shares_is_the_mean_over_the_batch(kind, ranks, tmp_path):
    one = task(kind, tmp_path)
    batch = next(one.train_batches(batch_size=6, seed=0, epoch=0))
    shares = [Ranks(rank, ranks).share(batch, one.share) for rank in range(ranks)]
    assert sum(len(share[0]) for share, _ in shares) == 6 == len(batch[0])
    model = one.model()
    model(batch[0])  # batch norm has seen something
    model.eval()
    whole = one.loss(model, batch, one.recipe.training)
    mean = sum(one.loss(model, share, one.recipe.training) * weight for share, weight in shares) / ranks
    torch.testing.assert_close(mean, whole)


@pytest.mark.parametrize("boxes", [1, 2])  # as many boxes as images, and not
def test_boxes_go_with_their_images(boxes, tmp_path):
    one = task("detection", tmp_path, "data.augment=none")
    for file in (tmp_path / "labels/train").iterdir() if boxes == 2 else ():
        file.write_text(file.read_text() + "1 0.5 0.5 0.3 0.2\n")
    batch = next(one.train_batches(batch_size=6, seed=0, epoch=0))
    found = [one.share(batch, start, stop) for start, stop in ((0, 2), (2, 3), (3, 6))]
    # the same images by themselves, read anew
    order = [next(i for i in range(8) if torch.equal(x, one.train.pixels[0][i].float() / 255)) for x in batch[0]]
    for (x, targets), part in zip(found, (order[:2], order[2:3], order[3:]), strict=True):
        [(y, t)] = train_batches(one.train.subset(part, "part"), batch_size=len(part), seed=0, epoch=0)
        places = [next(i for i, other in enumerate(y) if torch.equal(image, other)) for image in x]
        assert len(targets) == boxes * len(part)
        for here, there in enumerate(places):
            assert torch.equal(targets[targets[:, 0] == here, 1:], t[t[:, 0] == there, 1:])
    whole = one.share(batch, 0, 6)
    assert torch.equal(whole[1], batch[1]) and batch[1][:, 0].max() == 5  # the batch itself is left as it was


def test_images_without_boxes_are_shared(tmp_path):
    one = task("detection", tmp_path)
    x, targets = torch.rand(4, 3, 64, 64), torch.tensor([[3.0, 1, 0.5, 0.5, 0.2, 0.2]])
    for start, stop, count in ((0, 2, 0), (2, 4, 1)):
        share = one.share((x, targets), start, stop)
        assert len(share[1]) == count and one.loss(one.model(), share, one.recipe.training).isfinite()
    assert one.share((x, targets), 2, 4)[1].tolist() == [[1, 1, *targets[0, 2:].tolist()]]


@pytest.mark.parametrize(
    ("targets", "held"), [({}, "a dict,"), (torch.zeros(6, 2), "a Tensor of 6 entries"), ((torch.zeros(4), [1]), "a list of 1")]
)
def test_what_is_not_one_entry_a_sample_is_refused(targets, held, tmp_path):
    with pytest.raises(DualpruneError, match=f"share a batch of 4 samples, but it holds {held}"):
        task("classification", tmp_path).share((torch.zeros(4, 1), targets), 0, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batch"), [("detection", 7), ("lanes", 6), ("points", 6), ("text", 128)])
def test_torchrun_trains_every_task(kind, batch, tmp_path):
    label = "oneshot" if kind == "detection" else "slr"
    one_batch = ["training.epochs=4", f"training.batch_size={batch}"]  # an epoch
    ours = recipe(kind, tmp_path, *one_batch, f"methods.{label}.kind=slr")
    (tmp_path / "recipe.toml").write_text(ours.to_toml())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dualprune"]
    done = subprocess.run(
        [sys.executable, *launcher, "run", "recipe.toml", "--method", label, "--device", "cpu"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [place] = (tmp_path / "runs").glob("*/*-seed0")
    assert json.loads((place / "result.json").read_text())["device"].endswith(", 2 ranks")
    one = build_task(ours)
    model, first = one.model().train(), next(one.train_batches(batch_size=batch, seed=0, epoch=0))
    shares = [Ranks(rank, 2).share(first, one.share) for rank in range(2)]
    expected = sum(one.loss(model, share, ours.training).item() * weight for share, weight in shares) / 2
    row = json.loads((place / "epochs.jsonl").read_text().splitlines()[0])
    assert (row["step"], row["loss"]) == (1, pytest.approx(expected, rel=1e-5))


LABELS = {"detection": "labels/val/*.txt", "lanes": "*.json", "points": "training/label_2/*.txt", "text": "*.txt"}


@pytest.mark.parametrize("kind", LABELS)
def test_data_are_known_by_what_they_hold(kind, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    one, other = recipe(kind, here, "data.validation=0.4"), recipe(kind, there)
    first = build_task(one).data_sha256()
    assert build_task(one, split="validation").data_sha256() == first  # whatever is held out
    assert build_task(other).data_sha256() == first  # and wherever they lie
    file = sorted(there.glob(LABELS[kind]))[0]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) or file.read_text()[:-100])
    assert build_task(other).data_sha256() != first
