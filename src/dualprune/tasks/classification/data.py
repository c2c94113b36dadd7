"""Image data in memory or in folders, and batches that are a pure function of (seed, epoch, step).

Small data sets live in memory as uint8 tensors (`ArrayDataset`), image folders are decoded by worker processes
(`FolderDataset`). Both answer to the same small protocol (`ImageData`), and `train_batches`, `eval_batches`,
`calibration_batches` and `split_validation` are written on that protocol alone. Nothing here reads or moves the global
random state, so a killed run goes on in the middle of an epoch with the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar, get_args

import torch
from torch import Tensor

from dualprune.errors import DualpruneError, FormatError
from dualprune.files import listing_sha256
from dualprune.tasks.classification.draws import generator_of, others, seed_of, stratified

Augment = Literal["none", "flip", "crop-flip", "shift", "shift-1"]
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
        rest = others(held, len(self.y_train))
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
        rest = others(held, len(self.train)).tolist()
        train, test = tuple(self.train[i] for i in rest), tuple(self.train[i] for i in held.tolist())
        return replace(self, name=f"{self.name}-validation", train=train, test=test)


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
            at 32) with borders of the mean colour (for image folders: a random resized crop); "shift" moves by up to a
            fourteenth (1 pixel at 8, 2 at 28) with black borders, "shift-1" by up to one pixel; True is the data's
            usual one, False is "none".
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
    order = chosen[torch.randperm(len(chosen), generator=generator_of("order", seed, epoch))]
    draws = [
        (order[step * batch_size : (step + 1) * batch_size], seed_of("augment", seed, epoch, step))
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
    draws = [(part, 0) for part in chosen.split(at_least_one("batch_size", batch_size))]
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
    count = min(at_least_one("n", n), total)
    drawn = torch.randperm(total, generator=generator_of("calibration", seed))[:count]
    parts = drawn.tensor_split(math.ceil(count / at_least_one("batch_size", batch_size)))
    draws = [(part, seed_of("calibration", seed, step)) for step, part in enumerate(parts)]
    return _formatted(data.fetch("train", draws, _augmentation(data, augment), device), memory_format)


Data = TypeVar("Data", bound=ImageData)


def split_validation(data: Data, fraction: float, seed: int = 0) -> Data:
    """Hold out a fraction of the *training* images as the test part, so that choices never see the test images.

    The held-out part is stratified: every class gives its share to within one image.

    Raises:
        DualpruneError: `fraction` leaves one of the parts empty.
    """
    labels = data.labels("train")
    return data.hold_out(stratified(labels, fraction, seed))


def steps_per_epoch(data: ImageData, batch_size: int, indices: Tensor | None = None) -> int:
    """How many batches `train_batches` gives.

    Raises:
        DualpruneError: fewer images than one batch.
    """
    count = len(data.labels("train") if indices is None else indices)
    if count < at_least_one("batch_size", batch_size):
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


def at_least_one(what: str, value: int) -> int:
    """Return the value; raises DualpruneError where it is below 1."""
    if value < 1:
        raise DualpruneError(f"{what} is at least 1, got {value}")
    return value


# --- augmentation ----------------------------------------------------------------------------------------------------


def _augmented(x: Tensor, augment: Augment, seed: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Crop or shift, mirror, and normalise a batch of uint8 images at once.

    What comes in from outside is 0: for a crop after normalisation, the mean; for shifted digits before it, black.
    """
    if augment == "none":
        return _normalised(x, mean, std)
    n, channels, height, width = x.shape
    generator = torch.Generator().manual_seed(seed)
    reach = {"flip": 0, "crop-flip": max(1, width // 8), "shift": max(1, width // 14), "shift-1": 1}[augment]
    dy, dx = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator)
    shifts = augment.startswith("shift")
    mirrored = torch.rand(n, 1, generator=generator) < (0 if shifts else 0.5)
    rows = torch.arange(height) + dy
    columns = torch.arange(width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + dx
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    where = source.view(n, 1, -1).expand(-1, channels, -1).to(x.device, non_blocking=True)
    moved = x.reshape(n, channels, -1).gather(2, where).view(x.shape)
    kept = inside[:, None].to(x.device, non_blocking=True)
    return _normalised(moved.mul_(kept), mean, std) if shifts else _normalised(moved, mean, std).mul_(kept)


def _normalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 − mean) / std of uint8 images, as float32."""
    center, scale = (torch.tensor(v, device=x.device).view(-1, 1, 1) * 255 for v in (mean, std))
    return x.float().sub_(center).div_(scale)


def _folder_transform(augment: Augment, size: int, crop: float, interpolation: Interpolation) -> Callable[[Any], Tensor]:
    """From a PIL image to uint8 (3, size, size); "none" and "flip" resize to size / crop and cut out the middle."""
    from torchvision import transforms

    if augment.startswith("shift"):
        raise DualpruneError(f"augment={augment!r} is for digits; image folders have none, flip and crop-flip")
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
            torch.default_generator.manual_seed(seed_of(seed, index))
            return self.transform(pixels), label
