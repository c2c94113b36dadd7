"""Object detection as a task: darknet networks on COCO's layouts, YOLOv3's loss, AP50 and AP50-95."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dualprune.errors import DataNotFoundError, DualpruneError
from dualprune.tasks.base import Batch, Task, evaluating
from dualprune.tasks.classification.models import load_weights
from dualprune.tasks.detection import data as images
from dualprune.tasks.detection.darknet import Head, build_network, network_names, read_darknet_weights
from dualprune.tasks.detection.heads import Boxes, Gains, detect, detection_loss
from dualprune.tasks.detection.metrics import average_precision
from dualprune.tasks.options import read_options

if TYPE_CHECKING:
    from dualprune.recipe_tables import OptimizerTable

_BATCH = 16  # images that are measured at once
_PICTURES = 4
_SHOWN = 0.3  # score from which a box is drawn
_AUGMENT: dict[Any, images.Augment] = {True: "full", False: "none", "none": "none", "flip": "flip"}


@dataclass(frozen=True)
class ModelOptions:
    """``[model] options``: those of `build_network`, `partial` (weights of a backbone alone), `gains` (see `Gains`)."""

    width: float = 1.0
    classes: int | None = None
    partial: bool = False
    gains: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataOptions:
    """``[data] options``: names of the splits, the measurement's least score and the overlap it allows, and `load_split`'s."""

    train: str = "train2017"
    test: str = "val2017"
    confidence: float = 0.001
    overlap: float = 0.6
    size: int = 416
    classes: int | list[str] | None = None
    annotations: str | None = None
    fit: images.Fit = "letterbox"
    limit: int | None = None
    cache: bool | None = None
    workers: int = 4

    def of_splits(self) -> dict[str, Any]:
        """What `load_split` is told of both splits."""
        own = ("train", "test", "confidence", "overlap")
        return {key: value for key, value in asdict(self).items() if key not in own}


class Detection(Task):
    """Boxes in images.

    ``[model]`` name: a network of the package or a ``.cfg`` file. ``[data]`` name: "coco".
    """

    metrics = ("AP50", "AP50-95")

    def model(self, *, with_weights: bool = True) -> nn.Module:  # noqa: D102
        table, options = self.recipe.model, self._model_options
        _ = self._gains  # wrong ones are told of before anything is trained
        torch.manual_seed(self.recipe.seed)
        network = build_network(self._cfg(), self._classes(), options.width)
        if table.pretrained:
            raise DualpruneError("[model] pretrained: darknet networks bring no weights; name a .weights file as weights")
        path = self.recipe.weights_path() if with_weights else None
        if path is not None and path.suffix == ".weights":
            read_darknet_weights(network, path, partial=options.partial)
        elif path is not None:
            load_weights(network, path, strict=not options.partial)
        return network.to(self.device).to(memory_format=self.memory_format)

    def steps_per_epoch(self, batch_size: int) -> int:  # noqa: D102
        return images.steps_per_epoch(self.train, batch_size)

    def train_batches(self, *, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:  # noqa: D102
        augment = self.recipe.data.augment
        if augment not in _AUGMENT:
            raise DualpruneError(f"[data] augment of detection is true, false, 'none' or 'flip', got {augment!r}")
        order: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "start_step": start_step}
        batches = images.train_batches(self.train, augment=_AUGMENT[augment], device=self.device, **order)
        return ((x.contiguous(memory_format=self.memory_format), targets) for x, targets in batches)

    def loss(self, forward: Callable[..., Any], batch: Batch, settings: OptimizerTable) -> Tensor:  # noqa: D102
        x, targets = batch
        with self.autocast():
            maps = forward(x)
        return detection_loss(self._heads, maps, targets, self._gains, settings.label_smoothing)

    def share(self, batch: Batch, start: int, stop: int) -> Batch:
        """Return some images of a batch with their boxes, which name them by their new places."""
        x, targets = batch
        mine = targets[(targets[:, 0] >= start) & (targets[:, 0] < stop)]
        mine[:, 0] -= start  # a selection is a copy
        return x[start:stop], mine

    def measure(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        everything = range(len(self.test))
        truths, found = zip(*self._predict(model, everything, self._data_options.confidence), strict=True)
        return average_precision(truths, found)

    def calibration(self, samples: int) -> Iterator[Any]:  # noqa: D102
        count = min(samples, len(self.train))
        drawn = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))[:count]
        # the cumulative average counts each batch alike, so they are equally large to within one image
        parts = [part.tolist() for part in drawn.tensor_split(math.ceil(count / _BATCH))]
        for x, _ in images.plain_batches(self.train, parts, self.device):
            yield x.contiguous(memory_format=self.memory_format)

    def pictures(self, model: nn.Module) -> list[tuple[str, np.ndarray[Any, Any]]]:
        """The first test images that hold objects: what was found in colour, the truth in thin white."""
        chosen = [i for i, boxes in enumerate(self.test.labels) if len(boxes)][:_PICTURES]
        pairs = self._predict(model, chosen, _SHOWN)
        names = self.test.classes
        drawn = (draw_boxes(self.test.files[i], truth, found, names) for i, (truth, found) in zip(chosen, pairs, strict=True))
        return [(self.test.files[i].name, picture) for i, picture in zip(chosen, drawn, strict=True)]

    @property
    def train(self) -> images.DetectionSet:
        """The images that are trained on."""
        return self._sets[0]

    @property
    def test(self) -> images.DetectionSet:
        """The images that are measured."""
        return self._sets[1]

    def data_sha256(self) -> str:  # noqa: D102
        return hashlib.sha256("".join(part.sha256() for part in self._whole).encode()).hexdigest()

    @cached_property
    def _sets(self) -> tuple[images.DetectionSet, images.DetectionSet]:
        if self.split == "validation":
            return images.split_validation(self._whole[0], self.recipe.data.validation, self.recipe.seed)
        return self._whole

    @cached_property
    def _whole(self) -> tuple[images.DetectionSet, images.DetectionSet]:
        options, root = self._data_options, self.recipe.data.root
        shared = options.of_splits()
        data = images.load_split(options.train, root, **shared)
        if options.test == options.train:
            return data, data
        # classes have the training data's numbers, whatever the test data's own file says
        return data, images.load_split(options.test, root, **{**shared, "classes": data.classes})

    @cached_property
    def _model_options(self) -> ModelOptions:
        return read_options(ModelOptions, self.recipe.model.options, "[model] options")

    @cached_property
    def _data_options(self) -> DataOptions:
        table = self.recipe.data
        if table.name != "coco":
            raise DualpruneError(f"[data] name of detection is 'coco' (its layout; any images), got {table.name!r}")
        return read_options(DataOptions, table.options, "[data] options")

    @cached_property
    def _heads(self) -> Sequence[Head]:
        # of a network without storage: the loss is handed a compiled one, which need not have attributes
        with torch.device("meta"):
            return build_network(self._cfg(), classes=self._classes()).heads

    @cached_property
    def _gains(self) -> Gains:
        return read_options(Gains, self._model_options.gains, "[model] options.gains")

    def _classes(self) -> int | None:
        """How many classes are asked for, or else the data have; None where data are not at hand: the network has its own."""
        asked = self._model_options.classes
        try:
            there = len(self.train.classes)
        except DataNotFoundError:
            return asked
        if asked is not None and asked < there:
            raise DualpruneError(f"[model] options.classes is {asked}, but the data have {there}: leave it out, or raise it")
        return there if asked is None else asked

    def _cfg(self) -> str | Path:
        """The name of a network, or its cfg file, looked for where weights are."""
        name = self.recipe.model.name
        if not name.endswith(".cfg"):
            return name
        source = self.recipe.source
        roots = [source.parent if source else None, Path(), os.environ.get("DUALPRUNE_WEIGHTS")]
        tried = [Path(root) / Path(name).expanduser() for root in roots if root is not None]
        for path in tried:
            if path.is_file():
                return path
        known = f"the networks of the package are {', '.join(network_names())}"
        raise DualpruneError(f"[model] name: no file {name!r} (looked at {', '.join(map(str, tried))}); {known}")

    @torch.no_grad()
    def _predict(self, model: nn.Module, indices: Sequence[int], confidence: float) -> Iterator[tuple[Boxes, Boxes]]:
        """Yield (true, found) boxes of each image, in its own pixels; every module's mode comes back."""
        limits: dict[str, Any] = {"confidence": confidence, "overlap": self._data_options.overlap}
        labels = iter([self.test.labels[i] for i in indices])
        draws = [indices[at : at + _BATCH] for at in range(0, len(indices), _BATCH)]
        with evaluating(model):
            for x, places in images.plain_batches(self.test, draws, self.device):
                maps = model(x.contiguous(memory_format=self.memory_format))
                for boxes, place in zip(detect(self._heads, maps, **limits), places, strict=True):
                    yield true_boxes(next(labels), place), in_image(boxes, place)


def true_boxes(labels: images.Labels, place: images.Placement) -> Boxes:
    """Boxes in pixels of an image from labels in fractions of it."""
    rows = torch.from_numpy(labels)
    size = torch.tensor([place.width, place.height])
    centre, half = rows[:, 1:3] * size, rows[:, 3:5] * size / 2
    corners = torch.cat([centre - half, centre + half], 1)
    return Boxes(corners, rows[:, 0].long(), torch.ones(len(rows)), rows[:, 5] > 0)


def in_image(boxes: Boxes, place: images.Placement) -> Boxes:
    """Boxes in pixels of the image from those in pixels of the network's input, cut at the image's sides; on the CPU."""
    shift = torch.tensor([place.left, place.top] * 2)
    scale = torch.tensor([place.scale_x, place.scale_y] * 2)
    corners = (boxes.corners.cpu() - shift) / scale
    corners = corners.clamp(min=0).minimum(torch.tensor([float(place.width), float(place.height)] * 2))
    return Boxes(corners, boxes.classes.cpu(), boxes.scores.cpu(), boxes.crowd.cpu())


def draw_boxes(path: Path, truth: Boxes, found: Boxes, classes: Sequence[str]) -> np.ndarray[Any, Any]:
    """Draw found boxes with class and score in the class's colour, and true ones in white: uint8 (height, width, 3)."""
    from PIL import ImageDraw

    picture = images.open_upright(path)
    pen = ImageDraw.Draw(picture)
    for corners in truth.corners.tolist():
        pen.rectangle(corners, outline="white", width=1)
    rows = list(zip(found.corners.tolist(), found.classes.tolist(), found.scores.tolist(), strict=True))
    for corners, label, score in rows[::-1]:  # the surest last, so that it is on top
        colour = f"hsl({label * 47 % 360}, 90%, 60%)"
        pen.rectangle(corners, outline=colour, width=2)
        text = f"{classes[label]} {score:.2f}"
        at = (corners[0] + 2, max(0.0, corners[1] - 11))
        pen.rectangle(pen.textbbox(at, text), fill=colour)
        pen.text(at, text, fill="black")
    return np.array(picture)
