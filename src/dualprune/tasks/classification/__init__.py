"""Image classification: models by name, small data sets in memory, image folders, and accuracy."""

from dualprune.tasks.classification.data import (
    ArrayDataset,
    FolderDataset,
    ImageData,
    calibration_batches,
    eval_batches,
    split_validation,
    steps_per_epoch,
    train_batches,
)
from dualprune.tasks.classification.metrics import accuracies, accuracy
from dualprune.tasks.classification.models import build_model, load_weights, model_names
from dualprune.tasks.classification.sources import load_data

__all__ = [
    "ArrayDataset",
    "FolderDataset",
    "ImageData",
    "accuracies",
    "accuracy",
    "build_model",
    "calibration_batches",
    "eval_batches",
    "load_data",
    "load_weights",
    "model_names",
    "split_validation",
    "steps_per_epoch",
    "train_batches",
]
