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

from dualprune.budget import check_budget, compression_rate, erk_sparsities, resolve_sparsity
from dualprune.errors import DualpruneError, suggest
from dualprune.patterns import NM, Pattern, Unstructured, check_sparsity, parse_pattern
from dualprune.selection import keep_largest

logger = logging.getLogger("dualprune")

Rule = str | float | Pattern | tuple[str | Pattern, float]


@dataclass(frozen=True)
class Target:
    """One parameter to prune, the set it shall end in, and the other names it goes by (tied weights)."""

    name: str
    weight: nn.Parameter
    pattern: Pattern
    sparsity: float
    pooled: bool = False  # shares one threshold with the other pooled targets of its pattern
    aliases: tuple[str, ...] = ()


@dataclass
class Problem:
    """The targets in model order, and why every other parameter is left alone."""

    targets: list[Target]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> list[Tensor]:
        """The live parameters, detached: writing to them writes to the model."""
        return [t.weight.detach() for t in self.targets]

    def masks(self, values: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
        """Return the masks (True = keep) of the projection of `values` onto the sets, at `scale` times the final sparsity."""
        masks: list[Tensor | None] = [None] * len(self.targets)
        pools: dict[tuple[Pattern, float, torch.device, torch.dtype], list[int]] = {}
        for i, (target, value) in enumerate(zip(self.targets, values, strict=True)):
            if target.pooled:
                pools.setdefault((target.pattern, target.sparsity, value.device, value.dtype), []).append(i)
            else:
                masks[i] = target.pattern.mask(value, target.sparsity * scale)
        for (pattern, sparsity, _, _), members in pools.items():
            pooled = _pool_masks(pattern, [values[i] for i in members], sparsity * scale)
            for i, mask in zip(members, pooled, strict=True):
                masks[i] = mask
        return masks  # type: ignore[return-value]

    def describe(self) -> str:
        """Say in a few lines what is pruned, how much of it is kept, and what is left alone."""
        total = sum(t.weight.numel() for t in self.targets)
        kept = sum(t.weight.numel() * (1 - t.sparsity) for t in self.targets)
        asked = f"{compression_rate(1 - kept / total):.4g}x" if kept else "all removed"
        lines = [f"pruning {len(self.targets)} parameters, {total:,} weights, to {asked} fewer"]
        lines += [f"  {t.name} is also {', '.join(t.aliases)} (tied): pruned once" for t in self.targets if t.aliases]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")
            lines.append(f"  left alone, {reason}: {shown}")
        return "\n".join(lines)


def build_problem(
    model: nn.Module,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    patterns: Mapping[str, Rule] | None = None,
    ignore: Iterable[str] | None = None,
    budget: str = "uniform",
    trainable: Iterable[Tensor] | None = None,
) -> Problem:
    """Decide for every parameter of `model` whether and how it is pruned.

    Args:
        model: any module; wrappers' `module.` and `_orig_mod.` are stripped from names.
        rate: how many times fewer weights in the pruned layers (10 keeps a tenth); or
        sparsity: the fraction removed, 0.9. Without either, only parameters that `patterns` names are pruned.
        patterns: globs over parameter names → a pattern ("2:4", Filter()), a sparsity (0.9), or both (("filter", 0.5)).
            The first glob that matches a name (or its module's, or a tied parameter's other one) decides;
            parameters of fewer than two dimensions are reached by their exact name only.
        ignore: globs of parameters to leave alone; None leaves the first and last layer, () none.
        budget: "uniform", "erk" or "global"; a sparsity given in `patterns` is not touched by it.
        trainable: the optimizer's parameters; others are left alone. None means all.

    Raises:
        DualpruneError: a glob matches nothing, a pattern does not fit, or nothing is left to prune.
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
    ignored = _ignored([home for home in homes.values() if home not in skipped], homes, ignore)
    owned = None if trainable is None else {id(p) for p in trainable}
    _all_match([glob for glob, *_ in rules], homes, "patterns")

    targets: list[Target] = []
    for name, weight in named.items():
        names = (name, *aliases.get(name, ()))
        rule = next(((p, s) for glob, p, s in rules if _reaches(glob, names, weight)), None)
        if (rule is None and name in skipped) or (reason := _unfit(weight, owned)):
            skipped[name] = skipped.get(name) or reason
        elif name in ignored and (rule is None or ignore is not None):
            skipped[name] = ignored[name]
        elif rule is None and asked is None:
            skipped[name] = "no pattern names it"
        else:
            pattern, own = rule or (None, None)
            targets.append(_target(name, weight, pattern, own, asked, budget, aliases.get(name, ())))
            skipped.pop(name, None)
    if not targets:
        raise DualpruneError(_nothing_left(skipped, asked, bool(rules)))
    return Problem(_with_erk(targets, asked) if budget == "erk" else targets, skipped)


def parameter_name(name: str) -> str:
    """Return a parameter's name without the wrappers' prefixes: `module.` in front, `_orig_mod.` anywhere."""
    return re.sub(r"^(module\.)+", "", re.sub(r"(?<![^.])_orig_mod\.", "", name))


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
        if not isinstance(pattern, NM):
            raise DualpruneError(f"{name}: pattern {pattern} needs a sparsity; give rate=, sparsity= or (pattern, sparsity)")
        wanted = pattern.snap(0.0)
    try:
        pattern.check(tuple(weight.shape))
    except DualpruneError as error:
        raise DualpruneError(f"{name}: {error}") from None
    pooled = budget != "uniform" and own is None and not isinstance(pattern, NM)
    return Target(name, weight, pattern, pattern.snap(wanted), pooled, aliases)


def _with_erk(targets: list[Target], asked: float | None) -> list[Target]:
    free = [t for t in targets if t.pooled]
    spread = erk_sparsities([tuple(t.weight.shape) for t in free], asked or 0.0)
    by_name = {t.name: s for t, s in zip(free, spread, strict=True)}
    return [replace(t, sparsity=by_name.get(t.name, t.sparsity), pooled=False) for t in targets]


def _pool_masks(pattern: Pattern, values: list[Tensor], sparsity: float) -> list[Tensor]:
    """Rank units of all layers together, by magnitude or, where units differ in size, by energy per weight."""
    if isinstance(pattern, Unstructured):
        total = sum(v.numel() for v in values)
        return keep_largest(values, total - round(sparsity * total))
    shapes = [tuple(v.shape) for v in values]
    size = [pattern.weights_per_unit(s) for s in shapes]
    scores = [pattern.scores(v) / n for v, n in zip(values, size, strict=True)]
    # the strongest unit of every layer stays, so that no layer dies and cuts the network
    floor = [int(s.argmax()) for s in scores]
    for s, i in zip(scores, floor, strict=True):
        s[i] = math.inf
    costs = torch.cat([torch.full_like(s, n, dtype=torch.float64) for s, n in zip(scores, size, strict=True)])
    order = torch.cat(scores).argsort(descending=True, stable=True)
    spent = costs[order].cumsum(0)
    budget = (1 - sparsity) * float(costs.sum())
    count = max(len(values), int((spent <= budget + 0.5).sum()))
    keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    keep[order[:count]] = True
    parts = keep.split([s.numel() for s in scores])
    return [pattern.expand(k, s).expand(s) for k, s in zip(parts, shapes, strict=True)]


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


def _matches(glob: str, name: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob)


def _reaches(glob: str, names: Sequence[str], weight: nn.Parameter) -> bool:
    """Tell whether a rule means this parameter; biases and norms are never caught by accident."""
    return any(_matches(glob, name) for name in names) if _dims(weight) >= 2 else glob in names


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
        return "not materialised (lazy or meta)"
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
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:6])
    return f"nothing to prune: every parameter is left alone ({reasons}). Pass ignore=() to prune first and last layers too"
