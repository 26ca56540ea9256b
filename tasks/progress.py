"""Progress of a stage: a bar with rate and remaining time on a terminal, otherwise a log line every
few seconds.

In a Prefect flow run, a progress artifact of that run shows the same numbers. A separate thread
updates it, so a slow or lost server does not delay the work.
"""

import contextvars
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

log = logging.getLogger("qrpo")
_LINE_SECONDS = 10.0  # between log lines
_ARTIFACT_SECONDS = 2.0  # between updates of the artifact; a shorter stage has none


class Reporter:
    """How much of one stage is done. `update` may be called at any rate."""

    def __init__(self, stage: str, total: float, bar: Progress | None) -> None:
        self.stage = stage
        self.parts = self.total = total
        self.done = 0.0
        self.message = ""
        self._bar = bar
        self._task = bar.add_task(stage, total=total) if bar else None
        self._last_line = time.monotonic()
        self._first: tuple[float, float] | None = None  # time and amount at first progress: excludes start-up

    def update(self, done: float, message: str = "", total: float | None = None) -> None:
        """Record that `done` of `total` parts (or steps) are finished; `message` says what is being
        computed."""
        self.done, self.message = done, message
        self.total = self.total if total is None else total
        now = time.monotonic()
        if self._first is None and done:
            self._first = now, done
        if self._bar is not None and self._task is not None:
            text = f"{self.stage}  {message}".rstrip()
            self._bar.update(self._task, completed=done, total=self.total, description=text)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            log.info("%s", self.line())

    def line(self) -> str:
        """Stage, amount done, rate, remaining time and message."""
        line = f"{self.stage}: {self.done:g}" + (f" of {self.total:g}" if self.total else "")
        now = time.monotonic()
        if self._first is not None and self.done > self._first[1] and now > self._first[0]:
            rate = (self.done - self._first[1]) / (now - self._first[0])
            line += f", {rate:.3g}/s"
            if self.total:
                line += f", about {(self.total - self.done) / rate:.0f} s left"
        return f"{line}  {self.message}".rstrip()


class _RateColumn(ProgressColumn):
    """Parts (or steps) per second."""

    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:.3g}/s", style="progress.data.speed")


@contextmanager
def reporting(stage: str, total: float, *, in_prefect: bool = True) -> Iterator[Reporter]:
    """Report one stage's progress while the block runs; with `in_prefect`, also in the current flow
    run, if there is one."""
    with ExitStack() as stack:
        bar: Progress | None = None
        if sys.stderr.isatty():
            bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                _RateColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            stack.enter_context(bar)
        reporter = Reporter(stage, total, bar)
        if in_prefect:
            stack.enter_context(_progress_artifact(reporter))
        yield reporter
        reporter.done = max(reporter.done, reporter.total)  # it ended well; its last update may be older


@contextmanager
def _progress_artifact(reporter: Reporter) -> Iterator[None]:
    """Keep the progress artifact of the current flow run up to date from a thread; wait a moment
    for the last update."""
    from prefect.artifacts import create_progress_artifact, update_progress_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is None:
        yield
        return
    over = threading.Event()

    def keep_up_to_date() -> None:
        artifact: Any = None
        last = over.wait(_ARTIFACT_SECONDS)
        while not last or artifact is not None:
            percent = min(100.0, 100.0 * reporter.done / reporter.total) if reporter.total else 0.0
            try:
                if artifact is None:
                    artifact = create_progress_artifact(percent, description=reporter.line())
                else:
                    update_progress_artifact(artifact, percent, description=reporter.line())
            except Exception as error:  # from a lost server: the next update may succeed
                log.debug("%s: the progress artifact was not updated: %s", reporter.stage, error)
            if last:
                return
            last = over.wait(_ARTIFACT_SECONDS)

    # with this context the artifact belongs to the current flow run
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(keep_up_to_date,), name="progress-artifact", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=15.0)
