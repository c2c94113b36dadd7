"""The end of a run: exact counts, masks that hold under warm optimizers, batch norm re-estimated by forward passes only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dualprune import ADMM, SLR, DualpruneError, GradualMagnitude, Magnitude, attach, recalibrate_batch_norm
from helpers import METHODS, accuracy, digits, same_bits, sgd, snapshot, train

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 2e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 2e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
}


def zeros(net: nn.Module) -> list[int]:
    return [int((net[i].weight == 0).sum()) for i in (3, 6)]


# ---------------------------------------------------------------------- the cut


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", ["uniform", "erk", "global"])
def test_exactly_the_asked_number_is_kept(name, budget, net, optimizer):
    pruner = attach(net, optimizer, METHODS[name], rate=8, budget=budget, total_steps=20, every=4)
    train(net, optimizer, range(20), pruner)
    pruner.finish()
    kept = sum(layer["kept"] for layer in pruner.layers)
    assert abs(kept - 1728 / 8) <= (1 if budget == "erk" else 0)
    assert sum(zeros(net)) == 1728 - kept
    if budget == "uniform":
        assert [layer["kept"] for layer in pruner.layers] == [72, 144]


@pytest.mark.parametrize(("sparsity", "kept"), [(0.0, [576, 1152]), (1.0, [0, 0])])
def test_nothing_and_everything(net, optimizer, sparsity, kept):
    pruner = attach(net, optimizer, SLR.paper(), sparsity=sparsity, every=2)
    train(net, optimizer, range(6), pruner)
    pruner.finish()
    assert [layer["kept"] for layer in pruner.layers] == kept
    train(net, optimizer, range(2), pruner)
    assert pruner.summary()


def test_the_cut_keeps_the_largest_weights_as_trained(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), sparsity=0.75, every=2)
    train(net, optimizer, range(7), pruner)
    before = snapshot(net)
    pruner.finish()
    for name, mask in pruner.masks.items():
        weights = before[name]
        assert weights[mask].abs().min() >= weights[~mask].abs().max()
        assert torch.equal(net.get_parameter(name), torch.where(mask, weights, 0))
    untouched = before.keys() - pruner.masks.keys()
    assert all(torch.equal(net.state_dict()[k], before[k]) for k in untouched)


def test_zeros_are_positive_zeros(net, optimizer):
    pruner = attach(net, optimizer, Magnitude(), sparsity=0.9)
    with torch.no_grad():
        net[3].weight.neg_()
    pruner.finish()
    dropped = net[3].weight.detach()[~pruner.masks["3.weight"]]
    assert not torch.signbit(dropped).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["slr-paper", "gradual", "oneshot"])
def test_masks_hold_under_warm_momentum(name, method, net):
    """The trap of 90 % turning into 0 %: a warm optimizer moves zeroed weights even where their gradient is zero."""
    optimizer = OPTIMIZERS[name](net.parameters())
    pruner = attach(net, optimizer, METHODS[method], sparsity=0.9, total_steps=12, every=4)
    train(net, optimizer, range(12), pruner)
    pruner.finish()
    masks, counts, weights = pruner.masks, zeros(net), net[6].weight.clone()
    assert counts == [518, 1037]
    train(net, optimizer, range(20), pruner, after_step=lambda _: zeros(net) == counts or pytest.fail("a zero moved"))
    assert all(torch.equal(pruner.masks[k], m) for k, m in masks.items())
    assert not torch.equal(net[6].weight, weights), "what is kept goes on training"
    pruner.detach()
    train(net, optimizer, range(3))
    assert sum(zeros(net)) < 0.2 * sum(counts), "without the pruner this optimizer does move them: the trap is real"


def test_after_finish_the_gradients_are_the_plain_ones_and_updates_are_refused(net, optimizer):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=2)
    train(net, optimizer, range(6), pruner)
    pruner.finish()
    rows = len(pruner.history)
    assert not any(pruner.solver.tensors.values()), "Z and Λ are given back"
    twin = copy.deepcopy(net)
    train(twin, sgd(twin), [7])
    train(net, optimizer, [7], pruner)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert len(pruner.history) == rows
    with pytest.raises(DualpruneError, match="nothing to update"):
        pruner.update()


def test_finish_again_changes_nothing_and_evaluate_still_works(net, optimizer, calibration):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    pruner.finish(calibration)
    before = snapshot(net)
    pruner.finish()
    with pruner.evaluate() as cut:
        assert same_bits(before, snapshot(cut))
    assert same_bits(before, snapshot(net)) and pruner.finished


# ---------------------------------------------------------------------- the hold


@pytest.mark.parametrize("method", [SLR(hold=0.25), ADMM(hold=0.25)])
def test_the_last_part_of_the_run_trains_under_a_fixed_mask(net, optimizer, method):
    pruner = attach(net, optimizer, method, rate=5, total_steps=40, every=2)
    train(net, optimizer, range(29), pruner)
    assert sum(zeros(net)) == 0
    train(net, optimizer, [29], pruner)
    counts, masks = zeros(net), pruner.masks
    assert counts == [461, 922] and not any(pruner.solver.tensors.values())
    train(net, optimizer, range(30, 45), pruner, after_step=lambda _: zeros(net) == counts or pytest.fail("a zero moved"))
    assert pruner.history[-1]["step"] == 28
    with pytest.raises(DualpruneError, match="during the hold"):
        pruner.update()
    with pruner.evaluate():
        assert zeros(net) == counts
    pruner.finish()
    assert all(torch.equal(pruner.masks[k], m) for k, m in masks.items())


def test_during_the_hold_the_gradients_are_the_plain_ones(net, optimizer):
    pruner = attach(net, optimizer, SLR(ramp=0.2, hold=0.8), rate=5, total_steps=10)
    train(net, optimizer, range(3), pruner)
    twin = copy.deepcopy(net)
    train(twin, sgd(twin), [3])
    train(net, optimizer, [3], pruner)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def test_gradual_reaches_the_sparsity_along_a_cubic_and_keeps_it(net, optimizer):
    pruner = attach(net, optimizer, GradualMagnitude(over=0.5), sparsity=0.8, total_steps=40, every=4)
    seen = []
    train(net, optimizer, range(40), pruner, after_step=lambda _: seen.append(sum(zeros(net))))
    assert seen == sorted(seen) and seen[2] == 0
    assert seen[3] == sum(round(0.8 * (1 - (1 - 4 / 20) ** 3) * n) for n in (576, 1152))
    assert set(seen[19:]) == {461 + 922}


# ---------------------------------------------------------------------- batch norm


class Wrapped(nn.Module):
    """Takes its input by name, as transformers do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.net(pixels)


def plain_average(net: nn.Sequential, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean over batches of the batch mean and the unbiased batch variance at the first batch norm."""
    with torch.no_grad():
        inside = [net[0](x).transpose(0, 1).flatten(1) for x in batches]
    return torch.stack([v.mean(1) for v in inside]).mean(0), torch.stack([v.var(1) for v in inside]).mean(0)


KINDS = {
    "list": lambda xs: xs,
    "tuples": lambda xs: [(x, torch.zeros(len(x))) for x in xs],
    "lists": lambda xs: [[x, torch.zeros(len(x)), "name"] for x in xs],
    "generator": lambda xs: (x for x in xs),
    "loader": lambda xs: DataLoader(TensorDataset(torch.cat(xs), torch.zeros(512)), batch_size=128),
}


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_become_the_plain_average_over_the_batches(net, calibration, kind):
    mean, var = plain_average(net, calibration)
    assert recalibrate_batch_norm(net, KINDS[kind](calibration)) == 4
    torch.testing.assert_close(net[1].running_mean, mean)
    torch.testing.assert_close(net[1].running_var, var)
    assert int(net[1].num_batches_tracked) == 4


def test_mappings_are_handed_over_by_name(net, calibration):
    mean, _ = plain_average(net, calibration)
    batches = [{"pixels": x, "labels": torch.zeros(len(x))} for x in calibration]
    recalibrate_batch_norm(Wrapped(net), batches)
    torch.testing.assert_close(net[1].running_mean, mean)


def test_only_statistics_change_and_every_mode_and_momentum_returns(net, calibration):
    net.train()
    net[4].eval()  # a user's frozen batch norm
    modes = {n: m.training for n, m in net.named_modules()}
    before = snapshot(net)
    seen: list[tuple[bool, bool, bool]] = []
    hook = net[9].register_forward_hook(
        lambda m, i, o: seen.append((m.training, torch.is_grad_enabled(), torch.equal(i[0], o)))
    )
    recalibrate_batch_norm(net, calibration)
    hook.remove()
    assert seen == [(False, False, True)] * 4, "dropout stays off and no graph is built"
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert (net[1].momentum, net[4].momentum) == (0.1, 0.3)
    after = snapshot(net)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{i}.{b}" for i in (1, 4) for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], DualpruneError, "no batches: is the loader empty, or an iterator already used up"),
        (iter(()), DualpruneError, "no batches"),
        (torch.zeros(4, 1, 8, 8), DualpruneError, "an iterable of batches, got one Tensor: put it into a list"),
        ({"x": torch.zeros(4, 1, 8, 8)}, DualpruneError, "an iterable of batches, got one dict"),
        ([torch.zeros(4, 1, 8, 8), "x"], DualpruneError, "a tensor, a tuple that begins with one, or a mapping; got str"),
        ([({}, 1)], DualpruneError, "got tuple beginning with dict"),
        ([torch.zeros(4, 1, 8, 8), torch.zeros(4, 7, 8, 8)], RuntimeError, "channels"),
    ],
)
def test_bad_batches_are_refused_and_the_statistics_stay(net, batches, error, message):
    train(net, sgd(net), range(3))
    before, modes = snapshot(net), [m.training for m in net.modules()]
    with pytest.raises(error, match=message):
        recalibrate_batch_norm(net, batches)
    assert same_bits(before, snapshot(net))
    assert [m.training for m in net.modules()] == modes and net[4].momentum == 0.3


def test_an_iterator_used_up_is_noticed(net, optimizer, calibration):
    pruner = attach(net, optimizer, SLR.paper(), rate=5)
    batches = iter(calibration)
    with pruner.evaluate(calibrate=batches):
        pass
    with pytest.raises(DualpruneError, match="already used up"):
        pruner.finish(calibrate=batches)
    assert pruner.finished
    pruner.finish(calibrate=calibration)
    torch.testing.assert_close(net[1].running_mean, plain_average(net, calibration)[0])


def test_synchronised_batch_norm_is_itself_again_afterwards(net, calibration):
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert recalibrate_batch_norm(synced, calibration) == recalibrate_batch_norm(net, calibration) == 4
    with pytest.raises(DualpruneError, match="got str"):
        recalibrate_batch_norm(synced, [*calibration, "x"])
    assert same_bits(snapshot(net), snapshot(synced))
    assert not any("forward" in vars(m) for m in synced.modules())


def test_models_without_batch_norm_are_left_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2))
    assert recalibrate_batch_norm(net, iter([torch.ones(2, 8)])) == 0


def test_statistics_after_evaluate_and_finish_are_the_same(net, optimizer, calibration):
    pruner = attach(net, optimizer, SLR.paper(), rate=5, every=2)
    train(net, optimizer, range(6), pruner)
    with pruner.evaluate(calibrate=calibration):
        inside = snapshot(net)
    pruner.finish(calibrate=calibration)
    assert same_bits(inside, snapshot(net))


# ---------------------------------------------------------------------- what it is for


def test_slr_keeps_what_one_shot_loses(trained, calibration):
    results = {}
    for name in ("slr", "oneshot"):
        net = trained()
        optimizer = sgd(net, 0.02)
        pruner = attach(net, optimizer, METHODS[name], rate=12, ignore=("0.*",), total_steps=150)
        if name == "slr":
            train(net, optimizer, range(150), pruner)
        pruner.finish(calibrate=calibration)
        results[name] = accuracy(net)
    assert results["slr"] > 0.8 > results["oneshot"] + 0.2, results


def test_recalibration_repairs_what_the_cut_did_to_the_statistics(trained):
    cut = {}
    for batches in (None, [digits()[0][:1024]]):
        net = trained()
        attach(net, None, Magnitude(), sparsity=0.6, ignore=()).finish(calibrate=batches)
        cut[batches is not None] = accuracy(net)
    assert cut[True] > cut[False] + 0.05, cut


def test_a_new_optimizer_is_followed_and_keeps_the_zeros(net):
    pruner = attach(net, old := sgd(net), SLR(), rate=10, ignore=(), total_steps=40)
    train(net, old, range(40), pruner)
    pruner.finish()
    zeros = {name: ~mask for name, mask in pruner.masks.items()}
    new = torch.optim.Adam(net.parameters(), 1e-2)
    pruner.follow(new)
    train(net, new, range(40, 50))
    assert all(bool((p[zeros[name]] == 0).all()) for name, p in net.named_parameters() if name in zeros)
    steps = pruner.step_count
    old.step()  # no longer hooked
    assert pruner.step_count == steps


def test_follow_refuses_an_optimizer_of_another_model(net):
    pruner = attach(net, sgd(net), SLR(), rate=10, ignore=(), total_steps=40)
    with pytest.raises(DualpruneError, match=r"lacks pruned parameters: 0\.weight"):
        pruner.follow(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))
    with pytest.raises(DualpruneError, match="expected a torch optimizer, got Linear"):
        pruner.follow(nn.Linear(2, 2))
