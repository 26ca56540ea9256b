"""Score rows with an object that lives in one or several child processes, with a time-out per call.

If a call on a batch raises, dies, hangs or returns the wrong number of scores, its rows are tried
one by one, so one bad row costs no other row. The object is any with

    columns() -> the names of the columns that it needs, or None for all
    call(prompts, completions, columns, conversational) -> one Score per completion, or RewardError
"""

import math
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from qrpo.config import execution_option
from qrpo.errors import EngineError, RewardError
from qrpo.processes.child import Child
from qrpo.rewards.protocol import Columns, Forms, Prompts, RewardSection, Score, Texts

# completions in a row that cost their process, which end the run: before anything was scored, and
# after
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
        children = [Child(target, argument, name=f"reward {name}", log=log) for _ in range(self.workers)]
        return WorkerPool(children, self, name)


class WorkerPool:
    """A `Reward` with an object in each of several child processes."""

    def __init__(self, children: Sequence[Child], section: WorkerSection, name: str):
        self._children = children
        self._section = section
        self._name = name
        self._lock = threading.Lock()  # protects the fields below
        self._scored_any = False
        self._lost = 0  # processes that hung or ended, in a row
        self._abandoned = False  # the caller waits no longer

    def score(
        self, prompts: Prompts, completions: Texts, columns: Columns, *, conversational: Forms = None
    ) -> list[Score]:
        """One score per completion; RewardError if every row so far failed."""
        count = len(completions)
        if not count:
            return []
        wanted = self._children[0].call("columns")  # raises what loading the object raises
        if wanted is not None:
            columns = {name: columns[name] for name in columns if name in wanted}
        forms = [True] * count if conversational is None else conversational

        def call(child: Child, rows: list[int]) -> list[Score]:
            arguments = (
                [prompts[row] for row in rows],
                [completions[row] for row in rows],
                {name: [values[row] for row in rows] for name, values in columns.items()},
            )
            timeout = self._section.timeout
            try:
                scores: list[Score] = child.call("call", *arguments, forms[rows[0]], timeout=timeout)
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

        size = max(1, min(self._section.batch_size, math.ceil(count / len(self._children))))
        batches = []
        for form in (True, False):
            alike = [row for row in range(count) if forms[row] is form]
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        found = self._call_all(call, batches)
        scores = dict(zip((row for batch in batches for row in batch), found, strict=True))
        if not self._scored_any and count > 1:
            raise RewardError(
                f"the reward failed on each of the first {count} completions: {found[0].error}. Fix it"
            )
        return [scores[row] for row in range(count)]

    def close(self) -> None:
        """End the child processes."""
        for child in self._children:
            child.close()

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
        """The score of a row whose call failed; RewardError if too many in a row cost their
        process."""
        hung = isinstance(error, TimeoutError)
        reason = f"no answer within {self._section.timeout:g} s (timeout)" if hung else str(error)
        with self._lock:
            self._lost = self._lost + 1 if hung or isinstance(error, EngineError) else 0
            if self._lost >= (_MAX_LOST if self._scored_any else _MAX_LOST_AT_START):
                raise RewardError(
                    f"{self._name} hung or ended its process on each of {self._lost} completions in a row, at last: "
                    f"{reason}. Fix the function, or raise the reward's timeout ({self._section.timeout:g} s)"
                )
        return Score(None, reason)
