import json

import numpy as np
import pytest
import torch
from lanes_helpers import HEIGHTS, SIZE, label, line, real_frames, toy, write
from PIL import Image

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError
from dualprune.tasks.lanes.data import Frame, Samples, batches, draw_mask, load_tusimple, moved, steps_per_epoch, train_draws
from dualprune.tasks.lanes.grid import Grid, Motion, resample
from dualprune.tasks.lanes.metrics import tusimple_scores

SMALL = Grid(cells=40, rows=56, frame=SIZE)
Y = np.array(HEIGHTS, float)


def one_hot(cells, classes):
    """Scores (1, classes, rows, lanes) that are sure of these cells."""
    return 1000.0 * torch.nn.functional.one_hot(torch.from_numpy(cells), classes).permute(2, 0, 1)[None]


# --- the grid --------------------------------------------------------------------------------------------------------


def test_anchors_are_tusimples_rows():
    assert Grid().anchors.tolist() == list(range(160, 711, 10))


def test_cells_by_hand():
    grid = Grid(cells=11, rows=4, frame=(72, 101))  # ten pixels a cell
    x = np.array([[0, 9.9, 10, 100], [-2, 100.5, 99.9, 55]])
    assert grid.encode(x).tolist() == [[0, 11], [0, 11], [1, 9], [10, 5]]


def test_decoding_gives_the_cell_centres_back():
    grid = Grid()
    cells = np.random.default_rng(0).integers(0, 101, (56, 4))
    x = grid.decode(one_hot(cells, 101))[0]
    width = 1279 / 99
    np.testing.assert_allclose(x, np.where(cells.T < 100, (cells.T + 0.5) * width, -2))


def test_decoding_averages_over_cells_and_leaves_no_lane_out():
    grid = Grid(cells=11, rows=4, frame=(72, 101))
    scores = torch.full((1, 12, 4, 4), -1e4)
    scores[:, 3], scores[:, 4], scores[:, 11] = 5.0, 5.0, 4.0
    assert grid.decode(scores) == pytest.approx(np.full((1, 4, 4), 40.0))
    scores[:, 11] = 6.0
    assert (grid.decode(scores) == -2).all()


@pytest.mark.parametrize("cells, least", [(100, 99.5), (50, 99)])
def test_the_targets_of_the_real_labels_decode_to_a_perfect_score(cells, least):
    grid, frames = Grid(cells), []
    for lanes, heights in real_frames():
        x, _ = grid.slots(lanes, heights)
        found = grid.decode(one_hot(grid.encode(resample(x, heights, grid.anchors)), cells + 1))[0]
        frames.append((resample(found, grid.anchors, heights), lanes, heights))
    scores = tusimple_scores(frames)
    assert scores["accuracy"] >= least and not scores["false_positive_rate"] and not scores["false_negative_rate"]


def test_lanes_go_to_their_slots_whatever_their_order():
    lanes = np.array([line(b) for b in (190, 30, 95, -60)], float)
    x, left_out = SMALL.slots(lanes, Y)
    assert np.array_equal(x, lanes[[3, 1, 2, 0]]) and left_out == 0
    x, left_out = SMALL.slots(np.array([line(b) for b in (300, 95, 190)], float), Y)
    assert (x[:2] == -2).all() and np.array_equal(x[2], line(95)) and np.array_equal(x[3], line(190)) and left_out == 1


def test_short_lanes_and_points_outside_have_no_slot():
    short = [-2] * 50 + [30, 30, 29, 29, 28, 28]  # 5 pixels of the 9 it needs
    beyond = [x if x < 0 or y < 60 else 128 for x, y in zip(line(95), HEIGHTS, strict=True)]
    x, left_out = SMALL.slots(np.array([short, beyond, [-2] * 56], float), Y)
    assert left_out == 1
    assert (x[[0, 1, 3]] == -2).all() and (x[2][Y >= 60] == -2).all() and (x[2][30:40] > 0).all()


def test_resampling():
    lanes, heights = np.array([[10.0, 20, -2, 40, 50]]), np.array([0.0, 10, 20, 30, 40])
    at = resample(lanes, heights, np.array([-5.0, 0, 5, 10, 15, 25, 30, 36, 40, 41]))
    assert at.tolist() == [[-2, 10, 15, 20, -2, -2, 40, 46, 50, -2]]
    assert np.array_equal(resample(lanes, heights, heights), lanes)


def test_extension_to_the_bottom():
    cut = np.array([line(30), line(30), [-2] * 56, line(-60)], float)
    cut[0, 40:] = -2
    out = SMALL.extend(cut)
    np.testing.assert_allclose(out[0, 40:], line(30)[40:], atol=1.5)
    assert np.array_equal(out[1:3], cut[1:3])
    assert np.array_equal(out[3] >= 0, cut[3] >= 0)  # it had reached the side


def test_impossible_grids():
    with pytest.raises(DualpruneError, match="even number"):
        Grid(lanes=5)
    with pytest.raises(DualpruneError, match="at least 2 cells"):
        Grid(cells=1)


# --- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", [Motion(0, 0, 0), Motion(0, 15, -6), Motion(6, 0, 0), Motion(-5, -12, 8)])
def test_a_moved_lane_lies_on_the_moved_picture(tmp_path, motion):
    write(tmp_path, "label_data.json", [label("a.png", [line(30)])])
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.array(motion.image(image.convert("L")), float)
    x = moved(np.array([line(30)], float), Y, motion, SMALL)[0]
    rows = np.flatnonzero(x >= 0)
    assert len(rows) > 20
    there, beside = ([pixels[round(SMALL.anchors[r]), min(127, round(x[r]) + by)] for r in rows] for by in (0, 8))
    assert np.mean(there) > 180 and np.mean(beside) < 80


def test_gaps_stay_gaps_when_lanes_are_moved():
    lanes = np.array([line(30), line(95), line(60)], float)
    lanes[0, 30:40], lanes[1, 29:] = -2, -2
    lanes[2, [20, 22, 30, 32]] = -2  # points on their own too
    same = moved(lanes, Y, Motion(0, 0, 0), SMALL)
    np.testing.assert_allclose(same, resample(lanes, Y, SMALL.anchors))
    assert ((same[0] >= 0) == (lanes[0] >= 0)).all()
    down = moved(lanes[:1], Y, Motion(0, 0, 3), SMALL)[0]
    assert (down[33:43] == -2).all() and (down[43:] >= 0).all() and (down[20:33] >= 0).all()


def test_moved_and_extended_lanes_of_the_real_labels_stay_in_the_frame():
    grid = Grid()
    for seed, (lanes, heights) in enumerate(real_frames()):
        motion = Motion.draw(np.random.default_rng(seed), grid.frame)
        assert abs(motion.angle) <= 6 and abs(motion.dx) <= 200 and abs(motion.dy) <= 100
        x = grid.extend(moved(grid.slots(lanes, heights)[0], heights, motion, grid))
        assert ((x == -2) | ((x >= 0) & (x <= 1279))).all() and (x >= 0).any(1).sum() >= 2


def test_masks_show_the_lanes():
    x, _ = SMALL.slots(np.array([line(b) for b in (-60, 30, 95, 190)], float), Y)
    mask = draw_mask(x, SMALL, (288, 512))
    assert mask.shape == (36, 64) and set(np.unique(mask)) == {0, 1, 2, 3, 4}
    row = mask[30]
    assert row[line(30)[60 - 16] // 2] == 2 and row[line(95)[60 - 16] // 2] == 3


# --- reading ---------------------------------------------------------------------------------------------------------


def test_reading(tmp_path):
    data = load_tusimple(root=toy(tmp_path), frame=SIZE)
    assert [len(frame.lanes) for frame in data.train] == [2, 3, 4, 5] and len(data.test) == 1
    assert data.train[1].lanes[1].tolist() == line(41) and data.train[0].heights.tolist() == HEIGHTS
    assert not data.counts and data.notes() == ""


def test_several_files_and_the_unpacked_folders(tmp_path, monkeypatch):
    top = tmp_path / "tusimple"
    for number in (1, 2):
        write(top / "train_set", f"label_data_{number}.json", [label(f"clips/{number}.png", [line(30)])])
    write(top, "test_label.json", [label("clips/3.png", [line(30)])], pictures=False)
    write(top / "test_set", "other.json", [label("clips/3.png", [line(30)])])
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path))
    data = load_tusimple()
    assert [frame.name for frame in data.train] == ["clips/1.png", "clips/2.png"]
    assert data.test[0].image == top / "test_set/clips/3.png"


def test_what_is_odd_is_counted(tmp_path):
    far = [x if x < 0 else 128 for x in line(90)]
    frames = [label("1.png", []), label("2.png", [[-2] * 56, far]), label("3.png", [line(30)], [y + 10 for y in HEIGHTS])]
    write(tmp_path, "label_data.json", frames)
    counts = load_tusimple(root=tmp_path, test="label_data.json").counts
    assert not counts["points beyond the frame's right edge"]  # of 1280 pixels
    frames += [label("4.png", [line(30)], [y - 20 for y in HEIGHTS])]
    write(tmp_path, "label_data.json", frames)
    counts = load_tusimple(root=tmp_path, frame=SIZE, test="label_data.json").counts
    each = {"frames without lanes": 1, "lanes without points": 1, "rows above the frame": 4, "rows below the frame": 10}
    points = sum(x > 0 for x in far)
    assert counts == {what: 2 * count for what, count in {**each, "points beyond the frame's right edge": points}.items()}


@pytest.mark.parametrize(
    "broken, message",
    [
        ('{"raw_file": "a.png", "lanes": [[1, 2]]', r"label_data.json:2: expected an object"),
        ('{"raw_file": "a.png", "lanes": []}', r":2: expected an object .*no 'h_samples'"),
        ("[1, 2]", r":2: expected an object"),
        (
            '{"raw_file": "a.png", "lanes": [[1, 2, 3]], "h_samples": [10, 20]}',
            r":2: lane 0 should be 2 .* got 3 entries",
        ),
        ('{"raw_file": "a.png", "lanes": [[1, "2"]], "h_samples": [10, 20]}', r":2: lane 0 should be 2 numbers"),
        ('{"raw_file": "a.png", "lanes": [[1, NaN]], "h_samples": [10, 20]}', r":2: lane 0 should be 2 numbers"),
        ('{"raw_file": "a.png", "lanes": [7], "h_samples": [10, 20]}', r":2: lane 0 .* got 7"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": []}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": [20, 10]}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": [1, NaN, 3]}', r":2: h_samples .* finite numbers, got \[1, nan, 3\]"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": [10, Infinity]}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": ["10", "20"]}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": [false, true]}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": [10, 10]}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": [], "h_samples": [[10, 20]]}', r":2: h_samples should be ascending"),
        ('{"raw_file": "a.png", "lanes": 5, "h_samples": [20]}', r":2: expected an object"),
    ],
)
def test_broken_labels_name_file_and_line(tmp_path, broken, message):
    toy(tmp_path, count=1)
    file = tmp_path / "label_data_0313.json"
    file = file.rename(tmp_path / "label_data.json")
    file.write_text(file.read_text() + broken + "\n")
    with pytest.raises(FormatError, match=message):
        load_tusimple(root=tmp_path, frame=SIZE)


def test_missing_images(tmp_path):
    toy(tmp_path)
    (tmp_path / "clips/2/20.jpg").unlink()
    with pytest.raises(DataNotFoundError, match=r"1 of 4 images are missing, the first is .*clips/2/20.jpg"):
        load_tusimple(root=tmp_path, frame=SIZE)
    with pytest.warns(UserWarning, match="1 of 4 frames of .* have no image and are left out"):
        data = load_tusimple(root=tmp_path, frame=SIZE, missing="skip")
    assert len(data.train) == 3 and data.notes() == "1 frames of label_data*.json without their image, left out"


def test_missing_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path / "a"))
    with pytest.raises(DataNotFoundError, match=r"no labels 'label_data\*.json' in .*a/tusimple, data/tusimple"):
        load_tusimple()
    toy(tmp_path)
    (tmp_path / "test_label.json").write_text("")
    with pytest.raises(DataNotFoundError, match="no label in it"):
        load_tusimple(root=tmp_path, frame=SIZE)
    (tmp_path / "test_label.json").unlink()
    with pytest.raises(DataNotFoundError, match="needs those of the test set too"):
        load_tusimple(root=tmp_path, frame=SIZE)


def test_damaged_images(tmp_path):
    samples = Samples(load_tusimple(root=toy(tmp_path), frame=SIZE).train, SMALL, (32, 64))
    whole = samples.frames[0].image.read_bytes()
    samples.frames[0].image.write_bytes(whole[: len(whole) // 2])
    samples.frames[1].image.write_bytes(b"no image")
    Image.new("RGB", (64, 36)).save(samples.frames[2].image)
    for index in (0, 1):
        with pytest.raises(FormatError, match="is not a readable image"):
            samples[index, None]
    with pytest.raises(FormatError, match=r"is 64×36 pixels, expected 128×72; .*frame = \[36, 64\]"):
        samples[2, None]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_samples(tmp_path):
    frame = load_tusimple(root=toy(tmp_path), frame=SIZE).train[2]
    image, cells, mask = Samples((frame,), SMALL, (32, 64), mask=True)[0, None]
    assert image.shape == (3, 32, 64) and image.dtype == torch.uint8 and mask.shape == (4, 8)
    x, _ = SMALL.slots(frame.lanes, frame.heights)
    assert np.array_equal(cells.numpy(), SMALL.encode(resample(x, frame.heights, SMALL.anchors)))
    assert (cells < 40).any(0).all()


def test_a_frame_without_lanes_has_no_lane_in_its_targets(tmp_path):
    write(tmp_path, "label_data.json", [label("a.png", [])])
    frame = load_tusimple(root=tmp_path, test="label_data.json", frame=SIZE).train[0]
    _, cells, mask = Samples((frame,), SMALL, (32, 64), mask=True)[0, (1, 2)]
    assert (cells == 40).all() and not mask.any()


def test_draws_are_a_pure_function():
    order = {"batch_size": 4, "seed": 3, "augment": True, "repeat": 3}
    epoch = train_draws(6, epoch=5, **order)
    assert epoch == train_draws(6, epoch=5, **order) != train_draws(6, epoch=6, **order)
    assert train_draws(6, epoch=5, start_step=2, **order) == epoch[2:]
    flat = [draw for draws in epoch for draw in draws]
    assert len(epoch) == 4 and len({seed for _, seed in flat}) == 16  # 18 frames, two left over
    assert sorted(index for index, _ in flat[:6]) == list(range(6))
    assert {seed for draws in train_draws(6, batch_size=2, seed=0, epoch=0, augment=False) for _, seed in draws} == {None}
    with pytest.raises(DualpruneError, match="start_step lies in 0…4"):
        train_draws(6, epoch=0, start_step=5, **order)
    with pytest.raises(DualpruneError, match="a batch of 13 needs as many"):
        steps_per_epoch(6, 13, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_batches_do_not_depend_on_the_workers_or_the_global_state(tmp_path):
    samples = Samples(load_tusimple(root=toy(tmp_path), frame=SIZE).train, SMALL, (32, 64), mask=True)
    draws = train_draws(4, batch_size=2, seed=0, epoch=0, augment=True)
    before = torch.get_rng_state()
    one, two = (list(batches(samples, draws, workers=workers, device=torch.device("cpu"))) for workers in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for (x, (cells, mask)), (u, (v, w)) in zip(one, two, strict=True):
        assert torch.equal(x, u) and torch.equal(cells, v) and torch.equal(mask, w)
    assert one[0][0].shape == (2, 3, 32, 64) and one[0][1][0].shape == (2, 56, 4)


def test_normalisation(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", SIZE[::-1], (255, 0, 51)).save(path)
    frame = Frame("a.png", path, np.zeros((0, 56)), Y)
    [(x, _)] = batches(Samples((frame,), SMALL, (32, 64)), [[(0, None)]], workers=0, device=torch.device("cpu"))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    assert x[0, :, 3, 3].tolist() == pytest.approx(expected, abs=1e-6)


def test_holding_out(tmp_path):
    data = load_tusimple(root=toy(tmp_path), frame=SIZE)
    held = data.hold_out(0.5, seed=0)
    names = [[frame.name for frame in part] for part in (held.train, held.test)]
    assert len(names[0]) == len(names[1]) == 2 and sorted([*names[0], *names[1]]) == [f"clips/{i}/20.jpg" for i in range(4)]
    assert len(data.hold_out(0.01, seed=0).test) == 1
    with pytest.raises(DualpruneError, match="leaves none"):
        data.hold_out(0.9, seed=0)


def test_json_numbers_may_be_floats(tmp_path):
    one = label("a.png", [[float(x) for x in line(30)]])
    write(tmp_path, "label_data.json", [one])
    assert json.loads((tmp_path / "label_data.json").read_text()) == one
    assert load_tusimple(root=tmp_path, test="label_data.json", frame=SIZE).train[0].lanes.tolist() == one["lanes"]
