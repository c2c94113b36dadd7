"""Attach a pruning method to a training loop through the optimizer's step hooks, and nothing else."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dualprune import distributed, sharded
from dualprune.budget import compression_rate
from dualprune.distributed import count_nonzero, local
from dualprune.errors import DualpruneError, NonFiniteError
from dualprune.finish import batch_norm_restored, cut_, recalibrate_batch_norm
from dualprune.importance import SecondMoment, check_importance
from dualprune.patterns import KernelPattern
from dualprune.problem import Problem, check_frozen
from dualprune.quantise import Held, fit_scale, snap
from dualprune.scope import Rule, build_problem, parameter_name
from dualprune.solvers import ADMM, SLR, GradualMagnitude, Magnitude
from dualprune.solvers.base import OF_OPTIMIZER, Clock, Method, Row, Store
from dualprune.solvers.vector import all_finite
from dualprune.stride import Stride

logger = logging.getLogger("dualprune")

FORMAT = "dualprune-pruner"
VERSION = 1
_META = {"method", "every", "total_steps", "step_count", "finished", "scalars", "loss_count", "history", "targets"}
_attached: WeakSet[Optimizer] = WeakSet()


def attach(
    model: nn.Module,
    optimizer: Optimizer | None,
    method: Method,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    patterns: Mapping[str, Rule] | None = None,
    ignore: Iterable[str] | None = None,
    budget: str = "uniform",
    importance: str | None = None,
    bits: int | Mapping[str, int] | None = None,
    every: int | None = None,
    total_steps: int | None = None,
    state_dtype: torch.dtype | None = None,
    state_device: str | torch.device | None = None,
    keep_zeros: bool = False,
    ties: Iterable[Iterable[str]] | None = None,
    process_group: Any = None,
    check_replicas: bool = False,
) -> Pruner:
    """Start pruning `model` inside the loop that `optimizer` steps in.

    Args:
        model: any module, wrapped or compiled or neither; its state_dict keys and forward are never touched.
        optimizer: the optimizer of the loop; None only for `Magnitude()`, which needs no loop.
        method: `SLR()`, `ADMM()`, `Reweighted()`, `GradualMagnitude()`, `Magnitude()`, `RigL()`, `ACDC()` or `SAFE()`.
        rate: how many times fewer weights in the pruned layers (10 keeps a tenth); or
        sparsity: the fraction removed (0.9). Without either, only what `patterns` names is pruned.
        patterns: globs over parameter names → "2:4", Filter(), 0.9 or (pattern, sparsity); the first match decides.
            What None for `ignore` leaves alone is reached by its exact name, or its module's, and by no wildcard.
        ignore: globs left alone; None leaves the first and last layer and what is no layer's weight, such as position
            embeddings (and says so); () prunes every parameter of two or more dimensions.
        budget: how `rate` spreads over layers: "uniform", "erk", "global" (one threshold for all) or "lamp" (one threshold
            over shares of a layer's energy, which empties no layer).
        importance: what ranks the weights: "magnitude" |w|; "adaptive" v^¼·|w|, with v the running mean of squared gradients
            (the optimizer's own, or one kept here: a tensor a weight); "second-moment" √v·|w| (ELSA, Lee et al. 2025). None:
            the method's own, "adaptive" for `SLR()` and "magnitude" for the others (docs/how-to-choose.md).
        bits: 2 to 8 for weights that end on a grid of so many bits as well (docs/quantisation.md): a number for all that is
            pruned, or globs → numbers. Held weights follow the steps from level to level; after finish() they stay.
        every: optimizer steps between updates of multipliers or masks; None takes the method's own.
        total_steps: optimizer steps of the whole run; needed by methods with schedules (the defaults have them).
        state_dtype: dtype of Z and Λ, of 16, 32 or 64 bits, such as torch.bfloat16 to halve them; None: that of the weights.
        state_device: where Z and Λ live, such as "cpu"; None: beside the weights. They are fetched at each step.
        keep_zeros: weights that are zero now stay zero from here on, and count towards the rate: pruning goes on from a
            pruned model. Without it every zero may come back.
        ties: lists of names of parameters whose units (filters, channels, …) stay or go together, as where a network adds
            their outputs; `tied_filters(model, example)` finds them.
        process_group: the torch.distributed group that trains this model (docs/distributed.md); None: that of
            DistributedDataParallel, or all ranks; False: this rank trains a model of its own.
        check_replicas: at every update, compare hashes of weights and state over the ranks, and stop where they differ.

    Raises:
        DualpruneError: anything above is out of range, or a pruner is attached to this optimizer already.
    """
    if not isinstance(method, Method):
        hint = f"; did you mean {method.__name__}()?" if isinstance(method, type) and issubclass(method, Method) else ""
        raise DualpruneError(f"expected a method such as SLR(), got {method!r}{hint}")
    if not isinstance(model, nn.Module):
        raise DualpruneError(f"attach(model, optimizer, method): expected a torch module, got {type(model).__name__}")
    distributed.check_model(model)
    if optimizer is None and not isinstance(method, Magnitude):
        raise DualpruneError(f"{type(method).__name__} works through an optimizer's steps: pass the one of your loop")
    if optimizer is not None:
        optimizer = _innermost(optimizer)
        _check_optimizer(optimizer, method)
    importance = check_importance(method.importance if importance is None else importance)
    total_steps = _check_steps("total_steps", total_steps)
    if method.needs_total_steps and total_steps is None:
        raise DualpruneError(f"{type(method).__name__} moves with the run: pass total_steps=epochs * len(loader)")
    every = _check_steps("every", every) or _default_every(method, total_steps)
    _check_room(method, every, total_steps)
    _check_state_dtype(state_dtype)
    trainable = None if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    problem = build_problem(
        model, rate=rate, sparsity=sparsity, patterns=patterns, ignore=ignore, budget=budget, bits=bits, trainable=trainable,
        keep_zeros=keep_zeros, ties=ties,
    )  # fmt: skip
    if importance != "magnitude":
        ranked = [t.weight for t in problem.targets]
        problem.importance = SecondMoment(importance, optimizer, ranked, state_dtype, state_device)
    cut = [t.name for t in problem.targets if distributed.span(t.weight)]
    if cut and not isinstance(method, SLR | ADMM | GradualMagnitude | Magnitude):
        raise DualpruneError(f"{type(method).__name__} needs whole weights, {cut[0]} is cut up over ranks: use SLR(), or DDP")
    described = problem.describe()
    if distributed.first(process_group):
        _say(described)
    pruner = Pruner(model, optimizer, method, problem, every, total_steps, Store(state_dtype, state_device))
    pruner.process_group, pruner.checks_replicas = process_group, check_replicas
    return pruner


class Pruner:
    """One pruning run on one model; made by `attach`.

    Attributes:
        history: one dict per update (JSON-able): step, update, rho, s, violation ‖W − Z‖, conditions, loss, sparsity, …
        step_count: optimizer steps seen.
        finished: whether the weights are cut for good and the masks held.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, method: Method, problem: Problem,
        every: int, total_steps: int | None, store: Store,
    ) -> None:  # fmt: skip
        self.model, self.optimizer, self.method, self.problem = model, optimizer, method, problem
        self.every, self.total_steps = every, total_steps
        self.history: list[Row] = []
        self.step_count = 0
        self.finished = False
        self.process_group: Any = None
        self.checks_replicas = False
        self._evaluating = False
        self._watched = -1  # the last step whose gradients the importance has seen
        self._step_at: FrameType | None = None  # where torch called the hook before the step that is going on
        self._zeros_are_few = problem.frozen is None  # checked before anything moves, but not on the way to a loaded state
        self._drops: list[Tensor] | None = None  # True = dropped; set while masks are on
        self._grids: dict[str, Held] = {}  # of quantised weights, from the hold or the cut on
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0
        with torch.no_grad():
            self._require_finite_weights()
            self.solver = method.start(problem, store)
            if self.solver.masks_weights:
                self._drops = self.solver.tensors["drop"]
                for drop, zeros in zip(self._drops, problem.frozen or (), strict=problem.frozen is not None):
                    drop |= zeros
        self._hooks: list[Any] = []
        if optimizer is not None:
            self._hook(optimizer)

    # ------------------------------------------------------------------ during training

    @property
    def progress(self) -> float:
        """How far the run is, in [0, 1]; 0 throughout without total_steps."""
        return min(1.0, self.step_count / self.total_steps) if self.total_steps else 0.0

    def observe(self, loss: Tensor | float) -> None:
        """Hand in the training loss of this step, so that the surrogate test (eq. 6) sees it; never waits for the device."""
        loss = distributed.whole(torch.as_tensor(loss).detach())
        if loss.numel() != 1:
            raise DualpruneError(f"observe expects one loss a step, got a tensor of shape {tuple(loss.shape)}")
        self._loss_sum = self._loss_sum + loss.reshape(()).float()
        self._loss_count += 1

    @torch.no_grad()
    def update(self) -> Row:
        """Move Z, Λ, s and ρ (or the masks) once, now, and record a row of history; on several ranks, all call it.

        Raises:
            NonFiniteError: the loss or a weight is NaN or infinite; nothing was changed.
            DualpruneError: replicas are compared, and one differs.
        """
        if self.holding:
            raise DualpruneError("the masks are fixed: there is nothing to update after finish() or during the hold")
        if self._evaluating:
            raise DualpruneError("update() inside evaluate(): the weights there are cut copies, leave the context first")
        self._require_few_zeros()
        loss = self._mean_loss()
        if self.checks_replicas:  # before anything that one rank alone may raise: the others would wait for its hashes
            distributed.check_replicas(self._replicated(), self._group)
        self._require_finite_weights()
        self._require_own_weights()
        row = self.solver.update(Clock(loss, self.progress, self._stride(), self._steps_since_update()))
        if self._drops is not None:
            cut_(self.problem.weights, self._drops)
        return self._record(row, loss)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = sys._getframe(1)
        if _is_within(call, self._step_at):
            return  # of a class whose step() calls super().step(), for which torch calls the hooks again
        self._step_at = call
        if kwargs.get("closure") is not None or any(a is not None and a is not optimizer for a in args):
            raise DualpruneError(
                f"{type(optimizer).__name__}.step was called with a closure: its gradients are computed after the penalty "
                "must be added. Call loss.backward() and then step() without a closure (LBFGS cannot be used)"
            )
        if self._evaluating:
            raise DualpruneError("optimizer.step() inside pruner.evaluate(): the weights there are cut copies, step outside")
        self._require_few_zeros()
        if not self.step_count:
            self._require_own_weights()
        if self.holding:
            return
        with torch.no_grad():
            scale = getattr(optimizer, "grad_scale", None)
            if self.problem.importance is not None and self._watched != self.step_count:
                # the loss's gradients, before the penalty's; a step that fails and is tried again counts once
                self._watched = self.step_count if self.problem.importance.watch(scale) else -1
            if self.solver.penalises:
                self.solver.penalty_(scale)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sys._getframe(1) is self._step_at:
            self._step_at = None
            with torch.no_grad():
                self._follow_step(optimizer)

    def _follow_step(self, optimizer: Optimizer) -> None:
        self.step_count += 1
        if self.solver.decoupled and not self.holding:
            self.solver.pull_()
        drops = self.problem.frozen if self._drops is None else self._drops
        if drops is not None:
            cut_(self.problem.weights, drops)
        self._return_to_grid()
        if self.holding:
            return
        if self.progress >= self.method.hold_from:
            self._hold()
        elif self.step_count % self.every == 0 and not _overflowed(optimizer):
            self.update()

    @property
    def holding(self) -> bool:
        """Whether the masks are fixed and held: in the last part of the run, or after `finish`."""
        return self._drops is not None and (self.finished or not self.solver.masks_weights)

    def _hold(self) -> None:
        self._require_finite_weights()
        masks = self.problem.masks(self.problem.weights)
        self._drops = [~m for m in masks]
        cut_(self.problem.weights, self._drops)
        self._grids = self._held_grids()
        for target in self.problem.targets:
            if held := self._grids.get(target.name):
                target.weight.detach().copy_(held.levels)
        self._forget()

    def _forget(self) -> None:
        """Let go of Z, Λ and the means of squared gradients, which have done their work."""
        for tensors in self.solver.tensors.values():
            tensors.clear()
        if self.problem.importance is not None:
            self.problem.importance.means.clear()

    def _held_grids(self) -> dict[str, Held]:
        weights = {t.name: (t.weight.detach(), t.bits) for t in self.problem.targets}
        return {name: Held(w.clone(), fit_scale(w, bits), bits) for name, (w, bits) in weights.items() if bits is not None}

    def _return_to_grid(self) -> None:
        for target in self.problem.targets:
            if held := self._grids.get(target.name):
                (held.restore_ if self.finished else held.follow_)(target.weight.detach())

    # ------------------------------------------------------------------ looking and ending

    @contextmanager
    def evaluate(self, calibrate: Iterable[Any] | None = None) -> Iterator[nn.Module]:
        """Give a context in which the model's weights are the cut ones; afterwards all are bit-identical to before.

        Args:
            calibrate: batches to re-estimate batch norm with inside the context, as `finish` will.
        """
        if self._evaluating:
            raise DualpruneError("evaluate() is entered already")
        self._require_own_weights()
        weights = [local(w) for w in self.problem.weights]
        with torch.no_grad():
            self._require_finite_weights()
            saved = [w.clone() for w in weights]
        self._evaluating = True
        try:
            with batch_norm_restored(self.model):
                with torch.no_grad():
                    self._cut()
                    distributed.reshard(self.model)
                    if calibrate is not None:
                        recalibrate_batch_norm(self.model, calibrate, self._group)
                yield self.model
        finally:
            with torch.no_grad():
                for w, old in zip(weights, saved, strict=True):
                    w.copy_(old)
            distributed.reshard(self.model)
            self._evaluating = False

    @torch.no_grad()
    def finish(self, calibrate: Iterable[Any] | None = None) -> None:
        """Cut: W ← Π(W). The masks are held through every later optimizer step, so masked retraining just goes on.

        Quantised weights stay where they are now; what is left of the model (biases, norms, other weights) goes on learning.

        Args:
            calibrate: batches (tensors, (x, …) tuples or mappings) to re-estimate batch norm with; forward passes only.

        Raises:
            NonFiniteError: a weight is NaN or infinite. DualpruneError: the asked sparsity was not reached.
        """
        if self._evaluating:
            raise DualpruneError("finish() inside evaluate(): leave the context first")
        self._require_own_weights()
        self._require_few_zeros()
        if not self.finished:
            self._require_finite_weights()
            self._drops = [d.clone() for d in self._cut()]
            self._grids = self._held_grids()
            self._forget()
            self._check_reached()
            self.finished = True
            distributed.reshard(self.model)
        if calibrate is not None:
            recalibrate_batch_norm(self.model, calibrate, self._group)

    def detach(self) -> None:
        """Remove the hooks; weights, and zeros in them, stay as they are, and nothing holds them any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.optimizer is not None:
            _attached.discard(self.optimizer)

    def follow(self, optimizer: Optimizer) -> None:
        """Move over to another optimizer of the same model, such as one made anew for masked retraining; state and masks stay.

        Raises:
            DualpruneError: this is no optimizer, another pruner is attached to it, or it lacks a pruned parameter.
        """
        optimizer = _innermost(optimizer)
        _check_optimizer(optimizer, self.method)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [t.name for t in self.problem.targets if id(t.weight) not in owned]:
            raise DualpruneError(
                f"the optimizer lacks pruned parameters: {', '.join(missing[:4])}; give it those of this model"
            )
        if self.problem.importance is not None:
            self.problem.importance.optimizer = optimizer
        self.detach()
        self.optimizer = optimizer
        self.solver.scalars = {k: v for k, v in self.solver.scalars.items() if k not in OF_OPTIMIZER}
        self._hook(optimizer)

    @torch.no_grad()
    def cut_average(self, average: nn.Module) -> nn.Module:
        """Cut an average of the weights (EMA, SWA) in place, as the model is cut or would be now; return it.

        What `masks` drops becomes zero, quantised weights go to the nearest grid. It stays whole for further averaging in
        `copy.deepcopy`, or in the context `integrations.ema.evaluate_average`.

        Args:
            average: a module with the model's parameters under their names, wrappers' prefixes aside.

        Raises:
            DualpruneError: a pruned parameter is not there or has another shape; nothing was changed.
        """
        theirs = {parameter_name(name): p.detach() for name, p in average.named_parameters()}
        for target in self.problem.targets:
            weight = theirs.get(target.name)
            if weight is None or weight.shape != target.weight.shape:
                came = "none of that name" if weight is None else f"shape {tuple(weight.shape)}"
                raise DualpruneError(
                    f"expected an average of this model, with {target.name} of shape {tuple(target.weight.shape)}; got {came}"
                )
        for target, mask in zip(self.problem.targets, self.masks.values(), strict=True):
            weight = theirs[target.name]
            cut_([weight], [~mask.to(weight.device)])
            if target.bits is not None:
                weight.copy_(snap(weight, target.bits))
        return average

    @property
    def masks(self) -> dict[str, Tensor]:
        """Boolean masks by parameter name, True = keep, that a cut now would give or has given; sharded as the weights are."""
        with torch.no_grad():
            return {t.name: ~d for t, d in zip(self.problem.targets, self._final()[1], strict=True)}

    @property
    def dropped(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of a parameter and True where masks in force now hold it at zero; none while nothing is masked."""
        return [(t.weight, drop) for t, drop in zip(self.problem.targets, self._drops or (), strict=self._drops is not None)]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One dict per pruned parameter: name, shape, pattern, kept and total weights; bits where quantised."""
        return [
            {"name": t.name, "shape": list(t.weight.shape), "pattern": str(t.pattern),
             "kept": kept, "total": t.weight.numel()} | ({"bits": t.bits} if t.bits else {})
            for t, kept in zip(self.problem.targets, count_nonzero(list(self.masks.values())), strict=True)
        ]  # fmt: skip

    def summary(self) -> str:
        """Return a table of what each pruned layer keeps, and what is left alone."""
        rows = self.layers
        kept, total = (sum(r[k] for r in rows) for k in ("kept", "total"))
        rows = [r | {"pattern": f"{r['pattern']}, {r['bits']} bits"} if "bits" in r else r for r in rows]
        wide = max(len("parameter"), *(len(r["name"]) for r in rows))
        deep = max(14, *(len(r["pattern"]) + 2 for r in rows))
        lines = [f"{'parameter':<{wide}}  {'pattern':<{deep}}{'kept':>12}{'of':>13}{'sparsity':>10}{'rate':>9}"]
        for r in [*rows, {"name": "all pruned", "pattern": "", "kept": kept, "total": total}]:
            sparsity = 1 - r["kept"] / max(r["total"], 1)
            lines.append(
                f"{r['name']:<{wide}}  {r['pattern']:<{deep}}{r['kept']:>12,}{r['total']:>13,}"
                f"{sparsity:>10.4f}{compression_rate(sparsity):>8.2f}x"
            )
        return "\n".join([*lines, *self.problem.describe().splitlines()[1:]])

    # ------------------------------------------------------------------ saving and resuming

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs beside the model and the optimizer, as one flat dict of plain tensors.

        Bookkeeping rides in "meta", a JSON text as bytes, so torch.load(weights_only=True) and safetensors both take it.
        State of sharded weights is DTensors: save it by torch.distributed.checkpoint, and read it by `load_checkpoint`.
        """
        state = {
            f"{kind}.{t.name}": tensor.detach().clone(memory_format=torch.contiguous_format)
            for kind, tensors in self.solver.tensors.items()
            for t, tensor in zip(self.problem.targets, tensors, strict=len(tensors) > 0)
        }
        if self.problem.importance is not None:
            means = zip(self.problem.targets, self.problem.importance.means, strict=bool(self.problem.importance.means))
            state |= {f"moment.{t.name}": m.clone(memory_format=torch.contiguous_format) for t, m in means}
        if self._drops is not None and not (self.solver.tensors.get("drop")):
            state |= {f"grid.{n}": g.latent.clone(memory_format=torch.contiguous_format) for n, g in self._grids.items()}
            state |= {f"held.{t.name}": d.clone().contiguous() for t, d in zip(self.problem.targets, self._drops, strict=True)}
        if self.problem.frozen is not None:
            zeros = zip(self.problem.targets, self.problem.frozen, strict=True)
            state |= {f"frozen.{t.name}": f.clone().contiguous() for t, f in zeros}
        meta = {
            "format": FORMAT, "version": VERSION, "method": repr(self.method), "every": self.every,
            "total_steps": self.total_steps, "step_count": self.step_count, "finished": self.finished,
            "scalars": self.solver.scalars, "loss_count": self._loss_count, "history": self.history,
            "targets": self._described_targets, "scales": {name: held.scale for name, held in self._grids.items()},
            "keep_zeros": self.problem.frozen is not None, "ties": self.problem.tied_names, "pooled": self._pooled,
            "budget": self.problem.budget, "importance": self._importance,
        }  # fmt: skip
        loss_sum = torch.as_tensor(self._loss_sum, dtype=torch.float32).detach().cpu().clone()
        state["loss_sum"] = distributed.per_rank(loss_sum, self.problem.weights)
        state["meta"] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned, onto a pruner attached with the same method, layers and counts.

        Raises:
            DualpruneError: the state is of another model, method, format or version; nothing was changed.
        """
        meta = _read_meta(state)
        self._check_same_run(meta)
        kinds = {key.split(".", 1)[0] for key in state} - {"meta", "loss_sum", "frozen", "moment"}
        quantised = [t for t in self.problem.targets if t.bits is not None]
        fixed = {"held", "grid"} if quantised else {"held"}
        if kinds not in (fixed, running := set(self.solver.tensors)):
            raise DualpruneError(f"expected a state with {sorted(running)} or {sorted(fixed)}, got {sorted(kinds)}")
        if kinds == running and self.holding:
            raise DualpruneError("this pruner is finished or holding; attach anew to go back to an earlier state")
        loaded = {
            kind: [self._fitting(state, kind, i) for i, t in enumerate(self.problem.targets) if kind != "grid" or t.bits]
            for kind in kinds
        }
        frozen = [self._fitting(state, "frozen", i) for i in range(len(self.problem.frozen or ()))]
        means = self._fitting_means(state)
        held, latent = loaded.pop("held", None), loaded.pop("grid", ())
        scales = [_scale(meta, t.name) for t in quantised if latent]
        for kind, tensors in self.solver.tensors.items():
            if kind not in loaded:
                tensors.clear()
            for mine, saved in zip(tensors, loaded.get(kind, ()), strict=True):
                mine.copy_(saved)
        for mine, saved in zip(self.problem.frozen or (), frozen, strict=True):
            mine.copy_(saved)
        self._watched = -1
        if self.problem.importance is not None:
            self.problem.importance.take(means)
        self.solver.scalars = dict(meta["scalars"])
        self.step_count, self.finished, self.history = meta["step_count"], meta["finished"], list(meta["history"])
        self._zeros_are_few = True
        self._loss_sum, self._loss_count = distributed.own(state["loss_sum"], self.problem.weights), meta["loss_count"]
        if held is not None:
            self._drops = [d.to(local(w).device) for d, w in zip(held, self.problem.weights, strict=True)]
        self._grids = {
            t.name: Held(torch.empty_like(t.weight.detach()).copy_(v), scale, t.bits or 0)
            for t, v, scale in zip(quantised, latent, scales, strict=bool(latent))
        }

    def load_checkpoint(self, path: str | Path, key: str = "pruner") -> None:
        """Put back a state saved by torch.distributed.checkpoint, on however many ranks; all ranks call it.

        Args:
            path: the checkpoint's folder, from `torch.distributed.checkpoint.save({key: pruner.state_dict(), …}, …)`.
            key: the name the state was saved under.

        Raises:
            DualpruneError: there is no such checkpoint, or the state is of another problem; nothing was changed.
        """
        weights = {t.name: t.weight.detach() for t in self.problem.targets}
        self.load_state_dict(distributed.read_checkpoint(path, weights, key))

    # ------------------------------------------------------------------ private

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise DualpruneError(
            "a pruner is not copied or pickled: its hooks are on one optimizer. Keep it outside of what is copied; for a copy "
            "of the model make an optimizer, attach again and load_state_dict(pruner.state_dict())"
        )

    @property
    def _group(self) -> Any:
        return distributed.group_of(self.model, self.process_group)

    def _replicated(self) -> dict[str, Tensor]:
        """What must be the same on all ranks, by the name an error would give it."""
        kinds = {"": self.problem.weights, **{f"{kind} of ": t for kind, t in self.solver.tensors.items()}}
        if self.problem.importance is not None:
            kinds["mean squared gradient of "] = self.problem.importance.means
        return {
            f"{kind}{t.name}": tensor
            for kind, tensors in kinds.items()
            for t, tensor in zip(self.problem.targets, tensors, strict=len(tensors) > 0)
        }

    def _require_own_weights(self) -> None:
        owned = {id(p) for p in self.model.parameters()}
        # a sharded weight is not among them while fully_shard has put the gathered one in its place
        gone = [t.name for t in self.problem.targets if not hasattr(t.weight, "to_local") and id(t.weight) not in owned]
        if gone and distributed.is_fully_sharded(self.model):
            raise DualpruneError(
                f"{gone[0]} is no longer the model's: fully_shard has replaced its parameters since attach(). Call "
                "fully_shard first, then make the optimizer, then attach"
            )
        if gone:
            raise DualpruneError(
                f"{gone[0]} is no longer the model's: it was replaced since attach(), as load_state_dict(assign=True), a "
                "parametrization or a new module does. Copy values in place (without assign), or replace it first, then make "
                "the optimizer, then attach"
            )

    def _hook(self, optimizer: Optimizer) -> None:
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)

    def _final(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights a cut now would give, where they are kept, and what it would drop; nothing is changed."""
        weights = self.problem.weights
        fixed = self.holding or (self.solver.fixed_size and not self._quantised)
        if self._drops is not None and fixed:
            on_grid = [t.name in self._grids for t in self.problem.targets]
            return weights, [d | (w == 0) if q else d for d, w, q in zip(self._drops, weights, on_grid, strict=True)]
        points, masks = self.problem.project(weights)
        return points, [~m for m in masks]

    def _cut(self) -> list[Tensor]:
        """W ← Π(W); return what was dropped."""
        weights = self.problem.weights
        points, drops = self._final()
        for target, w, point in zip(self.problem.targets, weights, points, strict=True):
            if target.bits is not None:
                w.copy_(point)
        cut_(weights, drops)
        return drops

    def _mean_loss(self) -> float | None:
        total, count = distributed.summed([float(self._loss_sum), self._loss_count], self._group)
        if not count:
            return None
        mean = total / count
        if not math.isfinite(mean):
            raise NonFiniteError(f"the observed loss is {mean} at optimizer step {self.step_count}: stop and go back")
        return mean

    def _steps_since_update(self) -> int:
        return self.step_count - (self.history[-1]["step"] if self.history else 0) or self.every

    def _stride(self) -> Stride | None:
        return None if self.optimizer is None else Stride(self.optimizer, [t.weight for t in self.problem.targets])

    def _require_finite_weights(self) -> None:
        weights = self.problem.weights
        if not all_finite(weights):
            bad = next(t.name for t, w in zip(self.problem.targets, weights, strict=True) if not all_finite([w]))
            raise NonFiniteError(f"{bad} has NaN or infinite weights at optimizer step {self.step_count}: stop and go back")

    def _record(self, row: Row, loss: float | None) -> Row:
        self._loss_sum, self._loss_count = 0.0, 0
        final = [(t.sparsity, t.weight.numel()) for t in self.problem.targets]
        whole = sum(s * n for s, n in final)
        scale = sum(self.method.asked(self.progress, s) * n for s, n in final) / whole if whole else 1.0
        row = {"step": self.step_count, "update": len(self.history) + 1, "loss": loss, "sparsity_scale": scale, **row}
        self.history.append(row)
        return row

    def _require_few_zeros(self) -> None:
        if not self._zeros_are_few:
            check_frozen(self.problem)
            self._zeros_are_few = True

    def _check_reached(self) -> None:
        for target, weight in zip(self.problem.targets, self.problem.weights, strict=True):
            if target.bits is not None and isinstance(target.pattern, KernelPattern):
                continue  # zeros that the grid makes inside a shape hide which shape it was
            if not target.pooled and not sharded.contains(target.pattern, weight, target.sparsity):
                raise DualpruneError(f"{target.name} did not reach {target.pattern} at sparsity {target.sparsity}")

    @property
    def _described_targets(self) -> dict[str, list[Any]]:
        """What must be equal for a state to fit, JSON-able."""
        return {
            t.name: [list(t.weight.shape), str(t.pattern), t.sparsity] + ([] if t.bits is None else [f"{t.bits} bits"])
            for t in self.problem.targets
        }

    @property
    def _quantised(self) -> bool:
        return any(t.bits is not None for t in self.problem.targets)

    @property
    def _pooled(self) -> list[str]:
        return [t.name for t in self.problem.targets if t.pooled]

    @property
    def _importance(self) -> str:
        return "magnitude" if self.problem.importance is None else self.problem.importance.name

    def _check_same_run(self, meta: Mapping[str, Any]) -> None:
        mine = self._described_targets
        theirs = meta["targets"]
        if mine != theirs:
            odd = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))[0]
            raise DualpruneError(
                f"this state is of another pruning problem: {odd} is {theirs.get(odd, 'absent')} in the state "
                f"and {mine.get(odd, 'absent')} here. Attach with the same model, patterns, rate, bits and ignore"
            )
        young = {"pooled": self._pooled, "budget": self.problem.budget}
        # what older states do not have
        meta = {"keep_zeros": False, "ties": [], "importance": "magnitude"} | young | dict(meta)
        for what, here in (
            ("method", repr(self.method)), ("every", self.every), ("total_steps", self.total_steps),
            ("keep_zeros", self.problem.frozen is not None), ("ties", self.problem.tied_names),
            ("pooled", self._pooled), ("budget", self.problem.budget), ("importance", self._importance),
        ):  # fmt: skip
            if meta[what] != here:
                raise DualpruneError(
                    f"this state was made with {what} {meta[what]}, this pruner has {here}: attach with the same"
                )

    def _fitting(self, state: Mapping[str, Tensor], kind: str, index: int) -> Tensor:
        target = self.problem.targets[index]
        tensor = state.get(f"{kind}.{target.name}")
        like = target.weight if kind in ("held", "frozen", "grid") else self.solver.tensors[kind][index]
        wanted = torch.bool if kind in ("held", "frozen") else like.dtype, tuple(like.shape)
        return self._placed(tensor, like, wanted, f"{kind}.{target.name}")

    def _fitting_means(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the means of squared gradients that a state has; an optimizer that keeps them leaves none to save."""
        if self.problem.importance is None or not any(key.startswith("moment.") for key in state):
            return []
        dtype = self.problem.importance.dtype
        return [
            self._placed(state.get(key := f"moment.{t.name}"), t.weight.detach(), (dtype, tuple(t.weight.shape)), key)
            for t in self.problem.targets
        ]

    @staticmethod
    def _placed(tensor: Tensor | None, like: Tensor, wanted: tuple[torch.dtype, tuple[int, ...]], key: str) -> Tensor:
        if tensor is None or (tensor.dtype, tuple(tensor.shape)) != wanted:
            came = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise DualpruneError(f"state {key}: expected {wanted[0]} of shape {wanted[1]}, got {came}")
        return distributed.placed(tensor, like, key)


def _default_every(method: Method, total_steps: int | None) -> int:
    """Return the method's own period, shortened so that even a short run sees some 40 updates."""
    if total_steps is None:
        return method.default_every
    return max(1, min(method.default_every, total_steps // 40))


def _is_within(call: FrameType, outer: FrameType | None) -> bool:
    """Tell whether `outer` is among the callers of `call`; it is not where it was left by an exception."""
    caller = None if outer is None else call.f_back
    while caller is not None and caller is not outer:
        caller = caller.f_back
    return caller is not None


def _check_steps(what: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise DualpruneError(f"{what} is a number of optimizer steps, a whole number of at least 1, got {value!r}")
    return value


def _innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside wrappers such as Accelerate's: it is the one whose steps run hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _check_room(method: Method, every: int, total_steps: int | None) -> None:
    """Refuse a period that leaves no update before the run, or its part without a fixed mask, ends."""
    if total_steps is None or isinstance(method, Magnitude):
        return
    end = total_steps if method.hold_from == math.inf else math.ceil(method.hold_from * total_steps) - 1
    if every <= end:
        return
    what = f"{type(method).__name__}(hold={1 - method.hold_from:g})"
    if method.hold_from <= 0:
        raise DualpruneError(f"{what} fixes the masks from the first step on and leaves no update: take a smaller hold")
    if end < 1:
        raise DualpruneError(
            f"total_steps={total_steps} leaves no update before {what} fixes the masks: it takes at least "
            f"{math.floor(1 / method.hold_from) + 1} steps, or a smaller hold"
        )
    raise DualpruneError(
        f"every={every} leaves no update in the {end} of {total_steps} steps before the masks are fixed: take a smaller one"
    )


def _check_state_dtype(dtype: torch.dtype | None) -> None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return
    meant = getattr(torch, str(dtype), None)
    hint = f"; did you mean {meant}?" if isinstance(meant, torch.dtype) else ""
    raise DualpruneError(
        f"state_dtype is a float dtype of 16, 32 or 64 bits such as torch.bfloat16, or None, got {dtype!r}{hint}"
    )


def _check_optimizer(optimizer: Optimizer, method: Method) -> None:
    if not isinstance(optimizer, Optimizer):
        raise DualpruneError(f"expected a torch optimizer, got {type(optimizer).__name__}; pass the one your loop steps")
    if optimizer in _attached:
        raise DualpruneError("this optimizer has a pruner already: call its detach() before attaching another")
    if method.penalises and any(group.get("maximize") for group in optimizer.param_groups):
        raise DualpruneError("maximize=True would climb the penalty too: minimise the negated objective instead")


def _overflowed(optimizer: Optimizer) -> bool:
    """Tell whether a fused optimizer skipped this step because scaled gradients overflowed (waits for the device)."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _read_meta(state: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        meta = json.loads(bytes(state["meta"].cpu().numpy()).decode())
        known = meta["format"], meta["version"]
        if known == (FORMAT, VERSION) and not (meta.keys() >= _META and "loss_sum" in state):
            raise KeyError
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
        raise DualpruneError("expected the dict that Pruner.state_dict() returned; its 'meta' is missing or damaged") from None
    if known != (FORMAT, VERSION):
        raise DualpruneError(f"expected a state of format {FORMAT} version {VERSION}, got {known[0]} version {known[1]}")
    return meta


def _scale(meta: Mapping[str, Any], name: str) -> float:
    scale = meta.get("scales", {}).get(name)
    if not isinstance(scale, float) or not 0 < scale < math.inf:
        raise DualpruneError(f"state: the scale of {name}'s grid is a positive number, got {scale!r}")
    return scale


def _say(text: str) -> None:
    """Log at INFO; where nobody has set logging up, or only for warnings, to stderr, because defaults are never silent."""
    unset, heard = logger.level == logging.NOTSET, logger.isEnabledFor(logging.INFO)
    if not logger.handlers and not logging.getLogger().handlers and (unset or heard):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("dualprune: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    elif unset and not heard and logger.manager.disable < logging.INFO:
        print(f"dualprune: {text}", file=sys.stderr)  # a handler here would keep our warnings from those of the root
    logger.info(text)
