"""Image classification as a task: cross-entropy on labelled images, top-1 accuracy (and top-5 among many classes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualprune.errors import DataNotFoundError, DualpruneError
from dualprune.tasks.base import Batch, Task, evaluating
from dualprune.tasks.classification import data as images
from dualprune.tasks.classification.attacks import Attack, Pixels, build_attack, robustness
from dualprune.tasks.classification.metrics import accuracies
from dualprune.tasks.classification.models import build_model, has_folded_batch_norm, load_weights, unfold_batch_norm
from dualprune.tasks.classification.sources import load_data, trees_sha256

if TYPE_CHECKING:
    from dualprune.recipe_tables import OptimizerTable

MANY_CLASSES = 20  # from here on top-5 says something
UNFOLDING = 1024  # images that give folded batch norms their statistics


class Classification(Task):
    """Images and labels by name; `data` is read when it is first needed."""

    metrics = ("top-1", "top-5")

    @cached_property
    def data(self) -> Any:
        """The images; small data sets live on the GPU, where their batches are made."""
        table = self.recipe.data
        data: Any = load_data(table.name, root=table.root, **table.options)
        self._sha256 = trees_sha256(table.name, table.root) or data.sha256()
        if self.split == "validation":
            data = images.split_validation(data, table.validation, seed=self.recipe.seed)
        on_gpu = self.device.type == "cuda" and isinstance(data, images.ArrayDataset)
        return data.to(self.device) if on_gpu else data

    @cached_property
    def trained(self) -> Any:
        """The data as they are trained on; a part is held out once more, as its test part, where it chooses the epoch."""
        if self.recipe.training.keep == "last":
            return self.data
        return images.split_validation(self.data, self.recipe.data.validation, seed=self.recipe.seed)

    def data_sha256(self) -> str:
        """Return a hash of the whole data; images that would have to be decoded first go by their files."""
        if "data" not in self.__dict__ and (listed := trees_sha256(self.recipe.data.name, self.recipe.data.root)):
            return listed
        _ = self.data
        return self._sha256

    def model(self, *, with_weights: bool = True) -> nn.Module:  # noqa: D102
        table = self.recipe.model
        options: dict[str, Any] = {**self._sizes(), **table.options}
        torch.manual_seed(self.recipe.seed)
        model = build_model(table.name, pretrained=table.pretrained and with_weights, **options)
        path = self.recipe.weights_path() if with_weights else None
        if path is not None:
            load_weights(model, path)
        model = model.to(self.device).to(memory_format=self.memory_format)
        with suppress(DataNotFoundError):
            self._check_fit(model)
        if path is not None and has_folded_batch_norm(model):
            # a dry run may do without data, and then nothing is trained
            with suppress(DataNotFoundError):
                unfold_batch_norm(model, self.calibration(UNFOLDING))
        return model

    def steps_per_epoch(self, batch_size: int) -> int:  # noqa: D102
        return images.steps_per_epoch(self.trained, batch_size)

    def train_batches(self, *, batch_size: int, seed: int, epoch: int, start_step: int = 0) -> Iterator[Batch]:  # noqa: D102
        settings: dict[str, Any] = {"device": self.device, "memory_format": self.memory_format}
        order: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "start_step": start_step}
        return images.train_batches(self.trained, augment=self.recipe.data.augment, **order, **settings)

    def loss(self, forward: Callable[..., Any], batch: Batch, settings: OptimizerTable) -> Tensor:  # noqa: D102
        x, y = batch
        if self._adversary is not None:
            # crafted on the plain model: a compiled one would also compute the parameters' gradients at every step
            model: Any = getattr(forward, "_orig_mod", forward)
            with self.autocast():
                x = self._adversary(model, x, y, self._pixels)
        with self.autocast():
            scores = forward(x)
        loss = F.cross_entropy(scores.float(), y, label_smoothing=settings.label_smoothing)
        return loss if self.teacher is None else self._distilled(loss, scores.float(), x)

    def _distilled(self, loss: Tensor, scores: Tensor, x: Tensor) -> Tensor:
        """Mix in T²·KL(teacher ‖ model) of the answers softened by the temperature T (Hinton et al. 2015, section 2)."""
        table = self.recipe.training.distill
        assert table is not None and self.teacher is not None
        with torch.no_grad(), self.autocast():
            taught = self.teacher(x).float()
        soft, target = (F.log_softmax(t / table.temperature, dim=1) for t in (scores, taught))
        apart = F.kl_div(soft, target, log_target=True, reduction="batchmean")
        return (1 - table.weight) * loss + table.weight * table.temperature**2 * apart

    def measure(self, model: nn.Module) -> dict[str, float]:  # noqa: D102
        topk = (1, 5) if self.data.num_classes >= MANY_CLASSES else (1,)
        batches = images.eval_batches(self.data, device=self.device, memory_format=self.memory_format)
        return {f"top-{k}": value for k, value in accuracies(model, batches, topk=topk).items()}

    def score(self, model: nn.Module) -> float:
        """Return the top-1 accuracy on `trained`'s held-out part; under the training's attack where there is one."""
        batches = images.eval_batches(self.trained, device=self.device, memory_format=self.memory_format)
        if (table := self.recipe.training.adversarial) is None:
            return accuracies(model, batches)[1]
        attack = build_attack(replace(table.spec, crafting="eval"))
        return robustness(model, batches, {"training": attack}, self._pixels, seed=self.recipe.seed)["training"]

    def final_metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracies under the attacks of ``[robust]``, in float32, on images drawn once for all models."""
        table = self.recipe.robust
        if table is None:
            return {}
        attacks = {name: build_attack(spec) for name, spec in self.recipe.attacks().items()}
        total = len(self.data.labels("test"))
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[: table.images or total].sort().values
        batches = images.eval_batches(self.data, indices=drawn, device=self.device, memory_format=self.memory_format)
        return robustness(model, batches, attacks, self._pixels, seed=self.recipe.seed)

    @cached_property
    def _adversary(self) -> Attack | None:
        table = self.recipe.training.adversarial
        return build_attack(table.spec) if table else None

    @property
    def _pixels(self) -> Pixels:
        return Pixels(tuple(self.data.mean), tuple(self.data.std))

    def calibration(self, samples: int) -> Iterator[Any]:  # noqa: D102
        return images.calibration_batches(self.trained, samples, device=self.device, memory_format=self.memory_format)

    def _check_fit(self, model: nn.Module) -> None:
        """Refuse a model that cannot take the data's images or has no score for some of their classes."""
        shape, classes, name = self.data.image_shape, self.data.num_classes, self.recipe.model.name
        x = torch.zeros(2, *shape, device=self.device).contiguous(memory_format=self.memory_format)
        try:
            with torch.no_grad(), evaluating(model):
                scores = model(x)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise DualpruneError(f"[model] {name} cannot take images of shape {shape}, as the data's are: {reason}") from error
        if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < classes:
            came = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise DualpruneError(
                f"[model] {name}: expected scores (2, {classes} or more), as the data have {classes} classes, "
                f"got {came}; set num_classes in [model] options, or leave it out"
            )

    def _sizes(self) -> dict[str, int]:
        """What the data say about the model's sizes; nothing where they are not at hand: the model then has its own."""
        try:
            data = self.data
        except DataNotFoundError:
            return {}
        channels, side, _ = data.image_shape
        return {"num_classes": data.num_classes, "in_channels": channels, "image_size": side}
