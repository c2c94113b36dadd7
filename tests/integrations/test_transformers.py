"""Hugging Face's Trainer: the same weights as a plain loop, exact resumption, losses of accumulated batches."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from trainers_helpers import (
    CLIP,
    EPOCHS,
    METHODS,
    OPTIONS,
    SIZE,
    STEPS,
    Classifier,
    Rows,
    adam,
    assert_same,
)  # fmt: skip

from dualprune import DualpruneError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers

from dualprune.integrations.transformers import DualpruneCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer's own, about pinned memory and what moves elsewhere


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Shares(Classifier):
    """Divides by the number of items in all accumulated batches, as language models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        output = super().forward(x, labels)
        if labels is not None and num_items_in_batch is not None:
            output["loss"] = output["loss"] * (len(x) / num_items_in_batch)
        return output


def pruning(name: str = "slr", **options: Any) -> DualpruneCallback:
    return DualpruneCallback(METHODS[name], **OPTIONS | options)


def train(
    folder: Any, callback: DualpruneCallback, model: Any = None, resume: Any = None, loss: Any = None, **options: Any
) -> Any:
    model = model or Classifier()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=SIZE, max_grad_norm=CLIP, use_cpu=True,
        report_to=[], disable_tqdm=True, remove_unused_columns=False,
        **{"save_strategy": "no", "logging_strategy": "no"} | options,
    )  # fmt: skip
    optimizer = adam(model)
    trainer = InOrder(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback], compute_loss_func=loss,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_the_same_as_a_plain_loop(name, tmp_path):
    callback = pruning(name)
    assert_same(train(tmp_path, callback).model, callback.pruner, name)


def test_the_same_with_accumulated_batches(tmp_path):
    callback = pruning()
    model = train(tmp_path, callback, gradient_accumulation_steps=2).model
    assert_same(model, callback.pruner, "slr", accumulate=2)


def test_shares_of_the_loss_are_added_up(tmp_path):
    mean, shares = pruning(), pruning()
    train(tmp_path, mean, gradient_accumulation_steps=2)
    train(tmp_path, shares, Shares(), gradient_accumulation_steps=2)
    found, wanted = ([row["loss"] for row in callback.pruner.history] for callback in (shares, mean))
    assert None not in found and found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("step", [STEPS // 2, STEPS])  # in the middle, and in the held tail
def test_a_resumed_training_ends_the_same(step, tmp_path):
    train(tmp_path, pruning(), save_strategy="epoch")
    saved = tmp_path / f"checkpoint-{step}"
    assert (saved / "dualprune.safetensors").is_file()
    callback = pruning()
    assert_same(train(tmp_path, callback, resume=str(saved)).model, callback.pruner, "slr")


def test_a_checkpoint_that_moved(tmp_path):
    train(tmp_path / "a", pruning(), save_strategy="epoch")
    moved = shutil.move(tmp_path / "a" / f"checkpoint-{STEPS // 2}", tmp_path / "moved")
    with pytest.raises(DualpruneError, match=r"state is not at .*resume_from="):
        train(tmp_path / "b", pruning(), resume=str(moved))
    callback = pruning(resume_from=moved)
    assert_same(train(tmp_path / "b", callback, resume=str(moved)).model, callback.pruner, "slr")
    (tmp_path / "moved" / "dualprune.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(DualpruneError, match="is damaged"):
        train(tmp_path / "b", pruning(resume_from=moved), resume=str(moved))


def other() -> Classifier:
    torch.manual_seed(1)
    model = Classifier()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) / 50)
    return model


def test_a_checkpoint_beside_that_of_another_run(tmp_path):
    """The same step of another run lies where this one writes: its state must not be mixed with these weights."""
    train(tmp_path / "a", pruning(), save_strategy="epoch")
    train(tmp_path / "b", pruning(), other(), save_strategy="epoch")
    saved = tmp_path / "a" / f"checkpoint-{STEPS // 2}"
    with pytest.raises(DualpruneError, match=r"b/checkpoint-12/.* saved with other weights .* resume_from="):
        train(tmp_path / "b", pruning(), resume=str(saved))
    callback = pruning()
    resumed = train(tmp_path / "b", callback, resume=str(saved), resume_from_checkpoint=str(saved))
    assert_same(resumed.model, callback.pruner, "slr")
    with pytest.raises(DualpruneError, match="another run or another step"):
        train(tmp_path / "c", pruning(resume_from=tmp_path / "a" / f"checkpoint-{STEPS}"), resume=str(saved))


def test_the_best_checkpoint_is_not_cut_with_a_later_mask(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    callback = pruning()
    with pytest.raises(DualpruneError, match="pass load_best_model_at_end=False"):
        train(tmp_path, callback, **options)
    assert callback.pruner is None


def test_sharded_weights_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("dualprune.integrations.transformers.refuse_shards", _refuse)
    with pytest.raises(DualpruneError, match="cut up"):
        train(tmp_path, pruning())


def _refuse(pruner: Any) -> None:
    raise DualpruneError("cut up")


def test_a_second_training_takes_over_the_optimizer(tmp_path):
    callback = pruning()
    trainer = train(tmp_path, callback)
    first = callback.pruner
    trainer.train()
    assert callback.pruner is not first and callback.pruner.step_count == STEPS
    assert not trainer.model._forward_hooks


def test_without_a_loss_of_the_model_none_is_observed(tmp_path):
    callback = pruning()
    trainer = train(tmp_path, callback, loss=lambda outputs, labels, **_: F.cross_entropy(outputs["logits"], labels))
    assert {row["loss"] for row in callback.pruner.history} == {None}
    assert int(trainer.model.net[3].weight.count_nonzero()) == round(trainer.model.net[3].weight.numel() / 5)
    assert torch.isfinite(trainer.model.net[3].weight).all()
