"""Child processes, with real ones: what they give, how they fail, and that none is ever left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qrpo.errors import ConfigError, EngineError, RewardError
from qrpo.processes.child import Child
from tests.support.rewards import wait_until

TARGETS = str(Path(__file__).with_name("child_targets.py").resolve())


@pytest.fixture
def counter() -> Iterator[Child]:
    """A child with a counter that starts at 0."""
    child = Child(f"{TARGETS}:Counter", 0)
    yield child
    child.close()


def stream(target: str, *args: Any, log: Path | None = None) -> Any:
    return Child("qrpo.processes.serving:GeneratorFunction", f"{TARGETS}:{target}", log=log).stream(
        "run", *args
    )


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def are_gone(pids: list[int]) -> bool:
    return wait_until(lambda: all(map(is_gone, pids)))


def pids_in(report: Path) -> list[int]:
    assert wait_until(lambda: report.exists() and len(report.read_text().split()) == 2)
    return [int(pid) for pid in report.read_text().split()]


# ------------------------------------------------------------------------------------------- one function


def test_stream_yields_what_the_function_yields(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    assert list(stream("squares", 4, log=log)) == [0, 1, 4, 9]
    assert "squaring" in log.read_text()


def test_items_come_as_they_are_made(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    items = stream("one_then_wait_for", flag)
    assert next(items) == "first"
    flag.touch()
    assert list(items) == ["second"]


def test_our_own_errors_rise_as_themselves() -> None:
    items = stream("fail_after_one", "reward")
    assert next(items) == 1
    with pytest.raises(RewardError, match="this reward is wrong"):
        next(items)


def test_other_errors_rise_as_engine_errors_with_the_log(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    items = stream("fail_after_one", "key", log=log)
    next(items)
    with pytest.raises(EngineError, match=r"KeyError: 'missing thing'.*child\.log"):
        next(items)
    assert "Traceback" in log.read_text()


def test_a_child_that_exits_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="exited with code 3") as ended:
        list(stream("fail_after_one", "exit"))
    assert not ended.value.transient


def test_an_unknown_function_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="no function 'nothing'"):
        list(stream("nothing"))
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        list(Child("nowhere:nothing").stream("run"))


def test_closing_the_iterator_kills_the_whole_group(tmp_path: Path) -> None:
    items = stream("with_grandchild", tmp_path / "pids")
    next(items)
    pids = pids_in(tmp_path / "pids")
    items.close()
    assert are_gone(pids)


def test_a_slow_reader_holds_the_child_back(tmp_path: Path) -> None:
    count = tmp_path / "count"
    items = stream("count_into", count, 8 << 20)
    next(items)
    time.sleep(1.0)
    made = int(count.read_text())
    items.close()
    assert 2 <= made <= 12  # 64 MiB ahead, and what the pipe holds


# ------------------------------------------------------------------------------------------- nothing left behind


def with_grandchild(report: Path) -> str:
    return f"Child('qrpo.processes.serving:GeneratorFunction', {TARGETS + ':with_grandchild'!r}).stream('run', Path({str(report)!r}))"


def parent_script(report: Path, *, in_thread: bool) -> str:
    # no `if __name__ == "__main__"`: the child must not run the parent's script again
    read = f"next(items := {with_grandchild(report)})"
    start = f"threading.Thread(target=lambda: kept.append({read})).start()" if in_thread else read
    return (
        "import threading, time\nfrom pathlib import Path\nfrom qrpo.processes.child import Child\nkept = []\n"
        f"{start}\nprint('ready', flush=True)\ntime.sleep(1000)\n"
    )


def test_kill_9_of_the_parent_leaves_no_process(tmp_path: Path) -> None:
    report = tmp_path / "pids"
    script = tmp_path / "parent.py"
    script.write_text(parent_script(report, in_thread=False))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        pids = pids_in(report)
        assert not any(map(is_gone, pids))
        parent.kill()
        parent.wait()
        assert are_gone(pids)


def test_the_child_survives_the_thread_that_started_it(tmp_path: Path) -> None:
    child = Child(f"{TARGETS}:Counter", 10)
    thread = threading.Thread(target=lambda: child.call("add", 1))
    thread.start()
    thread.join()
    time.sleep(1.5)
    assert child.call("add", 1) == 12
    child.close()


def test_the_end_of_the_parent_ends_the_child(tmp_path: Path) -> None:
    report = tmp_path / "pids"
    script = f"from pathlib import Path\nfrom qrpo.processes.child import Child\nitems = {with_grandchild(report)}\nnext(items)\n"
    subprocess.run([sys.executable, "-c", script], check=True)
    pids = pids_in(report)
    assert are_gone(pids)


def test_closing_leaves_no_file_open(tmp_path: Path) -> None:
    def run_one() -> None:
        child = Child(f"{TARGETS}:Counter", 0, log=tmp_path / "log")
        child.call("add", 1)
        child.close()

    run_one()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_one()
    assert len(os.listdir("/proc/self/fd")) == before


# ------------------------------------------------------------------------------------------- Child


def test_a_child_keeps_its_object_between_calls() -> None:
    child = Child(f"{TARGETS}:Counter", 5)
    assert child.pid is None
    assert [child.call("add", 1), child.call("add", 2)] == [6, 8]
    assert list(child.stream("up_to", 3)) == [0, 1, 2]
    assert child.pid == child.call("pid")
    child.close()
    assert child.pid is None
    assert child.call("add", 1) == 6  # started again
    child.close()


def test_a_killed_child_is_an_engine_error_and_starts_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = Child(f"{TARGETS}:Counter", 0, name="the counter", log=log)
    items = child.stream("up_to", 1000)
    next(items)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"the counter was killed by SIGKILL.*its log: .*log") as ended:
        list(items)
    assert ended.value.transient
    assert child.call("add", 1) == 1
    child.close()


def test_a_child_killed_between_calls_starts_again(counter: Child) -> None:
    pid = counter.call("pid")
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: counter.pid is None)
    assert counter.call("pid") != pid


def test_abandoning_a_call_starts_afresh(counter: Child) -> None:
    first = counter.call("pid")
    items = counter.stream("up_to", 1000)
    next(items)
    del items
    assert wait_until(lambda: is_gone(first))
    assert counter.call("add", 1) == 1


def test_a_call_that_hangs_ends_with_a_timeout(counter: Child) -> None:
    pid = counter.call("pid")
    with pytest.raises(TimeoutError, match=r"0\.3 s"):
        counter.call("hang", timeout=0.3)
    assert is_gone(pid)


def test_our_errors_leave_the_child_alive_and_others_end_it(counter: Child) -> None:
    pid = counter.call("pid")
    with pytest.raises(ConfigError, match="no such thing"):
        counter.call("refuse")
    assert counter.call("pid") == pid
    with pytest.raises(EngineError, match="ZeroDivisionError: one over zero"):
        counter.call("crash")
    assert counter.call("pid") != pid
    with pytest.raises(EngineError, match="pickle"):
        counter.call("unpicklable")


def test_an_object_that_cannot_be_made_says_why() -> None:
    child = Child(f"{TARGETS}:refuse_to_start")
    for _ in range(2):
        with pytest.raises(RewardError, match="cannot be made"):
            child.call("anything")
    child.close()


def test_an_error_names_its_cause_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("ValueError: of an earlier start\n")
    child = Child(f"{TARGETS}:fail_in_another_process", name="the engine", log=tmp_path / "log")
    with pytest.raises(
        EngineError,
        match=r"RuntimeError: the engine core failed.* Cause: ValueError: no memory for the cache\. its log",
    ):
        child.call("anything")


def test_calls_from_several_threads_are_served_one_after_another(counter: Child) -> None:
    answers: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(list(counter.stream("up_to", 20)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [list(range(20))] * 4


def test_calling_while_reading_is_refused_instead_of_waiting_for_ever(counter: Child) -> None:
    items = counter.stream("up_to", 5)
    next(items)
    with pytest.raises(EngineError, match="still answering this thread"):
        counter.call("add", 1)
    assert list(items) == [1, 2, 3, 4]
