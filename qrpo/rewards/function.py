"""Rewards that are Python functions, in the signature that TRL's GRPO users know.

    def reward(prompts, completions, answer, **columns) -> list[float | None]

The function gets a batch: prompts and completions as strings, or as lists of messages where the dataset's prompts are
messages, and the dataset's other columns by name. It may be `async`. None means "does not apply". It may leave out
what it does not need, `**columns` too.

It runs in a child process, in the folder's own `sys.path`, so that a call which hangs can be ended. When a call on a
batch raises, hangs or returns the wrong count, its rows are tried one by one: one bad row does not cost the others.
"""

import asyncio
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from qrpo.callables import load_callable, split_target
from qrpo.chat import Messages
from qrpo.child import Child
from qrpo.config import Section, knob
from qrpo.errors import ConfigError, EngineError, QRPOError, RewardError
from qrpo.rewards.protocol import Columns, Score

__all__ = ["ChildFunctionReward", "FunctionReward", "FunctionRewardConfig"]

# calls in a row that hang: before anything was ever scored, and after
_TIMEOUTS_AT_FIRST, _TIMEOUTS_LATER = 3, 10


class FunctionRewardConfig(Section):
    """A reward that is a Python function."""

    kind: Literal["function"] = "function"
    """Says that this reward is a Python function."""
    name: str = Field("reward", min_length=1)
    """What its values are called among the components of a sum."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Its factor in a sum of several rewards."""
    function: str = knob(...)
    """`path/to/file.py:function` or `package.module:function`. Its source is in fingerprints, its path is not."""
    version: str = ""
    """Change it when the function's answers change for a reason outside its source: a data file, a package."""
    batch_size: int = knob(256, ge=1)
    """Completions per call."""
    timeout: float = knob(60.0, gt=0.0)
    """Longest time for one call, in seconds; longer, and its rows are tried one by one."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        try:
            split_target(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value


class FunctionReward:
    """A function in this process: one call per batch and form of prompt. Raises what the function raises."""

    def __init__(self, target: str):
        self._target = target
        try:
            self._function = load_callable(target)
        except QRPOError:
            raise
        except Exception as error:
            raise RewardError(f"cannot import {target}: {_last_line(error)}") from error
        self._accepts = _accepted_names(self._function)

    def ready(self) -> None:
        """Answers once the function is loaded."""

    def call(
        self, prompts: Sequence[Messages], completions: Sequence[str], columns: Columns, conversational: bool
    ) -> list[Score]:
        """The function's answer for the rows as one batch, checked; raises RewardError where it fails as a whole."""
        arguments: dict[str, Any] = {
            "prompts": [_as_given(prompt, conversational) for prompt in prompts],
            "completions": [
                [{"role": "assistant", "content": text}] if conversational else text for text in completions
            ],
            **{
                name: list(values)
                for name, values in columns.items()
                if name not in ("prompts", "completions")
            },
        }
        try:
            values = self._run({name: arguments[name] for name in arguments if self._accepts(name)})
        except (Exception, SystemExit) as error:
            traceback.print_exception(error)  # into the log
            raise RewardError(f"{self._target} raised {_last_line(error)}") from error
        try:
            values = values.tolist() if hasattr(values, "tolist") else list(values)
        except TypeError as error:
            raise RewardError(
                f"{self._target} returned {type(values).__name__}, expected a list with one number per completion"
            ) from error
        if len(values) != len(completions):
            raise RewardError(
                f"{self._target} returned {len(values)} rewards for {len(completions)} completions, expected as many"
            )
        return [_checked(value) for value in values]

    def _run(self, arguments: dict[str, Any]) -> Any:
        missing = [
            name
            for name, parameter in inspect.signature(self._function).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in arguments
        ]
        if missing:
            given = ", ".join(sorted(arguments)) or "nothing"
            raise TypeError(f"it wants {', '.join(missing)}, which the data does not have (passed: {given})")
        result = self._function(**arguments)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


class ChildFunctionReward:
    """A function reward in a child process, as the `Reward` protocol wants it."""

    def __init__(self, config: FunctionRewardConfig, log: Path | None = None):
        self._config = config
        self._child = Child(
            "qrpo.rewards.function:FunctionReward", config.function, name=f"reward {config.function}", log=log
        )
        self._scored_any = False
        self._timeouts = 0  # in a row

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order. RewardError if the function has failed on every row it ever got."""
        count = len(completions)
        if not count:
            return []
        self._child.call("ready")  # so that a function which cannot be loaded is told as that
        forms = [True] * count if conversational is None else list(conversational)
        scores: dict[int, Score] = {}
        for form in (True, False):
            rows = [row for row in range(count) if forms[row] is form]
            for start in range(0, len(rows), self._config.batch_size):
                batch = rows[start : start + self._config.batch_size]
                scores |= zip(
                    batch, self._score_rows(batch, prompts, completions, columns, form), strict=True
                )
        errors = [score.error for score in scores.values() if score.error is not None]
        self._scored_any = self._scored_any or len(errors) < count
        if not self._scored_any and count > 1:
            raise RewardError(
                f"the reward failed on each of the first {count} completions: {errors[0]}. Mend it"
            )
        return [scores[row] for row in range(count)]

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def _score_rows(
        self,
        rows: list[int],
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        conversational: bool,
    ) -> list[Score]:
        try:
            scores: list[Score] = self._child.call(
                "call",
                [prompts[row] for row in rows],
                [completions[row] for row in rows],
                {name: [values[row] for row in rows] for name, values in columns.items()},
                conversational,
                timeout=self._config.timeout,
            )
        except (RewardError, EngineError, TimeoutError) as error:  # it raised, died, or hung
            hung = isinstance(error, TimeoutError)
            if len(rows) > 1:
                return [
                    score
                    for row in rows
                    for score in self._score_rows([row], prompts, completions, columns, conversational)
                ]
            self._timeouts = self._timeouts + 1 if hung else 0
            if self._timeouts >= (_TIMEOUTS_LATER if self._scored_any else _TIMEOUTS_AT_FIRST):
                raise RewardError(
                    f"{self._config.function} took more than {self._config.timeout:g} s on each of "
                    f"{self._timeouts} completions in a row: raise the reward's timeout, or mend the function"
                ) from None
            return [
                Score(None, f"no answer within {self._config.timeout:g} s (timeout)" if hung else str(error))
            ]
        self._scored_any = self._scored_any or any(score.error is None for score in scores)
        self._timeouts = 0
        return scores


async def _awaited(result: Any) -> Any:
    return await result


def _accepted_names(function: Callable[..., Any]) -> Callable[[str], bool]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return lambda name: True
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return names.__contains__


def _as_given(prompt: Messages, conversational: bool) -> Any:
    return [dict(message) for message in prompt] if conversational else prompt[-1]["content"]


def _checked(value: Any) -> Score:
    if value is None:
        return Score(None)
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if not isinstance(value, numbers.Real):
        return Score(None, f"the reward is of type {type(value).__name__}, expected a number or None")
    if not math.isfinite(value):
        return Score(None, f"the reward is {float(value)}, expected a finite number")
    return Score(float(value))


def _last_line(error: BaseException) -> str:
    place = ""
    if frames := traceback.extract_tb(error.__traceback__):
        frame = frames[-1]
        place = f" ({Path(frame.filename).name}:{frame.lineno})"
    return traceback.format_exception_only(error)[-1].strip() + place
