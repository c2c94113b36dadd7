"""Going on from a pruned model: zeros that are there stay there, in every method, mask and file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dualprune import ADMM, SLR, DualpruneError, GradualMagnitude, Magnitude, Reweighted, attach
from dualprune.pruner import Pruner
from dualprune.recipe import parse_recipe
from dualprune.scope import build_problem
from helpers import TINY_RECIPE, same_bits, sgd, snapshot, tiny_net, train

METHODS = [SLR(), SLR.paper(), ADMM(hold=0.2), Reweighted(), GradualMagnitude(), Magnitude()]
STEPS = 24


def pruned_net(sparsity: float = 0.5, pattern: str = "unstructured", seed: int = 0) -> nn.Module:
    model = tiny_net(seed)
    pruner = attach(model, None, Magnitude(), patterns={"[36]": (pattern, sparsity)})
    pruner.finish()
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in model.named_parameters() if name in ("3.weight", "6.weight")}


def start(model: nn.Module, method: object, **options: object) -> tuple[torch.optim.Optimizer, Pruner]:
    optimizer = sgd(model)
    options = {"rate": 5, "patterns": {"[36]": "unstructured"}, "ignore": ["0", "10"], "every": 3,
               "total_steps": STEPS, "keep_zeros": True} | options  # fmt: skip
    return optimizer, attach(model, optimizer, method, **options)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: repr(m)[:30])
@pytest.mark.parametrize("pattern", ["unstructured", "filter", "pattern:4"])
def test_zeros_stay_from_the_first_step_to_the_last_and_count_towards_the_rate(method: object, pattern: str) -> None:
    model = pruned_net(0.5, "unstructured" if pattern == "unstructured" else "filter")
    there = zeros(model)
    optimizer, pruner = start(model, method, patterns={"[36]": pattern})

    def stay(step: int) -> None:
        for name, zero in there.items():
            assert not model.get_parameter(name).detach()[zero].any(), (step, name)
            assert not pruner.masks[name][zero].any()
        for kind in ("Z", "lam"):
            for tensor, zero in zip(pruner.solver.tensors.get(kind, ()), there.values(), strict=False):
                assert not tensor[zero].any()

    train(model, optimizer, range(STEPS), pruner, after_step=stay)
    with pruner.evaluate():
        stay(-1)
    pruner.finish()
    stay(STEPS)
    for name in there:
        w = model.get_parameter(name)
        tolerance = 0.5 if pattern == "unstructured" else w[0].numel() / 2 if pattern == "filter" else 2.5
        assert abs(int(torch.count_nonzero(w)) - w.numel() / 5) <= tolerance, "a fifth of the dense size"
    train(model, optimizer, range(STEPS, STEPS + 2), pruner, after_step=stay)


def test_without_it_zeros_come_back() -> None:
    model = pruned_net()
    there = zeros(model)
    optimizer, pruner = start(model, SLR(), keep_zeros=False)
    train(model, optimizer, range(2), pruner)
    assert any(model.get_parameter(name).detach()[zero].any() for name, zero in there.items())


def test_a_model_without_zeros_is_pruned_as_ever() -> None:
    runs = []
    for keep in (False, True):
        model = tiny_net()
        optimizer, pruner = start(model, SLR(), keep_zeros=keep)
        train(model, optimizer, range(STEPS), pruner)
        pruner.finish()
        runs.append(snapshot(model))
    assert same_bits(*runs)


@pytest.mark.parametrize("method", METHODS[:1] + METHODS[2:], ids=lambda m: repr(m)[:30])
@pytest.mark.parametrize("stop", [2, 12, 23])
def test_a_resumed_run_keeps_the_zeros_it_began_with(method: object, stop: int) -> None:
    whole = pruned_net()
    optimizer, pruner = start(whole, method)
    states: dict[str, object] = {}

    def save(step: int) -> None:
        if step + 1 == stop:
            states.update(model=snapshot(whole), optimizer=optimizer.state_dict(), pruner=pruner.state_dict())
            states["optimizer"] = torch.utils._pytree.tree_map(
                lambda v: v.clone() if isinstance(v, Tensor) else v, states["optimizer"]
            )

    train(whole, optimizer, range(STEPS), pruner, after_step=save)
    pruner.finish()
    again = tiny_net(seed=7)  # as a new process would: no zeros yet
    optimizer, pruner = start(again, method)
    again.load_state_dict(states["model"])
    optimizer.load_state_dict(states["optimizer"])
    pruner.load_state_dict(states["pruner"])
    train(again, optimizer, range(stop, STEPS), pruner)
    pruner.finish()
    assert same_bits(snapshot(whole), snapshot(again))


@pytest.mark.parametrize("stop", [12, 23, STEPS])
def test_a_run_resumes_in_the_order_of_the_docs_where_masks_have_more_zeros_than_it_began_with(stop: int) -> None:
    """Build, load the model, attach, load the pruner: attach then sees frozen zeros and those of the masks together."""

    def begin(model: nn.Module) -> tuple[torch.optim.Optimizer, Pruner]:
        return start(model, SLR(), rate=2, patterns={"[36]": "filter"})

    whole = pruned_net(0.3)
    optimizer, pruner = begin(whole)
    train(whole, optimizer, range(stop), pruner)
    if stop == STEPS:
        pruner.finish()
    again = tiny_net(seed=7)
    again.load_state_dict(whole.state_dict())
    other, resumed = begin(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(pruner.state_dict())
    for model, stepper, one in ((whole, optimizer, pruner), (again, other, resumed)):
        train(model, stepper, range(stop, STEPS + 1), one)
        one.finish()
    assert same_bits(snapshot(whole), snapshot(again))


def test_a_state_with_zeros_fits_only_a_pruner_with_zeros() -> None:
    _, pruner = start(pruned_net(), SLR())
    _, other = start(pruned_net(), SLR(), keep_zeros=False)
    with pytest.raises(DualpruneError, match="made with keep_zeros True, this pruner has False: attach with the same"):
        other.load_state_dict(pruner.state_dict())
    with pytest.raises(DualpruneError, match="made with keep_zeros False, this pruner has True"):
        pruner.load_state_dict(other.state_dict())
    broken = {k: v for k, v in pruner.state_dict().items() if k != "frozen.3.weight"}
    with pytest.raises(DualpruneError, match=r"state frozen\.3\.weight: expected torch\.bool"):
        pruner.load_state_dict(broken)


def test_less_than_there_is_already_is_refused() -> None:
    model = pruned_net(0.9)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, pruner = start(model, SLR(), rate=4)
    with pytest.raises(DualpruneError, match=r"^3\.weight: 0\.8993 of the weights are zero .*sparsity 0\.7500 is asked"):
        train(model, optimizer, range(1), pruner)
    with pytest.raises(DualpruneError, match=r"^3\.weight: 0\.8993"):
        pruner.update()
    with pytest.raises(DualpruneError, match=r"^3\.weight: 0\.8993"):
        pruner.finish()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    pruner.detach()
    with pytest.raises(DualpruneError, match=r"3\.weight, 6\.weight: 0\.8999 of the weights are zero"):
        start(model, SLR(), rate=4, patterns=None, budget="global")[1].finish()
    with pytest.raises(DualpruneError, match=r"3\.weight: 0\.8993 .*sparsity 0\.5000 is asked"):
        start(model, SLR(), rate=None, patterns={"[36]": "2:4"}, ignore=())[1].finish()
    same = build_problem(model, sparsity=0.9, ignore=["0", "10"], keep_zeros=True)
    assert all(torch.equal(m, w != 0) for m, w in zip(same.masks(same.weights), same.weights, strict=True))


def test_a_global_budget_may_ask_less_of_one_layer() -> None:
    model = tiny_net()
    with torch.no_grad():
        model[3].weight.mul_(torch.rand_like(model[3].weight) > 0.9)
    problem = build_problem(model, sparsity=0.6, ignore=["0", "10"], keep_zeros=True, budget="global")
    masks = problem.masks(problem.weights)
    assert sum(int(m.sum()) for m in masks) == pytest.approx(0.4 * sum(m.numel() for m in masks), abs=1)
    assert "weights are zero already and stay zero" in problem.describe()


@pytest.mark.parametrize("pattern", ["filter", "channel", "column", "kernel", "block:2x2", "pattern:4", "unstructured"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.7, 0.8, 0.85, 0.95])
def test_a_global_budget_goes_on_from_its_own_cut(pattern: str, sparsity: float) -> None:
    torch.manual_seed(0)
    sizes = [(4, 8), (8, 8), (8, 24), (24, 16), (16, 40), (40, 4)]
    model = nn.Sequential(*(nn.Conv2d(i, o, 3) for i, o in sizes))
    options = {"patterns": {"*": pattern}, "budget": "global", "sparsity": sparsity, "ignore": ()}
    attach(model, None, Magnitude(), **options).finish()
    before = snapshot(model)
    pruner = attach(model, None, Magnitude(), keep_zeros=True, **options)
    pruner.finish()
    assert all(
        bool((after[old == 0] == 0).all()) for old, after in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_a_global_budget_still_refuses_one_unit_too_many() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 30))
    options = {"patterns": {"*": "filter"}, "budget": "global", "sparsity": 0.5, "ignore": (), "keep_zeros": True}
    with torch.no_grad():
        model[1].weight[:20] = 0  # 400 of 800; the largest unit is 20
    attach(model, None, Magnitude(), **options).finish()
    with torch.no_grad():
        model[1].weight[20] = 0
    attach(model, None, Magnitude(), **options).finish()
    with torch.no_grad():
        model[1].weight[21] = 0
    with pytest.raises(DualpruneError, match=r"^0\.weight, 1\.weight: 0\.5500 of the weights .* sparsity 0\.5000 is asked"):
        attach(model, None, Magnitude(), **options).finish()


def test_a_tied_unit_of_a_global_budget_is_all_that_goes_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    options = {"patterns": {"*": "filter"}, "budget": "global", "ignore": (), "ties": [[f"{i}.weight" for i in range(4)]]}
    attach(model, None, Magnitude(), sparsity=0.6, **options).finish()
    assert sum(int((w == 0).sum()) for w in (m.weight for m in model)) == 4 * 24, "4 of 6, for 2.4 may stay"
    attach(model, None, Magnitude(), sparsity=0.6, keep_zeros=True, **options).finish()


def test_an_odd_zero_more_is_forgiven() -> None:
    model = pruned_net(0.5, "filter")
    with torch.no_grad():
        model[6].weight[model[6].weight != 0] = model[6].weight[model[6].weight != 0].index_fill(0, torch.tensor([0]), 0.0)
    build_problem(model, patterns={"6": ("filter", 0.5)}, keep_zeros=True)


def test_the_recipe_has_the_key_and_old_fingerprints_stay() -> None:
    plain = parse_recipe(TINY_RECIPE)
    kept = parse_recipe(TINY_RECIPE, ["prune.keep_zeros=true"])
    tied = parse_recipe(TINY_RECIPE, ['prune.ties=[["a", "b"]]'])
    assert (plain.prune.keep_zeros, kept.prune.keep_zeros, tied.prune.ties) == (False, True, [["a", "b"]])
    prints = [r.fingerprint("slr", 0, "test") for r in (plain, kept, tied)]
    assert len(set(prints)) == 3
    assert parse_recipe(TINY_RECIPE, ["prune.keep_zeros=false"]).fingerprint("slr", 0, "test") == prints[0]
