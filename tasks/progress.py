"""Progress that a person watches: a bar with rate and remaining time on a terminal, else a log line now and then."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Reporter", "reporting"]

log = logging.getLogger("qrpo")
_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Reporter:
    """How far one stage has come; `update` may be called as often as one likes."""

    def __init__(self, stage: str, total: float, bar: Progress | None) -> None:
        self.stage = stage
        self.total = total
        self.done = 0.0
        self._bar = bar
        self._task = bar.add_task(stage, total=total) if bar else None
        self._last_line = time.monotonic()
        self._first: tuple[float, float] | None = (
            None  # when something was first done, and how much: start-up is no rate
        )

    def update(self, done: float, message: str = "", total: float | None = None) -> None:
        """`done` of `total` parts (or steps) are finished; `message` says what is going on."""
        self.done = done
        now = time.monotonic()
        if self._first is None and done:
            self._first = now, done
        self.total = self.total if total is None else total
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=done, total=self.total, description=f"{self.stage}  {message}".rstrip()
            )
            return
        if now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            log.info("%s: %g of %g%s %s", self.stage, done, self.total, self._time_left(now), message)

    def _time_left(self, now: float) -> str:
        if self._first is None or self.done <= self._first[1]:
            return ""
        began, before = self._first
        rate = (self.done - before) / (now - began)
        return f", about {(self.total - self.done) / rate:.0f} s left"


@contextmanager
def reporting(stage: str, total: float) -> Iterator[Reporter]:
    """Report one stage's progress while the block runs."""
    if not sys.stderr.isatty():
        yield Reporter(stage, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Reporter(stage, total, bar)
