"""What a run says while it goes: rich bars on a terminal, one plain line an epoch in a log, or nothing."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol


class Progress(Protocol):
    """What `train` reports to. Every call is cheap; none may change the run."""

    def begin(self, title: str, total: int, done: int) -> None:
        """A stage of `total` steps starts (or goes on, with `done` behind it)."""

    def step(self, loss: float) -> None:
        """One optimizer step was taken."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended; `row` is its line in epochs.jsonl."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def end(self) -> None:
        """The stage is over, also after an error."""


class Silent:
    """Says nothing."""

    def begin(self, title: str, total: int, done: int) -> None: ...  # noqa: D102

    def step(self, loss: float) -> None: ...  # noqa: D102

    def epoch(self, row: dict[str, Any]) -> None: ...  # noqa: D102

    def note(self, text: str) -> None: ...  # noqa: D102

    def end(self) -> None: ...  # noqa: D102


class Lines(Silent):
    """One plain line an epoch, for logs and pipes."""

    def __init__(self) -> None:
        self._title, self._total, self._left, self._began = "", 0, 0, 0.0

    def begin(self, title: str, total: int, done: int) -> None:  # noqa: D102
        self._title, self._total, self._left, self._began = title, total - done, total - done, time.monotonic()

    def step(self, loss: float) -> None:  # noqa: D102
        self._left -= 1

    def epoch(self, row: dict[str, Any]) -> None:  # noqa: D102
        done = self._total - self._left
        left = (time.monotonic() - self._began) / max(1, done) * self._left
        self.note(f"{self._title}: epoch {row['epoch']}, {_figures(row)}, lr {row['lr']:.2g}, {_clock(left)} left")

    def note(self, text: str) -> None:  # noqa: D102
        print(text, flush=True)


class Bars(Silent):
    """A rich progress bar with the loss, the accuracy after cutting and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._loss, self._cut = math.nan, ""

    def begin(self, title: str, total: int, done: int) -> None:  # noqa: D102
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        figures = TextColumn("{task.fields[figures]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
        self._bar, self._loss, self._cut = RichProgress(*columns, refresh_per_second=4), math.nan, ""
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def step(self, loss: float) -> None:  # noqa: D102
        # a smoothed loss is what a reader of a bar wants; the files have the exact means
        self._loss = loss if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        self._bar.update(self._task, advance=1, figures=f"loss {self._loss:.4f}{self._cut}")

    def epoch(self, row: dict[str, Any]) -> None:  # noqa: D102
        self._cut = _accuracy(row) or self._cut
        self._bar.update(self._task, figures=f"loss {row['loss']:.4f}{self._cut}")

    def note(self, text: str) -> None:  # noqa: D102
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, highlight=False, markup=False)

    def end(self) -> None:  # noqa: D102
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.4f}{_accuracy(row)}"


def _accuracy(row: dict[str, Any]) -> str:
    """Say what was measured in this epoch; nothing where `measure_every` left it out."""
    if row["accuracy_cut"] is not None:
        return f", cut {row['accuracy_cut']:.2f} %"
    return "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.2f} %"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
