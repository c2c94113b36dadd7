"""Attachment by hooks: the penalty's gradient to the last bit, nothing else touched, and every misuse refused in words."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import subprocess
import sys
import tracemalloc
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import TorchDispatchMode

import dualprune
import helpers
from dualprune import (
    ADMM,
    NM,
    SLR,
    Block,
    Channel,
    Column,
    DualpruneError,
    Filter,
    GradualMagnitude,
    Kernel,
    Magnitude,
    NonFiniteError,
    Unstructured,
    attach,
)
from dualprune.schedules import slr_alpha
from helpers import METHODS, batch, same_bits, sgd, snapshot, tiny_net, train

PATTERNS = [Unstructured(), NM(2, 4), Block(4, 2), Filter(), Channel(), Column(), Kernel()]


class Tokens(nn.Module):
    """What a vision transformer has beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.patch, self.norm = nn.Linear(12, 8), nn.LayerNorm((5, 8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.w1, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 3)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def test_by_default_only_layers_weights_are_pruned_and_the_rest_is_said() -> None:
    problem = dualprune.scope.build_problem(Tokens(), rate=4)
    assert [t.name for t in problem.targets] == ["patch.weight", "head.weight"]
    assert problem.skipped["w1"] == "first layer"
    assert problem.skipped["scaled.parametrizations.weight.original1"] == "last layer"
    beside = ["cls_token", "pos_embed", "relative_position_bias_table", "norm.weight", "norm.bias"]
    beside += ["scaled.parametrizations.weight.original0"]
    assert {name for name, reason in problem.skipped.items() if reason == "no layer's weight"} == set(beside)
    assert "no layer's weight: " in problem.describe()
    named = dualprune.scope.build_problem(Tokens(), rate=4, patterns={"pos_embed": 0.5})
    assert "pos_embed" in [t.name for t in named.targets]
    everything = dualprune.scope.build_problem(Tokens(), rate=4, ignore=())
    assert {*beside, "patch.weight", "w1", "head.weight"} <= {t.name for t in everything.targets}


def test_a_state_of_another_budget_is_refused() -> None:
    pruners = []
    for budget in ("global", "uniform"):
        model = tiny_net()
        pruners.append(attach(model, sgd(model), SLR(), rate=4, total_steps=20, budget=budget))
    with pytest.raises(DualpruneError, match=r"made with pooled \['3.weight', '6.weight'\], this pruner has \[\]"):
        pruners[1].load_state_dict(pruners[0].state_dict())


@pytest.mark.parametrize(("method", "every"), [(SLR(), 80), (SLR(), 100), (GradualMagnitude(), 101)])
def test_a_period_that_leaves_no_update_is_refused(method: object, every: int) -> None:
    model = tiny_net()
    with pytest.raises(DualpruneError, match=f"every={every} leaves no update in the"):
        attach(model, sgd(model), method, rate=4, total_steps=100, every=every)
    for short, name in (
        ({"method": SLR(ramp=0, hold=1.0), "total_steps": 10}, r"^SLR\(hold=1\) fixes the masks from the first step on"),
        ({"method": SLR(), "total_steps": 1}, r"^total_steps=1 leaves no update before SLR\(hold=0.2\) .* at least 2 steps"),
        ({"method": SLR(ramp=0, hold=0.9), "total_steps": 10}, r"^total_steps=10 leaves no update .* at least 11 steps"),
    ):
        with pytest.raises(DualpruneError, match=name):
            attach(model, sgd(model), rate=4, **short)
    attach(model, sgd(model), SLR(), rate=4, total_steps=2).detach()
    attach(model, sgd(model), SLR(ramp=0, hold=0.9), rate=4, total_steps=11).detach()
    pruner = attach(model, optimizer := sgd(model), SLR(), rate=4, total_steps=100, every=79)
    train(model, optimizer, range(80), pruner)
    assert len(pruner.history) == 1


def test_following_an_optimizer_that_maximises_is_refused() -> None:
    model = tiny_net()
    pruner = attach(model, sgd(model), SLR(), rate=4, total_steps=20)
    with pytest.raises(DualpruneError, match="maximize=True would climb the penalty"):
        pruner.follow(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


def test_evaluating_weights_that_are_not_finite_is_refused() -> None:
    model = tiny_net()
    pruner = attach(model, sgd(model), SLR(), rate=4, total_steps=20)
    with torch.no_grad():
        model[3].weight.view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"3\.weight has NaN"), pruner.evaluate():
        pass


def test_weights_of_two_dtypes_share_no_threshold_and_that_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    described = dualprune.scope.build_problem(model, rate=4, ignore=(), budget="global").describe()
    assert "no threshold is shared between bfloat16 on cpu and float32 on cpu" in described


class Recorder:
    """A pre-hook that runs after the pruner's and keeps the gradients the optimizer will see."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.grads = model, []
        optimizer.register_step_pre_hook(lambda *_: self.grads.append(self._copy()))

    def _copy(self) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def plain_grads(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The loss's own gradients, computed on a copy."""
    twin = copy.deepcopy(model)
    torch.manual_seed(step)
    x, y = batch(step)
    F.cross_entropy(twin(x), y).backward()
    return {n: p.grad for n, p in twin.named_parameters()}


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("method", [SLR.paper(), ADMM.paper()])
def test_the_gradient_seen_is_the_loss_s_plus_lam_plus_rho_times_w_minus_z(net, optimizer, method):
    pruner = attach(net, optimizer, method, sparsity=0.7, ignore=(), every=3)
    recorder = Recorder(net, optimizer)
    for step in range(8):
        own, before = plain_grads(net, step), snapshot(net)
        Z, lam = ([t.clone() for t in pruner.solver.tensors[kind]] for kind in ("Z", "lam"))
        train(net, optimizer, [step], pruner)
        seen = recorder.grads[-1]
        for target, z, multiplier in zip(pruner.problem.targets, Z, lam, strict=True):
            w, g = before[target.name], own.pop(target.name)
            torch.testing.assert_close(seen[target.name], g + multiplier + 0.1 * (w - z), rtol=1e-5, atol=1e-7)
        assert own.keys() and all(torch.equal(seen[name], g) for name, g in own.items()), "biases and norms are not touched"
    assert any(multiplier.abs().max() > 0 for multiplier in lam), "the multipliers have moved, so their term was tested"


def test_magnitude_attached_has_no_numerical_effect():
    plain, pruned = tiny_net(), tiny_net()
    optimizer = sgd(pruned)
    pruner = attach(pruned, optimizer, Magnitude(), rate=10)
    assert train(plain, sgd(plain), range(40)) == train(pruned, optimizer, range(40), pruner)
    assert same_bits(snapshot(plain), snapshot(pruned))


@pytest.mark.parametrize("name", METHODS)
def test_keys_and_parameters_stay_the_same_objects(name):
    net, keys = tiny_net(), list(tiny_net().state_dict())
    optimizer = sgd(net)
    tensors = {n: (id(t), t.data_ptr()) for n, t in [*net.named_parameters(), *net.named_buffers()]}
    modules, hooks = list(net.modules()), [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in net.modules()]

    def unchanged() -> None:
        assert list(net.state_dict()) == keys
        assert {n: (id(t), t.data_ptr()) for n, t in [*net.named_parameters(), *net.named_buffers()]} == tensors
        assert [type(m) for m in net.modules()] == [type(m) for m in modules]
        assert [(m._forward_hooks, m._forward_pre_hooks) for m in net.modules()] == hooks

    pruner = attach(net, optimizer, METHODS[name], rate=5, total_steps=20, every=4)
    train(net, optimizer, range(10), pruner, after_step=lambda _: unchanged())
    with pruner.evaluate():
        unchanged()
    train(net, optimizer, range(10, 20), pruner)
    pruner.finish(calibrate=[batch(0)])
    unchanged()
    pruner.detach()
    unchanged()


def test_groups_state_and_settings_of_the_optimizer_are_left_alone(net):
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    settings = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    pruner = attach(net, optimizer, ADMM.paper(), rate=5, every=2)
    train(net, optimizer, range(4), pruner)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings
    assert all(s.keys() == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.state.values())


def test_losses_handed_in_are_not_changed_and_keep_no_graph(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    loss = F.cross_entropy(net(batch(0)[0]), batch(0)[1])
    alive = weakref.ref(loss)
    pruner.observe(loss)
    value = loss.item()
    loss.backward()
    pruner.observe(loss)
    assert loss.item() == value
    assert not pruner._loss_sum.requires_grad
    del loss
    gc.collect()
    assert alive() is None


# ---------------------------------------------------------------------- copies


def test_deepcopy_and_pickle_of_an_attached_model_are_free_of_the_pruner(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=2)
    train(net, optimizer, range(3), pruner)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert same_bits(snapshot(twin), snapshot(net))
        plain = tiny_net()
        plain.load_state_dict(net.state_dict())
        assert train(twin, sgd(twin), range(3)) == train(plain, sgd(plain), range(3))
    assert pruner.step_count == 3, "steps of the copies are none of ours"


def test_copies_of_the_optimizer_carry_no_hooks(net, optimizer):
    attach(net, optimizer, SLR.paper(), rate=5)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not twin._optimizer_step_pre_hooks and not twin._optimizer_step_post_hooks


def test_a_pruner_is_not_copied(net, optimizer):
    """A copy would have no hooks, and never prune."""
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(DualpruneError, match=r"attach again and load_state_dict\(pruner.state_dict\(\)\)"):
            copied(pruner)


def test_detach_leaves_a_plain_loop_and_room_for_another_pruner(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=2)
    with pytest.raises(DualpruneError, match=r"has a pruner already.*detach"):
        attach(net, optimizer, Magnitude(), rate=5)
    train(net, optimizer, range(5), pruner)
    pruner.detach()
    pruner.detach()
    plain = copy.deepcopy(net)
    twin = sgd(plain)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(net, optimizer, range(5)) == train(plain, twin, range(5))
    assert pruner.step_count == 5
    attach(net, optimizer, Magnitude(), rate=5)


def test_a_forgotten_pruner_is_collected_with_its_model():
    def forget() -> weakref.ref[nn.Module]:
        net = tiny_net()
        attach(net, sgd(net), SLR.paper(), rate=5)
        return weakref.ref(net)

    alive = forget()
    gc.collect()
    assert alive() is None


# ---------------------------------------------------------------------- what is pruned


def test_tied_weights_are_pruned_once_and_reported():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.mix = nn.Linear(16, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(x)))

    net = Tied()
    optimizer = sgd(net)
    pruner = attach(net, optimizer, SLR.paper(), sparsity=0.75, ignore=(), every=2)
    assert [layer["name"] for layer in pruner.layers] == ["embed.weight", "mix.weight"]
    assert "embed.weight is also head.weight (tied): pruned once" in pruner.summary()
    recorder = Recorder(net, optimizer)
    z = pruner.solver.tensors["Z"][0].clone()
    w = net.embed.weight.detach().clone()
    net(torch.arange(8)).square().mean().backward()
    own = net.embed.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(recorder.grads[0]["embed.weight"], own + 0.1 * (w - z))
    pruner.finish()
    assert net.head.weight is net.embed.weight
    assert torch.count_nonzero(net.head.weight) == 128


@pytest.mark.parametrize("method", ["slr", "admm", "gradual", "oneshot"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_method_takes_every_pattern(method, pattern):
    net = tiny_net()
    optimizer = sgd(net)
    pruner = attach(net, optimizer, METHODS[method], patterns={"[36].weight": (pattern, 0.5)}, total_steps=12, every=3)
    train(net, optimizer, range(12), pruner)
    pruner.finish()
    for target in pruner.problem.targets:
        shape = tuple(target.weight.shape)
        assert pattern.contains(target.weight.detach(), 0.5)
        assert int(pruner.masks[target.name].sum()) == pattern.kept(shape, 0.5) * pattern.weights_per_unit(shape)
        assert not target.weight.detach()[~pruner.masks[target.name]].any()
    train(net, optimizer, range(3), pruner)
    assert all(t.pattern.contains(t.weight.detach(), 0.5) for t in pruner.problem.targets)


def test_frozen_parameters_and_those_of_no_group_are_left_alone_and_named(net):
    net[3].weight.requires_grad_(False)
    before = net[3].weight.clone(), net[10].weight.clone()
    optimizer = torch.optim.SGD([*net[:3].parameters(), *net[6].parameters()], 0.05)
    pruner = attach(net, optimizer, SLR.paper(), rate=4, ignore=(), every=2)
    assert [layer["name"] for layer in pruner.layers] == ["0.weight", "6.weight"]
    assert "frozen (requires_grad is False): 3.weight" in pruner.summary()
    assert "not in the optimizer: 10.weight" in pruner.summary()
    train(net, optimizer, range(4), pruner)
    pruner.finish()
    assert torch.equal(net[3].weight, before[0]) and torch.equal(net[10].weight, before[1])


def test_parameters_without_a_gradient_are_not_given_one(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=4, every=1)
    net[6].weight.sum().backward()
    optimizer.step()
    assert net[3].weight.grad is None
    assert net[6].weight.grad is not None and len(pruner.history) == 1


def test_summary_and_layers_count_what_is_kept(net, optimizer):
    pruner = attach(net, optimizer, Magnitude(), sparsity=0.9)
    assert pruner.layers == [
        {"name": "3.weight", "shape": [8, 8, 3, 3], "pattern": "unstructured", "kept": 58, "total": 576},
        {"name": "6.weight", "shape": [16, 8, 3, 3], "pattern": "unstructured", "kept": 115, "total": 1152},
    ]
    text = pruner.summary()
    assert "173" in text and "1,728" in text and "9.99x" in text
    assert "first layer: 0.weight" in text and "last layer: 10.weight" in text


# ---------------------------------------------------------------------- traps of published implementations


def test_exactly_k_are_kept_when_all_weights_tie(net, optimizer):
    with torch.no_grad():
        net[3].weight.fill_(0.25)
        net[6].weight.fill_(-0.25)
    pruner = attach(net, optimizer, SLR.paper(), sparsity=0.9)
    pruner.finish()
    assert [layer["kept"] for layer in pruner.layers] == [58, 115]
    assert pruner.masks["3.weight"].flatten().nonzero().flatten().tolist() == list(range(58)), "ties are kept by index"


def test_looking_never_cuts_the_live_model(net, optimizer):
    pruner = attach(net, optimizer, SLR(), rate=5, total_steps=20, every=2)
    train(net, optimizer, range(5), pruner)
    before, books = snapshot(net), snapshot(pruner.state_dict())
    pruner.masks, pruner.layers, pruner.summary(), pruner.state_dict(), pruner.history
    with pruner.evaluate():
        pruner.masks  # noqa: B018
    assert same_bits(before, snapshot(net))
    assert same_bits(books, pruner.state_dict())


@pytest.mark.parametrize("method", [SLR.paper(), ADMM.paper()])
def test_multipliers_hold_no_graph_and_are_no_alias_of_the_weights(net, optimizer, method):
    pruner = attach(net, optimizer, method, rate=5, ignore=(), every=2)
    train(net, optimizer, range(6), pruner)
    live = {p.untyped_storage().data_ptr() for p in net.parameters()}
    for tensor in (t for tensors in pruner.solver.tensors.values() for t in tensors):
        assert not tensor.requires_grad and tensor.grad_fn is None
        assert tensor.untyped_storage().data_ptr() not in live
    for target, z in zip(pruner.problem.targets, pruner.solver.tensors["Z"], strict=True):
        assert not torch.equal(target.weight, z)


def test_conditions_and_steps_match_a_twin_that_keeps_copies_of_all_weights():
    """Both conditions, s and Λ by the letter of the paper: W, Z and Λ of every iteration are kept, in double precision."""
    net = tiny_net().double()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    pruner = attach(net, optimizer, SLR.paper(s0=0.05), rate=5, ignore=(), every=1)
    rho, weights = 0.1, lambda: torch.cat([w.flatten() for w in pruner.problem.weights]).clone()
    flat = lambda kind: torch.cat([t.flatten() for t in pruner.solver.tensors[kind]]).clone()  # noqa: E731

    def lagrangian(f: float, w: Tensor, z: Tensor, multiplier: Tensor) -> float:
        return float(f + multiplier @ (w - z) + rho / 2 * (w - z) @ (w - z))

    z, lam, s = flat("Z"), flat("lam"), 0.05
    g_last = float((weights() - z).norm())
    outcomes = set()
    w_last, f_last = weights(), None
    for step in range(30):
        x, y = batch(step % 3)
        f = F.cross_entropy(net(x.double()), y)
        optimizer.zero_grad()
        f.backward()
        pruner.observe(f)
        optimizer.step()
        w, f, row = weights(), float(torch.tensor(f.item()).float()), pruner.history[-1]
        expected = f_last is None or lagrangian(f, w, z, lam) < lagrangian(f_last, w_last, z, lam)
        assert row["condition_w"] == expected
        if expected:
            s *= slr_alpha(step + 1, 300, 0.1) * g_last / float((w - z).norm())
            g_last, lam = float((w - z).norm()), lam + s * (w - z)
        z_new = flat("Z")
        expected_z = lagrangian(f, w, z_new, lam) < lagrangian(f, w, z, lam)
        assert row["condition_z"] == expected_z
        assert row["z_change"] == pytest.approx(float((z_new - z).norm()), abs=1e-9)
        z = z_new
        if expected_z:
            s *= slr_alpha(step + 1, 300, 0.1) * g_last / float((w - z).norm())
            g_last, lam = float((w - z).norm()), lam + s * (w - z)
        assert row["s"] == pytest.approx(s, rel=1e-9)
        assert row["violation"] == pytest.approx(float((w - z).norm()), rel=1e-9)
        torch.testing.assert_close(flat("lam"), lam)
        outcomes |= {("w", expected), ("z", expected_z)}
        w_last, f_last = w, f
    assert {("w", True), ("w", False), ("z", True)} <= outcomes


def test_losses_of_other_weights_never_enter_a_condition():
    """A loss known at one end of an iteration only must not decide: the quadratic part does, and the history says so."""

    def rows(losses: dict[int, float]) -> list[dict]:
        net = tiny_net()
        optimizer = sgd(net)
        pruner = attach(net, optimizer, SLR.paper(), rate=5, every=1)
        for step in range(4):
            if step in losses:
                pruner.observe(losses[step])
            train(net, optimizer, [step])
        return pruner.history

    without, half = rows({}), rows({1: 1e6, 3: -1e6})
    assert [r["condition_w"] for r in half] == [r["condition_w"] for r in without]
    assert not any(r["loss_known"] for r in without + half)
    both = rows({0: 1.0, 1: 1e6, 2: 1.0, 3: 2e6})
    assert [r["condition_w"] for r in both[1:]] == [False, True, False]
    assert all(r["loss_known"] for r in both)


def test_the_loss_of_an_iteration_is_the_mean_over_its_steps(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=3)
    losses = train(net, optimizer, range(6), pruner)
    assert pruner.history[0]["loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert pruner.history[1]["loss"] == pytest.approx(sum(losses[3:]) / 3)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(("method", "held"), [(SLR.paper(), 2), (ADMM.paper(), 2), (Magnitude(), 0)])
def test_at_most_z_and_lam_are_kept(net, optimizer, method, held):
    pruner = attach(net, optimizer, method, rate=5, ignore=(), every=2)
    train(net, optimizer, range(6), pruner)
    size = sum(w.nbytes for w in pruner.problem.weights)
    assert sum(t.nbytes for tensors in pruner.solver.tensors.values() for t in tensors) == held * size
    gc.collect()
    alive = [v for v in gc.get_objects() if issubclass(type(v), Tensor) and not isinstance(v, UninitializedTensorMixin)]
    tensors = [v for v in alive if v.numel() == net[6].weight.numel()]
    storages = {t.untyped_storage().data_ptr() for t in tensors if t.is_floating_point() and t.device.type == "cpu"}
    of_training = {
        t.untyped_storage().data_ptr() for t in (net[6].weight, net[6].weight.grad, *optimizer.state[net[6].weight].values())
    }
    of_others = storages - of_training - {p.untyped_storage().data_ptr() for p in net.parameters()}
    mine = {t[2].untyped_storage().data_ptr() for t in pruner.solver.tensors.values()}
    assert len(mine) == held and mine <= of_others


def test_gradual_keeps_one_byte_a_weight(net, optimizer):
    pruner = attach(net, optimizer, GradualMagnitude(), rate=5, ignore=(), total_steps=100)
    assert sum(t.nbytes for t in pruner.solver.tensors["drop"]) == sum(w.numel() for w in pruner.problem.weights)


def test_two_hundred_updates_leave_nothing_behind(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=1)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(v), Tensor) for v in gc.get_objects())

    train(net, optimizer, range(5), pruner)
    pruner.history.clear()
    tensors = live()
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    for _ in range(200):
        pruner.observe(1.0)
        pruner.update()
    rows = 200 * 2_000
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert live() == tensors
    assert grown < rows, "only the history grows, by a small dict an update"


class Ledger(TorchDispatchMode):
    """Counts operators, results in fresh memory, and reads of device values by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.allocations = self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        self.syncs += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.allocations += sum(t.untyped_storage().data_ptr() not in given for t in _tensors(out) if not t.is_meta)
        return out


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("pull", ["everywhere", "outside"])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("width", [64, 600])  # below and above the size that is walked through in chunks
def test_the_step_hooks_allocate_nothing_and_never_wait(scale, width, pull):
    net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 16)).to(torch.float32)
    optimizer = sgd(net)
    pruner = attach(net, optimizer, replace(SLR.paper(), pull=pull), rate=5, ignore=(), every=1000)
    net(torch.ones(2, width)).sum().backward()
    if scale:
        optimizer.grad_scale = torch.tensor(scale)
    pruner._before_step(optimizer, (optimizer,), {})  # the first one makes the memory that all others use
    with Ledger() as ledger:
        pruner._before_step(optimizer, (optimizer,), {})
        pruner._after_step(optimizer, (optimizer,), {})
    assert ledger.calls >= 6
    assert (ledger.allocations, ledger.syncs) == (0, 0)


@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("store", [None, torch.bfloat16])
def test_the_penalty_pulls_what_is_to_go_and_nothing_else(scale, store):
    torch.manual_seed(0)
    net = nn.Linear(12, 10)
    optimizer = sgd(net)
    pruner = attach(net, optimizer, replace(SLR.paper(), pull="outside"), rate=4, ignore=(), every=1000, state_dtype=store)
    w, (z,), (lam,) = net.weight.detach(), *pruner.solver.tensors.values()
    lam.normal_()
    net.weight.grad = torch.randn(10, 12)
    expected = net.weight.grad + (scale or 1.0) * torch.where(z == 0, lam.float() + 0.1 * w, 0)
    if scale:
        optimizer.grad_scale = torch.tensor(scale)
    pruner._before_step(optimizer, (optimizer,), {})
    torch.testing.assert_close(net.weight.grad, expected, rtol=1e-5, atol=1e-5)
    assert int((z != 0).sum()) == 30


def test_the_ledger_counts():
    with Ledger() as ledger:
        value = torch.ones(3) + 1
        value.add_(1)
        value.sum().item()
    assert (ledger.allocations, ledger.syncs) == (3, 1)


def test_observe_does_not_wait(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    loss = net(batch(0)[0]).sum()
    with Ledger() as ledger:
        pruner.observe(loss)
        pruner.observe(loss)
    assert ledger.syncs == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [SLR.paper(), ADMM.paper()])
def test_state_in_another_dtype(net, optimizer, method, dtype):
    pruner = attach(net, optimizer, method, rate=5, every=2, state_dtype=dtype, state_device="cpu")
    train(net, optimizer, range(10), pruner)
    tensors = [t for tensors in pruner.solver.tensors.values() for t in tensors]
    assert {t.dtype for t in tensors} == {dtype} and all(t.isfinite().all() for t in tensors)
    assert net[3].weight.dtype == torch.float32 and net[3].weight.grad.dtype == torch.float32
    twin = tiny_net()
    other = sgd(twin)
    exact = attach(twin, other, method, rate=5, every=2)
    train(twin, other, range(10), exact)
    for w, v in zip(pruner.problem.weights, exact.problem.weights, strict=True):
        assert (w - v).norm() < 0.01 * v.norm()
    pruner.finish()
    assert [layer["kept"] for layer in pruner.layers] == [layer["kept"] for layer in exact.layers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_models_in_other_dtypes(name, dtype):
    net = tiny_net().to(dtype)
    optimizer = sgd(net)
    state_dtype = torch.bfloat16 if dtype == torch.float64 else None
    pruner = attach(net, optimizer, METHODS[name], rate=5, every=2, total_steps=8, state_dtype=state_dtype)
    for step in range(8):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(net(x.to(dtype)), y).backward()
        optimizer.step()
    pruner.finish(calibrate=[batch(0)[0].to(dtype)])
    assert [layer["kept"] for layer in pruner.layers] == [115, 230]


def test_channels_last_weights_keep_their_layout(net):
    net.to(memory_format=torch.channels_last)
    optimizer = sgd(net)
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=2)
    train(net, optimizer, range(4), pruner)
    z = pruner.solver.tensors["Z"][1]
    assert z.is_contiguous(memory_format=torch.channels_last) and net[6].weight.is_contiguous(memory_format=torch.channels_last)
    twin = tiny_net()
    other = sgd(twin)
    train(twin, other, range(4), attach(twin, other, SLR.paper(), rate=5, every=2))
    torch.testing.assert_close(net[6].weight, twin[6].weight, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- updates and history


def test_updates_come_every_so_many_steps_and_by_hand(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=4)
    train(net, optimizer, range(9), pruner)
    row = pruner.update()
    assert [r["step"] for r in pruner.history] == [4, 8, 9] and pruner.history[-1] is row
    assert [r["update"] for r in pruner.history] == [1, 2, 3]


@pytest.mark.parametrize("name", METHODS)
def test_history_is_plain_json_and_complete(name, net, optimizer):
    pruner = attach(net, optimizer, METHODS[name], rate=5, every=4, total_steps=40)
    train(net, optimizer, range(40), pruner)
    assert json.loads(json.dumps(pruner.history, allow_nan=False)) == pruner.history
    wanted = {"step", "update", "loss", "support_change"}
    if name.startswith(("slr", "admm")):
        wanted |= {"rho", "s", "violation", "violation_before", "z_change", "condition_w", "condition_z", "loss_known"}
        wanted |= {"lagrangian", "dual_bound"}
    assert pruner.history and all(wanted <= row.keys() for row in pruner.history)


def test_a_short_run_sees_some_forty_updates_by_default(net, optimizer):
    assert attach(net, optimizer, ADMM(), rate=5, total_steps=400).every == 10
    assert attach(net, sgd(net), ADMM(), rate=5, total_steps=7).every == 1
    assert attach(net, sgd(net), ADMM(), rate=5, total_steps=10**6).every == ADMM.default_every


def test_the_sets_shrink_along_the_run_and_the_penalty_follows_the_learning_rate(net, optimizer):
    pruner = attach(net, optimizer, SLR(), rate=5, total_steps=40, every=2)
    train(net, optimizer, range(40), pruner)
    scale = [row["sparsity_scale"] for row in pruner.history]
    rho = [row["rho"] for row in pruner.history]
    assert scale == sorted(scale) and scale[0] < 0.3 and scale[-1] == 1
    assert len(set(rho)) == 1, "ρ follows the learning rate, which is constant here"
    assert all(row["s"] <= 0.1 * row["rho"] * (1 + 1e-12) for row in pruner.history), "the step never exceeds cap times rho"


def test_weights_and_copies_come_to_agree_and_the_cut_costs_little(trained, calibration):
    net = trained()
    optimizer = sgd(net, 0.02)
    pruner = attach(net, optimizer, SLR(hold=0), rate=5, total_steps=150, every=3)
    train(net, optimizer, range(150), pruner)
    violations = [row["violation"] for row in pruner.history]
    assert violations[-1] < 0.5 * max(violations)
    with pruner.evaluate(calibrate=calibration):
        assert helpers.accuracy(net) > 0.85


# ---------------------------------------------------------------------- evaluate


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("calibrate", [False, True])
def test_evaluate_shows_the_cut_model_and_puts_back_every_bit(name, calibrate, net, optimizer, calibration):
    pruner = attach(net, optimizer, METHODS[name], rate=5, total_steps=20, every=4)
    train(net, optimizer, range(9), pruner)
    with torch.no_grad():
        net[3].weight.view(-1)[0] = -0.0
    before, books, masks = snapshot(net), snapshot(pruner.state_dict()), pruner.masks
    with pruner.evaluate(calibrate=calibration if calibrate else None) as inside:
        assert inside is net
        assert [int(torch.count_nonzero(net[i].weight)) for i in (3, 6)] == [115, 230]
        assert all(not net.get_parameter(n)[~m].any() for n, m in masks.items())
        assert torch.equal(net[1].running_mean, before["1.running_mean"]) is not calibrate
        net.train()(batch(0)[0])
    assert same_bits(before, snapshot(net))
    assert same_bits(books, pruner.state_dict())
    assert net.training


def test_evaluate_puts_back_every_bit_after_an_exception(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    before = snapshot(net)
    with pytest.raises(KeyError), pruner.evaluate():
        raise KeyError
    with pytest.raises(RuntimeError), pruner.evaluate(calibrate=[batch(0), torch.ones(3, 2, 8, 8)]):
        pass
    with pytest.raises(DualpruneError, match="no batches"), pruner.evaluate(calibrate=[]):
        pass
    assert same_bits(before, snapshot(net)) and net.training
    with pruner.evaluate():
        assert int(torch.count_nonzero(net[3].weight)) == 115
    train(net, optimizer, range(2), pruner)


def test_nothing_else_is_done_inside_evaluate(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    net(batch(0)[0]).sum().backward()
    before = snapshot(net)
    with pruner.evaluate():
        with pytest.raises(DualpruneError, match=r"optimizer.step\(\) inside pruner.evaluate\(\)"):
            optimizer.step()
        with pytest.raises(DualpruneError, match="entered already"), pruner.evaluate():
            pass
        with pytest.raises(DualpruneError, match=r"finish\(\) inside evaluate\(\)"):
            pruner.finish()
        with pytest.raises(DualpruneError, match=r"update\(\) inside evaluate\(\)"):
            pruner.update()
    assert same_bits(before, snapshot(net)) and pruner.step_count == 0
    optimizer.step()


# ---------------------------------------------------------------------- refused, in words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": SLR}, r"expected a method such as SLR\(\), got .*did you mean SLR\(\)\?"),
        ({"method": "slr"}, r"expected a method such as SLR\(\), got 'slr'"),
        ({"method": SLR()}, r"SLR moves with the run: pass total_steps"),
        ({"method": GradualMagnitude()}, r"GradualMagnitude moves with the run: pass total_steps"),
        ({"optimizer": None}, "ADMM works through an optimizer's steps"),
        ({"optimizer": "sgd"}, "expected a torch optimizer, got str"),
        ({"model": [1]}, "expected a torch module, got list"),
        ({"every": 0}, "every is a number of optimizer steps, a whole number of at least 1, got 0"),
        ({"every": 2.5}, "every is a number of optimizer steps.*got 2.5"),
        ({"every": True}, "every is a number of optimizer steps.*got True"),
        ({"total_steps": -3}, "total_steps is a number of optimizer steps.*got -3"),
        ({"rate": None, "sparsity": 90}, r"sparsity is a fraction in \[0, 1\], got 90; did you mean 0.9\?"),
        ({"rate": None, "sparsity": -0.1}, r"sparsity is a fraction in \[0, 1\], got -0.1"),
        ({"rate": None, "sparsity": math.nan}, r"sparsity is a fraction in \[0, 1\], got nan"),
        ({"rate": 0.5}, "rate is how many times fewer weights, at least 1"),
        ({"rate": math.inf}, "rate is how many times fewer weights, at least 1"),
        ({"sparsity": 0.5}, "give rate or sparsity, not both"),
        ({"rate": None}, "nothing to prune: give rate=10, sparsity=0.9 or patterns"),
        ({"budget": "globl"}, "did you mean 'global'"),
        ({"state_dtype": torch.int32}, "state_dtype is a float dtype of 16, 32 or 64 bits .*got torch.int32"),
        ({"state_dtype": torch.complex64}, "state_dtype is a float dtype .*got torch.complex64"),
        ({"state_dtype": torch.float8_e4m3fn}, "state_dtype is a float dtype .*got torch.float8_e4m3fn"),
        ({"state_dtype": "bfloat16"}, r"state_dtype is a float dtype .*got 'bfloat16'; did you mean torch\.bfloat16\?"),
        ({"state_dtype": 16}, "state_dtype is a float dtype .*got 16$"),
        ({"ignore": ("6.wight",)}, "ignore: '6.wight' matches no parameter, did you mean '6.weight'"),
        ({"patterns": {"conv*": 0.5}}, r"patterns: 'conv\*' matches no parameter"),
        ({"patterns": {"3.weight": "2:5"}}, "3.weight: 2:5 needs axis 1 to be a multiple of 5"),
        ({"patterns": {"3.weight": "filtr"}}, "did you mean 'filter'"),
        ({"ignore": "*"}, r"nothing to prune: every parameter is left alone"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_answered_in_words(net, optimizer, changed, message):
    arguments = {"model": net, "optimizer": optimizer, "method": ADMM.paper(), "rate": 5.0} | changed
    before = snapshot(net)
    with pytest.raises(DualpruneError, match=message):
        attach(**arguments)
    assert same_bits(before, snapshot(net))
    assert not optimizer._optimizer_step_pre_hooks
    attach(net, optimizer, ADMM.paper(), rate=5)


def test_model_and_optimizer_swapped(net, optimizer):
    with pytest.raises(DualpruneError, match="expected a torch module, got SGD"):
        attach(optimizer, net, ADMM.paper(), rate=5)


def test_an_optimizer_that_maximizes_is_refused_where_the_penalty_would_be_climbed(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1, maximize=True)
    with pytest.raises(DualpruneError, match="negated objective"):
        attach(net, optimizer, SLR.paper(), rate=5)
    attach(net, optimizer, Magnitude(), rate=5)


@pytest.mark.parametrize("name", ["slr-paper", "oneshot"])
def test_closures_are_refused(net, name):
    lbfgs = torch.optim.LBFGS(net.parameters())
    attach(net, lbfgs, METHODS[name], rate=5)
    before = snapshot(net)
    for call in (lambda: lbfgs.step(lambda: 0.0), lambda: lbfgs.step(closure=lambda: 0.0)):
        with pytest.raises(DualpruneError, match=r"LBFGS.step was called with a closure.*loss.backward\(\)"):
            call()
    assert same_bits(before, snapshot(net))


def test_sparse_gradients_are_refused():
    net = nn.Sequential(nn.Embedding(30, 8, sparse=True), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    attach(net, optimizer, SLR.paper(), rate=5, ignore=())
    net(torch.arange(4)).sum().backward()
    with pytest.raises(DualpruneError, match="sparse=False, or ignore"):
        optimizer.step()


def test_meta_parameters_are_left_alone_and_named():
    net = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 8), nn.LazyLinear(8))
    pruner = attach(net, None, Magnitude(), sparsity=0.5, ignore=())
    assert [layer["name"] for layer in pruner.layers] == ["1.weight"]
    assert "not materialised (lazy or meta): 0.weight" in pruner.summary()
    with pytest.raises(DualpruneError, match="not materialised"):
        attach(net.to("meta"), None, Magnitude(), sparsity=0.5, ignore=())


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(net, optimizer, loss):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=4)
    train(net, optimizer, range(6), pruner)
    pruner.observe(loss)
    train(net, optimizer, [6], pruner)
    before = snapshot(pruner.state_dict())
    with pytest.raises(NonFiniteError, match=r"observed loss is .* at optimizer step 8"):
        train(net, optimizer, [7], pruner)
    after = snapshot(pruner.state_dict())
    assert same_bits({k: v for k, v in before.items() if k[0] in "Zl" and k != "loss_sum"},
                     {k: v for k, v in after.items() if k[0] in "Zl" and k != "loss_sum"})  # fmt: skip
    assert len(pruner.history) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_named_and_nothing_is_changed(net, optimizer, name, value):
    pruner = attach(net, optimizer, METHODS[name], rate=5, every=2, total_steps=20)
    train(net, optimizer, range(5), pruner)
    with torch.no_grad():
        net[6].weight.view(-1)[7] = value
    before, books = snapshot(net), snapshot(pruner.state_dict())
    for act in (pruner.update, pruner.finish):
        with pytest.raises(NonFiniteError, match=r"6.weight has NaN or infinite weights at optimizer step 5"):
            act()
    assert same_bits(before, snapshot(net)) and same_bits(books, pruner.state_dict()) and not pruner.finished
    with pytest.raises(NonFiniteError, match=r"6\.weight"):
        attach(net, sgd(net), METHODS[name], rate=5, total_steps=20)


def test_a_failed_attach_leaves_no_hooks(net, optimizer):
    with torch.no_grad():
        net[3].weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        attach(net, optimizer, SLR.paper(), rate=5)
    assert not optimizer._optimizer_step_pre_hooks
    with torch.no_grad():
        net[3].weight.fill_(1)
    attach(net, optimizer, SLR.paper(), rate=5)


def test_observe_wants_one_number(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=1)
    with pytest.raises(DualpruneError, match=r"one loss a step, got a tensor of shape \(3,\)"):
        pruner.observe(torch.ones(3))
    pruner.observe(torch.ones(1, 1))
    pruner.observe(2)
    assert pruner.update()["loss"] == 1.5


def test_defaults_are_said_aloud(net, optimizer, caplog):
    with caplog.at_level("INFO", logger="dualprune"):
        attach(net, optimizer, SLR.paper(), rate=5)
    assert "left alone, first layer: 0.weight" in caplog.text
    assert "left alone, last layer: 10.weight" in caplog.text


SAY = """
import logging, torch, dualprune
from torch import nn
{setup}
model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
dualprune.attach(model, None, dualprune.Magnitude(), rate=2)
logging.getLogger("dualprune").warning("of ours")
"""


@pytest.mark.parametrize(
    ("setup", "heard"),
    [
        ("", "dualprune: pruning 1"),
        ("logging.basicConfig()", "dualprune: pruning 1"),
        ("logging.getLogger().addHandler(logging.NullHandler())", "dualprune: pruning 1"),
        ("logging.basicConfig(level='INFO')", "INFO:dualprune:pruning 1"),
        ("logging.basicConfig(); logging.getLogger('dualprune').setLevel('INFO')", "INFO:dualprune:pruning 1"),
        ("logging.basicConfig(); logging.getLogger('dualprune').setLevel('WARNING')", None),
        ("logging.getLogger('dualprune').setLevel('WARNING')", None),
        ("logging.basicConfig(); logging.disable(logging.INFO)", None),
    ],
)
def test_defaults_are_said_once_however_logging_is_set_up(setup, heard):
    code = SAY.format(setup=setup)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.count("pruning 1 parameters") == (heard is not None)
    assert heard is None or heard in done.stderr
    if "NullHandler" not in setup:
        assert done.stderr.count("of ours") == 1
        assert ("WARNING:dualprune:of ours" in done.stderr) == ("basicConfig" in setup)


def test_one_shot_needs_no_loop(trained):
    net = trained()
    pruner = dualprune.attach(net, None, Magnitude(), rate=2)
    pruner.finish()
    assert [layer["kept"] for layer in pruner.layers] == [288, 576]
    pruner.detach()


FIRST_IMPORTS = """
import sys
for first in ("from dualprune import Pruner", "import dualprune.pruner", "import dualprune"):
    for name in [name for name in sys.modules if name.startswith("dualprune")]:
        del sys.modules[name]
    exec(first)
    import dualprune
    try:
        dualprune.attach(None, None, None)
    except dualprune.DualpruneError as error:
        print(error)
"""


def test_attach_is_callable_whatever_was_imported_first():
    done = subprocess.run([sys.executable, "-c", FIRST_IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout == 3 * "expected a method such as SLR(), got None\n"
