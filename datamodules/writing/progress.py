"""Progress of a long job: a bar on a terminal, a line in the log every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_log = logging.getLogger("longtake")
_LINE_EVERY_S = 5.0


class ProgressDisplay:
    """Shows how many of `total` steps are done. A context manager; shows nothing when not enabled.

    Args:
        what: what is being done, for the line ("building data/doom").
        total: number of steps.
        enabled: whether to show anything.
    """

    def __init__(self, what: str, total: int, *, enabled: bool = True) -> None:
        self._what = what
        self._total = total
        self._enabled = enabled
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        self._started = self._last_line = time.monotonic()
        if self._enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            console = Console(stderr=True)
            bar = self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            bar.start()
            self._task = bar.add_task(self._what, total=self._total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, note: str) -> None:
        """Shows that `done` steps are finished, with a note ("120 samples, 3 skipped")."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self._enabled and (time.monotonic() - self._last_line > _LINE_EVERY_S or done == self._total):
            self._last_line = time.monotonic()
            seconds = self._last_line - self._started
            _log.info("%s: %d of %d, %s, %.0f s", self._what, done, self._total, note, seconds)
