"""SIGTERM, which a scheduler sends some seconds before it takes the machine away: noted, to be acted on between two steps.

Python runs signal handlers in the main thread alone, and training may run in another; so whoever has the main thread
enters `noting_sigterm`, and the training loop asks `sigterm_came`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["noting_sigterm", "sigterm_came"]

_came = threading.Event()


@contextmanager
def noting_sigterm() -> Iterator[None]:
    """Note a SIGTERM instead of dying of it while the block runs; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _came.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: _came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def sigterm_came() -> bool:
    """Whether a SIGTERM was noted since the last `noting_sigterm` began."""
    return _came.is_set()
