"""Progress that a person watches: a bar with rate and remaining time on a terminal, else a log line now and then.

Within a Prefect flow run the same numbers are a progress artifact of that run. It is updated by a thread of its own, so a server
that is slow or gone holds up nothing.
"""

import contextvars
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Reporter", "reporting"]

log = logging.getLogger("qrpo")
_LINE_EVERY = 10.0  # seconds between lines where there is no terminal
_SHOWN_EVERY = 2.0  # seconds between updates of the artifact; a stage that is over sooner has none


class Reporter:
    """How far one stage has come; `update` may be called as often as one likes."""

    def __init__(self, stage: str, total: float, bar: Progress | None) -> None:
        self.stage = stage
        self.total = total
        self.done = 0.0
        self.message = ""
        self._bar = bar
        self._task = bar.add_task(stage, total=total) if bar else None
        self._last_line = time.monotonic()
        self._first: tuple[float, float] | None = (
            None  # when something was first done, and how much: start-up is no rate
        )

    def update(self, done: float, message: str = "", total: float | None = None) -> None:
        """`done` of `total` parts (or steps) are finished; `message` says what is going on."""
        self.done, self.message = done, message
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
            log.info("%s", self.line())

    def line(self) -> str:
        """Stage, how much is done, rate, remaining time and message."""
        counts = f"{self.done:g} of {self.total:g}" if self.total else f"{self.done:g}"
        said = f"  {self.message}" if self.message else ""
        return f"{self.stage}: {counts}{self._rate()}{said}"

    def _rate(self) -> str:
        now = time.monotonic()
        if self._first is None or self.done <= self._first[1] or now <= self._first[0]:
            return ""
        rate = (self.done - self._first[1]) / (now - self._first[0])
        left = f", about {(self.total - self.done) / rate:.0f} s left" if self.total else ""
        return f", {rate:.3g}/s{left}"


class _RateColumn(ProgressColumn):
    """Parts (or steps) a second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.3g}/s", style="progress.data.speed")


@contextmanager
def reporting(stage: str, total: float, *, in_prefect: bool = True) -> Iterator[Reporter]:
    """Report one stage's progress while the block runs; `in_prefect` shows it in the flow run at hand, if there is one."""
    bar: Progress | None = None
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
    reporter = Reporter(stage, total, bar)
    shown = _Shown(reporter) if in_prefect else None
    if bar is not None:
        bar.start()
    try:
        yield reporter
    finally:
        if bar is not None:
            bar.stop()
        if shown is not None:
            shown.stop()


class _Shown:
    """The progress artifact of the flow run at hand, kept up to date from a thread."""

    def __init__(self, reporter: Reporter) -> None:
        from prefect.context import FlowRunContext

        self._reporter = reporter
        self._artifact: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if FlowRunContext.get() is not None:
            target = contextvars.copy_context().run  # the artifact belongs to this flow run
            self._thread = threading.Thread(
                target=target, args=(self._run,), name="show-progress", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Show the last state; waits for it a moment only."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        from httpx import HTTPError

        over = self._over.wait(_SHOWN_EVERY)
        while not over or self._artifact is not None:
            try:
                self._show()
            except (HTTPError, OSError) as error:
                log.debug("%s: progress could not be shown: %s", self._reporter.stage, error)
            if over:
                return
            over = self._over.wait(_SHOWN_EVERY)

    def _show(self) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        reporter = self._reporter
        percent = min(100.0, 100.0 * reporter.done / reporter.total) if reporter.total else 0.0
        if self._artifact is None:
            self._artifact = create_progress_artifact(percent, description=reporter.line())
        else:
            update_progress_artifact(self._artifact, percent, description=reporter.line())
