"""Rewards: one absolute number for each completion, from a Python function or a reward model.

`open_reward` gives a `Reward` that runs in a child process, started by the first call: a reward model gives its memory
back when closed, and a function that hangs is ended. Rows that cannot be scored come back with their `error`, in
their place; a reward that scores no row at all raises RewardError. Each kind lives in a module of its own; what they
share is in `qrpo.rewards.protocol`.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator

from qrpo.callables import source_digests, split_target
from qrpo.models import model_identity
from qrpo.rewards.function import ChildFunctionReward, FunctionRewardConfig
from qrpo.rewards.model import ChildModelReward, ModelRewardConfig
from qrpo.rewards.protocol import Reward, Score, combine

__all__ = [
    "FunctionRewardConfig",
    "ModelRewardConfig",
    "Reward",
    "RewardConfig",
    "Score",
    "combine",
    "identity",
    "open_reward",
]

RewardConfig = Annotated[FunctionRewardConfig | ModelRewardConfig, Discriminator("kind")]
"""One reward in the configuration; `kind` says which."""


def open_reward(config: FunctionRewardConfig | ModelRewardConfig, *, log: Path | None = None) -> Reward:
    """The configured reward, in a child process that starts with the first call; its output is appended to `log`.

    Raises ConfigError or ModelError at once where the function's file or the model's folder is missing.
    """
    identity_of = identity(config)  # reads the file or folder: what is missing is told before anything starts
    assert identity_of
    if isinstance(config, FunctionRewardConfig):
        return ChildFunctionReward(config, log)
    return ChildModelReward(config, log)


def identity(config: FunctionRewardConfig | ModelRewardConfig) -> dict[str, Any]:
    """What the reward is, for fingerprints: the source of a function and of the local files it imports, or the model.

    Together with `qrpo.config.keyed(config)` it tells apart whatever could score differently. Paths are not in it.
    """
    if isinstance(config, FunctionRewardConfig):
        return {"function": split_target(config.function)[1], "sources": source_digests(config.function)}
    return {"model": model_identity(config.model)}
