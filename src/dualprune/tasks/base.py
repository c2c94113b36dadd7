"""What the training loop asks of a task: a model, batches, a loss, a metric and pictures. Pruning knows nothing of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dualprune.errors import DualpruneError

if TYPE_CHECKING:
    import numpy as np

    from dualprune.recipe import Recipe
    from dualprune.recipe_tables import OptimizerTable

Batch = tuple[Any, Any]  # (inputs, targets): the model is called with the inputs, `loss` reads the targets
SPLITS = ("test", "validation")


class Task(ABC):
    """One recipe's data and model on one device; the data are read when they are first needed.

    Args:
        recipe: its ``[model]``, ``[data]`` and ``[training]`` tables say what to build.
        split: what `measure` measures on: "test", or "validation", a part of the training data that is then not trained on.
        device: where batches and models go.

    Attributes:
        metrics: the keys of what `measure` returns. The first one is the run's accuracy: in %, higher is better. So are the
            others, unless the task says otherwise.
        teacher: the dense model, frozen, where the recipe has ``[training.distill]``: `loss` learns from it too.
    """

    metrics: ClassVar[tuple[str, ...]]

    def __init__(self, recipe: Recipe, split: str, device: torch.device) -> None:
        self.recipe, self.split, self.device = recipe, split, device
        self.teacher: Callable[..., Any] | None = None

    @abstractmethod
    def model(self, *, with_weights: bool = True) -> nn.Module:
        """Build ``[model]`` on the device, in the recipe's memory format; starting weights are loaded if wanted."""

    @abstractmethod
    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches `train_batches` yields in an epoch."""

    @abstractmethod
    def train_batches(self, *, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield one epoch of shuffled, augmented batches from `start_step` on: a pure function of the arguments."""

    @abstractmethod
    def loss(self, forward: Callable[..., Any], batch: Batch, settings: OptimizerTable) -> Tensor:
        """Return the mean training loss of a batch, a 0-dim tensor with its graph; `forward` is the (compiled) model."""

    def share(self, batch: Batch, start: int, stop: int) -> Batch:
        """Return the samples from `start` up to `stop` of a batch: what one of several devices trains on.

        Every tensor and list in the batch is taken to have one entry a sample. A task whose batches hold something else, such
        as the boxes of all images in one tensor, says here which of it belongs to these samples.

        Raises:
            DualpruneError: something in the batch is no tensor or list of one entry a sample.
        """
        return _cut(batch, len(batch[0]), slice(start, stop))

    @abstractmethod
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics, in %, of the model as it is; in eval mode, with every module's mode put back."""

    @abstractmethod
    def calibration(self, samples: int) -> Iterator[Any]:
        """Yield batches of up to `samples` training inputs without augmentation, for re-estimating batch norm."""

    def data_sha256(self) -> str | None:
        """Return a hash of what the data are, wherever they lie and whatever the split; None where the task cannot say."""
        return None

    def final_metrics(self, model: nn.Module) -> dict[str, float]:
        """Return figures too dear for every epoch, in %: measured once on the dense and once on the finished model."""
        return {}

    def score(self, model: nn.Module) -> float:
        """Return what the best epoch is chosen by, in %, on samples that are neither trained on nor measured on."""
        raise NotImplementedError(f"{type(self).__name__} holds out no samples to choose an epoch by")

    def pictures(self, model: nn.Module) -> list[tuple[str, np.ndarray]]:
        """Return (title, uint8 image of shape (height, width, 3)) pairs of what the model predicts; the report shows them."""
        return []

    def autocast(self) -> torch.autocast:
        """Return the autocast context of ``[training] precision``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.training.precision == "bfloat16")

    @property
    def memory_format(self) -> torch.memory_format:
        """Channels last where the recipe says so."""
        return torch.channels_last if self.recipe.training.channels_last else torch.contiguous_format


def _cut(item: Any, count: int, part: slice) -> Any:
    if isinstance(item, tuple):
        return tuple(_cut(one, count, part) for one in item)
    if not isinstance(item, Tensor | list) or len(item) != count:
        held = f"a {type(item).__name__}" + (f" of {len(item)} entries" if isinstance(item, Tensor | list) else "")
        raise DualpruneError(
            f"several devices share a batch of {count} samples, but it holds {held}, not one entry a sample: give the task a "
            "`share` that says what of it belongs to which samples"
        )
    return item[part]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; afterwards every module has its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
