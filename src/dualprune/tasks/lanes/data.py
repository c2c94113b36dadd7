"""The TuSimple layout: a JSON object a line for each labelled frame, images in ``clips``; batches for the network."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError
from dualprune.tasks.lanes.grid import Array, Grid, Motion, resample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LANE_WIDTH = 16  # pixels of a 1280-pixel frame that a lane covers in the segmentation's mask
_FOLDERS = ("", "train_set", "test_set")  # everything in one place, or as it is unpacked

Sample = tuple[Tensor, Tensor, Tensor]
Draw = tuple[int, tuple[int, ...] | None]  # which frame, and the seed it is moved by


@dataclass(frozen=True, eq=False)
class Frame:
    """One labelled frame.

    Attributes:
        name: ``raw_file`` of the label.
        image: where the picture is.
        lanes: as marked, float64 (lanes, rows); below 0 where a lane is not on a row.
        heights: of the rows in pixels, ascending, float64 (rows,).
    """

    name: str
    image: Path
    lanes: Array
    heights: Array


@dataclass(frozen=True, eq=False)
class TuSimple:
    """The labelled frames.

    Attributes:
        train: trained on.
        test: measured on.
        counts: what is odd about the labels, and on how many frames, lanes or points; nothing of it is hidden.
        source: where they lie.
    """

    train: tuple[Frame, ...]
    test: tuple[Frame, ...]
    counts: Counter[str]
    source: Path

    def hold_out(self, fraction: float, seed: int) -> TuSimple:
        """The same frames with a random part of the training frames (at least one) as the test part.

        Raises:
            DualpruneError: nothing would be left to train on.
        """
        count = max(1, round(fraction * len(self.train)))
        if count >= len(self.train):
            raise DualpruneError(f"holding out {count} of {len(self.train)} training frames leaves none to train on")
        held = set(np.random.default_rng([seed, 1]).permutation(len(self.train))[:count].tolist())
        test = tuple(frame for number, frame in enumerate(self.train) if number in held)
        train = tuple(frame for number, frame in enumerate(self.train) if number not in held)
        return replace(self, train=train, test=test)

    def sha256(self) -> str:
        """SHA-256 of the frames' names, of the sizes of their images and of all labels, in order."""
        frames = (*self.train, *self.test)
        listed = [(len(self.train), frame.name, frame.image.stat().st_size) for frame in frames]
        labels = b"".join(part.tobytes() for frame in frames for part in (frame.lanes, frame.heights))
        return hashlib.sha256(repr(listed).encode() + labels).hexdigest()

    def notes(self) -> str:
        """The counts in words, or nothing."""
        return "; ".join(f"{count} {what}" for what, count in self.counts.items())


def load_tusimple(
    name: str = "tusimple",
    root: str | Path | None = None,
    *,
    train: str = "label_data*.json",
    test: str = "test_label.json",
    frame: tuple[int, int] = (720, 1280),
    missing: Literal["error", "skip"] = "error",
) -> TuSimple:
    """Read the labels of a folder in TuSimple's layout; images are decoded later.

    Args:
        name: of the folder, looked for in the folders of the environment variable DUALPRUNE_DATA and in ``data``.
        root: the folder itself.
        train: the training labels; a pattern, looked for in the folder, in ``train_set`` and in ``test_set``.
        test: the test labels, likewise.
        frame: height and width of all frames in pixels.
        missing: "skip" leaves out, counts and warns of labels whose image is not there; "error" refuses them.

    Raises:
        DataNotFoundError: no such folder, labels or images; the message says where they were looked for.
        FormatError: a label is not what the layout promises; the message has file and line.
    """
    folder = _folder(name, root, train)
    counts: Counter[str] = Counter()
    parts = [_read(folder, pattern, frame, missing, counts) for pattern in (train, test)]
    return TuSimple(parts[0], parts[1], counts, folder)


def _folder(name: str, root: str | Path | None, labels: str) -> Path:
    given = [Path(part) for part in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if part]
    tried = [Path(root)] if root is not None else [top / name for top in (*given, Path("data"))]
    for folder in tried:
        if _labels(folder, labels):
            return folder
    raise DataNotFoundError(
        f"{name}: no labels {labels!r} in {', '.join(map(str, tried))}. Put TuSimple's {labels} and its clips/ there, "
        "or set root, or the environment variable DUALPRUNE_DATA to the folder that holds it"
    )


def _labels(folder: Path, pattern: str) -> list[Path]:
    found = (sorted((folder / part).glob(pattern)) for part in _FOLDERS)
    return next((files for files in found if files), [])


def _read(folder: Path, pattern: str, size: tuple[int, int], missing: str, counts: Counter[str]) -> tuple[Frame, ...]:
    files = _labels(folder, pattern)
    if not files:
        raise DataNotFoundError(
            f"{folder} has no labels {pattern!r}; it needs those of the test set too ([data] options: test = PATTERN)"
        )
    frames = [
        _frame(line, f"{file}:{number}", file.parent, folder, size, counts)
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    there = tuple(frame for frame in frames if frame.image.is_file())
    lost = [frame for frame in frames if not frame.image.is_file()]
    if not there or (lost and missing == "error"):
        first = f"{len(lost)} of {len(frames)} images are missing, the first is {lost[0].image}" if lost else "no label in it"
        raise DataNotFoundError(f"{files[0]}: {first}; unpack the clips there, or leave such labels out: missing = 'skip'")
    if lost:
        counts[f"frames of {pattern} without their image, left out"] += len(lost)
        warnings.warn(f"{folder}: {len(lost)} of {len(frames)} frames of {pattern} have no image and are left out")
    return there


def _frame(line: str, where: str, beside: Path, folder: Path, size: tuple[int, int], counts: Counter[str]) -> Frame:
    try:
        label = json.loads(line)
        name, rows, lanes = str(label["raw_file"]), list(label["h_samples"]), list(label["lanes"])
    except (ValueError, TypeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{where}: expected an object with raw_file, lanes and h_samples ({reason})") from error
    if not rows or not all(map(_number, rows)) or any(a >= b for a, b in pairwise(rows)):
        raise FormatError(f"{where}: h_samples should be ascending heights, finite numbers, got {rows}")
    heights = np.asarray(rows, float)
    for number, lane in enumerate(lanes):
        if not isinstance(lane, list) or len(lane) != len(heights) or not all(_number(x) for x in lane):
            points = f"{len(lane)} entries" if isinstance(lane, list) else repr(lane)
            raise FormatError(
                f"{where}: lane {number} should be {len(heights)} numbers, one for each of h_samples, got {points}"
            )
    x = np.asarray(lanes, float).reshape(len(lanes), len(heights))
    _count(x, heights, size, counts)
    bases = dict.fromkeys([beside, *(folder / part for part in _FOLDERS)])
    paths = [base / name for base in bases]
    return Frame(name, next((path for path in paths if path.is_file()), paths[0]), x, heights)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _count(x: Array, heights: Array, size: tuple[int, int], counts: Counter[str]) -> None:
    """Count what is odd but allowed; points beyond the frame are not trained on, the benchmark counts them."""
    found = {
        "frames without lanes": int(not (x >= 0).any()),
        "lanes without points": int((~(x >= 0).any(1)).sum()),
        "points beyond the frame's right edge": int((x > size[1] - 1).sum()),
        "rows above the frame": int((heights < 0).sum()),
        "rows below the frame": int((heights >= size[0]).sum()),
    }
    counts.update({what: count for what, count in found.items() if count})


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Samples(torch.utils.data.Dataset[Sample]):
    """Decodes frames; asked for (index, seed of the augmentation or None).

    Attributes:
        frames: which.
        grid: how lanes become classes.
        size: height and width of the network's input.
        mask: also draw the segmentation's target.
        cache: keep the decoded images; for a few frames.
    """

    frames: Sequence[Frame]
    grid: Grid
    size: tuple[int, int]
    mask: bool = False
    cache: bool = False
    _kept: dict[int, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, draw: Draw) -> Sample:
        """Return uint8 (3, height, width), int64 cells (rows, lanes), int64 mask (height / 8, width / 8) or empty."""
        index, seed = draw
        frame, grid, pixels = self.frames[index], self.grid, self.pixels(index)
        x, _ = grid.slots(frame.lanes, frame.heights)
        at = resample(x, frame.heights, grid.anchors)
        if seed is not None:
            motion = Motion.draw(np.random.default_rng(seed), grid.frame)
            pixels, at = motion.image(pixels), grid.extend(moved(x, frame.heights, motion, grid))
        from PIL import Image

        small = pixels.resize(self.size[::-1], Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()
        mask = draw_mask(at, grid, self.size) if self.mask else np.zeros((0, 0), np.int64)
        return image, torch.from_numpy(grid.encode(at)), torch.from_numpy(mask)

    def pixels(self, index: int) -> Any:
        """The whole frame as a PIL image.

        Raises:
            FormatError: the file is damaged or of another size.
        """
        if index in self._kept:
            return self._kept[index]
        pixels = read_image(self.frames[index].image, self.grid.frame)
        if self.cache:
            self._kept[index] = pixels
        return pixels


def read_image(path: Path, size: tuple[int, int]) -> Any:
    """Decode a picture into a PIL image of (height, width) = `size`.

    Raises:
        FormatError: the file is damaged or of another size.
    """
    from PIL import Image

    from dualprune.tasks.image_files import UNREADABLE

    try:
        with Image.open(path) as image:
            pixels = image.convert("RGB")
    except UNREADABLE as error:
        raise FormatError(f"{path} is not a readable image: {error}") from error
    if pixels.size != size[::-1]:
        raise FormatError(
            f"{path} is {pixels.width}×{pixels.height} pixels, expected {size[1]}×{size[0]}; if all frames are, "
            f"set [data] options frame = [{pixels.height}, {pixels.width}]"
        )
    return pixels


def moved(x: Array, heights: Array, motion: Motion, grid: Grid) -> Array:
    """Move lanes (lanes, len(heights)) and read them on the grid's rows, -2 across gaps as `resample`: (lanes, rows)."""
    out = np.full((len(x), grid.rows), -2.0)
    for number, lane in enumerate(x):
        there = np.flatnonzero(lane >= 0)
        for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if len(there) else ():
            u, v = motion.points(lane[run], heights[run], grid.frame)
            u, v = (points[np.argsort(v)] for points in (u, v))
            # points left of the frame keep their place here, so that a lane can leave and come back
            inside = (grid.anchors >= v[0]) & (grid.anchors <= v[-1])
            out[number, inside] = np.interp(grid.anchors[inside], v, u)
    return np.where((out >= 0) & (out <= grid.frame[1] - 1), out, -2.0)


def draw_mask(x: Array, grid: Grid, size: tuple[int, int]) -> Array:
    """Draw lanes (lanes, rows) as 1, 2, … on background 0: int64 (⌈height / 8⌉, ⌈width / 8⌉)."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", grid.frame[::-1])
    pen = ImageDraw.Draw(canvas)
    for number, lane in enumerate(x, 1):
        points = [(u, v) for u, v in zip(lane.tolist(), grid.anchors.tolist(), strict=True) if u >= 0]
        pen.line(points, fill=number, width=max(1, round(LANE_WIDTH * grid.frame[1] / 1280)))
    height, width = (-(-side // 8) for side in size)
    return np.array(canvas.resize((width, height), Image.Resampling.NEAREST)).astype(np.int64)


def train_draws(
    count: int, *, batch_size: int, seed: int, epoch: int, augment: bool, repeat: int = 1, start_step: int = 0
) -> list[list[Draw]]:
    """Return the batches of one epoch as (frame, seed) pairs: a pure function of the arguments, every batch full.

    Args:
        count: frames.
        batch_size: frames a batch.
        seed: of the run.
        epoch: each has its own order.
        augment: whether frames get a seed to be moved by.
        repeat: how many times an epoch goes through the frames, each time in another order.
        start_step: how many batches to leave out at the beginning.
    """
    steps = steps_per_epoch(count, batch_size, repeat)
    if not 0 <= start_step <= steps:
        raise DualpruneError(f"start_step lies in 0…{steps}, the batches of an epoch, got {start_step}")
    rng = np.random.default_rng([seed, 2, epoch])
    order = np.concatenate([rng.permutation(count) for _ in range(repeat)]).tolist()
    draws: list[Draw] = [(index, (seed, 3, epoch, place) if augment else None) for place, index in enumerate(order)]
    return [draws[step * batch_size : (step + 1) * batch_size] for step in range(start_step, steps)]


def steps_per_epoch(count: int, batch_size: int, repeat: int = 1) -> int:
    """Return how many full batches an epoch has.

    Raises:
        DualpruneError: not even one.
    """
    if repeat < 1 or count * repeat < batch_size:
        raise DualpruneError(
            f"a batch of {batch_size} needs as many training frames, there are {count}, gone through {repeat} times"
        )
    return count * repeat // batch_size


def batches(
    samples: Samples,
    draws: Iterable[Sequence[Draw]],
    *,
    workers: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """Yield normalised float32 images (n, 3, height, width) with (cells, mask) for each list of draws, on `device`."""
    loader: Iterable[Any] = torch.utils.data.DataLoader(
        samples,
        batch_sampler=list(draws),  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
    )
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in (MEAN, STD))
    for image, cells, mask in loader:
        x = image.to(device, non_blocking=True).float().sub_(mean).div_(std)
        target = cells.to(device, non_blocking=True), mask.to(device, non_blocking=True)
        yield x.contiguous(memory_format=memory_format), target
