"""Hugging Face's Trainer on two ranks: the loss the pruner sees is the one of both, however the model divides it."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

import dualprune

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BATCH, UPDATES = 16, 3


class Mean(nn.Module):
    """Returns the mean over the rank's batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.third(self.second(self.first(x).relu()).relu()), labels)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(x, labels)}


class Share(Mean):
    """Divides by the items of all ranks and accumulated batches, as language models do."""

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        loss = self.loss(x, labels)
        return {"loss": loss if num_items_in_batch is None else loss * (len(x) / num_items_in_batch)}


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, generator=generator), "labels": torch.tensor(i % 4)} for i in range(count)]


def observed(folder: Any, model: nn.Module, batch: int, data: list[dict[str, Tensor]], **options: Any) -> list[float]:
    import transformers

    from dualprune.integrations.transformers import DualpruneCallback

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    callback = DualpruneCallback(dualprune.SLR.paper(), rate=2, every=1)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=UPDATES, per_device_train_batch_size=batch, use_cpu=True, report_to=[],
        disable_tqdm=True, remove_unused_columns=False, save_strategy="no", logging_strategy="no", **options,
    )  # fmt: skip
    InOrder(model, arguments, train_dataset=data, callbacks=[callback]).train()
    return [row["loss"] for row in callback.pruner.history]


CASES: dict[str, tuple[type[Mean], dict[str, Any]]] = {
    "mean": (Mean, {}),
    "share": (Share, {}),
    "share of the rank": (Share, {"average_tokens_across_devices": False}),
    "share, accumulated": (Share, {"gradient_accumulation_steps": 2}),
}


def on_ranks(rank: int, size: int, folder: Any) -> dict[str, list[float]]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    os.environ.update({k: str(v) for k, v in place.items()})
    warnings.simplefilter("ignore")
    found = {}
    for name, (kind, options) in CASES.items():
        count = 2 * BATCH * UPDATES * options.get("gradient_accumulation_steps", 1)
        found[name] = observed(folder, kind(), BATCH, rows(count), **options)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Trainer's own
def test_the_observed_loss_is_that_of_all_ranks(tmp_path):
    ranks = run(on_ranks, 2, tmp_path, tmp_path)
    for name, (_, options) in CASES.items():
        step = 2 * BATCH * options.get("gradient_accumulation_steps", 1)
        alone = observed(tmp_path, Mean(), step, rows(step * UPDATES))
        for found in ranks:
            assert found[name] == pytest.approx(alone, rel=1e-4), name
