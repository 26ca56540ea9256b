"""The training settings of this project, each declared once.

A class here is a plain dataclass without torch. `qrpo.training.trainer` combines it with
`transformers.TrainingArguments` (`QRPOConfig`), `qrpo.training.settings` with the sections of the
YAML file, which also check the constraints. Settings that `TrainingArguments` already has are not
repeated here: the YAML sections use its names.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qrpo.config import execution_option
from qrpo.errors import ConfigError

T = TypeVar("T")


def setting(default: Any, description: str, *, option: bool = False, **constraints: Any) -> Any:
    """A field for `@settings`; with `option` it is an execution option, which changes no result."""
    return (execution_option if option else Field)(default, description=description, **constraints)


@dataclass_transform()
def settings(cls: type[T]) -> type[T]:
    """Make a dataclass of settings. Pydantic classes that inherit it get the descriptions and
    constraints too."""
    for name, kind in list(cls.__annotations__.items()):
        declared = cls.__dict__[name]
        cls.__annotations__[name] = Annotated[kind, declared]
        setattr(cls, name, field(default=declared.default, metadata={"help": declared.description}))
    return dataclass(cls)


@settings
class CompletionSettings:
    """Settings of any training on whole completions."""

    token_budget: int | None = setting(
        None,
        "Maximum tokens of one forward pass, padding included. Bounds the memory. Null: 16384 on a GPU with at least 40 GiB, "
        "else 8192.",
        option=True,
        ge=1,
    )
    packing: bool = setting(
        True,
        "Compute conversations end to end in one row, without padding, where the model supports it.",
        option=True,
    )
    share_prompts: bool = setting(
        True,
        "Compute a prompt once for all its completions, where rows are packed and it saves 30% of the tokens; never on CUDA.",
        option=True,
    )
    compile_layers: bool | None = setting(
        None,
        "Compile the decoder layers with `torch.compile`; null compiles on CUDA if the run has at least 100 steps.",
        option=True,
    )
    weights: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Precision of the weights in training. `bfloat16` computes faster and keeps a float32 copy in the optimizer; needs "
        "`bf16: true` and one process.",
    )
    bad_step: Literal["stop", "skip"] = setting(
        "stop",
        "What to do with a step whose loss or gradient is not finite, or whose loss exploded: `stop` and name its prompts, or "
        "`skip` it and leave the weights as they are.",
    )
    max_loss_growth: float | None = setting(
        1000.0,
        "A loss this many times the largest of the first 10 logged losses has exploded; null turns the check off.",
        gt=1,
    )


@settings
class QRPOSettings(CompletionSettings):
    """Settings of the policy's training, whichever loss it uses."""

    loss: Literal["qrpo", "dpo", "rebel", "simpo", "sft"] = setting(
        "qrpo",
        "The objective: QRPO, a pairwise loss to compare it with, or maximum likelihood of the chosen completions.",
    )
    beta: float = setting(
        0.1,
        "Strength of the KL penalty to the reference; `qrpo theory` shows what each value gives for QRPO. For SimPO, which has "
        "no reference, the scale of its rewards, usually 2 to 10. `sft` ignores it.",
        gt=0,
    )
    transform: str = setting(
        "identity",
        "f, applied to the quantile reward before the objective: a name that `qrpo theory` lists, also with numbers, "
        "`power(exponent=0.5)` or `normal-icdf(edge=2)`; or `file.py:function`.",
    )
    partition: Literal["continuous", "finite"] = setting(
        "continuous",
        "Z for a quantile reward that is uniform on [0, 1] (`continuous`), or on the num_ref + 1 values of an estimate (`finite`).",
    )
    loss_type: Literal["mse", "mae"] = setting(
        "mse", "QRPO's error of a completion: the squared residual or its absolute value."
    )
    mean_ref_std: float | None = setting(
        None,
        "Mean over all prompts of `ref_std`, for transforms that are scaled per prompt; null computes it from the training rows.",
        gt=0,
    )
    pairs: Literal["best-worst", "random", "dataset"] = setting(
        "best-worst",
        "Which completions of a prompt are chosen and rejected: highest and lowest reward, two at random in each epoch, or the "
        "dataset's preference (`quantiles.train_on: offline` or `both`). `sft` learns the chosen one. `qrpo` ignores it.",
    )
    rebel_reward: Literal["reward", "quantile_reward"] = setting(
        "reward",
        "What `rebel` regresses differences of: the reward, or the transformed quantile reward.",
    )
    gamma_beta_ratio: float = setting(0.5, "SimPO's target margin as a fraction of beta.", ge=0)
    patience: int | None = setting(
        None,
        "Stop after this many evaluations in a row without a lower `eval_loss` and keep the weights with the lowest; null never "
        "stops early.",
        ge=1,
    )
    max_initial_log_ratio: float | None = setting(
        None,
        "Largest allowed mean of |log pi - log ref| per square root of a token before the first step; null allows what rounding "
        "explains in the training precision, `.inf` everything.",
        option=True,
        gt=0,
        allow_inf_nan=True,
    )


def check_settings(config: CompletionSettings) -> None:
    """Raise ConfigError for the first of these settings that is not what its section of the YAML
    file would take."""
    finite = ConfigDict(allow_inf_nan=False)
    kind = QRPOSettings if isinstance(config, QRPOSettings) else CompletionSettings
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        value = getattr(config, name)
        try:
            TypeAdapter(annotation, config=finite).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(f"{name}: {error.errors()[0]['msg']}, got {value!r}") from None
