"""Units that parameters share: ranked by their summed energies, kept or dropped everywhere, found in a network's graph."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualprune import ADMM, SLR, Channel, DualpruneError, Filter, GradualMagnitude, Magnitude, Reweighted, attach, tied_filters
from dualprune.scope import build_problem


class Residual(nn.Module):
    """A stem, two residual blocks on it, a depthwise convolution and a head; filters of the stream are tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.wide, self.depth = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, groups=12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu(x + self.b2(F.relu(self.b1(x))))
        return self.head(F.relu(self.depth(F.relu(self.wide(x)))).mean((2, 3)))


STREAM = ["stem.weight", "a2.weight", "b2.weight"]
DEPTH = ["wide.weight", "depth.weight"]
FILTERS: dict[str, Any] = {"head": 0.5, "*": "filter"}


def filters_of(mask: Tensor) -> list[bool]:
    rows = mask.flatten(1)
    assert torch.equal(rows.any(1), rows.all(1)), "whole filters"
    return rows.all(1).tolist()


def masks_of(problem: Any, scale: float = 1.0) -> dict[str, Tensor]:
    return {t.name: m for t, m in zip(problem.targets, problem.masks(problem.weights, lambda s: s * scale), strict=True)}


# ---------------------------------------------------------------------- one mask for all


def test_the_shared_mask_keeps_the_largest_summed_energies() -> None:
    model = Residual()
    problem = build_problem(model, sparsity=0.5, patterns=FILTERS, ignore=(), ties=[STREAM, DEPTH])
    for scale, kept in ((1.0, 4), (0.5, 6), (0.0, 8)):
        masks = masks_of(problem, scale)
        energy = sum(model.get_parameter(name).detach().double().square().flatten(1).sum(1) for name in STREAM)
        strongest = set(energy.argsort(descending=True)[:kept].tolist())
        for name in STREAM:
            assert filters_of(masks[name]) == [i in strongest for i in range(8)]
    masks = masks_of(problem)
    assert filters_of(masks["wide.weight"]) == filters_of(masks["depth.weight"])
    assert sum(filters_of(masks["a1.weight"])) == 3


def test_the_shared_mask_is_the_projection_of_all_members_together() -> None:
    model = Residual()
    problem = build_problem(model, sparsity=0.5, patterns=FILTERS, ignore=(), ties=[STREAM])
    stacked = torch.cat([model.get_parameter(name).detach().flatten(1) for name in STREAM], 1)
    assert filters_of(masks_of(problem)["a2.weight"]) == filters_of(Filter().mask(stacked, 0.5))


def test_members_may_have_different_patterns() -> None:
    """A filter of one layer with the channel it feeds, as a transposed convolution or the next layer has them."""
    model = Residual()
    rules = {"a1": "filter", "a2": "channel"}
    problem = build_problem(model, sparsity=0.5, patterns=rules | FILTERS, ignore=(), ties=[["a1.weight", "a2.weight"]])
    masks = masks_of(problem)
    kept = filters_of(masks["a1.weight"])
    assert kept == filters_of(masks["a2.weight"].transpose(0, 1))
    energy = (model.a1.weight.detach() ** 2).flatten(1).sum(1) + (model.a2.weight.detach() ** 2).sum((0, 2, 3))
    assert kept == [i in energy.argsort(descending=True)[:3].tolist() for i in range(6)]


@pytest.mark.parametrize("rules", [FILTERS, {"a1": Filter(), "a2": Channel()} | FILTERS])
def test_a_global_budget_ranks_a_tie_as_one_unit(rules: dict[str, Any]) -> None:
    model = Residual()
    ties = [STREAM if rules is FILTERS else ["a1.weight", "a2.weight"]]
    problem = build_problem(model, sparsity=0.5, patterns=rules, ignore=(), ties=ties, budget="global")
    with torch.no_grad():
        model.get_parameter(ties[0][0])[1] *= 100  # one strong member keeps the unit everywhere
    masks = masks_of(problem)
    first, *others = (
        m if t != "a2.weight" or rules is FILTERS else m.transpose(0, 1) for t, m in masks.items() if t in ties[0]
    )
    assert all(filters_of(first) == filters_of(m) for m in others)
    assert filters_of(first)[1]
    pooled = [masks[t.name] for t in problem.targets if t.pooled]
    assert sum(int(m.sum()) for m in pooled) == pytest.approx(0.5 * sum(m.numel() for m in pooled), rel=0.2)


@pytest.mark.parametrize(
    "method", [SLR(), ADMM(), Reweighted(), GradualMagnitude(), Magnitude()], ids=lambda m: type(m).__name__
)
def test_every_method_ends_tied(method: Any) -> None:
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    pruner = attach(model, optimizer, method, sparsity=0.5, patterns=FILTERS, ignore=(), every=2, total_steps=16,
                    ties=[STREAM, DEPTH])  # fmt: skip
    for step in range(16):
        torch.manual_seed(step)
        x = torch.randn(8, 1, 6, 6)
        loss = F.cross_entropy(model(x), torch.randint(3, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pruner.finish()
    for tie, kept in ((STREAM, 4), (DEPTH, 6)):
        alive = [(model.get_parameter(name) != 0).flatten(1).any(1).tolist() for name in tie]
        assert alive.count(alive[0]) == len(tie)
        assert sum(alive[0]) == kept
    assert "tied, with one mask over their units: stem.weight, a2.weight, b2.weight" in pruner.summary()


def test_a_state_fits_only_the_same_ties() -> None:
    def oneshot(**ties: Any) -> Any:
        return attach(Residual(), None, Magnitude(), sparsity=0.5, patterns=FILTERS, ignore=(), **ties)

    tied, free = oneshot(ties=[DEPTH]), oneshot()
    tied.load_state_dict(oneshot(ties=[DEPTH]).state_dict())
    with pytest.raises(DualpruneError, match=r"made with ties \[\['wide\.weight', 'depth\.weight'\]\], this pruner has \[\]"):
        free.load_state_dict(tied.state_dict())


@pytest.mark.parametrize(
    ("ties", "rules", "options", "message"),
    [
        ([["a1.weight", "a2.weight"]], {}, {}, r"^tie \[a1\.weight, a2\.weight\]: .*number of units, but a1\.weight has 6"),
        ([["stem.weight", "a2.wieght"]], {}, {}, r"ties: 'a2\.wieght' is no parameter, did you mean 'a2\.weight'"),
        ([["stem.weight"]], {}, {}, r"tie \[stem\.weight\]: a tie has two parameters or more"),
        ([["stem.weight", "stem.weight"]], {}, {}, r"two parameters or more"),
        (["stem.weight", "a2.weight"], {}, {}, r"ties is a list of lists of parameter names, got 'stem\.weight' in it"),
        ([STREAM, ["a2.weight", "b1.weight"]], {}, {}, r"a2\.weight is in another tie too; write one tie"),
        ([STREAM], {"a2": ("filter", 0.75)}, {}, r"one sparsity, but asked are stem\.weight 0\.5, a2\.weight 0\.75"),
        ([STREAM], {}, {"budget": "erk"}, r"one mask has one sparsity, .*budget 'uniform' or 'global'"),
        ([STREAM], {"a2": "unstructured"}, {}, r"a2\.weight is pruned by unstructured, which has no units to share"),
        ([STREAM], {"a2": "1:2"}, {}, r"pruned by 1:2, which has no units"),
        ([STREAM], {"a2": "pattern:4"}, {}, r"pruned by pattern:4x8, which has no units"),
        ([STREAM], {}, {"ignore": ["stem"]}, r"ties: stem\.weight is not pruned \(ignored\), so what is tied to it cannot go"),
    ],
)  # fmt: skip
def test_ties_that_cannot_be_kept(ties: Any, rules: dict[str, Any], options: dict[str, Any], message: str) -> None:
    options = {"ignore": ()} | options
    with pytest.raises(DualpruneError, match=message):
        build_problem(Residual(), sparsity=0.5, patterns=rules | FILTERS, ties=ties, **options)


def test_ties_and_zeros_that_stay() -> None:
    model = Residual()
    with torch.no_grad():
        model.a2.weight[:2] = 0
    problem = build_problem(model, sparsity=0.5, patterns=FILTERS, ignore=(), ties=[STREAM], keep_zeros=True)
    masks = masks_of(problem, 0.0)
    assert filters_of(masks["a2.weight"]) == [False, False] + [True] * 6
    assert filters_of(masks["stem.weight"]) == [True] * 8, "a zero of one member does not pull the others down by itself"


# ---------------------------------------------------------------------- found in the graph


def test_residual_sums_and_depthwise_convolutions_are_found() -> None:
    pytest.importorskip("torch_pruning")
    model = Residual().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert tied_filters(model, torch.randn(1, 1, 6, 6)) == [STREAM, DEPTH]
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert tied_filters(model, (torch.randn(1, 1, 6, 6),), ignore=["stem"]) == [DEPTH]
    assert tied_filters(model.requires_grad_(False), {"x": torch.randn(1, 1, 6, 6)}, ignore="st*") == [DEPTH]
    with torch.no_grad():
        assert len(tied_filters(nn.DataParallel(Residual()).module, torch.randn(1, 1, 6, 6))) == 2


def test_what_is_found_leaves_nothing_but_empty_channels() -> None:
    """The claim behind ties: with them, a dropped unit of the stream is zero wherever it is read."""
    pytest.importorskip("torch_pruning")
    model = Residual()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    example = torch.randn(2, 1, 6, 6)
    pruner = attach(model, None, Magnitude(), sparsity=0.5, patterns=FILTERS, ignore=(), ties=tied_filters(model, example))
    pruner.finish()
    seen: dict[str, Tensor] = {}
    for name in ("b1", "wide", "depth"):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    model(example)
    for name, tie in (("b1", STREAM), ("wide", STREAM), ("depth", DEPTH)):
        dropped = ~(model.get_parameter(tie[0]) != 0).flatten(1).any(1)
        assert dropped.sum() == len(dropped) / 2
        assert not seen[name][:, dropped].any()


class Padded(nn.Module):
    """The shortcut of the small ResNets: four channels, padded to eight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.pad(x, (0, 0, 0, 0, 2, 2)) + self.body(x))


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.depth = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(10, 10, 1, groups=10)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(torch.cat([self.a(x), self.b(x)], 1)))


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.head = nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.up(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Padded(), r"not one to one \(slices.*padded shortcuts\): .*stem\.weight \(4\)"),
        (Joined(), r"not one to one .*depth\.weight \(10\)"),
        (
            Turned(),
            r"not one to one \(a transposed convolution keeps its filters in dim 1\): a\.weight \(4\), up\.weight \(4\)",
        ),
    ],
    ids=["padded", "joined", "turned"],
)
def test_ties_that_are_not_one_to_one_are_named(model: nn.Module, message: str) -> None:
    pytest.importorskip("torch_pruning")
    with pytest.raises(DualpruneError, match=message):
        tied_filters(model, torch.randn(1, 1, 4, 4))
    assert tied_filters(model, torch.randn(1, 1, 4, 4), ignore=["*"]) == []


class Shared(nn.Module):
    """Two layers of one weight: multiplied, or each added to another layer."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.d, self.e = (nn.Conv2d(1, 8, 1) for _ in range(4))
        self.b.weight = self.a.weight
        self.head, self.other, self.product = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1), product

    def forward(self, x: Tensor) -> Tensor:
        if self.product:
            return self.head(self.a(x) * self.b(x))
        return self.head(self.a(x) + self.d(x)) * 2 + self.other(self.b(x) + self.e(x)).tanh()


def test_layers_that_share_a_weight_are_one_member_of_a_tie() -> None:
    pytest.importorskip("torch_pruning")
    example = torch.randn(1, 1, 4, 4)
    product, sums = Shared(product=True), Shared(product=False)
    assert tied_filters(product, example) == []
    attach(product, None, Magnitude(), sparsity=0.5, patterns={"a": "filter"}, ties=tied_filters(product, example)).finish()
    stream = ["a.weight", "d.weight", "e.weight"]
    ties = tied_filters(sums, example)
    assert ties == [stream, ["head.weight", "other.weight"]]
    assert tied_filters(sums, example, ignore=["e"]) == ties[1:]
    attach(sums, None, Magnitude(), sparsity=0.5, patterns={"*": "filter"}, ignore=(), ties=ties).finish()
    kept = [filters_of(sums.get_parameter(name) != 0) for name in stream]
    assert kept[0] == kept[1] == kept[2] and sum(kept[0]) == 4


def test_computed_weights_are_told_apart() -> None:
    """A parametrized weight is a new tensor at each look, which another may get the place of."""
    pytest.importorskip("torch_pruning")
    model = Residual()
    for name in ("a2", "b2", "wide"):
        nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    assert tied_filters(model, torch.randn(1, 1, 6, 6)) == [STREAM, DEPTH]


def test_what_cannot_be_traced_is_said() -> None:
    pytest.importorskip("torch_pruning")
    with pytest.raises(DualpruneError, match=r"could not trace the model on this example \(RuntimeError: .*1 channels"):
        tied_filters(Residual(), torch.randn(1, 3, 6, 6))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(DualpruneError, match=r'pip install "dualprune\[shrink\]"'):
        tied_filters(Residual(), torch.randn(1, 1, 6, 6))
