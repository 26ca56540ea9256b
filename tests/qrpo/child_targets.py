"""What test_child.py runs in child processes. Not in the test file itself, so that no child waits for pytest's import."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qrpo.errors import ConfigError, RewardError


def squares(count: int) -> Iterator[int]:
    sys.stdout.write("squaring\n")
    for number in range(count):
        yield number * number


def one_then_wait_for(path: Path) -> Iterator[str]:
    yield "first"
    while not path.exists():
        time.sleep(0.01)
    yield "second"


def fail_after_one(kind: str) -> Iterator[int]:
    yield 1
    if kind == "reward":
        raise RewardError("this reward is wrong")
    if kind == "exit":
        os._exit(3)
    raise KeyError("missing thing")


def with_grandchild(report: Path) -> Iterator[int]:
    grandchild = subprocess.Popen(["sleep", "1000"])
    report.write_text(f"{os.getpid()} {grandchild.pid}")
    yield 1
    time.sleep(1000)


def count_into(path: Path, size: int) -> Iterator[bytes]:
    for number in range(10_000):
        path.write_text(str(number))
        yield bytes(size)


class Counter:
    def __init__(self, start: int):
        self.value = start

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        time.sleep(1000)

    def up_to(self, count: int) -> Iterator[int]:
        for number in range(count):
            time.sleep(0.01)
            yield number

    def refuse(self) -> None:
        raise ConfigError("no such thing")

    def crash(self) -> None:
        raise ZeroDivisionError("one over zero")

    def unpicklable(self) -> Callable[[], int]:
        return lambda: 1


def refuse_to_start() -> None:
    raise RewardError("cannot be made")


def fail_in_another_process() -> None:
    sys.stdout.write(
        "(EngineCore pid=7) ERROR 11-27 23:00:00 [core.py:9] Traceback (most recent call last):\n"
    )
    sys.stdout.write(
        "(EngineCore pid=7) ERROR 11-27 23:00:00 [core.py:9] ValueError: no memory for the cache\n"
    )
    raise RuntimeError("the engine core failed, see above")
