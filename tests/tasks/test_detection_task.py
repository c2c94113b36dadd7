"""Detection data and the task: synthetic files in every layout and state, the real sample where it is, the recipes."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError
from dualprune.recipe import load_recipe, parse_recipe
from dualprune.scope import build_problem
from dualprune.tasks import build_task
from dualprune.tasks.detection import Boxes, average_precision, build_network, load_split
from dualprune.tasks.detection.data import augmented, open_upright, placement, train_batches
from dualprune.tasks.detection.task import draw_boxes, in_image, true_boxes

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "slr-2024").glob("*coco*.toml"))
REAL = Path(os.environ.get("DUALPRUNE_DATA", "")) / "coco256"
WEIGHTS = Path(os.environ.get("DUALPRUNE_WEIGHTS", ""))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs coco256 in $DUALPRUNE_DATA")

RECIPE = """
name = "boxes"
task = "detection"
[model]
name = "yolov3-tiny"
options = {{ width = 0.125 }}
[data]
name = "coco"
root = "{root}"
augment = true
validation = 0.25
options = {{ train = "train", test = "val", size = 64, classes = 2 }}
[training]
epochs = 1
lr = 0.01
batch_size = 4
[prune]
rate = 2
[methods.oneshot]
kind = "oneshot"
"""


def write_set(root, split, count=8, seed=0):
    """Red and blue rectangles on grey, with YOLO labels."""
    rng = np.random.default_rng(seed)
    (root / "images" / split).mkdir(parents=True)
    (root / "labels" / split).mkdir(parents=True)
    for i in range(count):
        pixels = np.full((48, 80, 3), 120, np.uint8)
        label = i % 2
        x, y, w, h = int(rng.integers(2, 40)), int(rng.integers(2, 20)), int(rng.integers(16, 36)), int(rng.integers(12, 24))
        pixels[y : y + h, x : x + w] = (255, 0, 0) if label == 0 else (0, 0, 255)
        Image.fromarray(pixels).save(root / "images" / split / f"{i:03}.png")
        row = (label, (x + w / 2) / 80, (y + h / 2) / 48, w / 80, h / 48)
        (root / "labels" / split / f"{i:03}.txt").write_text(" ".join(map(str, row)) + "\n")


@pytest.fixture
def root(tmp_path):
    write_set(tmp_path, "train")
    write_set(tmp_path, "val", 4, seed=1)
    return tmp_path


def task(root, split="test", **changes):
    text = RECIPE.format(root=root)
    return build_task(parse_recipe(text, [f"{key}={value}" for key, value in changes.items()]), split)


def label(root, text, image=0):
    (root / "labels" / "train" / f"{image:03}.txt").write_text(text)


def read(root, **options):
    return load_split("train", root, **{"size": 64, "classes": 2, **options})


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_clean_set_has_no_notes(root):
    data = read(root)
    assert data.describe() == "train: 8 images, 8 boxes"


def test_oddities_are_counted_and_said(root, caplog):
    label(root, "")
    label(root, "0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0 0.2\n", 1)
    (root / "labels" / "train" / "002.txt").unlink()
    (root / "images" / "train" / "003.png").unlink()
    damaged = root / "images" / "train" / "004.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    data = read(root)
    assert data.notes == Counter(
        {
            "label files without a box": 1,
            "boxes that are there twice, taken once": 1,
            "boxes of no area, skipped": 1,
            "images without a label file, taken as empty": 1,
            "label files without an image, skipped": 1,
            next(key for key in data.notes if "004.png" in key): 1,
        }
    )
    assert [file.stem for file in data.files] == ["000", "001", "002", "005", "006", "007"]
    assert data.describe() in caplog.text


def test_an_unreadable_image_is_an_error_when_images_are_not_kept(root):
    (root / "images" / "train" / "004.png").write_bytes(b"")
    data = read(root, cache=False, workers=0)
    with pytest.raises(FormatError, match=r"004\.png is not a readable image"):
        list(train_batches(data, batch_size=8, seed=0, epoch=0))


@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 mean something
def test_images_are_turned_as_their_exif_data_say(root, orientation):
    path, exif = root / "images" / "train" / "turned.jpg", Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :16], pixels[:8] = 255, 128
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        shown = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(np.array(open_upright(path)), shown)
    nothing = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert np.array_equal(draw_boxes(path, nothing, nothing, ()), shown)


def test_labels_lie_on_the_image_that_people_see(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # a portrait as phones store it, lying on its side
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :24] = 255  # stored on the left, seen at the top
    (root / "images" / "train" / "000.png").unlink()
    Image.fromarray(pixels).save(root / "images" / "train" / "000.jpg", exif=exif)
    label(root, "0 0.5 0.15 1 0.3")
    data = read(root, fit="stretch")
    x, [place] = next(data.fetch([[0]]))
    assert place[:2] == (40, 80)
    assert x[0, :, : int(0.3 * 64) - 1].min() > 240 and x[0, :, int(0.3 * 64) + 3 :].max() < 15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 0.5 0.5 0.2 0.2", r"000\.txt:1: class 2 is outside 0…1"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("0.5 0.5 0.5 0.2 0.2", r"class 0\.5"),
        ("\n0 12 14 20 20", r"000\.txt:2: expected fractions"),
        ("0 0.5 0.5 -0.2 0.2", "expected fractions"),
        ("0 0.5 nan 0.2 0.2", "expected fractions"),
        ("0 0.5 0.5 0.2", "a class and 4 numbers"),
        ("zero 0.5 0.5 0.2 0.2", "expected numbers"),
    ],
)
def test_a_wrong_label_is_an_error_that_names_the_line(root, text, message):
    label(root, text)
    with pytest.raises(FormatError, match=message):
        read(root)


def test_a_polygon_becomes_its_box(root):
    label(root, "1 0.1 0.2 0.5 0.2 0.3 0.6 0.1 0.4")
    np.testing.assert_allclose(read(root).labels[0], [[1, 0.3, 0.4, 0.4, 0.4, 0]])


def test_wrong_layouts_are_explained(root, tmp_path):
    with pytest.raises(DataNotFoundError, match="DUALPRUNE_DATA"):
        load_split("train2099", root)
    with pytest.raises(DataNotFoundError, match=r"images/train2099"):
        load_split("train2099", root)
    with pytest.raises(DualpruneError, match="did you mean 'letterbox'"):
        read(root, fit="leterbox")
    with pytest.raises(DualpruneError, match="size is a whole number"):
        read(root, size="big")
    for text in (root / "labels" / "train").iterdir():
        text.write_text("")
    with pytest.raises(DualpruneError, match="not one box"):
        read(root)
    for image in (root / "images" / "train").iterdir():
        image.unlink()
    with pytest.raises(DataNotFoundError, match="holds no images"):
        read(root)
    (root / "labels").rename(root / "texts")
    with pytest.raises(DataNotFoundError, match="no label files"):
        read(root)


def coco_json(root, classes=None, **changes):
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i:03}.png", "width": 160, "height": 96} for i in range(7)],
        "categories": [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [16, 24, 80, 48], "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 160, 96], "iscrowd": 1},
            {"id": 3, "image_id": 99, "category_id": 3, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        ],
        **changes,
    }
    (root / "boxes_train.json").write_text(json.dumps(content))
    return read(root, classes=classes, annotations="boxes_{split}.json")


def test_json_boxes_are_fractions_of_the_sizes_it_names(root):
    (root / "images" / "train" / "001.png").unlink()
    data = coco_json(root)
    assert data.classes == ("red", "blue") and len(data) == 6
    np.testing.assert_allclose(data.labels[0], [[1, 0.35, 0.5, 0.5, 0.5, 0], [0, 0.5, 0.5, 1, 1, 1]])
    assert data.notes == Counter(
        {
            "annotations without an image, skipped": 1,
            "annotated images without a file, skipped": 1,
            "images without an annotation": 5,
            "images that the JSON file does not name, skipped": 1,
        }
    )
    # a crowd is measured but not trained on
    _, targets = next(train_batches(data.subset([0], "one"), batch_size=1, seed=0, epoch=0))
    assert targets[:, 1].tolist() == [1]


def test_wrong_json_is_explained(root):
    with pytest.raises(FormatError, match="no instances JSON"):
        coco_json(root, categories=3)
    with pytest.raises(FormatError, match="category 8"):
        coco_json(root, annotations=[{"id": 1, "image_id": 10, "category_id": 8, "bbox": [0, 0, 1, 1]}])
    with pytest.raises(FormatError, match="KeyError: 'file_name'"):
        coco_json(root, images=[{"id": 10}])
    with pytest.raises(FormatError, match="ValueError"):
        coco_json(root, images=[{"id": 10, "file_name": "000.png", "width": "wide", "height": 96}])
    (root / "boxes_train.json").write_text('{"images": [')
    with pytest.raises(FormatError, match="not a readable JSON"):
        read(root, annotations="boxes_train.json")
    with pytest.raises(DataNotFoundError, match="no annotation file"):
        read(root, annotations="none.json")


def one_image(**changes):
    return [{"id": 10, "file_name": "000.png", "width": 160, "height": 96, **changes}]  # of 80×48 pixels


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (one_image() + one_image(file_name="001.png"), "two images of the id 10"),
        (one_image() + one_image(id=11), r"two images of the file_name '000\.png'"),
        (one_image(width=0), r"image 10 \(000\.png\) should have a width and a height above 0, got \(0\.0, 96\.0\)"),
        (one_image(height=float("nan")), "should have a width and a height above 0"),
        (one_image(height=float("inf")), "should have a width and a height above 0"),
        (one_image(width=96, height=160), r"000\.png is 80×48 pixels, of other proportions than the 96×160"),
        (one_image(height=101), r"000\.png is 80×48 pixels, of other proportions than the 160×101"),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_images_of_a_json_file_are_the_ones_it_names(root, images, message, cache):
    annotations = [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [16, 24, 10, 10]}]
    categories = [{"id": 3, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=message):
        list(read(root, classes=None, annotations="boxes.json", cache=cache, workers=0).fetch([[0]]))


@pytest.mark.parametrize(("width", "height"), [(160, 96), (161, 96), (160, 98), (801, 479), (40, 24)])
def test_copies_of_another_size_are_the_same_image(root, width, height):
    boxes = [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [1, 2, 10, 10]}]
    data = coco_json(root, images=one_image(width=width, height=height), annotations=boxes)
    assert len(data) == 1 and data.subset([0], "part").declared == ((width, height),)


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([150, 0, 20, 20], r"annotation 5: expected a box inside its image of 160×96 pixels, got \[150, 0, 20, 20\]"),
        ([-9, 0, 20, 20], "annotation 5: expected a box inside"),
        ([0, 0, float("nan"), 20], "annotation 5: expected a box inside"),
        ([20, 20, -5, 20], "annotation 5: expected a box inside"),
        ([0, 0, 20], r"annotation 5: expected bbox = \[left, top, width, height\], got \[0, 0, 20\]"),
        ([0, 0, "a", 20], "no instances JSON of COCO: TypeError"),
        (7, "no instances JSON of COCO: TypeError"),
    ],
)
def test_wrong_boxes_in_json_are_errors_that_name_the_annotation(root, bbox, message):
    with pytest.raises(FormatError, match=message):
        coco_json(root, annotations=[{"id": 5, "image_id": 10, "category_id": 3, "bbox": bbox}])


def test_json_boxes_may_leave_the_image_by_as_much_as_those_of_label_files(root):
    data = coco_json(root, annotations=[{"id": 5, "image_id": 10, "category_id": 3, "bbox": [-1, 0, 20, 96.5]}])
    assert len(data.labels[0]) == 1


def test_json_categories_are_numbered_by_name_where_names_are_given(root):
    data = coco_json(root, classes=["green", "blue", "red"])
    assert data.classes == ("green", "blue", "red") and data.labels[0][:, 0].tolist() == [1, 2]
    assert coco_json(root, classes=2).classes == ("red", "blue")


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (["red", "bleu"], ["blue", "red"], "the category 'blue' is none of the 2 classes, did you mean 'bleu'"),
        (3, ["blue", "red"], "has 2 categories, classes says 3"),
        (1, ["blue", "red"], "has 2 categories, classes says 1"),
        (None, ["red", "red"], "two categories of the name 'red'"),
        (["red", "red"], ["red", "blue"], "classes names 'red' twice"),
    ],
)
def test_json_categories_that_do_not_fit_the_classes(root, classes, names, message):
    categories = [{"id": 7, "name": names[0]}, {"id": 3, "name": names[1]}]
    with pytest.raises(DualpruneError, match=message):
        coco_json(root, classes=classes, categories=categories)
    if classes is None:
        with pytest.raises(FormatError, match="two categories of the id 3"):
            coco_json(root, categories=[{"id": 3, "name": "red"}, {"id": 3, "name": "blue"}])


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_targets_lie_on_the_rectangles(root, fit):
    data = read(root, fit=fit)
    for images, targets in train_batches(data, batch_size=4, seed=0, epoch=0, augment="flip"):
        for image, label, x, y, w, _ in targets.tolist():
            column, row = slice(round((x - w / 2) * 64) + 1, round((x + w / 2) * 64) - 1), round(y * 64)
            inside = images[int(image), :, row, column].mean(1)
            assert inside[0 if label == 0 else 2] > 0.9 and inside[2 if label == 0 else 0] < 0.1
            beyond = round((x + w / 2) * 64) + 2
            assert beyond >= 64 or images[int(image), :, row, beyond].std() < 0.05  # grey


def test_batches_are_a_function_of_seed_epoch_and_step(root):
    def batches(data=None, **changes):
        settings = {"batch_size": 2, "seed": 0, "epoch": 0, "augment": "full", **changes}
        return list(train_batches(data or read(root), **settings))

    def same(a, b):
        return len(a) == len(b) and all(torch.equal(x, p) and torch.equal(y, q) for (x, y), (p, q) in zip(a, b, strict=True))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = batches()
    assert same(whole[2:], batches(start_step=2)) and len(whole) == 4
    assert not same(whole, batches(epoch=1)) and not same(whole, batches(seed=1))
    assert same(whole, batches(read(root, cache=False, workers=0)))
    assert torch.equal(before, torch.get_rng_state())


def test_colours_change_little_and_grey_stays_grey():
    x, targets = torch.full((16, 3, 4, 4), 0.5), torch.zeros(0, 6)
    changed, _ = augmented(x, targets, "full", torch.Generator().manual_seed(0))
    assert (changed.std(1) < 2e-3).all() and changed.min() >= 0.29 and changed.max() <= 0.71
    assert changed.mean((1, 2, 3)).std() > 0.05
    red = x * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert (augmented(red, targets, "full", torch.Generator().manual_seed(0))[0].argmax(1) == 0).all()


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_boxes_go_into_the_input_and_back(fit):
    place = placement(80, 48, 64, fit)
    labels = np.array([[1, 0.5, 0.5, 0.25, 0.5, 0]])
    truth = true_boxes(labels, place)
    assert truth.corners.tolist() == [[30, 12, 50, 36]]
    shift, scale = torch.tensor([place.left, place.top] * 2), torch.tensor([place.scale_x, place.scale_y] * 2)
    moved = Boxes(truth.corners * scale + shift, truth.classes, truth.scores, truth.crowd)
    torch.testing.assert_close(in_image(moved, place).corners, truth.corners.float(), check_dtype=False)
    outside = Boxes(torch.tensor([[-9.0, -9, 99, 99]]), truth.classes, truth.scores, truth.crowd)
    assert in_image(outside, place).corners.tolist() == [[0, 0, 80, 48]]


# --- the task --------------------------------------------------------------------------------------------------------


def test_the_task_learns_rectangles(root):
    boxes = task(root, **{"data.augment": "false", "data.options.test": "train"})
    model, settings = boxes.model(), boxes.recipe.training
    assert boxes.steps_per_epoch(4) == 2
    before = boxes.measure(model)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(40):
        for batch in boxes.train_batches(batch_size=4, seed=0, epoch=epoch):
            boxes.loss(model.train(), batch, settings).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = boxes.measure(model)
    assert set(after) == set(boxes.metrics) and after["AP50"] > 90 > 50 > before["AP50"]
    assert model.training and model.layers[0].training
    pictures = boxes.pictures(model)
    assert [title for title, _ in pictures] == ["000.png", "001.png", "002.png", "003.png"]
    assert pictures[0][1].shape == (48, 80, 3) and pictures[0][1].dtype == np.uint8
    assert sum(len(x) for x in boxes.calibration(6)) == 6


def test_validation_is_held_out_of_training(root):
    boxes = task(root, "validation")
    assert len(boxes.test) == 2 and not set(boxes.test.files) & set(boxes.train.files)
    assert len(boxes.train) == 6 and {file.parent.name for file in boxes.test.files} == {"train"}


def test_the_test_split_has_the_training_splits_numbers(root):
    for split, named in (("train", {1: "cat", 2: "dog", 3: "bus"}), ("val", {1: "cat", 3: "bus"})):
        content = {
            "images": [{"id": 0, "file_name": "000.png", "width": 80, "height": 48}],
            "categories": [{"id": key, "name": name} for key, name in named.items()],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 3, "bbox": [8, 8, 16, 16]}],
        }
        (root / f"{split}.json").write_text(json.dumps(content))
    boxes = task(root, **{"data.options.annotations": "'{split}.json'", "data.options.classes": 3})
    assert boxes.train.classes == boxes.test.classes == ("cat", "dog", "bus")
    assert boxes.train.labels[0][0, 0] == boxes.test.labels[0][0, 0] == 2
    (root / "val.json").write_text((root / "val.json").read_text().replace('"cat"', '"cow"'))
    with pytest.raises(FormatError, match=r"val\.json: the category 'cow' is none of the 3 classes"):
        _ = task(root, **{"data.options.annotations": "'{split}.json'", "data.options.classes": 3}).test


def test_calibration_batches_are_equally_large(tmp_path):
    write_set(tmp_path, "train", 17)
    write_set(tmp_path, "val", 1)
    boxes = task(tmp_path)
    assert [len(x) for x in boxes.calibration(100)] == [9, 8] and [len(x) for x in boxes.calibration(16)] == [16]


def test_without_data_the_network_has_its_own_classes(tmp_path):
    (tmp_path / "none").mkdir()
    text = RECIPE.format(root=tmp_path / "none").replace(", classes = 2", "")
    assert build_task(parse_recipe(text)).model().heads[0].classes == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.options.sise": 64}, "did you mean 'size'"),
        ({"model.options.widht": 1}, "did you mean 'width'"),
        ({"model.options.gains.boxes": 1}, "did you mean 'box'"),
        ({"model.options.gains": 3}, r"\[model\] options gains: "),
        ({"model.options.gains.box": "'much'"}, r"\[model\] options gains.box: .* got 'much'"),
        ({"model.options.width": "'wide'"}, r"\[model\] options width: .* got 'wide'"),
        ({"model.options.partial": "'x'"}, r"\[model\] options partial: "),
        ({"data.options.confidence": "'x'"}, r"\[data\] options confidence: "),
        ({"data.options.train": 3}, r"\[data\] options train: .* got 3"),
        ({"model.options.classes": 1}, r"\[model\] options.classes is 1, but the data have 2"),
        ({"data.augment": "'shift'"}, "augment of detection"),
        ({"data.name": "'voc'"}, "is 'coco'"),
        ({"model.name": "'mine.cfg'"}, r"no file 'mine\.cfg'"),
        ({"model.pretrained": "true"}, "bring no weights"),
        ({"training.batch_size": 99}, "a batch of 99"),
    ],
)
def test_wrong_settings_are_explained(root, change, message):
    boxes = task(root, **change)
    with pytest.raises(DualpruneError, match=message):
        model = boxes.model()
        size = boxes.recipe.training.batch_size
        boxes.loss(model, next(boxes.train_batches(batch_size=size, seed=0, epoch=0)), boxes.recipe.training)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in RECIPES if "fastest" not in p.name], ids=lambda path: path.stem)
def test_recipes_reach_their_rate_over_the_whole_network(path):
    recipe = load_recipe(path)
    with torch.device("meta"):
        network = build_network(recipe.model.name, width=recipe.model.options.get("width", 1.0))
    network.to_empty(device="cpu")
    problem = build_problem(network, sparsity=recipe.prune.sparsity, ignore=recipe.prune.ignore, budget=recipe.prune.budget)
    total = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    removed = sum(t.weight.numel() * t.sparsity for t in problem.targets)
    wanted = recipe.paper.get("rate", 3.33)
    assert total / (total - removed) == pytest.approx(wanted, rel=1e-3)
    assert {name for name, why in problem.skipped.items() if why == "ignored" and name.endswith("conv.weight")} == {
        f"{glob[:-2]}.conv.weight" for glob in recipe.prune.ignore
    }


def test_every_row_has_its_recipes():
    assert len(RECIPES) == 13 and sum("small" in path.stem for path in RECIPES) == 7


# --- real data -------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_perfect_is_100_and_empty_is_0_on_the_real_labels(split):
    data = load_split(split, REAL, size=32)
    truths = [true_boxes(boxes, place) for boxes, place in zip(data.labels, data.pixels[1], strict=True)]
    assert average_precision(truths, truths) == pytest.approx({"AP50": 100, "AP50-95": 100})
    nothing = [Boxes(t.corners[:0], t.classes[:0], t.scores[:0], t.crowd[:0]) for t in truths]
    assert average_precision(truths, nothing) == {"AP50": 0, "AP50-95": 0}


@needs_data
def test_text_labels_and_json_agree_on_the_real_images():
    text = load_split("train2017", REAL, size=32)
    content = load_split("train2017", REAL, size=32, annotations="instances_train2017_orig_coords.json")
    assert len(text) == len(content) == 128 and content.classes == text.classes
    assert text.notes["images without a label file, taken as empty"] == 2
    assert text.notes["label files without an image, skipped"] == 2
    for mine, theirs in zip(text.labels, content.labels, strict=True):
        theirs = theirs[theirs[:, 5] == 0]
        assert len(mine) == len(theirs)
        for row in mine:
            assert np.abs(theirs[theirs[:, 0] == row[0]] - row).max(1).min() < 2e-3


@needs_data
@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS / "yolo-fastest-1.1.cfg").is_file(), reason="needs yolo-fastest-1.1 in $DUALPRUNE_WEIGHTS")
def test_yolo_fastest_scores_what_it_should():
    path = next(path for path in RECIPES if path.stem == "yolo-fastest-coco-2x-small")
    boxes = build_task(load_recipe(path))
    found = boxes.measure(boxes.model())
    # 36.5 by the weights' own note, which says nothing of resizing and suppression; here 35.8 stretched and 35.3 letterboxed
    assert found["AP50"] == pytest.approx(36.5, abs=1.0) and found["AP50-95"] > 15
