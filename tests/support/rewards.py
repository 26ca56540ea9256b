"""Support of the tests of rewards, child processes and the sandbox."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HI = [{"role": "user", "content": "Hi there"}]
DATA = Path(__file__).parents[1] / "data"

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
