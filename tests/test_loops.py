"""Every kind of loop and layer: mixed precision, scalers, accumulation, clipping, groups, compiled models, odd weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer

from dualprune import ADMM, SAFE, SLR, Closing, DualpruneError, GradualMagnitude, attach
from helpers import METHODS, batch, same_bits, sgd, snapshot, tiny_net, train

# a large eps, lest Adam blow rounding errors up to whole steps where a gradient is nearly nothing
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-3),
    "adam-fused": lambda p: torch.optim.Adam(p, 1e-3, eps=1e-3, fused=True),
}
FUSED = [name for name in OPTIMIZERS if name.endswith("fused")]


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def scaled_steps(
    net: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, steps: Any, unscale: bool = False, factor: float = 1.0
) -> None:
    for step in steps:
        torch.manual_seed(step)
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(factor * F.cross_entropy(net(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1e3)
        scaler.step(optimizer)
        scaler.update()


# ---------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-by-hand"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_a_scaler_the_result_is_that_of_unscaled_training(name, unscale):
    """Scaling by a power of two is exact, so that a penalty scaled wrongly has nowhere to hide."""
    plain, scaled = tiny_net(), tiny_net()
    runs = []
    for net in (plain, scaled):
        optimizer = OPTIMIZERS[name](net.parameters())
        runs.append((net, optimizer, attach(net, optimizer, SLR.paper(s0=0.1), sparsity=0.8, ignore=(), every=3)))
    train(*runs[0][:2], range(10))
    scaled_steps(*runs[1][:2], scaler(2.0**12), range(10), unscale)
    for p, q in zip(*(run[2].problem.weights for run in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert runs[1][2].step_count == 10 and len(runs[1][2].history) == 3
    for a, b in zip(runs[0][2].history, runs[1][2].history, strict=True):
        assert a["violation"] == pytest.approx(b["violation"], rel=1e-4)
        assert a["s"] == pytest.approx(b["s"], rel=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_the_penalty_matters_in_that_comparison(name):
    nets = tiny_net(), tiny_net()
    for net, attached in zip(nets, (False, True), strict=True):
        optimizer = OPTIMIZERS[name](net.parameters())
        if attached:
            attach(net, optimizer, SLR.paper(s0=0.1), sparsity=0.8, ignore=(), every=3)
        scaled_steps(net, optimizer, scaler(2.0**12), range(10))
    assert (nets[0][6].weight - nets[1][6].weight).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["slr-paper", "gradual"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_overflows_moves_neither_weights_nor_duals(name, method):
    net = tiny_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    pruner = attach(net, optimizer, METHODS[method], sparsity=0.8, every=1, total_steps=20)
    amp = scaler(2.0**12)
    scaled_steps(net, optimizer, amp, range(3))
    weights, rows = {n: p.detach().clone() for n, p in net.named_parameters()}, len(pruner.history)
    tensors = {f"{k}{i}": t.clone() for k, ts in pruner.solver.tensors.items() for i, t in enumerate(ts)}
    scaled_steps(net, optimizer, amp, [3], factor=1e38)
    assert amp.get_scale() == 2.0**11, "the scaler noticed"
    assert same_bits(weights, dict(net.named_parameters()))
    assert same_bits(tensors, {f"{k}{i}": t for k, ts in pruner.solver.tensors.items() for i, t in enumerate(ts)})
    assert len(pruner.history) == rows
    scaled_steps(net, optimizer, amp, [4, 5])
    assert len(pruner.history) == rows + 2
    pruner.finish()


# ---------------------------------------------------------------------- autocast, accumulation, clipping, groups


@pytest.mark.parametrize("name", METHODS)
def test_autocast_to_bfloat16(name):
    net = tiny_net()
    optimizer = sgd(net)
    pruner = attach(net, optimizer, METHODS[name], rate=5, total_steps=12, every=3)
    for step in range(12):
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
            loss = F.cross_entropy(out, y)
        optimizer.zero_grad()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    assert out.dtype == torch.bfloat16 and net[3].weight.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in pruner.solver.tensors.get("Z", ()))
    with torch.autocast("cpu", torch.bfloat16):
        pruner.finish(calibrate=[batch(0)])
        net.eval()(batch(0)[0])
    assert [layer["kept"] for layer in pruner.layers] == [115, 230]
    assert not pruner.history or pruner.history[-1]["loss"] == pytest.approx(loss.item(), abs=1)


def run_on_halves(net: nn.Module, optimizer: Optimizer, steps: Any, parts: int) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(net(a), b) / parts).backward()
        optimizer.step()


def test_under_gradient_accumulation_the_penalty_comes_once_a_step():
    nets = tiny_net().eval(), tiny_net().eval()  # batch norm off: halves of a batch then add up to the batch
    pruners = []
    for net, parts in zip(nets, (1, 4), strict=True):
        optimizer = sgd(net)
        pruners.append(attach(net, optimizer, SLR.paper(s0=0.1), rate=5, every=3))
        run_on_halves(net, optimizer, range(8), parts)
    assert [p.step_count for p in pruners] == [8, 8] and len(pruners[1].history) == 2
    torch.testing.assert_close(nets[0][6].weight, nets[1][6].weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_bounds_the_loss_s_gradient_and_leaves_the_penalty(net, clip):
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    pruner = attach(net, optimizer, SLR.paper(), rate=5, ignore=())
    x, y = batch(0)
    F.cross_entropy(net(x), y).backward()
    clip(net.parameters(), 1e-6)
    before = snapshot(net)
    clipped = {n: p.grad.clone() for n, p in net.named_parameters()}
    optimizer.step()
    for target, z in zip(pruner.problem.targets, pruner.solver.tensors["Z"], strict=True):
        w = before[target.name]
        step = w - target.weight.detach()
        torch.testing.assert_close(step, clipped[target.name] + 0.1 * (w - z), rtol=1e-3, atol=1e-6)
        assert step.abs().max() > 1e-3


def test_several_groups_with_their_own_rates_one_without():
    net = tiny_net()
    net[6].requires_grad_(False)
    groups = [
        {"params": net[:3].parameters(), "lr": 0.01},
        {"params": net[3:6].parameters(), "lr": 0.1, "weight_decay": 1e-3},
        {"params": [*net[6].parameters(), *net[10].parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    pruner = attach(net, optimizer, ADMM.paper(), rate=5, ignore=(), every=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(net, optimizer, range(10), pruner, after_step=lambda _: schedule.step())
    pruner.finish()
    assert [layer["name"] for layer in pruner.layers] == ["0.weight", "3.weight", "10.weight"]
    assert [layer["kept"] for layer in pruner.layers] == [14, 115, 128]


def test_a_group_added_later_does_not_disturb(net):
    optimizer = torch.optim.SGD(net[:6].parameters(), 0.05)
    pruner = attach(net, optimizer, SLR.paper(), rate=5, ignore=(), every=2)
    train(net, optimizer, range(3), pruner)
    optimizer.add_param_group({"params": net[6:].parameters()})
    train(net, optimizer, range(3, 6), pruner)
    pruner.finish()
    assert len(pruner.layers) == 2


def test_two_models_with_an_optimizer_each_do_not_meet():
    alone, one, two = tiny_net(), tiny_net(), tiny_net(5)
    first, second, third = sgd(alone), sgd(one), sgd(two)
    p, q = (attach(n, o, SLR.paper(), rate=5, every=3) for n, o in ((alone, first), (one, second)))
    r = attach(two, third, GradualMagnitude(), rate=2, total_steps=9, every=2)
    train(alone, first, range(9), p)
    for step in range(9):
        train(two, third, [step], r)
        train(one, second, [step], q)
    assert same_bits(snapshot(alone), snapshot(one)) and p.history == q.history


def test_a_step_without_backward_is_only_counted(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    before = snapshot(net)
    optimizer.step()
    assert same_bits(before, snapshot(net)) and pruner.step_count == 1


def test_frozen_half_way_and_thawed(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=3)
    train(net, optimizer, range(3), pruner)
    net[3].requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    kept = net[3].weight.clone()
    train(net, optimizer, range(3, 6), pruner)
    assert torch.equal(net[3].weight, kept)
    net[3].requires_grad_(True)
    train(net, optimizer, range(6, 9), pruner)
    pruner.finish()
    assert [layer["kept"] for layer in pruner.layers] == [115, 230]


# ---------------------------------------------------------------------- layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.mix = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body = kind(8, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def convolutions(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))


SEQUENCE, IMAGE = (6, 8), (4, 8, 8)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (Attention, SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "transposed": (lambda: convolutions(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Conv2d(6, 8, 3)), IMAGE),
    "depthwise": (lambda: convolutions(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1)), IMAGE),
    "grouped": (lambda: convolutions(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=4)), IMAGE),
    "dilated-1x1": (lambda: convolutions(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, dilation=2)), IMAGE),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(48, 4)), SEQUENCE),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.Flatten(), nn.Linear(288, 4)), (1, *IMAGE)),
    "parametrized": (lambda: nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(48, 8)), nn.Linear(8, 4)), SEQUENCE),
}


def batches(shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(16, *shape, generator=generator)
        yield x, (x.flatten(1).sum(1) > 0).long()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["slr", "gradual"])
def test_layers_of_every_kind(name, method):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    net, data = make(), batches(shape)
    net(next(data)[0])  # materialises lazy layers
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    keys = list(net.state_dict())
    pruner = attach(net, optimizer, METHODS[method], sparsity=0.75, ignore=(), total_steps=12, every=2)
    assert {layer["name"] for layer in pruner.layers} == {n for n, p in net.named_parameters() if p.ndim >= 2}
    for _ in range(12):
        x, y = next(data)
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    pruner.finish()
    for layer in pruner.layers:
        assert layer["kept"] == layer["total"] - round(0.75 * layer["total"])
        assert int(torch.count_nonzero(net.get_parameter(layer["name"]))) <= layer["kept"]
    assert list(net.state_dict()) == keys and torch.isfinite(net(x)).all()
    twin = copy.deepcopy(net)
    assert torch.equal(twin.eval()(x), net.eval()(x))


# ---------------------------------------------------------------------- optimizers of the user's own


class Clipped(torch.optim.SGD):
    """Clips, then steps as SGD does: torch calls the hooks of both steps."""

    fails = False

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e6)
        if self.fails:
            raise MemoryError
        return super().step(closure)


@pytest.mark.parametrize("method", [SLR(), ADMM(), GradualMagnitude()], ids=repr)
def test_a_step_within_a_step_is_one_step(method):
    """With the penalty in the gradient (ADMM) or after the step (SLR), and a step that failed once on the way."""
    nets = tiny_net(), tiny_net()
    optimizers = Clipped(nets[0].parameters(), lr=0.05), torch.optim.SGD(nets[1].parameters(), lr=0.05)
    options = {"rate": 5, "every": 2, "total_steps": 20, "importance": "magnitude"}  # else gradients of the failed step count
    pruners = [attach(net, opt, method, **options) for net, opt in zip(nets, optimizers, strict=True)]
    losses = []
    for net, optimizer, pruner in zip(nets, optimizers, pruners, strict=True):
        losses.append(train(net, optimizer, range(7), pruner))
        optimizer.fails = True
        if isinstance(optimizer, Clipped):
            with pytest.raises(MemoryError):
                optimizer.step()
        optimizer.fails = False
        losses[-1] += train(net, optimizer, range(7, 20), pruner)
        assert pruner.step_count == 20
    assert losses[0] == losses[1] and pruners[0].history == pruners[1].history
    assert same_bits(nets[0].state_dict(), nets[1].state_dict())


def test_a_step_within_a_step_counts_once_towards_what_ranks():
    nets = tiny_net(), tiny_net()
    optimizers = Clipped(nets[0].parameters(), lr=0.05), torch.optim.SGD(nets[1].parameters(), lr=0.05)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(20), attach(net, optimizer, SLR(), rate=5, every=2, total_steps=20))
    assert same_bits(nets[0].state_dict(), nets[1].state_dict())


# ---------------------------------------------------------------------- parameters that were replaced


def assigned(net):
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)


def parametrized(net):
    weight_norm(net[3])


@pytest.mark.parametrize("replace", [assigned, parametrized])
def test_replaced_parameters_are_noticed(replace):
    net = tiny_net()
    optimizer = sgd(net)
    pruner = attach(net, optimizer, SLR(), rate=5, every=2, total_steps=20)
    train(net, optimizer, range(5), pruner)
    replace(net)
    said = r"3.weight is no longer the model's: .*assign=True"
    for use in (pruner.update, pruner.finish, pruner.evaluate().__enter__):
        with pytest.raises(DualpruneError, match=said):
            use()
    with pytest.raises(DualpruneError, match=said):
        train(net, optimizer, range(5, 7), pruner)


# ---------------------------------------------------------------------- half precision


@pytest.mark.parametrize("method", [SLR(), ADMM(), SAFE(), SLR.paper()], ids=repr)
def test_half_precision_with_a_wide_state_is_as_single_precision(method):
    rows = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        pruner = attach(net, optimizer, method, sparsity=0.5, ignore=(), every=5, total_steps=40, state_dtype=torch.float32)
        for _ in range(40):
            x = torch.randn(32, 64)
            loss = (net(x.to(dtype)).float() - x[:, :8]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rows.append([row["violation"] for row in pruner.history])
    assert rows[0] == pytest.approx(rows[1], rel=0.02)


@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@pytest.mark.parametrize("lr", [0.0, 1e-7, 1e-5])
def test_a_penalty_beyond_half_precision(lr, state_dtype):
    """ρ = 4/(n·lr) leaves float16; the part of the gap that is closed does not depend on it."""
    weights = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)).half().to(dtype)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        pruner = attach(net, optimizer, SLR(), rate=4, ignore=(), every=5, total_steps=40, state_dtype=state_dtype)
        for _ in range(22):
            loss = net(torch.randn(8, 16).to(dtype)).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert pruner.history[0]["rho"] > 65504
        weights.append(torch.cat([w.detach().float().flatten() for w in pruner.problem.weights]))
    assert torch.allclose(*weights, atol=1e-3) and (weights[1].abs() < 0.01).float().mean() > 0.3


def test_a_warm_up_from_zero_gives_admm_no_huge_multipliers():
    runs = []
    for first in (0, 1):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, first=first: min(1.0, (step + first) / 10))
        attach(net, optimizer, ADMM(rho=Closing(4.0), pull="outside"), rate=4, ignore=(), every=1, total_steps=60)
        for _ in range(60):
            x = torch.randn(16, 8)
            loss = (net(x) - x[:, :2]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        runs.append(max(float(p.detach().abs().max()) for p in net.parameters()))
    assert max(runs) < 1.5


def test_admm_under_closing_wants_a_wide_state():
    net = nn.Sequential(nn.Linear(8, 8)).half()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.raises(DualpruneError, match=r"state_dtype=torch\.float32"):
        attach(net, optimizer, ADMM(rho=Closing(4.0)), rate=4, ignore=(), total_steps=60)
    attach(net, optimizer, ADMM(rho=Closing(4.0)), rate=4, ignore=(), total_steps=60, state_dtype=torch.float32)


# ---------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_models_train_the_same_and_keep_their_names():
    plain, wrapped = tiny_net(), tiny_net()
    compiled = torch.compile(wrapped)
    runs = []
    for net in (plain, compiled):
        optimizer = sgd(net)
        pruner = attach(net, optimizer, SLR.paper(), rate=5, every=4)
        losses = []
        for step in range(10):
            x, y = batch(step)
            net.eval()  # no dropout, whose random numbers a compiler draws in another order
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
            losses.append(loss.item())
        with pruner.evaluate():
            losses.append(F.cross_entropy(net(x), y).item())
        pruner.finish(calibrate=[batch(0)])
        losses.append(F.cross_entropy(net.eval()(x), y).item())
        runs.append((pruner, losses))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-3)
    assert [layer["name"] for layer in runs[1][0].layers] == ["3.weight", "6.weight"]
    assert list(compiled.state_dict()) == [f"_orig_mod.{k}" for k in plain.state_dict()]
    assert runs[0][0].layers == runs[1][0].layers
