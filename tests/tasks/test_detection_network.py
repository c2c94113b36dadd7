"""Darknet networks: parser, layers, sizes, files of weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dualprune.errors import DualpruneError, FormatError
from dualprune.tasks.detection import build_network, network_names, parse_cfg, read_darknet_weights, write_darknet_weights
from dualprune.tasks.detection.darknet import ACTIVATIONS, Darknet, MaxPool, darknet_floats

# parameters, and float32 in the published .weights file: (its size − 20) / 4, e.g. 35,434,956 bytes of yolov3-tiny.weights
COUNTS = {
    "yolov3": (61_949_149, 62_001_757),
    "yolov3-spp": (62_998_749, 63_052_381),
    "yolov3-tiny": (8_852_366, 8_858_734),
}

SMALL = """
[net]
channels=3
; a comment
[convolutional]
batch_normalize=1
filters=8   # and another
size=3
stride=2
pad=1
activation=leaky
[convolutional]
batch_normalize=1
groups=8
filters=8
size=3
pad=1
activation=mish
[shortcut]
from=-2
activation=relu
[maxpool]
size=2
stride=2
[upsample]
stride=2
[route]
layers=-1,0
[route]
layers=-1
groups=2
group_id=1
[convolutional]
filters=14
size=1
activation=linear
[yolo]
mask=1,2
anchors=4,4, 8,8, 16,8
classes=2
scale_x_y=1.1
"""


def small():
    return Darknet(parse_cfg(SMALL))


def test_the_package_has_the_yolov3_family():
    assert network_names() == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        network = build_network(name)
    assert (sum(p.numel() for p in network.parameters()), darknet_floats(network)) == COUNTS[name]


def test_layer_numbers_are_darknets():
    with torch.device("meta"):
        tiny, full = build_network("yolov3-tiny"), build_network("yolov3")
    assert (len(tiny.layers), len(full.layers)) == (24, 107)
    assert full.layers[83].sources == (79,) and full.layers[86].sources == (85, 61)
    assert dict(full.named_parameters())["layers.105.conv.weight"].shape == (255, 256, 1, 1)
    assert [head.stride for head in full.heads] == [32, 16, 8] and [head.stride for head in tiny.heads] == [32, 16]


@pytest.mark.parametrize("name", COUNTS)
def test_maps_have_a_cell_for_every_stride(name):
    network = build_network(name, classes=3, width=0.0625).eval()
    maps = network(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 24, 64 // h.stride, 96 // h.stride) for h in network.heads]


def test_the_small_network_computes_what_its_cfg_says():
    network = small().eval()
    x = torch.rand(2, 3, 16, 16)
    first, second, head = network.layers[0], network.layers[1], network.layers[7].conv

    def norm(y, layer):
        n = layer.norm
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)

    a = F.leaky_relu(norm(F.conv2d(x, first.conv.weight, stride=2, padding=1), first), 0.1)
    b = F.mish(norm(F.conv2d(a, second.conv.weight, padding=1, groups=8), second))
    c = F.relu(a + b)
    up = F.max_pool2d(c, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    routed = torch.cat([up, a], 1)[:, 8:]
    (found,) = network(x)
    torch.testing.assert_close(found, F.conv2d(routed, head.weight, head.bias))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_a_gradient(name):
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    ACTIVATIONS[name]()(x * 1).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def darknet_maxpool(x, size, stride, padding):
    """The loops of darknet's maxpool_layer.c."""
    n, c, h, w = x.shape
    out = torch.full((n, c, (h + padding - size) // stride + 1, (w + padding - size) // stride + 1), -np.inf)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for k in range(size):
                for m in range(size):
                    y, z = i * stride - padding // 2 + k, j * stride - padding // 2 + m
                    if 0 <= y < h and 0 <= z < w:
                        out[:, :, i, j] = torch.maximum(out[:, :, i, j], x[:, :, y, z])
    return out


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (2, 1), (5, 1), (9, 1), (3, 2)])
@pytest.mark.parametrize("side", [6, 7])
def test_maxpool_pads_like_darknet(size, stride, side):
    x = -torch.rand(1, 2, side, side) - 1  # below zero: a border of zeros would win
    assert torch.equal(MaxPool(size, stride, size - 1)(x), darknet_maxpool(x, size, stride, size - 1))


def test_weights_are_read_in_the_order_of_the_file(tmp_path):
    network = small()
    values = np.arange(darknet_floats(network), dtype="<f4")
    path = tmp_path / "small.weights"
    path.write_bytes(np.array([0, 2, 5], "<i4").tobytes() + np.array([77], "<i8").tobytes() + values.tobytes())
    assert read_darknet_weights(network, path) == 77
    norm = network.layers[0].norm
    # shift, scale, mean, variance, then the weights
    assert norm.bias[0] == 0 and norm.weight[0] == 8 and norm.running_mean[0] == 16 and norm.running_var[0] == 24
    assert network.layers[0].conv.weight.flatten()[0] == 32
    assert network.layers[7].conv.weight.flatten()[-1] == len(values) - 1
    write_darknet_weights(network, tmp_path / "again.weights", seen=77)
    assert (tmp_path / "again.weights").read_bytes() == path.read_bytes()


def test_old_headers_count_images_in_32_bits(tmp_path):
    network = small()
    values = np.ones(darknet_floats(network), dtype="<f4").tobytes()
    (tmp_path / "old.weights").write_bytes(np.array([0, 1, 0, 9], "<i4").tobytes() + values)
    assert read_darknet_weights(network, tmp_path / "old.weights") == 9


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    network, path = small(), tmp_path / "w.weights"
    write_darknet_weights(small(), path)
    content, before = path.read_bytes(), {k: v.clone() for k, v in network.state_dict().items()}
    for damaged in (content[:-4], content[:-1], content + b"\0\0\0\0", b"\0" * 8, b""):
        path.write_bytes(damaged)
        with pytest.raises(FormatError):
            read_darknet_weights(network, path)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    with pytest.raises(DualpruneError, match="no weights file"):
        read_darknet_weights(network, tmp_path / "none.weights")


def test_a_backbones_weights_end_after_a_layer(tmp_path):
    source, target, path = small(), small(), tmp_path / "w.weights"
    write_darknet_weights(source, path)
    content = path.read_bytes()[: 20 + 4 * (4 * 8 + source.layers[0].conv.weight.numel())]
    path.write_bytes(content)
    last = target.layers[7].conv.weight.clone()
    with pytest.raises(FormatError, match="partial"):
        read_darknet_weights(target, path)
    read_darknet_weights(target, path, partial=True)
    assert torch.equal(target.layers[0].conv.weight, source.layers[0].conv.weight)
    assert torch.equal(target.layers[7].conv.weight, last)
    path.write_bytes(content + b"\0" * 4)
    with pytest.raises(FormatError):
        read_darknet_weights(target, path, partial=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filters=14", "filters=15", r"2 · \(5 \+ 2\) = 14"),
        ("activation=mish", "activation=mich", "did you mean 'mish'"),
        ("[upsample]", "[upsampel]", "did you mean 'upsample'"),
        ("groups=8", "grups=8", "did you mean 'groups'"),
        ("layers=-1,0", "layers=-1,99", "names a layer outside"),
        ("layers=-1,0", "layers=-1,3", "different sizes"),
        ("size=3", "size=three", "should be numbers"),
        ("mask=1,2", "mask=1,3", "does not name anchors"),
        ("from=-2", "from=0,x", "should be numbers"),
        ("groups=2", "groups=3", "cannot be taken"),
        ("channels=3", "channels", r"cfg:3: expected \[section\]"),
        ("[yolo]", "[dropout]", "no \\[yolo\\] section"),
        ("[net]", "[convolutional]", r"begins with \[net\]"),
        ("scale_x_y=1.1", "new_coords=1", "new_coords"),
        ("filters=8", "filters=8.5", r"cfg:5: \[convolutional\] filters should be whole numbers, got '8\.5'"),
        ("filters=8", "filters=nan", "filters should be whole numbers"),
        ("filters=8", "filters=inf", "filters should be whole numbers"),
        ("size=3", "size=", r"size should be a whole number from 1 up, got \[\]"),
        ("mask=1,2", "mask=1,1.5", "mask should be whole numbers"),
        ("mask=1,2", "mask=1,1", r"mask=\[1, 1\] does not name anchors, each once"),
        ("mask=1,2", "mask=-1,1", "does not name anchors"),
        ("anchors=4,4,", "anchors=0,4,", "anchors should be finite and above 0"),
        ("anchors=4,4,", "anchors=nan,4,", "anchors should be finite and above 0"),
        ("anchors=4,4,", "anchors=4,inf,", "anchors should be finite and above 0"),
        ("scale_x_y=1.1", "scale_x_y=0", "scale_x_y should be finite and above 0"),
        ("scale_x_y=1.1", "scale_x_y=1,2", r"scale_x_y should be one number, got \[1.0, 2.0\]"),
        ("scale_x_y=1.1", "iou_thresh=nan", r"iou_thresh should be a number in \[0, 1\], got 'nan'"),
        ("scale_x_y=1.1", "ignore_thresh=1.7", r"ignore_thresh should be a number in \[0, 1\], got '1\.7'"),
        ("scale_x_y=1.1", "ignore_thresh=", r"ignore_thresh should be a number in \[0, 1\], got ''"),
        ("[shortcut]", "[dropout]\nprobability=2\n[shortcut]", r"probability should be a number in \[0, 1\]"),
    ],
)
def test_a_wrong_cfg_is_explained(old, new, message):
    assert old in SMALL
    with pytest.raises(FormatError, match=message):
        Darknet(parse_cfg(SMALL.replace(old, new, 1)))


def test_wrong_arguments_are_explained():
    with pytest.raises(DualpruneError, match="did you mean 'yolov3-tiny'"):
        build_network("yolov3-tny")
    with pytest.raises(DualpruneError, match="multiples of 32"):
        build_network("yolov3-tiny", width=0.1)(torch.zeros(1, 3, 100, 96))
    with pytest.raises(DualpruneError, match="width"):
        build_network("yolov3-tiny", width=0)


def test_real_weights_come_back_bit_for_bit(tmp_path):
    cfg = Path(os.environ.get("DUALPRUNE_WEIGHTS", "")) / "yolo-fastest-1.1.cfg"
    if not cfg.is_file():
        pytest.skip("needs yolo-fastest-1.1 in $DUALPRUNE_WEIGHTS")
    network = build_network(cfg)
    seen = read_darknet_weights(network, cfg.with_suffix(".weights"))
    write_darknet_weights(network, tmp_path / "w", seen=seen)
    assert (tmp_path / "w").read_bytes() == cfg.with_suffix(".weights").read_bytes()
