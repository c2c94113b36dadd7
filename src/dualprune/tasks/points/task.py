"""Objects in point clouds as a task: PointPillars on the KITTI layout, scored by the benchmark's rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dualprune.errors import DualpruneError
from dualprune.tasks.base import Batch, Task, evaluating
from dualprune.tasks.classification.models import load_weights
from dualprune.tasks.options import read_options
from dualprune.tasks.points.boxes import corners_bev
from dualprune.tasks.points.data import Augment, Kitti, Objects, load_kitti, plain_batches, to_objects, train_batches
from dualprune.tasks.points.loss import point_losses
from dualprune.tasks.points.metrics import MIN_OVERLAP, Score, View, kitti_scores, mean_score
from dualprune.tasks.points.model import PointPillars, build_points_model
from dualprune.tasks.points.targets import Found, detect

if TYPE_CHECKING:
    from dualprune.recipe_tables import OptimizerTable

logger = logging.getLogger("dualprune")
EVAL_BATCH = 4  # frames in a batch that is not trained on
_ORDER = ("moderate", "easy", "hard")
_HEADINGS: dict[str, tuple[View, str, int]] = {
    **{f"{view} {level} mAP": (view, level, 40) for view in ("3D", "BEV", "2D") for level in _ORDER},
    **{f"3D {level} mAP11": ("3D", level, 11) for level in _ORDER},
}
_AUGMENTS: dict[bool | str, Augment] = {True: "full", False: "none", "none": "none", "flip": "flip"}
Kind = Literal["Car", "Pedestrian", "Cyclist"]


@dataclass(frozen=True)
class ModelOptions:
    """``[model] options``; see `PointPillars`."""

    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    extent: tuple[float, ...] = (0.0, -39.68, -3.0, 69.12, 39.68, 1.0)
    cell: float = 0.16
    pillar_channels: int = 64
    layers: tuple[int, ...] = (3, 5, 5)
    strides: tuple[int, ...] = (2, 2, 2)
    filters: tuple[int, ...] = (64, 128, 256)
    up_filters: tuple[int, ...] = (128, 128, 128)


@dataclass(frozen=True)
class DataOptions:
    """``[data] options``.

    Attributes:
        train: a list of frames in ``ImageSets/``, or "all".
        test: likewise.
        workers: threads that read ahead.
        min_overlap: of `kitti_scores`, for the classes that shall have another than the benchmark's.
        sampling: of `kitti_scores`.
    """

    train: str = "train"
    test: str = "val"
    workers: Annotated[int, Field(ge=0)] = 0
    min_overlap: dict[Kind, Annotated[float, Field(ge=0, lt=1)]] = field(default_factory=dict)
    sampling: Literal["exact", "kit"] = "exact"


class Points(Task):
    """PointPillars; the metrics are means over the classes, with 40 recall points or, where the name says so, 11."""

    metrics = tuple(_HEADINGS)

    @cached_property
    def model_options(self) -> ModelOptions:
        """``[model] options``, checked."""
        return read_options(ModelOptions, self.recipe.model.options, "[model] options")

    @cached_property
    def data_options(self) -> DataOptions:
        """``[data] options``, checked."""
        return read_options(DataOptions, self.recipe.data.options, "[data] options")

    @cached_property
    def data(self) -> Kitti:
        """The frames, read when asked for; with split "validation" the test frames are training frames held out.

        What there is and what is passed over (``data.summary``) is logged.
        """
        data = self._whole
        data = data.hold_out(self.recipe.data.validation, self.recipe.seed) if self.split == "validation" else data
        (logger.warning if data.passed_over else logger.info)(f"{data.name}: {data.summary}")
        return data

    def data_sha256(self) -> str:  # noqa: D102
        return self._whole.sha256()

    @cached_property
    def _whole(self) -> Kitti:
        table, chosen = self.recipe.data, self.data_options
        return load_kitti(table.name, table.root, train=chosen.train, test=chosen.test, classes=self._classes)

    def model(self, *, with_weights: bool = True) -> nn.Module:  # noqa: D102
        table = self.recipe.model
        if table.pretrained:
            raise DualpruneError("pointpillars has no weights to fetch: leave pretrained out and give a weights file")
        torch.manual_seed(self.recipe.seed)
        model = build_points_model(table.name, vars(self.model_options))
        path = self.recipe.weights_path() if with_weights else None
        if path is not None:
            load_weights(model, path)
        return model.to(self.device).to(memory_format=self.memory_format)

    def steps_per_epoch(self, batch_size: int) -> int:  # noqa: D102
        steps = len(self.data.train) // batch_size
        if not steps:
            raise DualpruneError(f"a batch of {batch_size} needs as many training frames, got {len(self.data.train)}")
        return steps

    def train_batches(self, *, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:  # noqa: D102
        asked = self.recipe.data.augment
        if asked not in _AUGMENTS:
            raise DualpruneError(f"[data] augment: point clouds have true, 'flip' and 'none', got {asked!r}")
        place: dict[str, Any] = {"workers": self.data_options.workers, "device": self.device}
        order: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "start_step": start_step}
        return train_batches(self.data, augment=_AUGMENTS[asked], **order, **place)

    def loss(self, forward: Callable[..., Any], batch: Batch, settings: OptimizerTable) -> Tensor:  # noqa: D102
        if settings.label_smoothing:
            raise DualpruneError("the scores' loss is focal and has no label_smoothing; leave it 0")
        points, targets = batch
        with self.autocast():
            predictions = forward(points)
        return torch.stack(point_losses(self._anchors, predictions, targets)).sum()

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics that are defined, in %: a difficulty at which no object counts has none."""
        scores = self.scores(model)
        values = {name: mean_score(scores, *where) for name, where in _HEADINGS.items()}
        if values[self.metrics[0]] is None:
            raise DualpruneError(
                f"none of {', '.join(self._classes)} counts at moderate difficulty in the {len(self.data.test)} test frames: "
                "measure on more frames"
            )
        return {name: value for name, value in values.items() if value is not None}

    def scores(self, model: nn.Module) -> dict[tuple[View, str, str], Score]:
        """Return the whole table: (view, difficulty, class) → average precision."""
        chosen = self.data_options
        overlap: dict[str, float] = MIN_OVERLAP | dict(chosen.min_overlap)
        labels = [self.data.label(frame) for frame in self.data.test]
        found = [objects for _, objects in self.found(model, self.data.test)]
        return kitti_scores(labels, found, self._classes, overlap, chosen.sampling)

    def found(self, model: nn.Module, frames: Sequence[str]) -> Iterator[tuple[Found, Objects]]:
        """Yield what the model, in eval mode, finds in each frame: in the lidar's frame, and in the benchmark's terms."""
        with torch.inference_mode(), evaluating(model):
            waiting = iter(frames)
            for points, _ in plain_batches(self.data, frames, EVAL_BATCH, self.device):
                for one in detect(self._anchors, model(points)):
                    frame = next(waiting)
                    kinds = [self._classes[index] for index in one.classes.tolist()]
                    place = (self.data.calibration(frame), self.data.image_size(frame))
                    yield one, to_objects(one.boxes, kinds, one.scores, *place)

    def calibration(self, samples: int) -> Iterator[Any]:  # noqa: D102
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.data.train), generator=generator)[:samples]
        # the cumulative average counts each batch alike, so they are equally large to within one frame
        for part in order.tensor_split(max(1, -(-len(order) // EVAL_BATCH))):
            yield next(plain_batches(self.data, [self.data.train[i] for i in part.tolist()], EVAL_BATCH, self.device))[0]

    def pictures(self, model: nn.Module) -> list[tuple[str, np.ndarray]]:
        """Draw the four test frames with the most objects from above: labels in green, what is found in orange and red."""
        busiest = sorted(self.data.test, key=lambda frame: -len(self.data.boxes(frame)))[:4]
        drawn = []
        for frame, (found, _) in zip(busiest, self.found(model, busiest), strict=True):
            sure = Found(*(part[found.scores >= SHOWN].cpu() for part in found))
            boxes = self.data.boxes(frame)
            title = f"frame {frame}: {len(boxes)} labelled (green), {len(sure.boxes)} found with a score from {SHOWN} on"
            drawn.append((title, draw_bev(self.data.points(frame), boxes, sure, self._anchors.vfe.extent)))
        return drawn

    @cached_property
    def _anchors(self) -> PointPillars:
        """What loss and decoding ask of the model, apart from its (perhaps compiled) forward: anchors and classes."""
        return build_points_model(self.recipe.model.name, vars(self.model_options)).to(self.device)

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.model_options.classes


SHOWN = 0.3  # least score of a box that is drawn
_COLOURS = ((255, 140, 0), (230, 40, 80), (90, 160, 255))  # of the classes, in turn


def draw_bev(points: Tensor, boxes: Tensor, found: Found, extent: Sequence[float], side: int = 640) -> np.ndarray:
    """Draw a frame from above, ahead upwards: points grey, labels green, found boxes in their class's colour.

    Args:
        points: (n, 4).
        boxes: labels (m, 8).
        found: what the model found; a line from its middle shows where a box looks.
        extent: least x, y, z, greatest x, y, z of what is drawn.
        side: the picture's longer side in pixels.

    Returns:
        uint8 (height, width, 3).
    """
    from PIL import Image, ImageDraw

    scale = side / max(extent[3] - extent[0], extent[4] - extent[1])
    width, height = round((extent[4] - extent[1]) * scale), round((extent[3] - extent[0]) * scale)

    def pixels(xy: Tensor) -> Tensor:
        return torch.stack([extent[4] - xy[..., 1], extent[3] - xy[..., 0]], -1) * scale

    canvas = np.full((height, width, 3), 18, np.uint8)
    spots = pixels(points[:, :2]).long()
    column, row = spots[((spots >= 0) & (spots < torch.tensor([width, height]))).all(1)].T.numpy()
    canvas[row, column] = 150
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)

    def outline(box: Tensor, colour: tuple[int, int, int], thickness: int) -> None:
        ring = [tuple(corner) for corner in pixels(corners_bev(box[None, :7])[0]).tolist()]
        nose = box[:2] + torch.stack([box[6].cos(), box[6].sin()]) * box[3] / 2
        draw.line([*ring, ring[0]], colour, thickness)
        draw.line([tuple(pixels(box[:2]).tolist()), tuple(pixels(nose).tolist())], colour, thickness)

    for box in boxes:
        outline(box, (60, 220, 100), 3)
    for box, kind in zip(found.boxes, found.classes.tolist(), strict=True):
        outline(box, _COLOURS[kind % len(_COLOURS)], 1)
    return np.asarray(image)
