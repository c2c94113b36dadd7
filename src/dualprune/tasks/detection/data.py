"""Detection data in COCO's layouts: YOLO label files or an instances JSON, images resized onto a square, light augmentation.

What is odd about the files is either an error that names the file and line, or counted and said in one log line
(`DetectionSet.notes`); nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError, suggest

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

logger = logging.getLogger("dualprune")

Fit = Literal["letterbox", "stretch"]
Augment = Literal["none", "flip", "full"]
Size = tuple[float, float]  # width, height
Labels = np.ndarray[Any, np.dtype[np.float64]]  # (boxes, 6): class, centre x and y, width, height as fractions, crowd

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_GREY = 114  # of the bars that letterboxing adds, as in the YOLOv3 of the papers
_CACHE_BYTES = 2**30
_EDGE = 0.01  # a box may leave the image by this fraction of it before it is taken for a mistake


class Placement(NamedTuple):
    """Where an image of `width` × `height` pixels lies in the network's input: x · scale_x + left, y · scale_y + top."""

    width: int
    height: int
    scale_x: float
    scale_y: float
    left: int
    top: int


@dataclass(frozen=True, eq=False)
class DetectionSet:
    """Images of one split with their boxes.

    Attributes:
        name: what to call it.
        files: the images.
        labels: of each image (boxes, 6): class, centre x, centre y, width, height as fractions of the image, crowd.
        classes: their names, in the order of their numbers.
        size: side in pixels of the squares handed out.
        fit: "letterbox" keeps the proportions and adds grey bars, "stretch" does not, as darknet does.
        workers: processes that decode images which are not in memory; 0 decodes in this one.
        pixels: uint8 (images, 3, size, size) and their placements, where they fit into memory.
        declared: width and height of each image by the annotations, where they say them; copies may be smaller.
        notes: what was skipped or made up for, and how often.
    """

    name: str
    files: tuple[Path, ...]
    labels: tuple[Labels, ...]
    classes: tuple[str, ...]
    size: int
    fit: Fit = "letterbox"
    workers: int = 4
    pixels: tuple[Tensor, tuple[Placement, ...]] | None = None
    declared: tuple[Size, ...] = ()
    notes: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, draws: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, list[Placement]]]:
        """Yield for each draw its images, uint8 (n, 3, size, size), and where they lie in it.

        Raises:
            FormatError: an image cannot be read, or has other proportions than the annotations say.
        """
        if self.pixels is not None:
            for draw in draws:
                yield self.pixels[0][list(draw)], [self.pixels[1][i] for i in draw]
            return
        loader = torch.utils.data.DataLoader(
            _Decoder(self),
            batch_sampler=[list(draw) for draw in draws],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
        )
        yield from loader

    def subset(self, indices: Sequence[int], name: str) -> DetectionSet:
        """The images `indices` alone."""
        pixels = None
        if self.pixels is not None:
            pixels = (self.pixels[0][list(indices)], tuple(self.pixels[1][i] for i in indices))
        files, labels = tuple(self.files[i] for i in indices), tuple(self.labels[i] for i in indices)
        declared = tuple(self.declared[i] for i in indices) if self.declared else ()
        return replace(self, name=name, files=files, labels=labels, pixels=pixels, declared=declared)

    def sha256(self) -> str:
        """SHA-256 of the images' names and sizes and of all labels, in order."""
        listed = [(file.name, file.stat().st_size) for file in self.files]
        return hashlib.sha256(repr(listed).encode() + b"".join(label.tobytes() for label in self.labels)).hexdigest()

    def describe(self) -> str:
        """One line: images, boxes, and what was odd."""
        boxes = sum(map(len, self.labels))
        odd = "".join(f"; {count} {what}" for what, count in sorted(self.notes.items()))
        return f"{self.name}: {len(self)} images, {boxes} boxes{odd}"


# --- batches ---------------------------------------------------------------------------------------------------------


def train_batches(
    data: DetectionSet,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment = "none",
    start_step: int = 0,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch in a random order, every batch full: a pure function of the arguments.

    Args:
        data: the images.
        batch_size: images a batch.
        seed: of the run.
        epoch: each has its own order.
        augment: "flip" mirrors half of the images; "full" also changes brightness, saturation and hue.
        start_step: how many batches to leave out at the beginning.
        device: where the batches go.

    Returns:
        Pairs of float32 images (batch_size, 3, size, size) in [0, 1] and targets (boxes, 6) as `detection_loss` takes them.

    Raises:
        DualpruneError: fewer images than one batch, or a `start_step` outside the epoch.
    """
    steps = steps_per_epoch(data, batch_size)
    if not 0 <= start_step <= steps:
        raise DualpruneError(f"start_step lies in 0…{steps}, the batches of an epoch, got {start_step}")
    order = torch.randperm(len(data), generator=_generator("order", seed, epoch)).tolist()
    draws = [order[step * batch_size : (step + 1) * batch_size] for step in range(start_step, steps)]
    for step, (draw, (images, placements)) in enumerate(zip(draws, data.fetch(draws), strict=True), start_step):
        targets = _targets([data.labels[i] for i in draw], placements, data.size)
        x = images.to(device, non_blocking=True).float() / 255
        yield augmented(x, targets.to(device, non_blocking=True), augment, _generator("augment", seed, epoch, step))


def steps_per_epoch(data: DetectionSet, batch_size: int) -> int:
    """How many batches `train_batches` gives.

    Raises:
        DualpruneError: fewer images than one batch.
    """
    if batch_size < 1 or len(data) < batch_size:
        raise DualpruneError(f"{data.name}: a batch of {batch_size} needs as many training images, there are {len(data)}")
    return len(data) // batch_size


def plain_batches(
    data: DetectionSet, draws: Sequence[Sequence[int]], device: torch.device | None = None
) -> Iterator[tuple[Tensor, list[Placement]]]:
    """Yield the images of each draw as they are, float32 in [0, 1], and where they lie."""
    for images, placements in data.fetch(draws):
        yield images.to(device, non_blocking=True).float() / 255, placements


def augmented(x: Tensor, targets: Tensor, augment: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the images with their boxes; "full": saturation and brightness by up to 40 %, hue by up to 0.1 rad."""
    if augment == "none":
        return x, targets
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    turned = mirrored[targets[:, 0].long()]
    targets = targets.clone()
    targets[:, 2] = torch.where(turned, 1 - targets[:, 2], targets[:, 2])
    if augment == "full":
        change = _colour_change(torch.rand(3, len(x), generator=generator) * 2 - 1).to(x.device)
        x = torch.einsum("nij,njhw->nihw", change, x).clamp(0, 1)
    return x, targets


def split_validation(data: DetectionSet, fraction: float, seed: int) -> tuple[DetectionSet, DetectionSet]:
    """The training images without a random `fraction` of them, and that fraction, to choose settings by.

    Raises:
        DualpruneError: one of the two would be empty.
    """
    count = round(fraction * len(data))
    if not 0 < count < len(data):
        raise DualpruneError(f"{data.name}: holding out {fraction} of {len(data)} images leaves a part empty")
    order = torch.randperm(len(data), generator=_generator("split", seed)).tolist()
    return data.subset(sorted(order[count:]), data.name), data.subset(sorted(order[:count]), f"{data.name}-validation")


def _colour_change(amounts: Tensor) -> Tensor:
    """Matrices (n, 3, 3) on RGB from amounts (3, n) in [−1, 1]: hue turned in the plane of colour, saturation, brightness."""
    luma, red, blue = [0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]  # YIQ
    yiq = torch.tensor([luma, red, blue])
    angle, saturation, brightness = amounts[0] * 0.1, 1 + 0.4 * amounts[1], 1 + 0.4 * amounts[2]
    turn = torch.zeros(amounts.shape[1], 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 2, 1] = saturation * angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    return brightness[:, None, None] * (torch.linalg.inv(yiq) @ turn @ yiq)


def _targets(labels: Sequence[Labels], placements: Sequence[Placement], size: int) -> Tensor:
    """From fractions of each image to fractions of the input; crowds are nothing to train on."""
    rows = []
    for image, (boxes, place) in enumerate(zip(labels, placements, strict=True)):
        boxes = boxes[boxes[:, 5] == 0]
        across, down = place.width * place.scale_x / size, place.height * place.scale_y / size
        x, y = boxes[:, 1] * across + place.left / size, boxes[:, 2] * down + place.top / size
        number = np.full(len(boxes), float(image))
        rows.append(np.stack([number, boxes[:, 0], x, y, boxes[:, 3] * across, boxes[:, 4] * down], 1))
    return torch.from_numpy(np.concatenate(rows)).float()


def _generator(*parts: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


# --- pixels ----------------------------------------------------------------------------------------------------------


def placement(width: int, height: int, size: int, fit: Fit) -> Placement:
    """Where an image comes to lie in a square of `size` pixels."""
    if fit == "stretch":
        return Placement(width, height, size / width, size / height, 0, 0)
    scale = min(size / width, size / height)
    across, down = max(1, round(width * scale)), max(1, round(height * scale))
    return Placement(width, height, across / width, down / height, (size - across) // 2, (size - down) // 2)


def read_image(path: Path, size: int, fit: Fit) -> tuple[Tensor, Placement]:
    """Decode an image to RGB, upright, and lay it onto a square: uint8 (3, size, size).

    Raises:
        FormatError: it is missing, truncated or no image.
    """
    from PIL import Image

    picture = open_upright(path)
    place = placement(*picture.size, size, fit)
    resized = picture.resize(
        (round(place.width * place.scale_x), round(place.height * place.scale_y)), Image.Resampling.BILINEAR
    )
    square = Image.new("RGB", (size, size), (_GREY,) * 3)
    square.paste(resized, (place.left, place.top))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous(), place


def open_upright(path: Path) -> PILImage:
    """Decode an image to RGB, turned and mirrored as its EXIF orientation says: labels are drawn on what people see.

    Raises:
        FormatError: it is missing, truncated or no image.
    """
    from PIL import ExifTags, Image

    from dualprune.tasks.image_files import UNREADABLE

    turns = Image.Transpose
    # not ImageOps.exif_transpose, which also writes the EXIF data anew and fails where an entry of it is damaged
    by_orientation = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    try:
        with Image.open(path) as image:
            turn = by_orientation.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            picture = image.convert("RGB")
            return picture if turn is None else picture.transpose(turn)
    except UNREADABLE as error:
        raise FormatError(f"{path} is not a readable image: {error}") from error


def _check_proportions(path: Path, place: Placement, declared: Size) -> None:
    """Make sure that an image has the sides it should have, to one pixel each, or both in some other scale."""
    (width, height), (wide, high) = place[:2], declared
    if abs(width * high - height * wide) > wide + high:
        raise FormatError(
            f"{path} is {width}×{height} pixels, of other proportions than the {wide:g}×{high:g} that its annotations are for; "
            "is it turned, cropped, or another image?"
        )


@dataclass(frozen=True)
class _Decoder(torch.utils.data.Dataset[Any]):
    data: DetectionSet

    def __getitem__(self, index: int) -> tuple[Tensor, Placement]:
        data = self.data
        square, place = read_image(data.files[index], data.size, data.fit)
        if data.declared:
            _check_proportions(data.files[index], place, data.declared[index])
        return square, place


def _collate(rows: list[tuple[Tensor, Placement]]) -> tuple[Tensor, list[Placement]]:
    return torch.stack([pixels for pixels, _ in rows]), [place for _, place in rows]


# --- finding and reading ---------------------------------------------------------------------------------------------


def load_split(
    split: str,
    root: str | Path | None = None,
    *,
    size: int = 416,
    classes: Sequence[str] | int | None = None,
    annotations: str | None = None,
    fit: Fit = "letterbox",
    limit: int | None = None,
    cache: bool | None = None,
    workers: int = 4,
) -> DetectionSet:
    """Read one split: ``images/SPLIT/*.jpg`` with ``labels/SPLIT/*.txt``, or an instances JSON with ``SPLIT/*.jpg``.

    Args:
        split: the folder's name, such as "train2017".
        root: the folder that holds ``images``; None looks in ``coco``, ``coco256`` and the folder itself, of every folder in
            the environment variable DUALPRUNE_DATA, then of ``data``.
        size: side of the squares handed out, a multiple of the network's stride.
        classes: their names, in the order of their numbers, or how many there are; None: COCO's 80, or those of the JSON
            file. A JSON file's categories are found by their names in a list, and numbered by their ids without one.
        annotations: the JSON file, relative to the root, in place of label files; "{split}" in it is the split's name.
        fit: "letterbox" or "stretch".
        limit: the first so many images only, those without objects left out.
        cache: keep decoded images in memory; None: if they fit into 1 GiB. Unreadable images are counted and left out if
            they are kept, and are errors when they come up if not.
        workers: processes that decode when images are not kept.

    Raises:
        DataNotFoundError: there is no such folder or file, or no images in it.
        FormatError: a label or annotation file is not what it should be, or does not fit its images; names the line, the
            annotation or the image.
        DualpruneError: a value is out of range.
    """
    _check(fit=fit, size=size, limit=limit, workers=workers)
    place = _find(root, split)
    notes: Counter[str] = Counter()
    if annotations is None:
        names = _names(classes)
        files, labels = _read_yolo(place, split, len(names), notes)
        declared: tuple[Size, ...] = ()
    else:
        path = place / annotations.format(split=split)
        files, labels, names, declared = _read_json(path, _image_folder(place, split), classes, notes)
    if not sum(map(len, labels)):
        raise DualpruneError(f"{place}: {len(files)} images of {split} and not one box; are the labels of the same split?")
    data = DetectionSet(split, files, labels, names, size, fit, workers, declared=declared, notes=notes)
    if limit is not None:
        data = data.subset([i for i, boxes in enumerate(labels) if len(boxes)][:limit], split)
    data = _cached(data) if (len(data) * 3 * size**2 <= _CACHE_BYTES if cache is None else cache) else data
    for what in [what for what, count in notes.items() if not count]:
        del notes[what]
    (logger.warning if notes else logger.info)(data.describe())
    return data


def _check(*, fit: str, size: int, limit: int | None, workers: int) -> None:
    if fit not in get_args(Fit):
        raise DualpruneError(f"fit is one of {', '.join(get_args(Fit))}, got {fit!r}{suggest(str(fit), get_args(Fit))}")
    for key, value, least in (("size", size, 32), ("limit", limit, 1), ("workers", workers, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise DualpruneError(f"{key} is a whole number from {least} up, got {value!r}")


def coco_classes() -> tuple[str, ...]:
    """The 80 names of COCO's classes, in the order of the labels."""
    return tuple((package_files("dualprune.tasks.detection") / "cfg" / "coco.names").read_text(encoding="utf-8").splitlines())


def _names(classes: Sequence[str] | int | None) -> tuple[str, ...]:
    coco = coco_classes()
    if classes is None or classes == len(coco):
        return coco
    if isinstance(classes, int):
        return tuple(f"class {i}" for i in range(classes))
    names = tuple(map(str, classes))
    if (twice := _twice(names)) is not None:
        raise DualpruneError(f"classes names {twice!r} twice; a class has one number")
    return names


def _twice(values: Sequence[Any]) -> Any:
    """The first value that is there more than once, or None."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _find(root: str | Path | None, split: str) -> Path:
    """The folder in which the split's images are."""
    given = [Path(part) for part in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if part]
    tops = [Path(root)] if root is not None else list(dict.fromkeys([*given, Path("data")]))
    places = tops if root is not None else [top / folder for top in tops for folder in ("coco", "coco256", "")]
    for place in places:
        if any(folder.is_dir() for folder in _image_folders(place, split)):
            return place
    tried = "".join(f"\n  {folder}" for place in places for folder in _image_folders(place, split))
    raise DataNotFoundError(
        f"detection data: found no images of the split {split!r}. Looked for the folders{tried}\n"
        "To use what you have: point root, or the environment variable DUALPRUNE_DATA, at the folder that holds images/"
    )


def _image_folders(place: Path, split: str) -> tuple[Path, Path]:
    return place / "images" / split, place / split  # YOLO's layout, COCO's own


def _image_folder(place: Path, split: str) -> Path:
    return next(folder for folder in _image_folders(place, split) if folder.is_dir())


def _read_yolo(place: Path, split: str, classes: int, notes: Counter[str]) -> tuple[tuple[Path, ...], tuple[Labels, ...]]:
    folder, texts = _image_folder(place, split), place / "labels" / split
    if not texts.is_dir():
        raise DataNotFoundError(f"{folder} has no label files: there is no folder {texts}; give annotations for a JSON file")
    files = tuple(sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGES))
    if not files:
        raise DataNotFoundError(f"{folder} holds no images ({', '.join(_IMAGES)})")
    known = {file.stem: file for file in texts.glob("*.txt")}
    labels = []
    for file in files:
        text = known.pop(file.stem, None)
        notes["images without a label file, taken as empty"] += text is None
        labels.append(read_labels(text, classes, notes) if text else _no_boxes())
    notes["label files without an image, skipped"] += len(known)
    return files, tuple(labels)


def _no_boxes() -> Labels:
    return np.zeros((0, 6))


def read_labels(path: Path, classes: int, notes: Counter[str]) -> Labels:
    """Read a YOLO label file: a line a box, its class and centre x, centre y, width and height as fractions of the image.

    A line with a polygon's corners in place of the box is turned into the box around it.

    Raises:
        FormatError: a line is something else, a class is out of range, or a box is far outside the image.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not a readable label file: {error}") from error
    rows = [_label(line.split(), f"{path}:{number}", classes) for number, line in enumerate(lines, 1) if line.strip()]
    notes["label files without a box"] += not rows
    return _clean(rows, notes)


def _label(words: list[str], where: str, classes: int) -> tuple[float, ...]:
    try:
        label, *numbers = (float(word) for word in words)
    except ValueError:
        raise FormatError(f"{where}: expected numbers, got {' '.join(words)!r}") from None
    if not label.is_integer() or not 0 <= label < classes:
        raise FormatError(f"{where}: class {words[0]} is outside 0…{classes - 1}; give the data's number of classes")
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        x, y = numbers[::2], numbers[1::2]
        numbers = [(min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)]
    if len(numbers) != 4:
        raise FormatError(f"{where}: expected a class and 4 numbers (or a polygon's), got {len(words)} words")
    centre_x, centre_y, width, height = numbers
    if not _inside(centre_x, centre_y, width, height):
        raise FormatError(f"{where}: expected fractions of the image's sides, the box inside it; got {' '.join(words)!r}")
    return (label, centre_x, centre_y, width, height, 0.0)


def _inside(centre_x: float, centre_y: float, width: float, height: float) -> bool:
    """Whether a box of fractions lies in the image, but for a little; not if one of them is NaN."""
    sides = (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
    return all(-_EDGE <= side <= 1 + _EDGE for side in sides) and min(width, height) >= 0


def _read_json(
    path: Path, folder: Path, classes: Sequence[str] | int | None, notes: Counter[str]
) -> tuple[tuple[Path, ...], tuple[Labels, ...], tuple[str, ...], tuple[Size, ...]]:
    """Read an instances JSON: files, labels, names of the classes and declared sizes.

    Its categories are numbered by `_categories`, boxes are fractions of the sizes it names.
    """
    content = _json(path)
    try:
        number, names = _categories(content["categories"], classes, path)
        sizes = _image_sizes(content["images"], path)
        rows: dict[int, list[tuple[float, ...]]] = {image: [] for image in sizes}
        for i, one in enumerate(content["annotations"]):
            where = f"{path}: annotation {one.get('id', i)}"
            if one["category_id"] not in number:
                raise FormatError(f"{where} has category {one['category_id']}, which is not in the file")
            if one["image_id"] not in sizes:
                notes["annotations without an image, skipped"] += 1
                continue
            box = _fractions(one["bbox"], *sizes[one["image_id"]][1], where)
            rows[one["image_id"]].append((float(number[one["category_id"]]), *box, float(one.get("iscrowd", 0))))
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise FormatError(f"{path} is no instances JSON of COCO: {type(error).__name__}: {error}") from error
    there = {file.name for file in folder.iterdir()}
    files, labels, declared = [], [], []
    for image, (name, size) in sorted(sizes.items()):
        notes["annotated images without a file, skipped"] += name not in there
        if name in there:
            notes["images without an annotation"] += not rows[image]
            files.append(folder / name)
            labels.append(_clean(rows[image], notes))
            declared.append(size)
    notes["images that the JSON file does not name, skipped"] += len(there - {name for name, _ in sizes.values()})
    if not files:
        raise DataNotFoundError(f"{folder} holds none of the {len(sizes)} images of {path}")
    return tuple(files), tuple(labels), names, tuple(declared)


def _image_sizes(content: Sequence[dict[str, Any]], path: Path) -> dict[int, tuple[str, Size]]:
    """Of each image's id its file, width and height."""
    for key in ("id", "file_name"):
        if (twice := _twice([one[key] for one in content])) is not None:
            raise FormatError(f"{path} has two images of the {key} {twice!r}")
    sizes = {one["id"]: (one["file_name"], (float(one["width"]), float(one["height"]))) for one in content}
    for image, (name, size) in sizes.items():
        if not all(0 < side < math.inf for side in size):
            raise FormatError(f"{path}: image {image} ({name}) should have a width and a height above 0, got {size}")
    return sizes


def _categories(
    content: Sequence[dict[str, Any]], classes: Sequence[str] | int | None, path: Path
) -> tuple[dict[int, int], tuple[str, ...]]:
    """The number of each category's id, and the names of all numbers: `classes`, or the file's in the order of its ids."""
    ordered = sorted(content, key=lambda one: one["id"])
    keys, found = [one["id"] for one in ordered], [str(one.get("name", one["id"])) for one in ordered]
    for what, values in (("id", keys), ("name", found)):
        if (twice := _twice(values)) is not None:
            raise FormatError(f"{path} has two categories of the {what} {twice!r}")
    if isinstance(classes, int) and classes != len(found):
        raise FormatError(f"{path} has {len(found)} categories, classes says {classes}; give their names, or leave it out")
    names = tuple(found) if classes is None or isinstance(classes, int) else _names(classes)
    for name in found:
        if name not in names:
            near = suggest(name, names)
            raise FormatError(f"{path}: the category {name!r} is none of the {len(names)} classes{near}; name it in classes")
    return {key: names.index(name) for key, name in zip(keys, found, strict=True)}, names


def _fractions(bbox: Sequence[float], across: float, down: float, where: str) -> tuple[float, float, float, float]:
    """From left, top, width and height in pixels to centre, width and height in fractions of the image."""
    if len(bbox) != 4:
        raise FormatError(f"{where}: expected bbox = [left, top, width, height], got {bbox}")
    x, y, width, height = bbox
    box = ((x + width / 2) / across, (y + height / 2) / down, width / across, height / down)
    if not _inside(*box):
        raise FormatError(f"{where}: expected a box inside its image of {across:g}×{down:g} pixels, got {bbox}")
    return box


def _json(path: Path) -> Any:
    if not path.is_file():
        raise DataNotFoundError(f"there is no annotation file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not a readable JSON file: {error}") from error


def _clean(rows: Sequence[tuple[float, ...]], notes: Counter[str]) -> Labels:
    """Without boxes of no area and boxes that are there twice; both are counted."""
    kept = [row for row in rows if row[3] > 0 and row[4] > 0]
    distinct = list(dict.fromkeys(kept))
    notes["boxes of no area, skipped"] += len(rows) - len(kept)
    notes["boxes that are there twice, taken once"] += len(kept) - len(distinct)
    return np.array(distinct, dtype=np.float64).reshape(-1, 6)


def _cached(data: DetectionSet) -> DetectionSet:
    """Decode everything into memory; an image that cannot be read is counted and left out, with its boxes."""
    pixels, places, good = [], [], []
    faults = []
    for i, file in enumerate(data.files):
        try:
            square, place = read_image(file, data.size, data.fit)
        except FormatError as error:
            faults.append(str(error))
            continue
        if data.declared:
            _check_proportions(file, place, data.declared[i])
        pixels.append(square)
        places.append(place)
        good.append(i)
    if not good:
        raise FormatError(f"{data.name}: none of {len(data)} images can be read; the first: {faults[0]}")
    if faults:
        data.notes[f"unreadable images, skipped (the first: {faults[0]})"] += len(faults)
    return replace(data.subset(good, data.name), pixels=(torch.stack(pixels), tuple(places)))
