"""QRPO: quantile rewards, transforms, partition functions, losses and training, without Prefect and
without a store.

    from qrpo import QRPOConfig, QRPOTrainer, log_z, qrpo_loss, quantile_rewards

works on any dataset. Names are loaded when they are first used, so `import qrpo` is fast.

- `method`: the paper in NumPy and torch
- `training`: the trainers, their settings, log-probabilities
- `data`: dataset rows and chat templates
- `engines`: generation
- `rewards`: reward kinds
- `sandbox`: running model-written code
- `evaluation`: summaries, statistics, comparison, public suites
- `processes`: child processes
- `models`: which model, its identity, loading it
- `tiny`: small random models for demo and tests
- `config`: the base class of configuration sections
- `errors`: every error

Array names end in their axes: `P` prompts, `N` reference completions, `K` training completions per
prompt, `B` rows, `T` tokens, `V` vocabulary, `D` hidden, `U` loss terms, `C` and `M` tokens of a
chunk and of a batch.
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
    from qrpo.training.trainer import QRPOTrainer
    from qrpo.training.trainer_arguments import QRPOConfig

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

# Searched in this order for a name: from those that load quickly to those that need torch and
# transformers.
_MODULES = (
    "errors",
    "method.quantiles",
    "method.transforms",
    "method.partition",
    "method.losses",
    "training.logprobs",
    "training.trainer",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"qrpo.{module}")
            if hasattr(found, name):
                globals()[name] = getattr(found, name)
                return globals()[name]
    raise AttributeError(f"module 'qrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
