"""Which channels of which layers go together, by Torch-Pruning, and which of them can go.

A channel of a layer can go when all that read it can do without it: their weights for it are all zero; or what arrives
is zero whatever the model is given; or it is another constant that the reader's bias takes over exactly. That a value
is constant is read off the graph (zero filters before it, nothing else added) and then seen on the probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from dualprune.errors import DualpruneError
from dualprune.surgery import INPUTS, OUTPUTS, Place, nonzero_slices, owners_of, side_of, weight_of, why_fixed, width_of


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: nn.Module) -> Any:
        """Run the model."""
        return model(*self.args, **self.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return the call with all its tensors changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Call(tuple(map(changed, self.args)), {key: changed(value) for key, value in self.kwargs.items()})


@torch.no_grad()
def run(model: nn.Module, call: Call) -> list[Tensor]:
    """Return all tensors that the model makes of the call."""
    return [t.detach().clone() for t in tensors(call(model))]


def tensors(output: Any) -> list[Tensor]:
    """Collect the tensors in whatever a model returns."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output for t in tensors(part)] if isinstance(output, list | tuple) else []


# --- the adapter ----------------------------------------------------------------------------------------------------

# Operations by the name autograd gives them. They act on each channel alone; the first kind turns zeros into zeros.
_KEEP_ZERO = frozenset((
    "Relu", "Hardtanh", "LeakyRelu", "Elu", "Silu", "Gelu", "Hardswish", "Mish", "Tanh", "Neg", "Abs", "Clone", "Mul", "Add",
    "Sub", "Cat", "Slice", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Mean", "MaxPool2DWithIndices",
    "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D",
    "UpsampleNearest2D", "UpsampleBilinear2D",
))  # fmt: skip
_PER_CHANNEL = _KEEP_ZERO | {"Sigmoid", "Hardsigmoid", "Softplus", "Exp", "Div", "Rsub", "ConstantPadNd"}
_SHOWN = 3
_MATMUL = ("Addmm", "Mm")  # inside nn.Linear, on inputs of three and more dimensions


@dataclass(frozen=True, eq=False)
class Member:
    """A layer or operation that channels of a root pass through: its channel ``index[i]`` goes with ``root[i]``.

    Attributes:
        key: of its node in the graph.
        role: producer, consumer, layer (depthwise, batch norm, PReLU) or op.
        name: of the layer; empty for an operation.
        module: the layer, or None.
        index: channels, on the side that is concerned.
        root: channels of the root, one for each of `index`.
        sources: keys of the members it gets its channels from.
        barrier: why it cannot lose a channel, or None.
        op: the operation's name.
        operands: how many values it gets, those outside the coupling included; numbers and buffers are not counted.
        pads: whether it may see zeros, or another value, beyond the border.
    """

    key: int
    role: str
    name: str
    module: nn.Module | None
    index: Tensor
    root: Tensor
    sources: tuple[int, ...]
    barrier: str | None
    op: str
    operands: int
    pads: bool

    @property
    def side(self) -> str:
        """The side of the layer that `index` counts."""
        return INPUTS if self.role == "consumer" else OUTPUTS

    def pairs(self) -> Iterable[tuple[int, int]]:
        """Yield its channels with those of the root."""
        return zip(self.index.tolist(), self.root.tolist(), strict=True)


@dataclass(frozen=True, eq=False)
class Coupling:
    """All that has to go when outputs of the layer `root` go; it has `size` of them."""

    root: str
    size: int
    members: list[Member]


class _PadValues(TorchDispatchMode):
    """Whether a border was ever filled with another value than zero, which the graph does not say."""

    other_than_zero = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.constant_pad_nd.default:
            value = args[2] if len(args) > 2 else (kwargs or {}).get("value", 0)
            self.other_than_zero |= value != 0
        return func(*args, **(kwargs or {}))


class Graph:
    """What this module asks of Torch-Pruning, and what it refuses to believe of the answer."""

    def __init__(self, pruning: Any, model: nn.Module, probe: Call) -> None:
        self._types = pruning.ops.OPTYPE
        self._graph = pruning.DependencyGraph()
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._owners = owners_of(model)
        # inputs with a history, and outputs with one operation more, show up in the graph: so ties with them are seen
        call = probe.map(lambda t: t.clone().requires_grad_() * 1 if t.is_floating_point() else t)
        self._pads = _PadValues()
        with warnings.catch_warnings(), torch.enable_grad(), self._pads:
            warnings.simplefilter("ignore")
            self._graph.build_dependency(
                model,
                call,
                forward_fn=lambda m, call: call(m),
                output_transform=lambda out: [t + 0 for t in tensors(out) if t.requires_grad],
                verbose=False,
            )

    def name(self, module: nn.Module) -> str:
        """Return the module's name in the model."""
        return self._names[module]

    def roots(self) -> list[nn.Module]:
        """Return the layers with filters of their own, in the order of the model."""
        return [m for m in self._names if m in self._graph.module2node and side_of(m, INPUTS)]

    def coupling(self, root: nn.Module, channels: Sequence[int]) -> Coupling:
        """Return what goes with these outputs of `root`."""
        spatial = max(weight_of(root).dim() - 2, 0)
        outputs = self._graph.get_pruner_of_module(root).prune_out_channels
        items = list(self._graph.get_pruning_group(root, outputs, list(channels)))
        keys = {id(item.dep.target) for item in items}
        members = [self._member(item, keys, spatial) for item in items if not self._is_weight(item.dep.target)]
        return Coupling(self._names[root], len(channels), members)

    def _member(self, item: Any, keys: set[int], spatial: int) -> Member:
        node = item.dep.target
        module = node.module if node.module in self._names else None
        role = "op" if module is None else "layer"
        if node.type in (self._types.CONV, self._types.LINEAR):
            role = "consumer" if item.dep.handler.__name__ == "prune_in_channels" else "producer"
        inputs = [id(i) for i in node.inputs if not self._is_weight(i)]
        return Member(
            key=id(node),
            role=role,
            name=self._names.get(module, "") if module is not None else "",
            module=module,
            index=torch.tensor(item.idxs, device="cpu"),
            root=torch.tensor(item.root_idxs, device="cpu"),
            sources=() if role == "producer" else tuple(i for i in inputs if i in keys),
            barrier=self._op_barrier(node, spatial) if module is None else self._layer_barrier(node, role, max(item.idxs)),
            op=_op(node),
            operands=len(inputs),
            pads=_pads_with_zeros(module) if isinstance(module, _ConvNd) else _op_pads(node),
        )

    def _is_weight(self, node: Any) -> bool:
        """Tell whether this is a layer's weight, transposed or reshaped before use."""
        return node.module not in self._names and not node.inputs and _op(node) in ("T", "View")

    def _layer_barrier(self, node: Any, role: str, largest: int) -> str | None:
        name = self._names[node.module]
        if obstacle := why_fixed(name, node.module, self._owners):
            return obstacle
        width = width_of(node.module, INPUTS if role == "consumer" else OUTPUTS)
        return f"{name} is narrower than what it is combined with" if width and largest >= width else None

    def _op_barrier(self, node: Any, spatial: int) -> str | None:
        kind, types, op = node.type, self._types, _op(node)
        if kind == types.OUTPUT:
            return "it is an output of the model"
        if kind == types.PARAMETER:
            return f"the parameter {self._parameters.get(id(node.module))} goes with it"
        if kind in (types.CONCAT, types.RESHAPE) or (op in _MATMUL and all(o.type == types.LINEAR for o in node.outputs)):
            return None
        if op not in _PER_CHANNEL:
            return f"the model applies {op} to it, which may mix channels or fix their number"
        saved = node.grad_fn
        if op == "ConstantPadNd" and any(saved._saved_pad[2 * spatial :]):
            return "a shortcut pads its channels with zeros to a fixed width"
        if op == "ConstantPadNd" and self._pads.other_than_zero:
            return "the model pads with another value than zero"
        if op == "Slice" and not (spatial and 2 <= saved._saved_dim < len(saved._saved_self_sym_sizes)):
            return "the model slices channels at fixed places"
        if op == "Mean" and not (spatial and hasattr(saved, "_saved_dim") and not _mean_dims(saved) & {0, 1}):
            return "the model may average over channels"
        return None


def _op(node: Any) -> str:
    """Return the operation's name without what autograd adds to it: ReluBackward0 → Relu."""
    name = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
    return name.rpartition("::")[2].partition("Backward")[0].lstrip("_")


def _op_pads(node: Any) -> bool:
    """Tell whether an operation mixes what lies beyond the border into its outputs; the maximum is of what is there."""
    saved = node.grad_fn
    averages = _op(node) in ("AvgPool2D", "AvgPool3D")
    return _op(node) == "ConstantPadNd" or (averages and saved._saved_count_include_pad and any(saved._saved_padding))


def _mean_dims(mean: Any) -> set[int]:
    rank = len(mean._saved_self_sym_sizes)
    return {(d - 2**64 if d >= 2**63 else d) % rank for d in mean._saved_dim}  # negative ones come as unsigned


def _torch_pruning() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages it imports
            import torch_pruning
    except ImportError as error:
        raise DualpruneError(f"shrink and silence need torch-pruning ({error}): pip install 'dualprune[shrink]'") from error
    return torch_pruning


# --- what is constant, and what can go ------------------------------------------------------------------------------


@dataclass
class Seen:
    """What arrived at a layer: for each input channel whether it is one number everywhere and always, and that number."""

    constant: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool, device="cpu"))
    value: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))

    def look(self, x: Tensor, dim: int) -> None:
        """Take one more input in. The last bits may differ: kernels treat the ends of rows their own way."""
        rows = x.detach().movedim(dim, 0).flatten(1)
        low, high = rows.amin(1).cpu(), rows.amax(1).cpu()
        if not self.constant.numel():
            self.constant, self.value = torch.ones_like(low, dtype=torch.bool), low
        slack = 8 * torch.finfo(x.dtype).eps * self.value.abs()
        self.constant &= (high - self.value <= slack) & (self.value - low <= slack)


@dataclass(frozen=True)
class Removal:
    """Channels to cut, by layer and side, and the constants (by input channel) that biases take over before."""

    root: str
    cuts: dict[Place, set[int]]
    folds: dict[str, Tensor]


@dataclass(frozen=True)
class Analysis:
    """What can go, and why the rest stays."""

    couplings: list[Coupling] = field(default_factory=list)
    removals: list[Removal] = field(default_factory=list)
    reasons: dict[tuple[str, str, int], str] = field(default_factory=dict)  # by layer, side and index
    settled: dict[str, set[int]] = field(default_factory=dict)  # outputs that need no look of their own any more
    gone: dict[Place, set[int]] = field(default_factory=dict)

    def note(self, coupling: Coupling, verdicts: Sequence[str | None]) -> None:
        """Take the verdicts on a root's channels over to all that goes with them."""
        for member in coupling.members:
            if member.role == "producer":
                self.settled.setdefault(member.name, set()).update(member.index.tolist())
            if member.module is not None:
                for channel, root in member.pairs():
                    if (why := verdicts[root]) is not None:
                        self.reasons.setdefault((member.name, member.side, channel), why)

    def give_up(self, name: str, module: nn.Module, error: Exception) -> None:
        """Say that the tracer failed at this layer."""
        why = f"torch-pruning cannot trace it ({type(error).__name__}: {error})"
        for side in (OUTPUTS, INPUTS):
            self.reasons.update({(name, side, c): why for c in range(width_of(module, side) or 0)})

    def remove(self, removal: Removal) -> None:
        """Add a removal."""
        self.removals.append(removal)
        for place, channels in removal.cuts.items():
            self.gone.setdefault(place, set()).update(channels)


def analyse(model: nn.Module, probes: list[Call], refused: Mapping[str, str]) -> Analysis:
    """Find what can go. `refused` says which roots are to be left alone, and why."""
    analysis = Analysis()
    pruning = _torch_pruning()
    try:
        graph = Graph(pruning, model, probes[0])
    except Exception as error:  # whatever the tracer makes of the model: then nothing can be cut
        for name, module in model.named_modules():
            analysis.give_up(name, module, error)
        return analysis
    seen = _look(model, probes)
    for root in graph.roots():
        width, done = width_of(root, OUTPUTS) or 0, analysis.settled.get(graph.name(root), set())
        if len(done) == width:
            continue
        try:
            coupling = graph.coupling(root, range(width))
        except Exception as error:  # as above, here for what hangs on this layer
            analysis.give_up(graph.name(root), root, error)
            continue
        verdicts: list[str | None]
        verdicts = [refused[coupling.root]] * width if coupling.root in refused else _verdicts(coupling, seen)
        wanted = [r for r in range(width) if verdicts[r] is None and r not in done]
        wanted = _spare_one(coupling, wanted, analysis.gone, verdicts)
        cuts = _places(coupling, wanted)
        if wanted and _places(graph.coupling(root, wanted), wanted) != cuts:
            for r in wanted:
                verdicts[r] = "further channels of the same layers are mixed with it"
        elif wanted:
            analysis.remove(Removal(coupling.root, cuts, _folds(coupling, wanted, seen)))
        analysis.couplings.append(coupling)
        analysis.note(coupling, verdicts)
    return analysis


def _places(coupling: Coupling, roots: Sequence[int]) -> dict[Place, set[int]]:
    """Return the channels of every layer that go with these of the root."""
    places: dict[Place, set[int]] = {}
    for member in coupling.members:
        if member.module is not None and width_of(member.module, member.side):
            channels = member.index[torch.isin(member.root, torch.tensor(roots, device="cpu"))].tolist()
            places.setdefault((member.name, member.side), set()).update(channels)
    return {place: channels for place, channels in places.items() if channels}


def _spare_one(coupling: Coupling, wanted: list[int], gone: Mapping[Place, set[int]], verdicts: list[str | None]) -> list[int]:
    """Leave every layer at least one channel."""
    widths = {(m.name, m.side): width_of(m.module, m.side) for m in coupling.members if m.module is not None}
    while any(len(c | gone.get(place, set())) == widths[place] for place, c in _places(coupling, wanted).items()):
        verdicts[wanted[0]] = "a layer keeps at least one channel"
        wanted = wanted[1:]
    return wanted


def _look(model: nn.Module, probes: list[Call]) -> dict[str, Seen]:
    """Run the probes and watch what arrives at every layer that can lose input channels."""
    seen = {name: Seen() for name, module in model.named_modules() if side_of(module, INPUTS)}

    def watch(name: str, dim: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen[name].look(args[0], dim) if args else None

    with ExitStack() as stack:
        for name in seen:
            module = model.get_submodule(name)
            dim = -1 if isinstance(module, nn.Linear) else 1 - weight_of(module).dim()
            stack.callback(module.register_forward_pre_hook(watch(name, dim)).remove)
        for probe in probes:
            run(model, probe)
    return seen


@dataclass(frozen=True)
class Flow:
    """What is known of each root channel at one place.

    Attributes:
        here: it passes there.
        free: it owes nothing to the model's input.
        even: free, and the same at all positions of inputs of every size: padding makes borders of a constant.
        zero: it is surely zero.
    """

    here: Tensor
    free: Tensor
    even: Tensor
    zero: Tensor


def _flow(coupling: Coupling) -> dict[int, Flow]:
    """Follow each root channel through its members, from the layers that make it on."""
    members = {m.key: m for m in coupling.members if m.role != "consumer"}
    order = TopologicalSorter({key: [s for s in m.sources if s in members] for key, m in members.items()})
    flow: dict[int, Flow] = {}
    try:
        for key in order.static_order():
            flow[key] = _through(coupling, members[key], flow)
    except CycleError:  # layers used over and over: nothing is known
        return {}
    return flow


def _through(coupling: Coupling, member: Member, flow: Mapping[int, Flow]) -> Flow:
    """Return what comes out of a member; its sources are in `flow`."""
    here = ~_over_roots(coupling, member, None)
    free, even, zero, any_zero = _merged(coupling, member, flow)
    module = member.module
    if member.pads:
        even = even & zero
    if module is None and member.op == "Mul":
        free, even, zero = free | any_zero, even | any_zero, any_zero
    elif module is None:
        with_number = member.op in ("Add", "Sub") and member.operands < 2
        zero = zero if member.op in _KEEP_ZERO and not with_number else torch.zeros_like(zero)
    elif isinstance(module, _BatchNorm):
        flat = _over_roots(coupling, member, module.weight.detach().cpu() == 0) if module.affine else torch.zeros_like(free)
        free, even, zero = free | flat, even | flat, flat & _over_roots(coupling, member, _unshifted(module))
    elif width_of(module, OUTPUTS) and not isinstance(module, nn.PReLU):
        dead = _over_roots(coupling, member, ~nonzero_slices(module, OUTPUTS))
        silent = _over_roots(coupling, member, _unshifted(module))
        free, even, zero = free | dead, even | dead, (zero | dead) & silent
    return Flow(here, free & here, even & free & here, zero & free & here)


def _merged(coupling: Coupling, member: Member, flow: Mapping[int, Flow]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where all sources are free, even, zero, and where any is zero; only concatenations have sources elsewhere."""
    sources, none = [flow[s] for s in member.sources if s in flow], torch.zeros(coupling.size, dtype=torch.bool, device="cpu")
    any_zero = reduce(or_, (s.zero for s in sources), none)
    if member.op == "Cat":
        there = reduce(or_, (s.here for s in sources), none)
        free = reduce(and_, (s.free | ~s.here for s in sources), there)
        even = reduce(and_, (s.even | ~s.here for s in sources), free)
        return free, even, reduce(and_, (s.zero | ~s.here for s in sources), free), any_zero
    if not sources or len(sources) < member.operands:
        return none, none, none, any_zero
    free, even, zero = (reduce(and_, (getattr(s, key) for s in sources)) for key in ("free", "even", "zero"))
    return free, even, zero, any_zero


def _unshifted(module: nn.Module) -> Tensor:
    """Tell for each output channel whether no bias is added."""
    if isinstance(module.bias, Tensor):
        return module.bias.detach().cpu() == 0
    return torch.ones(width_of(module, OUTPUTS) or 0, dtype=torch.bool, device="cpu")


def _over_roots(coupling: Coupling, member: Member, holds: Tensor | None) -> Tensor:
    """Turn a property of a member's channels (None: no channel has it) into one of the root's: all that go with it have it."""
    result = torch.ones(coupling.size, dtype=torch.bool, device="cpu")
    fails = slice(None) if holds is None or member.barrier else ~holds[member.index]
    result[member.root[fails]] = False
    return result


def constants(coupling: Coupling) -> list[tuple[Member, list[int]]]:
    """Return the layers whose output owes nothing to the model's input, and the channels where that is so."""
    flow = _flow(coupling)
    # where a layer is narrower than what it is combined with, channels are numbered beyond it
    layers = [m for m in coupling.members if m.key in flow and m.module is not None and m.role != "consumer" and not m.barrier]
    return [(m, m.index[flow[m.key].free[m.root]].tolist()) for m in layers]


def _verdicts(coupling: Coupling, seen: Mapping[str, Seen]) -> list[str | None]:
    """Say for each channel of the root why it cannot go, or None; what cannot be helped comes first."""
    barriers: dict[int, str] = {}
    needed: dict[int, str] = {}
    objections: dict[int, str | None] = {}
    flow, makers = _flow(coupling), _makers(coupling)
    for member in coupling.members:
        if member.barrier:
            barriers.update((r, member.barrier) for r in member.root.tolist() if r not in barriers)
        elif member.role == "consumer" and member.module is not None:
            free, even = (known.tolist() for known in _merged(coupling, member, flow)[:2])
            uses = nonzero_slices(member.module, INPUTS).tolist()
            for c, r in member.pairs():
                why = _objection(member, seen[member.name], c, even[r]) if uses[c] and free[r] else None
                objections[r] = objections.get(r) or why
                if uses[c] and not free[r]:
                    others = makers.get(r, "what cannot be followed")
                    needed.setdefault(r, f"{member.name} reads it, and it also carries {others}")
    unread = "no layer is known to read it"
    return [barriers.get(r) or needed.get(r) or objections.get(r, unread) for r in range(coupling.size)]


def _makers(coupling: Coupling) -> dict[int, str]:
    """Name the layers whose filters make each root channel more than a constant."""
    makers: dict[int, list[str]] = {}
    for member in coupling.members:
        if member.role == "producer" and member.module is not None and not member.barrier:
            live = nonzero_slices(member.module, OUTPUTS).tolist()
            for c, r in member.pairs():
                if live[c]:
                    makers.setdefault(r, []).append(member.name)
    return {r: ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN) for r, names in makers.items()}


def _objection(reader: Member, seen: Seen, c: int, even: bool) -> str | None:
    """Say why a reader cannot do without channel `c`, which owes nothing to the model's input; None if it can."""
    advice = "dualprune.silence(model, example) makes it zero"
    if not seen.constant.numel() or not seen.constant[c]:
        return f"a bias or batch norm makes it differ between positions where {reader.name} reads it; {advice}"
    if not even:
        return f"a bias or batch norm, then padding, makes it vary with the input's size where {reader.name} reads it; {advice}"
    if float(seen.value[c]) == 0 or _folds_constants(reader.module):
        return None
    why = "has no bias" if getattr(reader.module, "bias", None) is None else "pads with zeros"
    return f"a bias or batch norm makes it a constant, which {reader.name} cannot take over, as it {why}; {advice}"


def _folds_constants(module: nn.Module | None) -> bool:
    """Tell whether a constant input channel adds the same to all positions, and there is a bias to take it over."""
    if getattr(module, "bias", None) is None or isinstance(module, nn.Linear):
        return isinstance(module, nn.Linear) and module.bias is not None
    return isinstance(module, _ConvNd) and not module.transposed and not _pads_with_zeros(module)


def _pads_with_zeros(module: _ConvNd) -> bool:
    padded = max(module.kernel_size) > 1 if module.padding == "same" else module.padding != "valid" and any(module.padding)
    return module.padding_mode == "zeros" and padded


def _folds(coupling: Coupling, roots: Sequence[int], seen: Mapping[str, Seen]) -> dict[str, Tensor]:
    """Return, for each reader, the constants that it loses by input channel; zero elsewhere."""
    folds: dict[str, Tensor] = {}
    for member in coupling.members:
        if member.role == "consumer" and member.module is not None:
            channels = member.index[torch.isin(member.root, torch.tensor(roots, device="cpu"))]
            lost = channels[nonzero_slices(member.module, INPUTS)[channels]]
            if lost.numel() and bool((values := seen[member.name].value[lost]).any()):
                folds[member.name] = torch.zeros(len(seen[member.name].value), device="cpu").index_put((lost,), values.float())
    return folds
