"""Pruning as callbacks of Ultralytics: `DualpruneCallbacks(SLR(), rate=10).add_to(yolo)`, then `yolo.train(…)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DualpruneError
from dualprune.finish import recalibrate_batch_norm
from dualprune.integrations.common import STATE, load_state, save_state
from dualprune.integrations.ema import restore_, snapshot
from dualprune.pruner import Pruner, attach
from dualprune.solvers.base import Method


class DualpruneCallbacks:
    """Prune what an Ultralytics trainer trains: its model, and the EMA of it, which alone is validated and saved.

    The EMA is cut for every validation and checkpoint and goes on whole, so `best.pt` and `last.pt` always have the asked
    zeros. Ultralytics resumes from its EMA in half precision, and so approximately; the pruner's own state, `weights/
    dualprune.safetensors`, is exact. One process: Ultralytics does not take callbacks along to the ranks of a DDP run.

    Args:
        method: as for `attach`.
        calibrate: how many batches of the training loader batch norm is re-estimated with at the end; 0: none.
        observe: hand the training loss to the pruner: the sum over the batches of a step, whose gradient the optimizer gets
            here (the other trainers divide accumulated batches, and there it is the mean).
        options: as for `attach`; total_steps is counted from the trainer's epochs, warmup and accumulation unless given.

    Attributes:
        pruner: the `Pruner` of the training that runs or ran last; None before.
    """

    def __init__(self, method: Method, *, calibrate: int = 200, observe: bool = True, **options: Any) -> None:
        self.method, self.calibrate, self.observe, self.options = method, calibrate, observe, options
        self.pruner: Pruner | None = None
        self._ear: Any = None  # the hook on the optimizer that the losses are heard by
        self._heard: Any = None  # that optimizer
        self._losses: list[Tensor] = []  # of earlier batches, whose gradients wait for the optimizer
        self._whole: list[tuple[Tensor, Tensor]] = []  # the EMA's weights while they are cut

    @property
    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        """The functions by the events they belong to."""
        return {
            "on_train_start": self.on_train_start, "on_train_batch_start": self.on_train_batch_start,
            "on_train_epoch_end": self.on_train_epoch_end, "on_model_save": self.on_model_save,
            "on_fit_epoch_end": self.on_fit_epoch_end,
        }  # fmt: skip

    def add_to(self, model: Any) -> DualpruneCallbacks:
        """Add all of them to a `YOLO(…)`, or to a trainer; return self."""
        for event, function in self.callbacks.items():
            model.add_callback(event, function)
        return self

    def on_train_start(self, trainer: Any) -> None:
        """Attach to the trainer's optimizer; the EMA is made already."""
        if self.pruner is not None:
            self.pruner.detach()
            self._ear.remove()
        options = {"total_steps": None, **self.options}
        if options["total_steps"] is None and self.method.needs_total_steps:
            options["total_steps"] = optimizer_steps(trainer)
        self.pruner = attach(trainer.model, trainer.optimizer, self.method, **options)
        if trainer.start_epoch:
            load_state(self.pruner, Path(trainer.wdir) / STATE, "resume with the run's own folder, or train anew")
        self._listen(trainer)

    def on_train_batch_start(self, trainer: Any) -> None:
        """Keep the loss of the batch before while its gradient is kept: until the step, taken or left out by AMP's scaler.

        And follow the trainer to the optimizer that some versions make anew where they begin again with smaller batches.
        """
        if trainer.optimizer is not self._heard:
            self._running.follow(trainer.optimizer)
            self._ear.remove()
            self._listen(trainer)
        waiting = any(p.grad is not None for p in trainer.model.parameters())
        self._losses = [*self._losses, trainer.loss.detach()] if waiting else []

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Cut the EMA for validation and checkpoint; in the last epoch re-estimate its batch norm first."""
        pruner, average = self._running, trainer.ema.ema
        self._whole = snapshot(pruner, average)
        pruner.cut_average(average)
        if self.calibrate and trainer.epoch + 1 >= trainer.epochs:
            recalibrate_batch_norm(average, self._images(trainer))

    def on_model_save(self, trainer: Any) -> None:
        """Lay the pruner's state beside the checkpoint."""
        save_state(self._running, Path(trainer.wdir) / STATE)

    def on_fit_epoch_end(self, trainer: Any) -> None:
        """Let the EMA go on whole or, where training stops, cut the model too, for good."""
        if self._running.finished:  # the event comes once more, after the last evaluation
            return
        if trainer.stop:
            self._running.finish(calibrate=self._images(trainer) if self.calibrate else None)
        else:
            restore_(self._whole)
        self._whole = []

    @property
    def _running(self) -> Pruner:
        if self.pruner is None:
            raise DualpruneError("this training has not started: add all of the callbacks, before train()")
        return self.pruner

    def _listen(self, trainer: Any) -> None:
        self._heard = trainer.optimizer
        self._ear = self._heard.register_step_pre_hook(lambda *_: self._hear(trainer.loss))

    def _hear(self, loss: Tensor) -> None:
        if self.observe and not self._running.finished:
            self._running.observe(torch.stack([*self._losses, loss.detach()]).sum())

    def _images(self, trainer: Any) -> Iterator[Tensor]:
        for batch in islice(trainer.train_loader, self.calibrate):
            yield trainer.preprocess_batch(batch)["img"]


def optimizer_steps(trainer: Any) -> int:
    """Count the optimizer's steps of a whole run: Ultralytics accumulates batches, fewer of them while it warms up.

    Raises:
        DualpruneError: the run is limited by time, so that nobody knows.
    """
    if trainer.args.time:
        raise DualpruneError("train(time=…) has no known number of steps: pass total_steps=, or train(epochs=…)")
    batches = len(trainer.train_loader)
    warmup = round(max(min(trainer.args.warmup_epochs, trainer.epochs - 1), 0) * batches)
    steps, last = 0, -1
    for i in range(batches * trainer.epochs):
        ramp = np.interp(i, [0, warmup], [1, trainer.accumulate]).round() if warmup and i <= warmup else trainer.accumulate
        if i - last >= max(1, int(ramp)):
            steps, last = steps + 1, i
    return steps
