"""What every kind of reward takes, gives back and says about itself, and how several become one.

A kind is one module: a `RewardSection` that says what the user sets, what of it could change a score, and how to open
it, and a `Reward` that scores. `qrpo.rewards` lists the sections; nothing else knows the kinds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import Field

from qrpo.config import Section
from qrpo.data.chat import Messages

__all__ = ["Answers", "Columns", "Reward", "RewardSection", "Score", "combine"]

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


class Answers(Protocol):
    """Where a reward keeps answers that cost money, so that asking again costs nothing. The caller has the place.

    Answers that were asked for with the same settings form a group; a key says which row was asked about, an answer
    is any text.
    """

    def load(self, group: str) -> dict[str, str]:
        """All answers that were kept for the group, by key."""
        ...

    def keep(self, group: str, answers: Mapping[str, str]) -> None:
        """Keep some answers. When this returns they survive whatever comes."""
        ...


class RewardSection(Section):
    """What every reward has in the configuration. A kind adds its settings, `kind`, `identity` and `open`."""

    name: str = Field("reward", min_length=1)
    """What its values are called among the components of a sum."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Its factor in a sum of several rewards; 0 only keeps its value as a component."""

    def identity(self) -> dict[str, Any]:
        """What could change a score and is not a setting: the source of a function, the files of a model.

        Goes into fingerprints beside `qrpo.config.keyed(self)`. Plain JSON values without paths; quick, offline and
        without a GPU, since `qrpo plan` asks. Raises ConfigError or ModelError where something is missing.
        """
        raise NotImplementedError

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The reward, which starts whatever it needs at its first call; children append their output to `log`."""
        raise NotImplementedError


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
