"""Options of a recipe's table, read into a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dualprune.errors import DualpruneError, suggest

Options = TypeVar("Options")


def read_options(kind: type[Options], given: Mapping[str, Any], where: str) -> Options:
    """Build a dataclass from a recipe's table.

    Raises:
        DualpruneError: an unknown key, or a value of another type; the message has its place.
    """
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise DualpruneError(f"{where}: unknown key {key!r}{suggest(key, known)}; there are {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DualpruneError(f"{where} {place}: {first['msg']}, got {first['input']!r}") from error
