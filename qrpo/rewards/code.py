"""The code reward: the share of tests that a completion's code passes in `qrpo.sandbox`.

The tests are in columns of the dataset: `check(candidate)` as in LeetCodeDataset and HumanEval, or
inputs and expected outputs of a program that reads standard input. A completion without code has
reward 0; a row with broken tests has an error. `run_tests` returns the verdicts themselves.
"""

import importlib.metadata
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qrpo.config import execution_option
from qrpo.data.chat import Messages
from qrpo.errors import DataError
from qrpo.rewards.protocol import Answers, Columns, RewardSection, Score
from qrpo.sandbox import CheckTests, Limits, ProgramTests, Sandbox, Verdict
from qrpo.sandbox.isolator import find_packages

__all__ = ["CodeReward", "CodeRewardConfig", "fenced_code", "run_tests"]

_VERSION = 1  # increase it when the verdict on the same code and tests could change

_FENCE = re.compile(r"[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<language>[\w+.#-]*)[^`]*")
_PYTHON = {"python", "python3", "py", ""}


class CodeRewardConfig(RewardSection):
    """A reward that runs the completion's code against the row's tests."""

    kind: Literal["code"] = "code"
    """Says that this reward runs code."""
    tests: Literal["check", "stdio"] = "check"
    """`check`: assertions about a function; `stdio`: a program's outputs for its inputs."""
    test: str = "test"
    """The column with the source of the assertions (a string, or a list of them)."""
    entry_point: str = "entry_point"
    """The column with the expression that they call, such as `add` or `Solution().twoSum`."""
    preamble: str | None = None
    """The column with source that precedes solution and tests; LeetCodeDataset's is `prompt`."""
    inputs: str = "inputs"
    """The column with a program's inputs: a string or a list of strings."""
    outputs: str = "outputs"
    """The column with the expected output for each input."""
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


def fenced_code(text: str, mention: str = "") -> str | None:
    """The code in the text's last fenced Python block that contains `mention`, or else its last;
    None without one.

    Blocks without a language count as Python. A block without a closing fence extends to the end of
    the text.
    """
    blocks: list[str] = []
    lines: list[str] = []
    closing, wanted = "", False
    for line in text.splitlines():
        if not closing:
            if (match := _FENCE.fullmatch(line)) is not None:
                closing, lines, wanted = match["mark"], [], match["language"].lower() in _PYTHON
        elif line.strip().startswith(closing) and not line.strip().strip(closing[0]):
            if wanted:
                blocks.append(textwrap.dedent("\n".join(lines)))
            closing = ""
        else:
            lines.append(line)
    if closing and wanted:
        blocks.append(textwrap.dedent("\n".join(lines)))
    with_mention = (
        [block for block in blocks if re.search(rf"\b{re.escape(mention)}\b", block)] if mention else []
    )
    found = with_mention or blocks
    return found[-1] if found else None


class CodeReward:
    """A `Reward` that scores completions in the sandbox."""

    def __init__(self, config: CodeRewardConfig):
        self._config = config
        self._sandbox = Sandbox(
            config.limits,
            packages=config.packages,
            workers=config.workers,
            allow_unsandboxed=config.allow_unsandboxed,
        )

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order: the share of its tests that pass."""
        return [
            Score(None, str(tested)) if isinstance(tested, DataError) else Score(tested.share)
            for tested in self.verdicts(completions, columns)
        ]

    def verdicts(self, completions: Sequence[str], columns: Columns) -> list[Verdict | DataError]:
        """The verdict on each completion; a DataError if the row's tests cannot be used."""
        results: dict[int, Verdict | DataError] = {}
        solutions: dict[int, tuple[str, CheckTests | ProgramTests]] = {}
        for row, completion in enumerate(completions):
            values = {name: column[row] for name, column in columns.items()}
            try:
                tests = _tests_of(values, self._config)
            except DataError as error:
                results[row] = error
                continue
            called = re.match(r"\w*", tests.entry_point) if isinstance(tests, CheckTests) else None
            code = fenced_code(completion, called[0] if called else "")
            if code is None:
                results[row] = Verdict((False,), "no fenced code")
            else:
                solutions[row] = (code, tests)
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
        inputs, outputs = _texts(values, config.inputs), _texts(values, config.outputs)
        if len(inputs) != len(outputs) or not inputs:
            raise DataError(
                f"got {len(inputs)} inputs and {len(outputs)} outputs, expected the same number, not 0"
            )
        return ProgramTests(inputs, outputs)
    test = "\n".join(_texts(values, config.test))
    entry_point = _texts(values, config.entry_point)[0]
    preamble = "" if config.preamble is None else "\n".join(_texts(values, config.preamble))
    return CheckTests(test, entry_point, preamble)


def _texts(values: Mapping[str, Any], column: str) -> tuple[str, ...]:
    value = values.get(column)
    if value is None:
        raise DataError(
            f"the code reward finds nothing in column {column!r}; the row has {', '.join(map(repr, values)) or 'no other column'}"
        )
    texts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"column {column!r} holds {json.dumps(value)[:80]}, expected text or a list of texts")
    return texts
