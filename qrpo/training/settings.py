"""The YAML sections of the two training runs: `reference.sft` and `policy`.

Their keys are the settings of `qrpo.training.arguments` and the fields of
`transformers.TrainingArguments`, under the same names. A section declares the fields that most runs
set. It accepts every other field of `TrainingArguments` that the pipeline does not set itself, for
example `optim`, `adam_beta2` or `lr_scheduler_kwargs`; transformers is imported only to check
those. This module needs no torch, so that a configuration is read, checked and shown quickly.
"""

from dataclasses import fields
from enum import Enum
from typing import Any, Literal, Self, get_args, get_type_hints

from pydantic import (
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from qrpo.config import Section, Seed, execution_option
from qrpo.errors import ConfigError
from qrpo.method.transforms import get_transform
from qrpo.training.arguments import CompletionSettings, QRPOSettings

# Keys of earlier versions: what replaces them.
RENAMED = {
    "epochs": "`num_train_epochs`",
    "lr_scheduler": "`lr_scheduler_type`",
    "warmup": "`warmup_steps`",
    "keep_checkpoints": "`save_total_limit`",
    "dtype": "`bf16: true` (bfloat16) or `bf16: false` (float32)",
    "eval_shards": "`eval_fraction`, the fraction of the training prompts to hold out",
}
# Fields of TrainingArguments that a section refuses, by what to do instead.
REFUSED = {
    "set `prompts_per_step`; `token_budget` bounds the memory": "per_device_train_batch_size gradient_accumulation_steps "
    "per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size",
    "set `eval_fraction` and `eval_steps` of the policy": "do_eval eval_strategy eval_steps eval_delay eval_on_start",
    "set `patience` of the policy": "load_best_model_at_end metric_for_best_model greater_is_better",
    "set the `seed` of the run or the policy": "seed data_seed",
    "set `processes` and `fsdp`": "fsdp fsdp_config deepspeed parallelism_config accelerator_config local_rank use_cpu",
    "the store holds models and checkpoints": "output_dir save_strategy save_only_model save_on_each_node resume_from_checkpoint "
    "ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint push_to_hub hub_token hub_private_repo "
    "hub_model_id hub_strategy hub_always_push hub_revision",
    "the pipeline sets it, or its trainer does not use it": "do_train do_predict disable_tqdm logging_nan_inf_filter "
    "average_tokens_across_devices bf16_full_eval fp16_full_eval batch_eval_metrics dataloader_in_order "
    "eval_do_concat_batches eval_use_gather_object include_for_metrics label_names label_smoothing_factor length_column_name "
    "prediction_loss_only remove_unused_columns train_sampling_strategy use_cache",
}
# Further fields of TrainingArguments that change no result: they enter no fingerprint. All others
# do when they are set.
EXECUTION_OPTIONS = frozenset(
    [
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "run_name",
        "project",
        "debug",
        "skip_memory_metrics",
        "include_num_input_tokens_seen",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
    ]
)
# Schedules that have no defaults for all of their arguments.
NEED_ARGUMENTS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
EXECUTION_PREFIXES = ("logging_", "log_", "ddp_", "trackio_")


class LoraConfig(Section):
    """Low-rank adapters to train instead of the weights."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Rank of each adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers to adapt; empty adapts all linear layers except the head."""


class OptimizationConfig(Section, CompletionSettings):
    """Settings that both training runs have."""

    model_config = ConfigDict(extra="allow")

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    """Learning rate schedule of transformers; `lr_scheduler_kwargs` passes its arguments.
    `constant` has no warm-up."""
    warmup_steps: float = Field(default=0.1, ge=0)
    """Warm-up from 0: a fraction of all steps if below 1, else a number of steps."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; ignored if max_steps is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Total number of optimizer steps; null trains for num_train_epochs."""
    prompts_per_step: int = Field(default=128, ge=1, lt=2**31)
    """Prompts, each with all its completions, in one optimizer step over all processes."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    bf16: bool = False
    """Matrix products in bfloat16; weights, gradients and the optimizer stay in float32."""
    gradient_checkpointing: bool | Literal["auto"] = execution_option("auto")
    """Recompute activations in the backward pass: less memory, a third more time. `auto` does so
    where a GPU's memory is too small without."""
    save_steps: int = execution_option(50, ge=1)
    """Steps between checkpoints."""
    save_total_limit: int = execution_option(2, ge=1)
    """Number of newest checkpoints to keep."""
    logging_steps: int = execution_option(1, ge=1)
    """Steps between rows of metrics."""
    processes: PositiveInt | Literal["auto"] = execution_option("auto")
    """Processes of this machine to train with, one per GPU. `auto` uses every visible GPU, or fewer
    if `prompts_per_step` is not a multiple of them; without a GPU, one process."""
    fsdp: bool = execution_option(False)
    """Shard weights, gradients and optimizer over the processes (FSDP) instead of DDP."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (`pip install 'qrpo-pipeline[peft]'`) instead of the weights; the
    model is saved merged, as an ordinary model folder. Null for full fine-tuning."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the saved weights, which are trained in float32. `auto` is that of the starting
    model's files, or float32 if rounding would undo more than 5% of what training changed."""
    report_to: tuple[str, ...] = execution_option(())
    """Experiment trackers that transformers knows: `tensorboard`, `wandb`, `trackio`, ..."""

    @model_validator(mode="after")
    def _check_further(self) -> Self:
        if self.model_extra:
            further = _further_arguments(type(self).__name__, self.model_extra)
            object.__setattr__(self, "__pydantic_extra__", further)
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise ValueError(
                f"warmup_steps: got {self.warmup_steps}, expected a fraction below 1 or whole steps"
            )
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.processes != "auto" and self.prompts_per_step % self.processes:
            raise ValueError(
                f"prompts_per_step is {self.prompts_per_step}, expected a multiple of the {self.processes} processes"
            )
        if self.weights == "bfloat16" and not (self.bf16 and self.processes in ("auto", 1)):
            raise ValueError("weights: bfloat16 needs bf16: true, and one process")
        if self.lora is not None and self.fsdp:
            raise ValueError(
                "lora: cannot be merged from sharded weights; set fsdp to false, adapters need little memory"
            )
        return self

    def idle_fields(self) -> frozenset[str]:
        """Settings without an effect."""
        used = {
            "lora": self.lora is not None,
            "save_dtype": self.save_dtype != "auto",
            "weights": self.weights != "float32",
        }
        return frozenset(name for name, is_used in used.items() if not is_used)

    @property
    def further(self) -> dict[str, Any]:
        """The fields of `TrainingArguments` that are set beyond the declared ones."""
        return self.model_extra or {}

    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """Precision of the matrix products."""
        return "bfloat16" if self.bf16 else "float16" if self.further.get("fp16") else "float32"

    @property
    def needs_check(self) -> bool:
        """Whether only the optimizer or the schedule can tell if they take these settings; see
        `qrpo.training.trainer_arguments.check_arguments`."""
        return bool(self.further) or self.lr_scheduler_type in NEED_ARGUMENTS

    def fingerprint_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The keys of earlier versions, so that their artifacts are found, and what else was set
        that changes results."""
        names = {"num_train_epochs": "epochs", "lr_scheduler_type": "lr_scheduler", "warmup_steps": "warmup"}
        renamed = {names.get(name, name): value for name, value in settings.items() if name != "bf16"}
        return {**renamed, "dtype": self.dtype}

    def further_settings(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` that were set and change results."""
        return {name: value for name, value in self.further.items() if not _is_execution_option(name)}


class SftConfig(OptimizationConfig):
    """How the reference policy is fine-tuned."""

    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate."""


class PolicyConfig(OptimizationConfig, QRPOSettings):
    """How the policy is trained."""

    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    seed: Seed | None = None
    """Seed of the training; null for the run's seed. Another seed reuses the shards."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training prompts to hold out, by a hash of the prompt, and to report the loss
    on (`eval_loss`) during training. The `evaluation` stage judges the policy on samples
    instead."""
    eval_steps: int = Field(default=50, ge=1)
    """Steps between evaluations of the held-out loss."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between models that stay in the policy's artifact, for `qrpo evaluate --checkpoint`;
    null keeps none."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.patience is not None and not self.eval_fraction:
            raise ValueError("patience: needs a held-out loss, and eval_fraction is 0")
        return self

    @field_validator("transform")
    @classmethod
    def _known_transform(cls, name: str) -> str:
        try:
            get_transform(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    @property
    def uses_quantiles(self) -> bool:
        """Whether the loss reads quantile rewards."""
        return self.loss == "qrpo" or (self.loss == "rebel" and self.rebel_reward == "quantile_reward")

    def idle_fields(self) -> frozenset[str]:
        """Settings that this loss ignores."""
        used = {
            "beta": self.loss != "sft",
            "transform": self.uses_quantiles,
            "partition": self.loss == "qrpo",
            "loss_type": self.loss == "qrpo" and self.loss_type != "mse",
            "mean_ref_std": self.uses_quantiles and self.mean_ref_std is not None,
            "pairs": self.loss != "qrpo",
            "rebel_reward": self.loss == "rebel",
            "gamma_beta_ratio": self.loss == "simpo",
            "eval_fraction": self.eval_fraction > 0,
            "eval_steps": self.patience is not None,
            "patience": self.patience is not None,
            "checkpoint_steps": self.checkpoint_steps is not None,
        }
        return super().idle_fields() | {name for name, is_used in used.items() if not is_used}

    def columns(self) -> tuple[str, ...]:
        """The columns of a training shard that this loss reads."""
        common = ("prompt_id", "prompt_token_ids", "completion_token_ids", "ref_logprob")
        quantiles = ("quantile_reward", "num_ref", "ref_std") if self.uses_quantiles else ()
        pairs = () if self.loss == "qrpo" else ("reward", "origin", "sample_index")
        return (*common, *quantiles, *pairs)


def _further_arguments(section: str, given: dict[str, Any]) -> dict[str, Any]:
    """These fields of `TrainingArguments`, validated; a ValidationError names each that is unknown,
    refused or of the wrong type."""
    refused = {name: instead for instead, names in REFUSED.items() for name in names.split()}
    known: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    if any(name not in RENAMED and name not in refused for name in given):
        from transformers import TrainingArguments

        known = get_type_hints(TrainingArguments)
        defaults = {field.name: field.default for field in fields(TrainingArguments)}
    checked, errors = {}, []
    for name, value in given.items():
        kind: Any = "extra_forbidden"
        if name in RENAMED:
            kind = _error(f"this key was replaced by {RENAMED[name]}")
        elif name in refused:
            kind = _error(f"not available here; {refused[name]}")
        elif name in known:
            try:
                valid = _validated(known[name], value)
                if valid == defaults[name]:  # written out, a default changes no fingerprint
                    continue
                checked[name] = valid
                if not (isinstance(valid, (int, float)) and valid < 0):
                    continue
                kind = _error("must not be negative")  # some fail only in the first step
            except ValidationError as error:
                kind = _error(error.errors()[0]["msg"])
        errors.append(InitErrorDetails(type=kind, loc=(name,), input=value))
    if errors:
        raise ValidationError.from_exception_data(section, errors)
    return checked


def _error(message: str) -> PydanticCustomError:
    return PydanticCustomError("training_argument", "{message}", {"message": message})


def _validated(annotation: Any, value: Any) -> Any:
    """A value of a field of `TrainingArguments` as plain YAML has it; names of an enumeration must
    be among its values."""
    enums = [kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, Enum)]
    finite = ConfigDict(allow_inf_nan=False)
    adapter = TypeAdapter(enums[0] if enums else annotation, config=finite)
    checked = adapter.validate_python(value, strict=not enums)
    return checked.value if isinstance(checked, Enum) else checked


def _is_execution_option(name: str) -> bool:
    return name in EXECUTION_OPTIONS or name.startswith(EXECUTION_PREFIXES)
