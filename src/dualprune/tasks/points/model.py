"""PointPillars (Lang et al. 2019) in plain PyTorch: pillars by scatter, a 2D backbone, one anchor head.

Sizes, layer names, anchor order and box code are OpenPCDet's ``pointpillar.yaml``, the network of the SLR paper's Table 7:
4,834,888 parameters. Where it differs: a pillar keeps all of its points and a frame all of its pillars (OpenPCDet keeps
32 and 16,000), and the pillar layer's batch norm counts points alone, not the zeros that pad a pillar to 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualprune.errors import DualpruneError, suggest

ROTATIONS = (0.0, math.pi / 2)
# length, width, height and the bottom's height of each class's anchors; overlaps from which an anchor is one, is none
ANCHORS: dict[str, tuple[tuple[float, float, float], float, float, float]] = {
    "Car": ((3.9, 1.6, 1.56), -1.78, 0.6, 0.45),
    "Pedestrian": ((0.8, 0.6, 1.73), -0.6, 0.5, 0.35),
    "Cyclist": ((1.76, 0.6, 1.73), -0.6, 0.5, 0.35),
}
BOX = 7  # x, y, z, length, width, height, heading


class Predictions(NamedTuple):
    """What the head says of every anchor: scores (b, a, classes), box codes (b, a, 7), directions (b, a, 2)."""

    scores: Tensor
    codes: Tensor
    directions: Tensor


class PillarNet(nn.Module):
    """The pillar feature net: points (n, features) → what is then maximised over each pillar, (n, channels) ≥ 0."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(self.norm(self.linear(x)))


class Pillars(nn.Module):
    """Points → canvas: every point is described by itself, its pillar's mean and its pillar's middle."""

    def __init__(self, extent: Sequence[float], cell: float, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.extent, self.cell, self.grid, self.channels = tuple(extent), cell, grid, channels
        self.pfn_layers = nn.ModuleList([PillarNet(4 + 3 + 3, channels)])

    def forward(self, points: Tensor) -> Tensor:
        """Scatter (b, p, 4) to (b, channels, rows, columns); points outside the range, NaN ones too, are left out."""
        rows, columns = self.grid
        low, high = points.new_tensor(self.extent[:3]), points.new_tensor(self.extent[3:])
        frame, index = ((points[..., :3] >= low) & (points[..., :3] < high)).all(-1).nonzero(as_tuple=True)
        kept = points[frame, index]
        column = ((kept[:, 0] - low[0]) / self.cell).long().clamp_max(columns - 1)
        row = ((kept[:, 1] - low[1]) / self.cell).long().clamp_max(rows - 1)
        pillar = (frame * rows + row) * columns + column
        cells = len(points) * rows * columns
        features = self.pfn_layers[0](self._decorate(kept, pillar, row, column, cells))
        # after the ReLU nothing is below 0, so an empty pillar's zero is also the start of every maximum
        canvas = features.new_zeros(cells, self.channels)
        canvas = canvas.scatter_reduce(0, pillar[:, None].expand_as(features), features, "amax")
        return canvas.view(len(points), rows, columns, self.channels).permute(0, 3, 1, 2)

    def _decorate(self, points: Tensor, pillar: Tensor, row: Tensor, column: Tensor, cells: int) -> Tensor:
        """x, y, z, intensity; offsets from the pillar's mean; offsets from its middle: (n, 10)."""
        xyz = points[:, :3]
        ones = torch.cat([xyz, torch.ones_like(xyz[:, :1])], 1)
        sums = ones.new_zeros(cells, 4).index_add(0, pillar, ones)[pillar]
        middle = torch.stack(
            [
                (column + 0.5) * self.cell + self.extent[0],
                (row + 0.5) * self.cell + self.extent[1],
                torch.full_like(xyz[:, 2], (self.extent[2] + self.extent[5]) / 2),
            ],
            1,
        )
        return torch.cat([points, xyz - sums[:, :3] / sums[:, 3:], xyz - middle], 1)


class Backbone(nn.Module):
    """Blocks that go down by their strides, each brought up again to the first one's size, side by side."""

    def __init__(
        self, inputs: int, layers: Sequence[int], strides: Sequence[int], filters: Sequence[int], up_filters: Sequence[int]
    ) -> None:
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        up = 1
        for i, (depth, stride, width, up_width) in enumerate(zip(layers, strides, filters, up_filters, strict=True)):
            up *= stride if i else 1
            block = [nn.ZeroPad2d(1), *_conv(inputs, width, stride, padding=0)]
            self.blocks.append(nn.Sequential(*block, *(m for _ in range(depth) for m in _conv(width, width, 1, padding=1))))
            rise = nn.ConvTranspose2d(width, up_width, up, stride=up, bias=False)
            self.deblocks.append(nn.Sequential(rise, _norm(up_width), nn.ReLU()))
            inputs = width

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        risen = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            risen.append(deblock(x))
        return torch.cat(risen, 1)


class AnchorHead(nn.Module):
    """1×1 convolutions that score, place and direct the anchors of every cell."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        anchors = classes * len(ROTATIONS)
        self.classes = classes
        self.conv_cls = nn.Conv2d(inputs, anchors * classes, 1)
        self.conv_box = nn.Conv2d(inputs, anchors * BOX, 1)
        self.conv_dir_cls = nn.Conv2d(inputs, anchors * 2, 1)
        nn.init.constant_(self.conv_cls.bias, -math.log(99))  # type: ignore[arg-type]  # every score starts at 0.01
        nn.init.normal_(self.conv_box.weight, std=0.001)

    def forward(self, x: Tensor) -> Predictions:  # noqa: D102
        heads = ((self.conv_cls, self.classes), (self.conv_box, BOX), (self.conv_dir_cls, 2))
        return Predictions(*(conv(x).permute(0, 2, 3, 1).reshape(len(x), -1, size) for conv, size in heads))


class PointPillars(nn.Module):
    """Points (b, p, 4), padded with NaN, → `Predictions` of every anchor.

    Args:
        classes: what to find, of "Car", "Pedestrian" and "Cyclist".
        extent: least x, y, z and greatest x, y, z, in metres.
        cell: side of a pillar, in metres.
        pillar_channels: width of the pillar feature net.
        layers: convolutions in each block after its first.
        strides: of the blocks; the head works at the first one's size.
        filters: widths of the blocks.
        up_filters: widths of what each block is brought up to.

    Attributes:
        anchors: (a, 7) boxes; by cell (row, then column), class and rotation.
        anchor_class: (a,) index of each anchor's class.

    Raises:
        DualpruneError: a class without anchors, blocks of which some lack a size, or an extent that the cells and strides
            do not divide.
    """

    anchors: Tensor
    anchor_class: Tensor

    def __init__(
        self,
        classes: Sequence[str] = ("Car", "Pedestrian", "Cyclist"),
        extent: Sequence[float] = (0.0, -39.68, -3.0, 69.12, 39.68, 1.0),
        cell: float = 0.16,
        pillar_channels: int = 64,
        layers: Sequence[int] = (3, 5, 5),
        strides: Sequence[int] = (2, 2, 2),
        filters: Sequence[int] = (64, 128, 256),
        up_filters: Sequence[int] = (128, 128, 128),
    ) -> None:
        super().__init__()
        for kind in classes:
            if kind not in ANCHORS:
                raise DualpruneError(f"no anchors for {kind!r}{suggest(kind, ANCHORS)}; there are {', '.join(ANCHORS)}")
        sizes = {"layers": layers, "strides": strides, "filters": filters, "up_filters": up_filters}
        if len(set(map(len, sizes.values()))) > 1 or min([pillar_channels, len(strides), *strides, *filters, *up_filters]) < 1:
            shown = ", ".join(f"{key} {list(value)}" for key, value in sizes.items())
            raise DualpruneError(f"each block has one number of each, and all but layers are at least 1; got {shown}")
        self.classes, grid = tuple(classes), _grid(extent, cell, math.prod(strides))
        self.vfe = Pillars(extent, cell, grid, pillar_channels)
        self.backbone_2d = Backbone(pillar_channels, layers, strides, filters, up_filters)
        self.dense_head = AnchorHead(sum(up_filters), len(classes))
        anchors, kinds = make_anchors(self.classes, extent, (grid[0] // strides[0], grid[1] // strides[0]))
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("anchor_class", kinds, persistent=False)

    def forward(self, points: Tensor) -> Predictions:  # noqa: D102
        return self.dense_head(self.backbone_2d(self.vfe(points)))


def make_anchors(classes: Sequence[str], extent: Sequence[float], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Anchors of a head of (rows, columns), from edge to edge of the range as in SECOND: (a, 7), and their classes (a,)."""
    rows, columns = shape
    y = torch.linspace(extent[1], extent[4], rows).view(-1, 1, 1, 1)
    x = torch.linspace(extent[0], extent[3], columns).view(1, -1, 1, 1)
    size = torch.tensor([ANCHORS[kind][0] for kind in classes]).view(1, 1, -1, 1, 3)
    z = torch.tensor([ANCHORS[kind][1] for kind in classes]).view(1, 1, -1, 1) + size[..., 2] / 2
    heading = torch.tensor(ROTATIONS).view(1, 1, 1, -1)
    whole = (rows, columns, len(classes), len(ROTATIONS))
    parts = [x, y, z, *size.unbind(-1), heading]
    anchors = torch.stack([part.expand(whole) for part in parts], -1).reshape(-1, BOX)
    return anchors, torch.arange(len(classes)).view(1, 1, -1, 1).expand(whole).flatten()


def build_points_model(name: str, options: Mapping[str, Any]) -> PointPillars:
    """Return the model that ``[model]`` names, with its options.

    Raises:
        DualpruneError: an unknown name, option or value.
    """
    if name != "pointpillars":
        raise DualpruneError(f"points are found by the model 'pointpillars', got {name!r}{suggest(name, ['pointpillars'])}")
    known = ("classes", "extent", "cell", "pillar_channels", "layers", "strides", "filters", "up_filters")
    for key in options:
        if key not in known:
            raise DualpruneError(f"pointpillars has no option {key!r}{suggest(key, known)}; it has {', '.join(known)}")
    return PointPillars(**options)


def _grid(extent: Sequence[float], cell: float, divisor: int) -> tuple[int, int]:
    if len(extent) != 6 or any(low >= high for low, high in zip(extent[:3], extent[3:], strict=False)) or cell <= 0:
        raise DualpruneError(f"extent is x, y, z at least and x, y, z at most, and cell is above 0; got {extent}, {cell}")
    columns, rows = (round((extent[axis + 3] - extent[axis]) / cell) for axis in (0, 1))
    for axis, count in (("x", columns), ("y", rows)):
        if count % divisor or not count:
            raise DualpruneError(
                f"the range in {axis} is {count} pillars of {cell} m; the strides want a multiple of {divisor}: "
                f"make it {cell * divisor * max(1, round(count / divisor)):g} m long"
            )
    return rows, columns


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


def _conv(inputs: int, width: int, stride: int, padding: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, width, 3, stride=stride, padding=padding, bias=False), _norm(width), nn.ReLU()]
