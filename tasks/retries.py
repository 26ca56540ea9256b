"""Which failures are retried, and after how long.

A dead or hanging engine, exhausted memory or a dropped connection may work a moment later. An error
in the configuration, the data or a program would only happen again. Every retry continues with the
parts that are not committed yet.
"""

import re
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings

from qrpo.errors import EngineError
from storage import StoreUnavailableError

NO_RESULT: dict[str, Any] = {
    "persist_result": False,
    "result_storage": Path(
        get_current_settings().results.local_storage_path
    ),  # gets the errors of failed runs
}
"""Options of flows and tasks. Without a storage Prefect asks the server for its default one at each
start."""

RETRY_DELAYS = [5.0, 30.0, 120.0]
"""Seconds before each retry."""

# an error raised in a child process arrives as "... failed: module.ErrorName: text"
_TRANSIENT_IN_CHILD = re.compile(
    r" failed: .*(?:out of memory|OutOfMemory|MemoryError|EngineDead|ConnectionError|ConnectTimeout|ReadTimeout|TimeoutError"
    r"|after \d+ attempts)",
    re.DOTALL,
)


def retry_if_transient(task: Any, run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`."""
    return is_transient(state.result(raise_on_failure=False))


def is_transient(error: object) -> bool:
    """Whether the same work may succeed a moment later."""
    if isinstance(error, EngineError):
        return error.transient or bool(_TRANSIENT_IN_CHILD.search(str(error)))
    if isinstance(error, StoreUnavailableError):
        return error.transient
    return isinstance(error, (MemoryError, ConnectionError, TimeoutError))
