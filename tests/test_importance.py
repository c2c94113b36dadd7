from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dualprune
from dualprune import (
    ACDC,
    ADMM,
    SLR,
    DualpruneError,
    GradualMagnitude,
    Magnitude,
    Reweighted,
    RigL,
    Unstructured,
    attach,
    load_sparse,
)  # fmt: skip
from dualprune.importance import MEMORY, SecondMoment
from dualprune.recipe import parse_recipe
from dualprune.solvers import base
from dualprune.solvers.base import Method, _cuts
from dualprune.solvers.vector import RankedCut
from dualprune.train import run
from helpers import TINY_RECIPE, tiny_net, train


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), 2e-3)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def kept_by_hand(model: nn.Module, optimizer: Optimizer, names: list[str], kept: int) -> dict[str, torch.Tensor]:
    weights = dict(model.named_parameters())
    scores = {n: (weights[n].detach() ** 2 * optimizer.state[weights[n]]["exp_avg_sq"]).double() for n in names}
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[kept - 1]
    return {n: s >= threshold for n, s in scores.items()}


def test_the_mask_keeps_the_largest_v_times_w_squared_over_all_layers() -> None:
    model = tiny_net()
    optimizer = adam(model)
    pruner = attach(
        model, optimizer, SLR(), sparsity=0.8, budget="global", ignore=(), importance="second-moment", total_steps=60, every=10
    )
    train(model, optimizer, range(25), pruner)
    masks = pruner.masks
    kept = sum(int(m.sum()) for m in masks.values())
    expected = kept_by_hand(model, optimizer, list(masks), kept)
    assert all(torch.equal(masks[n], expected[n]) for n in masks)
    plain = {n: p.detach().abs() for n, p in model.named_parameters() if n in masks}
    threshold = torch.cat([p.flatten() for p in plain.values()]).sort(descending=True).values[kept - 1]
    assert any(not torch.equal(masks[n], plain[n] >= threshold) for n in masks)  # magnitude would keep others


@pytest.mark.parametrize("pattern", ["filter", "2:4", ("block:4x4", 0.5)])
def test_groups_are_ranked_by_the_sum_of_v_times_w_squared(pattern: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = adam(model)
    rules = {"1.weight": pattern if isinstance(pattern, tuple) or pattern == "2:4" else (pattern, 0.5)}
    pruner = attach(model, optimizer, GradualMagnitude(), patterns=rules, importance="second-moment", total_steps=9, every=1)
    for step in range(3):
        model(torch.randn(16, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    pruner.problem.importance, moments = None, pruner.problem.importance
    weight = model[1].weight
    score = optimizer.state[weight]["exp_avg_sq"].sqrt() * weight.detach()
    by_hand = pruner.problem.targets[0].pattern.mask(score, 0.5)
    pruner.problem.importance = moments
    assert torch.equal(pruner.masks["1.weight"], by_hand)


def test_weights_on_their_support_keep_their_values() -> None:
    model = tiny_net()
    optimizer = adam(model)
    pruner = attach(model, optimizer, SLR(), rate=4, importance="second-moment", total_steps=40, every=5)
    train(model, optimizer, range(20), pruner)
    before = {t.name: t.weight.detach().clone() for t in pruner.problem.targets}
    masks = pruner.masks
    pruner.finish()
    for target in pruner.problem.targets:
        assert torch.equal(target.weight.detach(), before[target.name] * masks[target.name])
    assert sum(row["kept"] for row in pruner.layers) == sum(int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("method", [RigL(), ACDC(), GradualMagnitude()], ids=repr)
def test_the_rivals_rank_by_it_too(method: Method) -> None:
    masks = []
    for importance in ("magnitude", "second-moment"):
        model = tiny_net()
        optimizer = adam(model)
        pruner = attach(model, optimizer, method, rate=5, importance=importance, every=3, total_steps=30)
        train(model, optimizer, range(30), pruner)
        masks.append(torch.cat([m.flatten() for m in pruner.masks.values()]))
    assert not masks[0].equal(masks[1])


def test_magnitude_decides_before_the_first_step() -> None:
    twins = [tiny_net(), tiny_net()]
    masks = [
        attach(model, adam(model), Magnitude(), rate=3, importance=importance).masks
        for model, importance in zip(twins, ("magnitude", "second-moment"), strict=True)
    ]
    assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


@pytest.mark.parametrize(
    ("make", "importance"), [(adam, "second-moment"), (adam, "adaptive"), (sgd, "adaptive"), (sgd, "second-moment")]
)
def test_a_killed_run_goes_on_with_the_same_bits(make: Callable[[nn.Module], Optimizer], importance: str) -> None:
    def started() -> tuple[nn.Module, Optimizer, object]:
        model = tiny_net()
        optimizer = make(model)
        pruner = attach(model, optimizer, SLR(), rate=5, importance=importance, total_steps=40, every=4)
        return model, optimizer, pruner

    model, optimizer, pruner = started()
    train(model, optimizer, range(18), pruner)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), pruner.state_dict()])
    train(model, optimizer, range(18, 40), pruner)
    again, other, resumed = started()
    for thing, state in zip((again, other, resumed), saved, strict=True):
        thing.load_state_dict(state)
    train(again, other, range(18, 40), resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_state_of_another_importance_is_refused() -> None:
    first, second = tiny_net(), tiny_net()
    state = attach(first, adam(first), SLR(), rate=5, importance="second-moment", total_steps=9).state_dict()
    plain = attach(second, adam(second), SLR(), rate=5, total_steps=9)
    with pytest.raises(DualpruneError, match="importance second-moment, this pruner has adaptive"):
        plain.load_state_dict(state)


def by_hand(gradients: list[Tensor], memory: float = MEMORY) -> Tensor:
    mean = torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean = memory * mean + (1 - memory) * gradient.square()
    return mean


@pytest.mark.parametrize("name", ["SGD", "Rprop", "Adamax", "ASGD"])
@pytest.mark.parametrize("importance", ["adaptive", "second-moment"])
def test_for_an_optimizer_that_keeps_none_the_mean_of_squared_gradients_is_kept_here(name: str, importance: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    optimizer = getattr(torch.optim, name)(model.parameters(), 1e-3)
    pruner = attach(model, optimizer, GradualMagnitude(), rate=4, ignore=(), importance=importance, total_steps=99, every=50)
    gradients = []
    for step in range(12):
        model(torch.randn(16, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        gradients.append(model.weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
    mean = by_hand(gradients)
    assert torch.allclose(pruner.state_dict()["moment.weight"], mean)
    score = mean ** (0.25 if importance == "adaptive" else 0.5) * model.weight.detach().abs()
    assert torch.equal(pruner.masks["weight"], score >= score.flatten().sort(descending=True).values[11])
    assert not torch.equal(pruner.masks["weight"], Unstructured().mask(model.weight.detach(), 0.75))


@pytest.mark.parametrize("method", [SLR(), ADMM(), Reweighted()], ids=lambda m: type(m).__name__)
def test_what_is_kept_here_is_of_the_losss_gradient_alone(method: Method) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 8), torch.randn(16, 6)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    pruner = attach(model, optimizer, method, rate=4, ignore=(), importance="adaptive", total_steps=40, every=2)
    gradients = []
    for _ in range(9):
        loss = model(x).square().sum()
        loss.backward()
        gradients.append(model.weight.grad.clone())
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(pruner.state_dict()["moment.weight"], by_hand(gradients))


def test_a_weight_without_a_gradient_forgets_and_ranks_below_all_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    pruner = attach(
        model, optimizer, GradualMagnitude(), sparsity=0.75, ignore=(), budget="global", importance="adaptive",
        total_steps=99, every=50,
    )  # fmt: skip
    for _ in range(3):
        model[0](torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dead = model[1].weight.detach()
    kept = pruner.masks
    assert int(kept["0.weight"].sum()) == 8 and not kept["1.weight"].any()
    assert torch.equal(pruner.problem.ranked(pruner.problem.weights)[1].argsort(), dead.argsort())  # as by magnitude


def test_without_any_gradient_magnitude_decides() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = attach(model, optimizer, SLR(), rate=4, ignore=(), total_steps=99)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(pruner.masks["weight"], Unstructured().mask(model.weight.detach(), 0.75))


def test_a_fused_step_that_overflows_leaves_no_trace_but_its_own_weight() -> None:
    weight = nn.Parameter(torch.ones(3))
    moments = SecondMoment("adaptive", torch.optim.SGD([weight], 0.1), [weight])
    weight.grad = torch.tensor([8.0, 16.0, 0.0])
    moments.watch(torch.tensor(4.0))
    before = moments.means[0].clone()
    assert torch.allclose(before, (1 - MEMORY) * torch.tensor([4.0, 16.0, 0.0]))
    weight.grad = torch.tensor([torch.inf, torch.nan, -torch.inf])
    moments.watch(torch.tensor(4.0))
    assert torch.allclose(moments.means[0], MEMORY * before)


class Fragile(torch.optim.SGD):
    """Runs out of memory in its first step."""

    whole = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.whole:
            self.whole = True
            raise MemoryError
        super().step()


def test_a_step_that_is_tried_again_counts_once() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 8)
    optimizer = Fragile(model.parameters(), 0.1)
    pruner = attach(model, optimizer, GradualMagnitude(), rate=4, ignore=(), importance="adaptive", total_steps=99, every=50)
    model(torch.randn(4, 6)).square().sum().backward()
    gradient = model.weight.grad.clone()
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # without gradients: nothing to count
    assert torch.allclose(pruner.state_dict()["moment.weight"], by_hand([gradient]))


def test_sparse_gradients_count_like_dense_ones() -> None:
    table = nn.Embedding(8, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    pruner = attach(table, optimizer, GradualMagnitude(), rate=2, ignore=(), importance="adaptive", total_steps=99, every=50)
    table(torch.tensor([1, 1, 5])).sum().backward()
    dense = table.weight.grad.to_dense()
    optimizer.step()
    assert torch.allclose(pruner.state_dict()["moment.weight"], (1 - MEMORY) * dense.square())


@pytest.mark.parametrize(("state_dtype", "kept"), [(None, torch.float32), (torch.float16, torch.bfloat16)])
def test_the_means_are_as_narrow_as_the_rest_of_the_state_but_never_lose_range(state_dtype: Any, kept: torch.dtype) -> None:
    model = tiny_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = attach(model, optimizer, SLR(), rate=5, total_steps=40, every=4, state_dtype=state_dtype)
    train(model, optimizer, range(12), pruner)
    means = [t for key, t in pruner.state_dict().items() if key.startswith("moment.")]
    assert len(means) == len(pruner.problem.targets) and {m.dtype for m in means} == {kept}


def test_the_means_are_let_go_once_the_masks_are_fixed() -> None:
    model = tiny_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = attach(model, optimizer, SLR(), rate=5, total_steps=40, every=4)
    train(model, optimizer, range(20), pruner)
    assert any(key.startswith("moment.") for key in pruner.state_dict())
    train(model, optimizer, range(20, 36), pruner)
    assert pruner.holding and not any(key.startswith("moment.") for key in pruner.state_dict())


@pytest.mark.parametrize(
    ("method", "importance"),
    [(SLR(), "adaptive"), (SLR(rho=0.1), "magnitude"), (SLR.paper(), "magnitude"), (ADMM(), "magnitude"),
     (Reweighted(), "magnitude"), (GradualMagnitude(), "magnitude")],
)  # fmt: skip
def test_what_a_method_ranks_by_when_nobody_says(method: Method, importance: str) -> None:
    model = tiny_net()
    pruner = attach(model, torch.optim.SGD(model.parameters(), 0.1), method, rate=5, total_steps=40)
    meta = json.loads(bytes(pruner.state_dict()["meta"].numpy()).decode())
    assert meta["importance"] == method.importance == importance


def test_a_new_optimizer_takes_over_the_means() -> None:
    model = tiny_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = attach(model, optimizer, SLR(), rate=5, total_steps=60, every=4)
    train(model, optimizer, range(12), pruner)
    before = {k: v.clone() for k, v in pruner.state_dict().items() if k.startswith("moment.")}
    other = torch.optim.SGD(model.parameters(), 0.02)
    pruner.follow(other)
    after = pruner.state_dict()
    assert before and all(torch.equal(after[key], mean) for key, mean in before.items())
    train(model, other, range(12, 24), pruner)
    pruner.follow(torch.optim.AdamW(model.parameters(), 1e-3))
    train(model, pruner.optimizer, range(24, 28), pruner)
    assert not any(key.startswith("moment.") for key in pruner.state_dict())  # AdamW has its own


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop"])
def test_those_that_keep_them_are_taken(name: str) -> None:
    model = tiny_net()
    optimizer = getattr(torch.optim, name)(model.parameters(), 1e-3)
    pruner = attach(model, optimizer, SLR(), rate=5, importance="second-moment", total_steps=9, every=2)
    train(model, optimizer, range(4), pruner)
    assert len(pruner.history) == 2


class Sign(Optimizer):
    """Has betas and keeps a first moment only, as Lion does."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 1e-4, "betas": (0.9, 0.99)})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p)) if p.grad is not None else None
            if moment is not None:
                p.detach().sub_(moment.lerp_(p.grad, 0.1).sign_(), alpha=1e-4)


def test_one_that_only_looks_the_part_has_its_mean_kept_here() -> None:
    model = tiny_net()
    optimizer = Sign(model.parameters())
    pruner = attach(model, optimizer, SLR(), rate=5, importance="second-moment", total_steps=99, every=20)
    train(model, optimizer, range(3), pruner)
    assert all(f"moment.{t.name}" in pruner.state_dict() for t in pruner.problem.targets)


class Stranger(Sign):
    """Keeps squared gradients under Adam's name, from its first step on, without being an Adam."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg_sq"] = p.grad.square()


def test_means_that_a_stranger_keeps_are_read_where_they_lie() -> None:
    model = tiny_net()
    optimizer = Stranger(model.parameters())
    pruner = attach(model, optimizer, SLR(), rate=5, total_steps=99, every=4)
    train(model, optimizer, range(12), pruner)
    assert not any(key.startswith("moment.") for key in pruner.state_dict())
    theirs = [optimizer.state[t.weight]["exp_avg_sq"] for t in pruner.problem.targets]
    assert all(mine is other for mine, other in zip(pruner.problem.importance.moments, theirs, strict=True))


def test_an_attach_that_failed_stops_no_step() -> None:
    model = tiny_net()
    optimizer = Sign(model.parameters())
    with pytest.raises(DualpruneError, match="matches no parameter"):
        attach(model, optimizer, SLR(), rate=5, patterns={"nowhere": 0.5}, importance="second-moment", total_steps=99)
    gc.collect()
    train(model, optimizer, range(2))


@pytest.mark.parametrize("method", [Magnitude(), SLR()])
def test_an_unknown_importance_is_refused_with_a_suggestion(method: Method) -> None:
    model = tiny_net()
    with pytest.raises(DualpruneError, match="did you mean 'second-moment'"):
        attach(model, adam(model), method, rate=5, importance="second-momentum", total_steps=9)


def test_no_optimizer_has_no_second_moments() -> None:
    with pytest.raises(DualpruneError, match="got no optimizer"):
        attach(tiny_net(), None, Magnitude(), rate=5, importance="second-moment")


def test_a_recipe_may_give_one_method_its_own_importance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[str] = []

    def watched(*args: Any, **options: Any) -> Any:
        ranked.append(options["importance"])
        return attach(*args, **options)

    monkeypatch.setattr(dualprune, "attach", watched)
    table = '[methods.slr-v]\nkind = "slr"\nupdates_per_epoch = 2\nimportance = "second-moment"\n'
    recipe = parse_recipe(TINY_RECIPE.replace("lr = 0.05", 'lr = 0.005\noptimizer = "adam"') + table)
    results = [run(recipe, label, out=tmp_path) for label in ("slr", "slr-v")]
    assert ranked == [result["importance"] for result in results] == ["adaptive", "second-moment"]
    assert "second-moment" in (tmp_path / "tiny/slr-v-seed0/report.html").read_text()
    masks = [load_sparse(tmp_path / f"tiny/{label}-seed0/pruned.safetensors")["fc2.weight"] != 0 for label in ("slr", "slr-v")]
    assert masks[0].sum() == masks[1].sum() and not masks[0].equal(masks[1])


def test_the_importance_of_a_method_decides_its_fingerprint_alone() -> None:
    plain, ranked = parse_recipe(TINY_RECIPE), parse_recipe(TINY_RECIPE, ["methods.slr.importance=second-moment"])
    assert ranked.fingerprint("slr", 0, "test") != plain.fingerprint("slr", 0, "test")
    assert ranked.fingerprint("gradual", 0, "test") == plain.fingerprint("gradual", 0, "test")
    with pytest.raises(DualpruneError, match=r"\[methods.slr\] importance: .* did you mean 'second-moment'"):
        parse_recipe(TINY_RECIPE, ["methods.slr.importance=second-momentum"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("make", "layout"), [(sgd, torch.channels_last), (adam, torch.contiguous_format)])
def test_thresholds_keep_what_masks_keep(
    dtype: torch.dtype, make: Callable[[nn.Module], Optimizer], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, cuts = [], []

    def counted(*args: Any) -> Any:
        cuts.append(_cuts(*args))
        return cuts[-1]

    for find in (counted, lambda *_: None):  # thresholds where they suffice, and masks always
        monkeypatch.setattr(base, "_cuts", find)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 600), nn.ReLU(), nn.Linear(600, 10))
        model = model.to(dtype).to(memory_format=layout)
        optimizer = make(model)
        pruner = attach(model, optimizer, SLR(), rate=8, ignore=(), budget="global", total_steps=12, every=3)
        for step in range(9):
            g = torch.Generator().manual_seed(step)
            model(torch.randn(4, 3, 6, 6, generator=g).to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        copies.append(pruner.solver.tensors["Z"])
    assert sum(cut is not None and isinstance(cut[0], RankedCut) for cut in cuts) == 3
    assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True))
