from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dualprune
from dualprune import ACDC, SLR, DualpruneError, GradualMagnitude, Magnitude, RigL, attach, load_sparse
from dualprune.recipe import parse_recipe
from dualprune.solvers.base import Method
from dualprune.train import run
from helpers import TINY_RECIPE, tiny_net, train


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), 2e-3)


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


def test_a_killed_run_goes_on_with_the_same_bits() -> None:
    def started() -> tuple[nn.Module, Optimizer, object]:
        model = tiny_net()
        optimizer = adam(model)
        pruner = attach(model, optimizer, SLR(), rate=5, importance="second-moment", total_steps=40, every=4)
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
    with pytest.raises(DualpruneError, match="importance second-moment, this pruner has magnitude"):
        plain.load_state_dict(state)


@pytest.mark.parametrize("name", ["SGD", "Rprop", "Adamax", "ASGD"])
def test_an_optimizer_without_second_moments_is_refused(name: str) -> None:
    model = tiny_net()
    optimizer = getattr(torch.optim, name)(model.parameters(), 0.1)
    with pytest.raises(DualpruneError, match=f"Adam, AdamW or RMSprop keep, got {name}"):
        attach(model, optimizer, SLR(), rate=5, importance="second-moment", total_steps=9)


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


def test_one_that_only_looks_the_part_is_refused_at_the_first_step_that_leaves_a_state() -> None:
    model = tiny_net()
    optimizer = Sign(model.parameters())
    pruner = attach(model, optimizer, SLR(), rate=5, importance="second-moment", total_steps=99, every=20)
    optimizer.step()  # there are no gradients, and no state
    with pytest.raises(DualpruneError, match="got Sign"):
        train(model, optimizer, range(1), pruner)
    pruner.detach()
    with pytest.raises(DualpruneError, match="got Sign"):  # there is one now
        attach(model, optimizer, SLR(), rate=5, importance="second-moment", total_steps=99)


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
    assert ranked == [result["importance"] for result in results] == ["magnitude", "second-moment"]
    assert "second-moment" in (tmp_path / "tiny/slr-v-seed0/report.html").read_text()
    masks = [load_sparse(tmp_path / f"tiny/{label}-seed0/pruned.safetensors")["fc2.weight"] != 0 for label in ("slr", "slr-v")]
    assert masks[0].sum() == masks[1].sum() and not masks[0].equal(masks[1])


def test_the_importance_of_a_method_decides_its_fingerprint_alone() -> None:
    plain, ranked = parse_recipe(TINY_RECIPE), parse_recipe(TINY_RECIPE, ["methods.slr.importance=second-moment"])
    assert ranked.fingerprint("slr", 0, "test") != plain.fingerprint("slr", 0, "test")
    assert ranked.fingerprint("gradual", 0, "test") == plain.fingerprint("gradual", 0, "test")
    with pytest.raises(DualpruneError, match=r"\[methods.slr\] importance: .* did you mean 'second-moment'"):
        parse_recipe(TINY_RECIPE, ["methods.slr.importance=second-momentum"])
