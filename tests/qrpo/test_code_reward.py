"""The code reward: what is code in a completion, what is a test, and LeetCode's real ones."""

import ast
import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from qrpo.config import keyed
from qrpo.errors import DataError, RewardError
from qrpo.rewards import CodeRewardConfig, RewardConfig, Score, open_reward
from qrpo.rewards.code import code_blocks, run_tests
from qrpo.sandbox import CheckTests, Limits, ProgramTests, Sandbox, Verdict
from qrpo.sandbox.jail import Jail
from tests.support.rewards import DATA, needs_bubblewrap

HI = [{"role": "user", "content": "Write f"}]
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=5.0), workers=1) as sandbox:
        yield sandbox


def passed(sandbox: Sandbox, code: str, test: str, preamble: str = "", entry: str = "f") -> tuple[bool, ...]:
    (verdict,) = sandbox.judge([(code, CheckTests(test, entry, preamble))])
    assert isinstance(verdict, Verdict), verdict
    assert bool(verdict.note) is not verdict.all_passed
    return verdict.passed


# ------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\n\n```bash\npip install x\n```", "x = 1"),
        ("```python\ndef f(): ...\n```\nOutput:\n```\n1\n```", "def f(): ..."),
        ("```python\nfirst = 1\n```\n```python\nlast = 1\n```", "last = 1"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1"),
        ("~~~python\nx = '```'\n~~~", "x = '```'"),
        ("````python\n```\n````", "```"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),
        ("no code, but `f` and ```inline```", None),
        ("```json\n{}\n```", None),
        ("```python3.11\nf = 1\n```\n```\n2\n```", "f = 1"),
        ("```{.python}\nf = '\u2028'\n```", "f = '\u2028'"),
        (
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    f()\n    ```\n    """',
        ),
        ('```python\ndef f():\n  """\n  ```\n  """\n```', 'def f():\n  """\n  ```\n  """'),
        ("", None),
    ],
)
def test_the_code_of_a_completion_is_its_fenced_python(text: str, code: str | None) -> None:
    assert code_blocks(text, "f")[-1:] == ([] if code is None else [code])


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


ROUND = "```python\nprint(round(float(input()), {digits}))\n```"


@needs_bubblewrap
@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"inputs": ["0.3333333", "2"], "outputs": ["0.33333333333", "2"]}, (True, True)),
        ({"inputs": ["0.34", "10000001"], "outputs": ["0.35", "10000002"]}, (False, False)),
        ({"inputs": '{"inputs": ["1", "2"], "outputs": ["1\\n", "3"]}'}, (True, False)),
        ({"inputs": {"input": ["1"], "output": [["1"]]}}, (True,)),
        ({"inputs": '[{"input": "1", "output": "1.0"}]'}, (True,)),
        ({"inputs": '["1", "2"]', "outputs": '["1", "2"]'}, (True, True)),
        ({"inputs": "1\n", "outputs": 1}, (True,)),
        ({"inputs": '{"fn_name": "f", "inputs": [[1]], "outputs": [2]}'}, "'f'"),
        ({"inputs": '{"in": []}'}, "'in'|keys in"),
        ({"inputs": ["1"], "outputs": [None]}, "expected text"),
    ],
)
def test_inputs_and_outputs_are_read_as_their_datasets_write_them(
    columns: dict[str, Any], answers: tuple[bool, ...] | str
) -> None:
    config = CodeRewardConfig(tests="stdio", workers=1)
    (verdict,) = run_tests(
        [ROUND.format(digits=7)], {name: [value] for name, value in columns.items()}, config
    )
    if isinstance(answers, str):
        assert isinstance(verdict, DataError)
        assert re.search(answers, str(verdict))
    else:
        assert verdict == Verdict(answers)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "printed", "passes"),
    [
        ("print(1)\nexit()", "1", True),
        ("import sys\nprint(1)\nquit()\n```\nOutput:\n```\n1 2", "1", True),
        ("def one(): return 1\n```\nRead:\n```python\nprint(one(), input())", "1 5", True),
        ("print(input())\n```\nUse it:\n```python\nx = 3", "5", True),
        ("import os\nprint(os.path.basename(__file__), __name__)", "main.py __main__", True),
        ("import io, sys\nsys.stdout = io.StringIO()\nsys.__stdout__.write(input())", "5", True),
        ("import sys\nfor line in sys.stdin: print(int(line) ** 2, end='  \\n')", "25", True),
        ("import sys, threading\nthreading.Thread(target=print, args=(1,)).start()\nsys.exit()", "1", True),
        ("print(open(0).read())", "5", True),
        ("import os\nprint(os.read(0, 9).decode())", "5", True),
        ("from pathlib import Path\nprint(Path('/dev/stdin').read_text())", "5", True),
        ("for line in open('/dev/stdin'): print(int(line) + 1)", "6", True),
        ("print(1)", "2", False),
        # it fails after the right output
        ("print(1)\nraise ValueError", "1", False),
        ("print(1)\nexit(3)", "1", False),
    ],
)
def test_programs_are_judged_by_what_they_print_and_how_they_end(
    sandbox: Sandbox, program: str, printed: str, passes: bool
) -> None:
    tests = ProgramTests(("5",), (printed,))
    assert sandbox.judge([(code_blocks(f"```python\n{program}\n```"), tests)]) == [Verdict((passes,))]


@needs_bubblewrap
@pytest.mark.parametrize(
    "completion",
    [
        "```python\ndef f(x): return 2 * x\nexit()\n```",
        "```python\ndef f(x): return 2 * x\n```\n```python\nassert f(1) == 3, f(no)\n```",
        "```python\ndef f(x): return 0\n```\nBetter:\n```python\ndef f(x): return 2 * x\n```\n```\n2\n```",
        "```python\nfrom math import prod\nTWO = 2\n```\n```python\ndef f(x): return prod([TWO, x])\n```",
        "```python\ndef f(x): return g(x)\n```\n```python\ndef g(x): return 2 * x\nprint(f(none))\n```",
        "```python\ndef f(x: broken\n```\n```python\nif True:\n    def f(x): return 2 * x\n```",
        "```py3\nf = lambda x: 2 * x\nassert __file__\n```",
    ],
)
def test_the_block_that_defines_the_entry_point_is_run(completion: str) -> None:
    columns = {"test": [CHECK], "entry_point": ["f"]}
    assert run_tests([completion], columns, CodeRewardConfig(workers=1)) == [Verdict((True, True))]


# ------------------------------------------------------------------------------------------- tests


DOUBLE = "def f(x): return 2 * x"
STACK = """
class Empty(LookupError): pass
class Stack:
    LIMIT = 9
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self):
        if not self.items: raise Empty("empty")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __iter__(self): return iter(self.items)
def counter():
    n = 0
    def step():
        nonlocal n; n += 1; return n
    return step
"""
VECTOR = """
import enum
class Kind(enum.Enum): A = 1
class V:
    tag = Kind.A
    def __init__(self, x): self.x = x
    def __eq__(self, other): return isinstance(other, V) and self.x == other.x
    def __mul__(self, k): return V(self.x * k)
    __rmul__ = __mul__
    def __contains__(self, x): return x == self.x
class W(V): pass
def f(x): return V(x)
"""
JUDGE = """
class All:
    def __call__(self, *x): return self
    def __sub__(self, other): return 0
    def __abs__(self): return 0
    def __contains__(self, item): return True
    def issubset(self, other): return True
    __rsub__ = __mod__ = __sub__
"""


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "entry", "test", "expected"),
    [
        # each assertion is a test
        ("def f(x): return 2 * x", "f", CHECK, (True, True)),
        ("def f(x): return 2 * x", "f", "assert f(1) == 2\nassert f(2) == 5", (True, False)),
        (
            "def f(xs): xs.sort()",
            "f",
            "def check(candidate):\n    xs = [3, 1, 2]\n    candidate(xs)\n    assert xs == [1, 2, 3]\n    assert candidate([]) is None",
            (True, True),
        ),
        (
            "def f(x): return x + 1",
            "f",
            "def check(c):\n    assert c(c(1)) == 3\n    for n in range(3):\n        assert c(n) == n + 1",
            (True, True),
        ),
        (
            "def f(x): return x",
            "f",
            "def check(c):\n    if c(1) == 1:\n        return\n    assert False",
            (True,),
        ),
        (
            "def f(x):\n    raise KeyError(x)",
            "f",
            "def check(c):\n    try:\n        c(1)\n        assert False\n    except KeyError:\n        pass",
            (True,),
        ),
        (
            "def f(*args, **kwargs): return args, kwargs",
            "f",
            "def check(c):\n    assert c(10**5000)[0][0] == 10**5000\n    assert c(float('inf'))[0] == (float('inf'),)\n    assert c(1, 'é', b'x', {1: (2, {3})}, k=[None, 2.5, 1j]) == ((1, 'é', b'x', {1: (2, {3})}), {'k': [None, 2.5, 1j]})",
            (True, True, True),
        ),
        (
            "from collections import Counter, deque\ndef f(x): return Counter(x) if x else deque([1])",
            "f",
            "from collections import deque\ndef check(c):\n    assert c('aab') == {'a': 2, 'b': 1}\n    assert c('') == deque([1])",
            (True, True),
        ),
        (
            "def f(x): return (i for i in x)",
            "f",
            "assert f([1]) == [1]\nassert f([1]) != [2]",
            (False, False),
        ),
        ("import os\ndef f(x):\n    if x > 1: os._exit(0)\n    return 2", "f", CHECK, (True, False)),
        ("def f(x):\n    while x > 1: pass\n    return 2", "f", CHECK, (True, False)),
        # pytest
        (
            DOUBLE,
            "f",
            "def test_a():\n    assert f(1) == 2\ndef test_b():\n    x = f(2)\n    assert x == 5",
            (True, False),
        ),
        (DOUBLE, "", "from my_module import f as g\ndef test_a(): assert g(1) == 2\ntest_a()", (True,)),
        (
            DOUBLE,
            "f",
            "import solution\nclass TestF:\n    def setup_method(self): self.x = 1\n    def test_a(self): assert solution.f(self.x) == 2",
            (True,),
        ),
        (
            DOUBLE,
            "f",
            "import pytest\n@pytest.mark.parametrize('x, y', [(1, 2), pytest.param(2, 3)])\ndef test_f(x, y): assert f(x) == pytest.approx(y)",
            (True, False),
        ),
        (
            STACK,
            "Stack",
            "import pytest\n@pytest.fixture\ndef s(): return Stack([1])\ndef test_a(s): assert s.pop() == 1\ndef test_b(s):\n    s.pop()\n    with pytest.raises(LookupError, match='emp') as e: s.pop()\n    assert str(e.value) == 'empty'",
            (True, True),
        ),
        # unittest
        (
            STACK,
            "Stack",
            "import unittest\nfrom solution import Stack, Empty\nclass T(unittest.TestCase):\n    def setUp(self): self.s = Stack([1, 2])\n    def test_a(self): self.assertEqual(self.s.pop(), 2)\n    def test_b(self): self.assertEqual(len(self.s), 3)\n    def test_c(self):\n        with self.assertRaises(Empty): Stack().pop()\nif __name__ == '__main__': unittest.main()",
            (True, False, True),
        ),
        # several names, classes, methods
        (
            STACK,
            "",
            "s = Stack()\nassert s.push(1).push(2).pop() == 2\nassert Stack.LIMIT == 9\nassert Stack([1]) == s\nassert list(s) == [1]\nassert isinstance(s, Stack)\nstep = counter()\nassert [step(), step()] == [1, 2]",
            (True,) * 6,
        ),
        (
            "class Solution:\n    def __init__(self): self.n = 0\n    def m(self, x): self.n += 1; return x + self.n",
            "Solution().m",
            "assert Solution().m(1) == 2\nassert Solution().m(1) == 2",
            (True, True),
        ),
        (
            "class Solution:\n    def m(self, x): return x",
            "Solution().m",
            "assert m(1) == 1\nassert candidate(2) == 2",
            (True, True),
        ),
        ("if 1:\n    def f(x): return 2 * x", "f", CHECK + "check(f)", (True, True)),
        (DOUBLE, "", CHECK + "check(f)", (True, True)),
        # HumanEval's constant assertions are no tests; helpers that assert are
        (
            DOUBLE,
            "f",
            "def check(c):\n    assert True, 'prints if it fails'\n    assert c(1) == 2\n    assert True",
            (True,),
        ),
        (DOUBLE, "f", "def same(x, y):\n    assert f(x) == y\nsame(1, 2)\nsame(2, 5)", (True, False)),
        (
            DOUBLE,
            "f",
            "def check(c):\n    for x in range(3):\n        if c(x) != 2 * x:\n            raise AssertionError(x)",
            (True,),
        ),
        (DOUBLE, "f", "class T:\n    def test_a(self): assert math.isclose(f(1), 2)", (True,)),
        # functions and iterators as arguments and results
        (
            "def f(g, xs): return map(g, xs)",
            "f",
            "seen = []\nassert list(f(lambda x: seen.append(x) or x + 1, iter([1, 2]))) == [2, 3]\nassert seen == [1, 2]\nassert list(f(len, ['ab'])) == [2]",
            (True, True, True),
        ),
        (
            "def f():\n    n = 0\n    while True: yield n; n += 1",
            "f",
            "from itertools import islice\nassert list(islice(f(), 3)) == [0, 1, 2]",
            (True,),
        ),
        (
            "def f(x):\n    from fractions import Fraction as F\n    return {1: F(x, 2)}.values()",
            "f",
            "from fractions import Fraction\nassert sorted(f(1)) == [Fraction(1, 2)]\nassert list(f(3)) == [1.5]",
            (True, True),
        ),
        # changes in place keep identity
        (
            "def f(rows, queue):\n    rows[0].append(1); queue.append(2)\n    return rows",
            "f",
            "from collections import deque\ndef check(c):\n    row, queue = [], deque()\n    rows = [row, row]\n    assert c(rows, queue) is rows\n    assert row == [1] == rows[1]\n    assert queue == deque([2])",
            (True, True, True),
        ),
        (
            "def f(d): d['x'].append(1)\n",
            "f",
            "from collections import defaultdict\nd = defaultdict(list)\nf(d)\nassert d == {'x': [1]}",
            (True,),
        ),
        # objects of the tests
        (
            "def f(o): return o.get(o.n)",
            "f",
            "class D:\n    n = 3\n    def get(self, k): return k + 1\nassert f(D()) == 4",
            (True,),
        ),
        (
            "def f(o): o.v += 1; return o",
            "f",
            "class N:\n    def __init__(self, v): self.v = v\nassert f(N(2)).v == 3",
            (True,),
        ),
        # objects of classes that only the solution knows
        (
            VECTOR,
            "V",
            "assert V(2) * 3 == V(6)\nassert 3 * V(2) == V(6)\nassert 6 in V(6)\nassert issubclass(W, V)\nassert f(1).tag is Kind.A",
            (True,) * 5,
        ),
        (VECTOR, "V", "assert V(3).x == 3\nassert V(3).x == 4", (True, False)),
        (VECTOR, "f", "assert f(1).x == 1\nassert f(1) == 1", (True, False)),
        # data that the standard library defines, and data that a call changes
        (
            "import re\nfrom collections import defaultdict\nfrom pathlib import Path\ndef f(x): return defaultdict(lambda: [0], a=[x])\ndef g(x): return re.match('a(.)', x)\ndef h(x): return Path(x) / 'b'",
            "f",
            "from pathlib import Path\nassert f(1) == {'a': [1]}\nassert g('ab')[1] == 'b'\nassert h('a') == Path('a/b')",
            (True,) * 3,
        ),
        (
            "seen = []\ndef f(x): seen.append(x)",
            "f",
            "f(1)\nassert seen == [1]\ndef test_a():\n    f(2)\n    assert len(seen) > 0",
            (True, True),
        ),
        (
            DOUBLE,
            "f",
            "wanted = {}\nwanted['a'] = 2\nassert {'a': f(1)} == wanted",
            (True,),
        ),
        # HumanEval with a function that calls `check`
        (
            DOUBLE,
            "f",
            "def check(candidate):\n    assert candidate(1) == 2\ndef test_check():\n    check(f)\ntest_check()",
            (True,),
        ),
        # what it prints
        (
            "def f(): print('hi')",
            "f",
            "import contextlib, io\ndef test_a():\n    with contextlib.redirect_stdout(io.StringIO()) as out: f()\n    assert out.getvalue() == 'hi\\n'",
            (True,),
        ),
        # many calls, one after another
        (
            "def f(x): return x + 1",
            "f",
            "def check(c):\n    x = 0\n    for _ in range(3000): x = c(x)\n    assert x == 3000",
            (True,),
        ),
    ],
)
def test_every_common_form_of_tests_is_run(
    sandbox: Sandbox, code: str, entry: str, test: str, expected: tuple[bool, ...]
) -> None:
    assert passed(sandbox, code, test, entry=entry) == expected
    empty = passed(sandbox, "def other(): pass", test, entry=entry)
    assert empty == (False,) * len(expected)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("def check(a, b):\n    assert a == b", "one argument"),
        ("def verify():\n    assert f(1) == 2", "nothing calls it"),
        ("assert True", "assert nothing about the solution"),
        ("def test_a(): pass", "assert nothing"),
        ("def test_a(): f(1)", "asserts nothing"),
        ("def test_a(tmp_path): assert f(tmp_path)", "'tmp_path'"),
        ("async def test_a(): assert f(1) == 2", "asynchronous"),
        ("def f(x): return 2 * x\nassert f(1) == 2", "themselves"),
        ("class A(f): pass\nassert A().x == 1", "extends"),
        ("assert eval(f(1)) == 2", "'eval'"),
        (
            "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('x')\n    def test_a(self): self.assertEqual(f(1), 2)",
            "skipped",
        ),
        ("import asyncio\nassert asyncio.run(f(1)) == 2", "asynchronous"),
        ("import pickle\nassert pickle.loads(f(1)) == 2", "'pickle'"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): assert f(1) == 2", "skip"),
    ],
)
def test_tests_that_are_not_understood_are_refused(sandbox: Sandbox, test: str, reason: str) -> None:
    (refused,) = sandbox.judge([(DOUBLE, CheckTests(test, "f"))])
    assert isinstance(refused, DataError), refused
    assert reason in str(refused)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "test"),
    [
        (
            "def f(x): raise StopIteration",
            "def check(c):\n    for x, y in zip(map(c, [1, 2]), [2, 4]):\n        assert x == y",
        ),
        (
            "def f(x): raise IndexError",
            "class Calls:\n    def __getitem__(self, i): return f(i)\nfor x in Calls():\n    assert x == 1",
        ),
        (
            "def f(x): raise AttributeError",
            "class A:\n    @property\n    def x(self): return f(1)\ndef test_a():\n    y = getattr(A(), 'x', 2)\n    assert y == 2",
        ),
        ("def f(x): return []", "def check(c):\n    for x in c(3):\n        assert x > 0"),
        (
            "import os\ndef f(x): os._exit(0)",
            "import pytest\ndef test_a():\n    with pytest.raises((ValueError, RuntimeError)): f(-1)",
        ),
        (
            "import os\ndef f(x): os._exit(0)",
            "def check(c):\n    try:\n        c(1)\n        assert False\n    except BaseException:\n        pass",
        ),
        (
            "def f(x): return open('/tmp/x', 'w')",
            "def check(c):\n    try:\n        c(1)\n        assert False\n    except TypeError:\n        pass",
        ),
        (
            "class Near: pass\ndef f(x):\n    n = Near(); n.value = 0; n.tolerance = 1e999; return n",
            "class Near:\n    def __init__(self, value): self.value, self.tolerance = value, 0.1\n    def __eq__(self, other): return abs(self.value - getattr(other, 'value', other)) <= self.tolerance\nassert f(1) == Near(5)",
        ),
        (
            "class All:\n    def __eq__(self, other): return True\n    __lt__ = __gt__ = __contains__ = __eq__\ndef f(x=0): return All()",
            "a = All()\ndef test_a(): assert a == 5\ndef test_b(): assert f() == 5\ndef test_c(): assert a < 3",
        ),
        # an object in the place of data decides what it is equal to
        *(
            (JUDGE + maker, test)
            for maker in (
                "def f(*x): return All()",
                "f = type('f', (All,), {'__init__': lambda self, *x: None})",
                "n = 0\ndef f(*x):\n    global n\n    n += 1\n    return All if n == 1 else All()",
            )
            for test in (
                "assert abs(f(2) - 1.41) < 0.01",
                "for x in [2]:\n    assert abs(1.41 - f(x)) < 0.01",
                "assert f(2) % 7 == 0",
                "for x in [2]:\n    assert 3 in f(x)",
                "def test_a(): assert f(2).issubset({1, 2})",
                "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertIn(3, f(2))",
            )
        ),
        (
            "def f(x): return x",
            "def test_a():\n    try:\n        assert f(1) == 2\n    except AssertionError:\n        print('failed')",
        ),
    ],
)
def test_what_did_not_run_to_its_end_on_returned_values_has_failed(
    sandbox: Sandbox, code: str, test: str
) -> None:
    assert not any(passed(sandbox, code, test))


@needs_bubblewrap
def test_tests_that_any_truthy_value_passes_are_weak(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    tests = [
        CheckTests(test, "f")
        for test in ("assert f(2)\nassert f(3), 'no'", "assert f(2)\nassert f(3) == 6", "assert not f(0)")
    ]
    verdicts = sandbox.judge([(DOUBLE, test) for test in tests])
    notes = [verdict.note for verdict in verdicts if isinstance(verdict, Verdict) and verdict.all_passed]
    weak = ["weak tests: 2 of 2 pass for any truthy value", "weak tests: 1 of 2 pass for any truthy value"]
    assert notes == [*weak, ""]
    assert [message[: len(note)] for message, note in zip(caplog.messages, weak, strict=True)] == weak


@needs_bubblewrap
def test_tests_that_hang_on_what_a_solution_returns_end_in_time() -> None:
    test = "import re\nassert f(1) == 2\nassert re.fullmatch('(a+)+b', f(2)) is None"
    hangs = "def f(x): return 2 if x == 1 else 'a' * 50"
    with Sandbox(Limits(cpu_seconds=0.3), workers=1) as quick:
        right, wrong, again = quick.judge([(code, CheckTests(test, "f")) for code in (DOUBLE, hangs, hangs)])
        assert quick.judge([(DOUBLE, CheckTests(CHECK, "f"))]) == [Verdict((True, True))]
    assert (right, wrong, again) == (Verdict((True, False)), Verdict((True, False)), Verdict((True, False)))
    assert isinstance(wrong, Verdict)
    assert wrong.note == "the tests did not end within the limits on what the solution returned"


@needs_bubblewrap
@pytest.mark.parametrize(
    "code",
    ["import itertools\ndef f(x): return itertools.count()", "def f(x):\n    while True: yield 1"],
)
def test_an_iterator_without_end_is_one_test(code: str) -> None:
    with Sandbox(Limits(cpu_seconds=0.3, wall_seconds=1.0)) as quick:
        started = time.monotonic()
        (verdict,) = quick.judge([(code, CheckTests("for x in f(1):\n    assert x >= 0", "f"))])
    assert isinstance(verdict, Verdict)
    assert not verdict.all_passed
    assert "time" in verdict.note
    assert time.monotonic() - started < 15


@needs_bubblewrap
def test_a_time_limit_holds_for_one_test_and_two_that_exceed_it_end_the_solution() -> None:
    spin = "import time\ndef f(x):\n    end = time.process_time() + {seconds}\n    while time.process_time() < end: pass\n    return x"
    test = "def check(c):\n" + "".join(f"    assert c({n}) == {n}\n" for n in range(6))
    with Sandbox(Limits(cpu_seconds=0.4, total_cpu_seconds=20.0), workers=1) as limited:
        slow, late, endless, program = limited.judge(
            [
                (spin.format(seconds="0.1"), CheckTests(test, "f")),
                (spin.format(seconds="9 * (x == 1)"), CheckTests(test, "f")),
                (spin.format(seconds="9"), CheckTests(test.replace("c(1)", "c(int(c(1)))"), "f")),
                ("while True: pass", ProgramTests(("",) * 50, ("",) * 50)),
            ]
        )
    assert slow == Verdict((True,) * 6)
    assert late == Verdict((True, False, True, True, True, True))
    assert endless == Verdict((False,) * 6)
    assert program == Verdict((False,) * 50)
    assert all("processor time" in v.note for v in (late, endless, program) if isinstance(v, Verdict))


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
        with contextlib.closing(Jail(Limits())) as jail:  # a new interpreter each time
            job = jail.start("program", json.dumps([program]), "")
            assert job.finish().note == ""
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
    assert set(with_package.identity()) - set(config.identity()) == {"yaml"}
    with pytest.raises(RewardError, match="pip install"):
        config.model_copy(update={"packages": ("no_such_package",)}).identity()


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
def test_solutions_in_the_format_of_leetcode_pass_and_mutated_ones_fail() -> None:
    rows = [json.loads(line) for line in (DATA / "code_problems.jsonl").read_text().splitlines()]
    config = CodeRewardConfig(preamble="prompt", packages=("sortedcontainers",), workers=2)
    columns = {name: [row[name] for row in rows] * 3 for name in ("test", "entry_point", "prompt")}
    right = [row["response"] for row in rows] + [f"```python\n{row['completion']}\n```" for row in rows]
    wrong = [f"```python\n{ast.unparse(_Mutant().visit(ast.parse(row['completion'])))}\n```" for row in rows]
    verdicts = run_tests(right + wrong, columns, config)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    all_passed = [verdict.all_passed for verdict in verdicts if isinstance(verdict, Verdict)]
    failed = [rows[place % len(rows)]["task_id"] for place in range(len(right)) if not all_passed[place]]
    assert failed == []
    assert not any(all_passed[len(right) :])
