"""The KITTI layout: what is read, turned and passed over, what is refused, and batches that depend on nothing else."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
from points_helpers import CALIB, SIZE, THINGS, kitti14, label_line, world

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError
from dualprune.tasks.points.boxes import contains, iou_3d
from dualprune.tasks.points.data import (
    KINDS,
    augmented,
    in_view,
    load_kitti,
    plain_batches,
    read_calibration,
    read_objects,
    read_points,
    to_lidar,
    to_objects,
    train_batches,
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return world(tmp_path_factory.mktemp("kitti"), frames=5)


@pytest.fixture
def copy(tree, tmp_path):
    """A tree to break."""
    return shutil.copytree(tree, tmp_path / "copy")


def load(root, **given):
    return load_kitti("tiny", root, **{"train": "all", "test": "all", **given})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- reading -----------------------------------------------------------------------------------------------------------


def test_boxes_are_where_they_were_put(tree):
    boxes = load(tree).boxes("000000")
    expected = torch.tensor([thing[1:] for thing in THINGS])
    assert torch.allclose(boxes[:, :7], expected, atol=1e-5)
    assert boxes[:, 7].tolist() == [0, 0, 1, 2]


def test_there_and_back(tree):
    data = load(tree)
    objects, place = data.label("000001"), (data.calibration("000001"), data.image_size("000001"))
    objects = objects[objects.kind != "DontCare"]
    again = to_objects(to_lidar(objects, place[0]), list(objects.kind), torch.ones(len(objects)), *place)
    assert np.allclose(again.location, objects.location, atol=1e-5) and np.allclose(again.size, objects.size, atol=1e-5)
    assert np.allclose(again.rotation, objects.rotation, atol=1e-5) and list(again.kind) == list(objects.kind)
    assert iou_3d(again.upright(), objects.upright()).diagonal().min() > 0.9999


def test_projection_by_hand(tmp_path):
    (tmp_path / "calib.txt").write_text(CALIB)
    place = (read_calibration(tmp_path / "calib.txt"), SIZE)
    box = torch.tensor([[10.0, 0, 0, 2, 2, 2, 0]])
    found = to_objects(box, ["Car"], torch.tensor([0.5]), *place)
    spread = 700 / 9  # half a width of 1 m, at the front that is 9 m away
    assert found.bbox[0].tolist() == pytest.approx([600 - spread, 180 - spread, 600 + spread, 180 + spread])
    assert found.location[0].tolist() == [0, 1, 10] and found.score[0] == 0.5
    assert (found.rotation[0], found.alpha[0]) == (pytest.approx(-math.pi / 2), pytest.approx(-math.pi / 2))
    gone = torch.tensor([[-10.0, 0, 0, 2, 2, 2, 0], [10, 40, 0, 2, 2, 2, 0]])  # behind, and beside the image
    assert len(to_objects(gone, ["Car", "Car"], torch.ones(2), *place)) == 0
    seen = in_view(np.array([[10.0, 0, 0], [-10, 0, 0], [10, 9, 0]]), *place)
    assert seen.tolist() == [True, False, False]


def test_results_are_written_as_they_are_read(tree, tmp_path):
    objects = load(tree).label("000000")
    (tmp_path / "result.txt").write_text("\n".join(objects.lines()) + "\n")
    again = read_objects(tmp_path / "result.txt")
    for name, value in vars(objects).items():
        if name == "kind":
            assert list(value) == list(again.kind)
        else:
            assert np.allclose(value, getattr(again, name), atol=1e-4)


def test_the_whole_scan_is_cut_to_the_camera(tmp_path):
    data = load(world(tmp_path, frames=1, points="velodyne"))
    whole = read_points(tmp_path / "training/velodyne/000000.bin")
    seen = data.points("000000")
    assert 0 < len(seen) < len(whole)
    assert len(seen) == in_view(whole[:, :3], data.calibration("000000"), SIZE).sum()


def test_summary_counts_what_is_passed_over(copy):
    van = label_line("Van", 15, 5, -0.8, 5, 2, 2, 0)
    (copy / "training/label_2/000003.txt").write_text(van + "\n")
    (copy / "training/label_2/000004.txt").write_text("")
    data = load(copy)
    assert data.summary.splitlines()[0] == (
        "train: 5 frames, 2 with nothing to find; 6 Car, 3 Pedestrian, 3 Cyclist; passed over: 3 DontCare, 1 Van"
    )
    assert data.boxes("000004").shape == (0, 8) and len(data.label("000004")) == 0
    assert load(copy, classes=["Cyclist"]).boxes("000000")[:, 7].tolist() == [0]


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_no_such_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path / "store"))
    with pytest.raises(DataNotFoundError, match=r"no KITTI frames 'kitti'.*store.kitti, data.kitti; get the 3D"):
        load_kitti("kitti")
    with pytest.raises(DataNotFoundError, match=r"no KITTI frames"):
        load_kitti("kitti", tmp_path)


def test_several_folders_may_hold_the_data(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("DUALPRUNE_DATA", os.pathsep.join([str(tmp_path), "", str(tree.parent)]))
    assert load_kitti(tree.name, train="all", test="all").folder == tree / "training"


def test_lists_of_frames(copy):
    with pytest.raises(DataNotFoundError, match=r"no list of frames .*train.txt; put it there, or say 'all'"):
        load(copy, train="train")
    (copy / "ImageSets").mkdir()
    (copy / "ImageSets/train.txt").write_text("000000\n000002\n")
    (copy / "ImageSets/val.txt").write_text("000001\n")
    data = load_kitti("tiny", copy)
    assert (data.train, data.test) == (("000000", "000002"), ("000001",))
    with pytest.raises(DataNotFoundError, match="did you mean 'train'"):
        load(copy, train="trian")
    (copy / "ImageSets/train.txt").write_text("000000\n000099\n")
    with pytest.raises(FormatError, match=r"1 of 3 frames cannot be used: no file velodyne/000099\.bin"):
        load_kitti("tiny", copy)


@pytest.mark.parametrize("folder", ["velodyne_reduced", "label_2", "calib", "image_2"])
def test_missing_files(copy, folder):
    next((copy / "training" / folder).glob("000002.*")).unlink()
    (copy / "ImageSets").mkdir()
    (copy / "ImageSets/train.txt").write_text("000002\n")
    place = "velodyne" if folder == "velodyne_reduced" else folder
    with pytest.raises(FormatError, match=f"1 of .* frames cannot be used: no file {place}/000002"):
        load_kitti("tiny", copy, train="train", test="all")


def test_cut_off_points(copy):
    path = copy / "training/velodyne_reduced/000001.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match=r"1 of 5 frames .*velodyne_reduced/000001.bin has \d+ bytes, no multiple of 16"):
        load(copy)
    with pytest.raises(FormatError, match="points are 16 bytes each"):
        read_points(path)
    np.array([1, 2, np.nan, 0], np.float32).tofile(path)
    with pytest.raises(FormatError, match="1 points are not finite"):
        read_points(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Car 0 0 0 1 2 3", "line 2: expected 15 fields, or 16 with a score, got 7"),
        ("car" + " 0" * 14, "line 2: unknown class 'car', did you mean 'Car'"),
        ("Car 0 0 0 x" + " 0" * 10, "line 2: could not convert string to float: 'x'"),
        ("Car 0 0 0 nan" + " 0" * 10, "line 2: a number is not finite"),
        ("Car" + " 0" * 14, "line 2: height, width and length are above 0, got 0 0 0"),
        ("Van" + " 0" * 7 + " 1.5 -1 4" + " 0" * 4, "line 2: height, width and length are above 0, got 1.5 -1 4"),
        ("Car 0 0 0 60 10 60 50 1 2 4 0 0 9 0", "line 2: a box is left, top, right, bottom; this one is empty: 60 10 60 50"),
        ("Car 0 0 0 60 10 20 50 1 2 4 0 0 9 0", "line 2: .* this one is empty: 60 10 20 50"),
        ("Car 0 0 0 10 50 60 40 1 2 4 0 0 9 0", "line 2: .* this one is empty: 10 50 60 40"),
        ("Car 1.5 0 0 10 10 60 50 1 2 4 0 0 9 0", r"line 2: truncation lies in \[0, 1\], or is -1, got 1.5"),
        ("Car -0.5 0 0 10 10 60 50 1 2 4 0 0 9 0", r"line 2: truncation lies in \[0, 1\], or is -1, got -0.5"),
        ("Car 0 4 0 10 10 60 50 1 2 4 0 0 9 0", "line 2: occlusion is 0, 1, 2 or 3, or -1, got 4"),
        ("Car 0 2.7 0 10 10 60 50 1 2 4 0 0 9 0", "line 2: occlusion is 0, 1, 2 or 3, or -1, got 2.7"),
    ],
)
def test_damaged_labels(tmp_path, line, said):
    path = tmp_path / "label.txt"
    path.write_text(f"DontCare{' -1' * 14}\n{line}\n")
    with pytest.raises(FormatError, match=said):
        read_objects(path)


def test_truncation_and_occlusion_may_be_unknown(tmp_path):
    path = tmp_path / "found.txt"
    path.write_text("Car -1 -1 0 10 10 60 50 1 2 4 0 0 9 0 0.7\nVan 1 3 0 10 10 60 50 1 2 4 0 0 9 0 0.6\n")
    assert read_objects(path).occlusion.tolist() == [-1, 3] and read_objects(path).truncation.tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("P2", "nan" + " 1" * 11, "line 2: P2 has a number that is not finite"),
        ("P2", " 0" * 12, "line 2: P2 is singular"),
        ("R0_rect", "1 0 0 0 inf 0 0 0 1", "line 3: R0_rect has a number that is not finite"),
        ("R0_rect", "0 " * 9, "line 3: R0_rect is singular"),
        ("R0_rect", "1 2 3 4 5 6 7 8 9", "line 3: R0_rect is singular"),
        ("Tr_velo_to_cam", "nan" + " 1" * 11, "line 4: Tr_velo_to_cam has a number that is not finite"),
        ("Tr_velo_to_cam", "0 -1 0 0 0 -1 0 0 1 0 0 0", "line 4: Tr_velo_to_cam is singular"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(copy, key, values, said):
    path = copy / "training/calib/000000.txt"
    rows = [f"{key}: {values}" if row.startswith(key) else row for row in path.read_text().splitlines()]
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(FormatError, match=f"000000.txt, {said}"):
        load(copy).boxes("000000")


def test_damaged_calibration_and_images(copy):
    path = copy / "training/calib/000000.txt"
    path.write_text("P2: 1 2 3\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 1 0 0 0 0 1 0 0 0 0 1 0\n")
    with pytest.raises(FormatError, match="line 1: P2 should be 12 numbers, got '1 2 3'"):
        read_calibration(path)
    path.write_text("P2: 1\n")
    with pytest.raises(FormatError, match="has no R0_rect; it has P2"):
        read_calibration(path)
    (copy / "training/image_2/000000.png").write_bytes(b"no image")
    with pytest.raises(FormatError, match="is no readable image"):
        load(copy).image_size("000000")


def test_classes(tree):
    with pytest.raises(DualpruneError, match="KITTI has no class 'Cars', did you mean 'Car'"):
        load(tree, classes=["Cars"])


# --- batches -----------------------------------------------------------------------------------------------------------


def equal(a, b):
    return all(
        torch.equal(x.nan_to_num(-99), u.nan_to_num(-99)) and all(map(torch.equal, y, v))
        for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_batches_are_a_function_of_their_arguments(tree):
    data = load(tree)

    def epoch(**given):
        return list(train_batches(data, **{"batch_size": 2, "seed": 0, "epoch": 0, "augment": "full", **given}))

    whole = epoch()
    assert len(whole) == 2 and whole[0][0].shape[0] == 2 and whole[0][0].shape[2] == 4
    assert equal(whole, epoch()) and equal(whole[1:], epoch(start_step=1)) and equal(whole, epoch(workers=2))
    assert not equal(whole, epoch(epoch=1)) and not equal(whole, epoch(seed=1))
    state = torch.get_rng_state()
    epoch()
    assert torch.equal(state, torch.get_rng_state())


def test_padding_is_nan_and_nothing_else(tree):
    data = load(tree)
    short, (points, boxes) = len(data.points("000000")), next(iter(plain_batches(data, ["000000", "000001"], 2)))
    assert not points[0, :short].isnan().any() and points[0, short:].isnan().all() and len(boxes) == 2
    assert [len(x) for x, _ in plain_batches(data, data.test, 3)] == [3, 2]


@pytest.mark.parametrize("kind", ["none", "flip", "full"])
def test_augmentation_keeps_points_in_their_boxes(tree, kind):
    data = load(tree)
    points, boxes = data.points("000000"), data.boxes("000000")
    inside, seen = contains(boxes[:, :7] * torch.tensor([1, 1, 1, 1.01, 1.01, 1.01, 1]), points[:, :3]), set()
    for seed in range(8):
        moved, turned = augmented(points, boxes, kind, generator(seed))
        grown = turned[:, :7] * torch.tensor([1, 1, 1, 1.01, 1.01, 1.01, 1])
        assert (contains(grown, moved[:, :3]).sum(1) - inside.sum(1)).abs().max() <= 1
        assert torch.equal(moved[:, 3], points[:, 3])
        seen.add(tuple(moved[0].tolist()))
    assert len(seen) == {"none": 1, "flip": 2, "full": 8}[kind]
    assert torch.equal(points, data.points("000000")) and torch.equal(boxes, data.boxes("000000"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_on_a_cpu(tree):
    data = load(tree)
    order = {"batch_size": 2, "seed": 0, "epoch": 0, "augment": "full"}
    there = [(x.cpu(), [boxes.cpu() for boxes in y]) for x, y in train_batches(data, **order, device=torch.device("cuda"))]
    assert equal(there, train_batches(data, **order))


def test_held_out_frames(tree):
    held = load(tree).hold_out(0.4, seed=0)
    assert len(held.test) == 2 and len(held.train) == 3 and not {*held.test} & {*held.train}
    assert held.test == load(tree).hold_out(0.4, seed=0).test
    with pytest.raises(DualpruneError, match="holding out 5 of 5 training frames leaves none"):
        load(tree).hold_out(0.99, seed=0)


# --- real frames -------------------------------------------------------------------------------------------------------


def test_real_boxes_hold_their_points_and_project_onto_their_labels():
    data = load_kitti("kitti14", kitti14(), train="all", test="all")
    assert data.summary.splitlines()[0] == (
        "train: 14 frames, 0 with nothing to find; 38 Car, 21 Pedestrian, 11 Cyclist; "
        "passed over: 28 DontCare, 1 Misc, 1 Truck, 1 Van"
    )
    for frame in data.test:
        boxes, objects = data.boxes(frame), data.label(frame)
        assert contains(boxes[:, :7], data.points(frame)[:, :3]).any(1).all()
        cars = objects[objects.kind == "Car"]
        place = (data.calibration(frame), data.image_size(frame))
        again = to_objects(to_lidar(cars, place[0]), list(cars.kind), torch.ones(len(cars)), *place)
        assert np.abs(again.bbox - cars.bbox).max(initial=0) < 6  # labels are rounded to centimetres
        assert np.abs(np.sin((again.alpha - cars.alpha) / 2)).max(initial=0) < 0.02
    assert set(KINDS) >= {kind for frame in data.test for kind in data.label(frame).kind}
