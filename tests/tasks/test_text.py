"""The text task: windows and splits, a model that cannot see the future, figures worked by hand, a run by recipe."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dualprune.errors import DataNotFoundError, DualpruneError, NonFiniteError
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.text import GPT, load_text
from dualprune.tasks.text.data import in_order, windows
from dualprune.train import run

RECIPE = """
name = "tiny-text"
task = "text"
[model]
name = "gpt"
options = { width = 16, depth = 2, heads = 2, length = 16 }
[data]
name = "file"
root = "%s"
[training]
epochs = 1
lr = 1e-2
batch_size = 16
optimizer = "adamw"
[prune]
sparsity = 0.6
ignore = ["embedding", "position", "head"]
calibrate = 0
[methods.slr]
kind = "slr"
updates_per_epoch = 8
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rhyme.txt"
    path.write_text("the cat sat on the mat; " * 100)
    return path


def task(file, *overrides, split="test"):
    return build_task(parse_recipe(RECIPE % file.as_posix(), overrides), split)


def test_the_last_tenth_is_the_test_and_validation_is_cut_from_training(file):
    data = load_text("file", file)
    assert (len(data.train), len(data.test)) == (2160, 240)
    assert bytes(data.train) + bytes(data.test) == file.read_bytes()
    held = task(file, "data.validation=0.25", split="validation").data
    assert (len(held.train), len(held.test)) == (1620, 540) and bytes(held.test) == bytes(data.train[1620:])


def test_targets_are_one_byte_further_and_a_text_is_measured_without_overlap():
    text = np.frombuffer(b"abcdefghijk", dtype=np.uint8)
    x, y = windows(text, torch.tensor([0, 4]), 3)
    assert x.tolist() == [[97, 98, 99], [101, 102, 103]] and y.tolist() == [[98, 99, 100], [102, 103, 104]]
    parts = [x for x, _ in in_order(text, 3, 2)]
    assert torch.cat(parts).tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, 105]]


def test_batches_are_a_function_of_seed_epoch_and_step(file):
    one, order = task(file), {"batch_size": 16, "seed": 3, "epoch": 1}
    batches = list(one.train_batches(**order))
    assert len(batches) == one.steps_per_epoch(16) == 2160 // 256
    few = task(file, "data.options.windows=40")
    assert len(list(few.train_batches(batch_size=16, seed=0, epoch=0))) == few.steps_per_epoch(16) == 40 // 16
    assert task(file, "data.options.windows=3").steps_per_epoch(16) == 1
    resumed = next(one.train_batches(**order, start_step=5))
    assert torch.equal(batches[5][0], resumed[0]) and torch.equal(batches[5][1], resumed[1])
    assert not torch.equal(batches[0][0], next(one.train_batches(**{**order, "epoch": 2}))[0])


def test_no_byte_sees_the_ones_after_it():
    model = GPT(width=16, depth=2, heads=4, length=12).eval()
    x = torch.randint(256, (2, 12))
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.allclose(before[:, 7:], after[:, 7:])
    with pytest.raises(DualpruneError, match="looks at 12 bytes, got 13"):
        model(torch.zeros(1, 13, dtype=torch.long))


class Sure(torch.nn.Module):
    """Gives a byte's successor in the alphabet a probability of one half, and the others the rest in equal parts."""

    def forward(self, x):
        scores = torch.full((*x.shape, 256), math.log(0.5 / 255))
        return scores.scatter(-1, ((x + 1) % 256)[..., None], math.log(0.5))


def test_figures_worked_by_hand(file):
    file.write_bytes(bytes(range(32, 96)) * 30)
    one = task(file)
    figures = one.measure(Sure())
    windows_of_16 = len(one.data.test) // 16
    wrong = sum(1 for x, y in in_order(one.data.test, 16, 1) for a, b in zip(x[0], y[0], strict=True) if b != a + 1)
    total = 16 * ((len(one.data.test) - 1) // 16)
    assert windows_of_16 and 0 < wrong < total
    bits = (total - wrong + wrong * math.log2(510)) / total
    expected = {"next character": 100 * (1 - wrong / total), "bits per character": bits, "perplexity": 2**bits}
    assert figures == pytest.approx(expected, rel=1e-5)


def test_training_learns_the_rhyme_and_measuring_leaves_the_model_alone(file):
    one = task(file)
    model = one.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = one.measure(model)
    for epoch in range(4):
        for batch in one.train_batches(batch_size=16, seed=0, epoch=epoch):
            one.loss(model, batch, one.recipe.training).backward()
            optimizer.step()
            optimizer.zero_grad()
    last = one.measure(model)
    assert model.training and tuple(last) == one.metrics
    assert last["next character"] > 70 > first["next character"]
    assert last["bits per character"] < 1.5 < first["bits per character"]


def test_a_run_by_recipe(file, tmp_path):
    from dualprune.train import evaluate, run

    recipe = parse_recipe(RECIPE % file.as_posix())
    result = run(recipe, "slr", out=tmp_path / "runs", device="cpu")
    assert result["metric"] == "next character %" and result["total"] == 2 * 12 * 16 * 16
    assert result["rate"] == pytest.approx(2.5, rel=1e-3)
    place = tmp_path / "runs/tiny-text/slr-seed0"
    assert json.loads((place / "result.json").read_text())["metrics"]["cut"]["bits per character"] > 0
    assert evaluate(recipe, place / "pruned.safetensors", device="cpu")["accuracy"] == pytest.approx(result["cut"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.name=gpt2", "name is 'gpt'"),
        ("model.options.heads=3", "heads that divide the width"),
        ("model.options.deep=3", r"\[model\] options: unknown key 'deep', did you mean 'depth'"),
        ("data.name=shakespeare", "no text 'shakespeare', did you mean 'tinyshakespeare'"),
        ("data.options.lower=true", r"\[data\] options: unknown key 'lower'; there are windows"),
        ("data.options.windows=0", "how many an epoch is made of, at least 1; got 0"),
        ("data.root=nowhere.txt", "needs root, the text file; got 'nowhere.txt'"),
        ("model.options.length=9999", "more than 2160 bytes to train on"),
    ],
)
def test_wrong_recipes_say_what_to_do(file, override, said):
    one = task(file, override)
    with pytest.raises(DualpruneError, match=said):
        one.model(), next(one.train_batches(batch_size=2, seed=0, epoch=0))


def test_a_text_that_is_not_there_or_empty(file, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"wikitext2 was not found(.|\n)*wikitext2_test.txt"):
        load_text("wikitext2")
    for name in ("wikitext2_valid.txt", "wikitext2_test.txt"):
        (tmp_path / name).write_text(name)
    data = load_text("wikitext2")
    assert bytes(data.train) == b"wikitext2_valid.txt" and bytes(data.test) == b"wikitext2_test.txt"
    file.write_bytes(b"")
    with pytest.raises(DualpruneError, match="is empty"):
        load_text("file", file)


@pytest.mark.parametrize("name", ("tinyshakespeare", "wikitext2"))
def test_the_real_texts(name):
    if not any((Path(p) / "text").is_dir() for p in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if p):
        pytest.skip("DUALPRUNE_DATA has no texts")
    data = load_text(name)
    assert len(data.train) > 1_000_000 and len(data.test) > 100_000


def test_another_text_is_another_run(file, tmp_path):
    recipe = parse_recipe(RECIPE % file.as_posix())
    first = run(recipe, "slr", out=tmp_path)
    other = tmp_path / "other.txt"
    other.write_text("the dog sat on the mat; " * 100)
    with pytest.raises(DualpruneError, match="holds a run of other data"):
        run(parse_recipe(RECIPE % file.as_posix(), [f"data.root={other.as_posix()}"]), "slr", out=tmp_path)
    assert task(file, split="validation").data_sha256() == first["data_sha256"], "whatever is held out"


def test_a_loss_beyond_any_perplexity_is_said(file):
    one = task(file)
    model = one.model()
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    with pytest.raises(NonFiniteError, match=r"the loss on the text to measure on is .* nats a byte"):
        one.measure(model)
