"""Rewards that are Python functions, in the signature of TRL's GRPO trainer.

    def reward(prompts, completions, answer, **columns) -> list[float | None]

The function gets a batch: prompts and completions as strings, or as lists of messages where the
dataset's prompts are messages; the sampled `completion_ids`; and the dataset's other columns by
name. Parameters that it does not need may be omitted, `**columns` included. It may be `async`. It
returns a sequence or a one-dimensional array of real numbers; None means "does not apply".

It runs in child processes (`qrpo.rewards.worker_pool`), with the folder of its file on `sys.path`.
"""

import asyncio
import inspect
import math
import numbers
import traceback
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from qrpo.callables import load_callable, source_digests, split_target
from qrpo.config import outside_input
from qrpo.data.chat import Messages
from qrpo.errors import ConfigError, QRPOError, RewardError
from qrpo.rewards.protocol import Answers, Columns, Reward, Score
from qrpo.rewards.worker_pool import WorkerSection


class FunctionRewardConfig(WorkerSection):
    """A reward that is a Python function."""

    kind: Literal["function"] = "function"
    """Says that this reward is a Python function."""
    function: str = outside_input(...)
    """`path/file.py:function` or `package.module:function`. Fingerprints hold its source only."""
    version: str = ""
    """Change it when results change for a reason outside the source: a data file, a package."""

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        try:
            split_target(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    def identity(self) -> dict[str, Any]:
        """The function's name, its source and that of the local files that it imports."""
        return {"function": split_target(self.function)[1], "sources": source_digests(self.function)}

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The function in `workers` child processes."""
        target = "qrpo.rewards.function:FunctionReward"
        return self.pool(target, self.function, name=self.function, log=log)


class FunctionReward:
    """A function in this process: one call per batch and form of prompt."""

    def __init__(self, target: str):
        self._target = target
        try:
            self._function = load_callable(target)
        except QRPOError:
            raise
        except Exception as error:
            raise RewardError(f"cannot import {target}: {_last_line(error)}") from error
        parameters = inspect.signature(self._function).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = {parameter.name for parameter in named}
        self._required = [p.name for p in named if p.default is p.empty]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def columns(self) -> set[str] | None:
        """The names of the columns that the function takes; None for all."""
        return None if self._takes_all else self._names

    def call(
        self, prompts: Sequence[Messages], completions: Sequence[str], columns: Columns, conversational: bool
    ) -> list[Score]:
        """The function's checked result for one batch; RewardError if it fails as a whole."""
        arguments: dict[str, Any] = {
            **{name: list(values) for name, values in columns.items()},
            "prompts": [_as_given(prompt, conversational) for prompt in prompts],
            "completions": [
                [{"role": "assistant", "content": text}] if conversational else text for text in completions
            ],
        }
        if not self._takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self._names}
        try:
            values = self._run(arguments)
        except (Exception, SystemExit) as error:
            traceback.print_exception(error)  # into the log
            raise RewardError(f"{self._target} raised {_last_line(error)}") from error
        if not _is_list(values):
            raise RewardError(
                f"{self._target} returned {type(values).__name__}, expected a list or array with one number per "
                "completion"
            )
        values = list(values)
        if len(values) != len(completions):
            raise RewardError(
                f"{self._target} returned {len(values)} rewards for {len(completions)} completions, expected as many"
            )
        return [_checked(value) for value in values]

    def _run(self, arguments: dict[str, Any]) -> Any:
        if missing := [name for name in self._required if name not in arguments]:
            given = ", ".join(sorted(arguments)) or "nothing"
            raise TypeError(f"it wants {', '.join(missing)}, which the data does not have (passed: {given})")
        result = self._function(**arguments)
        return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _as_given(prompt: Messages, conversational: bool) -> Any:
    return [dict(message) for message in prompt] if conversational else prompt[-1]["content"]


def _is_list(values: Any) -> bool:
    """Whether these are values in an order that the function chose: a sequence, a NumPy array, a
    tensor, a column.

    The order of a set is none, a mapping iterates over its keys, and the items of text and bytes
    are no rewards.
    """
    if isinstance(values, (str, bytes, bytearray, memoryview, Mapping, Set)):
        return False
    is_column = (
        any(hasattr(values, name) for name in ("tolist", "to_list", "to_pylist"))
        and getattr(values, "ndim", 1) == 1
    )
    return isinstance(values, Sequence) or is_column


def _checked(value: Any) -> Score:
    if hasattr(value, "as_py"):  # a scalar of Arrow
        value = value.as_py()
    if value is None:
        return Score(None)
    name = type(value).__name__
    is_time = getattr(getattr(value, "dtype", None), "kind", "") in ("m", "M")
    is_masked = name == "MaskedConstant"  # of NumPy, whose item is 0.0
    if hasattr(value, "item") and not getattr(value, "ndim", 0):  # a scalar of NumPy, torch or JAX
        value = value.item()
    if is_masked or is_time or not isinstance(value, (numbers.Real, Decimal)):
        return Score(None, f"the reward is of type {name}, expected a number or None")
    try:
        reward = float(value)
    except (OverflowError, ValueError):  # an integer above 1e308, a signalling NaN
        reward = math.inf
    if not math.isfinite(reward):
        return Score(None, f"the reward is {value!s:.40}, expected a finite number")
    return Score(reward)


def _last_line(error: BaseException) -> str:
    where = ""
    if frames := traceback.extract_tb(error.__traceback__):
        frame = frames[-1]
        where = f" ({Path(frame.filename).name}:{frame.lineno})"
    return traceback.format_exception_only(error)[-1].strip() + where
