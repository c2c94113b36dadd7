"""The tables of a recipe, one class each: what they hold, and which values are possible.

Importing this module does not import torch; a method is built, and so checked, by `MethodTable.check`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dualprune.errors import DualpruneError, suggest

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Importance = Literal["magnitude", "adaptive", "second-moment"]
MOST_TRIALS, MOST_OWN = 6, 2  # what tuning may cost a method, and what it may vary besides lr: the same for all


def _ratio(value: Any) -> Any:
    """``"8/255"`` → 8/255; anything else as it is."""
    ratio = re.fullmatch(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*", value) if isinstance(value, str) else None
    try:
        return float(ratio[1]) / float(ratio[2]) if ratio else value
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'expected a number or a ratio such as "8/255", got {value!r}') from None


def _distance(value: float) -> float:
    if 0 < value <= 1:
        return value
    hint = f'; did you mean "{value:g}/255"?' if 1 < value <= 255 else ""
    raise ValueError(f"a distance between pixels in [0, 1] is above 0 and at most 1, got {value:g}{hint}")


Distance = Annotated[float, BeforeValidator(_ratio), AfterValidator(_distance)]


class _Typed(BaseModel):
    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        numeric = any(getattr(one, "__origin__", one) in (int, float) for one in (kind, *get_args(kind)))
        if isinstance(value, bool) and numeric:
            raise ValueError(f"expected a number, got {str(value).lower()}")
        return value


class Table(_Typed):
    """A table of known keys that never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class ModelTable(Table):
    """``[model]``: which network, and its starting weights."""

    name: str
    weights: str | None = None
    pretrained: bool = False
    options: dict[str, Any] = {}


class DataTable(Table):
    """``[data]``: which images; `validation` is the fraction of them that ``--split validation`` holds out."""

    name: str
    root: str | None = None
    augment: bool | Literal["none", "flip", "crop-flip", "shift", "shift-1"] = True
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    options: dict[str, Any] = {}


class OptimizerTable(Table):
    """What ``[training]`` and ``[dense]`` share: the optimizer, the learning rate and its course."""

    epochs: Count
    lr: Positive
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 1e-4
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5, 0.75]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip_norm: Positive | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _momentum_for_nesterov(self) -> OptimizerTable:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer = 'sgd' and a momentum above 0")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} leaves nothing of {self.epochs} epochs")
        return self

    def lr_at(self, step: int, total: int, steps_per_epoch: int, peak: float | None = None) -> float:
        """Learning rate of 0-based `step` of `total`, a pure function of it: linear warm-up, then the schedule."""
        peak = self.lr if peak is None else peak
        warmup = round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, total - warmup)
        if self.schedule == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        passed = sum(progress >= milestone for milestone in self.milestones) if self.schedule == "step" else 0
        return peak * self.gamma**passed


@dataclass(frozen=True)
class AttackSpec:
    """One attack as a recipe names it; distances are those of pixels in [0, 1]."""

    kind: Literal["fgsm", "pgd", "square"]
    eps: float
    step: float = 0.0
    steps: int = 1
    random_start: bool = True
    restarts: int = 1
    queries: int = 1000
    crafting: Literal["eval", "train"] = "eval"


class AdversarialTable(Table):
    """``[training.adversarial]``: train, ``[dense]`` too, on attacked batches in place of the clean ones."""

    eps: Distance
    attack: Literal["pgd", "fgsm"] = "pgd"
    step: Distance | None = None
    steps: Count | None = None
    random_start: bool | None = None
    crafting: Literal["eval", "train"] = "eval"

    @model_validator(mode="after")
    def _one_step(self) -> AdversarialTable:
        given = [key for key in ("step", "steps", "random_start") if getattr(self, key) is not None]
        if self.attack == "fgsm" and given:
            said = f"fgsm is one step of eps and has no {' or '.join(given)}"
            raise ValueError(f"{said}; did you mean attack = 'pgd', steps = 1?")
        return self

    @property
    def spec(self) -> AttackSpec:
        """The attack, with what was left out filled in."""
        if self.attack == "fgsm":
            return AttackSpec("fgsm", self.eps, crafting=self.crafting)
        steps, start = self.steps or 10, self.random_start is not False
        return AttackSpec("pgd", self.eps, self.step or _usual_step(self.eps, steps), steps, start, crafting=self.crafting)


class DistillTable(Table):
    """``[training.distill]``: beside the labels, learn what the dense model answers (Hinton et al. 2015)."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    temperature: Positive = 4.0


class RobustTable(Table):
    """``[robust]``: the attacks that the dense and the finished model are measured under, once each."""

    attacks: Annotated[list[str], Field(min_length=1)] = ["pgd-10", "pgd-50x5", "square-1000"]
    eps: Distance | None = None
    step: Distance | None = None
    images: Count | None = None

    @field_validator("attacks")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if not _ATTACK.fullmatch(name):
                near = suggest(re.split(r"[-x]", name)[0], ("training", "fgsm", "pgd-10", "square"))
                known = "training, fgsm, pgd-STEPS, pgd-STEPSxRESTARTS, square, square-QUERIES"
                raise ValueError(f"no attack {name!r}{near}; there are {known}")
        if len(set(value)) < len(value):
            raise ValueError(f"an attack is named twice in {value}")
        return value

    def specs(self, adversarial: AdversarialTable | None) -> dict[str, AttackSpec]:
        """The attacks by name, `eps` being that of ``[training.adversarial]`` where this table has none.

        Raises:
            DualpruneError: this table needs an `adversarial` that is not there.
        """
        eps = adversarial.eps if self.eps is None and adversarial is not None else self.eps
        if eps is None:
            raise DualpruneError("needs eps, the radius of the attacks, as there is no [training.adversarial] to take it from")
        if adversarial is None and "training" in self.attacks:
            raise DualpruneError("the attack 'training' is that of [training.adversarial], which is not there")
        return {name: self._spec(name, eps, adversarial) for name in self.attacks}

    def _spec(self, name: str, eps: float, adversarial: AdversarialTable | None) -> AttackSpec:
        if name == "training" and adversarial is not None:
            return replace(adversarial.spec, crafting="eval")
        kind, *numbers = re.split(r"[-x]", name)
        if kind == "fgsm":
            return AttackSpec("fgsm", eps)
        if kind == "square":
            return AttackSpec("square", eps, queries=int(numbers[0]) if numbers else 1000)
        steps, restarts = int(numbers[0]), int(numbers[1]) if numbers[1:] else 1
        return AttackSpec("pgd", eps, self.step or _usual_step(eps, steps), steps, restarts=restarts)


_ATTACK = re.compile(r"training|fgsm|pgd-[1-9]\d*(x[1-9]\d*)?|square(-[1-9]\d*)?")


def _usual_step(eps: float, steps: int) -> float:
    """2.5 ε / steps: 2/255 for ten steps at 8/255, and the ball's border is always within reach (Madry et al. 2018)."""
    return min(eps, 2.5 * eps / steps)


class TrainingTable(OptimizerTable):
    """``[training]``: the epochs in which the model is pruned; the same budget for every method."""

    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    checkpoint_minutes: Positive = 5.0
    measure_every: Count = 1
    keep: Literal["last", "best"] = "last"
    adversarial: AdversarialTable | None = None
    distill: DistillTable | None = None


class DenseTable(OptimizerTable):
    """``[dense]``: train the dense model first, once for all methods and seeds of the recipe."""


class LayerTable(Table):
    """One entry of ``[prune.patterns]``: a pattern, a sparsity, or both."""

    pattern: str | None = None
    sparsity: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"pattern": value}
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"sparsity": value}
        if not isinstance(value, Mapping | LayerTable):
            raise ValueError(f'expected a pattern ("2:4"), a sparsity (0.9) or a table of both, got {value!r}')
        if isinstance(value, Mapping) and not value:
            raise ValueError("an empty table says nothing; give a pattern, a sparsity, or both")
        return value

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        return value if value is None else _check_sparsity(value)


class PruneTable(Table):
    """``[prune]``: how many weights go, from where, and what happens right after the cut."""

    rate: float | None = None
    sparsity: float | None = None
    budget: Literal["uniform", "erk", "global", "lamp"] = "uniform"
    importance: Importance | None = None
    patterns: dict[str, LayerTable] = {}
    ignore: list[str] | None = None
    keep_zeros: bool = False
    ties: list[list[str]] = []
    bits: int | dict[str, int] | None = None
    calibrate: Annotated[int, Field(ge=0)] = 4096
    retrain_epochs: Annotated[int, Field(ge=0)] = 0
    retrain_lr: Positive | None = None

    @field_validator("rate")
    @classmethod
    def _factor(cls, value: float | None) -> float | None:
        if value is not None and not 1 <= value < math.inf:
            hint = f"; did you mean sparsity = {value:g}?" if 0 < value < 1 else ""
            raise ValueError(f"rate says how many times fewer weights, a number from 1 up, got {value:g}{hint}")
        return value

    @field_validator("sparsity")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        return value if value is None else _check_sparsity(value)

    @field_validator("bits", mode="before")
    @classmethod
    def _width(cls, value: Any) -> Any:
        from dualprune.quantise import check_bits

        if isinstance(value, Mapping):
            return {glob: check_bits(bits, f"bits for {glob!r}") for glob, bits in value.items()} or None
        return value if value is None else check_bits(value)

    @model_validator(mode="after")
    def _one_budget(self) -> PruneTable:
        if self.rate is not None and self.sparsity is not None:
            raise ValueError(f"give rate ({self.rate:g}) or sparsity ({self.sparsity:g}), not both")
        if self.rate is None and self.sparsity is None and not self.patterns:
            raise ValueError("nothing says how much to prune; give rate = 10, sparsity = 0.9 or [prune.patterns]")
        return self


class MethodTable(_Typed):
    """``[methods.NAME]``: a solver, its overridden fields, and this method's own lr, epochs, update period and importance."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: Literal["slr", "admm", "reweighted", "gradual", "oneshot", "rigl", "acdc", "safe"]
    base: Literal["default", "paper"] = "default"
    lr: Positive | None = None
    epochs: Count | None = None
    updates_per_epoch: Positive | None = None
    importance: Importance | None = None
    trials: list[dict[str, Any]] = []

    @field_validator("trials")
    @classmethod
    def _few(cls, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
        own = sorted({key for trial in trials for key in trial} - {"lr"})
        if len(trials) > MOST_TRIALS:
            raise ValueError(f"a method has at most {MOST_TRIALS} trials, got {len(trials)}")
        if len(own) > MOST_OWN:
            raise ValueError(f"trials vary lr and at most {MOST_OWN} parameters of the method, got {', '.join(own)}")
        if fixed := [key for key in own if key in ("kind", "base", "epochs", "trials")]:
            raise ValueError(f"a trial cannot change {fixed[0]}; write another [methods.NAME] for that")
        return trials

    def with_trial(self, trial: Mapping[str, Any]) -> MethodTable:
        """This table with a trial's keys in place of its own, checked.

        Raises:
            DualpruneError: a value is impossible, or a key is no field of the solver.
        """
        for key in ("lr", "updates_per_epoch"):
            if isinstance(trial.get(key), str):
                raise DualpruneError(f"{key}: expected a number, got {trial[key]!r}")
        try:
            table = MethodTable.model_validate({**self.model_dump(), **trial})
        except ValidationError as error:
            raise DualpruneError("; ".join(explain(one, MethodTable) for one in error.errors())) from None
        table.build()
        return table

    def check(self) -> None:
        """Build the solver, and that of every trial.

        Raises:
            DualpruneError: a key is no field of the solver, or a value is impossible.
        """
        self.build()
        for number, trial in enumerate(self.trials, 1):
            built_at(f"trial {number}:", partial(self.with_trial, trial))

    def build(self) -> Any:
        """The solver: its defaults or the paper's constants, with the table's other keys as fields.

        Raises:
            DualpruneError: a key is no field of the solver, or a value is impossible.
        """
        from dualprune import solvers

        kinds: dict[str, Any] = {
            "slr": solvers.SLR,
            "admm": solvers.ADMM,
            "reweighted": solvers.Reweighted,
            "gradual": solvers.GradualMagnitude,
            "oneshot": solvers.Magnitude,
            "rigl": solvers.RigL,
            "acdc": solvers.ACDC,
            "safe": solvers.SAFE,
        }
        solver = kinds[self.kind]
        if self.base == "paper" and not hasattr(solver, "paper"):
            said = f"{self.kind!r} has no constants of a paper"
            raise DualpruneError(f"base = 'paper' is for slr, admm, reweighted and safe; {said}")
        given = dict(self.model_extra or {})
        known = {one.name for one in fields(solver) if one.init}
        for key in given:
            if key not in known:
                own = [*type(self).model_fields, *sorted(known)]
                raise DualpruneError(f"unknown key {key!r}{suggest(key, own)}; {self.kind!r} takes {', '.join(own)}")
        built = solver.paper() if self.base == "paper" else solver()
        try:
            return replace(built, **{key: _field(key, value) for key, value in given.items()})
        except TypeError as error:
            raise DualpruneError(f"a value in {given} has the wrong type: {error}") from error


def _check_sparsity(value: float) -> float:
    if 0 <= value <= 1:
        return value
    hint = f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""
    raise ValueError(f"sparsity is a fraction in [0, 1], got {value:g}{hint}")


def _field(key: str, value: Any) -> Any:
    """``{closing, filters}`` → `Closing`, ``{start, end, over}`` → `Geometric`; "none" → None, which TOML cannot say."""
    if value == "none":
        return None
    if not isinstance(value, Mapping):
        return value
    from dualprune.schedules import Closing, Geometric

    if "closing" in value and value.keys() <= {"closing", "filters"}:
        return Closing(value["closing"], value.get("filters", Closing.filters))
    known = [one.name for one in fields(Geometric)]
    for name in value:
        if name not in known:
            raise DualpruneError(f"{key}: unknown key {name!r}{suggest(name, known)}; it takes {', '.join(known)}")
    try:
        return Geometric(**value)
    except TypeError:
        example = "{ start = 0.01, end = 1.0, over = 0.8 }"
        raise DualpruneError(f"{key}: a schedule is {example}, got {value}") from None


def built_at(where: str, build: Callable[[], object]) -> None:
    """Say where in the recipe, in front of what `build` finds wrong there."""
    try:
        build()
    except DualpruneError as error:
        raise DualpruneError(f"{where} {error}") from error


def explain(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One line of a pydantic error in a table `root`: where, what came, what was expected, the nearest name."""
    *tables, last = [str(part) for part in error["loc"]] or [""]
    where = f"[{'.'.join(tables)}] {last}" if tables else last
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        known = known_keys(root, tables)
        return f"{where}: unknown key{suggest(last, known)}; known are {', '.join(known)}"
    if kind == "missing":
        missing_table = not tables and last in ("model", "data", "training", "prune", "methods")
        return f"the table [{last}] is missing" if missing_table else f"{where}: missing"
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{where}: {error['input']!r} is not one of {', '.join(choices)}{suggest(str(error['input']), choices)}"
    if kind == "value_error":
        # a table's own check reports the table: [prune], not "prune"
        own = f"[{'.'.join([*tables, last])}]" if isinstance(error["input"], Mapping) else where
        return f"{own}: {context['error']}"
    return f"{where}: {_lower(error['msg'])}, got {error['input']!r}"


def known_keys(root: type[BaseModel], places: Sequence[str]) -> list[str]:
    """The keys of the table at `places` below `root`, for suggestions; a place that is no key is a name of the user's."""
    home = root
    for place in places:
        if place in home.model_fields:
            kind = home.model_fields[place].annotation
            inner = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
            if not inner:
                return []
            home = inner[0]
    return list(home.model_fields)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
