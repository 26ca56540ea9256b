"""Verifiable rewards: whether a completion gives the right answer, which is in the dataset.

`math` compares as mathematics: 1/2 equals 0.5 (`qrpo.rewards.mathematics`). `exact` compares text,
for choices and words. docs/rewards.md lists the forms of right answers that both read; a row with
another one is rejected.

Runs in child processes (`qrpo.rewards.worker_pool`): some expressions never end in computer
algebra.
"""

import contextlib
import importlib.metadata
import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from qrpo.config import execution_option
from qrpo.data.chat import Messages
from qrpo.errors import ConfigError, RewardError
from qrpo.rewards.protocol import Answers, Columns, Reward, Score
from qrpo.rewards.worker_pool import WorkerSection

_READING = 4  # raised where the reward of a row may change


class AnswerRewardConfig(WorkerSection):
    """A reward for the right answer."""

    kind: Literal["answer"] = "answer"
    """Says that this reward compares with the right answer."""
    column: str = Field("answer", min_length=1)
    """The column with the right answer, or `column.field` of a struct, such as
    `reward_model.ground_truth`. The reward does not apply where it is null."""
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
    """Decimal places in which numbers must agree (`math`); a right answer that has zeros alone
    there is compared to 3 significant digits."""
    batch_size: int = execution_option(64, ge=1)
    """Completions per call."""

    def identity(self) -> dict[str, Any]:
        """How answers are read, and the packages that compare; ConfigError if they are not
        installed."""
        if self.match == "exact":
            return {"reading": _READING}
        try:
            versions = {name: importlib.metadata.version(name) for name in ("math-verify", "sympy")}
            return {"reading": _READING, **versions}
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
        self._is_right = _math_matcher(config) if config.match == "math" else _same_text

    def columns(self) -> set[str]:
        """The one column that is needed."""
        return {self._config.column, self._config.column.partition(".")[0]}

    def call(
        self, prompts: Sequence[Messages], completions: Sequence[str], columns: Columns, conversational: bool
    ) -> list[Score]:
        """One score per completion; RewardError where the dataset has no such column."""
        column = self._config.column
        name, *fields = [column] if column in columns else column.split(".")
        if name not in columns:
            raise RewardError(
                f"the data has no column {name!r} with the right answer: set the reward's `column`"
            )
        rows = zip(completions, columns[name], strict=True)
        return [self._score(completion, value, fields) for completion, value in rows]

    def _score(self, completion: str, value: Any, fields: Sequence[str]) -> Score:
        given = _after(completion, self._config.completion_after)
        try:
            for field in fields:
                if value is not None and not isinstance(value, Mapping):
                    raise ValueError(f"is no struct, so it has no field {field!r}")
                value = None if value is None else value.get(field)
            if value is None:
                return Score(None)
            while isinstance(value, (list, tuple)) and len(value) == 1:
                (value,) = value
            wanted = _after(text := answer_text(value), self._config.answer_after)
            if wanted is None:
                raise ValueError(f"has no {self._config.answer_after!r}")
            if not wanted.strip():
                raise ValueError("is empty")
            readings = _readings(value) if wanted == text else (wanted,)
            is_right = given is not None and any(self._is_right(reading, given) for reading in readings)
        except ValueError as error:
            return Score(
                None, f"the right answer {str(value)[-60:]!r} {error}. Fix {self._config.column!r} of the row"
            )
        return Score(self._config.right if is_right else self._config.wrong)


def answer_text(value: Any) -> str:
    """The text of a value that JSON, Parquet or `datasets` gave; ValueError for one that is no
    answer."""
    if isinstance(value, str):
        if value.strip().startswith('["'):  # a list that the dataset keeps as JSON text
            with contextlib.suppress(json.JSONDecodeError):
                return answer_text(json.loads(value))
        return value
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e16 else repr(value)
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, (list, tuple)):
        if len(value) == 1:  # of JSON text
            return answer_text(value[0])
        raise ValueError(f"is a list of {len(value)} items, expected one answer")
    if isinstance(value, Mapping):
        raise ValueError(
            f"has the fields {', '.join(value)}, expected one answer: set `column` to COLUMN.FIELD"
        )
    raise ValueError(f"is of type {type(value).__name__}, expected text or a number")


def _readings(value: Any) -> tuple[Any, ...]:
    """The value; of a float that float32 holds also its shortest decimal form there: 0.1 for
    0.10000000149011612, which a float32 column gives."""
    if not isinstance(value, float) or value.is_integer() or abs(value) > 3e38:
        return (value,)
    single = np.float32(value)
    return (value, float(str(single))) if float(single) == value else (value,)


def _after(text: str, mark: str | None) -> str | None:
    """The text after the last mark, all of it without a mark; None if the text lacks the mark."""
    if mark is None:
        return text
    _, found, rest = text.rpartition(mark)
    return rest if found else None


def _same_text(right: Any, given: str) -> bool:
    """Equal as text; a number of the data also as a number, since 72 may be stored as 72.0."""

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

    if isinstance(right, (int, float)) and not isinstance(right, bool):
        with contextlib.suppress(InvalidOperation):
            return Decimal(answer_text(right)) == Decimal(given.strip().replace(",", ""))
    return plain(answer_text(right)) == plain(given)


def _math_matcher(config: AnswerRewardConfig) -> Callable[[Any, str], bool]:
    from qrpo.rewards.mathematics import is_right, read_right

    def matches(right: Any, given: str) -> bool:
        marked = config.completion_after is not None
        return is_right(read_right(answer_text(right)), given, config.digits, marked=marked)

    return matches
