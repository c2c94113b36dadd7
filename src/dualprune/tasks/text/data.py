"""Text files as bytes: found by name, split into training and test, cut into windows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualprune.errors import DataNotFoundError, DualpruneError, suggest

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
HELD_OUT = 0.1  # the end of a file that has no test file of its own

# name: the training file and the test file, where there is one
KNOWN: dict[str, tuple[str, str | None]] = {
    "tinyshakespeare": ("tinyshakespeare.txt", None),
    "wikitext2": ("wikitext2_valid.txt", "wikitext2_test.txt"),
}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to measure on, mapped from their files and read where they are used.

    Attributes:
        name: of the data.
        train: bytes.
        test: bytes that follow them, or of another file.
        source: the files.
    """

    name: str
    train: Bytes
    test: Bytes
    source: str

    def sha256(self) -> str:
        """Return a hash of both parts."""
        both = hashlib.sha256(repr((len(self.train), len(self.test))).encode())
        for part in (self.train, self.test):
            both.update(part.data)
        return both.hexdigest()

    def hold_out(self, fraction: float) -> Corpus:
        """Return the same data with the end of the training part to measure on, in place of the test part."""
        cut = round(len(self.train) * (1 - fraction))
        return replace(self, train=self.train[:cut], test=self.train[cut:])

    def draws(self, length: int, count: int, generator: torch.Generator) -> Tensor:
        """Return where `count` random windows of `length` bytes and the byte after them start."""
        room = len(self.train) - length
        if room < 1:
            raise DualpruneError(
                f"{self.name}: windows of {length} bytes and the one after need more than {len(self.train)} bytes to train on"
            )
        return torch.randint(room, (count,), generator=generator)


def load_text(name: str, root: str | Path | None = None) -> Corpus:
    """Find and map a text.

    Args:
        name: "tinyshakespeare"; "wikitext2" (its validation file is trained on); or "file", whose last tenth is the test.
        root: a file, or a folder to look in; None looks in ``text`` and in the folder itself, in the folders of the
            environment variable DUALPRUNE_DATA and in ``data``.

    Raises:
        DataNotFoundError: it is in none of them.
        DualpruneError: there is no such name, or a file is empty.
    """
    if name == "file":
        if root is None or not Path(root).is_file():
            raise DualpruneError(f"[data] name = 'file' needs root, the text file; got {root!r}")
        return _split(name, Path(root))
    if name not in KNOWN:
        raise DualpruneError(f"no text {name!r}{suggest(name, [*KNOWN, 'file'])}; there are {', '.join(KNOWN)} and file")
    train, test = KNOWN[name]
    if root is not None and Path(root).is_file() and test is None:
        return _split(name, Path(root))
    places = [place for top in _roots(root) for place in (top / "text", top)]
    for place in places:
        if all((place / file).is_file() for file in (train, test) if file):
            if test is None:
                return _split(name, place / train)
            return Corpus(name, read_bytes(place / train), read_bytes(place / test), f"{place / train}, {place / test}")
    looked = "".join(f"\n  {place / file}" for place in places for file in (train, test) if file)
    raise DataNotFoundError(
        f"{name} was not found. Looked for{looked}\n"
        "To use what you have: point root, or the environment variable DUALPRUNE_DATA, at its folder; "
        "for a text of your own say name = 'file' and root = 'my.txt'."
    )


def windows(text: Bytes, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return (inputs, targets), both int64 of shape (len(starts), length); targets are one byte further."""
    rows = text[starts.numpy()[:, None] + np.arange(length + 1)]
    both = torch.from_numpy(rows.astype(np.int64))
    return both[:, :-1], both[:, 1:]


def in_order(text: Bytes, length: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the whole text in windows, one after the other without overlap; a last piece below `length` is left out."""
    starts = torch.arange(0, len(text) - length, length)
    for part in starts.split(batch):
        yield windows(text, part, length)


def read_bytes(path: Path) -> Bytes:
    """Map a file's bytes into memory, read-only.

    Raises:
        DualpruneError: it is empty or cannot be read.
    """
    try:
        if not path.stat().st_size:
            raise DualpruneError(f"{path} is empty")
        mapped: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DualpruneError(f"cannot read {path}: {error}") from error
    return mapped


def _split(name: str, path: Path) -> Corpus:
    text = read_bytes(path)
    cut = round(len(text) * (1 - HELD_OUT))
    return Corpus(name, text[:cut], text[cut:], str(path))


def _roots(root: str | Path | None) -> list[Path]:
    if root is not None:
        return [Path(root)]
    given = [Path(part) for part in os.environ.get("DUALPRUNE_DATA", "").split(os.pathsep) if part]
    return list(dict.fromkeys([*given, Path("data")]))
