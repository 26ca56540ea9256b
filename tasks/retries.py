"""Which failures are worth another attempt, and how long to wait before it.

A dead or hanging engine, memory that ran out and a network that dropped may be well a moment later; a mistake in the
configuration, the data or a program would only come again. Every attempt goes on with the parts that are not committed yet.
"""

import re
from typing import Any

from qrpo.errors import EngineError
from storage import StoreUnavailableError

__all__ = ["RETRY_DELAYS", "may_pass", "worth_another_try"]

RETRY_DELAYS = [5.0, 30.0, 120.0]
"""Seconds to wait before each further attempt."""

# what a child process raised comes as "... failed: module.ErrorName: text"
_PASSING_IN_CHILD = re.compile(
    r"out of memory|OutOfMemory|MemoryError|EngineDead|ConnectionError|ConnectTimeout|ReadTimeout|TimeoutError"
    r"|after \d+ attempts"
)


def worth_another_try(task: Any, run: Any, state: Any) -> bool:
    """For Prefect's `retry_condition_fn`."""
    return may_pass(state.result(raise_on_failure=False))


def may_pass(error: object) -> bool:
    """Whether the same work may succeed a moment later."""
    if isinstance(error, EngineError):
        text = str(error)
        return " failed: " not in text or bool(_PASSING_IN_CHILD.search(text))  # else the child died
    if isinstance(error, StoreUnavailableError):
        return error.transient
    return isinstance(error, (MemoryError, ConnectionError, TimeoutError))
