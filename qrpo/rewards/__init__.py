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

A kind of one's own is one module like the others:

    class LengthConfig(RewardSection):                  # `name` and `weight` are there already
        kind: Literal["length"] = "length"
        longest: int = 100                              # a setting: changing it scores anew
        batch: int = execution_option(64)                           # changing it does not

        def identity(self):                             # what else could change a score; see the protocol
            return {}

        def open(self, log, answers):
            return Length(self.longest)

    class Length:
        def __init__(self, longest):
            self.longest = longest

        def score(self, prompts, completions, columns, *, conversational=None):
            return [Score(min(len(said), self.longest) / self.longest) for said in completions]

        def close(self): ...

added to `RewardConfig` below. What each method owes is in `qrpo.rewards.protocol`. Rows that are scored by code of
unknown temper go through `qrpo.rewards.workers`, which isolates, times out and retries them; memory that must come back
belongs into a `qrpo.processes.child.Child`; answers that cost money go to the `answers` that `open` is given.
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
