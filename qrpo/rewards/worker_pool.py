"""Score rows with an object that lives in one or several child processes, with a time-out per call.

If a call on a batch raises, dies, hangs or returns the wrong number of scores, its rows are tried
one by one, so one bad row costs no other row. The object is any with

    columns() -> the names of the columns that it needs, or None for all
    call(prompts, completions, columns, conversational) -> one Score per completion, or RewardError
"""

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from qrpo.config import execution_option
from qrpo.data.chat import Messages
from qrpo.errors import EngineError, RewardError
from qrpo.processes.child import Child
from qrpo.rewards.protocol import Columns, RewardSection, Score

__all__ = ["WorkerPool", "WorkerSection"]

# completions in a row that cost their process, which end the run: before anything was scored, and after
_MAX_LOST_AT_START, _MAX_LOST = 3, 10


class WorkerSection(RewardSection):
    """The settings of a reward that runs in a `WorkerPool`."""

    batch_size: int = execution_option(256, ge=1)
    """Maximum number of completions per call."""
    workers: int = execution_option(1, ge=1)
    """Concurrent processes."""
    timeout: float = execution_option(60.0, gt=0.0)
    """Maximum time for one call, in seconds; after it, its rows are tried one by one."""

    def pool(self, target: str, argument: Any, *, name: str, log: Path | None) -> "WorkerPool":
        """`target(argument)` in `workers` child processes."""
        return WorkerPool(
            target,
            argument,
            name=name,
            workers=self.workers,
            batch_size=self.batch_size,
            timeout=self.timeout,
            log=log,
        )


class WorkerPool:
    """A `Reward` with an object `target(*args)` in each of `workers` child processes."""

    def __init__(
        self,
        target: str,
        *args: Any,
        name: str,
        workers: int,
        batch_size: int,
        timeout: float,
        log: Path | None,
        env: Mapping[str, str] | None = None,
    ):
        self._name = name
        self._children = [
            Child(target, *args, name=f"reward {name}", log=log, env=env) for _ in range(workers)
        ]
        self._batch_size = batch_size
        self._timeout = timeout
        self._lock = threading.Lock()  # protects the fields below
        self._scored_any = False
        self._lost = 0  # processes that hung or ended, in a row
        self._abandoned = False  # the caller waits no longer

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion; RewardError if every row so far failed."""
        count = len(completions)
        if not count:
            return []
        wanted = self._children[0].call("columns")  # raises what loading the object raises
        if wanted is not None:
            columns = {name: columns[name] for name in columns if name in wanted}
        forms = [True] * count if conversational is None else list(conversational)

        def call(child: Child, rows: list[int]) -> list[Score]:
            arguments = (
                [prompts[row] for row in rows],
                [completions[row] for row in rows],
                {name: [values[row] for row in rows] for name, values in columns.items()},
            )
            try:
                scores: list[Score] = child.call("call", *arguments, forms[rows[0]], timeout=self._timeout)
            except (RewardError, EngineError, TimeoutError) as error:
                if self._abandoned:
                    raise
                if len(rows) > 1:
                    return [score for row in rows for score in call(child, [row])]
                return [self._failed(error)]
            with self._lock:
                self._scored_any = self._scored_any or any(score.error is None for score in scores)
                self._lost = 0
            return scores

        batches = [
            batch
            for form in (True, False)
            for batch in self._batches([row for row in range(count) if forms[row] is form])
        ]
        found = self._call_all(call, batches)
        scores = dict(zip((row for batch in batches for row in batch), found, strict=True))
        errors = [score.error for score in scores.values() if score.error is not None]
        self._scored_any = self._scored_any or len(errors) < count
        if not self._scored_any and count > 1:
            raise RewardError(
                f"the reward failed on each of the first {count} completions: {errors[0]}. Fix it"
            )
        return [scores[row] for row in range(count)]

    def close(self) -> None:
        """End the child processes."""
        for child in self._children:
            child.close()

    def _batches(self, rows: list[int]) -> list[list[int]]:
        size = max(1, min(self._batch_size, math.ceil(len(rows) / len(self._children))))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _call_all(
        self, call: Callable[[Child, list[int]], list[Score]], batches: Sequence[list[int]]
    ) -> list[Score]:
        """The scores of all batches, in order, each batch on the next idle child."""
        idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._children:
            idle.put(child)

        def call_on_idle(batch: list[int]) -> list[Score]:
            child = idle.get()
            try:
                return call(child, batch)
            finally:
                idle.put(child)

        with ThreadPoolExecutor(len(self._children), thread_name_prefix="reward") as threads:
            futures = [threads.submit(call_on_idle, batch) for batch in batches]
            try:
                return [score for future in futures for score in future.result()]
            except BaseException:  # also an interruption while calls run
                self._abandoned = True
                for future in futures:
                    future.cancel()
                while wait(futures, timeout=0.1).not_done:
                    for child in self._children:
                        child.close(grace=0.0)
                raise
            finally:
                self._abandoned = False

    def _failed(self, error: Exception) -> Score:
        """The score of a row whose call failed; RewardError if too many in a row cost their process."""
        hung = isinstance(error, TimeoutError)
        reason = f"no answer within {self._timeout:g} s (timeout)" if hung else str(error)
        with self._lock:
            self._lost = self._lost + 1 if hung or isinstance(error, EngineError) else 0
            if self._lost >= (_MAX_LOST if self._scored_any else _MAX_LOST_AT_START):
                raise RewardError(
                    f"{self._name} hung or ended its process on each of {self._lost} completions in a row, at last: "
                    f"{reason}. Fix the function, or raise the reward's timeout ({self._timeout:g} s)"
                )
        return Score(None, reason)
