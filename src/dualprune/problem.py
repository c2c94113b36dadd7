"""From a model and globs over its parameter names to what is pruned: parameter, pattern and budget, nothing silent."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from dualprune import sharded
from dualprune.budget import check_budget, compression_rate, erk_sparsities, lamp_scores, resolve_sparsity
from dualprune.distributed import count_nonzero, keep_largest, span
from dualprune.errors import DualpruneError, suggest
from dualprune.importance import SecondMoment
from dualprune.patterns import NM, KernelPattern, Pattern, Unstructured, check_sparsity, parse_pattern
from dualprune.quantise import check_bits, snap

logger = logging.getLogger("dualprune")

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
UNMADE = "not materialised (lazy or meta)"

Rule = str | float | Pattern | tuple[str | Pattern, float]
Member = tuple[Pattern, Tensor]  # of a tie: how its values fall into units, and the values


@dataclass(frozen=True)
class Target:
    """One parameter to prune, the set it shall end in, and the other names it goes by (tied weights)."""

    name: str
    weight: nn.Parameter
    pattern: Pattern
    sparsity: float
    pooled: bool = False  # shares one threshold with the other pooled targets of its pattern
    aliases: tuple[str, ...] = ()
    bits: int | None = None  # its nonzeros shall end on a grid of so many bits


@dataclass
class Problem:
    """The targets in model order, and why every other parameter is left alone."""

    targets: list[Target]
    skipped: dict[str, str] = field(default_factory=dict)
    frozen: list[Tensor] | None = None  # per target, True = a zero that stays one
    ties: list[tuple[int, ...]] = field(default_factory=list)  # targets that share one mask over their units
    budget: str = "uniform"
    importance: SecondMoment | None = None  # what magnitudes are multiplied by before they are ranked

    @property
    def weights(self) -> list[Tensor]:
        """The live parameters, detached: writing to them writes to the model."""
        return [t.weight.detach() for t in self.targets]

    @property
    def tied_names(self) -> list[list[str]]:
        """The ties by the names of their targets."""
        return [[self.targets[i].name for i in tie] for tie in self.ties]

    def masks(self, values: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
        """Return the masks (True = keep) of the projection of `values` onto the sets, at `scale` times the final sparsity."""
        if self.importance is not None:
            values = self.importance.weigh([t.weight for t in self.targets], values)
        if self.frozen is not None:
            values = [v.masked_fill(f, 0) for v, f in zip(values, self.frozen, strict=True)]
        masks: dict[int, Tensor] = {}
        pools: dict[tuple[Pattern, float, torch.device, torch.dtype], list[tuple[int, ...]]] = {}
        for group in self._groups():
            head, value = self.targets[group[0]], values[group[0]]
            if head.pooled:
                pools.setdefault((head.pattern, head.sparsity, value.device, value.dtype), []).append(group)
            elif len(group) == 1:
                masks[group[0]] = sharded.mask(head.pattern, value, head.sparsity * scale)
            else:
                kept = head.pattern.kept(tuple(value.shape), head.sparsity * scale)
                masks |= zip(group, _tied_masks(self._members(group, values), kept), strict=True)
        for (_, sparsity, _, _), groups in pools.items():
            if self.budget == "lamp":
                shares = [lamp_scores(values[i]) for group in groups for i in group]
                pooled = _largest(shares, sparsity * scale)
            else:
                pooled = _pool_masks([self._members(group, values) for group in groups], sparsity * scale)
            masks |= zip((i for group in groups for i in group), pooled, strict=True)
        if self.frozen is not None:
            masks = {i: mask & ~self.frozen[i] for i, mask in masks.items()}
        return [masks[i] for i in range(len(self.targets))]

    def project(self, values: Sequence[Tensor], scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
        """Return the projections of `values` onto "sparse and on the grid", and their masks.

        Where a mask is False the projection is 0, whatever the first list has there. Zero is a level: a weight that is
        rounded to it is not kept.
        """
        points, masks = list(values), self.masks(values, scale)
        for i, target in enumerate(self.targets):
            if target.bits is not None:
                points[i] = snap(torch.where(masks[i], values[i], 0), target.bits)
                masks[i] = points[i] != 0
        return points, masks

    def magnitude_pools(self, scale: float = 1.0) -> list[tuple[list[int], int]] | None:
        """Return the targets that share a threshold, and how many weights these keep; None where there is more to a mask.

        There is with other patterns than `Unstructured`, ties, zeros that stay, grids, LAMP, importance, and weights cut up
        over ranks.
        """
        special = self.frozen is not None or self.ties or self.budget == "lamp" or self.importance is not None
        special = special or any(t.bits is not None for t in self.targets)
        plain = all(isinstance(t.pattern, Unstructured) and not hasattr(t.weight, "to_local") for t in self.targets)
        if special or not plain:
            return None
        pools: dict[object, list[int]] = {}
        for i, t in enumerate(self.targets):
            key = (t.sparsity, t.weight.device, t.weight.dtype) if t.pooled else i
            pools.setdefault(key, []).append(i)
        sizes = [(members, sum(self.targets[i].weight.numel() for i in members)) for members in pools.values()]
        return [(m, size - round(self.targets[m[0]].sparsity * scale * size)) for m, size in sizes]

    def _groups(self) -> list[tuple[int, ...]]:
        """Return the ties, each where its first target stands, and every other target by itself."""
        tie_of = {i: tie for tie in self.ties for i in tie}
        return [group for i in range(len(self.targets)) if (group := tie_of.get(i, (i,)))[0] == i]

    def _members(self, group: tuple[int, ...], values: Sequence[Tensor]) -> list[Member]:
        return [(self.targets[i].pattern, values[i]) for i in group]

    def describe(self) -> str:
        """Say in a few lines what is pruned, how much of it is kept, and what is left alone."""
        total = sum(t.weight.numel() for t in self.targets)
        kept = sum(t.weight.numel() * (1 - t.sparsity) for t in self.targets)
        asked = f"{compression_rate(1 - kept / total):.4g}x" if kept else "all removed"
        lines = [f"pruning {len(self.targets)} parameters, {total:,} weights, to {asked} fewer"]
        lines += [f"  {t.name} is also {', '.join(t.aliases)} (tied): pruned once" for t in self.targets if t.aliases]
        widths = sorted({t.bits for t in self.targets if t.bits is not None})
        lines += [f"  on a grid of {b} bits: {_some([t.name for t in self.targets if t.bits == b])}" for b in widths]
        lines += [f"  tied, with one mask over their units: {', '.join(names)}" for names in self.tied_names]
        pools: dict[tuple[Pattern, float], set[str]] = {}
        for t in self.targets:
            if t.pooled:
                kind = f"{str(t.weight.dtype).removeprefix('torch.')} on {t.weight.device}"
                pools.setdefault((t.pattern, t.sparsity), set()).add(kind)
        for kinds in (kinds for kinds in pools.values() if len(kinds) > 1):
            lines.append(f"  no threshold is shared between {' and '.join(sorted(kinds))}: each keeps its own share")
        if self.frozen is not None:
            lines.append(f"  {sum(count_nonzero(self.frozen)):,} weights are zero already and stay zero")
        lines += [f"  left alone, {reason}: {_some(names)}" for reason, names in _by_reason(self.skipped).items()]
        return "\n".join(lines)


def build_problem(
    model: nn.Module,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    patterns: Mapping[str, Rule] | None = None,
    ignore: Iterable[str] | None = None,
    budget: str = "uniform",
    bits: int | Mapping[str, int] | None = None,
    trainable: Iterable[Tensor] | None = None,
    keep_zeros: bool = False,
    ties: Iterable[Iterable[str]] | None = None,
) -> Problem:
    """Decide for every parameter of `model` whether and how it is pruned.

    Args:
        model: any module; wrappers' `module.` and `_orig_mod.` are stripped from names.
        rate: how many times fewer weights in the pruned layers (10 keeps a tenth); or
        sparsity: the fraction removed, 0.9. Without either, only parameters that `patterns` names are pruned.
        patterns: globs over parameter names → a pattern ("2:4", Filter()), a sparsity (0.9), or both (("filter", 0.5)).
            The first glob that matches a name (or its module's, or a tied parameter's other one) decides. What the defaults
            of `ignore` leave alone is reached by an exact name, the parameter's or its module's, and by no wildcard;
            parameters of fewer than two dimensions, and gains of weight norms, by their own exact name only.
        ignore: globs of parameters to leave alone; None leaves the first and last layer and what is no layer's weight (norms,
            gains, class tokens, position embeddings, bias tables), () none of them.
        budget: "uniform", "erk", "global" or "lamp"; a sparsity given in `patterns` is not touched by it.
        bits: 2 to 8 to end on a grid of so many bits as well: a number for all that is pruned, or globs over names → numbers,
            the first match decides. A weight that is only to be quantised is pruned at sparsity 0.
        trainable: the optimizer's parameters; others are left alone. None means all.
        keep_zeros: zeros that the pruned parameters have now stay zero; they count towards the sparsity asked for.
        ties: lists of names of parameters whose units are kept or dropped together, ranked by the sum of their energies.

    Raises:
        DualpruneError: a glob matches nothing, or nothing but what the defaults leave alone; a pattern does not fit;
            nothing is left to prune; or a tie cannot be kept.
    """
    asked = resolve_sparsity(rate, sparsity)
    check_budget(budget)
    rules = [(glob, *_parse_rule(glob, rule)) for glob, rule in (patterns or {}).items()]
    named, homes = _named_weights(model)
    aliases: dict[str, tuple[str, ...]] = {}
    for name, home in homes.items():
        if name != home:
            aliases[home] = (*aliases.get(home, ()), name)
    skipped = {name: "fewer than two dimensions" for name, p in named.items() if _dims(p) < 2}
    gains, lone = _gains(model), set(skipped)
    defaults: dict[str, str] = {}
    if ignore is None:
        beside = _beside_layers(model) | gains
        defaults = {name: "no layer's weight" for name, p in named.items() if name not in lone and id(p) in beside}
        lone |= {name for name in defaults if id(named[name]) in gains}
        skipped |= defaults
    ignored = _ignored([home for home in homes.values() if home not in skipped], homes, ignore)
    if ignore is None:
        defaults |= ignored
    owned = None if trainable is None else {id(p) for p in trainable}
    _all_match([glob for glob, *_ in rules], homes, "patterns")

    targets: list[Target] = []
    for name, weight in named.items():
        names = (name, *aliases.get(name, ()))
        rule = next(((p, s) for glob, p, s in rules if _reaches(glob, names, name in lone, name in defaults)), None)
        if rule is None and name in skipped:
            continue
        if reason := _unfit(weight, owned):
            skipped[name] = reason
        elif name in ignored and (rule is None or ignore is not None):
            skipped[name] = ignored[name]
        elif rule is None and asked is None:
            skipped[name] = "no pattern names it"
        else:
            pattern, own = rule or (None, None)
            targets.append(_target(name, weight, pattern, own, asked, budget, aliases.get(name, ())))
            skipped.pop(name, None)
    spared = {name: reason for name, reason in defaults.items() if skipped.get(name) == reason}
    others = {name for name in named if name not in lone | spared.keys()}
    pruned = {t.name for t in targets} - lone
    for glob, *_ in reversed(rules):
        passed = {name: why for name, why in spared.items() if _matches_any(glob, (name, *aliases.get(name, ())))}
        wanted = pruned or others  # where nothing at all is pruned, others may be left alone for a reason of their own
        if passed and not any(_matches_any(glob, (name, *aliases.get(name, ()))) for name in wanted):
            raise DualpruneError(_passed_by(glob, passed))
        skipped |= {name: f"{why} (a default that {glob!r} does not lift, its exact name does)" for name, why in passed.items()}
    if not targets:
        raise DualpruneError(_nothing_left(skipped, asked, bool(rules)))
    targets = _with_bits(targets, bits, homes, skipped)
    if cut := [t.name for t in targets if t.bits is not None and span(t.weight)]:
        raise DualpruneError(
            f"bits: {_some(cut)} is cut up over ranks, and a grid needs all of a weight: quantise without shards"
        )
    problem = Problem(_with_erk(targets, asked) if budget == "erk" else targets, skipped, budget=budget)
    problem.ties = _resolve_ties(problem, ties or (), homes)
    if budget == "lamp":
        _check_lamp(problem)
    if keep_zeros:
        problem.frozen = [w == 0 for w in problem.weights]
    return problem


def parameter_name(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers: `module.` in front, two others anywhere."""
    return re.sub(r"^(module\.)+", "", re.sub(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.", "", name))


def _target(
    name: str,
    weight: nn.Parameter,
    pattern: Pattern | None,
    own: float | None,
    asked: float | None,
    budget: str,
    aliases: tuple[str, ...],
) -> Target:
    pattern = pattern or Unstructured()
    wanted = own if own is not None else asked
    if wanted is None:
        if not pattern.alone:
            raise DualpruneError(f"{name}: pattern {pattern} needs a sparsity; give rate=, sparsity= or (pattern, sparsity)")
        wanted = pattern.snap(0.0)
    try:
        pattern.check(tuple(weight.shape))
        sharded.check(pattern, weight)
    except DualpruneError as error:
        raise DualpruneError(f"{name}: {error}") from None
    pooled = budget != "uniform" and own is None and not isinstance(pattern, NM)
    return Target(name, weight, pattern, pattern.snap(wanted), pooled, aliases)


def _with_bits(
    targets: list[Target], bits: int | Mapping[str, int] | None, names: Mapping[str, str], skipped: Mapping[str, str]
) -> list[Target]:
    """Give every target the bits that `bits` asks for it; a glob that reaches no target is an error."""
    if not isinstance(bits, Mapping):
        return targets if bits is None else [replace(t, bits=check_bits(bits)) for t in targets]
    rules = {glob: check_bits(b, f"bits[{glob!r}]") for glob, b in bits.items()}
    _all_match(list(rules), names, "bits")
    for glob in rules:
        if not any(_matches_any(glob, (t.name, *t.aliases)) for t in targets):
            name = next(home for n, home in names.items() if _matches(glob, n))
            raise DualpruneError(
                f"bits: {glob!r} reaches nothing that is pruned: {name} is left alone, {skipped[name]}. To quantise without "
                f"pruning it, give it sparsity 0: patterns={{{name!r}: 0.0}}"
            )
    reach = [next((b for g, b in rules.items() if _matches_any(g, (t.name, *t.aliases))), None) for t in targets]
    return [replace(t, bits=b) for t, b in zip(targets, reach, strict=True)]


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")


def _with_erk(targets: list[Target], asked: float | None) -> list[Target]:
    free = [t for t in targets if t.pooled]
    spread = erk_sparsities([tuple(t.weight.shape) for t in free], asked or 0.0)
    by_name = {t.name: s for t, s in zip(free, spread, strict=True)}
    return [replace(t, sparsity=t.pattern.snap(by_name.get(t.name, t.sparsity)), pooled=False) for t in targets]


def _energies(group: Sequence[Member]) -> Tensor:
    """Return the energy of every unit, summed over the members."""
    first, *others = (sharded.energies(pattern, v) for pattern, v in group)
    return sum((s.to(first.device) for s in others), first)


def _tied_masks(group: Sequence[Member], kept: int) -> list[Tensor]:
    return _spread(keep_largest([_energies(group)], kept)[0], group)


def _spread(keep: Tensor, group: Sequence[Member]) -> list[Tensor]:
    return [sharded.spread(pattern, keep, v) for pattern, v in group]


def _largest(values: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    total = sum(v.numel() for v in values)
    return keep_largest(values, total - round(sparsity * total))


def _pool_masks(groups: Sequence[Sequence[Member]], sparsity: float) -> list[Tensor]:
    """Rank units of all layers together, by magnitude or, where units differ in size, by energy per weight."""
    pattern, values = groups[0][0][0], [v for group in groups for _, v in group]
    if isinstance(pattern, Unstructured):
        return _largest(values, sparsity)
    if isinstance(pattern, KernelPattern):
        return pattern.masks(values, sparsity, all_alive=True)
    size = [sum(p.weights_per_unit(tuple(v.shape)) for p, v in group) for group in groups]
    scores = [_energies(group) / n for group, n in zip(groups, size, strict=True)]
    # the strongest unit of every layer stays, so that no layer dies and cuts the network
    floor = [int(s.argmax()) for s in scores]
    for s, i in zip(scores, floor, strict=True):
        s[i] = math.inf
    costs = torch.cat([torch.full_like(s, n, dtype=torch.float64) for s, n in zip(scores, size, strict=True)])
    order = torch.cat(scores).argsort(descending=True, stable=True)
    spent = costs[order].cumsum(0)
    budget = (1 - sparsity) * float(costs.sum())
    count = max(len(groups), int((spent <= budget + 0.5).sum()))
    keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    keep[order[:count]] = True
    parts = keep.split([s.numel() for s in scores])
    return [mask for k, group in zip(parts, groups, strict=True) for mask in _spread(k, group)]


def check_frozen(problem: Problem) -> None:
    """Refuse zeros beyond those asked for; a stray one in a thousand weights is forgiven."""
    sizes = [t.pattern.weights_per_unit(tuple(t.weight.shape)) for t in problem.targets]
    together = {i: sum(sizes[j] for j in group) for group in problem._groups() for i in group}
    asked: dict[object, list[int]] = {}
    for i, t in enumerate(problem.targets):
        asked.setdefault((t.pattern, t.sparsity, t.weight.device, t.weight.dtype) if t.pooled else i, []).append(i)
    zeros = count_nonzero(problem.frozen or [])
    for members in asked.values():
        layers = [problem.targets[i] for i in members]
        total, there = sum(t.weight.numel() for t in layers), sum(zeros[i] for i in members)
        head = layers[0]
        if head.pooled:  # the cut goes on until what is left fits, so the last unit may take it below what was asked
            removed, over = head.sparsity * total, max(together[i] for i in members)
        else:
            removed, over = total - head.pattern.kept(tuple(head.weight.shape), head.sparsity) * sizes[members[0]], 0.0
        if there > removed + over + total // 1000:
            names = ", ".join(t.name for t in layers[:3]) + (", …" if len(layers) > 3 else "")
            raise DualpruneError(
                f"{names}: {there / total:.4f} of the weights are zero already and keep_zeros keeps them, but sparsity "
                f"{removed / total:.4f} is asked for: ask for more (it counts against the dense size), or leave keep_zeros out"
            )


def _check_lamp(problem: Problem) -> None:
    for t in problem.targets:
        if t.pooled and (not isinstance(t.pattern, Unstructured) or span(t.weight)):
            what = "cut up over ranks" if span(t.weight) else f"pruned by {t.pattern}"
            raise DualpruneError(f"budget 'lamp' ranks single weights of whole layers, {t.name} is {what}: take 'global'")


def _resolve_ties(problem: Problem, ties: Iterable[Iterable[str]], homes: Mapping[str, str]) -> list[tuple[int, ...]]:
    """Turn names into indices of targets, in model order, and make sure that one mask over units fits all of a tie."""
    place = {t.name: i for i, t in enumerate(problem.targets)}
    resolved: list[tuple[int, ...]] = []
    for tie in ties:
        if isinstance(tie, str):
            raise DualpruneError(f"ties is a list of lists of parameter names, got {tie!r} in it: did you mean [[{tie!r}, …]]?")
        names = list(dict.fromkeys(_tied_name(name, homes, problem.skipped) for name in tie))
        said = f"tie [{', '.join(names)}]"
        if len(names) < 2:
            raise DualpruneError(f"{said}: a tie has two parameters or more")
        members = [problem.targets[place[name]] for name in names]
        if again := [name for name in names if any(place[name] in other for other in resolved)]:
            raise DualpruneError(f"{said}: {again[0]} is in another tie too; write one tie of all that hang together")
        _check_tie(said, members)
        resolved.append(tuple(sorted(place[name] for name in names)))
    return resolved


def _tied_name(name: str, homes: Mapping[str, str], skipped: Mapping[str, str]) -> str:
    home = homes.get(name) or homes.get(parameter_name(name))
    if home is None:
        raise DualpruneError(f"ties: {name!r} is no parameter{suggest(str(name), homes)}")
    if home in skipped:
        raise DualpruneError(
            f"ties: {home} is not pruned ({skipped[home]}), so what is tied to it cannot go either: "
            "prune it too (name it in patterns), or leave the whole tie out and ignore its parameters"
        )
    return home


def _check_tie(said: str, members: Sequence[Target]) -> None:
    for t in members:
        if isinstance(t.pattern, Unstructured | NM | KernelPattern):
            raise DualpruneError(
                f"{said}: {t.name} is pruned by {t.pattern}, which has no units to share; use filter or channel"
            )
    units = {t.name: t.pattern.units(tuple(t.weight.shape)) for t in members}
    if len(set(units.values())) > 1:
        listed = ", ".join(f"{t.name} has {units[t.name]} ({t.pattern})" for t in members)
        raise DualpruneError(f"{said}: all must have the same number of units, but {listed}")
    if len({(t.sparsity, t.pooled) for t in members}) > 1:
        listed = ", ".join(f"{t.name} {t.sparsity:.4g}" for t in members)
        raise DualpruneError(
            f"{said}: one mask has one sparsity, but asked are {listed}; budget 'uniform' or 'global' gives one"
        )


def _parse_rule(glob: str, rule: Rule) -> tuple[Pattern | None, float | None]:
    if isinstance(rule, tuple | list) and len(rule) == 2:
        return parse_pattern(rule[0]), check_sparsity(rule[1], f"patterns[{glob!r}] sparsity")
    if isinstance(rule, str | Pattern):
        return parse_pattern(rule), None
    return None, check_sparsity(rule, f"patterns[{glob!r}] sparsity")


def _named_weights(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Return every distinct parameter under its first name, and for every name, in model order, that first one."""
    first: dict[int, str] = {}
    named: dict[str, nn.Parameter] = {}
    homes: dict[str, str] = {}
    for raw, p in model.named_parameters(remove_duplicate=False):
        short = parameter_name(raw)
        name = raw if short in homes else short  # a model of both `fc` and `module.fc` keeps the two apart
        homes[name] = first.setdefault(id(p), name)
        named[homes[name]] = p
    return named, homes


def _ignored(prunable: Sequence[str], homes: Mapping[str, str], ignore: Iterable[str] | None) -> dict[str, str]:
    if ignore is None:
        return {prunable[-1]: "last layer", prunable[0]: "first layer"} if prunable else {}
    globs = [ignore] if isinstance(ignore, str) else list(ignore)
    _all_match(globs, homes, "ignore")
    return {home: "ignored" for name, home in homes.items() if any(_matches(g, name) for g in globs)}


def _gains(model: nn.Module) -> set[int]:
    """Return the ids of weight norms' gains, old or parametrized: one factor per slice of the direction beside it."""
    gains: set[int] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, gain in own.items():
            direction = own.get(f"{name[:-2]}_v" if name.endswith("_g") else "original1" if name == "original0" else "")
            if direction is not None and _is_gain(gain, direction):
                gains.add(id(gain))
    return gains


def _is_gain(gain: nn.Parameter, direction: nn.Parameter) -> bool:
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in (gain, direction)) or gain.ndim != direction.ndim:
        return False
    fits = all(g in (1, d) for g, d in zip(gain.shape, direction.shape, strict=True))
    return fits and sum(g > 1 for g in gain.shape) < 2


def _beside_layers(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of two or more dimensions that are no layer's weight, by module, name or shape."""
    beside: set[int] = set()
    for module in model.modules():
        for own, p in module.named_parameters(recurse=False):
            if isinstance(p, nn.parameter.UninitializedParameter):
                continue
            vector = sum(n > 1 for n in p.shape) < 2
            if isinstance(module, NORMS) or ("weight" not in own and (vector or re.search("pos|token|bias|embed", own))):
                beside.add(id(p))
    return beside


def _matches(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _matches_any(glob: str, names: Iterable[str]) -> bool:
    return any(_matches(glob, name) for name in names)


def _reaches(glob: str, names: Sequence[str], lone: bool, spared: bool) -> bool:
    """Tell whether a rule means this parameter: one in `lone` by its own name, one `spared` by default by no wildcard."""
    if lone or (spared and any(c in glob for c in "*?[")):
        return glob in names
    return _matches_any(glob, names)


def _dims(weight: nn.Parameter) -> int:
    return 2 if isinstance(weight, nn.parameter.UninitializedParameter) else weight.ndim  # a lazy shape is unknown


def _all_match(globs: Sequence[str], names: Iterable[str], what: str) -> None:
    names = list(names)
    for glob in globs:
        if not any(_matches(glob, name) for name in names):
            shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            raise DualpruneError(f"{what}: {glob!r} matches no parameter{suggest(glob, names)} (parameters: {shown})")


def _unfit(weight: nn.Parameter, owned: set[int] | None) -> str:
    if not weight.requires_grad:
        return "frozen (requires_grad is False)"
    if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
        return UNMADE
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"not a float of 16, 32 or 64 bits ({weight.dtype})"
    if not weight.numel():
        return "empty"
    if owned is not None and id(weight) not in owned:
        return "not in the optimizer"
    return ""


def _nothing_left(skipped: Mapping[str, str], asked: float | None, ruled: bool) -> str:
    if asked is None and not ruled:
        return "nothing to prune: give rate=10, sparsity=0.9 or patterns={glob: pattern}"
    reasons = "; ".join(f"{_some(names)}: {reason}" for reason, names in _by_reason(skipped).items())
    if UNMADE in skipped.values():
        return (
            f"nothing to prune: every parameter is left alone ({reasons}). Materialise the model first, by "
            "model.to_empty(device=…) and its weights, or by a forward pass of lazy modules, and then attach"
        )
    return (
        f"nothing to prune: every parameter is left alone ({reasons}). Pass ignore=() to prune first and last layers too, or "
        "name in patterns exactly what is to be pruned"
    )


def _passed_by(glob: str, spared: Mapping[str, str]) -> str:
    """Say that a glob comes to nothing, because a default leaves alone all that it matches."""
    first = next(iter(spared))
    exact = " or ".join(repr(name) for name in (first, first.rpartition(".")[0]) if name)
    return (
        f"patterns: {glob!r} reaches nothing that is pruned: a default leaves alone "
        f"{_some([f'{name} ({reason})' for name, reason in spared.items()])}, and a wildcard does not lift it. Name exactly "
        f"what is meant, such as {exact}, or pass ignore=() to lift all defaults"
    )
