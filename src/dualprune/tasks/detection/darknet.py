"""Darknet networks in plain PyTorch: `.cfg` files become modules, `.weights` files are read and written.

Layer numbers are darknet's own (they count from 0 after ``[net]``), so `layers.13.conv.weight` is the weight of the
section that darknet prints as 13, and the file order of weights is the module order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualprune.errors import DualpruneError, FormatError, suggest
from dualprune.files import atomic_write

_VERSION = (0, 2, 5)  # of the files that are written: the count of images seen is an int64
_IGNORED = ("net", "yolo", "dropout")  # darknet keeps training settings in these sections; what is needed is asked for


@dataclass(frozen=True)
class Section:
    """One ``[kind]`` of a cfg file with its ``key=value`` lines, as text."""

    kind: str
    options: dict[str, str]
    where: str = ""

    def text(self, key: str, default: str | None = None) -> str:
        """The value of `key` as it stands in the file.

        Raises:
            FormatError: it is missing and there is no default.
        """
        value = self.options.get(key, default)
        if value is None:
            raise FormatError(f"{self.where}: [{self.kind}] needs {key}=")
        return value

    def numbers(self, key: str, default: str | None = None) -> list[float]:
        """The comma-separated numbers of `key`.

        Raises:
            FormatError: it is missing, or something in it is no number.
        """
        value = self.text(key, default)
        try:
            return [float(part) for part in value.split(",") if part.strip()]
        except ValueError:
            raise FormatError(f"{self.where}: [{self.kind}] {key} should be numbers, got {value!r}") from None

    def integers(self, key: str, default: str | None = None) -> list[int]:
        """As `numbers`, whole ones.

        Raises:
            FormatError: as `numbers`, or one of them is not whole.
        """
        values = self.numbers(key, default)
        if not all(value.is_integer() for value in values):
            raise FormatError(f"{self.where}: [{self.kind}] {key} should be whole numbers, got {self.text(key, default)!r}")
        return [int(value) for value in values]

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        """One whole number of at least `least`."""
        values = self.integers(key, None if default is None else str(default))
        if len(values) != 1 or values[0] < least:
            raise FormatError(f"{self.where}: [{self.kind}] {key} should be a whole number from {least} up, got {values}")
        return values[0]

    def fraction(self, key: str, default: float) -> float:
        """One number in [0, 1].

        Raises:
            FormatError: it is something else.
        """
        values = self.numbers(key, str(default))
        if len(values) != 1 or not 0 <= values[0] <= 1:
            raise FormatError(f"{self.where}: [{self.kind}] {key} should be a number in [0, 1], got {self.text(key)!r}")
        return values[0]

    def positive(self, key: str, default: str | None = None) -> list[float]:
        """As `numbers`, finite ones above 0.

        Raises:
            FormatError: as `numbers`, or one of them is not.
        """
        values = self.numbers(key, default)
        if not all(0 < value < math.inf for value in values):
            raise FormatError(f"{self.where}: [{self.kind}] {key} should be finite and above 0, got {self.text(key)!r}")
        return values


@dataclass(frozen=True)
class Head:
    """What a ``[yolo]`` section says: how the map before it is read as boxes, and which boxes it is trained on.

    Attributes:
        anchors: (width, height) in pixels of the input, one for each box of a cell.
        classes: how many.
        stride: pixels of the input from one cell to the next.
        scale_xy: widens the range of a centre beyond its cell (``scale_x_y``; 1 is YOLOv3).
        assign_above: anchors whose shape overlaps a box by more than this IoU are trained on it, besides the best one.
        ignore_above: predictions that overlap any box by more than this IoU are not called background.
    """

    anchors: tuple[tuple[float, float], ...]
    classes: int
    stride: int
    scale_xy: float = 1.0
    assign_above: float = 0.213
    ignore_above: float = 0.7


# --- layers ----------------------------------------------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "mish": lambda: nn.Mish(inplace=True),
    "swish": lambda: nn.SiLU(inplace=True),
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
}


class Convolution(nn.Module):
    """Convolution, batch norm where there is one (then no bias), activation."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, padding: int, groups: int, norm: bool, activation: str
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else None
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        x = self.conv(x)
        return self.activation(x if self.norm is None else self.norm(x))


class MaxPool(nn.Module):
    """Darknet's max-pool: `padding` pixels in all, the odd one at the right and bottom, which never win."""

    def __init__(self, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map side n to (n + padding − size) // stride + 1."""
        before = self.padding // 2
        after = [self._after(side, before) for side in (x.shape[3], x.shape[2])]
        if before or any(after):
            x = F.pad(x, (before, after[0], before, after[1]), value=-math.inf)
        return F.max_pool2d(x, self.size, self.stride)

    def _after(self, side: int, before: int) -> int:
        last = (side + self.padding - self.size) // self.stride
        return max(0, last * self.stride + self.size - side - before)


class Route(nn.Module):
    """Channels of earlier layers side by side; `part` of `parts` equal slices of each, where there are parts."""

    def __init__(self, sources: Sequence[int], parts: int, part: int) -> None:
        super().__init__()
        self.sources, self.parts, self.part = tuple(sources), parts, part

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Join (N, C_i, H, W) to (N, Σ C_i / parts, H, W)."""
        if self.parts > 1:
            inputs = [x.chunk(self.parts, 1)[self.part] for x in inputs]
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1)


class Shortcut(nn.Module):
    """The sum of the layer before and earlier ones."""

    def __init__(self, sources: Sequence[int], activation: str) -> None:
        super().__init__()
        self.sources = tuple(sources)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, inputs: list[Tensor]) -> Tensor:
        """Add tensors of one shape."""
        for other in inputs:
            x = x + other
        return self.activation(x)


class Yolo(nn.Module):
    """Marks the map before it as an output of the network."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head


# --- the network -----------------------------------------------------------------------------------------------------


class Darknet(nn.Module):
    """A network from the sections of a cfg file.

    Attributes:
        layers: one module a section, in darknet's numbering.
        heads: what its ``[yolo]`` sections say, in order.
        channels: of the input.
        stride: the input's sides are multiples of it.

    Raises:
        FormatError: a section is unknown or says something impossible; the message has its line.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        super().__init__()
        if not sections or sections[0].kind not in ("net", "network"):
            raise FormatError(f"a cfg file begins with [net], got {f'[{sections[0].kind}]' if sections else 'nothing'}")
        self.channels = sections[0].integer("channels", 3, least=1)
        trace = _Trace(self.channels)
        self.layers = nn.ModuleList([_layer(section, trace) for section in sections[1:]])
        self.heads = tuple(layer.head for layer in self.layers if isinstance(layer, Yolo))
        if not self.heads:
            raise FormatError(f"{sections[0].where}: there is no [yolo] section, so the network has no output")
        self.stride = max(trace.strides)
        self._kept = frozenset(i for layer in self.layers for i in getattr(layer, "sources", ()))
        _init(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (N, channels, H, W) in [0, 1] to raw maps (N, anchors · (5 + classes), H/stride, W/stride), one a head.

        Raises:
            DualpruneError: the sides are no multiples of the stride.
        """
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise DualpruneError(f"the sides of the images are multiples of {self.stride}, got {tuple(x.shape[2:])}")
        outputs: dict[int, Tensor] = {}
        maps = []
        for i, layer in enumerate(self.layers):
            if isinstance(layer, Yolo):
                maps.append(x)
            elif isinstance(layer, Route):
                x = layer([outputs[j] for j in layer.sources])
            elif isinstance(layer, Shortcut):
                x = layer(x, [outputs[j] for j in layer.sources])
            else:
                x = layer(x)
            if i in self._kept:
                outputs[i] = x
        return maps


def parse_cfg(text: str, source: str = "cfg") -> list[Section]:
    """Split a cfg file into its sections; ``#`` and ``;`` begin comments.

    Raises:
        FormatError: a line is neither ``[section]`` nor ``key=value``.
    """
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].partition(";")[0].strip()
        if not line:
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if line.startswith("[") and line.endswith("]"):
            sections.append(Section(line[1:-1].strip(), {}, f"{source}:{number}"))
        elif equals and sections:
            sections[-1].options[key] = value
        else:
            raise FormatError(f"{source}:{number}: expected [section] or key=value, got {line!r}")
    return sections


def network_names() -> list[str]:
    """Names of the networks that come with the package, sorted."""
    return sorted(entry.name.removesuffix(".cfg") for entry in _cfgs().iterdir() if entry.name.endswith(".cfg"))


def read_cfg(name: str | Path) -> list[Section]:
    """Sections of a network of the package (``yolov3-tiny``, ``yolov3``, ``yolov3-spp``) or of a ``.cfg`` file.

    Raises:
        DualpruneError: there is no such network or file.
    """
    if str(name) in network_names():
        return parse_cfg((_cfgs() / f"{name}.cfg").read_text(encoding="utf-8"), f"{name}.cfg")
    if Path(name).suffix != ".cfg" or not Path(name).is_file():
        known = network_names()
        raise DualpruneError(
            f"no network {str(name)!r}{suggest(str(name), known)}; there are {', '.join(known)}, or a .cfg file"
        )
    return parse_cfg(Path(name).read_text(encoding="utf-8"), str(name))


def build_network(name: str | Path, classes: int | None = None, width: float = 1.0) -> Darknet:
    """Build a network by the name or file of its cfg.

    Args:
        name: as `read_cfg` takes it.
        classes: another number of classes than the cfg's; the convolutions before the heads change with it.
        width: multiplies the filters of all other convolutions (rounded to 8 and at least 8), for runs on small machines.

    Raises:
        DualpruneError: no such network, or a value out of range.
    """
    sections = read_cfg(name)
    if not 0 < width <= 4:
        raise DualpruneError(f"width multiplies the filters, a number in (0, 4], got {width}")
    if classes is not None and classes < 1:
        raise DualpruneError(f"classes is at least 1, got {classes}")
    heads = {i - 1 for i, section in enumerate(sections) if section.kind == "yolo"}
    for i, section in enumerate(sections):
        if section.kind == "yolo" and classes is not None:
            boxes = len(section.integers("mask"))
            sections[i] = _changed(section, classes=classes)
            sections[i - 1] = _changed(sections[i - 1], filters=boxes * (5 + classes))
        elif section.kind == "convolutional" and width != 1 and i not in heads:
            narrow = max(8, round(section.integer("filters", 1) * width / 8) * 8)
            sections[i] = _changed(section, filters=narrow, groups=narrow if section.integer("groups", 1) > 1 else 1)
    return Darknet(sections)


def _cfgs() -> Path:
    return Path(str(files("dualprune.tasks.detection"))) / "cfg"


def _changed(section: Section, **options: int) -> Section:
    return replace(section, options={**section.options, **{key: str(value) for key, value in options.items()}})


# --- building --------------------------------------------------------------------------------------------------------


@dataclass
class _Trace:
    """Channels and strides of the layers so far; entry 0 is the input."""

    inputs: int
    channels: list[int] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)

    @property
    def last(self) -> tuple[int, int]:
        return (self.channels[-1], self.strides[-1]) if self.channels else (self.inputs, 1)

    def index(self, section: Section, key: str) -> list[int]:
        """The layers that `key` names: negative ones count back from this layer."""
        here = len(self.channels)
        found = [i + here if i < 0 else i for i in section.integers(key)]
        if not found or not all(0 <= i < here for i in found):
            raise FormatError(f"{section.where}: {key}={section.text(key)} names a layer outside 0…{here - 1}")
        if len({self.strides[i] for i in found}) > 1:
            raise FormatError(f"{section.where}: {key}={section.text(key)} joins maps of different sizes")
        return found


_KEYS = {
    "convolutional": ("batch_normalize", "filters", "size", "stride", "pad", "padding", "groups", "activation"),
    "maxpool": ("size", "stride", "padding"),
    "route": ("layers", "groups", "group_id"),
    "shortcut": ("from", "activation"),
    "upsample": ("stride",),
    "dropout": (),
    "yolo": (),
}


def _layer(section: Section, trace: _Trace) -> nn.Module:
    """Build one section and note what comes out of it."""
    if section.kind not in _KEYS:
        near = suggest(section.kind, _KEYS)
        raise FormatError(f"{section.where}: no layer [{section.kind}]{near}; there are {', '.join(_KEYS)}")
    for key in section.options:
        if section.kind not in _IGNORED and key not in _KEYS[section.kind]:
            near = suggest(key, _KEYS[section.kind])
            raise FormatError(f"{section.where}: [{section.kind}] {key} is not supported{near}")
    module, channels, stride = _BUILDERS[section.kind](section, trace)
    trace.channels.append(channels)
    trace.strides.append(stride)
    return module


_Built = tuple[nn.Module, int, int]  # the module, its channels and its stride


def _activation(section: Section, default: str) -> str:
    name = section.text("activation", default)
    if name not in ACTIVATIONS:
        near = suggest(name, ACTIVATIONS)
        raise FormatError(f"{section.where}: no activation {name!r}{near}; there are {', '.join(ACTIVATIONS)}")
    return name


def _convolutional(section: Section, trace: _Trace) -> _Built:
    inputs, before = trace.last
    outputs, size = section.integer("filters", 1, least=1), section.integer("size", 1, least=1)
    stride, groups = section.integer("stride", 1, least=1), section.integer("groups", 1, least=1)
    padding = size // 2 if section.integer("pad", 0) else section.integer("padding", 0)
    if inputs % groups or outputs % groups:
        raise FormatError(f"{section.where}: groups={groups} does not divide {inputs} inputs and {outputs} filters")
    norm, activation = bool(section.integer("batch_normalize", 0)), _activation(section, "logistic")
    return Convolution(inputs, outputs, size, stride, padding, groups, norm, activation), outputs, before * stride


def _maxpool(section: Section, trace: _Trace) -> _Built:
    channels, before = trace.last
    stride = section.integer("stride", 1, least=1)
    size = section.integer("size", stride, least=1)
    return MaxPool(size, stride, section.integer("padding", size - 1)), channels, before * stride


def _route(section: Section, trace: _Trace) -> _Built:
    sources = trace.index(section, "layers")
    parts, part = section.integer("groups", 1, least=1), section.integer("group_id", 0)
    if part >= parts or any(trace.channels[i] % parts for i in sources):
        raise FormatError(f"{section.where}: group_id={part} of groups={parts} cannot be taken of these layers")
    channels = sum(trace.channels[i] for i in sources) // parts
    return Route(sources, parts, part), channels, trace.strides[sources[0]]


def _shortcut(section: Section, trace: _Trace) -> _Built:
    sources, last = trace.index(section, "from"), trace.last
    for i in sources:
        if (trace.channels[i], trace.strides[i]) != last:
            raise FormatError(f"{section.where}: from={section.text('from')} has another shape than the layer before")
    return Shortcut(sources, _activation(section, "linear")), *last


def _upsample(section: Section, trace: _Trace) -> _Built:
    (channels, before), stride = trace.last, section.integer("stride", 2, least=1)
    if before % stride:
        raise FormatError(f"{section.where}: upsampling by {stride} makes a map larger than the input")
    return nn.Upsample(scale_factor=stride), channels, before // stride


def _dropout(section: Section, trace: _Trace) -> _Built:
    return nn.Dropout(section.fraction("probability", 0.5)), *trace.last


def _yolo(section: Section, trace: _Trace) -> _Built:
    channels, stride = trace.last
    anchors, classes = section.positive("anchors"), section.integer("classes", 20, least=1)
    pairs = list(zip(anchors[::2], anchors[1::2], strict=False))
    mask = section.integers("mask", ",".join(map(str, range(len(pairs)))))
    if len(anchors) % 2 or not mask or len(set(mask)) < len(mask) or not set(mask) <= set(range(len(pairs))):
        raise FormatError(
            f"{section.where}: mask={mask} does not name anchors, each once, of the {len(anchors)} numbers there are"
        )
    if channels != len(mask) * (5 + classes):
        expected = f"{len(mask)} · (5 + {classes}) = {len(mask) * (5 + classes)}"
        raise FormatError(f"{section.where}: the layer before [yolo] should have filters={expected}, it has {channels}")
    if section.integer("new_coords", 0):
        raise FormatError(f"{section.where}: new_coords=1 (scaled YOLOv4) is not supported")
    scale = section.positive("scale_x_y", "1")
    if len(scale) != 1:
        raise FormatError(f"{section.where}: scale_x_y should be one number, got {scale}")
    head = Head(
        tuple(pairs[i] for i in mask),
        classes,
        stride,
        scale[0],
        section.fraction("iou_thresh", Head.assign_above),
        section.fraction("ignore_thresh", Head.ignore_above),
    )
    return Yolo(head), channels, stride


_BUILDERS: dict[str, Callable[[Section, _Trace], _Built]] = {
    "convolutional": _convolutional,
    "maxpool": _maxpool,
    "route": _route,
    "shortcut": _shortcut,
    "upsample": _upsample,
    "dropout": _dropout,
    "yolo": _yolo,
}


@torch.no_grad()
def _init(network: Darknet) -> None:
    """He's start; the heads' biases begin at rare objects (0.01) and even rarer classes, as the background is most of it."""
    for layer in network.layers:
        if isinstance(layer, Convolution):
            nn.init.kaiming_normal_(layer.conv.weight, a=0.1, mode="fan_out")
    for layer, after in zip(network.layers, list(network.layers)[1:], strict=False):
        if isinstance(after, Yolo) and isinstance(layer, Convolution) and layer.conv.bias is not None:
            nn.init.normal_(layer.conv.weight, std=0.01)
            bias = layer.conv.bias.view(len(after.head.anchors), -1)
            bias[:, :4], bias[:, 4:] = 0, math.log(0.01 / 0.99)


# --- weights ---------------------------------------------------------------------------------------------------------


def _tensors(network: Darknet) -> Iterable[list[Tensor]]:
    """Of each convolution, the tensors in the order of the file: bias or (shift, scale, mean, variance), then weights."""
    for layer in network.layers:
        if isinstance(layer, Convolution):
            if layer.norm is not None:
                norm = layer.norm
                assert norm.running_mean is not None and norm.running_var is not None
                yield [norm.bias, norm.weight, norm.running_mean, norm.running_var, layer.conv.weight]
            else:
                assert layer.conv.bias is not None
                yield [layer.conv.bias, layer.conv.weight]


def darknet_floats(network: Darknet) -> int:
    """How many float32 the network's `.weights` file holds: its parameters and batch norm's running statistics."""
    return sum(tensor.numel() for tensors in _tensors(network) for tensor in tensors)


@torch.no_grad()
def read_darknet_weights(network: Darknet, path: str | Path, *, partial: bool = False) -> int:
    """Copy a darknet `.weights` file into the network.

    Args:
        network: changed in place, and only when the file fits.
        path: three int32 (version), the images seen (int64; int32 before version 0.2), then float32, little-endian.
        partial: the file may end after any convolution (``darknet53.conv.74``); the rest stays as it is.

    Returns:
        How many images the weights were trained on, by the file.

    Raises:
        FormatError: the file is too short, or does not hold exactly this network's weights.
        DualpruneError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DualpruneError(f"there is no weights file {path}")
    content = path.read_bytes()
    if len(content) < 16:
        raise FormatError(f"{path} is no darknet weights file: {len(content)} bytes are less than its header")
    major, minor, _ = np.frombuffer(content, "<i4", 3).tolist()
    wide = major * 10 + minor >= 2
    seen = int(np.frombuffer(content, "<i8" if wide else "<i4", 1, 12)[0]) if len(content) >= 20 or not wide else 0
    values = torch.from_numpy(np.frombuffer(content[20 if wide else 16 :], "<f4").copy()) if not len(content) % 4 else None
    needed = darknet_floats(network)
    if values is None or not (len(values) == needed or (partial and _boundary(network, len(values)))):
        has = f"{len(content)} bytes" if values is None else f"{len(values):,}"
        hint = "" if partial or values is None or len(values) > needed else "; for a backbone's file, set partial"
        raise FormatError(f"{path} does not fit: the network needs {needed:,} numbers, the file has {has}{hint}")
    start = 0
    for tensor in (tensor for tensors in _tensors(network) for tensor in tensors):
        if start == len(values):
            break
        tensor.copy_(values[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return seen


def write_darknet_weights(network: Darknet, path: str | Path, *, seen: int = 0) -> None:
    """Write the network as darknet reads it; reading it back gives the same bits."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(np.array(_VERSION, "<i4").tobytes() + np.array([seen], "<i8").tobytes())
        for tensor in (tensor for tensors in _tensors(network) for tensor in tensors):
            file.write(tensor.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())


def _boundary(network: Darknet, count: int) -> bool:
    total = 0
    for tensors in _tensors(network):
        total += sum(tensor.numel() for tensor in tensors)
        if total >= count:
            return total == count
    return False
