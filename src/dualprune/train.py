"""A recipe's run: build, attach, train, cut, measure, write; the library never needs it.

Killed at any instant and started again with the same command, a run ends with the same weights, masks and history, bit
for bit, as one that was not (`loop`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dualprune
from dualprune import distributed
from dualprune.errors import DataNotFoundError, DualpruneError
from dualprune.files import atomic_write, write_json, write_jsonl, write_text
from dualprune.loop import Job, Loop, build_optimizer, halved, reproducible, train_dense
from dualprune.progress import Progress, Silent
from dualprune.recipe import Recipe, check_seed
from dualprune.report import render_run
from dualprune.run_folder import (
    device_name,
    earlier_result,
    make_folder,
    peak_memory,
    render,
    reset_peak_memory,
    saving,
    versions,
    wipe,
    write_heatmaps,
)
from dualprune.tasks import build_task
from dualprune.tasks.classification.models import load_weights


def run(
    recipe: Recipe,
    label: str,
    *,
    seed: int | None = None,
    out: str | Path = "runs",
    folder: str | Path | None = None,
    split: str = "test",
    resume: bool = True,
    progress: Progress | None = None,
    tensorboard: bool = False,
    device: str | torch.device | None = None,
    dense_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Prune the recipe's model by one method with one seed; a finished run is not redone, a broken one goes on.

    Started by torchrun, its processes share every batch, and rank 0 writes (docs/distributed.md).

    Args:
        recipe: What to run.
        label: The method's name in the recipe.
        seed: Seeds the order of the data and its augmentation; the recipe's seed if None.
        out: The run lies in ``out/<recipe.name>/<label>-seed<seed>``.
        folder: The recipe's folder, in place of ``out/<recipe.name>``.
        split: ``"test"``, or ``"validation"``: train without a held-out part of the training images and measure on it.
        resume: Continue or reuse what is in the folder; False starts again once everything is built, but for a model of
            ``[dense]``.
        progress: Told about steps and epochs.
        tensorboard: Also write TensorBoard events into the run folder.
        device: Where to compute; a GPU if there is one by default.
        dense_folder: Where a model of ``[dense]`` is kept for other runs; the recipe's folder by default.

    Returns:
        The contents of result.json.

    Raises:
        DualpruneError: the recipe cannot be run here, or the folder holds another run: of other settings, another method
            (a default that has changed since), other starting weights, other data.
        RunError: the run stopped; the message says where, and what is kept.
        Interrupted: Ctrl-C.
    """
    seed = check_seed(recipe.seed if seed is None else seed)
    root = Path(folder) if folder is not None else Path(out) / recipe.name
    place = root / f"{label}-seed{seed}"
    identity = recipe.fingerprint(label, seed, split)
    made_of: dict[str, str | None] = {"method": repr(recipe.method(label).build()), "weights_sha256": recipe.weights_sha256()}
    where = pick_device(device)
    with distributed.job(where) as ranks:
        if ranks.size > 1 and recipe.training.adversarial is not None:
            raise DualpruneError("adversarial training crafts its attacks on one process: run this recipe without torchrun")
        task = build_task(recipe, split, where)
        if ranks.first:
            make_folder(place)
        reusing = ranks.first and resume
        finished = ranks.shared(earlier_result(place, identity, made_of, task.data_sha256) if reusing else None)
        if finished is not None:
            if ranks.first:
                render(place)
            return finished
        cache = Path(dense_folder) if dense_folder is not None else root
        made_of["data_sha256"] = task.data_sha256()
        progress = progress if progress is not None and ranks.first else Silent()
        job = Job(recipe, label, seed, task, cache, place, identity, made_of, progress, ranks, resume)
        reset_peak_memory(job.device)
        with reproducible(job.device):
            return _run(job, tensorboard)


def dry_run(recipe: Recipe, label: str) -> str:
    """What `run` would prune: the table of layers, patterns and budgets; nothing is trained.

    Where the data are not at hand, the model has its own sizes, and where the weights are not those that will be pruned, a
    global budget will share otherwise: the text says so.
    """
    task, note = build_task(recipe), ""
    try:
        task.steps_per_epoch(recipe.training.batch_size)
    except DataNotFoundError as error:
        note = f"\n(the model has its own sizes: {error})"
    stood_in = recipe.dense is not None or (recipe.model.pretrained and recipe.model.weights is None)
    if stood_in and recipe.prune.budget in ("global", "lamp"):
        what = "[dense] trains" if recipe.dense is not None else "pretrained = true loads"
        note += f"\n(a global budget follows the weights, and these are not those that {what}: a run shares it otherwise)"
    model = task.model(with_weights=recipe.model.weights is not None)
    optimizer = build_optimizer(recipe.training, model, recipe.lr(label))
    pruner = _attach(recipe, label, model, optimizer, steps=100, epochs=recipe.epochs(label))
    try:
        return pruner.summary() + note
    finally:
        pruner.detach()


def evaluate(recipe: Recipe, weights: str | Path, *, device: str | torch.device | None = None) -> dict[str, Any]:
    """Measure a (sparse or dense) weights file on the recipe's test set.

    Returns:
        accuracy (%, the task's first metric), metrics (all of them), kept and total (weights of two or more dimensions),
        rate, bytes (the file's), report (a table).
    """
    task = build_task(recipe, device=pick_device(device))
    model = task.model(with_weights=False)
    load_weights(model, weights)
    metrics = task.measure(model)
    report = dualprune.sparsity_report(model)
    figures = {"accuracy": metrics[task.metrics[0]], "metrics": metrics}
    figures |= {"kept": report.kept, "total": report.total, "rate": report.rate}
    return {**figures, "bytes": Path(weights).stat().st_size, "report": str(report)}


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU if there is one; one that is not here is an error."""
    gpu = f"cuda:{distributed.local_rank()}" if distributed.launched() else "cuda"
    wanted = device or (gpu if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # an AssertionError is torch's way to say "built without CUDA"
        reason = str(error).splitlines()[0]
        raise DualpruneError(f"--device: {wanted!r} cannot be used here; try cpu ({reason})") from error
    return torch.device(wanted)


def bfloat16_is_spelt_out(device: torch.device) -> bool:
    """Whether the processor has no instructions for bfloat16, so that its arithmetic takes longer than float32's."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # not in PyTorch 2.5
        return False
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not (has.get("avx512_bf16") or has.get("amx_bf16"))


# --- one run ------------------------------------------------------------------------------------------------


def _run(job: Job, tensorboard: bool) -> dict[str, Any]:
    recipe, task = job.recipe, job.task
    if recipe.training.precision == "bfloat16" and bfloat16_is_spelt_out(task.device):
        job.progress.note("this processor has no bfloat16 instructions: --set training.precision=float32 is likely faster")
    spe, epochs = task.steps_per_epoch(recipe.training.batch_size), recipe.epochs(job.label)
    if recipe.method(job.label).build().sharpness:
        spe = halved(spe)
    model = task.model()
    if recipe.dense is not None:
        train_dense(job, model)
    job.ranks.copy_(model)
    if recipe.training.distill is not None:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        task.teacher = torch.compile(teacher) if recipe.training.compile else teacher
    layers_before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}
    optimizer = build_optimizer(recipe.training, model, recipe.lr(job.label))
    torch.manual_seed(job.seed + (job.ranks.rank << 32))  # each rank drops other activations
    pruner = _attach(recipe, job.label, model, optimizer, steps=spe, epochs=epochs)
    loop = Loop(job, recipe.training, recipe.lr(job.label), epochs, model, optimizer, job.seed, job.place, job.identity)
    loop.pruner = pruner
    writer = _tensorboard() if tensorboard and job.ranks.first else None
    try:
        if job.ranks.first:
            with saving(job.place):
                if not job.resume:  # only now that nothing of the recipe can be wrong any more
                    wipe(job.place)
                write_text(job.place / "recipe.toml", recipe.to_toml())
                loop.writer = writer and writer(job.place / "tensorboard")
        if not loop.load():
            loop.report("dense")
            job.progress.note(f"{job.label}: dense {task.metrics[0]} {loop.notes['dense'][task.metrics[0]]:.2f} %")
            if task.split == "validation" and recipe.dense is None:
                job.progress.note("the starting weights may know the held-out samples: scores for choosing settings only")
        if loop.stage == "train":
            loop.fit()
            loop.back_to_best()
            with loop.diverging():
                pruner.finish(calibrate=loop.calibration())
                loop.report("cut")
            if recipe.prune.retrain_epochs:
                loop.begin("retrain", recipe.prune.retrain_epochs, recipe.prune.retrain_lr or loop.peak / 10)
        if loop.stage == "retrain":
            loop.fit()
            loop.back_to_best()
            with loop.diverging():
                loop.report("retrained")
        result: dict[str, Any] = {}
        if job.ranks.first:
            with saving(job.place):
                result = _write_results(job, loop, spe, layers_before)
                render_run(job.place)
        return job.ranks.shared(result)
    finally:
        job.progress.end()
        pruner.detach()
        if loop.writer is not None:
            loop.writer.close()


def _write_results(job: Job, loop: Loop, spe: int, before: dict[str, Tensor]) -> dict[str, Any]:
    """Write the run's files, result.json last: it is what says that the run is finished."""
    recipe, pruner, place = job.recipe, loop.pruner, job.place
    write_jsonl(place / "epochs.jsonl", loop.rows)
    write_jsonl(place / "history.jsonl", pruner.history)
    sparse = place / "pruned.safetensors"
    with atomic_write(sparse) as temporary:
        dualprune.save_sparse(loop.model, temporary)
    layers = pruner.layers
    write_heatmaps(place / "heatmaps.safetensors", layers, before, loop.model)
    kept, total = (sum(layer[key] for layer in layers) for key in ("kept", "total"))
    everything = sum(p.numel() for p in loop.model.parameters() if p.ndim > 1)
    kept_everything = everything - total + kept
    epochs = recipe.epochs(job.label)
    headline = {when: metrics[job.task.metrics[0]] for when, metrics in loop.notes.items()}
    result = {
        "recipe": recipe.name,
        "label": job.label,
        "method": job.made_of["method"],
        "seed": job.seed,
        "task": recipe.task,
        "metric": f"{job.task.metrics[0]} %",
        "split": job.task.split,
        "dense": headline["dense"],
        "cut": headline["cut"],
        "retrained": headline.get("retrained"),
        "metrics": loop.notes,
        "kept": kept,
        "total": total,
        "rate": total / max(1, kept),
        "kept_model": kept_everything,
        "total_model": everything,
        "rate_model": everything / max(1, kept_everything),
        "budget": recipe.prune.budget,
        "importance": recipe.importance(job.label),
        "epochs": epochs,
        **({"chosen_epochs": loop.chosen} if recipe.training.keep == "best" else {}),
        "retrain_epochs": recipe.prune.retrain_epochs,
        "steps": epochs * spe,
        "updates": len(pruner.history),
        "batch_size": recipe.training.batch_size,
        "lr": recipe.lr(job.label) if epochs else None,
        "seconds": round(loop.seconds, 2),
        "peak_memory_mb": round(peak_memory(job.device), 1),
        "versions": versions(),
        "device": device_name(job.device) + (f", {job.ranks.size} ranks" if job.ranks.size > 1 else ""),
        "recipe_sha256": job.identity,
        **{key: job.made_of[key] for key in ("weights_sha256", "data_sha256")},
        "command": recipe.command(job.label, job.seed, job.task.split),
        "paper": recipe.paper,
        "layers": layers,
        "sizes": {
            "dense_bytes": sum(t.numel() * t.element_size() for t in loop.model.state_dict().values()),
            "sparse_bytes": sparse.stat().st_size,
        },
    }
    write_json(place / "result.json", result)
    return result


# --- building -----------------------------------------------------------------------------------------------


def _attach(recipe: Recipe, label: str, model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, epochs: int) -> Any:
    """Attach the recipe's method for `epochs` of `steps` each."""
    method, prune = recipe.method(label), recipe.prune
    every = max(1, round(steps / method.updates_per_epoch)) if method.updates_per_epoch else None
    return dualprune.attach(
        model,
        optimizer,
        method.build(),
        rate=prune.rate,
        sparsity=prune.sparsity,
        patterns=recipe.patterns(),
        ignore=prune.ignore,
        budget=prune.budget,
        importance=recipe.importance(label),
        keep_zeros=prune.keep_zeros,
        ties=prune.ties,
        bits=prune.bits,
        every=every,
        total_steps=max(1, steps * epochs),
    )


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise DualpruneError("TensorBoard is not installed; pip install 'dualprune[tensorboard]'") from None
    return SummaryWriter
