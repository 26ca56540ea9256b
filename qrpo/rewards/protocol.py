"""The interface of every kind of reward, and the weighted sum of several.

A kind is one module with two classes. Its `RewardSection` declares the settings, the identity and
how to open the reward; its `Reward` scores. `qrpo.rewards` lists the sections; no other code knows
the kinds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import Field

from qrpo.config import Section
from qrpo.data.chat import Messages

Prompts = Sequence[Messages]
Texts = Sequence[str]
Forms = Sequence[bool] | None
"""Whether each prompt was a list of messages in the dataset; None: all were."""
Columns = Mapping[str, Sequence[Any]]
"""The dataset's other columns by name, one value per completion."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one completion, or the reason why it has none."""

    reward: float | None
    """None if `error` is set or the reward does not apply to the row."""
    error: str | None = None
    components: tuple[tuple[str, float | None], ...] = ()
    """(name, value) of each reward that applies; None where a reward of weight 0 failed."""
    note: str = field(default="", compare=False)
    """What a person should know about the value, such as why a test failed."""


@runtime_checkable
class Reward(Protocol):
    """Scores completions. Calls from several threads are served one after another."""

    def score(
        self, prompts: Prompts, completions: Texts, columns: Columns, *, conversational: Forms = None
    ) -> list[Score]:
        """One score per completion, in order; it depends on the completion's own row only.

        `conversational` is false for rows whose prompt is a plain string in the dataset (default:
        all true); functions get those as strings, as in TRL. Raises RewardError if no row can be
        scored, EngineError if the child process dies.
        """
        ...

    def close(self) -> None:
        """Free all memory. A later call starts the reward again."""
        ...


class Answers(Protocol):
    """The caller's storage of answers that cost money, so that none is paid for twice.

    Answers to requests with the same settings form a group; a key identifies the request, an answer
    is any text.
    """

    def load(self, group: str) -> dict[str, str]:
        """All stored answers of the group, by key."""
        ...

    def keep(self, group: str, answers: Mapping[str, str]) -> None:
        """Store answers durably before this returns."""
        ...


class RewardSection(Section):
    """The settings of every reward. A kind adds its settings, `kind`, `identity` and `open`."""

    name: str = Field("reward", min_length=1)
    """The name of its values among the components of a sum."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Its factor in a sum of several rewards; 0 only records its value as a component: whether it
    applies or fails changes nothing."""

    def identity(self) -> dict[str, Any]:
        """What could change a score and is not a setting: the source of a function, the files of a
        model.

        Part of fingerprints, with `qrpo.config.keyed(self)`. Plain JSON values without paths. Must
        be fast, offline and without a GPU, since `qrpo plan` calls it. Raises ConfigError or
        ModelError if something is missing.
        """
        raise NotImplementedError

    def open(self, log: Path | None, answers: Answers | None) -> Reward:
        """The reward, started by its first call; children append their output to `log`."""
        raise NotImplementedError


def combine(scores: Sequence[tuple[str, float, Sequence[Score]]]) -> list[Score]:
    """The weighted sum of several rewards' scores, given as (name, weight, scores), row by row.

    As in TRL, a reward that does not apply to a row (None) is excluded from its sum. A row fails if
    one reward fails on it or none applies. A reward of weight 0 is recorded and decides nothing.
    """
    return [_combine_row(scores, row) for row in range(len(scores[0][2]))]


def _combine_row(scores: Sequence[tuple[str, float, Sequence[Score]]], row: int) -> Score:
    components: list[tuple[str, float | None]] = []
    terms = []
    for name, weight, column in scores:
        score = column[row]
        if score.error is not None and weight:
            return Score(None, f"{name}: {score.error}")
        if score.error is not None or score.reward is not None:
            components.append((name, score.reward))
        if weight and score.reward is not None:
            terms.append(weight * score.reward)
    if not terms:
        names = ", ".join(name for name, weight, _ in scores if weight)
        return Score(None, f"no reward applies: {names} returned None")
    total = sum(terms)
    if not math.isfinite(total):
        return Score(None, f"the weighted sum is {total}", tuple(components))
    notes = [f"{name}: {column[row].note}" for name, _, column in scores if column[row].note]
    return Score(total, None, tuple(components), "; ".join(notes))
