"""Rewards: one absolute number for each completion.

| `kind` | what scores |
|---|---|
| `function` | a Python function in TRL's GRPO signature |
| `model` | a Hugging Face reward model, run by transformers or vLLM |
| `judge` | a language model behind an OpenAI-compatible server, asked to grade by a rubric |
| `answer` | a comparison with the right answer, mathematical or to the letter |
| `code` | the share of tests that the completion's code passes, run in a sandbox |

`open_reward` gives a `Reward` that starts what it needs with the first call, in child processes where that is memory
or foreign code: a reward model gives its memory back when closed, and a function that hangs is ended. Rows that cannot
be scored come back with their `error`, in their place; a reward that scores no row at all raises RewardError.

A kind of one's own is a module like the others: a `RewardSection` with `kind`, its settings, `identity` and `open`,
and a class with `score` and `close` (both in `qrpo.rewards.protocol`), added to `RewardConfig` below. Rows that are
scored by code of unknown temper go through `qrpo.rewards.workers`, which isolates, times out and retries them.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator

from qrpo.rewards.answer import AnswerRewardConfig
from qrpo.rewards.code import CodeRewardConfig
from qrpo.rewards.function import FunctionRewardConfig
from qrpo.rewards.judge import JudgeRewardConfig
from qrpo.rewards.model import ModelRewardConfig
from qrpo.rewards.protocol import Answers, Reward, RewardSection, Score, combine

__all__ = [
    "AnswerRewardConfig",
    "Answers",
    "CodeRewardConfig",
    "FunctionRewardConfig",
    "JudgeRewardConfig",
    "ModelRewardConfig",
    "Reward",
    "RewardConfig",
    "RewardSection",
    "Score",
    "combine",
    "identity",
    "open_reward",
]

RewardConfig = Annotated[
    FunctionRewardConfig | ModelRewardConfig | JudgeRewardConfig | AnswerRewardConfig | CodeRewardConfig,
    Discriminator("kind"),
]
"""One reward in the configuration; `kind` says which."""


def open_reward(config: RewardSection, *, log: Path | None = None, answers: Answers | None = None) -> Reward:
    """The configured reward. Children append their output to `log`; answers that cost money are kept in `answers`.

    Raises ConfigError or ModelError at once where what it needs is missing.
    """
    config.identity()  # reads the file or folder: what is missing is told before anything starts
    return config.open(log, answers)


def identity(config: RewardSection) -> dict[str, Any]:
    """What the reward is beside its settings, for fingerprints. Paths are not in it.

    Together with `qrpo.config.keyed(config)` it tells apart whatever could score differently.
    """
    return config.identity()
