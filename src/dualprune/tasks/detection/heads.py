"""From raw maps to boxes, and the loss that trains them (YOLOv3, Redmon and Farhadi 2018, with a box loss on CIoU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dualprune.errors import DualpruneError
from dualprune.tasks.detection.darknet import Head

_LARGEST = 8.0  # of a log size: e⁸ ≈ 3,000 times the anchor, so that no step of training overflows
_CANDIDATES = 4000  # scores of an image that non-maximum suppression looks at


@dataclass(frozen=True)
class Boxes:
    """What was found, or is to be found, in one image.

    Attributes:
        corners: float32 (boxes, 4): x1, y1, x2, y2 in pixels.
        classes: int64 (boxes,).
        scores: float32 (boxes,), the largest first; of true boxes all 1.
        crowd: bool (boxes,); true where one box stands for a crowd, in which any number may be found.
    """

    corners: Tensor
    classes: Tensor
    scores: Tensor
    crowd: Tensor

    def __len__(self) -> int:
        return len(self.corners)


@dataclass(frozen=True)
class Gains:
    """Weights of the loss's parts.

    Attributes:
        box: of 1 − CIoU.
        objectness: of the binary cross-entropy of "an object's centre is here".
        classes: of the binary cross-entropies of the classes.
    """

    box: float = 3.0
    objectness: float = 1.0
    classes: float = 1.0


def decode(heads: Sequence[Head], maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes and class scores of all cells and anchors.

    A cell's box is centred at (σ(t_xy) + cell) · stride with sides e^{t_wh} · anchor; a class's score is the product of
    the objectness and the class's own probability.

    Returns:
        float32 corners (N, boxes, 4) in pixels of the input, and scores (N, boxes, classes).
    """
    corners, scores = [], []
    for head, raw in zip(heads, maps, strict=True):
        values = _split(head, raw)
        corners.append(_corners(head, values).flatten(1, 3))
        probabilities = values[..., 4:].sigmoid()
        scores.append((probabilities[..., :1] * probabilities[..., 1:]).flatten(1, 3))
    return torch.cat(corners, 1), torch.cat(scores, 1)


def detect(
    heads: Sequence[Head],
    maps: Sequence[Tensor],
    *,
    confidence: float = 0.001,
    overlap: float = 0.6,
    most: int = 100,
) -> list[Boxes]:
    """Decode, keep scores above `confidence`, and suppress, class by class, what overlaps a better box of its class.

    Args:
        heads: of the network.
        maps: its outputs.
        confidence: a box counts once for every class whose score is above this, as in COCO's evaluation of YOLOv3.
        overlap: IoU from which two boxes of a class are one.
        most: boxes an image, the best ones.

    Returns:
        One `Boxes` an image, in pixels of the input.
    """
    from torchvision.ops import batched_nms

    found = []
    for corners, scores in zip(*decode(heads, maps), strict=True):
        box, label = (scores > confidence).nonzero(as_tuple=True)
        values = scores[box, label]
        best = values.topk(min(_CANDIDATES, len(values))).indices
        box, label, values = box[best], label[best], values[best]
        keep = batched_nms(corners[box], values, label, overlap)[:most]
        crowd = torch.zeros(len(keep), dtype=torch.bool, device=values.device)
        found.append(Boxes(corners[box[keep]], label[keep], values[keep], crowd))
    return found


def detection_loss(
    heads: Sequence[Head], maps: Sequence[Tensor], targets: Tensor, gains: Gains | None = None, smoothing: float = 0.0
) -> Tensor:
    """YOLOv3's loss over a batch, divided by the number of (box, anchor) pairs that are trained on, or of images if larger.

    A true box trains the cell of its centre, there the anchor whose shape fits best over all heads and every other one
    whose shape overlaps it by more than the head's `assign_above`. Differences from the paper, both as in later
    darknet: the box part is 1 − CIoU (Zheng et al. 2020) in place of squared errors of t, so that it is the overlap
    that AP measures; and more than one anchor may be trained on a box. As in the paper, objectness is 1 for these
    pairs, and predictions that overlap a true box by more than `ignore_above` are not called background.

    Args:
        heads: of the network.
        maps: its raw outputs.
        targets: float (boxes, 6): image in the batch, class, centre x and y, width and height as fractions of the input.
        gains: weights of the three parts; `Gains()` if None.
        smoothing: label smoothing of the classes.

    Returns:
        A 0-dim tensor.

    Raises:
        DualpruneError: `targets` are not of that shape or name a class that the heads have not.
    """
    gains = gains or Gains()
    _check_targets(heads, targets)
    total, pairs = maps[0].new_zeros((), dtype=torch.float32), 0
    assigned = _assign(heads, maps, targets)
    for head, raw, (which, anchor) in zip(heads, maps, assigned, strict=True):
        values = _split(head, raw)
        height, width = values.shape[2:4]
        boxes = targets[which]
        image, label = boxes[:, 0].long(), boxes[:, 1].long()
        x = (boxes[:, 2] * width).long().clamp(0, width - 1)
        y = (boxes[:, 3] * height).long().clamp(0, height - 1)
        corners = _corners(head, values)
        true = _true_corners(boxes, width * head.stride, height * head.stride)
        wanted = F.one_hot(label, head.classes).float() * (1 - smoothing) + smoothing / 2
        chosen = values[image, anchor, y, x]
        objects = torch.zeros_like(values[..., 4])
        objects[image, anchor, y, x] = 1
        counted = ~_overlapping(head, corners.detach(), targets, (width, height)) | objects.bool()
        presence = F.binary_cross_entropy_with_logits(values[..., 4], objects, counted.float(), reduction="sum")
        classes = F.binary_cross_entropy_with_logits(chosen[:, 5:], wanted, reduction="sum")
        box = _ciou_loss(corners[image, anchor, y, x], true)
        total = total + gains.box * box + gains.objectness * presence + gains.classes * classes
        pairs += len(which)
    # a batch of background alone must not weigh more than all others
    return total / max(len(maps[0]), pairs)


def _split(head: Head, raw: Tensor) -> Tensor:
    """From (N, anchors · (5 + classes), H, W) to float32 (N, anchors, H, W, 5 + classes)."""
    n, _, height, width = raw.shape
    return raw.float().view(n, len(head.anchors), 5 + head.classes, height, width).permute(0, 1, 3, 4, 2)


def _corners(head: Head, values: Tensor) -> Tensor:
    """From raw values (N, anchors, H, W, …) to corners (N, anchors, H, W, 4) in pixels of the input."""
    height, width = values.shape[2:4]
    device = values.device
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).to(device)
    anchors = torch.tensor(head.anchors, device=device)[:, None, None]
    shift = (head.scale_xy - 1) / 2
    centre = (values[..., :2].sigmoid() * head.scale_xy - shift + grid) * head.stride
    half = values[..., 2:4].clamp(max=_LARGEST).exp() * anchors / 2
    return torch.cat([centre - half, centre + half], -1)


def _true_corners(boxes: Tensor, width: int, height: int) -> Tensor:
    size = boxes.new_tensor([width, height])
    centre, half = boxes[:, 2:4] * size, boxes[:, 4:6] * size / 2
    return torch.cat([centre - half, centre + half], 1)


def _assign(heads: Sequence[Head], maps: Sequence[Tensor], targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each head, the pairs (index of a box, anchor) that are trained: by the IoU of shapes laid on one centre."""
    anchors = torch.tensor([anchor for head in heads for anchor in head.anchors], device=targets.device)
    limits = torch.tensor([head.assign_above for head in heads for _ in head.anchors], device=targets.device)
    size = targets.new_tensor([maps[0].shape[3] * heads[0].stride, maps[0].shape[2] * heads[0].stride])
    shapes = targets[:, 4:6] * size
    inner = torch.minimum(shapes[:, None], anchors).prod(2)
    fit = inner / (shapes.prod(1)[:, None] + anchors.prod(1) - inner)
    chosen = fit > limits
    if len(targets):
        chosen[torch.arange(len(targets), device=targets.device), fit.argmax(1)] = True
    parts = chosen.split([len(head.anchors) for head in heads], 1)
    return [part.nonzero(as_tuple=True) for part in parts]


def _overlapping(head: Head, corners: Tensor, targets: Tensor, size: tuple[int, int]) -> Tensor:
    """Which predictions (N, anchors, H, W) overlap a true box of their image by more than the head's `ignore_above`."""
    from torchvision.ops import box_iou

    hit = torch.zeros(corners.shape[:4], dtype=torch.bool, device=corners.device)
    for i in range(len(corners)):
        boxes = targets[targets[:, 0] == i]
        if len(boxes):
            true = _true_corners(boxes, size[0] * head.stride, size[1] * head.stride)
            hit[i] = (box_iou(corners[i].reshape(-1, 4), true) > head.ignore_above).any(1).view(hit.shape[1:])
    return hit


def _ciou_loss(found: Tensor, true: Tensor) -> Tensor:
    from torchvision.ops import complete_box_iou_loss

    return complete_box_iou_loss(found, true, reduction="sum")


def _check_targets(heads: Sequence[Head], targets: Tensor) -> None:
    if targets.ndim != 2 or targets.shape[1] != 6:
        raise DualpruneError(f"targets are (boxes, 6): image, class, x, y, width, height; got {tuple(targets.shape)}")
    # on a GPU reading a maximum would wait for it; the data set has checked its labels
    if targets.device.type != "cpu" or not len(targets):
        return
    low, high = int(targets[:, 1].min()), int(targets[:, 1].max())
    if low < 0 or high >= heads[0].classes:
        raise DualpruneError(f"classes of targets lie in 0…{heads[0].classes - 1}, got {low}…{high}")
