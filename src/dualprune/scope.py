"""Which parameters are pruned and which are left alone: from a model and globs over its names to a `Problem`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property

from torch import Tensor, nn

from dualprune import sharded
from dualprune.budget import check_budget, erk_sparsities, resolve_sparsity
from dualprune.distributed import span
from dualprune.errors import DualpruneError, suggest
from dualprune.patterns import NM, KernelPattern, Pattern, Unstructured, check_sparsity, parse_pattern
from dualprune.problem import Problem, Target, by_reason, some
from dualprune.quantise import check_bits

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
UNMADE = "not materialised (lazy or meta)"

Rule = str | float | Pattern | tuple[str | Pattern, float]


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
    names = _Names.of(model)
    rules = [_ParsedRule(glob, *_parse_rule(glob, rule)) for glob, rule in (patterns or {}).items()]
    spared = _Spared.of(model, names, ignore)
    _all_match([rule.glob for rule in rules], names.homes, "patterns")
    owned = None if trainable is None else {id(p) for p in trainable}

    targets: list[Target] = []
    skipped = spared.few | spared.beside
    for name, weight in names.weights.items():
        rule = next((rule for rule in rules if rule.reaches(name, names, spared)), None)
        reason = spared.reason(name, weight, owned, ruled=rule is not None)
        if not reason and rule is None and asked is None:
            reason = "no pattern names it"
        if reason:
            skipped[name] = reason
        else:
            skipped.pop(name, None)
            targets.append(_target(names.all_of[name], weight, rule, asked, budget))
    skipped |= _passed_over(rules, names, spared, skipped, targets)
    if not targets:
        raise DualpruneError(_nothing_left(skipped, asked, bool(rules)))

    targets = _with_bits(targets, bits, names.homes, skipped)
    problem = Problem(_with_erk(targets, asked) if budget == "erk" else targets, skipped, budget=budget)
    problem.ties = _resolve_ties(problem, ties or (), names.homes)
    if budget == "lamp":
        _check_lamp(problem)
    if keep_zeros:
        problem.frozen = [w == 0 for w in problem.weights]
    return problem


def parameter_name(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers: `module.` in front, two others anywhere."""
    return re.sub(r"^(module\.)+", "", re.sub(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.", "", name))


@dataclass(frozen=True)
class _Names:
    """Every distinct parameter under its first name; all names of it; and for every name, in model order, the first one."""

    weights: dict[str, nn.Parameter]
    all_of: dict[str, tuple[str, ...]]
    homes: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        first: dict[int, str] = {}
        weights: dict[str, nn.Parameter] = {}
        all_of: dict[str, tuple[str, ...]] = {}
        homes: dict[str, str] = {}
        for raw, p in model.named_parameters(remove_duplicate=False):
            short = parameter_name(raw)
            name = raw if short in homes else short  # a model of both `fc` and `module.fc` keeps the two apart
            home = homes[name] = first.setdefault(id(p), name)
            weights[home] = p
            all_of[home] = (*all_of.get(home, ()), name)
        return cls(weights, all_of, homes)


@dataclass(frozen=True)
class _Spared:
    """Names and reasons of what is left alone: by a default, which a rule may lift, or because the user ignores it."""

    few: dict[str, str]  # fewer than two dimensions
    beside: dict[str, str]  # no layer's weight
    ends: dict[str, str]  # the first and the last layer
    ignored: dict[str, str]  # by the user: no rule lifts it
    lone: set[str]  # lifted by a parameter's own name only; the others also by their module's, and by no wildcard

    @classmethod
    def of(cls, model: nn.Module, names: _Names, ignore: Iterable[str] | None) -> _Spared:
        few = {name: "fewer than two dimensions" for name, p in names.weights.items() if _dims(p) < 2}
        if ignore is not None:
            globs = [ignore] if isinstance(ignore, str) else list(ignore)
            _all_match(globs, names.homes, "ignore")
            ignored = {home: "ignored" for name, home in names.homes.items() if any(matches(g, name) for g in globs)}
            return cls(few, {}, {}, ignored, set(few))
        gains = _gains(model)
        no_layers = _beside_layers(model) | gains
        beside = {name: "no layer's weight" for name, p in names.weights.items() if name not in few and id(p) in no_layers}
        rest = [home for home in names.homes.values() if home not in few and home not in beside]
        ends = {rest[-1]: "last layer", rest[0]: "first layer"} if rest else {}
        return cls(few, beside, ends, {}, set(few) | {name for name in beside if id(names.weights[name]) in gains})

    @cached_property
    def defaults(self) -> dict[str, str]:
        """What a rule may lift, and no wildcard."""
        return self.beside | self.ends

    def reason(self, name: str, weight: nn.Parameter, owned: set[int] | None, ruled: bool) -> str:
        """Say why a parameter is left alone; nothing if it is not. `ruled`: a rule reaches it, which lifts the defaults."""
        shape = "" if ruled else self.few.get(name) or self.beside.get(name)
        return shape or _unfit(weight, owned) or self.ignored.get(name) or ("" if ruled else self.ends.get(name, ""))


@dataclass(frozen=True)
class _ParsedRule:
    """An entry of `patterns`."""

    glob: str
    pattern: Pattern | None
    sparsity: float | None

    def reaches(self, name: str, names: _Names, spared: _Spared) -> bool:
        """Tell whether the rule means this parameter: what is spared by default by its exact name, others by any match."""
        exact = name in spared.lone or (name in spared.defaults and any(c in self.glob for c in "*?["))
        return self.glob in names.all_of[name] if exact else _matches_any(self.glob, names.all_of[name])


def _parse_rule(glob: str, rule: Rule) -> tuple[Pattern | None, float | None]:
    if isinstance(rule, tuple | list) and len(rule) == 2:
        return parse_pattern(rule[0]), check_sparsity(rule[1], f"patterns[{glob!r}] sparsity")
    if isinstance(rule, str | Pattern):
        return parse_pattern(rule), None
    return None, check_sparsity(rule, f"patterns[{glob!r}] sparsity")


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


def _dims(weight: nn.Parameter) -> int:
    return 2 if isinstance(weight, nn.parameter.UninitializedParameter) else weight.ndim  # a lazy shape is unknown


def _target(names: tuple[str, ...], weight: nn.Parameter, rule: _ParsedRule | None, asked: float | None, budget: str) -> Target:
    name, *aliases = names
    pattern, own = (rule.pattern or Unstructured(), rule.sparsity) if rule else (Unstructured(), None)
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
    return Target(name, weight, pattern, pattern.snap(wanted), pooled, tuple(aliases))


def _passed_over(
    rules: Sequence[_ParsedRule], names: _Names, spared: _Spared, skipped: Mapping[str, str], targets: Sequence[Target]
) -> dict[str, str]:
    """Say of what a default left alone which glob matches it all the same; one that comes to nothing by that is an error."""
    still = {name: reason for name, reason in spared.defaults.items() if skipped.get(name) == reason}
    others = {name for name in names.weights if name not in spared.lone | still.keys()}
    pruned = {t.name for t in targets} - spared.lone
    said: dict[str, str] = {}
    for rule in reversed(rules):
        passed = {name: why for name, why in still.items() if _matches_any(rule.glob, names.all_of[name])}
        wanted = pruned or others  # where nothing at all is pruned, others may be left alone for a reason of their own
        if passed and not any(_matches_any(rule.glob, names.all_of[name]) for name in wanted):
            raise DualpruneError(_passed_by(rule.glob, passed))
        said |= {
            name: f"{why} (a default that {rule.glob!r} does not lift, its exact name does)" for name, why in passed.items()
        }
    return said


def _with_erk(targets: list[Target], asked: float | None) -> list[Target]:
    free = [t for t in targets if t.pooled]
    spread = erk_sparsities([tuple(t.weight.shape) for t in free], asked or 0.0)
    by_name = {t.name: s for t, s in zip(free, spread, strict=True)}
    return [replace(t, sparsity=t.pattern.snap(by_name.get(t.name, t.sparsity)), pooled=False) for t in targets]


def _with_bits(
    targets: list[Target], bits: int | Mapping[str, int] | None, names: Mapping[str, str], skipped: Mapping[str, str]
) -> list[Target]:
    """Give every target the bits that `bits` asks for it; a glob that reaches no target is an error."""
    if isinstance(bits, Mapping):
        rules = {glob: check_bits(b, f"bits[{glob!r}]") for glob, b in bits.items()}
        _all_match(list(rules), names, "bits")
        _require_pruned(list(rules), targets, names, skipped)
        reach = [next((b for g, b in rules.items() if _matches_any(g, (t.name, *t.aliases))), None) for t in targets]
    else:
        reach = [None if bits is None else check_bits(bits)] * len(targets)
    if parted := [t.name for t, b in zip(targets, reach, strict=True) if b is not None and span(t.weight)]:
        raise DualpruneError(
            f"bits: {some(parted)} is cut up over ranks, and a grid needs all of a weight: quantise without shards"
        )
    return [replace(t, bits=b) for t, b in zip(targets, reach, strict=True)]


def _require_pruned(
    globs: Sequence[str], targets: Sequence[Target], names: Mapping[str, str], skipped: Mapping[str, str]
) -> None:
    for glob in globs:
        if not any(_matches_any(glob, (t.name, *t.aliases)) for t in targets):
            name = next(home for n, home in names.items() if matches(glob, n))
            raise DualpruneError(
                f"bits: {glob!r} reaches nothing that is pruned: {name} is left alone, {skipped[name]}. To quantise without "
                f"pruning it, give it sparsity 0: patterns={{{name!r}: 0.0}}"
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


def matches(glob: str, name: str) -> bool:
    """Tell whether a glob means a parameter, by its own name or its module's."""
    module = name.rpartition(".")[0]
    return glob in (name, module) or fnmatchcase(name, glob) or fnmatchcase(module, glob)  # a name may have a [ in it


def _matches_any(glob: str, names: Iterable[str]) -> bool:
    return any(matches(glob, name) for name in names)


def _all_match(globs: Sequence[str], names: Iterable[str], what: str) -> None:
    names = list(names)
    for glob in globs:
        if not any(matches(glob, name) for name in names):
            shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            raise DualpruneError(f"{what}: {glob!r} matches no parameter{suggest(glob, names)} (parameters: {shown})")


def _nothing_left(skipped: Mapping[str, str], asked: float | None, ruled: bool) -> str:
    if asked is None and not ruled:
        return "nothing to prune: give rate=10, sparsity=0.9 or patterns={glob: pattern}"
    reasons = "; ".join(f"{some(names)}: {reason}" for reason, names in by_reason(skipped).items())
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
        f"{some([f'{name} ({reason})' for name, reason in spared.items()])}, and a wildcard does not lift it. Name exactly "
        f"what is meant, such as {exact}, or pass ignore=() to lift all defaults"
    )
