import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lanes_helpers import RECIPE, label, line, real_frames, toy, write

from dualprune.errors import DualpruneError
from dualprune.recipe import load_recipe, parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.lanes.loss import LaneLoss

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "slr-2024"
RATES = ("1.82", "2.54", "4.21", "12.10", "16.85", "22.80", "35.25", "77.67")


@pytest.fixture
def folder(tmp_path):
    return toy(tmp_path)


def task(folder, *overrides, split="test"):
    return build_task(parse_recipe(RECIPE % folder, overrides), split)


class Oracle(torch.nn.Module):
    """Sure of the targets it is given, whatever it sees."""

    def __init__(self, cells, classes):
        super().__init__()
        self.scores = 1000.0 * torch.nn.functional.one_hot(cells, classes).permute(0, 3, 1, 2)

    def forward(self, x):
        return self.scores[: len(x)]


def oracle(one):
    [(_, (cells, _))] = one._batches(one._test, [[(i, None) for i in range(len(one.data.test))]])
    return Oracle(cells, one.grid.cells + 1)


def test_training_lowers_the_loss_and_measuring_leaves_the_model_alone(folder):
    one = task(folder)
    model = one.model().train()
    model.pool.eval()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for epoch in range(2):
        for batch in one.train_batches(batch_size=4, seed=0, epoch=epoch):
            losses.append(one.loss(model, batch, one.recipe.training))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(losses) == 2 * one.steps_per_epoch(4) == 6 and losses[-1] < 0.9 * losses[0]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    scores = one.measure(model)
    assert tuple(scores) == one.metrics and all(0 <= value <= 100 for value in scores.values())
    assert model.training and not model.pool.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_sure_and_right_model_scores_full_marks(folder):
    one = task(folder, "model.options.cells=100")
    assert one.measure(oracle(one)) == {"accuracy": 100, "false_positive_rate": 0, "false_negative_rate": 0}


def test_empty_lanes_are_credited_only_where_asked_for(folder):
    one, as_published = task(folder), task(folder, "data.options.empty_lanes=true")
    nothing = Oracle(torch.full((1, 56, 4), 20), 21)
    assert one.measure(nothing) == {"accuracy": 0, "false_positive_rate": 0, "false_negative_rate": 100}
    absent = np.mean([x < 0 for bottom in (28, 97) for x in line(bottom)])
    assert as_published.measure(nothing)["accuracy"] == pytest.approx(100 * absent)
    assert as_published.measure(nothing)["false_positive_rate"] == 100


def test_labels_on_other_rows_are_measured_on_those(folder):
    rows = list(range(20, 72, 4))
    lanes = [[line(b)[y - 16] for y in rows] for b in (28, 97)]
    write(folder, "test_label.json", [label("clips/t/20.jpg", lanes, rows)])
    one = task(folder, "model.options.cells=100")
    assert one.measure(oracle(one))["accuracy"] > 95
    assert one.predict(oracle(one), range(1))[0].shape == (2, 13)


@pytest.mark.parametrize("empty_lanes", [False, True])
def test_lanes_count_by_their_points_on_the_labels_rows(folder, empty_lanes):
    """Two points of the network's rows may be one or none of the label's."""
    rows = list(range(17, 72, 9))
    write(folder, "test_label.json", [label("clips/t/20.jpg", [[30] * len(rows)], rows)])
    one = task(folder, f"data.options.empty_lanes={str(empty_lanes).lower()}")
    cells = torch.full((1, 56, 4), 20)
    cells[0, [2, 3], 0] = 5  # heights 18 and 19, between 17 and 26
    cells[0, [9, 10], 1] = 5  # 25 and 26
    cells[0, 1:12, 2] = 5  # 17 to 27
    [found] = one.predict(Oracle(cells, 21), range(1))
    assert (found >= 0).sum(1).tolist() == ([0, 1, 2, 0] if empty_lanes else [2])


def test_augmented_and_plain_batches(folder):
    moved, plain = task(folder, "data.augment=true"), task(folder)
    order = {"batch_size": 4, "seed": 1, "epoch": 0}
    again = list(moved.train_batches(**order))
    for (x, (cells, _)), (u, (v, _)) in zip(again, moved.train_batches(**order), strict=True):
        assert torch.equal(x, u) and torch.equal(cells, v)
    assert not torch.equal(again[0][0], next(plain.train_batches(**order))[0])
    resumed = next(moved.train_batches(**order, start_step=2))
    assert torch.equal(resumed[0], again[2][0])


def test_the_auxiliary_head_is_trained_and_not_measured(folder):
    one = task(folder, "model.options.aux=true")
    model = one.model().train()
    batch = next(one.train_batches(batch_size=4, seed=0, epoch=0))
    one.loss(model, batch, one.recipe.training).backward()
    assert model.aux_combine[0].conv.weight.grad.abs().sum() > 0
    assert one.measure(model).keys() == set(one.metrics)


def test_calibration_gives_plain_training_images(folder):
    one = task(folder, "training.batch_size=3", "data.augment=true")
    found = list(one.calibration(100))
    assert [len(x) for x in found] == [2, 2] and all(
        torch.equal(a, b) for a, b in zip(found, one.calibration(100), strict=True)
    )
    assert sum(len(x) for x in one.calibration(2)) == 2


def test_pictures_show_both_lanes(folder):
    one = task(folder)
    nothing = Oracle(torch.full((1, 56, 4), 20), 21)
    [(title, bare)], [(_, drawn)] = one.pictures(nothing), one.pictures(oracle(one))
    assert title == "clips/t/20.jpg: accuracy 0.0 %" and bare.shape == (36, 64, 3) and bare.dtype == np.uint8

    def coloured(image, channel):
        rest = [c for c in range(3) if c != channel]
        return int((image[..., channel].astype(int) - image[..., rest].max(-1) > 60).sum())

    assert coloured(bare, 1) > 20 and not coloured(bare, 0)
    assert coloured(drawn, 0) > 20


def test_validation_holds_training_frames_out(folder):
    one = task(folder, "data.validation=0.25", split="validation")
    assert len(one.data.train) == 3 and len(one.data.test) == 1
    assert one.data.test[0].name not in {frame.name for frame in one.data.train}


def test_lanes_that_are_not_trained_on_are_counted_and_said(folder, caplog):
    assert task(folder).data.notes() == "1 lanes too short or beyond the network's, not trained on"
    assert "not trained on" in caplog.text


def test_weights_of_the_authors_kind(folder, tmp_path):
    full = task(folder, "model.options.aux=true")
    state = {f"module.{key}": value for key, value in full.model().state_dict().items()}
    torch.save({"model": state}, tmp_path / "ufld.pth")
    path = f"model.weights={tmp_path / 'ufld.pth'}"
    plain = task(folder, path, "seed=7")
    loaded, fresh = plain.model(), plain.model(with_weights=False)
    assert torch.equal(loaded.cls[0].weight, state["module.cls.0.weight"])
    assert not torch.equal(fresh.cls[0].weight, loaded.cls[0].weight)
    task(folder, path, "model.options.aux=true").model()
    del state["module.pool.weight"]
    torch.save(state, tmp_path / "ufld.pth")
    for aux in ("true", "false"):
        with pytest.raises(DualpruneError, match="does not fit"):
            task(folder, path, f"model.options.aux={aux}").model()


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.name=resnet18", "name is ufld- and a ResNet"),
        ("model.name=ufld-resnet19", "did you mean 'resnet18'"),
        ("model.options.cell=3", r"\[model\] options: unknown key 'cell', did you mean 'cells'"),
        ("model.options.cells=many", r"\[model\] options cells: .* got 'many'"),
        ("model.options.lanes=3", "lanes are an even number"),
        ("model.options.size=[8, 64]", "size is at least 32×32"),
        ("model.options.focal_gama=1", "did you mean 'focal_gamma'"),
        ("data.options.worker=1", "unknown key 'worker', did you mean 'workers'"),
        ("data.options.missing=ignore", r"\[data\] options missing: .* got 'ignore'"),
        ("data.augment=flip", "augment is true or false"),
        ("training.label_smoothing=0.1", "no label_smoothing"),
        ("training.batch_size=99", "a batch of 99 needs"),
    ],
)
def test_wrong_recipes_say_what_to_do(folder, override, message):
    with pytest.raises(DualpruneError, match=message):
        one = task(folder, override)
        model = one.model()
        one.loss(
            model, next(one.train_batches(batch_size=one.recipe.training.batch_size, seed=0, epoch=0)), one.recipe.training
        )


def test_losses_have_their_weights_from_the_recipe(folder):
    one = task(folder, "model.options.shape_weight=0.5", "model.options.focal_gamma=1")
    assert one.model_options.loss == LaneLoss(gamma=1, similarity=1, shape=0.5, segmentation=1)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("rate", RATES)
def test_recipes_have_the_papers_rate_and_numbers(rate, small):
    recipe = load_recipe(RECIPES / f"table6_ufld-tusimple-{rate}x{'-small' * small}.toml")
    assert recipe.task == "lanes" and recipe.paper["rate"] == float(rate) and recipe.epochs("slr") == (12 if small else 40)
    with torch.device("meta"):
        model = build_task(recipe, device=torch.device("meta")).model(with_weights=False)
    shipped = {name: p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("aux_")}
    total = sum(p.numel() for p in shipped.values())
    pruned = total - shipped["model.conv1.weight"].numel()
    assert recipe.prune.ignore == ["model.conv1.weight"] + ["aux_*"] * (not small)
    assert total / (total - recipe.prune.sparsity * pruned) == pytest.approx(float(rate), rel=1e-3)


def test_recipes_of_table_6_differ_in_rate_and_numbers_only():
    for small in ("", "-small"):
        texts = [(RECIPES / f"table6_ufld-tusimple-{rate}x{small}.toml").read_text() for rate in RATES]
        numbers = re.compile(r"^(name|description|sparsity|rate|admm-published|slr-paper) = .*$|^#.*$", re.MULTILINE)
        assert len({numbers.sub("", text) for text in texts}) == 1


def test_the_fit_on_the_real_frames_starts():
    real_frames()
    one = build_task(load_recipe(RECIPES / "fit_ufld-tusimple.toml"))
    settings = one.recipe.dense
    assert one.steps_per_epoch(settings.batch_size) == 10 and len(one.data.test) == 6
    loss = one.loss(one.model().train(), next(one.train_batches(batch_size=6, seed=0, epoch=0)), settings)
    assert torch.isfinite(loss)
