"""The code reward: what is code in a completion, what is a test, and LeetCode's real ones."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from qrpo.config import keyed
from qrpo.errors import DataError, RewardError
from qrpo.rewards import CodeRewardConfig, RewardConfig, Score, identity, open_reward
from qrpo.rewards.code import fenced_code, run_tests
from qrpo.sandbox import CheckTests, Limits, ProgramTests, Sandbox, Verdict
from qrpo.sandbox.jail import Jail
from tests.support.rewards import LEETCODE, needs_bubblewrap

HI = [{"role": "user", "content": "Write f"}]
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=5.0), workers=1) as sandbox:
        yield sandbox


def passed(sandbox: Sandbox, code: str, test: str, preamble: str = "") -> tuple[bool, ...]:
    (verdict,) = sandbox.judge([(code, CheckTests(test, "f", preamble))])
    assert isinstance(verdict, Verdict), verdict
    return verdict.passed


# ------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\n\n```bash\npip install x\n```", "x = 1"),
        ("```python\ndef f(): ...\n```\nUse it:\n```python\nprint(1)\n```", "def f(): ..."),
        ("```python\nfirst = 1\n```\n```python\nlast = 1\n```", "last = 1"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1"),
        ("~~~python\nx = '```'\n~~~", "x = '```'"),
        ("````python\n```\n````", "```"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("no code, but `f` and ```inline```", None),
        ("```json\n{}\n```", None),
        ("", None),
    ],
)
def test_the_code_of_a_completion_is_its_fenced_python(text: str, code: str | None) -> None:
    assert fenced_code(text, "f") == code


@needs_bubblewrap
def test_the_reward_is_the_share_of_tests_that_pass() -> None:
    config = CodeRewardConfig(workers=1)
    completions = [f"```python\ndef f(x): return {value}\n```" for value in ("2 * x", "x + 1", "0")]
    completions.append("I would rather not.")
    columns = {"test": [CHECK] * 4, "entry_point": ["f"] * 4}
    reward = open_reward(config)
    try:
        scores = reward.score([HI] * 4, completions, columns)
    finally:
        reward.close()
    assert scores == [Score(1.0), Score(0.5), Score(0.0), Score(0.0)]
    verdicts = run_tests(completions, columns, config)
    assert [v.all_passed for v in verdicts if isinstance(v, Verdict)] == [True, False, False, False]


@needs_bubblewrap
def test_broken_tests_are_errors_of_their_row_alone() -> None:
    broken = {
        "SyntaxError": "def check(candidate:",
        "assert nothing": "def check(candidate):\n    pass",
        "nowhere": "import nowhere\n" + CHECK,
        "column 'test'": None,
    }
    tests = [CHECK, *broken.values()]
    completion = "```python\ndef f(x): return 2 * x\n```"
    columns = {"test": tests, "entry_point": ["f"] * 5}
    first, *others = run_tests([completion] * 5, columns, CodeRewardConfig(workers=1))
    assert first == Verdict((True, True))
    assert [type(other) for other in others] == [DataError] * 4
    for other, reason in zip(others, broken, strict=True):
        assert reason in str(other)


@needs_bubblewrap
def test_programs_are_judged_by_what_they_print() -> None:
    config = CodeRewardConfig(tests="stdio", workers=1)
    program = "```python\nimport sys\nfor line in sys.stdin:\n    print(int(line) ** 2, end='  \\n')\n```"
    columns = {"inputs": [["2\n3\n", "4"]], "outputs": [["4\n9\n", "17"]]}
    (verdict,) = run_tests([program], columns, config)
    assert verdict == Verdict((True, False))


@needs_bubblewrap
def test_a_program_that_fails_after_the_right_output_has_failed(sandbox: Sandbox) -> None:
    tests = ProgramTests(("",), ("1",))
    good = "import sys, threading\nthreading.Thread(target=print, args=(1,)).start()\nsys.exit()"
    verdicts = sandbox.judge(
        [("print(1)\nraise ValueError", tests), ("print(1)\nexit(3)", tests), (good, tests)]
    )
    assert [v.all_passed for v in verdicts if isinstance(v, Verdict)] == [False, False, True]


# ------------------------------------------------------------------------------------------- tests


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "test", "expected"),
    [
        ("def f(x): return 2 * x", CHECK, (True, True)),
        ("def f(x): return 2 * x", "assert f(1) == 2\nassert f(2) == 5", (True, False)),
        # calls that depend on one another, and arguments that the solution changes
        (
            "def f(xs): xs.sort()",
            "def check(candidate):\n    xs = [3, 1, 2]\n    candidate(xs)\n    assert xs == [1, 2, 3]\n    assert candidate([]) is None",
            (True, True),
        ),
        (
            "def f(x): return x + 1",
            "def check(c):\n    assert c(c(1)) == 3\n    for n in range(3):\n        assert c(n) == n + 1",
            (True, True),
        ),
        ("def f(x): return x", "def check(c):\n    if c(1) == 1:\n        return\n    assert False", (True,)),
        (
            "def f(x):\n    raise KeyError(x)",
            "def check(c):\n    try:\n        c(1)\n        assert False\n    except KeyError:\n        pass",
            (True,),
        ),
        # values of all kinds there and back
        (
            "def f(*args, **kwargs): return args, kwargs",
            "def check(c):\n    assert c(10**5000)[0][0] == 10**5000\n    assert c(float('inf'))[0] == (float('inf'),)\n    assert c(1, 'é', b'x', {1: (2, {3})}, k=[None, 2.5, 1j]) == ((1, 'é', b'x', {1: (2, {3})}), {'k': [None, 2.5, 1j]})",
            (True, True, True),
        ),
        (
            "from collections import Counter, deque\ndef f(x): return Counter(x) if x else deque([1])",
            "from collections import deque\ndef check(c):\n    assert c('aab') == {'a': 2, 'b': 1}\n    assert c('') == deque([1])",
            (True, True),
        ),
        ("def f(x): return (i for i in x)", "assert f([1]) == [1]\nassert f([1]) != [2]", (False, False)),
        # what a dead solution had passed before counts
        ("import os\ndef f(x):\n    if x > 1: os._exit(0)\n    return 2", CHECK, (True, False)),
        ("def f(x):\n    while x > 1: pass\n    return 2", CHECK, (True, False)),
    ],
)
def test_each_assertion_is_a_test(sandbox: Sandbox, code: str, test: str, expected: tuple[bool, ...]) -> None:
    assert passed(sandbox, code, test) == expected


@needs_bubblewrap
def test_objects_of_the_preambles_classes_cross_in_both_directions(sandbox: Sandbox) -> None:
    preamble = """
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
def chain(n):
    node = None
    for value in range(n): node = Node(value, node)
    return node
def values(node):
    found = []
    while node: found.append(node.value); node = node.next
    return found
"""
    code = "def f(node):\n    back = None\n    while node: node.next, back, node = back, node, node.next\n    return back"
    test = "def check(c):\n    assert values(c(chain(3))) == [0, 1, 2]\n    assert values(c(chain(20000))) == list(range(20000))"
    assert passed(sandbox, code, test, preamble) == (True, True)


@needs_bubblewrap
@pytest.mark.slow
def test_packages_with_compiled_parts_work_within_the_limits() -> None:
    test = """
def check(f):
    assert f("sum", 5) == 5  # a numpy.int64
    assert (f("square", 200) == numpy.full((200, 200), 200.0)).all()  # by BLAS
    assert f("random", 0) == 0.5488135039273248
    assert f("threads", 0) == 1
    assert f("square", 1 << 15) is not None  # 8 GiB
"""
    code = """
import threading
def f(what, size):
    if what == "sum": return numpy.ones(size, int).sum()
    if what == "square": return numpy.ones((size, size)) @ numpy.ones((size, size))
    return numpy.random.random() if what == "random" else threading.active_count()
"""
    with Sandbox(Limits(memory_mb=256), packages=["numpy"], workers=1) as with_numpy:
        (verdict,) = with_numpy.judge([(code, CheckTests(test, "f", "import numpy"))])
    assert verdict == Verdict((True, True, True, True, False))


@needs_bubblewrap
def test_chance_is_the_same_in_every_run() -> None:
    program = "import random\nprint(random.random(), list({'a', 'b', 'c'}), hash('x'))"
    outputs = set()
    for _ in range(2):
        with Jail(Limits()) as jail:  # a new interpreter each time
            job = jail.start("program", json.dumps([program]), "")
            assert job.finish().status == 0
            outputs.add(bytes(job.output))
    assert len(outputs) == 1


# ------------------------------------------------------------------------------------------- configuration


def test_without_bubblewrap_it_refuses_with_the_install_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RewardError, match="apt install bubblewrap"):
        open_reward(CodeRewardConfig())
    columns = {"test": [CHECK], "entry_point": ["f"]}
    bare = CodeRewardConfig(allow_unsandboxed=True, workers=1)
    (verdict,) = run_tests(["```python\ndef f(x): return 2 * x\n```"], columns, bare)
    assert verdict == Verdict((True, True))
    assert "RUNS WITH ALL RIGHTS OF THIS USER" in caplog.text


def test_fingerprints_hold_what_could_change_a_verdict() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(RewardConfig)
    config = adapter.validate_python({"kind": "code", "preamble": "prompt", "limits": {"cpu_seconds": 3}})
    assert isinstance(config, CodeRewardConfig)
    assert keyed(config) == keyed(config.model_copy(update={"workers": 7}))
    assert keyed(config) != keyed(config.model_copy(update={"limits": Limits()}))
    with_package = config.model_copy(update={"packages": ("yaml",)})
    assert set(identity(with_package)) - set(identity(config)) == {"yaml"}
    with pytest.raises(RewardError, match="pip install"):
        identity(config.model_copy(update={"packages": ("no_such_package",)}))


# ------------------------------------------------------------------------------------------- LeetCode


class _Mutant(ast.NodeTransformer):
    """Makes every function return something else of the same kind where that is easy, and else nothing."""

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None:
            node.value = ast.List([node.value, ast.Constant("mutated")], ast.Load())
        return node


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.skipif(not LEETCODE.is_file(), reason="the LeetCode sample is not beside this checkout")
def test_leetcodes_own_solutions_pass_and_mutated_ones_fail() -> None:
    rows = [json.loads(line) for line in LEETCODE.read_text().splitlines()]
    config = CodeRewardConfig(preamble="prompt", packages=("sortedcontainers",), workers=2)
    columns = {name: [row[name] for row in rows] * 3 for name in ("test", "entry_point", "prompt")}
    right = [row["response"] for row in rows] + [f"```python\n{row['completion']}\n```" for row in rows]
    wrong = [f"```python\n{ast.unparse(_Mutant().visit(ast.parse(row['completion'])))}\n```" for row in rows]
    verdicts = run_tests(right + wrong, columns, config)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    all_passed = [verdict.all_passed for verdict in verdicts if isinstance(verdict, Verdict)]
    failed = [rows[place % 100]["task_id"] for place in range(200) if not all_passed[place]]
    assert failed == []
    assert not any(all_passed[200:])
