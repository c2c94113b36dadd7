"""Training images a second: this library's batches beside torchvision's own datasets and transforms under a DataLoader.

    python benchmarks/loaders.py --json loaders.json      # CIFAR-10 and an ImageNet sample from $DUALPRUNE_DATA

The same images, augmentation, batch size and number of workers on both sides, timed in turn; an "epoch" is the same part of
the training images for all. CIFAR-10 is augmented by the batch in memory here, image by image by torchvision; image
folders are decoded by worker processes on both sides.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import alternate, arguments, ratios, report, table
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from dualprune.tasks.classification import ArrayDataset, FolderDataset, load_data, train_batches

BATCH = 128


class Usual(Dataset[Any]):
    """Images one by one, as torchvision's datasets hand them out."""

    def __init__(
        self, items: list[tuple[Any, int]], opened: Callable[[Any], Image.Image], transform: Callable[[Any], Any]
    ) -> None:
        self.items, self.opened, self.transform = items, opened, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item, label = self.items[index]
        return self.transform(self.opened(item)), label


def usual_loader(data: ArrayDataset | FolderDataset, count: int, workers: int) -> DataLoader[Any]:
    """Return torchvision's way to the first `count` training images."""
    last = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    if isinstance(data, ArrayDataset):
        arrays = data.x_train[:count].permute(0, 2, 3, 1).contiguous().numpy()
        items = list(zip(arrays, data.y_train[:count].tolist(), strict=True))
        first, opened = transforms.RandomCrop(data.image_shape[1], padding=data.image_shape[1] // 8), Image.fromarray
    else:
        items, first, opened = list(data.train[:count]), transforms.RandomResizedCrop(data.image_size), default_loader
    dataset = Usual(items, opened, transforms.Compose([first, *last]))
    return DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers)


def our_batches(data: ArrayDataset | FolderDataset, count: int) -> Iterable[Any]:
    """Return this library's way to the same images."""
    return train_batches(data, batch_size=BATCH, seed=0, epoch=0, augment="crop-flip", indices=torch.arange(count))


def drain(batches: Iterable[Any]) -> None:
    """Take every batch and keep none."""
    deque(batches, maxlen=0)


def files() -> FolderDataset:
    """Return one ImageNet file a class as an image folder's training images, handed out at 224 pixels."""
    folder = Path(load_data("imagenet-sample", image_size=32).source) / "imagenet1k_sample"
    images = tuple((str(path), label) for label, path in enumerate(sorted(folder.glob("*.jpg"))))
    return FolderDataset("files", train=images, test=images, classes=tuple(Path(path).stem for path, _ in images))


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    memory, folder = load_data("cifar10"), files()
    small, large = (1_280, 128) if args.quick else (25_600, 896)
    ways: dict[str, dict[str, Callable[[], Iterable[Any]]]] = {
        f"{small:,} images of CIFAR-10, 32 pixels": {
            "dualprune, in memory": lambda: our_batches(memory, small),
            "torchvision, 0 workers": lambda: usual_loader(memory, small, 0),
            "torchvision, 2 workers": lambda: usual_loader(memory, small, 2),
        }
    }
    for n in (0, 2):
        ways[f"{large} JPEG files of ImageNet, 224 pixels, {n} workers"] = {
            "dualprune": lambda n=n: our_batches(replace(folder, workers=n), large),
            "torchvision": lambda n=n: usual_loader(folder, large, n),
        }
    figures: dict[str, Any] = {}
    for title, loaders in ways.items():
        seconds = alternate({name: lambda make=make: drain(make()) for name, make in loaders.items()}, 2 if args.quick else 5)
        ours, count = next(iter(loaders)), small if "CIFAR" in title else large
        rows = ratios(seconds, ours)
        table(f"{title}, over {ours}", rows)
        rates = {name: {"images_per_second": round(count / statistics.median(times))} for name, times in seconds.items()}
        figures[title] = {name: rates[name] | rows.get(name, {}) for name in loaders}
    report(args, "loaders", {"batch": BATCH, "loaders": figures})


if __name__ == "__main__":
    main()
