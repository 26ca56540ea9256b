"""Record SIGTERM, which schedulers send some seconds before they take a machine away, and act on it
between two steps.

Python runs signal handlers in the main thread alone, and training may run in another. So the code
that owns the main thread enters `noting_sigterm`, and the training loop asks `sigterm_came`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_came = threading.Event()


@contextmanager
def noting_sigterm() -> Iterator[None]:
    """Record SIGTERM instead of ending the process; no effect outside the main thread."""
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
    """Whether a SIGTERM arrived since the last `noting_sigterm` began."""
    return _came.is_set()
