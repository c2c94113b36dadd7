from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import nn

from dualprune import NM, Block, DualpruneError, Filter, Kernel, Unstructured
from dualprune.problem import Problem
from dualprune.scope import build_problem, parameter_name
from dualprune.selection import keep_largest


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "body": nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3)),
            "head": nn.Linear(16, 10),
        }
    )


def names(problem: Problem) -> list[str]:
    return [t.name for t in problem.targets]


# ---------------------------------------------------------------------- what is pruned by default


def test_first_and_last_layers_biases_and_norms_are_left_alone_and_named() -> None:
    problem = build_problem(convnet(), rate=10)
    assert names(problem) == ["body.0.weight", "body.2.weight"]
    assert problem.skipped["stem.weight"] == "first layer"
    assert problem.skipped["head.weight"] == "last layer"
    assert problem.skipped["body.1.weight"] == "fewer than two dimensions"
    assert set(problem.skipped) | set(names(problem)) == {n for n, _ in convnet().named_parameters()}
    text = problem.describe()
    assert "pruning 2 parameters, 1,728 weights, to 10x fewer" in text
    assert "left alone, first layer: stem.weight" in text
    assert re.search(r"fewer than two dimensions: stem\.bias, .*\(6 in all\)", text)


def test_ignore_nothing_prunes_everything_of_two_dimensions() -> None:
    model = convnet()
    problem = build_problem(model, sparsity=0.5, ignore=())
    assert names(problem) == [n for n, p in model.named_parameters() if p.ndim >= 2]
    assert all(t.sparsity == 0.5 and t.pattern == Unstructured() and not t.pooled for t in problem.targets)


def test_ignore_globs_replace_the_defaults() -> None:
    problem = build_problem(convnet(), sparsity=0.5, ignore=["body.*"])
    assert names(problem) == ["stem.weight", "head.weight"]
    assert problem.skipped["body.0.weight"] == "ignored"
    assert names(build_problem(convnet(), sparsity=0.5, ignore="stem")) == ["body.0.weight", "body.2.weight", "head.weight"]


def test_weights_are_live_and_detached() -> None:
    model = convnet()
    problem = build_problem(model, sparsity=0.5)
    problem.weights[0].fill_(3.0)
    assert bool((model["body"][0].weight == 3).all())
    assert not problem.weights[0].requires_grad


# ---------------------------------------------------------------------- patterns by glob


def test_first_matching_glob_decides() -> None:
    rules = {"body.2*": ("filter", 0.25), "body*": 0.75, "*": ("2:4 axis 0")}
    problem = build_problem(convnet(), patterns=rules, ignore=["stem", "head"])
    chosen = {t.name: (t.pattern, t.sparsity) for t in problem.targets}
    assert chosen == {"body.0.weight": (Unstructured(), 0.75), "body.2.weight": (Filter(), 0.25)}


def test_patterns_and_sparsities_mix_with_the_rate() -> None:
    rules = {"body.0.weight": NM(2, 4), "body.2.weight": "block:4x1"}
    problem = build_problem(convnet(), rate=10, patterns=rules, ignore=["stem"])
    chosen = {t.name: (t.pattern, t.sparsity) for t in problem.targets}
    assert chosen == {
        "body.0.weight": (NM(2, 4), 0.5),
        "body.2.weight": (Block(4, 1), 0.9),
        "head.weight": (Unstructured(), 0.9),
    }


def test_without_a_rate_only_what_patterns_name_is_pruned() -> None:
    problem = build_problem(convnet(), patterns={"body.2.weight": (Kernel(), 0.5)})
    assert names(problem) == ["body.2.weight"]
    assert problem.skipped["body.0.weight"] == "no pattern names it"
    assert names(build_problem(convnet(), patterns={"body.0.weight": "2:4"})) == ["body.0.weight"]


def test_a_pattern_reaches_a_layer_that_the_defaults_would_leave_alone() -> None:
    problem = build_problem(convnet(), sparsity=0.5, patterns={"head.weight": 0.3})
    assert {t.name: t.sparsity for t in problem.targets} == {"body.0.weight": 0.5, "body.2.weight": 0.5, "head.weight": 0.3}
    assert "head.weight" not in problem.skipped


@pytest.mark.parametrize("glob", ["*", "body*", "body.0", "body.1", "b*[0-2]*"])
def test_globs_never_catch_biases_and_norms(glob: str) -> None:
    problem = build_problem(convnet(), sparsity=0.5, patterns={glob: 0.75}, ignore=())
    assert all(t.weight.ndim >= 2 for t in problem.targets)


def test_the_exact_name_of_a_vector_prunes_it() -> None:
    problem = build_problem(convnet(), patterns={"head.bias": 0.3})
    assert names(problem) == ["head.bias"]
    assert "head.bias" not in problem.skipped
    assert int(problem.masks(problem.weights)[0].sum()) == 7


class Vision(nn.Module):
    """Everything that the defaults leave alone, around two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 4, 16))
        self.stem, self.fc1, self.fc2 = nn.Conv2d(3, 16, 4), nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.head = nn.LayerNorm([4, 16]), nn.Linear(16, 8)


SPARED = {"cls_token", "pos_embed", "norm.weight", "norm.bias", "stem.weight", "head.weight"}


@pytest.mark.parametrize("rules", [{"*": "filter"}, {"fc1": "filter", "*[!d]": 0.3, "*": 0.4}, {"?*": "2:4"}])
def test_a_wildcard_lifts_no_default_and_says_what_it_passed_by(rules: dict) -> None:
    problem = build_problem(Vision(), sparsity=0.5, patterns=rules)
    assert names(problem) == ["fc1.weight", "fc2.weight"]
    for name in SPARED:
        assert "a default that" in problem.skipped[name] and "does not lift" in problem.skipped[name]
    text = problem.describe()
    first = next(glob for glob in rules if glob != "fc1")
    assert f"left alone, last layer (a default that {first!r} does not lift, its exact name does): head.weight" in text
    assert all(name in text for name in SPARED)
    assert problem.skipped["fc1.bias"] == "fewer than two dimensions"


@pytest.mark.parametrize(
    ("rules", "pruned"),
    [
        ({"head": "filter"}, {"head.weight": Filter()}),
        ({"head.weight": "filter", "pos_embed": 0.3}, {"head.weight": Filter(), "pos_embed": Unstructured()}),
        ({"*": "filter", "head": "kernel", "head.weight": "2:4"}, None),
        ({"*": "filter", "head.weight": "2:4"}, {"fc1.weight": Filter(), "fc2.weight": Filter(), "head.weight": NM(2, 4)}),
        ({"norm": 0.5}, {"norm.weight": Unstructured(), "norm.bias": Unstructured()}),
    ],
    ids=str,
)
def test_an_exact_name_lifts_a_default_wherever_it_stands(rules: dict, pruned: dict | None) -> None:
    if pruned is None:
        with pytest.raises(DualpruneError, match=r"^head\.weight: kernel needs"):
            build_problem(Vision(), sparsity=0.5, patterns=rules)
        return
    problem = build_problem(Vision(), sparsity=0.5, patterns=rules)
    found = {t.name: t.pattern for t in problem.targets}
    assert found == {name: Unstructured() for name in ("fc1.weight", "fc2.weight")} | pruned


def test_without_defaults_a_wildcard_reaches_everything() -> None:
    assert {*names(build_problem(Vision(), sparsity=0.5, patterns={"*": 0.5}, ignore=()))} > SPARED
    problem = build_problem(Vision(), sparsity=0.5, patterns={"*": "filter"}, ignore=["head"])
    assert problem.skipped["head.weight"] == "ignored" and "stem.weight" in names(problem)


@pytest.mark.parametrize("glob", ["head*", "*embed", "norm.*", "[sh]*"])
def test_a_wildcard_that_only_matches_what_the_defaults_leave_alone_is_an_error(glob: str) -> None:
    said = rf"^patterns: {re.escape(repr(glob))} reaches nothing that is pruned: a default leaves alone .*layer.*"
    lift = r"Name exactly what is meant, such as '.*', or pass ignore=\(\)"
    for options in ({"sparsity": 0.5, "patterns": {"fc1": "filter", glob: 0.3}}, {"patterns": {glob: 0.3}}):
        with pytest.raises(DualpruneError, match=said + lift):
            build_problem(Vision(), **options)
    build_problem(Vision(), patterns={glob: 0.3}, ignore=())


def test_a_frozen_model_is_frozen_before_its_defaults_are_in_the_way() -> None:
    with pytest.raises(DualpruneError, match=r"nothing to prune: .*fc1\.weight, fc2\.weight.*: frozen .*exactly what is to be"):
        build_problem(Vision().requires_grad_(False), patterns={"*": 0.5})
    with pytest.raises(DualpruneError, match="Materialise the model first"):
        build_problem(Vision().to("meta"), patterns={"*": 0.5})


def weight_normed() -> nn.Module:
    old = nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it is the old one
        middle = [old(nn.Conv2d(4, 8, 3)), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))]
        return nn.Sequential(old(nn.Conv2d(3, 4, 3)), *middle, nn.Conv2d(8, 4, 3))


def test_the_gains_of_weight_norms_are_left_alone_as_norms() -> None:
    vectors = ["1.weight_v", "2.parametrizations.weight.original1"]
    gains = ["1.weight_g", "2.parametrizations.weight.original0"]
    for rules in (None, {"*": 0.25}, {"1": 0.25, "2.parametrizations.weight": 0.25}):
        problem = build_problem(weight_normed(), sparsity=0.5, patterns=rules)
        assert names(problem) == vectors
        assert all(problem.skipped[name].startswith("no layer's weight") for name in ["0.weight_g", *gains])
        assert problem.skipped["0.weight_v"].startswith("first layer")
    assert names(build_problem(weight_normed(), patterns={gains[0]: 0.5})) == gains[:1]
    assert {*vectors, *gains} < {*names(build_problem(weight_normed(), sparsity=0.5, ignore=()))}


def test_two_factors_are_no_weight_norm() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    model[1].weight_g, model[1].weight_v = nn.Parameter(torch.ones(6, 2)), nn.Parameter(torch.ones(2, 6))
    assert names(build_problem(model, sparsity=0.5)) == ["1.weight", "1.weight_g", "1.weight_v"]


# ---------------------------------------------------------------------- models of all sorts


def test_tied_weights_are_pruned_once_under_any_of_their_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "mid": nn.Linear(8, 8), "out": nn.Linear(8, 20)})
    model["out"].weight = model["embed"].weight
    problem = build_problem(model, sparsity=0.5, ignore=())
    assert names(problem) == ["embed.weight", "mid.weight"]
    assert problem.targets[0].aliases == ("out.weight",)
    assert "embed.weight is also out.weight (tied): pruned once" in problem.describe()
    by_alias = build_problem(model, patterns={"out.weight": 0.25})
    assert (names(by_alias), by_alias.targets[0].sparsity) == (["embed.weight"], 0.25)
    assert names(build_problem(model, sparsity=0.5, ignore=["out*"])) == ["mid.weight"]
    assert names(build_problem(model, sparsity=0.5)) == ["mid.weight"], "the tied pair is first layer and last layer"


def test_frozen_and_foreign_parameters_are_skipped() -> None:
    model = convnet()
    model["body"][0].weight.requires_grad_(False)
    problem = build_problem(model, sparsity=0.5, ignore=(), trainable=[model["head"].weight, model["body"][2].weight])
    assert names(problem) == ["body.2.weight", "head.weight"]
    assert "frozen" in problem.skipped["body.0.weight"]
    assert problem.skipped["stem.weight"] == "not in the optimizer"


def test_what_cannot_be_pruned_is_skipped_with_its_reason() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "lazy": nn.LazyLinear(3), "meta": nn.Linear(3, 3, device="meta")})
    model["a"].register_parameter("empty", nn.Parameter(torch.empty(0, 4)))
    model["a"].register_parameter("codes", nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False))
    model["a"].register_parameter("wave", nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)))
    problem = build_problem(model, sparsity=0.5, ignore=())
    assert names(problem) == ["a.weight"]
    assert problem.skipped["lazy.weight"] == problem.skipped["meta.weight"] == "not materialised (lazy or meta)"
    assert problem.skipped["a.empty"] == "empty"
    assert "complex64" in problem.skipped["a.wave"]
    assert "a.codes" in problem.skipped


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.MultiheadAttention(8, 2), {"in_proj_weight": (24, 8), "out_proj.weight": (8, 8)}),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
         {"q_proj_weight": (8, 8), "k_proj_weight": (8, 4), "v_proj_weight": (8, 6), "out_proj.weight": (8, 8)}),
        (nn.LSTM(4, 6, bidirectional=True),
         {"weight_ih_l0": (24, 4), "weight_hh_l0": (24, 6), "weight_ih_l0_reverse": (24, 4), "weight_hh_l0_reverse": (24, 6)}),
        (nn.ConvTranspose2d(6, 4, 3), {"weight": (6, 4, 3, 3)}),
        (nn.Conv2d(8, 8, 3, groups=8), {"weight": (8, 1, 3, 3)}),
        (nn.Conv2d(8, 12, 3, groups=4), {"weight": (12, 2, 3, 3)}),
        (nn.Conv1d(4, 6, 5), {"weight": (6, 4, 5)}),
        (nn.Conv3d(2, 4, 3), {"weight": (4, 2, 3, 3, 3)}),
        (nn.Bilinear(3, 4, 5), {"weight": (5, 3, 4)}),
    ],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_layers_of_all_sorts(model: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    problem = build_problem(model, sparsity=0.75, ignore=())
    assert {t.name: tuple(t.weight.shape) for t in problem.targets} == expected
    for w, mask in zip(problem.weights, problem.masks(problem.weights), strict=True):
        assert int(mask.sum()) == w.numel() - round(0.75 * w.numel())
    filters = build_problem(model, patterns={"*weight*": ("filter", 0.5)}, ignore=())
    for w, mask in zip(filters.weights, filters.masks(filters.weights), strict=True):
        assert int(mask.flatten(1).all(1).sum()) == w.shape[0] - round(0.5 * w.shape[0])


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("module.conv.weight", "conv.weight"),
        ("_orig_mod.conv.weight", "conv.weight"),
        ("module._orig_mod.conv.weight", "conv.weight"),
        ("_orig_mod.module.conv.weight", "conv.weight"),
        ("layer1._orig_mod.conv.weight", "layer1.conv.weight"),
        ("module.module.weight", "weight"),
        ("submodule.weight", "submodule.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("neck.module.weight", "neck.module.weight"),
        ("weight", "weight"),
    ],
)
def test_wrappers_prefixes_are_stripped(raw: str, name: str) -> None:
    assert parameter_name(raw) == name


def test_a_name_with_a_bracket_is_no_set_of_characters() -> None:
    net = nn.ModuleDict({"experts[0]": nn.Linear(4, 4), "experts[1]": nn.Linear(4, 4)})
    assert names(build_problem(net, patterns={"experts[0].weight": 0.5})) == ["experts[0].weight"]
    assert names(build_problem(net, sparsity=0.5, ignore=["experts[0]"])) == ["experts[1].weight"]


def test_wrapped_models_have_the_names_of_bare_ones() -> None:
    bare = build_problem(convnet(), sparsity=0.5, ignore=())
    for wrapped in (nn.DataParallel(convnet()), torch.compile(convnet()), nn.DataParallel(torch.compile(convnet()))):
        problem = build_problem(wrapped, sparsity=0.5, ignore=())
        assert names(problem) == names(bare)
        assert problem.skipped == bare.skipped


def test_a_submodule_called_module_is_not_confused_with_a_wrapper() -> None:
    model = nn.Module()
    model.fc, model.module = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})
    problem = build_problem(model, sparsity=0.5, ignore=())
    assert names(problem) == ["fc.weight", "module.fc.weight"]
    assert problem.targets[0].weight is model.fc.weight
    assert problem.targets[1].weight is model.module["fc"].weight


# ---------------------------------------------------------------------- budgets


def test_uniform_budget_counts() -> None:
    problem = build_problem(convnet(), rate=7, ignore=())
    for w, mask in zip(problem.weights, problem.masks(problem.weights), strict=True):
        assert int(mask.sum()) == w.numel() - round((1 - 1 / 7) * w.numel())
    halfway = problem.masks(problem.weights, lambda s: s / 2)
    assert all(int(m.sum()) == m.numel() - round((3 / 7) * m.numel()) for m in halfway)


def test_global_budget_is_selection_on_the_concatenation() -> None:
    problem = build_problem(convnet(), sparsity=0.8, ignore=(), budget="global")
    weights = problem.weights
    total = sum(w.numel() for w in weights)
    together = torch.cat([w.flatten() for w in weights])
    for scale in (1.0, 0.5, 0.0):
        masks = problem.masks(weights, lambda s, scale=scale: s * scale)
        kept = total - round(0.8 * scale * total)
        assert torch.equal(torch.cat([m.flatten() for m in masks]), keep_largest([together], kept)[0])
        assert sum(int(m.sum()) for m in masks) == kept
    shares = {round(float(m.float().mean()), 3) for m in problem.masks(weights)}
    assert len(shares) > 1, "layers keep different shares"


def test_global_budget_leaves_explicit_sparsities_and_n_of_m_alone() -> None:
    rules = {"stem.weight": 0.5, "body.0.weight": "2:4"}
    problem = build_problem(convnet(), sparsity=0.9, patterns=rules, ignore=(), budget="global")
    assert [t.pooled for t in problem.targets] == [False, False, True, True]
    masks = problem.masks(problem.weights)
    assert [int(m.sum()) for m in masks[:2]] == [108, 288]
    pooled = sum(m.numel() for m in masks[2:])
    assert sum(int(m.sum()) for m in masks[2:]) == pooled - round(0.9 * pooled)


@pytest.mark.parametrize("pattern", ["filter", "channel", "column", "kernel", "block:4x1"])
def test_global_structured_budget_keeps_every_layer_alive_and_spends_no_more(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)  # it would lose everything
    for sparsity in (0.5, 0.9, 1.0):
        problem = build_problem(model, sparsity=sparsity, patterns={"*": pattern}, ignore=(), budget="global")
        masks = problem.masks(problem.weights)
        assert all(bool(m.any()) for m in masks)
        units = [t.pattern.scores(m.float()) for t, m in zip(problem.targets, masks, strict=True)]
        assert all(set(u.unique().tolist()) <= {0, u.max().item()} for u in units), "units stand or fall as a whole"
        floor = sum(math.ceil(t.pattern.weights_per_unit(tuple(t.weight.shape))) for t in problem.targets)
        kept, total = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
        assert kept <= max(floor, (1 - sparsity) * total + 0.5)
        if sparsity == 0.5:
            largest_unit = max(t.weight.numel() // len(u) for t, u in zip(problem.targets, units, strict=True))
            assert kept > (1 - sparsity) * total - largest_unit, "nor much less"


def test_global_structured_budget_ranks_by_energy_per_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(100, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 3.0], [2.0, 2.0]]))
        model[1].weight.copy_(torch.tensor([[1.0], [0.9]]).expand(2, 100))
    problem = build_problem(model, sparsity=0.49, patterns={"*": "filter"}, ignore=(), budget="global")
    masks = problem.masks(problem.weights)
    assert [m[:, 0].tolist() for m in masks] == [[True, True], [True, False]]


def test_erk_spends_the_budget_to_rounding() -> None:
    problem = build_problem(convnet(), sparsity=0.8, ignore=(), budget="erk")
    masks = problem.masks(problem.weights)
    total = sum(m.numel() for m in masks)
    assert abs(sum(int(m.sum()) for m in masks) - 0.2 * total) <= len(masks) / 2 + 1e-9
    assert len({t.sparsity for t in problem.targets}) > 1
    assert not any(t.pooled for t in problem.targets)


def test_erk_leaves_a_sparsity_given_in_patterns_alone_even_when_it_equals_the_asked_one() -> None:
    problem = build_problem(
        convnet(), sparsity=0.8, patterns={"head.weight": 0.8, "body.0.weight": "2:4"}, ignore=(), budget="erk"
    )
    chosen = {t.name: t.sparsity for t in problem.targets}
    assert chosen["head.weight"] == 0.8
    assert chosen["body.0.weight"] == 0.5
    assert chosen["stem.weight"] != 0.8


def test_masks_of_mixed_patterns_have_the_shapes_of_the_weights() -> None:
    rules = {"stem": ("filter", 0.5), "body.0": "2:4", "body.2": ("block:4x1", 0.5)}
    problem = build_problem(convnet(), sparsity=0.5, patterns=rules, ignore=())
    for w, m, t in zip(problem.weights, problem.masks(problem.weights), problem.targets, strict=True):
        assert m.shape == w.shape
        assert t.pattern.contains(torch.where(m, w, 0), t.sparsity)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 90}, r"sparsity is a fraction in \[0, 1\], got 90; did you mean 0\.9\?"),
        ({"sparsity": -0.1}, r"got -0\.1"),
        ({"sparsity": math.nan}, r"got nan"),
        ({"sparsity": True}, r"got True"),
        ({"rate": 0.5}, r"rate is how many times fewer weights, at least 1"),
        ({"rate": 10, "sparsity": 0.9}, r"not both"),
        ({"rate": 10, "budget": "globel"}, r"did you mean 'global'"),
        ({}, r"nothing to prune: give rate=10, sparsity=0\.9 or patterns="),
        ({"rate": 10, "patterns": {"boddy.0.weight": 0.5}}, r"'boddy.0.weight' matches no .*did you mean 'body.0.weight'"),
        ({"rate": 10, "ignore": ["hed.weight"]}, r"ignore: 'hed\.weight' matches no parameter, did you mean 'head\.weight'"),
        ({"patterns": {"body.0.weight": 90}}, r"patterns\['body\.0\.weight'\] sparsity is a fraction .*did you mean 0\.9"),
        ({"patterns": {"body.0.weight": ("filter", math.nan)}}, r"patterns\['body\.0\.weight'\] sparsity .*got nan"),
        ({"patterns": {"body.0.weight": "filtr"}}, r"did you mean 'filter'"),
        ({"patterns": {"body.0.weight": {"pattern": "filter"}}}, r"patterns\['body\.0\.weight'\]"),
        ({"patterns": {"body.0.weight": "filter"}}, r"body\.0\.weight: pattern filter needs a sparsity; give rate="),
        ({"patterns": {"stem.weight": "2:4"}}, r"^stem\.weight: 2:4 needs axis 1 to be a multiple of 4, got shape \(8, 3"),
        ({"rate": 10, "patterns": {"head": "block:4x1"}}, r"^head\.weight: block:4x1 does not tile"),
        ({"rate": 10, "patterns": {"head": "kernel"}}, r"^head\.weight: kernel needs a weight of at least 3 dimensions"),
        ({"rate": 10, "ignore": ["*"]}, r"nothing to prune: every parameter is left alone \(.*Pass ignore=\(\)"),
    ],
)  # fmt: skip
def test_bad_input(settings: dict, message: str) -> None:
    with pytest.raises(DualpruneError, match=message):
        build_problem(convnet(), **settings)


def test_nothing_left_says_why() -> None:
    with pytest.raises(DualpruneError, match=r"weight: first layer\)\. Pass ignore=\(\) to prune first and last layers too"):
        build_problem(nn.Linear(4, 4, bias=False), rate=10)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(DualpruneError, match=r"weight: frozen"):
        build_problem(frozen, patterns={"weight": 0.5})
    with pytest.raises(DualpruneError, match="nothing to prune"):
        build_problem(nn.ReLU(), rate=10)
