"""Attacks on the sandbox, each written as a solution: none scores, none outlives its limit, the host is unharmed."""

import contextlib
import os
import platform
import random
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrpo.rewards.code import code_blocks
from qrpo.sandbox import CheckTests, Limits, ProgramTests, Sandbox, Verdict
from tests.support.rewards import needs_bubblewrap, wait_until

pytestmark = needs_bubblewrap

ATTACKS = runpy.run_path(str(Path(__file__).with_name("sandbox_attacks.py")))
CHEATS, HOGS, PROBES = ATTACKS["CHEATS"], ATTACKS["HOGS"], ATTACKS["PROBES"]
PREAMBLE = """
class Result:
    def __init__(self, value):
        self.value = value
        self.left = self.right = None
    def __eq__(self, other):
        return isinstance(other, Result) and self.value == other.value and self.left == other.left and self.right == other.right
"""
LIMITS = Limits(cpu_seconds=1, wall_seconds=2.0, memory_mb=256, output_mb=1.0)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(LIMITS, workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def secrets() -> list[int]:
    return [random.SystemRandom().randrange(10**6, 10**9) for _ in range(4)]


@pytest.fixture(scope="module")
def tests(secrets: list[int]) -> CheckTests:
    numbers = "".join(
        f"    assert candidate({place}) == {value}\n" for place, value in enumerate(secrets[:3])
    )
    objects = f"    assert candidate(3) == Result({secrets[3]})\n"
    return CheckTests(f"def check(candidate):\n{numbers}{objects}", "f", PREAMBLE)


def assert_earned_nothing(verdict: object, name: str) -> None:
    assert isinstance(verdict, Verdict), name
    assert verdict.passed == (False,) * 4, name


@pytest.fixture(scope="module")
def honest(secrets: list[int]) -> str:
    return f"def f(x): return {secrets[:3]}[x] if x < 3 else Result({secrets[3]})"


def test_an_honest_solution_is_paid(sandbox: Sandbox, tests: CheckTests, honest: str) -> None:
    assert sandbox.judge([(honest, tests)]) == [Verdict((True,) * 4)]


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_earns_nothing(sandbox: Sandbox, tests: CheckTests, name: str) -> None:
    (verdict,) = sandbox.judge([(CHEATS[name], tests)])
    assert_earned_nothing(verdict, name)


@pytest.mark.slow
def test_hogs_earn_nothing_end_in_time_and_leave_nothing(
    tests: CheckTests, honest: str, tmp_path: Path
) -> None:
    free = shutil.disk_usage(tmp_path).free
    started = time.monotonic()
    with Sandbox(LIMITS, workers=8) as sandbox:  # more than cores: half of them only wait
        verdicts = sandbox.judge([(code, tests) for code in HOGS.values()])
        # a second of processor time is twenty on the clock at most, however busy the machine
        assert time.monotonic() - started < 24 * len(HOGS)
        for name, verdict in zip(HOGS, verdicts, strict=True):
            assert_earned_nothing(verdict, name)
        assert sandbox.judge([(honest, tests)] * 8) == [Verdict((True,) * 4)] * 8
    assert shutil.disk_usage(tmp_path).free > free - (1 << 30)


def test_it_is_processor_time_that_decides(tests: CheckTests, honest: str) -> None:
    with Sandbox(Limits(cpu_seconds=10, wall_seconds=0.2), workers=1) as impatient:
        slow = honest + "\nimport time\nwhile time.process_time() < 0.5: pass"
        asleep = honest + "\nimport time\ntime.sleep(10)"
        assert impatient.judge([(slow, tests)]) == [Verdict((True,) * 4)]
        assert impatient.judge([(asleep, tests)]) == [Verdict((False,) * 4, "wall time")]


def test_a_cheat_keeps_what_it_passed_before(sandbox: Sandbox, tests: CheckTests, honest: str) -> None:
    code = honest + "\nhonest = f\ndef f(x):\n    import os\n    if x == 2: os._exit(0)\n    return honest(x)"
    (verdict,) = sandbox.judge([(code, tests)])
    assert isinstance(verdict, Verdict)
    assert verdict.passed == (True, True, False, False)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="probes use the numbers of x86-64's system calls")
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_finds_the_sandbox_closed(sandbox: Sandbox, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = str(server.getsockname()[1]) if "socket" in name else str(tmp_path / "secret")
        (verdict,) = sandbox.judge([(PROBES[name], ProgramTests((given,), ("held",)))])
    assert isinstance(verdict, Verdict)
    assert verdict.all_passed, verdict.note


def test_the_probes_would_tell_if_there_were_no_sandbox() -> None:
    harmless = ["opens a local socket", "reads /etc/passwd", "reads /proc", "makes hidden memory", "spawns"]
    with Sandbox(LIMITS, workers=1, allow_unsandboxed=True) as bare:
        tests = ProgramTests(("",), ("escaped",))
        verdicts = bare.judge(
            [(PROBES[name].replace("/python/bin/python3", "/bin/true"), tests) for name in harmless]
        )
    assert [verdict.passed for verdict in verdicts if isinstance(verdict, Verdict)] == [(True,)] * len(
        harmless
    )


def test_a_program_sees_an_empty_environment_and_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRPO_TEST_SECRET", "hunter2")
    code = "import os; print(sorted(os.environ)); print(sorted(set(os.listdir('/')) - {'lib32', 'lib64', 'libx32'}))"
    expected = (
        "['HOME', 'LANG', 'LD_BIND_NOW', 'LD_LIBRARY_PATH', 'MALLOC_ARENA_MAX', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PWD', "
        "'PYTHONHASHSEED']\n"
        "['dev', 'lib', 'python', 'sandbox', 'tmp', 'usr']"
    )
    with Sandbox(LIMITS, workers=1) as fresh:
        (verdict,) = fresh.judge([(code, ProgramTests(("",), (expected,)))])
    assert verdict == Verdict((True,))


def test_solutions_do_not_meet(sandbox: Sandbox) -> None:
    tell = "open('/tmp/note', 'w').write('x'); import builtins; builtins.note = 1; print('told')"
    look = "import builtins, os; print(os.listdir('/tmp'), hasattr(builtins, 'note'), os.getpid())"
    for _ in range(4):
        verdicts = sandbox.judge(
            [(tell, ProgramTests(("",), ("told",))), (look, ProgramTests(("",), ("[] False 1",)))]
        )
        assert verdicts == [Verdict((True,)), Verdict((True,))]


def test_work_on_a_solutions_output_is_linear(sandbox: Sandbox, tests: CheckTests) -> None:
    started = time.process_time()
    for line in ("`" * 60_000, "~" * 60_000 + "x", " " * 60_000 + "```", "```" + "a" * 60_000 + "`"):
        assert code_blocks(line + "\n" + line) in ([], [""], [line])
    many = "import os\ndef f(x):\n    os.write(3, bytes(200_000))\n    return 0"
    live = CheckTests("def check(c):\n    for n in range(3):\n        assert c(n) == 5", "f")
    for verdict in sandbox.judge([(many, tests), (many, live)]):
        assert isinstance(verdict, Verdict)
        assert not any(verdict.passed)
    assert time.process_time() - started < 2.0


def test_nothing_lives_on_after_the_sandbox_is_closed(tests: CheckTests) -> None:
    before = _children()
    with Sandbox(LIMITS, workers=2) as sandbox:
        sandbox.judge([("def f(x): return 1", tests)] * 4)
        assert _children() > before
    assert _children() == before


def test_nothing_lives_on_when_the_host_is_killed() -> None:
    mark = 64 * 1024 + random.SystemRandom().randrange(1 << 16)  # MiB; found on the jails' command lines
    host = f"""
from qrpo.sandbox import *
sandbox = Sandbox(Limits(memory_mb={mark}, wall_seconds=600.0, cpu_seconds=600), workers=1)
print("ready", flush=True)
sandbox.judge([("while True: pass", CheckTests("assert f(1) == 2", "f"))])
"""
    with subprocess.Popen([sys.executable, "-c", host], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert wait_until(
            lambda: len(_marked(mark << 20)) >= 6
        )  # two jails, and the cells of a judge and a solution
        process.kill()
    assert wait_until(lambda: not _marked(mark << 20))


def _marked(memory_bytes: int) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f'"memory_bytes": {memory_bytes},' in (folder / "cmdline").read_text():
                found.append(folder.name)
    return found


def _children() -> set[str]:
    """Jails that this process has started and that still run."""
    found = subprocess.run(
        ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    ).stdout
    return {line for line in found.splitlines() if "bwrap" in line}
