"""What every reward takes and gives back, and how several become one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from qrpo.chat import Messages

__all__ = ["Columns", "Reward", "Score", "combine"]

Columns = Mapping[str, Sequence[Any]]
"""The dataset's other columns by name, one value per completion."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one completion, or why it has none."""

    reward: float | None
    """None where `error` is set, or where the reward does not apply to the row."""
    error: str | None = None
    components: tuple[tuple[str, float], ...] = ()
    """(name, value) of each reward that went into a weighted sum."""


@runtime_checkable
class Reward(Protocol):
    """Scores completions. Calls from several threads are served one after another."""

    def score(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[str],
        columns: Columns,
        *,
        conversational: Sequence[bool] | None = None,
    ) -> list[Score]:
        """One score per completion, in order; a completion's score depends on its own row alone.

        `conversational` is false for the rows whose prompt came as a plain string (all true by default): functions
        get those as strings, as TRL passes them. Raises RewardError where no row can be scored, EngineError where
        the child process dies.
        """
        ...

    def close(self) -> None:
        """Give all memory back. A later call starts the reward again."""
        ...


def combine(scores: Sequence[tuple[str, float, Sequence[Score]]]) -> list[Score]:
    """The weighted sum of several rewards' scores, given as (name, weight, scores), row by row.

    As in TRL, a reward that does not apply to a row (None) is left out of its sum. A row that one reward failed on
    fails with that error; so does a row that none applies to.
    """
    return [_combine_row(scores, row) for row in range(len(scores[0][2]))]


def _combine_row(scores: Sequence[tuple[str, float, Sequence[Score]]], row: int) -> Score:
    components = []
    total = 0.0
    for name, weight, column in scores:
        score = column[row]
        if score.error is not None:
            return Score(None, f"{name}: {score.error}")
        if score.reward is not None:
            components.append((name, score.reward))
            total += weight * score.reward
    if not components:
        names = ", ".join(name for name, _, _ in scores)
        return Score(None, f"no reward applies: {names} returned None")
    if not math.isfinite(total):
        return Score(None, f"the weighted sum is {total}", tuple(components))
    return Score(total, None, tuple(components))
