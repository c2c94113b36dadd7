"""TOML as recipes need it beyond the standard library's reader: writing it, and setting one key from ``key=value``."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from dualprune.errors import DualpruneError

_NAME = r"""\s*(?:"[^"]+"|'[^']+'|[^\s.="'][^.="']*)\s*"""  # in quotes where it has a dot or an equals sign
_SET = re.compile(rf"({_NAME}(?:\.{_NAME})*)=(.*)", re.DOTALL)


def dump_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Write nested mappings, lists, strings, numbers and booleans as TOML."""
    lines = [f"{toml_key(key)} = {toml_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{toml_key(key)}"
            lines += ["", f"[{name}]", dump_toml(value, f"{name}.").rstrip("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def toml_key(key: str) -> str:
    """The key, in quotes where TOML wants them."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def toml_value(value: Any) -> str:
    """A value on one line; a mapping is an inline table."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # a JSON string is a TOML string but for DEL, which TOML wants escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def set_key(table: dict[str, Any], override: str) -> None:
    """Set ``a."b.c".d=value`` in a nested table; the value is TOML, or a bare string."""
    found = _SET.fullmatch(override)
    if found is None:
        example = 'training.epochs=2 or prune.patterns."conv1.weight"=0.9'
        raise DualpruneError(f"--set takes key=value, as in {example}; got {override!r}")
    *parents, last = [part.strip().strip("\"'") for part in re.findall(_NAME, found[1])]
    text = found[2]
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise DualpruneError(f"--set {override}: {parent!r} is a value, not a table")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()
