"""Image data by name, and batches that are a pure function of (seed, epoch, step).

Small data sets live in memory as uint8 tensors (`ArrayDataset`), image folders are decoded by worker processes
(`FolderDataset`). Both answer to the same small protocol (`ImageData`), and `train_batches`, `eval_batches`,
`calibration_batches` and `split_validation` are written on that protocol alone. Nothing here reads or moves the global
random state, so a killed run goes on in the middle of an epoch with the very batches it would have seen.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError, suggest
from dualprune.files import listing_sha256
from dualprune.tasks.classification.imagenet import ImageTree, class_indices, image_tree, wnids

Augment = Literal["none", "flip", "crop-flip", "shift"]
Split = Literal["train", "test"]
Interpolation = Literal["bilinear", "bicubic"]
Batch = tuple[Tensor, Tensor]
Draw = tuple[Tensor, int]  # which images, and the seed of their augmentation
Device = torch.device | str | None


class ImageData(Protocol):
    """What the batching functions ask of a data set."""

    @property
    def name(self) -> str:
        """What to call it in tables."""

    @property
    def num_classes(self) -> int:
        """Labels run from 0 to num_classes − 1."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of a batch's images."""

    @property
    def augment(self) -> Augment:
        """The usual augmentation, which ``augment=True`` asks for."""

    def labels(self, split: Split) -> Tensor:
        """Labels of all images of a split: int64, on the CPU."""

    def fetch(self, split: Split, draws: Sequence[Draw], augment: Augment, device: Device) -> Iterator[Batch]:
        """Yield normalised float32 images and int64 labels for each draw in turn."""

    def sha256(self) -> str:
        """Return a hash of what the images and labels are, wherever they lie."""

    def hold_out(self, held: Tensor) -> Self:
        """The same data with the training images `held` as its test part, and gone from its training part."""


# --- data sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Images in memory.

    Attributes:
        name: what to call it.
        x_train: uint8, (images, channels, height, width).
        y_train: int64, (images,).
        x_test: as x_train.
        y_test: as y_train.
        num_classes: labels run from 0 to num_classes − 1.
        mean: one number a channel, for pixels in [0, 1].
        std: likewise.
        augment: the usual augmentation for these images.
        source: where it was read from.
        measured_only: there are no training images, and none are asked for.

    Raises:
        DualpruneError: shapes, dtypes or labels do not agree.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"
    source: str = ""
    measured_only: bool = False

    def __post_init__(self) -> None:
        for split, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            if split == "test" or not self.measured_only:
                _check_split(f"{self.source or self.name}: {split}", x, y, self.num_classes)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            shapes = f"{tuple(self.x_train.shape[1:])} and {tuple(self.x_test.shape[1:])}"
            raise DualpruneError(f"{self.name}: training and test images differ in shape, {shapes}")
        _check_normalisation(self.name, self.image_shape[0], self.mean, self.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def labels(self, split: Split) -> Tensor:
        """Labels of a split, int64 on the CPU."""
        return (self.y_train if split == "train" else self.y_test).cpu()

    def fetch(self, split: Split, draws: Sequence[Draw], augment: Augment, device: Device) -> Iterator[Batch]:
        """Yield the drawn images, augmented and normalised on `device` (None = where the tensors lie)."""
        x, y = (self.x_train, self.y_train) if split == "train" else (self.x_test, self.y_test)
        for indices, seed in draws:
            indices = indices.to(x.device)
            images, labels = _move(x[indices], device), _move(y[indices], device)
            yield _augmented(images, augment, seed, self.mean, self.std), labels

    def sha256(self) -> str:
        """Return a hash of the shapes and checksums of all images and labels."""
        parts = [part.cpu().contiguous().numpy() for part in (self.x_train, self.y_train, self.x_test, self.y_test)]
        return hashlib.sha256(repr([(part.shape, zlib.crc32(part.data)) for part in parts]).encode()).hexdigest()

    def hold_out(self, held: Tensor) -> ArrayDataset:
        """The training images `held` as the test part, the rest as the training part; the test images are let go."""
        rest = _others(held, len(self.y_train))
        return replace(
            self,
            name=f"{self.name}-validation",
            x_train=self.x_train[rest],
            y_train=self.y_train[rest],
            x_test=self.x_train[held],
            y_test=self.y_train[held],
        )

    def to(self, device: torch.device | str) -> ArrayDataset:
        """The same data on another device, so that batches are made there without a transfer."""
        fields = ("x_train", "y_train", "x_test", "y_test")
        return replace(self, **{key: getattr(self, key).to(device) for key in fields})


@dataclass(frozen=True, eq=False)
class FolderDataset:
    """Images in files, ``train/CLASS/…`` and ``val/CLASS/…``, decoded by worker processes.

    The augmentation of an image depends on (seed, epoch, step, image), not on the number of workers.

    Attributes:
        name: what to call it.
        train: (path, label) of each training image.
        test: (path, label) of each image of val/.
        classes: the folders' names in the order of their labels.
        image_size: side in pixels of the images handed out.
        mean: one number a channel, for pixels in [0, 1].
        std: likewise.
        workers: processes that decode; 0 decodes in this one.
        augment: the usual augmentation for these images.
        source: where it lies.
        crop: share of the resized image's shorter side that is cut out of its middle where nothing else is cropped.
        interpolation: how images are resized.
    """

    name: str
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    workers: int = 4
    augment: Augment = "crop-flip"
    source: str = ""
    crop: float = 0.875
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check_normalisation(self.name, 3, self.mean, self.std)
        if self.workers < 0:
            raise DualpruneError(f"{self.name}: workers is how many processes decode, 0 or more, got {self.workers}")

    @property
    def num_classes(self) -> int:
        """How many folders of classes there are."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return 3, self.image_size, self.image_size

    def labels(self, split: Split) -> Tensor:
        """Labels of a split, int64 on the CPU."""
        return torch.tensor([label for _, label in (self.train if split == "train" else self.test)])

    def fetch(self, split: Split, draws: Sequence[Draw], augment: Augment, device: Device) -> Iterator[Batch]:
        """Yield the drawn images: decoded and augmented by the workers, normalised on `device`."""
        transform = _folder_transform(augment, self.image_size, self.crop, self.interpolation)
        files = _Files(self.train if split == "train" else self.test, transform)
        loader: Iterable[Batch] = torch.utils.data.DataLoader(
            files,
            batch_sampler=[[(index, seed) for index in indices.tolist()] for indices, seed in draws],
            num_workers=self.workers,
            pin_memory=torch.device(device or "cpu").type == "cuda",
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
        )
        try:
            for images, labels in loader:
                yield _normalised(_move(images, device), self.mean, self.std), _move(labels, device)
        except FormatError as error:
            # a worker's comes wrapped in the traceback of its process
            *wrapping, said = str(error).rstrip().splitlines()
            raise (FormatError(said.partition("FormatError: ")[2]) if wrapping else error) from None

    def sha256(self) -> str:
        """Return a hash of the files' names and sizes."""
        return listing_sha256(self.source, [path for path, _ in (*self.train, *self.test)])

    def hold_out(self, held: Tensor) -> FolderDataset:
        """The training images `held` as the test part, the rest as the training part; val/ is let go."""
        rest = _others(held, len(self.train)).tolist()
        train, test = tuple(self.train[i] for i in rest), tuple(self.train[i] for i in held.tolist())
        return replace(self, name=f"{self.name}-validation", train=train, test=test)


def _others(held: Tensor, count: int) -> Tensor:
    rest = torch.ones(count, dtype=torch.bool)
    rest[held] = False
    return rest.nonzero().flatten()


def _move(tensor: Tensor, device: Device) -> Tensor:
    return tensor if device is None else tensor.to(device, non_blocking=True)


def _check_normalisation(name: str, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise DualpruneError(f"{name}: expected mean and std > 0 for {channels} channels, got {mean}, {std}")


def _check_split(where: str, x: Tensor, y: Tensor, num_classes: int) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise DualpruneError(f"{where} images should be uint8 (n, channels, height, width), got {_kind(x)}")
    if y.dtype != torch.int64 or y.shape != x.shape[:1] or not len(y):
        raise DualpruneError(f"{where} labels should be int64, one for each of {len(x)} images, got {_kind(y)}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise DualpruneError(f"{where} labels should lie in 0…{num_classes - 1}, got {low}…{high}")


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


# --- batches ---------------------------------------------------------------------------------------------------------


def train_batches(
    data: ImageData,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment | bool = "none",
    start_step: int = 0,
    device: Device = None,
    memory_format: torch.memory_format | None = None,
    indices: Tensor | None = None,
) -> Iterator[Batch]:
    """Batches of one epoch in a random order, every batch full, the left-over images dropped.

    Order and augmentation are pure functions of (seed, epoch, step), so the batches from `start_step` on are those of
    an epoch that was never interrupted.

    Args:
        data: the images.
        batch_size: images a batch.
        seed: of the run.
        epoch: counted by the caller; each has its own order.
        augment: "flip" mirrors half of the images; "crop-flip" also shifts by up to an eighth of the side (4 pixels
            at 32) with black-after-normalisation borders (for image folders: a random resized crop); "shift" moves by
            up to a fourteenth (1 pixel at 8, 2 at 28); True is the data's usual one, False is "none".
        start_step: how many batches to leave out at the beginning.
        device: where the batches go; None leaves them where they are made.
        memory_format: of the images, e.g. ``torch.channels_last``.
        indices: train on these training images only.

    Returns:
        Pairs of float32 images (batch_size, channels, height, width) and int64 labels (batch_size,).

    Raises:
        DualpruneError: fewer images than one batch, a `start_step` outside the epoch, an unknown augmentation.
    """
    chosen = _chosen(data, indices)
    steps = steps_per_epoch(data, batch_size, chosen)
    if not 0 <= start_step <= steps:
        raise DualpruneError(f"start_step lies in 0…{steps}, the batches of an epoch, got {start_step}")
    order = chosen[torch.randperm(len(chosen), generator=_generator("order", seed, epoch))]
    draws = [
        (order[step * batch_size : (step + 1) * batch_size], _mix("augment", seed, epoch, step))
        for step in range(start_step, steps)
    ]
    return _formatted(data.fetch("train", draws, _augmentation(data, augment), device), memory_format)


def eval_batches(
    data: ImageData,
    *,
    batch_size: int = 250,
    split: Split = "test",
    device: Device = None,
    memory_format: torch.memory_format | None = None,
    indices: Tensor | None = None,
) -> Iterator[Batch]:
    """All images of a split once, in order, without augmentation; the last batch may be smaller.

    Raises:
        DualpruneError: `batch_size` below 1 or `indices` outside the split.
    """
    chosen = _chosen(data, indices, split)
    draws = [(part, 0) for part in chosen.split(_at_least_one("batch_size", batch_size))]
    return _formatted(data.fetch(split, draws, "none", device), memory_format)


def calibration_batches(
    data: ImageData,
    n: int = 4096,
    *,
    batch_size: int = 512,
    seed: int = 0,
    augment: Augment | bool = "none",
    device: Device = None,
    memory_format: torch.memory_format | None = None,
) -> Iterator[Batch]:
    """About `n` training images for re-estimating batch norm: the same ones each time, in batches of equal size.

    The images are drawn without replacement by `seed`; asking for more than there are gives them all. Batches are
    equal to within one image, because batch norm's cumulative average counts each of them alike. Without augmentation
    (the default) the statistics are those of images as they are at test time; with it, those of training.

    Raises:
        DualpruneError: `n` or `batch_size` below 1, an unknown augmentation.
    """
    total = len(data.labels("train"))
    if not total:
        raise DualpruneError(f"{data.name} is for measuring only: it has no training images to calibrate with")
    count = min(_at_least_one("n", n), total)
    drawn = torch.randperm(total, generator=_generator("calibration", seed))[:count]
    parts = drawn.tensor_split(math.ceil(count / _at_least_one("batch_size", batch_size)))
    draws = [(part, _mix("calibration", seed, step)) for step, part in enumerate(parts)]
    return _formatted(data.fetch("train", draws, _augmentation(data, augment), device), memory_format)


Data = TypeVar("Data", bound=ImageData)


def split_validation(data: Data, fraction: float, seed: int = 0) -> Data:
    """Hold out a fraction of the *training* images as the test part, so that choices never see the test images.

    The held-out part is stratified: every class gives its share to within one image.

    Raises:
        DualpruneError: `fraction` leaves one of the parts empty.
    """
    labels = data.labels("train")
    return data.hold_out(_stratified(labels, fraction, seed))


def steps_per_epoch(data: ImageData, batch_size: int, indices: Tensor | None = None) -> int:
    """How many batches `train_batches` gives.

    Raises:
        DualpruneError: fewer images than one batch.
    """
    count = len(data.labels("train") if indices is None else indices)
    if count < _at_least_one("batch_size", batch_size):
        raise DualpruneError(f"a batch of {batch_size} needs as many training images, there are {count}")
    return count // batch_size


def _formatted(batches: Iterator[Batch], memory_format: torch.memory_format | None) -> Iterator[Batch]:
    if memory_format is None:
        return batches
    return ((x.contiguous(memory_format=memory_format), y) for x, y in batches)


def _chosen(data: ImageData, indices: Tensor | None, split: Split = "train") -> Tensor:
    count = len(data.labels(split))
    if indices is None:
        return torch.arange(count)
    if indices.dtype != torch.int64 or indices.ndim != 1 or not len(indices):
        raise DualpruneError(f"indices are a list of int64, got {indices.dtype} {tuple(indices.shape)}")
    if int(indices.min()) < 0 or int(indices.max()) >= count:
        raise DualpruneError(f"indices lie in 0…{count - 1}, got {int(indices.min())}…{int(indices.max())}")
    return indices.cpu()


def _augmentation(data: ImageData, augment: Augment | bool) -> Augment:
    if isinstance(augment, bool):
        return data.augment if augment else "none"
    if augment not in get_args(Augment):
        raise DualpruneError(f"augment is one of {', '.join(get_args(Augment))}, got {augment!r}")
    return augment


def _at_least_one(what: str, value: int) -> int:
    if value < 1:
        raise DualpruneError(f"{what} is at least 1, got {value}")
    return value


def _stratified(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Every so-manyth image of a random order sorted by class: exactly round(fraction · n), sorted."""
    count = round(fraction * len(labels)) if math.isfinite(fraction) else 0
    if not 0 < count < len(labels):
        raise DualpruneError(
            f"the held-out fraction is between 0 and 1 with an image in both parts, got {fraction} of {len(labels)}"
        )
    return _evenly(labels, count, _generator("split", seed))


def _subset(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Which images to train on: `count` of them, of each class its share, drawn by `seed`; None is all."""
    if count is None:
        return torch.arange(len(labels))
    if not 0 < count <= len(labels):
        raise DualpruneError(f"subset is how many of the {len(labels)} training images to take, got {count!r}")
    return _evenly(labels, count, _generator("subset", seed))


def _evenly(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    return order[(torch.arange(count) * 2 + 1) * len(labels) // (2 * count)].sort().values


def _mix(*parts: object) -> int:
    """A seed that differs, in all its bits, for different parts; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*parts))


# --- augmentation ----------------------------------------------------------------------------------------------------


def _augmented(x: Tensor, augment: Augment, seed: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Crop or shift, mirror, and normalise a batch of uint8 images at once; what comes in from outside is 0 after it."""
    if augment == "none":
        return _normalised(x, mean, std)
    n, channels, height, width = x.shape
    generator = torch.Generator().manual_seed(seed)
    reach = {"flip": 0, "crop-flip": max(1, width // 8), "shift": max(1, width // 14)}[augment]
    dy, dx = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < (0 if augment == "shift" else 0.5)
    rows = torch.arange(height) + dy
    columns = torch.arange(width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + dx
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    where = source.view(n, 1, -1).expand(-1, channels, -1).to(x.device, non_blocking=True)
    moved = x.reshape(n, channels, -1).gather(2, where).view(x.shape)
    return _normalised(moved, mean, std).mul_(inside[:, None].to(x.device, non_blocking=True))


def _normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 − mean) / std of uint8 images, as float32."""
    center, scale = (torch.tensor(v, device=x.device).view(-1, 1, 1) * 255 for v in (mean, std))
    return x.float().sub_(center).div_(scale)


def _folder_transform(augment: Augment, size: int, crop: float, interpolation: Interpolation) -> Callable[[Any], Tensor]:
    """From a PIL image to uint8 (3, size, size); "none" and "flip" resize to size / crop and cut out the middle."""
    from torchvision import transforms

    if augment == "shift":
        raise DualpruneError("augment='shift' is for digits; image folders have none, flip and crop-flip")
    how = transforms.InterpolationMode(interpolation)
    middle = [transforms.Resize(round(size / crop), how), transforms.CenterCrop(size)]
    steps = [transforms.RandomResizedCrop(size, interpolation=how)] if augment == "crop-flip" else middle
    flips = [] if augment == "none" else [transforms.RandomHorizontalFlip()]
    return transforms.Compose([*steps, *flips, transforms.PILToTensor()])


@dataclass(frozen=True)
class _Files(torch.utils.data.Dataset[Any]):
    """Decodes one image; asked for (index, seed of the batch)."""

    samples: Sequence[tuple[str, int]]
    transform: Callable[[Any], Tensor]

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image

        from dualprune.tasks.image_files import UNREADABLE

        index, seed = draw
        path, label = self.samples[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except UNREADABLE as error:
            raise FormatError(f"{path} is not a readable image: {error}") from error
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerators too
            torch.default_generator.manual_seed(_mix(seed, index))
            return self.transform(pixels), label


# --- finding and reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """A data set that is looked for on disk."""

    shape: tuple[int, int, int]  # height, width, channels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    torchvision: str  # the class there
    npz: tuple[str, ...]
    folders: tuple[str, ...]  # with idx files, or torchvision's batches
    system: tuple[str, ...] = ()


_KNOWN = {
    "mnist": _Known((28, 28, 1), (0.1307,), (0.3081,), "shift", "MNIST", ("mnist.npz",), ("MNIST/raw", "MNIST", "mnist", "")),
    "fashion-mnist": _Known(
        (28, 28, 1),
        (0.2860,),
        (0.3530,),
        "crop-flip",
        "FashionMNIST",
        ("fashion-mnist.npz", "fashion_mnist.npz"),
        ("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", ""),
        ("/usr/share/datasets/fashion-mnist",),  # Debian's package dataset-fashion-mnist
    ),
    "cifar10": _Known(
        (32, 32, 3),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "crop-flip",
        "CIFAR10",
        ("cifar10.npz", "cifar-10.npz"),
        ("cifar-10-batches-py", ""),
    ),
}
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_Arrays = tuple["np.ndarray[Any, Any]", ...]


def load_data(name: str, root: str | Path | None = None, **options: Any) -> ArrayDataset | FolderDataset:
    """Load a data set by name.

    Args:
        name: "digits" (embedded in scikit-learn), "mnist", "fashion-mnist", "cifar10", "imagefolder", "tinyimagenet" or
            "imagenet-sample".
        root: a file or folder to look in; None looks in the folders of the environment variable DUALPRUNE_DATA
            (several are separated as in PATH), then in ``data``.
        **options: digits: `test_fraction`, `subset`, `seed`. mnist, fashion-mnist, cifar10: `download` (through
            torchvision, into the first folder), `mean`, `std`, `subset`, `seed`. imagefolder: `image_size`, `workers`,
            `mean`, `std`, `classes`, `crop`, `interpolation`. tinyimagenet: `image_size`, `mean`, `std`, `subset`, `seed`.
            imagenet-sample: `image_size`, `mean`, `std`. See docs/data.md.

    Raises:
        DataNotFoundError: nothing was found; says where it looked and how to get the data.
        FormatError: a file is truncated, damaged or not what its name promises.
        DualpruneError: no such data set or option.
    """
    if name not in _LOADERS:
        raise DualpruneError(f"no data set {name!r}{suggest(name, _LOADERS)}; there are {', '.join(_LOADERS)}")
    loader = _LOADERS[name]
    accepted = [key for key in inspect.signature(loader).parameters if key not in ("name", "root")]
    for key in options:
        if key not in accepted:
            raise DualpruneError(f"{name} has no option {key!r}{suggest(key, accepted)}; it has {', '.join(accepted)}")
    _check_types(name, options, get_type_hints(loader))
    return loader(name=name, root=root, **options)


def _check_types(name: str, options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    for key, value in options.items():
        if get_origin(hints[key]) is Literal:  # the loader names the choices
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise DualpruneError(f"{name}: option {key}: {said[:1].lower()}{said[1:]}, got {value!r}") from None


def trees_sha256(name: str, root: str | Path | None = None) -> str | None:
    """Return a hash of what a data set is that is decoded whole, by its files' names and sizes; None for any other.

    Raises:
        DataNotFoundError: nothing was found.
    """
    if name not in _TREES:
        return None
    return hashlib.sha256(" ".join(tree.sha256() for tree in _TREES[name](name, root)).encode()).hexdigest()


def _load_digits(
    name: str, root: str | Path | None, test_fraction: float = 0.25, seed: int = 0, subset: int | None = None
) -> ArrayDataset:
    """1,797 handwritten digits of 8×8 pixels, split by a fixed, stratified draw."""
    if root is not None:
        raise DualpruneError(f"digits come with scikit-learn and have no root, got {str(root)!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DualpruneError("digits need scikit-learn; pip install 'dualprune[run]'") from error
    pixels, labels = load_digits(return_X_y=True)
    # levels 0…16 become 0…240
    x = torch.from_numpy(pixels).mul(15).to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    test = _stratified(y, test_fraction, seed)
    train = _others(test, len(y))
    train = train[_subset(y[train], subset, seed)]
    mean, std = (0.2873,), (0.3539,)
    return ArrayDataset(name, x[train], y[train], x[test], y[test], 10, mean, std, "none", "scikit-learn")


def _load_known(
    name: str,
    root: str | Path | None,
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    subset: int | None = None,
    seed: int = 0,
) -> ArrayDataset:
    known = _KNOWN[name]
    found = _find(known, _places(known, root))
    if found is None and download:
        _download(known, _roots(root)[0])
        found = _find(known, _places(known, root))
    if found is None:
        raise _not_found(name, known, root)
    place, reader = found
    x_train, y_train, x_test, y_test = reader(place)
    images, labels = _as_images(x_train, known.shape, f"{place}: x_train"), _as_labels(y_train, f"{place}: y_train")
    # without a subset the arrays are taken as they are: no copy, and a count that does not fit is found by ArrayDataset
    drawn = slice(None) if subset is None else _subset(labels, subset, seed)
    return ArrayDataset(
        name,
        images[drawn],
        labels[drawn],
        _as_images(x_test, known.shape, f"{place}: x_test"),
        _as_labels(y_test, f"{place}: y_test"),
        num_classes=10,
        mean=tuple(mean or known.mean),
        std=tuple(std or known.std),
        augment=known.augment,
        source=str(place),
    )


def _roots(root: str | Path | None) -> list[Path]:
    if root is not None:
        return [Path(root)]
    given = [Path(part) for part in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if part]
    return list(dict.fromkeys([*given, Path("data")]))


def _places(known: _Known, root: str | Path | None) -> list[Path]:
    """Files and folders that may hold the data, the first to be looked at first."""
    places: list[Path] = []
    for top in _roots(root):
        if top.is_file():
            places.append(top)
        else:
            places += [top / file for file in known.npz] + [top / folder for folder in known.folders]
    return places + ([Path(folder) for folder in known.system] if root is None else [])


def _find(known: _Known, places: Sequence[Path]) -> tuple[Path, Callable[[Path], _Arrays]] | None:
    for place in places:
        if place.is_file():
            return place, _read_npz
        if known.torchvision == "CIFAR10":
            if (place / "data_batch_1").is_file():
                return place, _read_cifar10
        elif any(_idx_file(place, stem) for stem in _IDX):
            return place, _read_idx_folder
    return None


def _not_found(name: str, known: _Known, root: str | Path | None) -> DataNotFoundError:
    places = "".join(f"\n  {place}" for place in _places(known, root))
    fetch = f"import torchvision; torchvision.datasets.{known.torchvision}('data', download=True)"
    debian = "\n  or: apt install dataset-fashion-mnist" if known.system else ""
    return DataNotFoundError(
        f"{name} was not found. Looked for an .npz archive or a folder of its files at{places}\n"
        f'To get it: python -c "{fetch}"\n'
        f"  or: the option download=true{debian}\n"
        "To use what you have: point root, or the environment variable DUALPRUNE_DATA, at its file or folder."
    )


def _torchvision_class(known: _Known) -> Any:
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise DualpruneError(
            f"reading {known.torchvision} as torchvision leaves it needs torchvision; pip install 'dualprune[run]'"
        ) from error
    return getattr(datasets, known.torchvision)


def _download(known: _Known, folder: Path) -> None:
    try:
        _torchvision_class(known)(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise DualpruneError(f"torchvision could not download {known.torchvision} into {folder}: {error}") from error


def _read_npz(path: Path) -> _Arrays:
    """Read a Keras-style archive; objects in it, which would need pickle, are refused."""
    if not zipfile.is_zipfile(path):
        raise FormatError(f"{path} is not a whole .npz archive; if it was downloaded, download it again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _KEYS if key not in archive.files]
            if missing:
                has = ", ".join(archive.files) or "nothing"
                raise FormatError(f"{path}: expected arrays {', '.join(_KEYS)}, it has {has}")
            return tuple(archive[key] for key in _KEYS)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is damaged: {error}") from error


def _idx_file(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem.replace('-idx', '.idx')}-ubyte")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx_folder(folder: Path) -> _Arrays:
    files = {stem: _idx_file(folder, stem) for stem in _IDX}
    missing = [f"{stem}-ubyte[.gz]" for stem, file in files.items() if file is None]
    if missing:
        raise FormatError(f"{folder} has some of the four idx files but not {', '.join(missing)}")
    return tuple(_read_idx(file) for file in files.values() if file is not None)


def _read_idx(path: Path) -> np.ndarray[Any, Any]:
    """Read unsigned bytes in the idx format: 0 0 8 ndim, big-endian uint32 sizes, then the bytes."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise FormatError(f"{path} is a damaged gzip file: {error}") from error
    dims = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * dims
    if not 1 <= dims <= 4 or len(content) < start:
        raise FormatError(f"{path} is not an idx file of unsigned bytes; it begins with {content[:4].hex() or 'nothing'}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dims, 4))
    if len(content) != start + math.prod(shape):
        kind = "truncated" if len(content) < start + math.prod(shape) else "too long"
        raise FormatError(f"{path} is {kind}: {shape} needs {start + math.prod(shape)} bytes, it has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def _read_cifar10(folder: Path) -> _Arrays:
    """Read torchvision's folder through torchvision, which checks the digests of the files before it unpickles them."""
    dataset = _torchvision_class(_KNOWN["cifar10"])
    if folder.resolve().name != dataset.base_folder:
        raise FormatError(f"{folder}: torchvision reads these files from a folder named {dataset.base_folder}; rename it")
    try:
        train, test = (dataset(folder.resolve().parent, train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise FormatError(f"{folder} is incomplete or damaged ({error}); delete it and download again") from error
    return train.data, np.asarray(train.targets), test.data, np.asarray(test.targets)


def _as_images(array: np.ndarray[Any, Any], shape: tuple[int, int, int], where: str) -> Tensor:
    """From (n, height, width[, channels]) to a uint8 tensor (n, channels, height, width)."""
    expected = [shape, shape[:2]] if shape[2] == 1 else [shape]
    if array.dtype != np.uint8 or array.shape[1:] not in expected:
        sizes = ", ".join(map(str, shape))
        raise FormatError(f"{where} should be uint8 of shape (n, {sizes}), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.reshape(-1, *shape)).permute(0, 3, 1, 2).contiguous()


def _as_labels(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """From (n,) or (n, 1) of any integers to int64 (n,)."""
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)):
        raise FormatError(f"{where} should be whole numbers of shape (n,), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _load_folder(
    name: str,
    root: str | Path | None,
    image_size: int = 224,
    workers: int = 4,
    mean: Sequence[float] = FolderDataset.mean,
    std: Sequence[float] = FolderDataset.std,
    classes: str | None = None,
    crop: float = FolderDataset.crop,
    interpolation: Interpolation = FolderDataset.interpolation,
) -> FolderDataset:
    """The layout of torchvision's ImageFolder: train/CLASS/image.jpg and val/CLASS/image.jpg.

    With classes="imagenet" the folders are wnids, as many as there are, and labels are those of the 1,000-class head.
    """
    if classes not in (None, "imagenet"):
        raise DualpruneError(f"classes is 'imagenet', or left out for the folders' own; got {classes!r}")
    _at_least_one("image_size", image_size)
    if not 0 < crop <= 1:
        raise DualpruneError(f"crop is the share of the resized image that is cut out, in (0, 1], got {crop}")
    known = get_args(Interpolation)
    if interpolation not in known:
        raise DualpruneError(f"interpolation is {' or '.join(known)}, got {interpolation!r}{suggest(interpolation, known)}")
    for top in _roots(root):
        if (top / "train").is_dir() and (top / "val").is_dir():
            break
    else:
        tried = ", ".join(str(top / part) for top in _roots(root) for part in ("train", "val"))
        raise DataNotFoundError(f"{name} needs the folders train/CLASS/… and val/CLASS/…; looked for {tried}; give root")
    (train, names), (test, others) = _scan(top / "train"), _scan(top / "val")
    unknown = sorted(set(others) - set(names))
    if unknown:
        raise DualpruneError(f"{top / 'val'} has classes that {top / 'train'} has not: {', '.join(unknown[:4])}")
    label = class_indices(names, str(top / "train")) if classes else {key: i for i, key in enumerate(names)}
    return FolderDataset(
        name,
        tuple((path, label[names[old]]) for path, old in train),
        tuple((path, label[others[old]]) for path, old in test),
        wnids() if classes else names,
        image_size,
        tuple(mean),
        tuple(std),
        workers,
        source=str(top),
        crop=crop,
        interpolation=interpolation,
    )


def _scan(folder: Path) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """(path, label) of each image and the names of the classes, sorted."""
    try:
        from torchvision.datasets import ImageFolder
    except ModuleNotFoundError as error:
        raise DualpruneError("image folders need torchvision; pip install 'dualprune[run]'") from error
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:
        raise FormatError(f"{folder}: {error}") from error
    return tuple(found.samples), tuple(found.classes)


def _load_tiny(
    name: str,
    root: str | Path | None,
    image_size: int = 64,
    mean: Sequence[float] = FolderDataset.mean,
    std: Sequence[float] = FolderDataset.std,
    subset: int | None = None,
    seed: int = 0,
) -> ArrayDataset:
    """Tiny ImageNet, or some of its classes: the test images are those of val/ whose class has training images."""
    _at_least_one("image_size", image_size)
    train, test = _tiny_trees(name, root)
    labels = train.labels()
    drawn = _subset(labels, subset, seed)
    x_train = train.decode(image_size, drawn.tolist())
    return _of_imagenet(name, (x_train, labels[drawn]), test, image_size, mean, std)


def _tiny_trees(name: str, root: str | Path | None) -> tuple[ImageTree, ImageTree]:
    tops = [top / folder for top in _roots(root) for folder in ("tinyimagenet", "tiny-imagenet-200", "")]
    found = next((pair for top in tops if (pair := _pair(top))), None)
    if found is None:
        raise DataNotFoundError(
            f"{name} needs a folder or one zip archive of training images and one of validation images, train… and val…; "
            f"looked in {', '.join(map(str, tops))}; give root, or set DUALPRUNE_DATA to the folder that holds tinyimagenet"
        )
    train = image_tree(found[0])
    return train, image_tree(found[1]).only(train.classes)


def _pair(top: Path) -> tuple[Path, Path] | None:
    """The training and the validation images in a folder: train/ and val/, or the archives train*.zip and val*.zip."""
    places: list[Path] = []
    for part in ("train", "val"):
        archives = [] if (top / part).is_dir() else sorted(top.glob(f"{part}*.zip"))
        if len(archives) > 1:
            raise DualpruneError(f"{top} has {len(archives)} archives {part}*.zip, expected one: {archives[0].name}, …")
        places += [top / part] if (top / part).is_dir() else archives
    return (places[0], places[1]) if len(places) == 2 else None


def _load_sample(
    name: str,
    root: str | Path | None,
    image_size: int = 256,
    mean: Sequence[float] = FolderDataset.mean,
    std: Sequence[float] = FolderDataset.std,
) -> ArrayDataset:
    """A folder of ImageNet images named after their wnid, for measuring only: there are no training images."""
    _at_least_one("image_size", image_size)
    (tree,) = _sample_trees(name, root)
    nothing = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    return _of_imagenet(name, nothing, tree, image_size, mean, std)


def _sample_trees(name: str, root: str | Path | None) -> tuple[ImageTree]:
    folders = [Path(root)] if root is not None else [top / "imagenet1k_sample" for top in _roots(None)]
    place = next((folder for folder in folders if folder.is_dir()), None)
    if place is None:
        tried = ", ".join(map(str, folders))
        raise DataNotFoundError(f"{name} is a folder of images named WNID.jpg; looked for {tried}; give root")
    return (image_tree(place),)


def _of_imagenet(
    name: str, train: Batch, test: ImageTree, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> ArrayDataset:
    x_test, y_test, source = test.decode(image_size), test.labels(), str(test.place.parent)
    fields: dict[str, Any] = {"augment": "crop-flip", "source": source, "measured_only": not len(train[1])}
    return ArrayDataset(name, *train, x_test, y_test, len(wnids()), tuple(mean), tuple(std), **fields)


_LOADERS: dict[str, Callable[..., ArrayDataset | FolderDataset]] = {
    "digits": _load_digits,
    **dict.fromkeys(_KNOWN, _load_known),
    "imagefolder": _load_folder,
    "tinyimagenet": _load_tiny,
    "imagenet-sample": _load_sample,
}
_TREES: dict[str, Callable[[str, str | Path | None], tuple[ImageTree, ...]]] = {
    "tinyimagenet": _tiny_trees,
    "imagenet-sample": _sample_trees,
}
