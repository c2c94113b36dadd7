"""The exceptions dualprune raises, and what their messages share: near-miss suggestions, and places in files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class DualpruneError(ValueError):
    """Something the caller handed in cannot be used; the message says what was expected, what came and what to do."""


class NonFiniteError(DualpruneError):
    """A loss, weight or gradient became NaN or infinite during pruning; the state before it is intact."""


class DataNotFoundError(DualpruneError):
    """The data set is in none of the places looked in; the message lists them and says how to get it."""


class FormatError(DualpruneError):
    """A file is not what its name promises: truncated, of another format or version, or malicious."""


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the nearest candidate, or an empty string."""
    near = get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


@contextmanager
def within(place: str) -> Iterator[None]:
    """Say where in a file, in front of what is wrong there."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{place}: {error}") from None
