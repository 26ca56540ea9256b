"""Rewards: one absolute number for each completion.

    protocol       `RewardSection`, `Reward`, `Score`, and the weighted sum of several rewards
    function       kind `function`: a Python function in TRL's GRPO signature
    model          kind `model`: a Hugging Face reward model, run by transformers
    pooling        the same under vLLM's pooling runner
    judge          kind `judge`: a language model behind an OpenAI-compatible server grades by a
                   rubric
    grades         how a judge's answer becomes a score
    chat_client    requests to the judge's server, with retries
    answer         kind `answer`: comparison with the right answer, as mathematics or as text
    mathematics    how right answers are read and compared as mathematics
    code           kind `code`: the share of tests that the completion's code passes in the sandbox
    worker_pool    child processes for code that may hang or crash

`open_reward` returns a `Reward` that starts what it needs with the first call, in child processes
where it runs foreign code or takes much memory. A row that cannot be scored gets an `error` in its
place; a reward that scores no row at all raises RewardError.

To add a kind, write one module with its `RewardSection` and its `Reward`, as `protocol` defines
them, and add the section to `RewardConfig` below. Use a `WorkerPool` for code that may hang or
crash, a `qrpo.processes.child.Child` for memory that must be freed, and the `answers` given to
`open` for answers that cost money.
"""

from pathlib import Path
from typing import Annotated

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
    "open_reward",
]

RewardConfig = Annotated[
    FunctionRewardConfig | ModelRewardConfig | JudgeRewardConfig | AnswerRewardConfig | CodeRewardConfig,
    Discriminator("kind"),
]
"""One reward in the configuration; `kind` says which."""


def open_reward(config: RewardSection, *, log: Path | None = None, answers: Answers | None = None) -> Reward:
    """The configured reward. Children append their output to `log`; answers that cost money are
    stored in `answers`.

    Raises ConfigError or ModelError at once if something that it needs is missing.
    """
    config.identity()  # reads the file or folder, so that what is missing is reported before anything starts
    return config.open(log, answers)
