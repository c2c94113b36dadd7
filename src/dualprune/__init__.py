"""Make trained PyTorch models many times smaller without retraining them.

    pruner = dualprune.attach(model, optimizer, dualprune.SLR(), rate=10, total_steps=len(loader) * epochs)
    ...your loop...
    pruner.finish(calibrate=loader)

Names are loaded on first use, so that importing the package costs nothing beyond what is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "pruner": ("Pruner", "attach"),
    "budget": ("compression_rate",),
    "errors": ("DualpruneError", "FormatError", "NonFiniteError"),
    "export": ("load_sparse", "save_sparse"),
    "finish": ("recalibrate_batch_norm",),
    "layerwise": ("LayerwiseReport", "prune_layerwise"),
    "patterns": ("NM", "Block", "Channel", "Column", "Filter", "Kernel", "Unstructured", "parse_pattern", "project"),
    "kernel_pattern": ("KernelPattern",),
    "ties": ("tied_filters",),
    "removal": ("ShrinkReport", "load_shrunk", "save_shrunk", "shrink", "shrink_report", "silence"),
    "sparsity": ("sparsity_report",),
    "schedules": ("Closing", "Constant", "Geometric"),
    "solvers": ("ACDC", "ADMM", "SAFE", "SLR", "GradualMagnitude", "Magnitude", "Reweighted", "RigL", "perturbed"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dualprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dualprune.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
