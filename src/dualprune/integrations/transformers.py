"""Pruning as a callback of Hugging Face's Trainer: `Trainer(…, callbacks=[DualpruneCallback(SLR(), rate=10)])`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dualprune.errors import DualpruneError
from dualprune.integrations.common import STATE, Batches, batches, load_state, refuse_shards, save_state
from dualprune.pruner import Pruner, attach
from dualprune.solvers.base import Method

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise DualpruneError(f"this callback needs transformers ({error}): pip install 'dualprune[transformers]'") from error


class DualpruneCallback(TrainerCallback):
    """Prune the model that a Trainer trains; it is cut when training ends.

    Every checkpoint folder gets a file more, `dualprune.safetensors`, from which `resume_from_checkpoint` goes on exactly.

    Args:
        method: as for `attach`.
        calibrate: how many batches of the training loader batch norm is re-estimated with at the end (0: none), or batches.
        observe: hand the training loss to the pruner: the one the model itself returns. Where something else computes it
            (label smoothing, `compute_loss_func`) none is seen, and the surrogate test does without.
        resume_from: the checkpoint folder, where it is neither `args.resume_from_checkpoint` nor
            `output_dir/checkpoint-<step>`: a Trainer does not tell its callbacks what it resumes from.
        options: as for `attach`; total_steps is the Trainer's `max_steps` unless given.

    Attributes:
        pruner: the `Pruner` of the training that runs or ran last; None before.
    """

    def __init__(
        self, method: Method, *, calibrate: Batches = 200, observe: bool = True, resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.method, self.calibrate, self.observe = method, calibrate, observe
        self.resume_from, self.options = resume_from, options
        self.pruner: Pruner | None = None
        self._ear: Any = None
        self._losses: list[Tensor] = []  # of the step under way, one a batch
        self._shares = False
        self._sharers = 1  # ranks whose items `num_items_in_batch` counts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *,
        model: nn.Module, optimizer: Optimizer, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Attach; the model and the optimizer are loaded and prepared by now.

        Raises:
            DualpruneError: `load_best_model_at_end`, or a resumed training without a pruner's state of the same weights.
        """
        if args.load_best_model_at_end:
            raise DualpruneError(
                "load_best_model_at_end=True brings back the weights that were best before they were cut, often early and "
                "dense ones, and the mask held at the end would cut those: pass load_best_model_at_end=False, and choose "
                "among finished models"
            )
        self._let_go()
        batches(self.calibrate, kwargs["train_dataloader"])
        self.pruner = attach(model, optimizer, self.method, **{"total_steps": state.max_steps, **self.options})
        refuse_shards(self.pruner)
        self._sharers = args.world_size if args.average_tokens_across_devices else 1
        if state.global_step:
            advice = "pass DualpruneCallback(…, resume_from=the checkpoint's folder)"
            load_state(self.pruner, self._resumed(args, state) / STATE, advice, exact=True)
        if self.observe:
            self._ear = model.register_forward_hook(self._hear, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the losses of the step: those of accumulated batches, or their sum where each brings its share.

        The pruner takes the mean over ranks, so a share of all ranks' items counts once for each of them.
        """
        if self.pruner is not None:
            for loss in [torch.stack(self._losses).sum() * self._sharers] if self._shares else self._losses:
                self.pruner.observe(loss)
        self._losses, self._shares = [], False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lay the pruner's state beside the checkpoint that was just written."""
        if self.pruner is not None and args.should_save:
            save_state(self.pruner, _checkpoint(args, state) / STATE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Cut for good."""
        if self._ear is not None:
            self._ear.remove()
            self._ear = None
        if self.pruner is not None:
            self.pruner.finish(calibrate=batches(self.calibrate, kwargs["train_dataloader"]))

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        named = args.resume_from_checkpoint
        return Path(named) if named and Path(named).is_dir() else _checkpoint(args, state)

    def _hear(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.numel() == 1 and model.training and torch.is_grad_enabled():
            self._losses.append(loss.detach().reshape(()).clone())  # the Trainer scales it in place
            self._shares = kwargs.get("num_items_in_batch") is not None

    def _let_go(self) -> None:
        """Take leave of an earlier training, such as one that ran out of memory and begins again."""
        if self._ear is not None:
            self._ear.remove()
        if self.pruner is not None:
            self.pruner.detach()
        self._losses, self._shares = [], False


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
