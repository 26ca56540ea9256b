"""The code reward: the share of tests that a completion's code passes in `qrpo.sandbox`.

The tests are in columns of the dataset: assertions, pytest or unittest tests about functions and
classes, as in LeetCodeDataset, HumanEval and MBPP, or inputs and expected outputs of a program that
reads standard input, as in APPS, TACO and Codeforces. A completion without code has reward 0; a row
whose tests are not understood has an error. `run_tests` returns the verdicts themselves.
"""

import contextlib
import importlib.metadata
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qrpo.config import execution_option
from qrpo.errors import DataError
from qrpo.rewards.protocol import Answers, Columns, Forms, Prompts, RewardSection, Score, Texts
from qrpo.sandbox import CheckTests, Limits, ProgramTests, Sandbox, Verdict
from qrpo.sandbox.isolator import find_packages

_VERSION = 4  # increase it when the verdict on the same code and tests could change

_PYTHON = {"python", "py", "pypy", "cpython"}


class CodeRewardConfig(RewardSection):
    """A reward that runs the completion's code against the row's tests."""

    kind: Literal["code"] = "code"
    """Says that this reward runs code."""
    tests: Literal["check", "stdio"] = "check"
    """`check`: tests of functions and classes, see `qrpo.sandbox.inside.suite`; `stdio`: a
    program's outputs for its inputs."""
    test: str = "test"
    """The column with the source of the tests (a string, or a list of them)."""
    entry_point: str = "entry_point"
    """The column with the expression that they call, such as `add` or `Solution().twoSum`. Empty
    where the tests name what they use."""
    preamble: str | None = None
    """The column with source that precedes solution and tests; LeetCodeDataset's is `prompt`."""
    inputs: str = "inputs"
    """The column with a program's inputs: a string or a list of strings. Or with inputs and
    outputs, as an object or its JSON: `{"inputs": [...], "outputs": [...]}` or a list of
    `{"input": ..., "output": ...}`."""
    outputs: str = "outputs"
    """The column with the expected output for each input."""
    compare: Literal["tokens", "lines"] = "tokens"
    """How a program's output is compared: `tokens`, word by word, with a tolerance for decimal
    numbers; `lines`, every character but spaces at line ends and empty lines at the end."""
    tolerance: float = Field(1e-6, ge=0.0)
    """Absolute and relative tolerance of decimal numbers in `tokens`."""
    limits: Limits = Limits()
    """What one solution may use."""
    packages: tuple[str, ...] = ()
    """Installed modules that solutions and tests may import; they may not need others."""
    workers: int | None = execution_option(None, ge=1)
    """Solutions that run in parallel, by default one per core."""
    allow_unsandboxed: bool = False
    """Run the code WITHOUT the sandbox, with all rights of this user. Never for a model's code."""

    def identity(self) -> dict[str, Any]:
        """The version of the judging, of the Python that runs the code, and of its packages."""
        versions = {name: _version(name) for name in self.packages}
        return {"judging": _VERSION, "python": ".".join(map(str, sys.version_info[:2])), **versions}

    def open(self, log: Path | None, answers: Answers | None) -> "CodeReward":
        """The sandbox, started by the first call; RewardError at once if bubblewrap is missing."""
        return CodeReward(self)


def code_blocks(text: str, mention: str = "") -> list[str]:
    """The fenced Python blocks of a text, in order.

    Blocks without a language count where no Python block contains `mention`. A fence that is
    indented deeper than the block's own, in a docstring, does not close it. A block without a
    closing fence extends to the end of the text.
    """
    blocks: list[tuple[bool, str]] = []
    lines: list[str] = []
    mark, indent, language, quotes = "", 0, "", 0
    for line in [*text.replace("\r\n", "\n").split("\n"), None]:
        stripped = (line or "").strip(" \t")
        fence = (
            stripped[: len(stripped) - len(stripped.lstrip(stripped[0]))]
            if stripped[:1] in ("`", "~")
            else ""
        )
        depth = len(line or "") - len((line or "").lstrip(" \t"))
        in_docstring = depth > indent and quotes % 2
        if not mark:
            info = stripped[len(fence) :].strip()
            if len(fence) >= 3 and fence[0] not in info:
                mark, indent, lines, quotes = fence, depth, [], 0
                language = (info.split() or [""])[0].strip("{}.").lower().rstrip("0123456789.")
        elif line is None or (
            fence == stripped and fence.startswith(mark) and depth <= indent + 3 and not in_docstring
        ):
            if language in _PYTHON or not language:
                blocks.append((bool(language), textwrap.dedent("\n".join(lines))))
            mark = ""
        else:
            lines.append(line)
            quotes += line.count('"""')
    python = [block for tagged, block in blocks if tagged]
    mentioned = re.compile(rf"\b{re.escape(mention)}\b" if mention else "")
    return python if any(map(mentioned.search, python)) else [block for _, block in blocks]


class CodeReward:
    """A `Reward` that scores completions in the sandbox."""

    def __init__(self, config: CodeRewardConfig):
        self._config = config
        options: dict[str, Any] = {"workers": config.workers, "allow_unsandboxed": config.allow_unsandboxed}
        self._sandbox = Sandbox(config.limits, packages=config.packages, **options)

    def score(
        self, prompts: Prompts, completions: Texts, columns: Columns, *, conversational: Forms = None
    ) -> list[Score]:
        """One score per completion, in order: the share of its tests that pass."""
        scores = []
        for tested in self.verdicts(completions, columns):
            if isinstance(tested, DataError):
                scores.append(Score(None, str(tested)))
            else:
                scores.append(Score(tested.share, note=tested.note))
        return scores

    def verdicts(self, completions: Sequence[str], columns: Columns) -> list[Verdict | DataError]:
        """The verdict on each completion; a DataError if the row's tests cannot be used."""
        results: dict[int, Verdict | DataError] = {}
        solutions: dict[int, tuple[Sequence[str], CheckTests | ProgramTests]] = {}
        for row, completion in enumerate(completions):
            values = {name: column[row] for name, column in columns.items()}
            try:
                tests = _tests_of(values, self._config)
            except DataError as error:
                results[row] = error
                continue
            called = re.match(r"\w*", tests.entry_point) if isinstance(tests, CheckTests) else None
            blocks = code_blocks(completion, called[0] if called else "")
            if blocks:
                solutions[row] = (blocks, tests)
            else:
                results[row] = Verdict((False,), "no fenced code")
        judged = self._sandbox.judge(list(solutions.values()))
        results |= zip(solutions, judged, strict=True)
        return [results[row] for row in range(len(completions))]

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()


def run_tests(
    completions: Sequence[str], columns: Columns, config: CodeRewardConfig
) -> list[Verdict | DataError]:
    """The verdict on each completion (`share` of tests passed, `all_passed`), in order.

    `columns` holds the tests by the names in `config`, one value per completion. A row whose tests
    cannot be used has a DataError in its place. Raises RewardError if bubblewrap is missing.
    """
    reward = CodeReward(config)
    try:
        return reward.verdicts(completions, columns)
    finally:
        reward.close()


def _version(name: str) -> str | None:
    find_packages([name])
    distributions = importlib.metadata.packages_distributions().get(name)
    return importlib.metadata.version(distributions[0]) if distributions else None


def _tests_of(values: Mapping[str, Any], config: CodeRewardConfig) -> CheckTests | ProgramTests:
    if config.tests == "stdio":
        inputs, outputs = _programs(values, config)
        return ProgramTests(inputs, outputs, config.compare, config.tolerance)
    test = "\n".join(_texts(values, config.test))
    entry_point = "" if values.get(config.entry_point) is None else _texts(values, config.entry_point)[0]
    preamble = "" if config.preamble is None else "\n".join(_texts(values, config.preamble))
    return CheckTests(test, entry_point, preamble)


def _programs(values: Mapping[str, Any], config: CodeRewardConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs: from one column that has both, or from two."""
    both = _parsed(values.get(config.inputs))
    if isinstance(both, Mapping):
        if both.get("fn_name"):
            raise DataError(
                f"column {config.inputs!r} holds the calls of a function {both['fn_name']!r}, expected a program's inputs"
            )
        for names in (("inputs", "outputs"), ("input", "output")):
            if both.keys() >= {*names}:
                return _texts(both, names[0]), _texts(both, names[1])
        raise DataError(
            f"column {config.inputs!r} has the keys {', '.join(both)}, expected inputs and outputs"
        )
    if isinstance(both, list) and both and all(isinstance(one, Mapping) for one in both):
        return tuple(_texts(one, "input")[0] for one in both), tuple(_texts(one, "output")[0] for one in both)
    return _texts(values, config.inputs), _texts(values, config.outputs)


def _parsed(value: Any) -> Any:
    """The object or list in a column, which may hold it as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _texts(values: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The texts in a column: one, a list, or the JSON of a list. A list of lines is one text."""
    value = values.get(column)
    if value is None:
        raise DataError(
            f"the code reward finds nothing in column {column!r}; the row has {', '.join(map(repr, values)) or 'no other column'}"
        )
    parsed = _parsed(value)
    texts = parsed if _is_lines(parsed) else value if isinstance(value, (list, tuple)) else (value,)
    texts = ["\n".join(text) if _is_lines(text) else text for text in texts]
    texts = [str(text) if type(text) is int else text for text in texts]
    if not texts or not _is_lines(texts):
        raise DataError(
            f"column {column!r} holds {json.dumps(value, default=str)[:80]}, expected text or a list of texts"
        )
    return tuple(texts)


def _is_lines(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value)
