"""Rows through an object that lives in one or several child processes: batches side by side, a time-out per call.

When a call on a batch raises, dies, hangs or returns the wrong count, its rows are tried one by one: one bad row does
not cost the others. The object is any with

    ready() -> the names of the columns that it wants, or None for all
    call(prompts, completions, columns, conversational) -> one Score per completion; RewardError fails the batch
"""

import math
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from qrpo.data.chat import Messages
from qrpo.errors import EngineError, RewardError
from qrpo.processes.child import Child
from qrpo.rewards.protocol import Columns, Score

__all__ = ["Workers"]

# calls in a row that hang: before anything was ever scored, and after
_TIMEOUTS_AT_FIRST, _TIMEOUTS_LATER = 3, 10


class Workers:
    """A `Reward` whose object `target(*args)` lives in `count` child processes, each started by its first batch."""

    def __init__(
        self,
        target: str,
        *args: Any,
        name: str,
        count: int,
        batch_size: int,
        timeout: float,
        log: Path | None,
        env: Mapping[str, str] | None = None,
    ):
        self._name = name
        self._children = [Child(target, *args, name=f"reward {name}", log=log, env=env) for _ in range(count)]
        self._batch_size = batch_size
        self._timeout = timeout
        self._lock = threading.Lock()  # for what follows
        self._scored_any = False
        self._timeouts = 0  # in a row
        self._abandoned = False  # nobody waits for the scores any more

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order. RewardError if every row failed that was ever given to it."""
        count = len(completions)
        if not count:
            return []
        wanted = self._children[0].call("ready")  # so that what cannot be loaded is told as that
        if wanted is not None:
            columns = {name: columns[name] for name in columns if name in wanted}
        table = _Table(prompts, completions, columns)
        forms = [True] * count if conversational is None else list(conversational)
        batches = [
            (batch, form)
            for form in (True, False)
            for batch in self._batches([row for row in range(count) if forms[row] is form])
        ]
        scores: dict[int, Score] = {}
        for (batch, _), found in zip(batches, self._score_side_by_side(batches, table), strict=True):
            scores |= zip(batch, found, strict=True)
        errors = [score.error for score in scores.values() if score.error is not None]
        self._scored_any = self._scored_any or len(errors) < count
        if not self._scored_any and count > 1:
            raise RewardError(
                f"the reward failed on each of the first {count} completions: {errors[0]}. Mend it"
            )
        return [scores[row] for row in range(count)]

    def close(self) -> None:
        """End the child processes."""
        for child in self._children:
            child.close()

    def _batches(self, rows: list[int]) -> list[list[int]]:
        size = max(1, min(self._batch_size, math.ceil(len(rows) / len(self._children))))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _score_side_by_side(
        self, batches: Sequence[tuple[list[int], bool]], table: "_Table"
    ) -> list[list[Score]]:
        idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._children:
            idle.put(child)

        def score(batch: tuple[list[int], bool]) -> list[Score]:
            child = idle.get()
            try:
                return self._score_rows(child, *batch, table)
            finally:
                idle.put(child)

        with ThreadPoolExecutor(len(self._children), thread_name_prefix="reward") as threads:
            futures = [threads.submit(score, batch) for batch in batches]
            try:
                return [future.result() for future in futures]
            except BaseException:  # an interruption too, while calls are still waited for
                self._abandoned = True
                for future in futures:
                    future.cancel()
                while wait(futures, timeout=0.1).not_done:
                    for child in self._children:
                        child.close(grace=0.0)
                raise
            finally:
                self._abandoned = False

    def _score_rows(
        self, child: Child, rows: list[int], conversational: bool, table: "_Table"
    ) -> list[Score]:
        try:
            scores: list[Score] = child.call("call", *table.take(rows), conversational, timeout=self._timeout)
        except (RewardError, EngineError, TimeoutError) as error:  # it raised, died, or hung
            if self._abandoned:
                raise
            hung = isinstance(error, TimeoutError)
            if len(rows) > 1:
                return [
                    score for row in rows for score in self._score_rows(child, [row], conversational, table)
                ]
            self._note_failure(hung)
            return [Score(None, f"no answer within {self._timeout:g} s (timeout)" if hung else str(error))]
        with self._lock:
            self._scored_any = self._scored_any or any(score.error is None for score in scores)
            self._timeouts = 0
        return scores

    def _note_failure(self, hung: bool) -> None:
        with self._lock:
            self._timeouts = self._timeouts + 1 if hung else 0
            if self._timeouts >= (_TIMEOUTS_LATER if self._scored_any else _TIMEOUTS_AT_FIRST):
                raise RewardError(
                    f"{self._name} took more than {self._timeout:g} s on each of {self._timeouts} completions in a "
                    "row: raise the reward's timeout, or mend the function"
                )


class _Table:
    """The rows of one `score` call by column."""

    def __init__(self, prompts: Sequence[Messages], completions: Sequence[str], columns: Columns):
        self._prompts, self._completions, self._columns = prompts, completions, columns

    def take(self, rows: list[int]) -> tuple[list[Messages], list[str], dict[str, list[Any]]]:
        return (
            [self._prompts[row] for row in rows],
            [self._completions[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self._columns.items()},
        )
