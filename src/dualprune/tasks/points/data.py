"""The KITTI 3D object layout: points, labels, calibration, and batches that are a pure function of (seed, epoch, step).

    <root>/ImageSets/train.txt, val.txt           frame numbers, one a line
    <root>/training/velodyne/000008.bin           x, y, z, intensity as float32; or velodyne_reduced/: the camera's view only
    <root>/training/label_2/000008.txt, calib/000008.txt, image_2/000008.png (or .jpg; only its size is read)

Boxes are those of `dualprune.tasks.points.boxes` in the lidar's frame (x ahead, y left, z up). What a frame lacks is an
error with the frame's name before training starts; what is left out of training (DontCare, other classes) is counted.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DataNotFoundError, DualpruneError, FormatError, suggest
from dualprune.files import listing_sha256
from dualprune.tasks.points.boxes import corners_3d, wrap_angle

KINDS = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare")
Augment = Literal["none", "flip", "full"]
_LARGEST_CONDITION = 1e6  # of a calibration's matrices: 1 for rotations, about a thousand for the cameras
T = TypeVar("T")
PointBatch = tuple[Tensor, list[Tensor]]  # points (b, p, 4), padded with NaN; for every frame its boxes and classes (n, 8)


@dataclass(frozen=True, eq=False)
class Objects:
    """The lines of one label or result file, in the benchmark's own terms; all arrays have one row a line.

    Attributes:
        kind: names of the classes.
        truncation: share of the object outside the image, 0 to 1; -1 not said.
        occlusion: 0 visible, 1 partly, 2 largely hidden, 3 unknown; -1 not said.
        alpha: angle at which the object is seen.
        bbox: (n, 4) left, top, right, bottom in pixels of image 2.
        size: (n, 3) height, width, length in metres.
        location: (n, 3) middle of the box's bottom in the rectified camera's frame.
        rotation: about the camera's y axis.
        score: confidence; 1 in labels.
    """

    kind: np.ndarray
    truncation: np.ndarray
    occlusion: np.ndarray
    alpha: np.ndarray
    bbox: np.ndarray
    size: np.ndarray
    location: np.ndarray
    rotation: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: np.ndarray) -> Objects:
        return Objects(**{name: value[rows] for name, value in vars(self).items()})

    def upright(self) -> Tensor:
        """The boxes in the camera's (x, z, y) frame, which upright boxes need to be compared: float64 (n, 7)."""
        x, y, z = self.location.T
        height, width, length = self.size.T
        return torch.from_numpy(np.stack([x, z, y - height / 2, length, width, height, -self.rotation], 1).astype(np.float64))

    def lines(self) -> list[str]:
        """The benchmark's text: 15 numbers and names a line, the score 16th."""
        numbers = np.column_stack([self.alpha, self.bbox, self.size, self.location, self.rotation, self.score])
        heads = [f"{k} {t:.2f} {o}" for k, t, o in zip(self.kind, self.truncation, self.occlusion, strict=True)]
        return [" ".join([head, *(f"{value:.4f}" for value in row)]) for head, row in zip(heads, numbers, strict=True)]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where camera 2 and the lidar are: `p2` (3, 4) projects, `to_camera` (4, 4) takes the lidar's frame to the camera's."""

    p2: np.ndarray
    to_camera: np.ndarray

    def camera(self, points: np.ndarray) -> np.ndarray:
        """Lidar points (n, 3) in the rectified camera's frame."""
        return points @ self.to_camera[:3, :3].T + self.to_camera[:3, 3]

    def lidar(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 3) of the rectified camera in the lidar's frame."""
        inverse = np.linalg.inv(self.to_camera)
        return points @ inverse[:3, :3].T + inverse[:3, 3]

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 3) of the rectified camera, in front of it, as pixels of image 2: (n, 2)."""
        image = points @ self.p2[:, :3].T + self.p2[:, 3]
        return image[:, :2] / image[:, 2:]


@dataclass(frozen=True, eq=False)
class Kitti:
    """Frames in the KITTI layout; files are read when asked for, small ones once.

    Attributes:
        name: what to call the data.
        folder: ``<root>/training``.
        train: numbers of the frames to train on.
        test: numbers of the frames to measure on.
        classes: what is to be found.
    """

    name: str
    folder: Path
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: tuple[str, ...]
    _kept: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for kind in self.classes:
            if kind not in KINDS[:-1]:
                raise DualpruneError(f"KITTI has no class {kind!r}{suggest(kind, KINDS)}; it has {', '.join(KINDS[:-1])}")
        frames = sorted({*self.train, *self.test})
        broken = [fault for fault in map(self._fault, frames) if fault]
        if broken:
            shown = "; ".join(broken[:5]) + ("; …" if len(broken) > 5 else "")
            raise FormatError(f"{self.folder}: {len(broken)} of {len(frames)} frames cannot be used: {shown}")

    def points(self, frame: str) -> Tensor:
        """The points that camera 2 sees, float32 (n, 4): x, y, z, intensity."""
        path = self._points_path(frame)
        points = read_points(path)
        if path.parent.name == "velodyne":
            points = points[in_view(points[:, :3], self.calibration(frame), self.image_size(frame))]
        return torch.from_numpy(points)

    def label(self, frame: str) -> Objects:
        """The frame's labels, DontCare included."""
        return self._once("label", frame, read_objects, self.folder / "label_2" / f"{frame}.txt")

    def calibration(self, frame: str) -> Calibration:
        """The frame's calibration."""
        return self._once("calib", frame, read_calibration, self.folder / "calib" / f"{frame}.txt")

    def image(self, frame: str) -> Path | None:
        """The frame's picture of camera 2, if it is there."""
        paths = (self.folder / "image_2" / f"{frame}{suffix}" for suffix in (".png", ".jpg"))
        return next((path for path in paths if path.is_file()), None)

    def image_size(self, frame: str) -> tuple[int, int]:
        """Width and height of the frame's picture."""
        return self._once("size", frame, _image_size, self.image(frame))

    def boxes(self, frame: str) -> Tensor:
        """Objects of the wanted classes in the lidar's frame: float32 (n, 8), the class's index last."""
        objects = self.label(frame)
        wanted = np.isin(objects.kind, self.classes)
        objects = objects[wanted]
        index = torch.tensor([self.classes.index(kind) for kind in objects.kind], dtype=torch.float32)
        return torch.cat([to_lidar(objects, self.calibration(frame)), index[:, None]], 1)

    @cached_property
    def passed_over(self) -> Counter[str]:
        """How many objects of which other classes there are."""
        kinds = (kind for frame in {*self.train, *self.test} for kind in self.label(frame).kind.tolist())
        return Counter(kind for kind in kinds if kind not in self.classes)

    @cached_property
    def summary(self) -> str:
        """What there is to train on and to measure on, and what of it is passed over, in a few words."""
        rows = []
        for part, frames in (("train", self.train), ("test", self.test)):
            count = Counter(kind for frame in frames for kind in self.label(frame).kind.tolist())
            found = ", ".join(f"{count[kind]} {kind}" for kind in self.classes)
            others = ", ".join(f"{n} {kind}" for kind, n in sorted(count.items()) if kind not in self.classes)
            empty = sum(not np.isin(self.label(frame).kind, self.classes).any() for frame in frames)
            rows.append(
                f"{part}: {len(frames)} frames, {empty} with nothing to find; {found}; passed over: {others or 'nothing'}"
            )
        return "\n".join(rows)

    def sha256(self) -> str:
        """SHA-256 of the lists of frames and of the names and sizes of their files, in order."""
        frames = (*self.train, *self.test)
        files = (
            path
            for frame in frames
            for path in (self._points_path(frame), *(self.folder / part / f"{frame}.txt" for part in ("label_2", "calib")))
        )
        return hashlib.sha256(f"{len(self.train)} {listing_sha256(self.folder, files)}".encode()).hexdigest()

    def hold_out(self, fraction: float, seed: int) -> Kitti:
        """The same data with a part of the training frames, drawn by `seed`, as test frames."""
        count = max(1, round(fraction * len(self.train)))
        if count >= len(self.train):
            raise DualpruneError(f"{self.name}: holding out {count} of {len(self.train)} training frames leaves none")
        order = torch.randperm(len(self.train), generator=_generator("split", seed)).tolist()
        frames = [self.train[i] for i in order]
        return replace(
            self, name=f"{self.name}-validation", train=tuple(sorted(frames[count:])), test=tuple(sorted(frames[:count]))
        )

    def _points_path(self, frame: str) -> Path:
        full, reduced = (self.folder / place / f"{frame}.bin" for place in ("velodyne", "velodyne_reduced"))
        return reduced if reduced.is_file() and not full.is_file() else full

    def _fault(self, frame: str) -> str:
        """What of a frame is not there or cannot be whole, found without reading it."""
        points = self._points_path(frame)
        for path in (points, self.folder / "label_2" / f"{frame}.txt", self.folder / "calib" / f"{frame}.txt"):
            if not path.is_file():
                return f"no file {path.parent.name}/{path.name}"
        if self.image(frame) is None:
            return f"no file image_2/{frame}.png (or .jpg)"
        size = points.stat().st_size
        return f"{points.parent.name}/{points.name} has {size} bytes, no multiple of 16" if size % 16 or not size else ""

    def _once(self, what: str, frame: str, read: Callable[[Any], T], path: Path | None) -> T:
        if (what, frame) not in self._kept:
            self._kept[what, frame] = read(path)
        return self._kept[what, frame]


def load_kitti(
    name: str,
    root: str | Path | None = None,
    *,
    train: str = "train",
    test: str = "val",
    classes: Sequence[str] = ("Car", "Pedestrian", "Cyclist"),
) -> Kitti:
    """Find frames in the KITTI layout.

    Args:
        name: the folder's name, looked for in the folders of ``$DUALPRUNE_DATA`` and in ``data/``.
        root: the folder itself, which holds ``training/``; wins over `name`.
        train: which frames to train on: a file of ``ImageSets/`` without its ``.txt``, or "all".
        test: likewise, which to measure on.
        classes: what is to be found; heads, targets and scores are in this order.

    Raises:
        DataNotFoundError: there is no such folder; the message lists where it was looked for.
        FormatError: frames lack files, or a file is damaged.
        DualpruneError: no such list of frames or class.
    """
    given = [Path(part) for part in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if part]
    places = [Path(root).expanduser()] if root else [top / name for top in (*given, Path("data"))]
    found = next((place for place in places if (place / "training").is_dir()), None)
    if found is None:
        raise DataNotFoundError(
            f"no KITTI frames {name!r}: looked for a folder 'training' in {', '.join(map(str, places))}; get the 3D object "
            "data (velodyne, image_2, label_2, calib) from cvlibs.net, and give [data] root or set DUALPRUNE_DATA"
        )
    return Kitti(name, found / "training", _frames(found, train), _frames(found, test), tuple(classes))


def read_points(path: Path) -> np.ndarray:
    """Read a velodyne file: float32 (n, 4); points that are not finite are an error.

    Raises:
        FormatError: the file is cut off, empty, or holds something else.
    """
    content = path.read_bytes()
    if not content or len(content) % 16:
        raise FormatError(f"{path} has {len(content)} bytes; points are 16 bytes each (x, y, z, intensity as float32)")
    points = np.frombuffer(content, np.float32).reshape(-1, 4).copy()
    if not np.isfinite(points).all():
        raise FormatError(f"{path}: {int((~np.isfinite(points).all(1)).sum())} points are not finite; is it float32?")
    return points


def read_objects(path: Path) -> Objects:
    """Read a label file (15 fields a line) or a result file (16, the score last); an empty file has no objects.

    Raises:
        FormatError: a line has other fields, a number is none, the class is none of KITTI's, or an object (DontCare is none)
            has no size, an empty box, or a truncation or occlusion that KITTI does not have.
    """
    kinds, rows = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) not in (15, 16):
            raise FormatError(f"{path}, line {number}: expected 15 fields, or 16 with a score, got {len(fields)}: {line!r}")
        if fields[0] not in KINDS:
            hint = suggest(fields[0], KINDS)
            raise FormatError(f"{path}, line {number}: unknown class {fields[0]!r}{hint}; KITTI has {', '.join(KINDS)}")
        try:
            values = [float(value) for value in fields[1:]]
        except ValueError as error:
            raise FormatError(f"{path}, line {number}: {error}") from None
        if not all(map(math.isfinite, values)):
            raise FormatError(f"{path}, line {number}: a number is not finite: {line!r}")
        if fields[0] != "DontCare" and (fault := _object_fault(values)):
            raise FormatError(f"{path}, line {number}: {fault}")
        kinds.append(fields[0])
        rows.append(values if len(fields) == 16 else [*values, 1.0])
    return _objects(kinds, np.array(rows, np.float64).reshape(-1, 15))


def _object_fault(values: Sequence[float]) -> str:
    """What of an object's numbers cannot be, its class left out; "" if nothing."""
    truncation, occlusion, (left, top, right, bottom), size = values[0], values[1], values[3:7], values[7:10]
    if min(size) <= 0:
        return f"height, width and length are above 0, got {' '.join(f'{side:g}' for side in size)}"
    if not (right > left and bottom > top):
        return f"a box is left, top, right, bottom; this one is empty: {left:g} {top:g} {right:g} {bottom:g}"
    if truncation != -1 and not 0 <= truncation <= 1:
        return f"truncation lies in [0, 1], or is -1, got {truncation:g}"
    return "" if occlusion in (-1, 0, 1, 2, 3) else f"occlusion is 0, 1, 2 or 3, or -1, got {occlusion:g}"


def read_calibration(path: Path) -> Calibration:
    """Read P2, R0_rect and Tr_velo_to_cam of a calibration file.

    Raises:
        FormatError: one of them is missing, has another number of values or one that is not finite, or maps space onto less.
    """
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    rows = {key: (number, text) for number, line in lines for key, colon, text in (line.partition(":"),) if colon}

    def matrix(key: str, shape: tuple[int, int]) -> np.ndarray:
        if key not in rows:
            raise FormatError(f"{path} has no {key}; it has {', '.join(rows) or 'nothing'}")
        number, text = rows[key]
        where = f"{path}, line {number}: {key}"
        try:
            values = np.array(text.split(), np.float64).reshape(shape)
        except ValueError:
            raise FormatError(f"{where} should be {shape[0] * shape[1]} numbers, got {text.strip()!r}") from None
        if not np.isfinite(values).all():
            raise FormatError(f"{where} has a number that is not finite: {text.strip()!r}")
        if np.linalg.cond(values[:, :3]) > _LARGEST_CONDITION:
            raise FormatError(f"{where} is singular, so that points cannot be taken back: {text.strip()!r}")
        return values

    rectify, lidar = np.eye(4), np.eye(4)
    rectify[:3, :3], lidar[:3] = matrix("R0_rect", (3, 3)), matrix("Tr_velo_to_cam", (3, 4))
    return Calibration(matrix("P2", (3, 4)), rectify @ lidar)


def to_lidar(objects: Objects, calibration: Calibration) -> Tensor:
    """Boxes of labels in the lidar's frame: float32 (n, 7)."""
    height, width, length = objects.size.T
    middle = calibration.lidar(objects.location - np.stack([height * 0, height / 2, height * 0], 1))
    heading = wrap_angle(torch.from_numpy(-objects.rotation - math.pi / 2))
    return torch.from_numpy(np.column_stack([middle, length, width, height, heading.numpy()])).float()


def to_objects(boxes: Tensor, kinds: Sequence[str], scores: Tensor, calibration: Calibration, size: tuple[int, int]) -> Objects:
    """What was found in the lidar's frame, (n, 7), in the benchmark's terms; the 2D box is that of the projected corners.

    Boxes behind the camera or outside the image are left out: the benchmark labels what camera 2 sees.
    """
    found = boxes.double().cpu()
    corners = calibration.camera(corners_3d(found).numpy().reshape(-1, 3)).reshape(-1, 8, 3)
    ahead = (corners[..., 2] > 0.1).all(1)
    pixels = calibration.pixels(corners[ahead].reshape(-1, 3)).reshape(-1, 8, 2)
    limit = np.array(size, np.float64) - 1
    bbox = np.concatenate([pixels.min(1).clip(0, limit), pixels.max(1).clip(0, limit)], 1)
    seen = (bbox[:, 2:] > bbox[:, :2]).all(1)
    rows = np.flatnonzero(ahead)[seen]
    length, width, height, heading = found.numpy()[rows, 3:].T
    location = calibration.camera(found.numpy()[rows, :3]) + np.stack([height * 0, height / 2, height * 0], 1)
    rotation = wrap_angle(torch.from_numpy(-heading - math.pi / 2)).numpy()
    alpha = wrap_angle(torch.from_numpy(rotation - np.arctan2(location[:, 0], location[:, 2]))).numpy()
    flat = [rotation * 0, rotation * 0, alpha, bbox[seen], height, width, length, location, rotation]
    values = np.column_stack([*flat, scores.double().cpu().numpy()[rows]])
    return _objects([kinds[row] for row in rows], values)


def in_view(points: np.ndarray, calibration: Calibration, size: tuple[int, int]) -> np.ndarray:
    """Which lidar points (n, 3) camera 2 sees: bool (n,)."""
    camera = calibration.camera(points)
    ahead = camera[:, 2] > 0
    pixels = calibration.pixels(np.where(ahead[:, None], camera, 1.0))
    return ahead & (pixels >= 0).all(1) & (pixels < np.array(size)).all(1)


def augmented(points: Tensor, boxes: Tensor, kind: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror left and right (both kinds), turn by up to 45° about the lidar and scale by up to 5 % ("full").

    Args:
        points: (n, 4), left as they are.
        boxes: (m, 8), likewise.
        kind: "none", "flip" or "full".
        generator: draws three numbers, whatever the kind.
    """
    flip, turn, scale = torch.rand(3, generator=generator).tolist()
    points, boxes = points.clone(), boxes.clone()
    if kind != "none" and flip < 0.5:
        points[:, 1], boxes[:, 1], boxes[:, 6] = -points[:, 1], -boxes[:, 1], -boxes[:, 6]
    if kind == "full":
        angle, factor = (turn - 0.5) * math.pi / 2, 0.95 + 0.1 * scale
        rotation = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        points[:, :2], boxes[:, :2], boxes[:, 6] = points[:, :2] @ rotation, boxes[:, :2] @ rotation, boxes[:, 6] + angle
        points[:, :3], boxes[:, :6] = points[:, :3] * factor, boxes[:, :6] * factor
    boxes[:, 6] = wrap_angle(boxes[:, 6])
    return points, boxes


def collate(frames: Sequence[tuple[Tensor, Tensor]], device: torch.device | None = None) -> PointBatch:
    """One tensor of all frames' points, filled up with NaN points, and the list of their boxes."""
    points = torch.nn.utils.rnn.pad_sequence([points for points, _ in frames], batch_first=True, padding_value=math.nan)
    boxes = _moved(torch.cat([boxes for _, boxes in frames]), device)
    return _moved(points, device), list(boxes.split([len(boxes) for _, boxes in frames]))


def _moved(t: Tensor, device: torch.device | None) -> Tensor:
    """To the device; a GPU fetches it from pinned memory while this process goes on."""
    if device is None or device.type != "cuda":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def train_batches(
    data: Kitti,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment,
    start_step: int = 0,
    workers: int = 0,
    device: torch.device | None = None,
) -> Iterator[PointBatch]:
    """Yield an epoch's full batches, shuffled and augmented, from `start_step` on: a pure function of the arguments.

    Args:
        data: the frames.
        batch_size: frames in a batch; those left over are dropped, others each epoch.
        seed: of the run.
        epoch: counted from 0.
        augment: "none", "flip" or "full".
        start_step: how many batches to pass over.
        workers: threads that read ahead; they have no say in what comes out.
        device: where the batches go.
    """
    order = torch.randperm(len(data.train), generator=_generator("order", seed, epoch)).tolist()

    def load(frame: str) -> tuple[Tensor, Tensor]:
        return augmented(data.points(frame), data.boxes(frame), augment, _generator("augment", seed, epoch, frame))

    frames = [data.train[i] for i in order[start_step * batch_size : len(order) // batch_size * batch_size]]
    loaded = _ahead(load, frames, workers, 2 * batch_size)
    for _ in range(len(frames) // batch_size):
        yield collate([next(loaded) for _ in range(batch_size)], device)


def plain_batches(
    data: Kitti, frames: Sequence[str], batch_size: int, device: torch.device | None = None
) -> Iterator[PointBatch]:
    """Yield the frames in order, as they are; the last batch may be smaller."""
    for start in range(0, len(frames), batch_size):
        part = frames[start : start + batch_size]
        yield collate([(data.points(frame), data.boxes(frame)) for frame in part], device)


def _ahead(load: Callable[[str], T], frames: Iterable[str], workers: int, depth: int) -> Iterator[T]:
    """`map`, with threads that work up to `depth` frames ahead."""
    if not workers:
        yield from map(load, frames)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[T]] = deque()
        for frame in frames:
            waiting.append(pool.submit(load, frame))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _objects(kinds: Sequence[str], values: np.ndarray) -> Objects:
    """Columns as in a result file: truncation, occlusion, alpha, bbox, size, location, rotation, score."""
    truncation, occlusion, alpha, bbox, size, location, rotation, score = np.split(values, [1, 2, 3, 7, 10, 13, 14], 1)
    names = np.array(kinds, dtype=object)
    hidden = occlusion[:, 0].astype(int)
    return Objects(names, truncation[:, 0], hidden, alpha[:, 0], bbox, size, location, rotation[:, 0], score[:, 0])


def _frames(root: Path, which: str) -> tuple[str, ...]:
    if which == "all":
        folders = [root / "training" / place for place in ("velodyne", "velodyne_reduced")]
        found = sorted({path.stem for folder in folders for path in folder.glob("*.bin")})
        if not found:
            raise DataNotFoundError(f"no .bin file in {' or '.join(map(str, folders))}")
        return tuple(found)
    lists = root / "ImageSets"
    path = lists / f"{which}.txt"
    if not path.is_file():
        near = suggest(which, [other.stem for other in lists.glob("*.txt")])
        raise DataNotFoundError(f"no list of frames {path}{near}; put it there, or say 'all' for every frame there is")
    return tuple(path.read_text(encoding="utf-8").split())


def _image_size(path: Path | None) -> tuple[int, int]:
    from PIL import Image

    from dualprune.tasks.image_files import UNREADABLE

    try:
        with Image.open(path) as image:  # type: ignore[arg-type]
            return image.size
    except UNREADABLE as error:
        raise FormatError(f"{path} is no readable image: {error}") from error


def _generator(*parts: object) -> torch.Generator:
    """A generator whose seed differs, in all its bits, for different parts; the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
