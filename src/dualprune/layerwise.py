"""Layer-wise pruning without training: block after block, each linear layer against the inputs the pruned network gives it.

For large models a training run is out of reach, but a layer's own quadratic objective ½‖X(W − W₀)ᵀ‖² is not: a few
thousand tokens give H = XᵀX, and `quadratic.py` solves it by SLR, ADMM, ALPS, SparseGPT, Wanda or plain magnitude.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dualprune.errors import DualpruneError, NonFiniteError, suggest
from dualprune.finish import forward_batch
from dualprune.pattern import Pattern
from dualprune.patterns import check_sparsity, parse_pattern
from dualprune.quadratic import LayerMethod, Quadratic, layer_method
from dualprune.scope import matches
from dualprune.solvers.base import DualMethod

logger = logging.getLogger("dualprune")


@dataclass(frozen=True)
class LayerFit:
    """What became of one linear layer.

    Attributes:
        name: of the weight.
        kept: nonzero weights.
        total: all weights.
        error: ‖X(W − W₀)ᵀ‖² / ‖XW₀ᵀ‖² over the calibration inputs, with the damping in X.
    """

    name: str
    kept: int
    total: int
    error: float


@dataclass(frozen=True)
class LayerwiseReport:
    """All pruned layers in the order they were pruned; ``str()`` gives a table.

    Attributes:
        method: its name.
        layers: the pruned ones.
        untouched: every other parameter of the blocks of two or more dimensions, ignored or in no linear layer; error 0.
    """

    method: str
    layers: tuple[LayerFit, ...]
    untouched: tuple[LayerFit, ...] = ()

    @property
    def kept(self) -> int:
        """Nonzero weights of the pruned layers."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """All weights of the pruned layers."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the pruned layers."""
        return 1 - self.kept / self.total

    @property
    def block_sparsity(self) -> float:
        """Fraction of zeros in all weights of the blocks, pruned or untouched."""
        every = self.layers + self.untouched
        return 1 - sum(layer.kept for layer in every) / sum(layer.total for layer in every)

    @property
    def error(self) -> float:
        """Mean relative error of the layers' outputs."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{x.name:<{width}}  {x.kept:>12,} of {x.total:>12,}  error {x.error:.5f}" for x in self.layers]
        total = f"{self.method}: kept {self.kept:,} of {self.total:,} weights in {len(self.layers)} layers"
        rows.append(f"{total}, mean error {self.error:.5f}")
        if self.untouched:
            rows.append(f"sparsity {self.sparsity:.4f} of these layers, {self.block_sparsity:.4f} of all weights of the blocks")
        return "\n".join(rows)


@dataclass(frozen=True)
class _Call:
    """How a block was called for one batch, but for the hidden state that comes first."""

    rest: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass
class _Chain:
    """The blocks in the order they run, what enters the first one, and how each is called."""

    inputs: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[_Call]] = field(default_factory=dict)


@torch.no_grad()
def prune_layerwise(
    model: nn.Module,
    batches: Iterable[Any],
    method: str | DualMethod = "slr",
    *,
    sparsity: float | None = None,
    pattern: str | Pattern = "unstructured",
    blocks: str | None = None,
    ignore: str | Iterable[str] = (),
    refit: bool | None = None,
    damping: float = 0.01,
    note: Callable[[str], None] = logger.info,
) -> LayerwiseReport:
    """Prune the linear layers of a model's blocks in place, without training, from a few calibration batches.

    The blocks are pruned in the order they run; the inputs of each come from the network pruned so far. Nothing outside the
    blocks (embeddings, the head) is pruned, nor what is in the blocks but in no linear layer, such as experts that are one
    parameter of three dimensions: a warning names it. If it stops with an error half-way, the blocks before are pruned already.

    Args:
        model: of `nn.Linear` layers or GPT-2's `Conv1D`, in any float type; solved in float32 at least, where the layer is.
        batches: tensors, (x, …) tuples or mappings, as the model is called: model(x) or model(**batch).
        method: "slr", "admm", "alps", "sparsegpt", "wanda" or "magnitude", or a value such as SLR(rho=…, s0=…).
        sparsity: fraction of each layer's weights that go; not needed for n:m patterns.
        pattern: a pattern or its text, such as "2:4"; axis 1 is the layer's input.
        blocks: glob over module names, such as "model.layers.*", that finds the blocks: the outermost modules it matches.
            They have to run as a chain, each fed by the one before. None: the longest ModuleList of one class.
        ignore: globs over weight or layer names that stay as they are. Where linear layers have less than half of the weights
            of the blocks, the other weights have to be named here.
        refit: whether least squares on the support found follow; None: as published (after admm, alps and slr).
        damping: multiple of H's mean diagonal that is added to its diagonal.
        note: told a line after every block.

    Returns:
        What was kept, and the relative error, layer by layer.

    Raises:
        DualpruneError: no blocks, no data, no chain, a sparsity, pattern or method that is not there or does not fit, or most
            weights of the blocks are in no linear layer and not ignored.
        NonFiniteError: a layer saw an input, or has a weight, that is NaN or infinite.
    """
    chosen = parse_pattern(pattern)
    if sparsity is None and not chosen.alone:
        raise DualpruneError(f"prune_layerwise onto {chosen} needs sparsity=, a fraction in [0, 1]")
    budget = chosen.snap(0.0 if sparsity is None else check_sparsity(sparsity))
    solve = layer_method(method, chosen, refit)
    found = _find_blocks(model, blocks)
    layers, others = _find_layers(found, ignore)
    untouched = tuple(_untouched(name, weight) for name, weight in others.items())
    for name, layer in layers.items():
        _check_layer(name, layer, chosen)
    fits: list[LayerFit] = []
    with _evaluating(model):
        chain = _trace(model, found, batches)
        hidden = chain.inputs
        for number, (name, calls) in enumerate(chain.calls.items(), 1):
            own = {full: layer for full, layer in layers.items() if _within(full, name)}
            grams = _collect(found[name], own, hidden, calls)
            fits += [_prune_layer(full, own[full], gram, solve, chosen, budget, damping) for full, gram in grams.items()]
            hidden = [_first(found[name](x, *call.rest, **call.named)) for x, call in zip(hidden, calls, strict=True)]
            if own:
                mean = sum(fit.error for fit in fits[-len(own) :]) / len(own)
                note(f"{solve.name}: block {number} of {len(chain.calls)} ({name}), {len(own)} layers, mean error {mean:.5f}")
    return LayerwiseReport(solve.name, tuple(fits), untouched)


def _prune_layer(
    name: str, layer: nn.Module, gram: Tensor, solve: LayerMethod, pattern: Pattern, sparsity: float, damping: float
) -> LayerFit:
    weight = _weight(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    try:
        q = Quadratic.of(weight.to(wide), gram.to(wide), pattern, sparsity, damping)
    except NonFiniteError as error:
        raise NonFiniteError(f"{name}: {error}; it is left as it was, the blocks before it are pruned") from error
    W = solve(q)
    if not bool(torch.isfinite(W).all()):
        raise NonFiniteError(f"{name}: its pruned weights came out NaN or infinite; it is left as it was: raise damping")
    # what a method only keeps, and does not move, stays the same to the last bit
    weight.copy_(torch.where((W == q.W0) & (W != 0), weight.to(wide), W / q.scale))
    return LayerFit(name, int(torch.count_nonzero(weight)), weight.numel(), q.error(W))


def _untouched(name: str, weight: Tensor) -> LayerFit:
    if weight.is_meta:  # offloaded
        return LayerFit(name, weight.numel(), weight.numel(), 0.0)
    countable = weight if weight.itemsize > 1 else weight.float()  # torch does not count in 8-bit floats
    return LayerFit(name, int(torch.count_nonzero(countable)), weight.numel(), 0.0)


# --- which modules -------------------------------------------------------------------------------------------


def _find_blocks(model: nn.Module, glob: str | None) -> dict[str, nn.Module]:
    """Return the blocks by name, in the model's order."""
    modules = dict(model.named_modules())
    if glob is None:
        lists = [(name, m) for name, m in modules.items() if isinstance(m, nn.ModuleList) and _is_stack(m)]
        if not lists:
            raise DualpruneError(
                "found no blocks: the model has no ModuleList of one class with linear layers in it; "
                "name them with blocks=, a glob over module names such as 'encoder.layers.*'"
            )
        name, stack = max(lists, key=lambda pair: len(pair[1]))
        return {f"{name}.{child}" if name else child: m for child, m in stack.named_children()}
    matched = [name for name in modules if name and fnmatchcase(name, glob)]
    outer = {name: modules[name] for name in matched if not any(_within(name, o) for o in matched if o != name)}
    if not any(_is_linear(m) for block in outer.values() for m in block.modules()):
        what = "modules without linear layers" if outer else f"no module{suggest(glob, modules)}"
        raise DualpruneError(f"found no blocks: blocks={glob!r} matches {what}")
    return outer


def _is_stack(modules: nn.ModuleList) -> bool:
    return len({type(m) for m in modules}) == 1 and all(any(map(_is_linear, m.modules())) for m in modules)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's layer, whose weight is (in, out), without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight(layer: nn.Module) -> Tensor:
    """Return the live weight as (out, in)."""
    weight: Any = layer.weight
    return weight.detach().T if _is_conv1d(layer) else weight.detach()


def _find_layers(
    blocks: Mapping[str, nn.Module], ignore: str | Iterable[str]
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Return the linear layers to prune by the names of their weights, and every other weight of the blocks by its name."""
    layers = {
        ".".join(part for part in (name, inner, "weight") if part): module
        for name, block in blocks.items()
        for inner, module in block.named_modules()
        if _is_linear(module)
    }
    inside = {id(p): (f"{name}.{part}", p) for name, block in blocks.items() for part, p in block.named_parameters()}
    weights = {name: p for name, p in inside.values() if p.ndim > 1}
    owned = {id(p) for layer in layers.values() for p in layer.parameters()}
    loose = {name: p for name, p in weights.items() if id(p) not in owned}
    ignored = _ignored([*layers, *loose], [ignore] if isinstance(ignore, str) else ignore)
    left = {name: layer for name, layer in layers.items() if name not in ignored}
    if not left:
        raise DualpruneError("nothing to prune: every linear layer of the blocks is ignored")
    owners: dict[int, str] = {}
    for name, layer in left.items():
        if "weight" not in layer._parameters:
            raise DualpruneError(
                f"{name} is computed from other tensors, so what is written to it is lost: make it permanent first "
                "(parametrize.remove_parametrizations, prune.remove), or ignore it"
            )
        owner = owners.setdefault(id(layer.weight), name)
        if owner != name:
            raise DualpruneError(f"{name} and {owner} are one weight with the inputs of two layers: ignore both")
    _check_loose({name: p for name, p in loose.items() if name not in ignored}, left)
    return left, {name: p for name, p in weights.items() if id(p) not in owners}


def _ignored(names: Sequence[str], globs: Iterable[str]) -> set[str]:
    ignored: set[str] = set()
    for glob in globs:
        hit = {name for name in names if matches(glob, name)}
        if not hit:
            raise DualpruneError(f"ignore: {glob!r} matches no linear layer or weight of the blocks{suggest(glob, names)}")
        ignored |= hit
    return ignored


def _check_loose(loose: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> None:
    """Say which weights stay dense because they are in no linear layer; refuse where they are the most."""
    if not loose:
        return
    stays, goes = (sum(w.numel() for w in ws) for ws in (loose.values(), map(_weight, layers.values())))
    globs = sorted({re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in loose})
    share = f"{stays:,} of the {stays + goes:,} weights to prune in the blocks ({stays / (stays + goes):.0%})"
    what = f"{share} are in no linear layer (nn.Linear, GPT-2's Conv1D) and stay as they are: {', '.join(globs)}"
    if stays > goes:
        raise DualpruneError(f"{what}. If only the linear layers are to be pruned, say so: ignore={globs}")
    logger.warning(what)


def _check_layer(name: str, layer: nn.Module, pattern: Pattern) -> None:
    weight = _weight(layer)
    if weight.is_meta or not weight.is_floating_point() or weight.itemsize < 2:
        kind = "on the meta device" if weight.is_meta else str(weight.dtype)
        raise DualpruneError(f"{name} is {kind}; layer-wise pruning needs weights of 16, 32 or 64-bit floats in memory")
    try:
        pattern.check(tuple(weight.shape))
    except DualpruneError as error:
        raise DualpruneError(f"{name}: {error}") from error


def _within(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


# --- what they see -------------------------------------------------------------------------------------------


def _trace(model: nn.Module, blocks: Mapping[str, nn.Module], batches: Iterable[Any]) -> _Chain:
    """Run the dense model once over the batches, and note how the blocks are called."""
    chain, device = _Chain(), next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as hooks:
        watch = _Watch(chain)
        for name, block in blocks.items():
            hooks.callback(block.register_forward_pre_hook(watch.enter(name), with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(watch.leave(name)).remove)
        for batch in _checked(batches):
            watch.begin()
            forward_batch(model, batch, device)
            if watch.batches > 1 and len(watch.ran) != len(chain.calls):
                raise DualpruneError("the blocks that run differ from batch to batch; layer-wise pruning needs one chain")
    if not watch.batches:
        raise DualpruneError("no calibration data: the loader is empty, or an iterator already used up")
    silent = [name for name in blocks if name not in chain.calls]
    if silent:
        raise DualpruneError(f"the model never runs its block {silent[0]}; name other blocks with blocks=")
    return chain


_CACHELESS = {"past_key_values": None, "use_cache": False}  # blocks run more than once a batch: a cache would grow


class _Watch:
    """Hooks that note how each block is called, and make sure that each is fed by the one before."""

    def __init__(self, chain: _Chain) -> None:
        self.chain, self.batches = chain, 0
        self.ran: list[str] = []
        self.out: Any = None

    def begin(self) -> None:
        self.ran, self.out = [], None
        self.batches += 1

    def enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name in self.ran:
                raise DualpruneError(f"block {name} runs twice in a forward pass; layer-wise pruning needs it to run once")
            if not args or not isinstance(args[0], Tensor):
                raise DualpruneError(f"block {name} is not called with a tensor first, so it cannot be fed by the block before")
            if not self.ran:
                self.chain.inputs.append(args[0])
            elif self.out is not args[0] and not (isinstance(self.out, Tensor) and torch.equal(self.out, args[0])):
                raise DualpruneError(
                    f"block {name} is not fed by {self.ran[-1]}, which ran before it, so they are no chain: "
                    "name whole blocks with blocks=, everything between the first and the last of them included"
                )
            self.ran.append(name)
            cacheless = {key: value for key, value in _CACHELESS.items() if key in named}
            self.chain.calls.setdefault(name, []).append(_Call(args[1:], named | cacheless))

        return hook

    def leave(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.out = _first(out)

        return hook


def _collect(
    block: nn.Module, layers: Mapping[str, nn.Module], hidden: Sequence[Tensor], calls: Sequence[_Call]
) -> dict[str, Tensor]:
    """Return H = XᵀX of every layer of a block, summed in float64 where the device has it."""
    grams: dict[str, Tensor] = {}

    def adder(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            exact = torch.float32 if x.device.type == "mps" else torch.float64
            gram = grams.setdefault(name, torch.zeros(x.shape[1], x.shape[1], dtype=exact, device=x.device))
            gram.add_(x.T @ x)

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(adder(name)).remove)
        for x, call in zip(hidden, calls, strict=True):
            block(x, *call.rest, **call.named)
    for name in layers:
        if name not in grams:
            raise DualpruneError(f"{name} saw no calibration data: its layer was never called; ignore it, or give more data")
    return {name: grams[name] for name in layers}


def _checked(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, Tensor | str | Mapping):
        raise DualpruneError(f"expected an iterable of batches, got one {type(batches).__name__}: put it into a list")
    return batches


def _first(out: Any) -> Any:
    """Return the hidden state of what a block returns."""
    return out[0] if isinstance(out, tuple | list) else out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put everything into eval mode, and transformers' key-value cache off: blocks run more than once a batch here."""
    modes = {module: module.training for module in model.modules()}
    cached = _caching(model)
    model.eval()
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for module, mode in modes.items():
            module.training = mode


def _caching(model: nn.Module) -> list[Any]:
    """Return every configuration in the model, and in a configuration such as `text_config`, whose cache is on."""
    outer = [getattr(module, "config", None) for module in model.modules()]
    nested = [value for config in outer for value in getattr(config, "__dict__", {}).values()]
    return list({id(config): config for config in outer + nested if getattr(config, "use_cache", None) is True}.values())
