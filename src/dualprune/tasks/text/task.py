"""Language modelling as a task: cross-entropy of the next byte, measured by how often it is guessed and in bits."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualprune.errors import DualpruneError, NonFiniteError
from dualprune.tasks.base import Batch, Task, evaluating
from dualprune.tasks.classification.models import load_weights
from dualprune.tasks.options import read_options
from dualprune.tasks.text import data as texts
from dualprune.tasks.text.model import GPT

if TYPE_CHECKING:
    from dualprune.recipe_tables import OptimizerTable

_EVAL_BATCH = 64
_MOST_NATS = math.log(sys.float_info.max)  # the exponential of more is no number


@dataclass(frozen=True)
class ModelOptions:
    """``[model] options``; see `GPT`."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    length: int = 128
    dropout: float = 0.0


@dataclass(frozen=True)
class DataOptions:
    """``[data] options``: `windows`, how many an epoch is made of; None: as many as the text has bytes for."""

    windows: int | None = None

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 1:
            raise DualpruneError(f"[data] options: windows is how many an epoch is made of, at least 1; got {self.windows}")


class Text(Task):
    """A GPT on bytes; the text is mapped when it is first needed.

    `measure` returns the accuracy of the next character (a byte) in %, and two figures for which lower is better and which
    are no percentages: bits per character and perplexity, 2 to the power of it.
    """

    metrics = ("next character", "bits per character", "perplexity")

    @cached_property
    def options(self) -> ModelOptions:
        """``[model] options``, checked."""
        return read_options(ModelOptions, self.recipe.model.options, "[model] options")

    @cached_property
    def data_options(self) -> DataOptions:
        """``[data] options``, checked."""
        return read_options(DataOptions, self.recipe.data.options, "[data] options")

    @cached_property
    def data(self) -> texts.Corpus:
        """The text, its end held out where the split is "validation"."""
        _, table = self.data_options, self.recipe.data
        data = texts.load_text(table.name, table.root)
        self._sha256 = data.sha256()
        return data.hold_out(table.validation) if self.split == "validation" else data

    def data_sha256(self) -> str:  # noqa: D102
        _ = self.data
        return self._sha256

    def model(self, *, with_weights: bool = True) -> nn.Module:  # noqa: D102
        table = self.recipe.model
        if table.name != "gpt" or table.pretrained:
            raise DualpruneError(f"the text model's name is 'gpt', and there is no pretrained one; got {table.name!r}")
        torch.manual_seed(self.recipe.seed)
        model = GPT(**asdict(self.options))
        path = self.recipe.weights_path() if with_weights else None
        if path is not None:
            load_weights(model, path)
        return model.to(self.device)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return in how many batches the `windows` of an epoch are seen, or as many bytes as there are; at least one."""
        windows = self.data_options.windows or len(self.data.train) // self.options.length
        return max(1, windows // batch_size)

    def train_batches(self, *, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield batches of windows that begin anywhere."""
        random = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        steps, length = self.steps_per_epoch(batch_size), self.options.length
        starts = self.data.draws(length, steps * batch_size, random).view(steps, batch_size)
        for part in starts[start_step:]:
            yield self._to_device(texts.windows(self.data.train, part, length))

    def loss(self, forward: Callable[..., Any], batch: Batch, settings: OptimizerTable) -> Tensor:  # noqa: D102
        x, y = batch
        with self.autocast():
            scores = forward(x)
        return F.cross_entropy(scores.float().flatten(0, 1), y.flatten(), label_smoothing=settings.label_smoothing)

    def measure(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        hits, nats, count = 0, 0.0, 0
        with torch.inference_mode(), evaluating(model):
            for batch in texts.in_order(self.data.test, self.options.length, _EVAL_BATCH):
                x, y = self._to_device(batch)
                scores = model(x).float()
                hits += int((scores.argmax(-1) == y).sum())
                nats += float(F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum"))
                count += y.numel()
        if not count:
            raise DualpruneError(
                f"{self.data.name}: {len(self.data.test)} bytes to measure on are no window of {self.options.length}"
            )
        mean = nats / count
        if not mean < _MOST_NATS:
            raise NonFiniteError(f"the loss on the text to measure on is {mean:.4g} nats a byte, beyond any perplexity")
        figures = (100 * hits / count, mean / math.log(2), math.exp(mean))
        return dict(zip(self.metrics, figures, strict=True))

    def calibration(self, samples: int) -> Iterator[Any]:  # noqa: D102
        random = torch.Generator().manual_seed(self.recipe.seed)
        for part in self.data.draws(self.options.length, samples, random).split(self.recipe.training.batch_size):
            yield self._to_device(texts.windows(self.data.train, part, self.options.length))[0]

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)
