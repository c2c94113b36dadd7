import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.classification import imagenet
from dualprune.tasks.classification.data import (
    ArrayDataset,
    FolderDataset,
    calibration_batches,
    eval_batches,
    split_validation,
    steps_per_epoch,
    train_batches,
)
from dualprune.tasks.classification.draws import stratified
from dualprune.tasks.classification.sources import load_data
from helpers import TINY_RECIPE

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
REAL = os.environ.get("DUALPRUNE_DATA")


def arrays(n, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)


@pytest.fixture(scope="module")
def toy():
    """100 training and 30 test images of 3×32×32; the first pixel of a training image is its number."""
    x, y = arrays(130, (3, 32, 32))
    x, y = torch.from_numpy(x), torch.from_numpy(y).long()
    x[:100, 0, 0, 0] = torch.arange(100, dtype=torch.uint8)
    return ArrayDataset("toy", x[:100], y[:100], x[100:], y[100:], 10, MEAN, STD, "crop-flip")


def numbers(batches):
    """Which training images are in unaugmented batches."""
    return torch.cat([(x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255 for x, _ in batches]).round().int().tolist()


def equal(a, b):
    a, b = list(a), list(b)
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No data set of this machine is seen by accident."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUALPRUNE_DATA", raising=False)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip", "shift", "shift-1"])
def test_an_epoch_can_be_entered_anywhere(toy, augment):
    whole = list(train_batches(toy, batch_size=16, seed=3, epoch=2, augment=augment))
    assert len(whole) == 6 == steps_per_epoch(toy, 16)
    torch.rand(7)  # the global generator has no say
    for start in (0, 1, 5, 6):
        rest = train_batches(toy, batch_size=16, seed=3, epoch=2, augment=augment, start_step=start)
        assert equal(rest, whole[start:])


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_the_global_random_state_is_left_alone(toy, augment):
    before = torch.get_rng_state()
    list(train_batches(toy, batch_size=16, seed=0, epoch=0, augment=augment))
    list(calibration_batches(toy, 50))
    split_validation(toy, 0.2, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_image_comes_once_in_an_order_of_its_own(toy):
    def order(seed, epoch):
        return numbers(train_batches(toy, batch_size=10, seed=seed, epoch=epoch))

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len({tuple(o) for o in orders}) == 3


def test_left_over_images_are_dropped_and_labels_belong(toy):
    batches = list(train_batches(toy, batch_size=30, seed=0, epoch=0))
    assert [len(x) for x, _ in batches] == [30, 30, 30]
    assert torch.equal(torch.cat([y for _, y in batches]), torch.tensor(numbers(batches)) % 10)


def test_images_are_normalised_float32(toy):
    (x, y), *_ = eval_batches(toy, batch_size=30)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(x, (toy.x_test / 255 - mean) / std)
    assert x.dtype == torch.float32 and torch.equal(y, toy.y_test)


def test_evaluation_has_all_images_in_order(toy):
    batches = list(eval_batches(toy, batch_size=40, split="train"))
    assert [len(x) for x, _ in batches] == [40, 40, 20]
    assert numbers(batches) == list(range(100))
    assert numbers(eval_batches(toy, split="train", indices=torch.tensor([5, 2]))) == [5, 2]


def test_channels_last(toy):
    for batches in (
        train_batches(toy, batch_size=8, seed=0, epoch=0, augment="crop-flip", memory_format=torch.channels_last),
        eval_batches(toy, memory_format=torch.channels_last),
        calibration_batches(toy, memory_format=torch.channels_last),
    ):
        assert next(batches)[0].is_contiguous(memory_format=torch.channels_last)


def crops(x, reach, mirrors, border=(0.0, 0.0, 0.0)):
    """Every image that the augmentation can make of a normalised one."""
    padded = torch.stack([torch.nn.functional.pad(c, (reach,) * 4, value=float(b)) for c, b in zip(x, border, strict=True)])
    sources = [padded, padded.flip(-1)] if mirrors else [padded]
    side = x.shape[-1]
    reaches = range(2 * reach + 1)
    return [s[:, i : i + side, j : j + side] for s in sources for i in reaches for j in reaches]


@pytest.mark.parametrize(
    ("augment", "reach", "mirrors"), [("flip", 0, True), ("crop-flip", 4, True), ("shift", 2, False), ("shift-1", 1, False)]
)
def test_augmented_images_are_crops_of_the_padded_normalised_image(toy, augment, reach, mirrors):
    first = torch.zeros(100, dtype=torch.long)
    indices = torch.arange(1)
    clean = next(eval_batches(toy, split="train", indices=indices))[0][0]
    dark = ArrayDataset("dark", torch.zeros_like(toy.x_train), toy.y_train, toy.x_test, toy.y_test, 10, MEAN, STD)
    black = next(eval_batches(dark, split="train"))[0][0, :, 0, 0]
    possible = crops(clean, reach, mirrors, (0.0,) * 3 if mirrors else black)  # digits are shifted on black
    made = set()
    data = ArrayDataset("one", toy.x_train[first], toy.y_train[first], toy.x_test, toy.y_test, 10, MEAN, STD)
    for epoch in range(8):
        for x, _ in train_batches(data, batch_size=100, seed=0, epoch=epoch, augment=augment):
            for image in x:
                hits = [k for k, crop in enumerate(possible) if torch.equal(crop, image)]
                assert hits
                made.add(hits[0])
    # 800 draws of at most 162 images: all of them but for bad luck
    assert len(made) >= 0.95 * len(possible)


def test_half_of_the_images_are_mirrored(toy):
    batches = train_batches(toy, batch_size=100, seed=0, epoch=0, augment="flip")
    clean = dict(zip(numbers(eval_batches(toy, split="train")), next(eval_batches(toy, split="train"))[0], strict=True))
    x = next(batches)[0]
    upright = sum(any(torch.equal(image, other) for other in clean.values()) for image in x)
    assert 30 <= upright <= 70


def test_true_is_the_usual_augmentation(toy):
    def batches(augment):
        return train_batches(toy, batch_size=16, seed=0, epoch=0, augment=augment)

    assert equal(batches(True), batches("crop-flip"))
    assert equal(batches(False), batches("none"))


def test_training_on_a_part(toy):
    part = torch.arange(40, 60)
    assert sorted(numbers(train_batches(toy, batch_size=10, seed=0, epoch=0, indices=part))) == part.tolist()


def test_calibration_is_deterministic_and_even(toy):
    batches = list(calibration_batches(toy, 70, batch_size=32))
    assert [len(x) for x, _ in batches] == [24, 23, 23]
    assert len(set(numbers(batches))) == 70
    assert equal(batches, calibration_batches(toy, 70, batch_size=32))
    assert not equal(batches, calibration_batches(toy, 70, batch_size=32, seed=1))
    assert sorted(numbers(calibration_batches(toy, 4096))) == list(range(100))
    moved = list(calibration_batches(toy, 70, batch_size=32, augment="shift"))
    assert not equal(batches, moved)
    assert equal(moved, calibration_batches(toy, 70, batch_size=32, augment="shift"))


def test_validation_is_held_out_of_training(toy):
    data = split_validation(toy, 0.2, seed=5)
    train, held = (numbers(eval_batches(data, split=split)) for split in ("train", "test"))
    assert len(held) == 20 and sorted(train + held) == list(range(100))
    assert data.y_test.bincount().tolist() == [2] * 10
    assert data.name == "toy-validation"
    assert numbers(eval_batches(split_validation(toy, 0.2, seed=5))) == held
    assert numbers(eval_batches(split_validation(toy, 0.2, seed=6))) != held


@pytest.mark.parametrize("n", [1, 7, 50, 99])
def test_stratified_draw_has_the_exact_size_and_even_classes(n):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    held = stratified(labels, n / 100, 0)
    assert len(held.unique()) == n
    shares = labels[held].bincount(minlength=3) - n / 100 * labels.bincount()
    assert shares.abs().max() < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: train_batches(d, batch_size=101, seed=0, epoch=0), "a batch of 101 needs as many"),
        (lambda d: train_batches(d, batch_size=0, seed=0, epoch=0), "batch_size is at least 1, got 0"),
        (lambda d: train_batches(d, batch_size=10, seed=0, epoch=0, start_step=11), "start_step lies in 0…10"),
        (lambda d: train_batches(d, batch_size=10, seed=0, epoch=0, augment="crop"), "augment is one of none, flip"),
        (lambda d: eval_batches(d, batch_size=0), "batch_size is at least 1, got 0"),
        (lambda d: eval_batches(d, indices=torch.tensor([30])), "indices lie in 0…29, got 30…30"),
        (lambda d: eval_batches(d, indices=torch.tensor([True])), "indices are a list of int64"),
        (lambda d: calibration_batches(d, 0), "n is at least 1, got 0"),
        (lambda d: split_validation(d, 0.0), "between 0 and 1"),
        (lambda d: split_validation(d, float("nan")), "between 0 and 1"),
        (lambda d: split_validation(d, 1.0), "between 0 and 1"),
    ],
)
def test_impossible_batches_are_refused_at_the_call(toy, call, message):
    with pytest.raises(DualpruneError, match=re.escape(message)):
        call(toy)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("x_train", torch.zeros(100, 3, 32, 32), "uint8 (n, channels, height, width), got float32"),
        ("y_train", torch.zeros(99, dtype=torch.long), "one for each of 100 images, got int64 (99,)"),
        ("y_test", torch.full((30,), 10), "should lie in 0…9, got 10…10"),
        ("y_test", torch.full((30,), -1), "should lie in 0…9, got -1…-1"),
        ("x_test", torch.zeros(30, 3, 8, 8, dtype=torch.uint8), "differ in shape"),
        ("mean", (0.5,), "mean and std > 0 for 3 channels"),
        ("std", (0.0, 1.0, 1.0), "mean and std > 0"),
    ],
)
def test_array_data_sets_are_checked(toy, field, value, message):
    fields = {key: getattr(toy, key) for key in toy.__dataclass_fields__} | {field: value}
    with pytest.raises(DualpruneError, match=re.escape(message)):
        ArrayDataset(**fields)


# --- finding and reading ---------------------------------------------------------------------------------------------


def write_npz(path, shape=(32, 32, 3), **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    (x, y), (u, v) = arrays(20, shape), arrays(10, shape, 1)
    parts = {"x_train": x, "y_train": y, "x_test": u, "y_test": v} | changes
    np.savez(path, **{key: value for key, value in parts.items() if value is not None})
    return x, y


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, suffix="", pattern="{}-{}-ubyte"):
    folder.mkdir(parents=True, exist_ok=True)
    (x, y), (u, v) = arrays(20, (28, 28)), arrays(10, (28, 28), 1)
    pack = gzip.compress if suffix else bytes
    for stem, kind, array in [
        ("train-images", "idx3", x),
        ("train-labels", "idx1", y),
        ("t10k-images", "idx3", u),
        ("t10k-labels", "idx1", v),
    ]:
        (folder / (pattern.format(stem, kind) + suffix)).write_bytes(pack(idx(array)))
    return x, y


def test_digits():
    pytest.importorskip("sklearn")
    data = load_data("digits")
    assert data.x_train.shape == (1348, 1, 8, 8) and data.x_test.shape == (449, 1, 8, 8)
    assert data.y_test.bincount().min() >= 43
    everything = torch.cat([data.x_train, data.x_test]).float() / 255
    assert everything.mean().item() == pytest.approx(data.mean[0], abs=1e-3)
    assert everything.std().item() == pytest.approx(data.std[0], abs=1e-3)
    assert torch.equal(load_data("digits").x_test, data.x_test)
    assert not torch.equal(load_data("digits", seed=1).x_test, data.x_test)
    with pytest.raises(DualpruneError, match="have no root"):
        load_data("digits", root="here")


@pytest.mark.parametrize("place", ["file", "folder", "environment", "default"])
def test_npz_is_found(tmp_path, monkeypatch, place):
    file = tmp_path / ("data" if place == "default" else "somewhere") / "cifar10.npz"
    x, y = write_npz(file)
    if place == "environment":
        monkeypatch.setenv("DUALPRUNE_DATA", os.pathsep.join([str(tmp_path / "nothing"), str(file.parent)]))
    data = load_data("cifar10", root={"file": file, "folder": file.parent}.get(place))
    assert torch.equal(data.x_train, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert data.y_train.dtype == torch.int64 and data.y_train.tolist() == y.tolist()
    assert data.source.endswith("cifar10.npz") and data.mean == (0.485, 0.456, 0.406)


def test_npz_with_a_column_of_labels_and_other_statistics(tmp_path):
    write_npz(tmp_path / "cifar10.npz", y_train=np.arange(20).reshape(-1, 1) % 10)
    data = load_data("cifar10", root=tmp_path, mean=MEAN, std=STD)
    assert data.y_train.shape == (20,) and (data.mean, data.std) == (MEAN, STD)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", [True, False])
def test_idx_files_as_torchvision_and_others_leave_them(tmp_path, name, suffix, inside):
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    x, y = write_idx(tmp_path / folder / "raw" if inside else tmp_path, suffix)
    data = load_data(name, root=tmp_path)
    assert torch.equal(data.x_train[:, 0], torch.from_numpy(x)) and data.y_train.tolist() == y.tolist()
    assert data.x_test.shape == (10, 1, 28, 28)


def test_idx_files_with_a_dot(tmp_path):
    write_idx(tmp_path, pattern="{}.{}-ubyte")
    assert len(load_data("mnist", root=tmp_path).y_train) == 20


def test_torchvision_reads_what_we_read(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write_idx(tmp_path / "MNIST" / "raw")
    theirs = datasets.MNIST(tmp_path, train=True, download=False)
    ours = load_data("mnist", root=tmp_path)
    assert torch.equal(ours.x_train[:, 0], theirs.data) and torch.equal(ours.y_train, theirs.targets)


@pytest.fixture
def batches_py(tmp_path, monkeypatch):
    """A folder as torchvision leaves CIFAR-10, whose digests torchvision is told."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "there" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    digests = []
    x, y = arrays(60, (3072,))
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]):
        part = slice(10 * i, 10 * i + 10)
        content = {"label_names": list("abcdefghij")} if i == 6 else {"data": x[part], "labels": y[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
        digests.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    monkeypatch.setattr(datasets.CIFAR10, "train_list", digests[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", digests[5:6])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digests[6][1]})
    return folder, torch.from_numpy(x).view(-1, 3, 32, 32)


@pytest.mark.parametrize("up", [True, False])
def test_cifar10_as_torchvision_leaves_it(batches_py, up):
    folder, x = batches_py
    data = load_data("cifar10", root=folder.parent if up else folder)
    assert torch.equal(data.x_train, x[:50]) and torch.equal(data.x_test, x[50:])


def test_a_tampered_cifar10_is_never_unpickled(batches_py):
    folder, _ = batches_py
    (folder / "data_batch_3").write_bytes(b"cos\nsystem\n(S'touch run_by_pickle'\ntR.")
    with pytest.raises(FormatError, match="incomplete or damaged"):
        load_data("cifar10", root=folder)
    assert not os.path.exists("run_by_pickle")  # noqa: PTH110


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "expected arrays x_train, y_train, x_test, y_test, it has x_train, y_train, x_test"),
        ({"x_train": np.zeros((20, 3, 32, 32), np.uint8)}, "x_train should be uint8 of shape (n, 32, 32, 3)"),
        ({"x_test": np.zeros((10, 32, 32, 3))}, "x_test should be uint8 of shape (n, 32, 32, 3), got float64"),
        ({"y_train": np.zeros(20)}, "y_train should be whole numbers of shape (n,), got float64"),
        ({"y_train": np.zeros((20, 10), int)}, "y_train should be whole numbers of shape (n,), got int64 (20, 10)"),
        ({"y_train": np.zeros(19, int)}, "train labels should be int64, one for each of 20 images"),
        ({"y_train": np.full(20, 10)}, "train labels should lie in 0…9, got 10…10"),
        ({"y_test": np.array([None] * 10)}, "is damaged: Object arrays cannot be loaded"),
        ({"x_train": np.zeros((0, 32, 32, 3), np.uint8), "y_train": np.zeros(0, int)}, "one for each of 0 images"),
    ],
)
def test_unfit_npz(tmp_path, changes, message):
    write_npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(DualpruneError, match=re.escape(message)) as caught:
        load_data("cifar10", root=tmp_path)
    assert "cifar10.npz" in str(caught.value)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_npz(tmp_path, keep):
    file = tmp_path / "cifar10.npz"
    write_npz(file)
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(FormatError, match=r"not a whole .npz archive"):
        load_data("cifar10", root=tmp_path)


def test_damaged_npz(tmp_path):
    file = tmp_path / "cifar10.npz"
    write_npz(file)
    content = bytearray(file.read_bytes())
    content[1000] ^= 255
    file.write_bytes(content)
    with pytest.raises(FormatError, match="is damaged: Bad CRC-32"):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "is truncated: (20, 28, 28) needs 15696 bytes, it has 15695"),
        (lambda b: b + b"\0", "is too long"),
        (lambda b: b[:9], "not an idx file"),
        (lambda b: b"", "not an idx file of unsigned bytes; it begins with nothing"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "it begins with 00000d03"),
        (lambda b: gzip.compress(b)[:-9], "is a damaged gzip file"),
        (lambda b: b[:4] + b"\xff" * 12, "is truncated"),
    ],
)
def test_unfit_idx(tmp_path, change, message):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(FormatError, match=re.escape(message)):
        load_data("mnist", root=tmp_path)


def test_incomplete_idx_folder(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FormatError, match=r"but not t10k-labels-idx1-ubyte\[.gz\]"):
        load_data("mnist", root=tmp_path)


def test_missing_data_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataNotFoundError) as caught:
        load_data("cifar10")
    message = str(caught.value)
    for part in (
        str(tmp_path / "mine" / "cifar10.npz"),
        str(tmp_path / "mine" / "cifar-10-batches-py"),
        "data/cifar10.npz",
        "torchvision.datasets.CIFAR10('data', download=True)",
        "download=true",
        "DUALPRUNE_DATA",
    ):
        assert part in message
    with pytest.raises(DataNotFoundError) as caught:
        load_data("mnist", root="nowhere")
    assert "nowhere/MNIST/raw" in str(caught.value) and "mine" not in str(caught.value)


def test_download_goes_through_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    asked = []

    def fetch(folder, download):
        asked.append((folder, download))
        write_idx(folder / "MNIST" / "raw", ".gz")

    monkeypatch.setattr(datasets, "MNIST", fetch)
    assert len(load_data("mnist", root=tmp_path, download=True).y_train) == 20
    load_data("mnist", root=tmp_path, download=True)
    assert asked == [(tmp_path, True)]

    def offline(folder, download):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(DualpruneError, match=r"could not download CIFAR10 into .*: no route to host"):
        load_data("cifar10", root=tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar", {}, "no data set 'cifar', did you mean 'cifar10'"),
        ("cifar10", {"dowload": True}, "has no option 'dowload', did you mean 'download'"),
        ("digits", {"test_fraction": 2}, "between 0 and 1"),
    ],
)
def test_impossible_data(name, options, message):
    with pytest.raises(DualpruneError, match=re.escape(message)):
        load_data(name, **options)


# --- image folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    for split, classes in (("train", "abc"), ("val", "bc")):
        for label, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(4):
                pixels = arrays(1, (40, 48, 3), 10 * label + k)[0][0]
                image.fromarray(pixels).save(tmp_path / split / name / f"{k}.png")
    return tmp_path


def test_image_folder(folder):
    data = load_data("imagefolder", root=folder, image_size=16, workers=0)
    assert (data.num_classes, data.image_shape) == (3, (3, 16, 16))
    assert data.labels("train").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # val has no class a, its labels are still those of train
    assert data.labels("test").tolist() == [1] * 4 + [2] * 4
    (x, y), (rest, _) = eval_batches(data, batch_size=5, memory_format=torch.channels_last)
    assert x.shape == (5, 3, 16, 16) and x.dtype == torch.float32 and len(rest) == 3
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.tolist() == [1, 1, 1, 1, 2]
    held = split_validation(data, 0.25)
    assert held.labels("test").tolist() == [0, 1, 2] and len(held.labels("train")) == 9
    assert not set(held.train) & set(held.test)
    assert sum(len(x) for x, _ in calibration_batches(held)) == 9


# a fork of a process with threads is what the loader does by default
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # a machine with one core
def test_image_folder_batches_do_not_depend_on_the_workers(folder, augment):
    before = torch.get_rng_state()

    def epoch(workers, start_step=0):
        data = load_data("imagefolder", root=folder, image_size=16, workers=workers)
        settings = {"batch_size": 4, "seed": 1, "epoch": 2, "augment": augment}
        return list(train_batches(data, start_step=start_step, **settings))

    alone = epoch(0)
    assert equal(epoch(2 if augment == "crop-flip" else 0), alone)
    assert equal(epoch(0, start_step=2), alone[2:])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("crop", "interpolation"), [(0.875, "bilinear"), (0.8, "bicubic")])
def test_images_of_folders_are_resized_as_asked(folder, crop, interpolation):
    image = pytest.importorskip("PIL.Image")
    options = {} if crop == 0.875 else {"crop": crop, "interpolation": interpolation}
    data = load_data("imagefolder", root=folder, image_size=16, workers=0, mean=[0, 0, 0], std=[1, 1, 1], **options)
    (x, _) = next(eval_batches(data, batch_size=1))
    how = image.Resampling[interpolation.upper()]
    with image.open(folder / "val" / "b" / "0.png") as original:  # 40 rows, 48 columns
        side = {0.875: 18, 0.8: 20}[crop]
        pixels = np.asarray(original.convert("RGB").resize((side * 48 // 40, side), how))
    top, left = (side - 16) // 2, round((side * 48 // 40 - 16) / 2)
    cut = torch.from_numpy(pixels[top : top + 16, left : left + 16].copy()).permute(2, 0, 1)
    assert torch.equal((x[0] * 255).round().byte(), cut)


def test_random_crops_of_folders_are_resized_as_asked(folder):
    def first(**options):
        data = load_data("imagefolder", root=folder, image_size=16, workers=0, **options)
        return next(train_batches(data, batch_size=4, seed=0, epoch=0, augment=True))[0]

    assert not torch.equal(first(), first(interpolation="bicubic"))
    assert torch.equal(first(), first(crop=0.5, interpolation="bilinear"))
    with pytest.raises(DualpruneError, match=r"crop is the share .* in \(0, 1\], got 224"):
        first(crop=224)
    with pytest.raises(DualpruneError, match="bilinear or bicubic, got 'bicubik', did you mean 'bicubic'"):
        first(interpolation="bicubik")


def test_unfit_image_folders(folder, tmp_path):
    with pytest.raises(DataNotFoundError, match="nowhere/train, nowhere/val"):
        load_data("imagefolder", root="nowhere")
    (folder / "val" / "b" / "0.png").write_bytes(b"no image")
    data = load_data("imagefolder", root=folder, image_size=16, workers=0)
    with pytest.raises(FormatError, match=r"b/0.png is not a readable image"):
        list(eval_batches(data))
    with pytest.raises(DualpruneError, match="'shift' is for digits"):
        list(train_batches(data, batch_size=2, seed=0, epoch=0, augment="shift"))
    (folder / "val" / "d").mkdir()
    (folder / "val" / "d" / "0.png").write_bytes(b"")
    with pytest.raises(DualpruneError, match=r"has classes that .*train has not: d"):
        load_data("imagefolder", root=folder)


def test_image_folders_of_some_of_imagenets_classes(folder):
    for split in ("train", "val"):
        for old, wnid in zip("abc", WNIDS, strict=True):
            if (folder / split / old).is_dir():
                (folder / split / old).rename(folder / split / wnid)
    data = load_data("imagefolder", root=folder, image_size=16, workers=0, classes="imagenet")
    assert data.num_classes == 1000 and [data.classes[i] for i in PLACES] == list(WNIDS)
    assert data.labels("train").tolist() == [i for i in PLACES for _ in range(4)]
    assert data.labels("test").tolist() == [i for i in PLACES[1:] for _ in range(4)]
    assert next(eval_batches(data))[1].tolist() == data.labels("test").tolist()
    (folder / "train" / "n99999999").mkdir()
    with pytest.raises(FormatError, match="n99999999"):  # an empty class
        load_data("imagefolder", root=folder, classes="imagenet")
    (folder / "train" / WNIDS[0] / "0.png").rename(folder / "train" / "n99999999" / "0.png")
    with pytest.raises(DualpruneError, match=r"1 of 4 classes are none of ImageNet's 1,000 wnids .*n99999999"):
        load_data("imagefolder", root=folder, classes="imagenet")
    with pytest.raises(DualpruneError, match="classes is 'imagenet', or left out"):
        load_data("imagefolder", root=folder, classes="imagnet")


# --- subsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_a_subset_is_seeded_and_stratified(tmp_path, name):
    shape = (32, 32, 3) if name == "cifar10" else (28, 28)
    write_npz(tmp_path / f"{name}.npz", shape)
    whole, part = load_data(name, root=tmp_path), load_data(name, root=tmp_path, subset=10)
    assert part.y_train.tolist() != sorted(part.y_train.tolist())  # the order of the files
    assert sorted(part.y_train.tolist()) == list(range(10))  # of each class one
    where = [(whole.x_train == x).flatten(1).all(1).nonzero().item() for x in part.x_train]
    assert where == sorted(where) and whole.y_train[where].tolist() == part.y_train.tolist()
    assert torch.equal(part.x_test, whole.x_test)
    assert torch.equal(load_data(name, root=tmp_path, subset=10, seed=0).x_train, part.x_train)
    assert not torch.equal(load_data(name, root=tmp_path, subset=10, seed=1).x_train, part.x_train)
    assert torch.equal(load_data(name, root=tmp_path, subset=20).x_train, whole.x_train)


def test_a_subset_of_the_digits():
    pytest.importorskip("sklearn")
    part = load_data("digits", subset=100)
    assert len(part.y_train) == 100 and len(part.y_test) == 449
    assert part.y_train.bincount().tolist() == pytest.approx([10] * 10, abs=1)


@pytest.mark.parametrize("count", [0, 21])
def test_impossible_subsets(tmp_path, count):
    write_npz(tmp_path / "cifar10.npz")
    with pytest.raises(DualpruneError, match=rf"subset is how many of the 20 training images to take, got {count}"):
        load_data("cifar10", root=tmp_path, subset=count)


# --- ImageNet's images in memory -------------------------------------------------------------------------------------

WNIDS = ("n01443537", "n02123045", "n07871810")
PLACES = [1, 281, 962]


def picture(seed, size=(12, 10), kind="JPEG"):
    """An encoded image of one colour, which is its seed."""
    image = pytest.importorskip("PIL.Image")
    content = io.BytesIO()
    image.new("RGB", size, (seed, seed, seed)).save(content, kind)
    return content.getvalue()


def tiny(top, *, zipped, train=WNIDS[:2], val=WNIDS, each=5):
    """Write the sample's layout, 5 training and 2 validation images a class; an image's colour is its number."""
    files = {f"train/{wnid}/{wnid}_{k}.JPEG": 10 * c + k for c, wnid in enumerate(train) for k in range(each)}
    tests = {f"val/{wnid}/val_{10 * c + k}.JPEG": 100 + 10 * c + k for c, wnid in enumerate(val) for k in range(2)}
    top.mkdir(parents=True, exist_ok=True)
    if zipped:
        for archive, members in (("train2cls.zip", files), ("val3cls.zip", tests)):
            with zipfile.ZipFile(top / archive, "w") as file:
                for name, colour in members.items():
                    file.writestr(name, picture(colour))
                file.writestr("__MACOSX/train/._x.JPEG", b"junk")
    else:
        for name, colour in (files | tests).items():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_bytes(picture(colour))
    return top


def colours(x):
    return x.float().mean((1, 2, 3)).round().int().tolist()


@pytest.mark.parametrize("zipped", [True, False])
def test_tiny_imagenet_has_the_training_classes_under_imagenets_labels(tmp_path, monkeypatch, zipped):
    tiny(tmp_path / "tinyimagenet", zipped=zipped)
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path))
    data = load_data("tinyimagenet", image_size=6)
    assert (data.num_classes, data.image_shape, data.x_train.dtype) == (1000, (3, 6, 6), torch.uint8)
    assert data.y_train.tolist() == [PLACES[0]] * 5 + [PLACES[1]] * 5
    assert colours(data.x_train) == pytest.approx([*range(5), *range(10, 15)], abs=1)
    # the third class has no training images
    assert data.y_test.tolist() == [PLACES[0]] * 2 + [PLACES[1]] * 2
    assert colours(data.x_test) == pytest.approx([100, 101, 110, 111], abs=1)
    part = load_data("tinyimagenet", root=tmp_path / "tinyimagenet", image_size=6, subset=4, mean=MEAN, std=STD)
    assert part.y_train.bincount()[PLACES[:2]].tolist() == [2, 2] and part.mean == MEAN
    chosen = [data.x_train.eq(x).flatten(1).all(1).any().item() for x in part.x_train]
    assert all(chosen) and len(part.y_test) == 4


def test_tiny_imagenet_as_it_is_published(tmp_path):
    top = tiny(tmp_path / "tiny-imagenet-200", zipped=False)
    (top / "val" / "images").mkdir()
    notes = []
    for file in sorted((top / "val").glob("n*/*.JPEG")):
        notes.append(f"{file.name}\t{file.parent.name}\t0\t0\t62\t62")
        file.rename(top / "val" / "images" / file.name)
    (top / "val" / "val_annotations.txt").write_text("\n".join(notes))
    data = load_data("tinyimagenet", root=tmp_path, image_size=6)
    assert data.y_test.tolist() == [PLACES[0]] * 2 + [PLACES[1]] * 2
    assert colours(data.x_test) == pytest.approx([100, 101, 110, 111], abs=1)
    (top / "val" / "images" / "val_99.JPEG").write_bytes(picture(0))
    with pytest.raises(FormatError, match=r"val_99.JPEG lies in no folder named after a wnid"):
        load_data("tinyimagenet", root=tmp_path)


def test_the_middle_square_is_scaled():
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    content = io.BytesIO()
    image.fromarray(pixels).save(content, "PNG")
    square = imagenet._square(lambda path: content.getvalue(), "here", "a.png", 10)
    assert square.shape == (10, 10, 3) and (square == 200).all()


def test_unfit_tiny_imagenets(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"looked in data/tinyimagenet, data/tiny-imagenet-200, data"):
        load_data("tinyimagenet")
    top = tiny(tmp_path / "tinyimagenet", zipped=True, train=(WNIDS[0], "n99999999"))
    with pytest.raises(DualpruneError, match=r"train2cls.zip: 1 of 2 classes are none of ImageNet's 1,000 wnids .*n99999999"):
        load_data("tinyimagenet", root=top)
    tiny(top, zipped=True, val=WNIDS[2:])
    with pytest.raises(DualpruneError, match=r"val3cls.zip has no image of the 2 classes n01443537, n02123045"):
        load_data("tinyimagenet", root=top)
    (top / "val4cls.zip").write_bytes(b"PK")
    with pytest.raises(DualpruneError, match=r"2 archives val\*.zip, expected one"):
        load_data("tinyimagenet", root=top)
    (top / "val3cls.zip").unlink()
    with pytest.raises(FormatError, match=r"val4cls.zip is not a whole zip archive"):
        load_data("tinyimagenet", root=top)
    (top / "val4cls.zip").unlink()
    with pytest.raises(DataNotFoundError, match="validation images"):
        load_data("tinyimagenet", root=top)
    (top / "val").mkdir()
    with pytest.raises(FormatError, match="val holds no image"):
        load_data("tinyimagenet", root=top)


def test_truncated_images_are_named(tmp_path):
    top = tiny(tmp_path, zipped=False)
    file = top / "train" / WNIDS[1] / f"{WNIDS[1]}_3.JPEG"
    whole = picture(3, (40, 40))
    for keep in (0, 30, len(whole) // 2, len(whole) - 20):
        file.write_bytes(whole[:keep])
        with pytest.raises(FormatError, match=r"train: n02123045/n02123045_3.JPEG is not a readable image"):
            load_data("tinyimagenet", root=top, image_size=6)


def test_imagenet_sample_is_for_measuring_only(tmp_path, monkeypatch):
    place = tmp_path / "imagenet1k_sample"
    place.mkdir()
    for i, wnid in enumerate(WNIDS):
        (place / f"{wnid}.jpg").write_bytes(picture(50 + i))
    monkeypatch.setenv("DUALPRUNE_DATA", str(tmp_path))
    data = load_data("imagenet-sample", image_size=8)
    assert (data.num_classes, data.image_shape) == (1000, (3, 8, 8))
    assert data.y_test.tolist() == PLACES and colours(data.x_test) == pytest.approx([50, 51, 52], abs=1)
    assert len(next(eval_batches(data))[0]) == 3
    with pytest.raises(DualpruneError, match="a batch of 2 needs as many training images, there are 0"):
        train_batches(data, batch_size=2, seed=0, epoch=0)
    with pytest.raises(DualpruneError, match="imagenet-sample is for measuring only"):
        calibration_batches(data)
    (place / "holiday.jpg").write_bytes(picture(1))
    with pytest.raises(FormatError, match=r"holiday.jpg lies in no folder named after a wnid"):
        load_data("imagenet-sample")
    with pytest.raises(DataNotFoundError, match="looked for nowhere; give root"):
        load_data("imagenet-sample", root="nowhere")


def test_the_thousand_wnids_are_sorted_and_timms():
    names = imagenet.wnids()
    assert len(set(names)) == 1000 and list(names) == sorted(names)
    timm = pytest.importorskip("timm")
    assert list(names) == timm.data.ImageNetInfo().label_names()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "test"), [("tinyimagenet", 400, 1000), ("imagenet-sample", 0, 1000), ("fashion-mnist", 400, 10_000)]
)
def test_the_real_files(monkeypatch, name, train, test):
    if REAL is None:
        pytest.skip("needs DUALPRUNE_DATA")
    monkeypatch.setenv("DUALPRUNE_DATA", REAL)
    options = {"subset": 400} if train else {"image_size": 32}
    try:
        data = load_data(name, **options)
    except DataNotFoundError:
        pytest.skip(f"no {name} here")
    assert (len(data.y_train), len(data.y_test)) == (train, test)
    if name == "tinyimagenet":
        assert data.y_train.unique().tolist() == data.y_test.unique().tolist()
        assert data.y_test.bincount().unique().tolist() == [0, 50] and data.y_train.bincount().unique().tolist() == [0, 20]
    if name == "imagenet-sample":
        assert data.y_test.tolist() == list(range(1000))


# --- values of the wrong kind, and models that do not fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digits", {"test_fraction": "0.2"}, "digits: option test_fraction: input should be a valid number, got '0.2'"),
        ("cifar10", {"subset": True}, "cifar10: option subset: input should be a valid integer, got True"),
        ("cifar10", {"mean": 0.5}, "cifar10: option mean: input should be .*, got 0.5"),
        ("imagefolder", {"image_size": "32"}, "imagefolder: option image_size: input should be a valid integer, got '32'"),
        ("imagefolder", {"crop": "x"}, "imagefolder: option crop: input should be a valid number, got 'x'"),
    ],
)
def test_an_option_of_another_type_is_explained(name, options, said):
    with pytest.raises(DualpruneError, match=said):
        load_data(name, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"workers": -1}, "workers is how many processes decode, 0 or more, got -1"), ({"std": (1.0,)}, "for 3 channels")],
)
def test_an_image_folder_refuses_what_would_fail_later(options, said):
    with pytest.raises(DualpruneError, match=said):
        FolderDataset("imagefolder", (), (), (), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_from_a_worker_too(tmp_path, workers):
    pytest.importorskip("torchvision")
    from PIL import Image

    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / "a" / "1.jpg")
    before = load_data("imagefolder", root=tmp_path).sha256()
    damaged = tmp_path / "val" / "a" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:50])
    data = load_data("imagefolder", root=tmp_path, image_size=8, workers=workers)
    assert data.sha256() != before
    with pytest.raises(FormatError) as error:
        list(eval_batches(data))
    assert str(error.value).startswith(f"{damaged} is not a readable image") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{name='mlp', options={num_classes=3}}", r"expected scores \(2, 10 or more\).* got \(2, 3\)"),
        ("{name='digits-cnn', options={in_channels=3}}", r"cannot take images of shape \(1, 8, 8\)"),
        ("{name='mlp', options={image_size=9}}", r"cannot take images of shape \(1, 8, 8\)"),
        ("{name='alexnet', options={dropout=2}}", "alexnet could not be built with .*'dropout': 2.*between 0 and 1"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model, said):
    pytest.importorskip("sklearn")
    with pytest.raises(DualpruneError, match=said):
        build_task(parse_recipe(TINY_RECIPE, [f"model={model}"])).model()
    build_task(parse_recipe(TINY_RECIPE, ["model={name='mlp', options={num_classes=1000}}"])).model()
