"""The points task as the training loop uses it, on a tiny tree and on the real frames."""

from pathlib import Path

import numpy as np
import pytest
import torch
from points_helpers import kitti14, world

import dualprune
from dualprune.errors import DataNotFoundError, DualpruneError
from dualprune.recipe import load_recipe, parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.points import Points
from dualprune.tasks.points.boxes import iou_3d

ROOT = Path(__file__).parents[2]

RECIPE = """
name = "tiny"
task = "points"
[model]
name = "pointpillars"
[model.options]
extent = [0.0, -10.24, -3.0, 20.48, 10.24, 1.0]
cell = 0.64
pillar_channels = 16
layers = [1, 1, 1]
filters = [16, 16, 32]
up_filters = [16, 16, 16]
[data]
name = "tiny"
augment = "none"
options = { train = "all", test = "all" }
[training]
epochs = 1
lr = 0.005
batch_size = 2
[prune]
sparsity = 0.5
ignore = ["vfe.*", "dense_head.*"]
[methods.slr]
kind = "slr"
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return world(tmp_path_factory.mktemp("kitti"), frames=4)


def task(tree, *overrides, split="test"):
    return build_task(parse_recipe(RECIPE, [f"data.root={tree}", *overrides]), split)


@pytest.fixture(scope="module")
def fitted(tree):
    """A task and a model that has learned the tiny tree by heart."""
    torch.manual_seed(0)
    one = task(tree)
    model = one.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for epoch in range(40):
        for batch in one.train_batches(batch_size=2, seed=0, epoch=epoch):
            loss = one.loss(model, batch, one.recipe.training)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    dualprune.recalibrate_batch_norm(model, list(one.calibration(4)))
    return one, model, losses


def test_it_learns_the_frames(fitted):
    one, model, losses = fitted
    assert isinstance(one, Points) and losses[-1] < losses[0] / 5
    values = one.measure(model)
    assert tuple(values) == one.metrics and one.metrics[0] == "3D moderate mAP"
    assert values["BEV easy mAP"] > 80 and values["3D moderate mAP"] > 60
    assert all(0 <= value <= 100 for value in values.values())


def test_what_is_found_lies_on_the_labels(fitted):
    one, model, _ = fitted
    for frame, (found, objects) in zip(one.data.test, one.found(model, one.data.test), strict=True):
        assert len(found.boxes) == len(objects) and iou_3d(found.boxes, one.data.boxes(frame)[:, :7]).amax() > 0.5


def test_measuring_leaves_the_model_as_it_was(fitted):
    one, model, _ = fitted
    model.train()
    model.dense_head.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = one.measure(model), one.measure(model)
    assert first == again and model.training and not model.dense_head.training and model.vfe.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pictures(fitted):
    one, model, _ = fitted
    pictures = one.pictures(model)
    assert len(pictures) == 4
    for title, pixels in pictures:
        assert title.startswith("frame 00000") and "4 labelled" in title
        assert pixels.dtype == np.uint8 and pixels.shape == (640, 640, 3)
        for colour in ((60, 220, 100), (255, 140, 0), (150, 150, 150)):  # a label, a car that was found, points
            assert (pixels == colour).all(-1).any()


def test_an_untrained_model_finds_nothing(tree):
    one = task(tree)
    assert set(one.measure(one.model()).values()) == {0.0}


def test_batches_and_splits(tree):
    one = task(tree)
    assert one.steps_per_epoch(2) == 2 and sum(len(x) for x in one.calibration(100)) == 4
    assert [len(x) for x in task(tree).calibration(3)] == [3]
    with pytest.raises(DualpruneError, match="a batch of 5 needs as many training frames, got 4"):
        one.steps_per_epoch(5)
    held = task(tree, "data.validation=0.25", split="validation")
    assert len(held.data.test) == 1 and held.data.test[0] not in held.data.train


def test_what_there_is_and_what_is_passed_over_is_logged(tree, tmp_path, caplog):
    caplog.set_level("INFO", "dualprune")
    task(tree).steps_per_epoch(2)
    [line] = caplog.records
    assert line.levelname == "WARNING" and line.message == (
        "tiny: train: 4 frames, 0 with nothing to find; 8 Car, 4 Pedestrian, 4 Cyclist; passed over: 4 DontCare\n"
        "test: 4 frames, 0 with nothing to find; 8 Car, 4 Pedestrian, 4 Cyclist; passed over: 4 DontCare"
    )
    clean = world(tmp_path, frames=2)
    for file in (clean / "training/label_2").iterdir():
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if "DontCare" not in line))
    task(clean).steps_per_epoch(2)
    assert caplog.records[-1].levelname == "INFO" and caplog.messages[-1].endswith("passed over: nothing")
    task(clean, "data.validation=0.5", split="validation").steps_per_epoch(1)
    assert "train: 1 frames" in caplog.messages[-1]


def test_only_classes_that_are_there_count(tree):
    one = task(tree, 'model.options.classes=["Cyclist"]')
    assert one.measure(one.model())["3D moderate mAP"] == 0
    for label in (tree / "training/label_2").glob("*.txt"):
        assert "Van" not in label.read_text()
    two = task(tree)
    for frame in two.data.test:
        two.data.label(frame).occlusion[:] = 3
    with pytest.raises(DualpruneError, match="none of Car, Pedestrian, Cyclist counts at moderate difficulty"):
        two.measure(two.model())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.options.trane=all", r"\[data\] options: unknown key 'trane', did you mean 'train'"),
        ("data.options.workers=x", r"\[data\] options workers: .* got 'x'"),
        ("data.options.workers=-1", "workers: .* greater than or equal to 0, got -1"),
        ("data.options.sampling=kitti", "sampling: .* got 'kitti'"),
        ("data.options.min_overlap.Carr=0.5", r"min_overlap.*'Car', 'Pedestrian' or 'Cyclist', got 'Carr'"),
        ("data.options.min_overlap.Car=1", "min_overlap.Car: .* less than 1, got 1"),
        ("model.options.cel=1", r"\[model\] options: unknown key 'cel', did you mean 'cell'"),
        ("model.options.layers=3", r"\[model\] options layers: .* got 3"),
        ("model.options.classes=Car", r"\[model\] options classes: .* got 'Car'"),
        ("training.label_smoothing=0.1", "the scores' loss is focal and has no label_smoothing"),
        ("data.augment=shift", "point clouds have true, 'flip' and 'none', got 'shift'"),
        ("model.pretrained=true", "pointpillars has no weights to fetch"),
        ("model.name=pointpillar", "did you mean 'pointpillars'"),
    ],
)
def test_refusals(tree, override, said):
    one = task(tree, override)
    with pytest.raises(DualpruneError, match=said):
        model = one.model()
        one.loss(model, next(one.train_batches(batch_size=2, seed=0, epoch=0)), one.recipe.training)


def test_the_overlap_of_a_class_is_its_own(fitted, tree):
    _, model, _ = fitted
    strict, mild = (task(tree, f"data.options.min_overlap.Car={overlap}") for overlap in (0.99, 0.3))
    key = ("3D", "moderate", "Car")
    assert strict.scores(model)[key].ap40 < mild.scores(model)[key].ap40


def test_without_data_the_model_is_still_built(tmp_path):
    one = task(tmp_path)
    assert one.model() is not None
    with pytest.raises(DataNotFoundError):
        one.steps_per_epoch(2)


# --- recipes -----------------------------------------------------------------------------------------------------------

TABLE7 = sorted((ROOT / "recipes/slr-2024").glob("table7_*.toml"))


def test_every_rate_of_table_7_has_its_recipes():
    rates = ["4.9x", "5.7x", "6.4x", "9.4x"]
    names = {f"table7_pointpillars-kitti-{rate}{small}" for rate in rates for small in ("", "-small")}
    assert {path.stem for path in TABLE7} == names


@pytest.mark.parametrize("path", TABLE7, ids=lambda path: path.stem)
def test_recipes_give_the_papers_rate(path):
    """The paper's rates are those of all parameters named weight, batch norm's too, at 80, 83, 85 and 90 % of the backbone."""
    recipe = load_recipe(path)
    model = build_task(recipe).model(with_weights=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = dualprune.attach(
        model, optimizer, dualprune.Magnitude(), sparsity=recipe.prune.sparsity, ignore=recipe.prune.ignore, total_steps=1
    )
    try:
        removed = sum(layer["total"] for layer in pruner.layers) * recipe.prune.sparsity
        assert len(pruner.layers) == 19  # 16 convolutions and 3 that go up
    finally:
        pruner.detach()
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("weight"))
    assert recipe.name == path.stem and recipe.task == "points"
    assert weights / (weights - removed) == pytest.approx(recipe.paper["rate"], abs=6e-4)


def test_real_frames_run():
    recipe = load_recipe(ROOT / "recipes/slr-2024/fit_pointpillars-kitti.toml", [f"data.root={kitti14()}"])
    one = build_task(recipe)
    model = one.model()
    with one.autocast():
        loss = one.loss(model, next(one.train_batches(batch_size=1, seed=0, epoch=0)), recipe.training)
    loss.backward()
    assert loss.isfinite()
