"""The method: quantile rewards, transforms, partition functions, losses, training. Knows no Prefect and no store.

    from qrpo import QRPOConfig, QRPOTrainer, log_z, qrpo_loss, quantile_rewards

works on anybody's data. Names are loaded when they are first used, so `import qrpo` costs nothing.

Array names end in their axes, one legend for the whole project: `P` prompts, `N` reference completions, `K` training completions
per prompt, `B` rows, `T` tokens, `V` vocabulary, `D` hidden, `C` and `M` tokens of a chunk and of a batch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrpo.errors import (
        ConfigError,
        DataError,
        EngineError,
        ModelError,
        QRPOError,
        RewardError,
        TrainingError,
    )
    from qrpo.method.losses import choose_pairs, dpo_loss, per_token_beta, qrpo_loss, rebel_loss, simpo_loss
    from qrpo.method.partition import log_z
    from qrpo.method.quantiles import quantile_bounds, quantile_rewards
    from qrpo.method.transforms import Transform, from_function, get_transform, transform_names
    from qrpo.training.logprobs import completion_logprobs
    from qrpo.training.trainer import QRPOConfig, QRPOTrainer

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "ModelError",
    "QRPOConfig",
    "QRPOError",
    "QRPOTrainer",
    "RewardError",
    "TrainingError",
    "Transform",
    "choose_pairs",
    "completion_logprobs",
    "dpo_loss",
    "from_function",
    "get_transform",
    "log_z",
    "per_token_beta",
    "qrpo_loss",
    "quantile_bounds",
    "quantile_rewards",
    "rebel_loss",
    "simpo_loss",
    "transform_names",
]

_HOMES = {
    "errors": [
        "ConfigError",
        "DataError",
        "EngineError",
        "ModelError",
        "QRPOError",
        "RewardError",
        "TrainingError",
    ],
    "training.logprobs": ["completion_logprobs"],
    "method.losses": ["choose_pairs", "dpo_loss", "per_token_beta", "qrpo_loss", "rebel_loss", "simpo_loss"],
    "method.partition": ["log_z"],
    "method.quantiles": ["quantile_bounds", "quantile_rewards"],
    "training.trainer": ["QRPOConfig", "QRPOTrainer"],
    "method.transforms": ["Transform", "from_function", "get_transform", "transform_names"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qrpo' has no attribute {name!r}")
    value = getattr(import_module(f"qrpo.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
