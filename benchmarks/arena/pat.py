"""PAT of torchao (`torchao.prototype.pat`), through its own API: an optimizer that wraps the loop's.

It keeps the weights as they would be without pruning, cuts them at every step to a sparsity that rises cubically, and
takes the gradients at the cut ones; for the last part of the run ("healing") the masks stay. The loop around it is that of
the other methods, and so are the dense model, the learning rates' course, the evaluation and the two epochs of retraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualprune import patterns
from dualprune.errors import DualpruneError
from dualprune.export import save_sparse
from dualprune.files import atomic_write, write_json
from dualprune.finish import recalibrate_batch_norm
from dualprune.loop import Job, Loop, build_optimizer, reproducible, train_dense
from dualprune.problem import Problem
from dualprune.progress import Progress, Silent
from dualprune.recipe import Recipe, digest
from dualprune.run_folder import device_name, earlier_result, make_folder, peak_memory, reset_peak_memory, versions
from dualprune.scope import build_problem
from dualprune.tasks import Task, build_task
from dualprune.train import pick_device

LABEL = "pat"
HEALS = (0.75, 0.9)  # where healing may start, as a fraction of the run


def trials(recipe: Recipe) -> list[dict[str, float]]:
    """Six of them, as for everybody else: the learning rates that gradual pruning may have, by where healing starts."""
    rates = list(dict.fromkeys(trial["lr"] for trial in recipe.method("gradual").trials))
    return [{"lr": lr, "heal": heal} for lr in rates for heal in HEALS][:6]


def run(
    recipe: Recipe,
    trial: Mapping[str, float],
    seed: int,
    root: Path,
    *,
    split: str = "test",
    dense_folder: Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do what `dualprune.train.run` does, with PAT in place of a method; a finished run is not redone, a broken one goes on."""
    place = root / f"{LABEL}-seed{seed}"
    identity = digest(recipe.deciding() | {"trial": dict(trial), "run_seed": seed, "split": split, "method": LABEL})
    made_of = {"method": f"PAT(heal={trial['heal']:g})", "weights_sha256": recipe.weights_sha256()}
    make_folder(place)
    if (finished := earlier_result(place, identity, made_of, lambda: _task(recipe, split, device).data_sha256())) is not None:
        return finished
    task = _task(recipe, split, device)
    made_of["data_sha256"] = task.data_sha256()
    job = Job(recipe, LABEL, seed, task, dense_folder or root, place, identity, made_of, progress or Silent())
    reset_peak_memory(job.device)
    with reproducible(job.device):
        return _run(job, trial)


def _task(recipe: Recipe, split: str, device: str | None) -> Task:
    return build_task(recipe, split, pick_device(device))


def _run(job: Job, trial: Mapping[str, float]) -> dict[str, Any]:
    recipe, settings = job.recipe, job.recipe.training
    steps = job.task.steps_per_epoch(settings.batch_size)
    model = job.task.model()
    if recipe.dense is not None:
        train_dense(job, model)
    prune = recipe.prune
    asked = {"rate": prune.rate, "sparsity": prune.sparsity, "patterns": recipe.patterns(), "ignore": prune.ignore}
    problem = build_problem(model, **asked, budget=prune.budget)
    heal = max(1, round(trial["heal"] * steps * settings.epochs))
    optimizer = wrapped(build_optimizer(settings, model, trial["lr"]), problem, heal)
    torch.manual_seed(job.seed)
    loop = Loop(job, settings, trial["lr"], settings.epochs, model, optimizer, job.seed, job.place, job.identity)
    if not loop.load():
        loop.report("dense")
    if loop.stage == "train":
        loop.fit()
        if (batches := loop.calibration()) is not None:
            recalibrate_batch_norm(model, batches)
        loop.report("cut")
        if prune.retrain_epochs:
            loop.begin("retrain", prune.retrain_epochs, prune.retrain_lr or loop.peak / 10)
    if loop.stage == "retrain":
        loop.fit()
        loop.report("retrained")
    result = _result(job, loop, problem, trial, model) | {"steps": settings.epochs * steps, "updates": heal}
    with atomic_write(job.place / "pruned.safetensors") as temporary:
        save_sparse(model, temporary)
    write_json(job.place / "result.json", result)
    return result


def wrapped(base: torch.optim.Optimizer, problem: Problem, heal: int) -> torch.optim.Optimizer:
    """Return PAT's optimizer around `base`: one constraint per layer, or one for all that share a threshold."""
    try:
        from torchao.prototype.pat.optim import PruneOptimizer
    except ImportError:
        raise DualpruneError("PAT is part of torchao; pip install torchao") from None
    (group,) = base.param_groups
    pruned = {id(target.weight) for target in problem.targets}
    rest = {**group, "params": [p for p in group["params"] if id(p) not in pruned]}
    base.param_groups.clear()
    for (kind, pooled, sparsity), weights in _budgets(problem).items():
        prox = "GlobalMinSparsityConstraint" if pooled else "MinSparsityConstraint"
        units = {"group_type": "Dim0Grouper"} if kind is patterns.Filter else {"group_type": "KElementGrouper", "k": 1}
        constraint = {"prox_type": prox, "min_sparsity": sparsity, "min_sparsity_schedule": True, "score_type": "l2"}
        base.add_param_group({**group, **units, **constraint, "params": weights})
    base.add_param_group(rest)
    return PruneOptimizer(base, healing_start_step=heal)  # type: ignore[no-any-return]


def _budgets(problem: Problem) -> dict[tuple[type, bool, float], list[nn.Parameter]]:
    budgets: dict[tuple[type, bool, float], list[nn.Parameter]] = {}
    for target in problem.targets:
        if not isinstance(target.pattern, patterns.Unstructured | patterns.Filter):
            raise DualpruneError(f"PAT is run on weights and filters here, not on {target.pattern}")
        budgets.setdefault((type(target.pattern), target.pooled, target.sparsity), []).append(target.weight)
    return budgets


def _result(job: Job, loop: Loop, problem: Problem, trial: Mapping[str, float], model: nn.Module) -> dict[str, Any]:
    recipe, metric = job.recipe, job.task.metrics[0]
    total = sum(w.numel() for w in problem.weights)
    kept = sum(int(torch.count_nonzero(w)) for w in problem.weights)
    everything = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    headline = {when: metrics[metric] for when, metrics in loop.notes.items()}
    return {
        "recipe": recipe.name, "label": LABEL, **job.made_of,
        "seed": job.seed, "split": job.task.split,
        "metric": f"{metric} %", "dense": headline["dense"], "cut": headline["cut"], "retrained": headline.get("retrained"),
        "metrics": loop.notes, "kept": kept, "total": total, "rate": total / max(1, kept),
        "rate_model": everything / max(1, everything - total + kept), "epochs": recipe.training.epochs,
        "batch_size": recipe.training.batch_size, "lr": trial["lr"], "seconds": round(loop.seconds, 2),
        "peak_memory_mb": round(peak_memory(job.device), 1), "versions": versions(), "device": device_name(job.device),
        "recipe_sha256": job.identity,
    }  # fmt: skip
