"""Physical removal: what goes leaves the function as it was, what must stay stays and says why, and no file does harm."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

import dualprune
from dualprune import DualpruneError, FormatError, load_shrunk, save_shrunk, save_sparse, shrink, shrink_report, silence
from dualprune.tasks.classification.models import build_model
from helpers import same_bits, snapshot

pytest.importorskip("torch_pruning")
X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def lively(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and shifts, and biases values: so that dead filters emit constants."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for tensor, low in (
                    (module.weight, 0.5),
                    (module.bias, 0.1),
                    (module.running_mean, -0.5),
                    (module.running_var, 0.5),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            elif getattr(module, "bias", None) is not None:
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) + 0.1)
    return model.eval()


@torch.no_grad()
def kill(model: nn.Module, *filters: str, every: int = 2) -> nn.Module:
    """Zero every second filter of the named layers."""
    for name in filters:
        model.get_submodule(name).weight[::every] = 0
    return model


@torch.no_grad()
def gap(a: nn.Module, b: nn.Module, x: Tensor = X) -> float:
    x = torch.cat([x, torch.randn_like(x), 5 * torch.randn_like(x) - 3])
    return float((a(x) - b(x)).abs().max())


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}


def chain(padding: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=padding),
        nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * (4 + 2 * padding) ** 2, 7), nn.ReLU(), nn.Linear(7, 2),
    )  # fmt: skip


class Residual(nn.Module):
    """A stem, then two blocks whose second convolutions are added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.a = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False))
        self.b = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a(x))
        x = F.relu(x + self.b(x))
        return self.head(x.mean((2, 3)))


# ---------------------------------------------------------------------- exactness


def test_batch_norm_makes_a_dead_filter_a_constant_that_padding_does_not_let_go():
    model = kill(lively(chain()), "0")
    small = shrink(model, X)
    assert widths(small) == widths(model)
    (stay,) = shrink_report(small).stays
    assert (stay.layer, stay.side, stay.channels) == ("0", "outputs", (0, 2, 4))
    assert "pads with zeros" in stay.reason and "silence" in stay.reason
    with torch.no_grad():  # what folding the constant into the next bias would do: right inside, wrong at the border
        naive, constant = copy.deepcopy(model[:4]), model[:3](X)[0, ::2, 0, 0]
        naive[3].bias += torch.einsum("fchw,c->f", model[3].weight[:, ::2], constant)
        naive[3].weight[:, ::2] = 0
        difference = (naive(X) - model[:4](X)).abs().amax((0, 1))
    assert difference[1:-1, 1:-1].max() < 1e-5 < 0.01 < difference[0].max()


def test_padding_with_another_value_than_zero_keeps_a_dead_filter():
    """Its mean depends on the input's size: right for the example alone."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ConstantPad2d(1, 0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, 0
    small = shrink(model.eval(), X)
    assert widths(small) == widths(model) and "another value than zero" in shrink_report(small).stays[0].reason
    model[1] = nn.ZeroPad2d(1)
    assert widths(shrink(model, X))["0.weight"][0] == 2


def test_silence_passes_by_what_is_combined_with_wider_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3)).eval()
    with torch.no_grad():
        model[0].weight[4:] = 0
    assert silence(model, X) == {}


def test_tensors_need_not_be_on_the_default_device(tmp_path):
    model = kill(lively(chain()), "0")
    silence(model, X)
    small = shrink(model, X)
    save_shrunk(small, tmp_path / "small.safetensors")
    with torch.device("meta"):
        again, loaded = shrink(model, X), load_shrunk(model, tmp_path / "small.safetensors")
    assert same_bits(small.state_dict(), again.state_dict()) and same_bits(small.state_dict(), loaded.state_dict())


def test_silence_zeroes_the_shift_and_only_that():
    model = kill(lively(chain()), "0")
    before = snapshot(model)
    assert silence(model, X) == {"1": [0, 2, 4]}
    for name, tensor in model.state_dict().items():
        expected = before[name].clone()
        if name in ("1.weight", "1.bias"):
            expected[::2] = 0
        assert torch.equal(tensor, expected), name
    small = shrink(model, X)
    assert widths(small)["0.weight"] == (3, 3, 3, 3) and widths(small)["3.weight"] == (4, 3, 3, 3)
    assert gap(model, small) < 1e-5
    assert silence(model, X) == {}


def test_constants_are_folded_where_that_is_exact():
    model = kill(lively(chain(padding=0)), "0", "3", "7")
    small = shrink(model, X)
    assert widths(small) == {
        "0.weight": (3, 3, 3, 3), "3.weight": (2, 3, 3, 3), "5.weight": (5, 2, 3, 3), "7.weight": (3, 80), "9.weight": (2, 3),
    }  # fmt: skip
    assert gap(model, small) < 1e-5
    assert shrink_report(small).stays == ()
    dead = F.relu(model[7].bias[::2])  # by hand: rows 0, 2, 4, 6 of the linear layer are zero, so relu(bias) arrives
    assert torch.allclose(small[9].bias, model[9].bias + model[9].weight[:, ::2] @ dead, atol=1e-6)


@pytest.mark.parametrize(
    "between",
    [
        lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
        lambda: nn.AvgPool2d(3, 1, padding=1),
        lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.AdaptiveAvgPool2d(1)),
        lambda: nn.Sequential(nn.ZeroPad2d(1), nn.AdaptiveAvgPool2d(1)),
    ],
)
def test_a_constant_that_depends_on_the_size_of_the_input_stays(between):
    """A map of one position has no inside: a padded constant looks the same everywhere there, and is not on larger ones."""
    model = kill(
        lively(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.AvgPool2d(4), between(), nn.ReLU(), nn.Conv2d(6, 4, 1))), "0"
    )
    small = shrink(model, X[:, :, :4, :4])
    assert gap(model, small, torch.randn(2, 3, 32, 32)) < 1e-5
    (stay,) = shrink_report(small).stays
    assert stay.channels == (0, 2, 4) and "vary with the input's size where 5 reads it" in stay.reason
    assert silence(model, X[:, :, :4, :4])
    small = shrink(model, X[:, :, :4, :4])
    assert widths(small)["0.weight"] == (3, 3, 1, 1) and gap(model, small, torch.randn(2, 3, 32, 32)) < 1e-5


@pytest.mark.parametrize(
    "between", [lambda: nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), lambda: nn.MaxPool2d(3, 1, padding=1)]
)
def test_a_constant_that_no_border_changes_goes(between):
    model = kill(
        lively(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.AvgPool2d(4), between(), nn.ReLU(), nn.Conv2d(6, 4, 1))), "0"
    )
    small = shrink(model, X[:, :, :4, :4])
    assert widths(small)["0.weight"] == (3, 3, 1, 1) and gap(model, small, torch.randn(2, 3, 32, 32)) < 1e-5


def test_filters_that_nobody_reads_go_although_they_are_not_zero():
    model = lively(chain())
    with torch.no_grad():
        model[3].weight[:, [1, 5]] = 0
        model[7].weight[:, 36 * 2 : 36 * 3] = 0  # all places of channel 2 after flattening
    small = shrink(model, X)
    assert widths(small)["0.weight"][0] == 4 and widths(small)["5.weight"][0] == 4 and widths(small)["7.weight"] == (7, 144)
    assert gap(model, small) < 1e-5
    assert shrink_report(small).plan["0"]["outputs"].kept == (0, 2, 3, 4)


def test_a_filter_that_reads_only_dead_ones_is_dead():
    model = lively(chain())
    with torch.no_grad():
        model[0].weight[2] = 0
        model[1].bias[2] = model[1].weight[2] = 0
        model[3].weight[1, [0, 1, 3, 4, 5]] = 0
        model[3].bias[1] = 0
    small = shrink(model, X)
    assert widths(small)["3.weight"] == (3, 5, 3, 3) and widths(small)["5.weight"] == (5, 3, 3, 3)
    assert gap(model, small) < 1e-5


def test_silent_on_all_inputs_seen_is_not_dead():
    model = lively(chain())
    with torch.no_grad():
        model[1].bias[3] = -50
    assert widths(shrink(model, X)) == widths(model)


@pytest.mark.parametrize("seed", range(8))
def test_against_ablation(seed):
    """The slow twin: a channel is needed just when the output changes as it takes its values from other images."""
    generator = torch.Generator().manual_seed(seed)
    model = lively(chain())
    places = {0: 3, 3: 5, 5: 7, 7: 9}  # a layer, and the one that reads it
    with torch.no_grad():
        for i in places:
            model[i].weight[torch.rand(len(model[i].weight), generator=generator) < 0.3] = 0
        for i in (3, 7):
            model[i].weight[:, torch.rand(model[i].weight.shape[1], generator=generator) < 0.3] = 0
    silence(model, X)
    small = shrink(model, X)
    assert gap(model, small) < 1e-5
    needed = {i: [c for c in range(len(model[i].weight)) if matters(model, c, reader)] for i, reader in places.items()}
    for i, channels in needed.items():
        kept = shrink_report(small).plan.get(str(i), {}).get("outputs")
        assert set(channels) <= set(kept.kept if kept else range(len(model[i].weight)))
        if all(needed.values()):  # else a layer keeps a filter that nobody needs, and its inputs with it
            assert len(small[i].weight) == len(channels)


@torch.no_grad()
def matters(model: nn.Module, channel: int, reader: int) -> bool:
    twin, x = copy.deepcopy(model).double(), torch.cat([X, torch.randn(20, 3, 8, 8)]).double()
    hidden = twin[:reader](x)
    before = twin[reader:](hidden)
    size = 36 if reader == 7 else 1  # places of a channel after flattening
    part = slice(channel * size, (channel + 1) * size)
    hidden[:, part] = hidden[:, part].roll(1, 0)
    return not torch.equal(twin[reader:](hidden), before)


# ---------------------------------------------------------------------- networks


def test_cifar_resnet_loses_inner_filters_and_keeps_padded_sums():
    model = lively(build_model("resnet20"))
    inner = [name for name, _ in model.named_modules() if name.endswith(".conv1")]
    kill(model, *inner, "layer2.1.conv2", "conv1")
    silence(model, X)
    small = shrink(model, X)
    assert gap(model, small) < 1e-5 * 20
    for name in inner:
        before, after = model.get_submodule(name), small.get_submodule(name)
        assert after.weight.shape == (before.out_channels // 2, before.in_channels, 3, 3)
        assert small.get_submodule(name.replace("conv1", "conv2")).weight.shape[:2] == (
            before.out_channels,
            before.out_channels // 2,
        )
    report = shrink_report(small)
    assert {stay.layer: len(stay.channels) for stay in report.stays} == {"conv1": 8, "layer2.1.conv2": 16}
    assert all("pads its channels with zeros" in stay.reason for stay in report.stays)
    assert report.parameters_after == sum(p.numel() for p in small.parameters()) < 0.52 * report.parameters_before


def test_sums_let_go_what_is_zero_in_all_their_terms():
    model = lively(Residual())
    with torch.no_grad():
        for name in ("stem", "a.3", "b.3"):
            model.get_submodule(name).weight[[1, 4]] = 0
        model.a[3].weight[2] = 0  # alive in the others
    small = shrink(model, X)
    assert gap(model, small) < 1e-5
    assert widths(small) == {
        "stem.weight": (4, 3, 3, 3), "a.0.weight": (8, 4, 3, 3), "a.3.weight": (4, 8, 1, 1), "b.0.weight": (8, 4, 3, 3),
        "b.3.weight": (4, 8, 1, 1), "head.weight": (3, 4),
    }  # fmt: skip
    (stay,) = shrink_report(small).stays
    assert (stay.layer, stay.channels) == ("a.3", (2,)) and "carries" in stay.reason and "stem, b.3" in stay.reason


def test_the_reason_named_is_the_one_that_cannot_be_helped():
    model = lively(Residual())
    model.stem.bias = nn.Parameter(torch.ones(6))
    with torch.no_grad():  # alone before the first block, where silence would help, but not after it
        model.stem.weight[2] = 0
    assert silence(model, X) == {}
    (stay,) = shrink_report(shrink(model, X)).stays
    assert stay.reason == "b.0 reads it, and it also carries a.3, b.3"


def test_sums_that_nobody_reads_go_in_all_their_terms():
    model = lively(Residual())
    with torch.no_grad():
        for name in ("a.0", "b.0", "head"):
            model.get_submodule(name).weight[:, 3] = 0
    small = shrink(model, X)
    assert gap(model, small) < 1e-5
    assert [widths(small)[f"{name}.weight"][0] for name in ("stem", "a.3", "b.3")] == [5, 5, 5]


def test_torchvision_resnet18():
    models = pytest.importorskip("torchvision").models
    model = lively(models.resnet18(num_classes=10))
    kill(model, *(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)))
    x = torch.randn(1, 3, 32, 32)
    silence(model, x)
    small = shrink(model, x)
    assert gap(model, small, x) < 1e-5 * 20
    assert shrink_report(small).stays == ()
    for name, shape in widths(model).items():
        assert widths(small)[name][0] == (10 if name == "fc.weight" else shape[0] // 2)


def test_mobilenet_v2_and_its_depthwise_filters():
    models = pytest.importorskip("torchvision").models
    model = lively(models.mobilenet_v2(num_classes=4, width_mult=0.25))
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    depthwise = [name for name, m in convs.items() if m.groups > 1]
    kill(model, *depthwise[1::2], "features.3.conv.0.0", "features.5.conv.0.0")
    x = torch.randn(1, 3, 32, 32)
    silence(model, x)
    small = shrink(model, x)
    assert gap(model, small, x) < 1e-5
    for name in depthwise[1::2]:
        layer, before = small.get_submodule(name), model.get_submodule(name)
        assert layer.groups == layer.in_channels == layer.out_channels == len(layer.weight) == before.groups // 2
    assert shrink_report(small).stays == ()


class Branches(nn.Module):
    """Concatenation, squeeze-and-excitation, a transposed convolution, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm, self.act = nn.BatchNorm2d(10), nn.PReLU(10)
        self.squeeze, self.excite = nn.Conv2d(10, 3, 1), nn.Conv2d(3, 10, 1)
        self.up = nn.ConvTranspose2d(10, 5, 2, stride=2)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.up(x * gate)))


def test_concatenation_gates_and_transposed_convolutions():
    model = lively(Branches())
    with torch.no_grad():
        model.left.weight[1] = 0
        model.right.weight[[0, 5]] = 0
        model.up.weight[:, 2] = 0
        model.squeeze.weight[0] = 0
    assert silence(model, X) == {"left": [1], "right": [0, 5], "norm": [1, 4, 9]}
    small = shrink(model, X)
    assert gap(model, small) < 1e-5
    assert shrink_report(small).stays == ()
    assert widths(small) == {
        "left.weight": (3, 3, 3, 3), "right.weight": (4, 3, 1, 1), "squeeze.weight": (2, 7, 1, 1),
        "excite.weight": (7, 2, 1, 1), "up.weight": (7, 4, 2, 2), "head.weight": (2, 4, 1, 1),
    }  # fmt: skip
    assert small.act.num_parameters == small.norm.num_features == 7


class Mixer(nn.Module):
    """A transformer's two linear layers on (N, L, D), behind a LayerNorm, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.embed(x) * scale
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm(x))))).mean(1))


def test_linear_layers_on_sequences_and_keyword_arguments():
    model = kill(lively(Mixer()), "fc1", "embed", every=3)
    x = torch.randn(2, 5, 4)
    small = shrink(model, {"x": x, "scale": 1.0})
    assert gap(model, small, x) < 1e-5
    assert widths(small)["fc1.weight"] == (8, 6) and widths(small)["fc2.weight"] == (6, 8)
    (stay,) = shrink_report(small).stays
    assert stay.layer == "embed" and "norm (LayerNorm)" in stay.reason


# ---------------------------------------------------------------------- what must stay


class Stubborn(nn.Module):
    """Inner filters that cannot go, for one reason each."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        n = 3 if how == "input" else 4
        self.first = nn.Conv2d(3, n, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2) if how == "grouped" else nn.Identity()
        self.inner, self.last = nn.Conv2d(n, 4, 1), nn.Conv2d(2 if how == "half" else 4, 3, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1)) if how == "parameter" else None
        self.register_buffer("mean", torch.rand(1, 4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.grouped(self.first(x))
        if self.how == "buffer":
            y = y - self.mean
        if self.how == "parameter":
            y = y * self.scale
        if self.how == "softmax":
            y = torch.softmax(y, 1)
        if self.how == "half":
            y = F.relu(self.inner(y))
            return self.last(y[:, :2] + y[:, 2:])
        if self.how == "input":
            y = F.relu(y + x - 100)  # zero on all that is tried, and yet not always
        out = self.last(F.relu(self.inner(y)))
        return (out, y) if self.how == "output" else out


REASONS = {
    "buffer": "trace misses",
    "parameter": "parameter scale",
    "softmax": "Softmax",
    "half": "slices channels",
    "input": "carries what cannot be followed",
    "output": "output of the model",
    "grouped": "grouped is a grouped convolution",
}


@pytest.mark.parametrize("how", REASONS)
def test_what_cannot_go_stays_and_says_why(how):
    model = lively(Stubborn(how))
    dead = "inner" if how == "half" else "first"
    with torch.no_grad():
        model.get_submodule(dead).weight[1] = 0
        model.get_submodule(dead).bias[1] = 0
        if how == "half":
            model.inner.weight[3] = model.inner.bias[3] = 0
    small = shrink(model, X)
    assert widths(small) == widths(model)
    reasons = {stay.reason for stay in shrink_report(small).stays if stay.layer == dead}
    assert any(REASONS[how] in reason for reason in reasons), reasons
    if how != "output":
        assert gap(model, small) == 0


def test_one_refusal_does_not_hold_up_the_rest():
    grow = nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.Upsample(scale_factor=8), nn.Conv2d(2, 3, 1))
    model = lively(nn.Sequential(chain(), *grow, Stubborn("buffer")))
    with torch.no_grad():
        for name in ("0.3", "0.7", "4.first", "4.inner"):
            model.get_submodule(name).weight[1] = model.get_submodule(name).bias[1] = 0
    small = shrink(model, X)
    shapes = {name: shape[0] for name, shape in widths(small).items()}
    assert [shapes[f"{name}.weight"] for name in ("0.3", "0.7", "4.first", "4.inner")] == [3, 6, 4, 3]
    assert gap(model, small) < 1e-5
    (stay,) = (stay for stay in shrink_report(small).stays if stay.layer == "4.first")
    assert "breaks the model (RuntimeError" in stay.reason


def test_shared_and_computed_weights_stay():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)
    )
    model[2].weight = model[0].weight
    prune.identity(model[4], "weight")
    with torch.no_grad():
        for i in (0, 2):
            model[i].weight[1] = model[i].bias[1] = 0
        model[4].weight_orig[2] = model[4].bias[2] = 0
        with pytest.raises(DualpruneError, match="cannot be copied"):
            shrink(model, X)
        model(X)  # without a history, the computed weight can be copied
    small = shrink(model.eval(), X)
    assert gap(model, small) == 0
    reasons = {stay.layer: stay.reason for stay in shrink_report(small).stays if stay.side == "outputs"}
    assert "shared with" in reasons["0"] and "shared with" in reasons["2"] and "computed from" in reasons["4"]


def test_a_layer_keeps_one_filter():
    model = chain()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()
    small = shrink(model.eval(), X)
    assert widths(small)["3.weight"][0] == widths(small)["5.weight"][1] == 1
    assert gap(model, small) < 1e-5


def test_what_cannot_be_traced_is_left():
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).argmax(1)

    model = kill(Opaque().eval(), "conv")
    small = shrink(model, X)
    assert widths(small) == widths(model)
    (stay,) = shrink_report(small).stays
    assert stay.layer == "conv" and stay.channels == (0, 2)


# ---------------------------------------------------------------------- what is kept of the original


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_original_untouched_and_mode_dtype_and_flags_kept(dtype):
    model = kill(lively(chain()), "0")
    silence(model, X)
    model = model.to(dtype).train()
    model[9].weight.requires_grad_(False)
    before = snapshot(model)
    small = shrink(model, X.to(dtype))
    assert same_bits(before, model.state_dict()) and model.training
    assert type(small) is type(model) and small.training and all(m.training for m in small.modules())
    assert list(small.state_dict()) == list(before)
    assert all(p.dtype == dtype for p in small.parameters())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert small[0].weight.shape[0] == 3
    x = X.to(dtype)
    assert torch.allclose(model.eval()(x), small.eval()(x), atol=1e-5 if dtype != torch.bfloat16 else 0.1)
    small.train()(x).sum().backward()
    assert small[0].weight.grad is not None and model[0].weight.grad is None


def test_shrinking_again_continues_the_plan(tmp_path):
    model = kill(lively(chain()), "0")
    silence(model, X)
    once = shrink(model, X)
    with torch.no_grad():
        once[3].weight[:, 1] = 0  # reads channel 3 of the original
    twice = shrink(once, X)
    assert gap(once, twice) < 1e-5
    assert shrink_report(twice).plan["0"]["outputs"].kept == (1, 5)
    assert shrink_report(twice).parameters_before == sum(p.numel() for p in model.parameters())
    save_shrunk(twice, tmp_path / "twice.safetensors")
    assert gap(load_shrunk(chain().eval(), tmp_path / "twice.safetensors"), twice) == 0


def test_report_in_words():
    model = kill(lively(chain(padding=0)), "0", "9")
    text = str(shrink_report(shrink(model, X)))
    assert "3 of 6" in text and "fewer" in text and "9: 1 zero filter left: it is an output of the model" in text


# ---------------------------------------------------------------------- the file


@pytest.fixture
def saved(tmp_path):
    model = kill(lively(chain(padding=0)), "0", "3", "7")
    small = shrink(model, X)
    return model, small, tmp_path / "small.safetensors", save_shrunk(small, tmp_path / "small.safetensors")


def test_round_trip_into_the_original_class_without_torch_pruning(saved, monkeypatch, tmp_path):
    _, small, path, size = saved
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    fresh = chain(padding=0)
    before = snapshot(fresh)
    loaded = load_shrunk(fresh, path)
    assert same_bits(loaded.state_dict(), small.state_dict())
    assert loaded.training and gap(loaded.eval(), small) == 0
    assert same_bits(fresh.state_dict(), before)
    assert size == path.stat().st_size < save_sparse(chain(padding=0), tmp_path / "dense.safetensors")
    assert shrink_report(loaded).plan == shrink_report(small).plan
    save_shrunk(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert load_shrunk(chain(padding=0).double(), path)[0].weight.dtype == torch.float64


def write(path, small, plan):
    save_sparse(small, path, metadata={"removal_plan": plan if isinstance(plan, str) else json.dumps(plan)})


def plan_of(small):
    sides = shrink_report(small).plan
    layers = {n: {s: {"of": k.of, "kept": list(k.kept)} for s, k in v.items()} for n, v in sides.items()}
    return {"version": 1, "layers": layers}


def put(plan, value, *keys):
    at = plan
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value


OUT = ("layers", "0", "outputs")
BAD = {
    "negative": ([-1, 1, 3], *OUT, "kept"),
    "past the end": ([1, 3, 6], *OUT, "kept"),
    "huge": ([1, 3, 10**30], *OUT, "kept"),
    "twice": ([1, 3, 3], *OUT, "kept"),
    "descending": ([5, 3, 1], *OUT, "kept"),
    "empty": ([], *OUT, "kept"),
    "booleans": ([False, True, 3], *OUT, "kept"),
    "fractions": ([0.5, 1, 3], *OUT, "kept"),
    "text": ("1, 3, 5", *OUT, "kept"),
    "nested": ([[1], [3], [5]], *OUT, "kept"),
    "no kept": ({"of": 6}, *OUT),
    "other width": (7, *OUT, "of"),
    "width as text": ("6", *OUT, "of"),
    "not an entry": (3, *OUT),
    "unknown side": ({"of": 6, "kept": [1]}, "layers", "0", "weight"),
    "inputs of batch norm": ({"of": 6, "kept": [1]}, "layers", "1", "inputs"),
    "unknown layer": ({"outputs": {"of": 6, "kept": [1]}}, "layers", "0.__class__"),
    "a layer without weights": ({"outputs": {"of": 6, "kept": [1]}}, "layers", "2"),
    "layers as list": ([], "layers"),
    "layer as list": ([], "layers", "0"),
    "version": (2, "version"),
    "fewer kept than stored": ([1, 3], *OUT, "kept"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_plans_are_refused(saved, fault):
    _, small, path, _ = saved
    plan = plan_of(small)
    put(plan, BAD[fault][0], *BAD[fault][1:])
    write(path, small, plan)
    fresh = chain(padding=0)
    before = snapshot(fresh)
    with pytest.raises(DualpruneError, match=r"small\.safetensors"):
        load_shrunk(fresh, path)
    assert same_bits(fresh.state_dict(), before)


@pytest.mark.parametrize("text", ["", "[", "[]", "3", "[" * 100_000, '{"version": 1}', "9" * 10_000])
def test_plans_that_are_no_plans(saved, text):
    _, small, path, _ = saved
    write(path, small, text)
    with pytest.raises(FormatError, match="plan"):
        load_shrunk(chain(padding=0), path)


def test_files_of_other_kinds(saved, tmp_path):
    model, _, path, _ = saved
    save_sparse(model, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="no removal plan"):
        load_shrunk(chain(padding=0), tmp_path / "plain.safetensors")
    data = bytearray(path.read_bytes())
    at = data.index(b"kept") + 10  # a digit of the plan: the checksum covers it
    data[at] = data[at] ^ 1
    path.write_bytes(data)
    with pytest.raises(FormatError):
        load_shrunk(chain(padding=0), path)


def test_another_model_is_refused_with_names(saved):
    _, _, path, _ = saved
    with pytest.raises(DualpruneError, match="which this Residual does not have"):
        load_shrunk(Residual(), path)
    with pytest.raises(DualpruneError, match=r"7\.weight is \(3, 80\), after the plan it should be \(3, 180\)"):
        load_shrunk(chain(padding=1), path)
    with pytest.raises(DualpruneError, match=r"missing 10\.bias"):
        load_shrunk(nn.Sequential(*chain(padding=0), nn.Linear(2, 2)), path)


# ---------------------------------------------------------------------- bad input


def test_without_torch_pruning_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for do in (shrink, silence):
        with pytest.raises(DualpruneError, match=r"pip install 'dualprune\[shrink\]'"):
            do(chain(), X)


def test_bad_input():
    with pytest.raises(DualpruneError, match=r"expected a torch.nn.Module"):
        shrink(chain().state_dict(), X)
    with pytest.raises(DualpruneError, match=r"pass what is inside, model\.module"):
        shrink(nn.DataParallel(chain()), X)
    with pytest.raises(DualpruneError, match="does not run on the example"):
        shrink(chain(), torch.randn(1, 4, 8, 8))
    with pytest.raises(DualpruneError, match="example is one input"):
        shrink(chain(), 3)
    for ask in (shrink_report, lambda model: save_shrunk(model, "never.safetensors")):
        with pytest.raises(DualpruneError, match=r"does not come from dualprune\.shrink"):
            ask(chain())


def test_the_function_is_not_hidden_by_a_module():
    assert callable(dualprune.shrink) and dualprune.silence is silence and dualprune.shrink is shrink
