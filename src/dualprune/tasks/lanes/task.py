"""Lane detection as a task: Ultra-Fast-Lane-Detection on frames in TuSimple's layout, measured by its benchmark."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dualprune.errors import DualpruneError
from dualprune.tasks.base import Batch, Task, evaluating
from dualprune.tasks.classification.models import load_weights
from dualprune.tasks.lanes.data import (
    Frame,
    Samples,
    TuSimple,
    batches,
    load_tusimple,
    read_image,
    steps_per_epoch,
    train_draws,
)
from dualprune.tasks.lanes.grid import Array, Grid, resample
from dualprune.tasks.lanes.loss import LaneLoss
from dualprune.tasks.lanes.metrics import frame_scores, tusimple_scores
from dualprune.tasks.lanes.model import LaneNet
from dualprune.tasks.options import read_options

if TYPE_CHECKING:
    from dualprune.recipe_tables import OptimizerTable

logger = logging.getLogger("dualprune")
PICTURES = 4  # frames that are drawn
_EVAL_BATCH = 16
_MARKED, _PREDICTED = (60, 220, 90), (255, 70, 60)


@dataclass(frozen=True)
class ModelOptions:
    """``[model] options``; see `LaneNet` and `LaneLoss`. The defaults are the paper's for TuSimple."""

    size: tuple[int, int] = (288, 800)
    cells: int = 100
    rows: int = 56
    lanes: int = 4
    hidden: int = 2048
    aux: bool = False
    focal_gamma: float = 2.0
    similarity_weight: float = 1.0
    shape_weight: float = 0.0
    segmentation_weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.size) < 32 or self.hidden < 1:
            raise DualpruneError(f"size is at least 32×32 and hidden at least 1, got {self.size} and {self.hidden}")

    @property
    def loss(self) -> LaneLoss:
        """The losses' exponent and weights."""
        return LaneLoss(self.focal_gamma, self.similarity_weight, self.shape_weight, self.segmentation_weight)


@dataclass(frozen=True)
class DataOptions:
    """``[data] options``; `load_tusimple` and `Samples` explain most of them.

    Attributes:
        workers: processes that decode; 0 decodes in this one.
        repeat: how many times an epoch goes through the training frames.
        empty_lanes: also predict lanes without points, as the authors' test script does; the benchmark credits such a
            lane with every row on which a marked lane is absent. Without it a lane needs two points on the label's rows.
    """

    train: str = "label_data*.json"
    test: str = "test_label.json"
    frame: tuple[int, int] = (720, 1280)
    missing: Literal["error", "skip"] = "error"
    workers: int = 4
    cache: bool = False
    repeat: int = 1
    empty_lanes: bool = False


class Lanes(Task):
    """Frames with marked lanes; the labels are read when they are first needed.

    `measure` returns the benchmark's three figures in %; for false_positive_rate and false_negative_rate lower is better.
    """

    metrics = ("accuracy", "false_positive_rate", "false_negative_rate")

    @cached_property
    def model_options(self) -> ModelOptions:
        """``[model] options``, checked."""
        return read_options(ModelOptions, self.recipe.model.options, "[model] options")

    @cached_property
    def data_options(self) -> DataOptions:
        """``[data] options``, checked."""
        return read_options(DataOptions, self.recipe.data.options, "[data] options")

    @cached_property
    def grid(self) -> Grid:
        """Rows, cells and slots."""
        chosen = self.model_options
        return Grid(chosen.cells, chosen.rows, chosen.lanes, self.data_options.frame)

    @cached_property
    def data(self) -> TuSimple:
        """The labels; with split "validation" the test frames are training frames held out."""
        data = self._whole
        return data.hold_out(self.recipe.data.validation, self.recipe.seed) if self.split == "validation" else data

    def data_sha256(self) -> str:  # noqa: D102
        return self._whole.sha256()

    @cached_property
    def _whole(self) -> TuSimple:
        """All labels; what is odd about them (``data.notes()``) is logged."""
        table, chosen = self.recipe.data, self.data_options
        options: dict[str, Any] = {key: getattr(chosen, key) for key in ("train", "test", "frame", "missing")}
        data = load_tusimple(table.name, table.root, **options)
        left_out = sum(self.grid.slots(frame.lanes, frame.heights)[1] for frame in data.train)
        if left_out:
            data.counts["lanes too short or beyond the network's, not trained on"] = left_out
        if notes := data.notes():
            logger.warning(f"{table.name}: {notes}")
        return data

    def model(self, *, with_weights: bool = True) -> nn.Module:  # noqa: D102
        table, chosen = self.recipe.model, self.model_options
        prefix, _, backbone = table.name.partition("-")
        if prefix != "ufld" or not backbone:
            raise DualpruneError(f"the lane network's name is ufld- and a ResNet, as in 'ufld-resnet18'; got {table.name!r}")
        torch.manual_seed(self.recipe.seed)
        sizes: dict[str, Any] = {key: getattr(chosen, key) for key in ("size", "cells", "rows", "lanes", "hidden", "aux")}
        model = LaneNet(backbone=backbone, pretrained=table.pretrained and with_weights, **sizes)
        path = self.recipe.weights_path() if with_weights else None
        if path is not None:
            others = load_weights(model, path, strict=chosen.aux)
            unfit = [name for name in others if not name.startswith("aux_")]
            if unfit:
                raise DualpruneError(f"{path} does not fit {table.name}: {len(unfit)} names differ, the first is {unfit[0]}")
        return model.to(self.device).to(memory_format=self.memory_format)

    def steps_per_epoch(self, batch_size: int) -> int:  # noqa: D102
        return steps_per_epoch(len(self.data.train), batch_size, self.data_options.repeat)

    def train_batches(self, *, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:  # noqa: D102
        augment = self.recipe.data.augment
        if augment not in (True, False, "none"):
            raise DualpruneError(f"[data] augment is true or false for lanes, got {augment!r}")
        order: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "start_step": start_step}
        order |= {"augment": augment is True, "repeat": self.data_options.repeat}
        return self._batches(self._train, train_draws(len(self._train), **order))

    def loss(self, forward: Callable[..., Any], batch: Batch, settings: OptimizerTable) -> Tensor:  # noqa: D102
        if settings.label_smoothing:
            raise DualpruneError("the lane loss is focal and has no label_smoothing; leave it 0")
        images, (cells, mask) = batch
        with self.autocast():
            out = forward(images)
        scores, segmented = out if isinstance(out, tuple) else (out, None)
        return self.model_options.loss(scores.float(), cells, None if segmented is None else segmented.float(), mask)

    def measure(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        frames = self.data.test
        lanes = self.predict(model, range(len(frames)))
        return tusimple_scores((found, frame.lanes, frame.heights) for found, frame in zip(lanes, frames, strict=True))

    def predict(self, model: nn.Module, indices: range) -> list[Array]:
        """Return the lanes of the measured frames in pixels, each at the heights of its frame's label."""
        draws = [[(index, None) for index in indices[at : at + _EVAL_BATCH]] for at in range(0, len(indices), _EVAL_BATCH)]
        frames, lanes = iter([self.data.test[index] for index in indices]), []
        with torch.inference_mode(), evaluating(model):
            for images, _ in self._batches(self._test, draws):
                decoded = self.grid.decode(model(images).float())
                lanes += [self._at_label(x, frame) for x, frame in zip(decoded, frames, strict=False)]
        return lanes

    def calibration(self, samples: int) -> Iterator[Any]:  # noqa: D102
        count = min(samples, len(self._train))
        drawn = np.random.default_rng([self.recipe.seed, 4]).permutation(len(self._train))[:count]
        parts = np.array_split(drawn, math.ceil(count / self.recipe.training.batch_size))
        return (images for images, _ in self._batches(self._train, [[(int(i), None) for i in part] for part in parts]))

    def pictures(self, model: nn.Module) -> list[tuple[str, np.ndarray]]:
        """Draw a few measured frames at half size: marked lanes green and wide, predicted lanes red and thin."""
        chosen = range(min(PICTURES, len(self.data.test)))
        drawn = []
        for lanes, frame in zip(self.predict(model, chosen), self.data.test, strict=False):
            accuracy = 100 * frame_scores(lanes, frame.lanes, frame.heights)[0]
            drawn.append((f"{frame.name}: accuracy {accuracy:.1f} %", draw(frame, lanes, self.grid.frame)))
        return drawn

    @cached_property
    def _train(self) -> Samples:
        return self._samples(self.data.train, mask=self.model_options.aux)

    @cached_property
    def _test(self) -> Samples:
        return self._samples(self.data.test, mask=False)

    def _samples(self, frames: tuple[Frame, ...], mask: bool) -> Samples:
        return Samples(frames, self.grid, self.model_options.size, mask, self.data_options.cache)

    def _batches(self, samples: Samples, draws: Any) -> Iterator[Batch]:
        settings: dict[str, Any] = {"device": self.device, "memory_format": self.memory_format}
        return batches(samples, draws, workers=self.data_options.workers, **settings)

    def _at_label(self, x: Array, frame: Frame) -> Array:
        x = resample(x, self.grid.anchors, frame.heights)
        return x if self.data_options.empty_lanes else x[(x >= 0).sum(1) >= 2]


def draw(frame: Frame, lanes: Array, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Return the frame at half size with its marked lanes and the predicted ones: uint8 (height, width, 3)."""
    from PIL import ImageDraw

    image = read_image(frame.image, size)
    pen = ImageDraw.Draw(image)
    for group, colour, width in ((frame.lanes, _MARKED, 9), (lanes, _PREDICTED, 4)):
        for lane in group:
            points = [(x, y) for x, y in zip(lane.tolist(), frame.heights.tolist(), strict=True) if x >= 0]
            pen.line(points, fill=colour, width=max(1, round(width * size[1] / 1280)), joint="curve")
    return np.asarray(image.reduce(2))
