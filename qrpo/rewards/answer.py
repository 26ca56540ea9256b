"""Verifiable rewards: whether a completion gives the right answer, which is in the dataset.

`math` lets `math-verify` find the last answer in the completion (LaTeX, `\\boxed`, fractions,
percentages, sets, plain numbers) and compare it as mathematics: 1/2 equals 0.5. `exact` compares
text, for choices and words.

Runs in child processes (`qrpo.rewards.worker_pool`): some expressions never end in computer
algebra.
"""

import importlib.metadata
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qrpo.config import execution_option
from qrpo.data.chat import Messages
from qrpo.errors import ConfigError, RewardError
from qrpo.rewards.protocol import Answers, Columns, Reward, Score
from qrpo.rewards.worker_pool import WorkerSection

__all__ = ["AnswerReward", "AnswerRewardConfig"]

_SECONDS = 5  # limit for parsing one expression and for comparing two; an answer that takes longer is wrong


class AnswerRewardConfig(WorkerSection):
    """A reward for the right answer."""

    kind: Literal["answer"] = "answer"
    """Says that this reward compares with the right answer."""
    column: str = Field("answer", min_length=1)
    """The column with the right answer; the reward does not apply where it is null."""
    match: Literal["math", "exact"] = "math"
    """`math`: equal as mathematics. `exact`: equal as text, ignoring case and spaces."""
    answer_after: str | None = Field(None, min_length=1)
    """In the column, the answer follows the last occurrence of this mark: `####` in GSM8K."""
    completion_after: str | None = Field(None, min_length=1)
    """The same for completions; without the mark a completion is wrong. Default: read all of it."""
    right: float = Field(1.0, allow_inf_nan=False)
    """Reward of a right answer."""
    wrong: float = Field(0.0, allow_inf_nan=False)
    """Reward of any other."""
    digits: int = Field(6, ge=0)
    """Decimal places in which numbers must agree (`math`)."""
    batch_size: int = execution_option(64, ge=1)
    """Completions per call."""

    def identity(self) -> dict[str, Any]:
        """The versions of the packages that compare; ConfigError if they are not installed."""
        if self.match == "exact":
            return {}
        try:
            return {name: importlib.metadata.version(name) for name in ("math-verify", "sympy")}
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(
                "the answer reward with `match: math` needs math-verify: pip install 'qrpo-pipeline[math]', or set "
                "`match: exact`"
            ) from error

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The comparison in `workers` child processes."""
        return self.pool("qrpo.rewards.answer:AnswerReward", self, name=self.name, log=log)


class AnswerReward:
    """The comparison, in a worker. Needs the main thread, since math-verify uses signals."""

    def __init__(self, config: AnswerRewardConfig):
        self._config = config
        self._matches = _math_matcher(config.digits) if config.match == "math" else _same_text

    def columns(self) -> set[str]:
        """The one column that is needed."""
        return {self._config.column}

    def call(
        self, prompts: Sequence[Messages], completions: Sequence[str], columns: Columns, conversational: bool
    ) -> list[Score]:
        """One score per completion; RewardError where the dataset has no such column."""
        if self._config.column not in columns:
            raise RewardError(
                f"the data has no column {self._config.column!r} with the right answer: set the reward's `column`"
            )
        return [
            self._score(completion, right)
            for completion, right in zip(completions, columns[self._config.column], strict=True)
        ]

    def _score(self, completion: str, right: Any) -> Score:
        if right is None:
            return Score(None)
        mark = self._config.answer_after
        wanted = _after(str(right), mark)
        if wanted is None or not wanted.strip():
            return Score(
                None, f"the right answer {str(right)[-60:]!r} " + (f"has no {mark!r}" if mark else "is empty")
            )
        given = _after(completion, self._config.completion_after)
        try:
            matches = given is not None and self._matches(wanted, given)
        except ValueError as error:
            return Score(None, str(error))
        return Score(self._config.right if matches else self._config.wrong)


def _after(text: str, mark: str | None) -> str | None:
    """The text after the last mark, all of it without a mark; None if the text lacks the mark."""
    if mark is None:
        return text
    _, found, rest = text.rpartition(mark)
    return rest if found else None


def _same_text(right: str, given: str) -> bool:
    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    return plain(right) == plain(given)


def _math_matcher(digits: int) -> Any:
    from math_verify import parse, verify

    def matches(right: str, given: str) -> bool:
        wanted = parse(right, parsing_timeout=_SECONDS)
        if not wanted:
            raise ValueError(
                f"math-verify can read no answer in {right[-60:]!r}: fix the data, or set answer_after"
            )
        found = parse(given, parsing_timeout=_SECONDS)
        return bool(found) and bool(verify(wanted, found, float_rounding=digits, timeout_seconds=_SECONDS))

    return matches
