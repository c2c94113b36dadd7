"""What the trials of a small twin are judged on: training images that its subset leaves out, many times what it holds out.

A twin's own fifth is 2,000 images or 500, on which a score has a standard error of 0.8 points or 2: more than most settings
differ by. What the twin does not train on anyway costs a trial nothing but a few seconds.
"""

from __future__ import annotations

from pathlib import Path

from dualprune.recipe import Recipe
from dualprune.tasks import build_task
from dualprune.tasks.classification import data as images
from dualprune.tasks.classification.draws import draw, others
from dualprune.tasks.classification.metrics import accuracies
from dualprune.tasks.classification.models import load_weights
from dualprune.tasks.classification.sources import load_data
from dualprune.train import pick_device

COUNT = 10_000  # images at most


class Unseen:
    """Top-1 accuracy in % of the model in a run's folder, on up to `COUNT` images outside the recipe's subset.

    Args:
        recipe: of a classifier; its ``[data.options]`` have a subset.
        device: where to compute; a GPU if there is one by default.

    Attributes:
        count: how many images there are.
    """

    def __init__(self, recipe: Recipe, device: str | None = None) -> None:
        self.task = build_task(recipe, device=pick_device(device))
        options = dict(recipe.data.options)
        subset, seed = options.pop("subset"), options.get("seed", 0)
        whole = load_data(recipe.data.name, root=recipe.data.root, **options)
        labels = whole.labels("train")
        rest = others(draw(labels, subset, seed), len(labels))
        self.data = whole.hold_out(rest[draw(labels[rest], min(COUNT, len(rest)), seed)])
        self.count = len(self.data.labels("test"))

    def __call__(self, folder: Path) -> float:
        """Return the accuracy of the folder's pruned.safetensors, as the run left it."""
        model = self.task.model(with_weights=False)
        load_weights(model, folder / "pruned.safetensors")
        batches = images.eval_batches(self.data, device=self.task.device, memory_format=self.task.memory_format)
        return accuracies(model, batches)[1]


def unseen(recipe: Recipe, device: str | None = None) -> Unseen | None:
    """Return what judges a recipe's trials; None where nothing is left out, and the trials' own held-out part does."""
    return Unseen(recipe, device) if "subset" in recipe.data.options else None
