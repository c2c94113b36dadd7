"""Lightning: the same weights as a plain loop, exact resumption, averages, and what it says of wrong set-ups."""

from __future__ import annotations

import signal
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainers_helpers import (
    CLIP,
    EPOCHS,
    METHODS,
    OPTIONS,
    STEPS,
    Classifier,
    adam,
    assert_same,
    loader,
    plain,
)  # fmt: skip

from dualprune import DualpruneError

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging  # noqa: E402

from dualprune.integrations.lightning import DualpruneCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers, loggers and deprecations


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier().net
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen.append(int(self.net[3].weight.count_nonzero()))

    def configure_optimizers(self) -> Any:
        return adam(self)


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        loss = super().training_step(batch, index)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, CLIP, "norm")
        optimizer.step()


class Formless(Lit):
    """Works in its steps; has no forward of its own."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)


class Two(Manual):
    def configure_optimizers(self) -> Any:
        return [adam(self.net[:4]), adam(self.net[6:])]


def pruning(name: str = "slr", **options: Any) -> DualpruneCallback:
    return DualpruneCallback(METHODS[name], **OPTIONS | options)


def fit(module: Any, *callbacks: Any, folder: Any, ckpt_path: Any = None, valid: bool = False, **options: Any) -> Any:
    options = {"max_epochs": EPOCHS, "gradient_clip_val": CLIP, "num_sanity_val_steps": 0} | options
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), loader() if valid else None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_the_same_as_a_plain_loop(name, tmp_path):
    module, callback = Lit(), pruning(name)
    fit(module, callback, folder=tmp_path)
    assert_same(module, callback.pruner, name)


def test_the_same_with_accumulated_batches(tmp_path):
    module, callback = Lit(), pruning()
    fit(module, callback, folder=tmp_path, accumulate_grad_batches=2)
    assert_same(module, callback.pruner, "slr", accumulate=2)


def test_the_same_with_manual_optimization(tmp_path):
    module, callback = Manual(), pruning()
    fit(module, callback, folder=tmp_path, gradient_clip_val=None)
    assert_same(module, callback.pruner, "slr")


@pytest.mark.parametrize("epochs", [2, EPOCHS])  # in the middle, and in the held tail
def test_a_resumed_fit_ends_the_same(epochs, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Lit(), pruning(), keep, folder=tmp_path)
    module, callback = Lit(), pruning()
    fit(module, callback, folder=tmp_path, ckpt_path=tmp_path / f"epoch={epochs - 1}.ckpt")
    assert_same(module, callback.pruner, "slr")


def test_a_second_fit_prunes_with_a_new_pruner(tmp_path):
    module, callback = Lit(), pruning()
    fit(module, callback, folder=tmp_path)
    first = callback.pruner
    fit(module, callback, folder=tmp_path)
    assert first is not callback.pruner and callback.pruner.step_count == STEPS


def test_what_a_validation_restores_is_not_the_next_fits(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    module, callback = Lit(), pruning()
    trainer = fit(module, callback, keep, folder=tmp_path)
    trainer.validate(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    module = Lit()
    fit(module, callback, folder=tmp_path)
    assert_same(module, callback.pruner, "slr")
    trainer.validate(module, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    fit(module := Lit(), callback, folder=tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(module, callback.pruner, "slr")


def test_what_a_fit_that_failed_restored_is_not_the_next_ones(tmp_path):
    class Fails(Lit):
        def on_fit_start(self) -> None:
            raise RuntimeError("before the training starts")

    keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    fit(Lit(), pruning(), keep, folder=tmp_path)
    module, callback = Lit(), pruning()
    with pytest.raises(RuntimeError, match="before the training starts"):
        fit(Fails(), callback, folder=tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt")
    fit(module, callback, folder=tmp_path)
    assert_same(module, callback.pruner, "slr")


def test_validation_sees_the_cut_weights_where_asked(tmp_path):
    module, callback = Lit(), pruning(validate_cut=True)
    fit(module, callback, folder=tmp_path, valid=True)
    assert set(module.seen) == {round(module.net[3].weight.numel() / 5)}
    assert_same(module, callback.pruner, "slr")
    module = Lit()
    fit(module, pruning(), folder=tmp_path, valid=True)
    assert module.seen[0] == module.net[3].weight.numel()


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_validation_that_breaks_off_leaves_the_weights_whole(stop, averaged, tmp_path):
    class Breaks(Lit):
        def validation_step(self, batch: Any, index: int) -> None:
            super().validation_step(batch, index)
            raise stop("in the middle")

    module, callback = Breaks(), pruning(validate_cut=True)
    others = [WeightAveraging()] if averaged else []
    handler = signal.getsignal(signal.SIGINT)  # Lightning leaves Ctrl-C ignored
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            fit(module, *others, callback, folder=tmp_path, valid=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    size = module.net[3].weight.numel()
    assert module.seen == [round(size / 5)] and int(module.net[3].weight.count_nonzero()) == size
    assert not callback.pruner._evaluating
    Breaks.validation_step = Lit.validation_step
    fit(module, *others, callback, folder=tmp_path, valid=True)  # the same callback, from where it stopped
    assert callback.pruner.step_count == STEPS and int(module.net[3].weight.count_nonzero()) == round(size / 5)


def test_sharded_weights_are_refused_before_training(tmp_path, monkeypatch):
    def refuse(pruner: Any) -> None:
        raise DualpruneError("cut up")

    monkeypatch.setattr("dualprune.integrations.lightning.refuse_shards", refuse)
    with pytest.raises(DualpruneError, match="cut up"):
        fit(Lit(), pruning(), folder=tmp_path)


def test_a_module_without_forward_is_pruned_without_calibration(tmp_path):
    module = Formless()
    fit(module, pruning(calibrate=0), folder=tmp_path)
    assert int(module.net[3].weight.count_nonzero()) == round(module.net[3].weight.numel() / 5)


def test_an_average_is_cut_at_validation_and_at_the_end(tmp_path):
    module, callback = Lit(), pruning(validate_cut=True)
    fit(module, WeightAveraging(), callback, folder=tmp_path, valid=True)
    kept = round(module.net[3].weight.numel() / 5)
    assert set(module.seen) == {kept}
    assert int(module.net[3].weight.count_nonzero()) == kept
    assert not torch.equal(module.state_dict()["net.3.weight"], plain("slr")[0]["net.3.weight"])


@pytest.mark.parametrize(
    "module, callbacks, options, message",
    [
        (Lit, [pruning(), WeightAveraging()], {}, "put DualpruneCallback after it"),
        (Two, [pruning()], {"gradient_clip_val": None}, "this module has 2 optimizers.*got None"),
        (Two, [pruning(optimizer=2)], {"gradient_clip_val": None}, "got 2"),
        (Lit, [pruning(total_steps=0)], {}, "total_steps is a number of optimizer steps"),
        (Lit, [pruning()], {"max_epochs": -1}, "pass total_steps"),
        (Formless, [pruning()], {}, r"Formless has batch norm, .* pass calibrate=0"),
    ],
)
def test_wrong_set_ups_are_refused_before_training(module, callbacks, options, message, tmp_path):
    with pytest.raises(DualpruneError, match=message):
        fit(module(), *callbacks, folder=tmp_path, **options)


def test_one_of_two_optimizers(tmp_path):
    class Turns(Two):
        def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
            first, second = self.optimizers()
            self.zero_grad()
            self.manual_backward(Lit.training_step(self, batch, index))
            first.step()
            second.step()

    callback = pruning(optimizer=1, total_steps=STEPS)
    module = Turns()
    fit(module, callback, folder=tmp_path, gradient_clip_val=None)
    assert callback.pruner.step_count == STEPS
    assert [t.name for t in callback.pruner.problem.targets] == ["net.6.weight"]
    assert callback.pruner.problem.targets[0].pattern.contains(module.net[6].weight.detach(), 0.8)


def test_lbfgs_is_refused_with_the_pruners_words(tmp_path):
    class Newton(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(DualpruneError, match="LBFGS cannot be used"):
        fit(Newton(), pruning(), folder=tmp_path)


def test_other_callbacks_see_the_weights_cut_at_the_end(tmp_path):
    class Last(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self.kept = int(pl_module.net[3].weight.count_nonzero())

    last, module = Last(), Lit()
    fit(module, last, pruning(), folder=tmp_path)
    assert last.kept == round(module.net[3].weight.numel() / 5)


def test_the_observed_loss_is_without_amps_scale_and_accumulation(tmp_path):
    callback, module = pruning(), Lit()
    fit(module, callback, folder=tmp_path)
    heard: list[float] = []
    callback.pruner.observe = lambda loss: heard.append(float(loss))  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = SimpleNamespace(
        accumulate_grad_batches=4, optimizers=[None], precision_plugin=SimpleNamespace(scaler=scaler)
    )  # fmt: skip
    callback.on_before_backward(trainer, module, scaler.scale(torch.tensor(0.75, requires_grad=True) / 4))
    assert heard == [0.75]
