"""Files that are whole or not there, written under a temporary name and renamed; JSON that is checked as it is read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dualprune.errors import FormatError

NUMBER = (int, float)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on any exception it is removed.

    Raises:
        OSError: the folder cannot be written or the disk is full; an existing `path` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically (UTF-8)."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows` to `path` atomically, one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_text(path: Path) -> str:
    """Return the text of a file, or an empty string if there is none."""
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no UTF-8 text (byte {error.start}): it is damaged, run again") from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path, types: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is none; `types` says what its values are, where not null.

    Raises:
        FormatError: the file is cut short or damaged, or holds something else; the message names it and the line.
    """
    if not path.is_file():
        return None
    row = _parse(read_text(path), path, first_line=1)
    check_object(row, types or {}, str(path), ())
    return row


def read_rows(path: Path, types: Mapping[str, Any], required: Iterable[str]) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line; none if there is no file. `types` and `required` as in `check_object`.

    Raises:
        FormatError: a line is damaged or holds something else; the message names it.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_parse(line, path, first_line=number))
            check_object(rows[-1], types, f"{path}, line {number}", required)
    return rows


def _parse(text: str, path: Path, *, first_line: int) -> Any:
    def refuse(constant: str) -> float:
        raise FormatError(f"{path}{f', line {first_line}' if path.suffix == '.jsonl' else ''} holds {constant}, no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise FormatError(
            f"{path}, line {line}: not JSON ({error.msg}, column {error.colno}); it is cut short or damaged"
        ) from error
    except RecursionError as error:
        raise FormatError(f"{path}, line {first_line}: JSON nested too deeply for a run's file") from error


def check_object(row: Any, types: Mapping[str, Any], where: str, required: Iterable[str]) -> None:
    """Raise FormatError unless `row` is an object, has what is required, and holds null or the right types."""
    if not isinstance(row, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if missing := [key for key in required if row.get(key) is None]:
        raise FormatError(f"{where}: {missing[0]!r} is missing")
    for key, kind in types.items():
        value = row.get(key)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            words = "a number" if kind == NUMBER else f"of type {kind.__name__}"
            raise FormatError(f"{where}: {key!r} should be {words}, got {value!r:.60}")


def listing_sha256(top: str | Path, files: Iterable[str | Path]) -> str:
    """SHA-256 of the names under `top` and the sizes of files, in their order: what a folder of data is, without reading it."""
    listed = [(Path(file).relative_to(top).as_posix(), Path(file).stat().st_size) for file in files]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
