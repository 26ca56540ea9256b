"""Support of the tests of rewards, child processes and the sandbox."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HI = [{"role": "user", "content": "Hi there"}]
_DATA = Path(__file__).parents[3] / "shared" / "data"
LEETCODE = _DATA / "leetcode_train_100.jsonl"
GSM8K = _DATA / "gsm8k_train_1000.jsonl"

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether the condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
