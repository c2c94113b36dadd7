"""Pruning as a callback of Lightning's Trainer: `Trainer(callbacks=[DualpruneCallback(SLR(), rate=10)])`."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from dualprune.errors import DualpruneError
from dualprune.integrations.common import Batches, batches, refuse_shards
from dualprune.integrations.ema import evaluate_average
from dualprune.pruner import Pruner, attach
from dualprune.solvers.base import Method

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError as error:
    raise DualpruneError(f"this callback needs Lightning 2.6 ({error}): pip install 'dualprune[lightning]'") from error


class DualpruneCallback(Callback):
    """Prune a LightningModule while a Trainer fits it; the module is cut when the fit ends.

    The pruner's state is in every checkpoint, so `fit(ckpt_path=…)` goes on exactly; gradients are clipped before the
    penalty is added, as in a plain loop.

    Args:
        method: as for `attach`.
        calibrate: how many batches of the training loader batch norm is re-estimated with at the end (0: none), or batches.
        observe: hand the training loss to the pruner (where there is one optimizer).
        optimizer: which of several, an index into `trainer.optimizers`.
        validate_cut: validate the cut weights, and those of a `WeightAveraging` before this callback, instead of the whole.
        options: as for `attach`; total_steps is `trainer.estimated_stepping_batches` unless given.

    Attributes:
        pruner: the `Pruner` of the fit that runs or ran last; None before.
    """

    def __init__(
        self, method: Method, *, calibrate: Batches = 200, observe: bool = True, optimizer: int | None = None,
        validate_cut: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.method, self.calibrate, self.observe = method, calibrate, observe
        self.optimizer, self.validate_cut, self.options = optimizer, validate_cut, options
        self.pruner: Pruner | None = None
        self._restored: dict[str, Tensor] | None = None
        self._fitting = False
        self._cut = ExitStack()

    @property
    def state_key(self) -> str:
        """Name of this callback's state in a checkpoint."""
        return f"DualpruneCallback{'' if self.optimizer is None else self.optimizer}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was restored for an earlier run: `validate` and `test` restore callbacks too, for no fit."""
        self._restored, self._fitting = None, stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; everything else is in place by now, restored from a checkpoint or new."""
        self._cut.close()  # a validation that broke off elsewhere must not write old weights into this fit
        self._check_order(trainer)
        if batches(self.calibrate, trainer.train_dataloader) is not None:
            _check_forward(pl_module)
        optimizer = self._chosen(trainer.optimizers)
        options = {"total_steps": self._steps(trainer), **self.options}
        if self.pruner is not None:
            self.pruner.detach()
        optimizer.register_step_pre_hook(_run_closure)  # its place is before the pruner's hooks
        self.pruner = attach(pl_module, optimizer, self.method, **options)
        refuse_shards(self.pruner)
        if self._restored is not None:
            self.pruner.load_state_dict(self._restored)
            self._restored = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Observe the loss, without AMP's scale and the division by accumulated batches that Lightning puts on it."""
        if self.pruner is None or not self.observe or len(trainer.optimizers) != 1:
            return
        loss = loss.detach() * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.pruner.observe(loss if scaler is None else loss / scaler.scale(torch.ones_like(loss)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut until the validation ends, where that is asked for."""
        if self.pruner is None or not self.validate_cut:
            return
        self._cut.enter_context(self.pruner.evaluate())
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None:  # it changes places with the model for the time of the validation
                self._cut.enter_context(evaluate_average(self.pruner, average))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the whole weights back."""
        self._cut.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the whole weights back where a validation was interrupted or failed."""
        self._cut.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut for good; the loaders and the device are still there."""
        if self.pruner is not None:
            self.pruner.finish(calibrate=batches(self.calibrate, trainer.train_dataloader))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut also where a checkpoint was of the last step: there the training hooks are left out."""
        if self._restored is not None:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the pruner's state, plain tensors; nothing before there is a pruner."""
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the fit starts; where none is about to start, it is not needed."""
        self._restored = state_dict.get("pruner") if self._fitting else None

    def _chosen(self, optimizers: list[Optimizer]) -> Optimizer:
        if self.optimizer is None and len(optimizers) == 1:
            return optimizers[0]
        if self.optimizer is None or not 0 <= self.optimizer < len(optimizers):
            raise DualpruneError(
                f"this module has {len(optimizers)} optimizers: pass DualpruneCallback(…, optimizer=index), "
                f"got {self.optimizer!r}"
            )
        return optimizers[self.optimizer]

    def _steps(self, trainer: Trainer) -> int | None:
        steps = trainer.estimated_stepping_batches
        return None if math.isinf(steps) else int(steps)

    def _check_order(self, trainer: Trainer) -> None:
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]
        if any(isinstance(callback, WeightAveraging) for callback in after):
            raise DualpruneError(
                "WeightAveraging writes its average into the model at the end, over the zeros: "
                "put DualpruneCallback after it in Trainer(callbacks=[…])"
            )


def _check_forward(module: LightningModule) -> None:
    estimated = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in module.modules())
    if estimated and getattr(module.forward, "__func__", None) is LightningModule.forward:
        raise DualpruneError(
            f"{type(module).__name__} has batch norm, which is re-estimated at the end by calling the module, but no "
            "forward(x): write one, or pass calibrate=0"
        )


def _run_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute the gradients now: Lightning does so in a closure inside of `step`, after the penalty would be added."""
    closure = kwargs.get("closure")
    if closure is None or isinstance(optimizer, LBFGS):  # LBFGS calls it many times; the pruner refuses it
        return None
    closure()
    return args, kwargs | {"closure": None}
