"""Child processes, with real ones: what they give, how they fail, and that none is ever left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qrpo.errors import ConfigError, EngineError, RewardError
from qrpo.processes.child import Child
from tests.support.processes import are_gone, is_gone
from tests.support.refusals import refuses
from tests.support.rewards import wait_until

TARGETS = str(Path(__file__).with_name("child_targets.py").resolve())


@pytest.fixture
def counter():
    """A child with a counter that starts at 0."""
    child = Child(f"{TARGETS}:Counter", 0)
    yield child
    child.close()


def stream(target, *args, log=None):
    function = "qrpo.processes.serving:GeneratorFunction"
    return Child(function, f"{TARGETS}:{target}", log=log).stream("run", *args)


def pids_in(report):
    assert wait_until(lambda: report.exists() and len(report.read_text().split()) == 2)
    return [int(pid) for pid in report.read_text().split()]


# ------------------------------------------------------------------------------------------- one function


def test_stream_yields_what_the_function_yields_as_it_comes(tmp_path):
    log, flag = tmp_path / "logs" / "child.log", tmp_path / "flag"
    assert list(stream("squares", 4, log=log)) == [0, 1, 4, 9]
    assert "squaring" in log.read_text()
    items = stream("one_then_wait_for", flag)
    assert next(items) == "first"
    flag.touch()
    assert list(items) == ["second"]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("reward", RewardError, "this reward is wrong"),
        ("key", EngineError, r"KeyError: 'missing thing'.*child\.log"),
        ("exit", EngineError, "exited with code 3"),
    ],
)
def test_our_own_errors_rise_as_themselves_and_others_as_engine_errors_with_the_log(
    tmp_path, kind, error, message
):
    log = tmp_path / "child.log"
    items = stream("fail_after_one", kind, log=log)
    if kind != "exit":  # else it may end before it has sent the item
        assert next(items) == 1
    raised = refuses(error, message, list, items)
    assert not getattr(raised, "transient", False)
    assert ("Traceback" in log.read_text()) == (kind != "exit")


def test_an_unknown_function_is_a_config_error():
    refuses(ConfigError, "no function 'nothing'", list, stream("nothing"))
    refuses(ConfigError, "no module 'nowhere'", list, Child("nowhere:nothing").stream("run"))


def test_a_slow_reader_holds_the_child_back_and_closing_kills_the_whole_group(tmp_path):
    count, report = tmp_path / "count", tmp_path / "pids"
    items, family = stream("count_into", count, 8 << 20), stream("with_grandchild", report)
    next(items)
    next(family)
    pids = pids_in(report)
    family.close()
    assert are_gone(pids)
    time.sleep(1.0)
    made = int(count.read_text())
    items.close()
    assert 2 <= made <= 12  # 64 MiB ahead, and what the pipe holds


# ------------------------------------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize("killed", [True, False], ids=["kill -9 of the parent", "the parent's end"])
def test_the_end_of_the_parent_ends_the_child(tmp_path, killed):
    report, script = tmp_path / "pids", tmp_path / "parent.py"
    child = f"Child('qrpo.processes.serving:GeneratorFunction', {TARGETS + ':with_grandchild'!r})"
    # no `if __name__ == "__main__"`: the child must not run the parent's script again
    script.write_text(
        "import time\nfrom pathlib import Path\nfrom qrpo.processes.child import Child\n"
        f"items = {child}.stream('run', Path({str(report)!r}))\nnext(items)\nprint('ready', flush=True)\n"
        + "time.sleep(1000)\n"
        * killed
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        pids = pids_in(report)
        if killed:
            assert not any(map(is_gone, pids))
            parent.kill()
        parent.wait()
        assert are_gone(pids)


def test_the_child_survives_the_thread_that_started_it(counter):
    thread = threading.Thread(target=lambda: counter.call("add", 1))
    thread.start()
    thread.join()
    time.sleep(1.5)
    assert counter.call("add", 1) == 2


def test_closing_leaves_no_file_open(tmp_path):
    open_files = []
    for _ in range(3):
        child = Child(f"{TARGETS}:Counter", 0, log=tmp_path / "log")
        child.call("add", 1)
        child.close()
        open_files.append(len(os.listdir("/proc/self/fd")))
    assert open_files[1:] == open_files[:1] * 2


# ------------------------------------------------------------------------------------------- Child


def test_a_child_keeps_its_object_between_calls_until_it_is_closed(counter):
    assert counter.pid is None
    assert [counter.call("add", 1), counter.call("add", 2)] == [1, 3]
    assert list(counter.stream("up_to", 3)) == [0, 1, 2]
    assert counter.pid == counter.call("pid")
    counter.close()
    assert counter.pid is None
    assert counter.call("add", 1) == 1


def test_a_killed_child_is_an_engine_error_and_starts_again(tmp_path):
    child = Child(f"{TARGETS}:Counter", 0, name="the counter", log=tmp_path / "log")
    items = child.stream("up_to", 1000)
    next(items)
    os.kill(child.pid, signal.SIGKILL)
    raised = refuses(EngineError, r"the counter was killed by SIGKILL.*its log: .*log", list, items)
    assert raised.transient
    pid = child.call("pid")
    os.kill(pid, signal.SIGKILL)  # between two calls
    assert wait_until(lambda: child.pid is None)
    assert child.call("pid") != pid
    child.close()


def test_an_abandoned_call_and_one_that_hangs_start_afresh(counter):
    first = counter.call("pid")
    items = counter.stream("up_to", 1000)
    next(items)
    del items
    assert wait_until(lambda: is_gone(first))
    pid = counter.call("pid")
    refuses(TimeoutError, r"0\.3 s", counter.call, "hang", timeout=0.3)
    assert is_gone(pid)


def test_our_errors_leave_the_child_alive_and_others_end_it(counter):
    pid = counter.call("pid")
    refuses(ConfigError, "no such thing", counter.call, "refuse")
    assert counter.call("pid") == pid
    refuses(EngineError, "ZeroDivisionError: one over zero", counter.call, "crash")
    assert counter.call("pid") != pid
    refuses(EngineError, "pickle", counter.call, "unpicklable")


def test_an_object_that_cannot_be_made_says_why(tmp_path):
    child = Child(f"{TARGETS}:refuse_to_start")
    for _ in range(2):
        refuses(RewardError, "cannot be made", child.call, "anything")
    child.close()
    (tmp_path / "log").write_text("ValueError: of an earlier start\n")
    child = Child(f"{TARGETS}:fail_in_another_process", name="the engine", log=tmp_path / "log")
    cause = r"RuntimeError: the engine core failed.* Cause: ValueError: no memory for the cache\. its log"
    refuses(EngineError, cause, child.call, "anything")


def test_threads_are_served_in_turn_and_a_call_while_reading_is_refused(counter):
    answers = []
    read = [
        threading.Thread(target=lambda: answers.append(list(counter.stream("up_to", 20)))) for _ in range(4)
    ]
    for thread in read:
        thread.start()
    for thread in read:
        thread.join()
    assert answers == [list(range(20))] * 4
    items = counter.stream("up_to", 5)
    next(items)
    refuses(EngineError, "still answering this thread", counter.call, "add", 1)
    assert list(items) == [1, 2, 3, 4]
