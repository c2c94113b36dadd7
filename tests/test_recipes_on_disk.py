"""Every recipe of the repository loads, can be dry-run, and prunes the whole network by the rate of its paper or its name."""

import os
import re
from pathlib import Path

import pytest
import torch

from dualprune.recipe import load_recipe
from dualprune.scope import build_problem
from dualprune.tasks import build_task
from dualprune.tasks.classification.models import build_model
from dualprune.train import dry_run

ROOT = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.toml"))
FOLDERS = [folder for folder in [os.environ.get("DUALPRUNE_WEIGHTS")] if folder]
LARGE = 8_000_000  # weights; above, a network is only built without memory
SIZES = {
    "digits": {"num_classes": 10, "in_channels": 1, "image_size": 8},
    "mnist": {"num_classes": 10, "in_channels": 1, "image_size": 28},
    "fashion-mnist": {"num_classes": 10, "in_channels": 1, "image_size": 28},
    "cifar10": {"num_classes": 10, "in_channels": 3, "image_size": 32},
    "imagefolder": {"num_classes": 1000},
    "tinyimagenet": {"num_classes": 1000},
}


@pytest.fixture(autouse=True)
def bare(tmp_path, monkeypatch):
    """No data and no weights of this machine have a say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALPRUNE_DATA", raising=False)


def read(file):
    recipe = load_recipe(ROOT / file)
    if recipe.model.name.startswith("timm") or recipe.model.name in ("mobilenetv2", "efficientnet-lite0"):
        pytest.importorskip("timm")
    if recipe.task == "detection":
        pytest.importorskip("pycocotools")
    if recipe.model.name.endswith(".cfg") and not any((Path(top) / recipe.model.name).is_file() for top in FOLDERS):
        pytest.skip(f"no {recipe.model.name} in DUALPRUNE_WEIGHTS")
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})


def network(recipe):
    """The recipe's network with its data's classes and sizes, without memory for its weights."""
    with torch.device("meta"):
        if recipe.task == "classification":
            model = build_model(recipe.model.name, **{**SIZES[recipe.data.name], **recipe.model.options})
        else:
            model = build_task(recipe, device=torch.device("meta")).model(with_weights=False)
    return model


def weights(model):
    """What ships: heads that help in training only are not counted."""
    return {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("aux_")}


def whole_rate(recipe):
    """Compression over all weights of two or more dimensions, from counts alone."""
    prune = recipe.prune
    model = network(recipe).to_empty(device="cpu")  # never touched, so no memory is taken
    asked = {"rate": prune.rate, "sparsity": prune.sparsity, "patterns": recipe.patterns(), "ignore": prune.ignore}
    problem = build_problem(model, **asked, budget=prune.budget)
    everything = weights(model)
    removed = sum(t.sparsity * t.weight.numel() for t in problem.targets)
    assert {t.name for t in problem.targets} <= set(everything)
    return sum(everything.values()) / (sum(everything.values()) - removed)


def wanted_rate(file, recipe):
    named = re.search(r"-([\d.]+)x(-small)?\.toml$", file) if file.startswith("pretrained/") else None
    return float(named[1]) if named else recipe.paper.get("rate")


def test_there_are_recipes_for_the_tables_and_a_small_twin_of_each():
    tables = {file for file in FILES if re.match(r"slr-2024/table[134]_", file)}
    assert len(tables) == 2 * 14
    for file in tables:
        assert file.endswith("-small.toml") or file.replace(".toml", "-small.toml") in tables


@pytest.mark.parametrize("file", FILES)
def test_it_loads_and_is_named_after_its_file(file):
    recipe = load_recipe(ROOT / file)
    assert recipe.name == Path(file).name.removesuffix(".toml")
    assert recipe.description


@pytest.mark.parametrize("file", FILES)
def test_the_rate_over_the_whole_network_is_the_one_promised(file):
    recipe = read(file)
    rate = wanted_rate(file, recipe)
    if rate is None:
        pytest.skip("promises no rate")
    assert whole_rate(recipe) == pytest.approx(rate, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_dry_run(file):
    recipe = read(file)
    if sum(weights(network(recipe)).values()) > LARGE:
        pytest.skip("too large to build here")
    # the methods share the budget, so one says enough
    head, *rows = dry_run(recipe, next(iter(recipe.methods))).splitlines()
    assert head.split()[:2] == ["parameter", "pattern"] and len(rows) > 1


# epochs, lr, batch, optimizer, M, r, s0, ADMM and SLR right after the cut: tables 1, 3 and 4 and the text beside them
PAPER = {
    "table1_resnet18-cifar10": (40, 1e-2, 128, "adam", 300, 0.1, 0.01, 72.84, 89.93),
    "table1_resnet50-cifar10": (50, 1e-2, 128, "adam", 300, 0.1, 0.01, 78.63, 88.91),
    "table1_vgg16-cifar10": (110, 1e-2, 128, "adam", 300, 0.1, 0.01, 69.05, 87.31),
    "table1_resnet110-cifar10": (30, 1e-2, 128, "adam", 300, 0.1, 0.01, 89.71, 92.31),
    "table1_resnet18-imagenet": (40, 1e-4, 256, "sgd", 300, 0.1, 0.01, 58.9, 60.9),
    "table1_resnet50-imagenet": (30, 1e-4, 256, "sgd", 300, 0.1, 0.01, 64.8, 65.9),
    "table1_mobilenetv2-imagenet": (60, 1e-4, 256, "sgd", 300, 0.1, 0.01, 61.8, 63.2),
    "table3_mixer-imagenet-1.96x": (100, 1e-2, 128, "sgd", 300, 0.1, 0.01, 75.332, 75.392),
    "table3_mixer-imagenet-3.16x": (100, 1e-2, 128, "sgd", 300, 0.1, 0.01, 71.798, 72.578),
    "table3_mixer-imagenet-8.28x": (100, 1e-2, 128, "sgd", 300, 0.1, 0.01, 47.592, 54.834),
    "table4_swin-imagenet-1.95x": (100, 1e-2, 128, "sgd", 150, 0.1, 0.05, 78.910, 79.018),
    "table4_swin-imagenet-3.13x": (100, 1e-2, 128, "sgd", 300, 0.1, 0.01, 73.074, 74.322),
    "table4_swin-imagenet-4.50x": (100, 1e-2, 128, "sgd", 150, 0.05, 0.005, 63.892, 67.398),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    recipe = load_recipe(ROOT / "slr-2024" / f"{name}.toml")
    slr, training = recipe.method("slr-paper").build(), recipe.training
    found = (training.epochs, training.lr, training.batch_size, training.optimizer, slr.M, slr.r, slr.s0)
    assert (*found, recipe.paper["admm-published"], recipe.paper["slr-paper"]) == PAPER[name]
    assert (slr.rho, recipe.method("admm-published").build().rho) == (0.1, 0.1)
    assert not any(recipe.method(label).lr or recipe.method(label).epochs for label in recipe.methods)


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("-small.toml")])
def test_a_twin_on_another_network_or_other_data_says_that_it_is_scaled_down(file):
    small, full = load_recipe(ROOT / file), ROOT / file.replace("-small.toml", ".toml")
    if small.paper and full.is_file():
        whole = load_recipe(full)
        assert small.paper.get("scaled_down") or (small.model, small.data) == (whole.model, whole.data)
