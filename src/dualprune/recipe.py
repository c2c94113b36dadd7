"""Recipes: typed TOML files that say which model, data, training, budget and methods to run.

An unknown key is an error with a suggestion and its position (``[training] epoch``); an impossible value is explained.
Importing this module does not import torch; methods and patterns are built, and so checked, by `load_recipe`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, StringConstraints, ValidationError

from dualprune.errors import DualpruneError, suggest
from dualprune.recipe_tables import (
    AttackSpec,
    DataTable,
    DenseTable,
    LayerTable,
    MethodTable,
    ModelTable,
    PruneTable,
    RobustTable,
    Table,
    TrainingTable,
    built_at,
    explain,
)
from dualprune.toml_text import dump_toml, set_key, toml_key, toml_value

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", strip_whitespace=False)]
SEEDS = 2**63  # what every generator takes


@dataclass(frozen=True)
class _Origin:
    """How a recipe came to be: its file, and what was set in place of what stands there. Equal recipes may differ in it."""

    source: Path | None = field(default=None, compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)


class Recipe(Table):
    """A whole recipe; see docs/recipes.md for every key."""

    name: Label
    description: str = ""
    task: Literal["classification", "detection", "lanes", "points", "text"] = "classification"
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0
    model: ModelTable
    data: DataTable
    training: TrainingTable
    prune: PruneTable
    methods: dict[Label, MethodTable] = Field(min_length=1)
    dense: DenseTable | None = None
    robust: RobustTable | None = None
    paper: dict[str, Any] = Field(default_factory=dict)
    _origin: _Origin = PrivateAttr(default=_Origin())

    @property
    def source(self) -> Path | None:
        """The file this recipe was read from, as the user wrote it."""
        return self._origin.source

    def method(self, label: str) -> MethodTable:
        """The table ``[methods.LABEL]``; an unknown label is an error with a suggestion."""
        if label not in self.methods:
            hint = f"{suggest(label, self.methods)}; it has {', '.join(self.methods)}"
            raise DualpruneError(f"recipe {self.name!r} has no method {label!r}{hint}")
        return self.methods[label]

    def epochs(self, label: str) -> int:
        """Training epochs of a method: its own, or the recipe's; a one-shot cut trains for none."""
        method = self.method(label)
        return 0 if method.kind == "oneshot" else method.epochs or self.training.epochs

    def lr(self, label: str) -> float:
        """Peak learning rate of a method: its own, or the recipe's."""
        return self.method(label).lr or self.training.lr

    def importance(self, label: str) -> str:
        """What ranks the weights of a method: by its table, by the recipe's, or as it does by itself."""
        table = self.method(label)
        return table.importance or self.prune.importance or str(table.build().importance)

    def with_lr(self, label: str, lr: float) -> Recipe:
        """This recipe with another peak learning rate for one method."""
        return self._with(label, self.method(label).model_copy(update={"lr": lr}), {"lr": lr})

    def with_trial(self, label: str, trial: Mapping[str, Any]) -> Recipe:
        """This recipe with a trial's keys for one method: lr, updates_per_epoch, importance and fields of its solver."""
        return self._with(label, self.method(label).with_trial(trial), trial)

    def without_retraining(self) -> Recipe:
        """This recipe up to the cut, which is all that a choice of settings looks at."""
        if not self.prune.retrain_epochs:
            return self
        changed = self.model_copy(update={"prune": self.prune.model_copy(update={"retrain_epochs": 0})})
        changed._origin = replace(self._origin, overrides=(*self._origin.overrides, "prune.retrain_epochs=0"))
        return changed

    def _with(self, label: str, table: MethodTable, settings: Mapping[str, Any]) -> Recipe:
        changed = self.model_copy(update={"methods": {**self.methods, label: table}})
        set_ = [f"methods.{toml_key(label)}.{toml_key(key)}={toml_value(value)}" for key, value in settings.items()]
        changed._origin = replace(self._origin, overrides=(*self._origin.overrides, *set_))
        return changed

    def patterns(self) -> dict[str, Any] | None:
        """``[prune.patterns]`` as `dualprune.attach` takes it: glob → pattern, sparsity, or (pattern, sparsity)."""
        from dualprune.patterns import parse_pattern

        def value(layer: LayerTable) -> Any:
            if layer.pattern is None:
                return layer.sparsity
            pattern = parse_pattern(layer.pattern)
            return pattern if layer.sparsity is None else (pattern, layer.sparsity)

        return {glob: value(layer) for glob, layer in self.prune.patterns.items()} or None

    def attacks(self) -> dict[str, AttackSpec]:
        """The attacks of ``[robust]`` by name; none without that table.

        Raises:
            DualpruneError: an attack lacks its eps, or the task has no labelled images to attack.
        """
        if self.task != "classification" and (self.robust or self.training.adversarial):
            raise DualpruneError(f"attacks are for task = 'classification', not for {self.task!r}; leave them out")
        return self.robust.specs(self.training.adversarial) if self.robust else {}

    def weights_path(self) -> Path | None:
        """``[model] weights``, looked for beside the recipe, in the current folder and in ``$DUALPRUNE_WEIGHTS``.

        Raises:
            DualpruneError: it is in none of them; the message lists where it was looked for.
        """
        if self.model.weights is None:
            return None
        given = Path(self.model.weights).expanduser()
        roots = [self.source.parent if self.source else None, Path(), os.environ.get("DUALPRUNE_WEIGHTS")]
        tried = list(dict.fromkeys(Path(root) / given for root in roots if root is not None))
        for path in tried:
            if path.is_file():
                return path
        places = ", ".join(map(str, tried))
        raise DualpruneError(
            f"[model] weights: no file {self.model.weights!r} (looked at {places}); "
            "put it there, or set DUALPRUNE_WEIGHTS to the folder that holds it"
        )

    def weights_sha256(self) -> str | None:
        """SHA-256 of the file of ``[model] weights``, None without one; a path says nothing of what lies there.

        Raises:
            DualpruneError: as `weights_path`.
        """
        path = self.weights_path()
        return _sha256(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size) if path else None

    def deciding(self) -> dict[str, Any]:
        """All that decides a run's numbers but its method; paths and the paper's numbers do not."""
        table = self.model_dump(mode="json", exclude={"paper", "methods", "description"})
        del table["data"]["root"], table["training"]["checkpoint_minutes"], table["training"]["measure_every"]
        # younger than many a finished run, which has to keep its fingerprint
        prune, training = table["prune"], table["training"]
        young = [(table, "robust"), (training, "adversarial"), (training, "distill")]
        young += [(prune, "keep_zeros"), (prune, "ties"), (prune, "bits")]
        for home, key in young:
            if not home[key]:
                del home[key]
        del prune["importance"]  # a method's: `_deciding_of`
        if training["keep"] == "last":
            del training["keep"]
        return table

    def _deciding_of(self, label: str) -> dict[str, Any]:
        """What decides of a method's table: not its trials, and keys younger than many a run only where they are given."""
        table = self.method(label).model_dump(mode="json", exclude={"trials", "importance"})
        importance = self.importance(label)
        return table if importance == "magnitude" else table | {"importance": importance}

    def fingerprint(self, label: str, seed: int, split: str) -> str:
        """SHA-256 of all that decides a run's numbers; other methods' tables, paths and the paper's numbers do not."""
        method = self._deciding_of(label)
        return digest(self.deciding() | {"label": label, "method": method, "run_seed": seed, "split": split})

    def tuning_fingerprint(self, label: str, chosen: Iterable[str]) -> str:
        """SHA-256 of what a choice of settings was made for: `fingerprint` without the keys that were `chosen`, and lr."""
        table, method = self.deciding(), self._deciding_of(label)
        del table["training"]["lr"]  # a choice always has its own
        method = {key: value for key, value in method.items() if key not in {"lr", *chosen}}
        return digest(table | {"label": label, "method": method, "run_seed": 0, "split": "validation"})

    def command(self, label: str, seed: int, split: str = "test") -> str:
        """The one command that makes that run: from the recipe's file, or from the run folder's recipe.toml without one."""
        parts = ["dualprune", "run", _shown(self.source), "--method", label, "--seed", str(seed)]
        # without a file, recipe.toml has what was set
        parts += [part for override in self._origin.overrides if self.source for part in ("--set", override)]
        return shlex.join([*parts, *(["--split", split] if split != "test" else [])])

    def to_toml(self) -> str:
        """The recipe as TOML that `load_recipe` reads back to an equal one; keys that are None are left out."""
        return dump_toml(self.model_dump(mode="json", exclude_none=True))


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override (``training.epochs=2``) and check a recipe, methods and patterns included.

    Raises:
        DualpruneError: no such file, not TOML, an unknown key or an impossible value; the message has the position.
    """
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DualpruneError(f"the recipe's name {str(path)!r} is not UTF-8, as results name it: rename it") from None
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = suggest(path.name, [other.name for other in path.parent.glob("*.toml")])
        raise DualpruneError(f"no recipe {str(path)!r}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DualpruneError(f"cannot read the recipe {str(path)!r}: {error}") from error
    return parse_recipe(text, overrides, source=path)


def parse_recipe(text: str, overrides: Iterable[str] = (), source: Path | None = None) -> Recipe:
    """`load_recipe` on text; `source` is the file it came from, for messages and relative paths."""
    where = str(source) if source else "the recipe"
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DualpruneError(f"{where} is not valid TOML: {error}") from error
    for override in (overrides := tuple(overrides)):
        set_key(table, override)
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        lines = [explain(one, Recipe) for one in error.errors()]
        raise DualpruneError(f"{where}: " + "\n  ".join(dict.fromkeys(lines))) from None
    if strange := list(_strange(table)):
        raise DualpruneError(f"{where}: " + "\n  ".join(strange))
    recipe._origin = _Origin(source, overrides)
    warmup = recipe.training.warmup_epochs
    for label, method in recipe.methods.items():
        built_at(f"{where}: [methods.{label}]", method.check)
        if 0 < (epochs := recipe.epochs(label)) <= warmup:
            said = f"[training] warmup_epochs {warmup:g} leaves nothing of its {epochs} epochs"
            raise DualpruneError(f"{where}: [methods.{label}] epochs: {said}")
    built_at(f"{where}: [prune.patterns]", recipe.patterns)
    if recipe.training.distill and recipe.task != "classification":
        said = f"[training.distill] is for task = 'classification', not for {recipe.task!r}; leave it out"
        raise DualpruneError(f"{where}: {said}")
    if recipe.training.keep == "best" and recipe.task != "classification":
        said = f"[training] keep = 'best' is for task = 'classification', not for {recipe.task!r}; leave it out"
        raise DualpruneError(f"{where}: {said}")
    built_at(f"{where}: [{'robust' if recipe.robust else 'training.adversarial'}]", recipe.attacks)
    return recipe


def _strange(value: Any, *keys: str) -> Iterator[str]:
    """What TOML can say and no file of results can keep: a line for every date, inf and nan."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strange(inner, *keys, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strange(inner, *keys)
    elif not isinstance(value, str | bool | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        place = f"[{'.'.join(keys[:-1])}] {keys[-1]}" if keys[1:] else keys[0]
        yield f"{place}: expected text, a boolean or a finite number, got {value}"


@cache
def _sha256(path: Path, modified: int, size: int) -> str:
    """The hash of a file, computed once for as long as the file stays as it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown(source: Path | None) -> str:
    """The recipe's path as one would type it here; never where a machine keeps it."""
    if source is None:
        return "recipe.toml"
    if not source.is_absolute():
        return source.as_posix()
    here, place = Path.cwd(), source.resolve()
    return place.relative_to(here).as_posix() if place.is_relative_to(here) else source.name


def check_seed(seed: int) -> int:
    """The seed, if it is one.

    Raises:
        DualpruneError: it is below 0 or too large for a generator.
    """
    if not 0 <= seed < SEEDS:
        raise DualpruneError(f"a seed is a whole number from 0 to 2**63 - 1, got {seed}")
    return seed


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
