"""Epochs of training that can stop after any step and go on from there, bit for bit: the loop under `train`.

The order of the data, its augmentation and the learning rate are functions of (seed, epoch, step), and everything else that
changes is in one checkpoint that is either whole or not there.
"""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dualprune
from dualprune.distributed import Ranks
from dualprune.errors import DualpruneError, FormatError, NonFiniteError
from dualprune.files import atomic_write, read_json, write_json, write_jsonl
from dualprune.progress import Progress
from dualprune.recipe import Recipe, digest
from dualprune.recipe_tables import OptimizerTable
from dualprune.run_folder import (
    CHECKPOINT_VERSION,
    Diverged,
    RunError,
    make_folder,
    read_checkpoint,
    saving,
    what_is_kept,
    write_pictures,
)
from dualprune.tasks import Task
from dualprune.tasks.base import Batch
from dualprune.tasks.classification.models import load_weights


class Interrupted(DualpruneError):
    """Ctrl-C: the step in progress was finished and the run saved; the same command continues it."""


@dataclass
class Job:
    """What is fixed while a run goes."""

    recipe: Recipe
    label: str
    seed: int
    task: Task
    cache: Path
    place: Path
    identity: str
    made_of: dict[str, str | None]  # method, weights_sha256, data_sha256: what the identity does not see
    progress: Progress
    ranks: Ranks = Ranks()
    resume: bool = True

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.task.device


def train_dense(job: Job, model: nn.Module) -> None:
    """Load the recipe's dense model into `model`, training it first if no run of the same settings has."""
    recipe, dense = job.recipe, job.recipe.dense
    assert dense is not None
    settings = recipe.model_dump(mode="json", include={"task", "model", "data", "dense", "seed"})
    shared = {"precision", "channels_last", "compile", "adversarial"}  # what [dense] takes from [training]
    shared |= {"keep"} if recipe.training.keep != "last" else set()  # younger than many a dense model
    settings |= {"training": recipe.training.model_dump(mode="json", include=shared), "split": job.task.split}
    settings["data"].pop("root")
    if recipe.model.weights is not None:
        settings["weights_sha256"] = recipe.weights_sha256()
    identity, data = digest(settings), job.task.data_sha256()
    # a folder of a version that did not look at the data is taken at its word
    if data is not None and not job.ranks.shared((job.cache / f"dense-{identity[:12]}").exists()):
        identity = digest(settings | {"data_sha256": data})
    place = job.cache / f"dense-{identity[:12]}"
    saved = place / "dense.safetensors"
    if not job.ranks.shared(saved.exists()):
        if job.ranks.first:
            make_folder(place)
        torch.manual_seed(recipe.seed)
        optimizer = build_optimizer(dense, model, dense.lr)
        loop = Loop(job, dense, dense.lr, dense.epochs, model, optimizer, recipe.seed, place, identity)
        loop.load()
        loop.fit()
        loop.back_to_best()
        if job.ranks.first:
            with saving(place), atomic_write(saved) as temporary:
                save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
    if job.ranks.first:
        try:
            load_weights(model, saved)
        except FormatError as error:
            raise FormatError(
                f"the dense model cannot be read ({error}); delete the folder {place} to train it again"
            ) from error


@dataclass
class Loop:
    """Epochs of training that can stop after any step and go on from there, bit for bit."""

    job: Job
    settings: OptimizerTable
    peak: float
    epochs: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seed: int
    place: Path
    identity: str
    pruner: Any = None
    writer: Any = None
    # what moves, and is in the checkpoint
    stage: str = "train"
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics, dense, cut and retrained
    best: dict[str, Any] | None = None  # the stage's best epoch so far, where the recipe keeps that in place of the last
    chosen: dict[str, int] = field(default_factory=dict)  # by stage, the epoch that was gone back to
    _pending: list[Tensor] = field(default_factory=list)
    _losses_read: int = 0
    _logged: int = 0

    @property
    def checkpoint(self) -> Path:
        """The file that everything that moves is saved to."""
        return self.place / "checkpoint.pt"

    @property
    def dense(self) -> bool:
        """Whether this is the training of the dense model, which is everybody's."""
        return self.place != self.job.place

    @property
    def title(self) -> str:
        """What is trained here, for people."""
        return "dense" if self.dense else f"{self.job.label} seed {self.seed}" + " retraining" * (self.stage == "retrain")

    @property
    def sharpness(self) -> float:
        """How far uphill gradients are taken; dense training and retraining are everybody's own and take them in place."""
        return self.pruner.method.sharpness if self.pruner is not None and self.stage == "train" else 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; half as many where a step takes two gradients."""
        steps = self.job.task.steps_per_epoch(self.settings.batch_size)
        return halved(steps) if self.sharpness else steps

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        spe, settings = self.steps_per_epoch, self.settings
        if self.stage == "retrain":  # what is retrained is warm
            settings = settings.model_copy(update={"warmup_epochs": 0.0})
        return settings.lr_at(self.epoch * spe + self.step, self.epochs * spe, spe, self.peak)

    def begin(self, stage: str, epochs: int, peak: float) -> None:
        """Start another stage on the same model, optimizer and masks."""
        self.stage, self.epochs, self.peak, self.epoch, self.step, self.loss_sum = stage, epochs, peak, 0, 0, 0.0
        self.best = None
        self.save()

    def back_to_best(self) -> None:
        """Go back to the best epoch of the stage, where the recipe keeps that in place of the last."""
        if self.best is None:
            return
        self.model.load_state_dict(self.best["model"])
        self.optimizer.load_state_dict(self.best["optimizer"])
        if self.pruner is not None:
            history = self.pruner.history
            self.pruner.load_state_dict(self.best["pruner"])
            self.pruner.history = history  # what was is not undone
        self.chosen[self.stage] = epoch = self.best["epoch"]
        self.job.progress.note(f"{self.title}: epoch {epoch} is kept, {self.best['score']:.2f} % on what was held out for it")

    @contextmanager
    def diverging(self) -> Iterator[None]:
        """Say of what is NaN or infinite where it was, and what is kept."""
        try:
            yield
        except NonFiniteError as error:
            kind = RunError if self.dense else Diverged  # without its dense model no method can go on
            raise kind(f"{self.title}: {error}; {what_is_kept(self.checkpoint)}; try a lower lr, or clip_norm") from error

    def fit(self) -> None:
        """Train to the end of the stage; save at every epoch's end, every few minutes, and on Ctrl-C."""
        recipe, spe, progress = self.job.recipe, self.steps_per_epoch, self.job.progress
        # compiling the callable, not the module, keeps the state_dict's keys
        wrapped = self.job.ranks.wrap(self.model)
        forward = torch.compile(wrapped) if recipe.training.compile else wrapped
        saved = time.monotonic()
        progress.begin(self.title, self.epochs * spe, self.epoch * spe + self.step)
        try:
            with self.diverging(), _interrupts() as interrupted:
                while self.epoch < self.epochs:
                    self.model.train()
                    began = time.monotonic()
                    for batch in self._batches():
                        self._one_step(forward, batch)
                        self.epoch_seconds += time.monotonic() - began
                        if self._asked(interrupted.is_set()):
                            self._stop()
                        if self._asked(time.monotonic() - saved > 60 * recipe.training.checkpoint_minutes):
                            self.save()
                            saved = time.monotonic()
                        began = time.monotonic()
                    self._end_epoch()
                    saved = time.monotonic()
                    if self.job.ranks.any(interrupted.is_set()):
                        self._stop()
        finally:
            progress.end()

    def _batches(self) -> Iterator[Batch]:
        # retraining draws its own orders, after those of the pruning epochs
        epoch = self.epoch + (10_000 if self.stage == "retrain" else 0)
        order: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "start_step": self.step}
        batches = self.job.task.train_batches(batch_size=self.settings.batch_size, **order)
        return islice(batches, self.steps_per_epoch - self.step)

    def _one_step(self, forward: Callable[..., Any], batch: Batch) -> None:
        """The whole of a training step; what dualprune asks of it is `observe`, and even that is optional."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        batch, weight = self.job.ranks.share(batch, self.job.task.share)
        loss = self._loss(forward, batch, weight)
        self._note_loss(loss.detach())
        loss.backward()
        if self.sharpness:
            with dualprune.perturbed(self.optimizer, self.sharpness, self.pruner.dropped):
                self._loss(forward, batch, weight).backward()
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        if self.pruner is not None:
            self.pruner.observe(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _loss(self, forward: Callable[..., Any], batch: Batch, weight: float) -> Tensor:
        loss = self.job.task.loss(forward, batch, self.settings)
        return loss if weight == 1 else loss * weight

    def _asked(self, here: bool) -> bool:
        """Tell whether any rank asks for something now; several ask each other only now and then, as it takes a message."""
        if self.job.ranks.size == 1:
            return here
        return self.step % STEPS_BETWEEN_QUESTIONS == 0 and self.job.ranks.any(here)

    def _note_loss(self, loss: Tensor) -> None:
        self._pending.append(loss)
        # reading a loss waits for the device, so a GPU's are read in bunches
        if self.job.device.type == "cpu" or len(self._pending) >= 25:
            self._read_losses()

    def _read_losses(self) -> None:
        """Add the pending losses to the epoch's sum; a NaN or infinite one stops the run before it is saved."""
        if not self._pending:
            return
        values, first = torch.stack(self._pending).tolist(), self._losses_read + 1
        self._pending.clear()
        for number, value in enumerate(values, first):
            if not math.isfinite(value):
                raise NonFiniteError(f"the loss is {value} at step {number} of epoch {self.epoch + 1}")
            self.loss_sum += value
            self._losses_read = number
            self.job.progress.step(value)

    def _wait(self) -> None:
        """Read what losses are pending; the wait for the device is time of this epoch."""
        began = time.monotonic()
        self._read_losses()
        self.epoch_seconds += time.monotonic() - began

    def _end_epoch(self) -> None:
        self._wait()
        every = self.job.recipe.training.measure_every
        due = (self.epoch + 1) % every == 0 or self.epoch + 1 == self.epochs
        accuracy, cut, score = self._measured() if due else (None, None, None)
        row = {
            "epoch": len(self.rows) + 1,
            "step": (self.rows[-1]["step"] if self.rows else 0) + self.step,
            "stage": self.stage,
            "loss": self.job.ranks.mean(self.loss_sum) / max(1, self.step),
            "lr": self.optimizer.param_groups[0]["lr"],
            "accuracy": accuracy,
            "accuracy_cut": cut,
            "seconds": round(self.epoch_seconds, 2),
        }
        if score is not None:
            row["held_out"] = score
            self._keep_best(score, row["epoch"])
        self.rows.append(row)
        self.seconds += self.epoch_seconds
        self.epoch, self.step, self.loss_sum, self.epoch_seconds, self._losses_read = self.epoch + 1, 0, 0.0, 0.0, 0
        self.save()
        if self.job.ranks.first:
            with saving(self.place):
                self.write_rows()
        self.job.progress.epoch(row)

    def _measured(self) -> tuple[float | None, float | None, float | None]:
        """Return the accuracy as it is, or as it would be cut; and what the best epoch is chosen by, if it is.

        With split "test" the accuracies are for plots only: no choice is made from them.
        """
        if self.pruner is None:
            return self.measure(), None, self._score()
        if self.stage == "retrain":
            return None, self.measure(), self._score()
        with self.job.task.autocast(), self.pruner.evaluate(calibrate=self.calibration()):
            return None, self.measure(), self._score()

    def _score(self) -> float | None:
        if self.job.recipe.training.keep == "last":
            return None
        with self.job.task.autocast():
            return self.job.task.score(self.model)

    def _keep_best(self, score: float, epoch: int) -> None:
        """Keep all of this epoch if none was better; once masks are fixed, epochs before that are none to go back to."""
        fixed = self.pruner is not None and self.pruner.holding
        if self.best is not None and self.best["fixed"] == fixed and self.best["score"] > score:
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"pruner": self.pruner.state_dict()} if self.pruner is not None else {}
        self.best = {"score": score, "epoch": epoch, "fixed": fixed, **copy.deepcopy(state)}

    def _stop(self) -> None:
        self.save()
        where = f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"the end of epoch {self.epoch}"
        without = "" if self.job.resume or self.dense else " without --fresh"
        raise Interrupted(f"interrupted and saved at {where} ({self.checkpoint}); the same command{without} continues the run")

    def measure(self) -> float:
        """The task's first metric (%) of the model as it is, at the training's precision: for curves."""
        with self.job.task.autocast():
            return self.job.task.measure(self.model)[self.job.task.metrics[0]]

    def report(self, when: str) -> None:
        """Note all metrics of the model as it is, in float32, and draw what it predicts."""
        task = self.job.task
        self.notes[when] = self._dense_metrics() if when == "dense" else self._all_metrics()
        if self.job.ranks.first:
            with saving(self.place):
                write_pictures(self.place, when, task.pictures(self.model))

    def _all_metrics(self) -> dict[str, float]:
        return self.job.task.measure(self.model) | self.job.task.final_metrics(self.model)

    def _dense_metrics(self) -> dict[str, float]:
        """Measure the dense model once for all methods and seeds that share its folder: attacks take long."""
        job, recipe, data = self.job, self.job.recipe, self.job.task.data_sha256()
        if data is None:  # nobody could tell whether they have changed
            return self._all_metrics()
        of = recipe.model_dump(mode="json", include={"task", "model", "data", "robust", "seed"})
        of["training"] = recipe.training.model_dump(mode="json", include={"channels_last", "adversarial"})
        of |= {"split": job.task.split, "weights": _state_sha256(self.model), "data_sha256": data, "device": job.device.type}
        del of["data"]["root"]
        kept = job.cache / f"measured-{digest(of)[:12]}.json"
        found: dict[str, float] | None = job.ranks.shared(read_json(kept) if job.ranks.first and job.resume else None)
        if found is not None:
            return found
        metrics = self._all_metrics()
        if job.ranks.first:
            with saving(self.place):
                write_json(kept, metrics)
        return metrics

    def calibration(self) -> Iterator[Any] | None:
        """This rank's batches for re-estimating batch norm, or None where the recipe wants none."""
        samples = self.job.recipe.prune.calibrate
        return self.job.ranks.turn(self.job.task.calibration(samples) if samples else None)

    def write_rows(self) -> None:
        """Write the epochs and the updates so far, for people and for plots."""
        write_jsonl(self.place / "epochs.jsonl", self.rows)
        if self.pruner is not None:
            write_jsonl(self.place / "history.jsonl", self.pruner.history)
        if self.writer is not None:
            _log(self.writer, self.rows[-1], self.pruner.history[self._logged :])
            self._logged = len(self.pruner.history)

    def save(self) -> None:
        """Write the checkpoint; weights that are not finite are never saved over good ones."""
        self._wait()
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteError(f"{name} is not finite after step {self.step} of epoch {self.epoch + 1}")
        state = {
            "version": CHECKPOINT_VERSION,
            "identity": self.identity,
            **(self.job.made_of if self.identity == self.job.identity else {}),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner is not None else {},
            "rng": torch.get_rng_state(),
            "rng_device": torch.cuda.get_rng_state(self.job.device) if self.job.device.type == "cuda" else None,
            **{name: getattr(self, name) for name in _MOVING},
        }
        # what every rank has of its own: its losses since the last update and in this epoch, its random numbers
        own = {"observed": state["pruner"].get("loss_sum"), **{name: state[name] for name in ("loss_sum", "rng", "rng_device")}}
        state["ranks"] = self.job.ranks.gathered(own)
        if self.job.ranks.first:
            with saving(self.place), atomic_write(self.checkpoint) as temporary:
                torch.save(state, temporary)

    def load(self) -> bool:
        """Continue from the checkpoint in the folder, if there is one of this run."""
        ranks = self.job.ranks
        remedy = (f"delete the folder {self.place} to train the dense model again",) if self.dense else ()
        state = ranks.shared(read_checkpoint(self.checkpoint, *remedy) if ranks.first else None)
        if state is None or state["identity"] != self.identity:
            return False
        there = state.get("ranks", [{}])
        state |= share_of(there, ranks)
        if state["observed"] is not None:
            state["pruner"]["loss_sum"] = state["observed"]
        self.model.load_state_dict(state["model"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in _MOVING:
            setattr(self, name, state.get(name, getattr(self, name)))  # `best` and `chosen` are younger than the format
        self._losses_read = self.step
        if self.pruner is not None and self.rows:
            self._logged = sum(update["step"] <= self.rows[-1]["step"] for update in self.pruner.history)
        torch.set_rng_state(state["rng"])
        if self.job.device.type == "cuda" and state["rng_device"] is not None:
            torch.cuda.set_rng_state(state["rng_device"], self.job.device)
        self.job.progress.note(f"continuing {self.place} after epoch {self.epoch}, step {self.step}")
        return True


STEPS_BETWEEN_QUESTIONS = 20
_MOVING = (
    *("stage", "peak", "epochs", "epoch", "step", "loss_sum", "seconds", "epoch_seconds", "rows", "notes"),
    *("best", "chosen"),
)


def share_of(saved: list[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """Return what a rank takes up: its own where there are as many ranks as before, else mean losses and some rank's draws."""
    mine = {"observed": None, **saved[ranks.rank % len(saved)]}
    if len(saved) != ranks.size:
        mine["loss_sum"] = sum(own["loss_sum"] for own in saved) / len(saved)
        if mine["observed"] is not None:
            mine["observed"] = torch.stack([own["observed"] for own in saved]).mean()
    return mine


def build_optimizer(settings: OptimizerTable, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the settings on all parameters that are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    shared: dict[str, Any] = {"lr": lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.nesterov, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](parameters, **shared)


def halved(steps: int) -> int:
    """Return the steps of an epoch whose steps take two gradients: as many gradients as everybody else's."""
    return max(1, steps // 2)


# --- signals, the random state and TensorBoard ------------------------------------------------------------


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    earlier = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic convolutions and a private random state; the caller's come back afterwards."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    devices = [device] if device.type == "cuda" else []
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def _state_sha256(model: nn.Module) -> str:
    """SHA-256 (hex) of a model's names, shapes and values."""
    seen = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        seen.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        seen.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def _log(writer: Any, row: dict[str, Any], updates: list[dict[str, Any]]) -> None:
    for key in ("loss", "lr", "accuracy", "accuracy_cut"):
        if row[key] is not None:
            writer.add_scalar(f"epoch/{key}", row[key], row["step"])
    for update in updates:
        for key, value in update.items():
            if isinstance(value, int | float) and key not in ("step", "update"):
                writer.add_scalar(f"update/{key}", value, update["step"])
    writer.flush()
