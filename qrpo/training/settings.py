"""The settings of the two training runs: the reference's supervised fine-tuning, and the policy's.

Apart from the trainers so that a configuration is read, checked and shown without loading torch.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from qrpo.config import Section, execution_option
from qrpo.errors import ConfigError
from qrpo.method.transforms import get_transform

if TYPE_CHECKING:
    from qrpo.training.trainer import CompletionTrainingArguments, QRPOConfig

__all__ = ["LoraConfig", "OptimizationConfig", "PolicyConfig", "SftConfig"]


class OptimizationConfig(Section):
    """The settings that any gradient descent on completions needs."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate goes after the warm-up: it stays, or falls to 0 at the last step."""
    warmup: float = Field(default=0.1, ge=0)
    """Warm-up from 0: a share of all steps below 1, a number of steps from 1 on."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data; ignored where max_steps is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all."""
    prompts_per_step: int = Field(default=128, ge=1)
    """Prompts, each with all its completions, in one optimizer step, over all processes."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    bad_step: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite, or whose loss has exploded: stop and name its prompts, or leave it out."""
    max_loss_growth: float | None = Field(default=1000.0, gt=1)
    """A loss this many times the largest of the first 10 logged has exploded; null for never."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products. Weights, gradients and the optimizer stay in float32 (mixed precision)."""
    token_budget: int = execution_option(8192, ge=1)
    """Most tokens of one forward pass, padding included. Bounds the memory."""
    share_prompts: bool = execution_option(True)
    """Compute a prompt once for all its completions where that changes nothing but rounding and saves a tenth of the tokens."""
    gradient_checkpointing: bool = execution_option(False)
    """Recompute activations in the backward pass: less memory, a third more time."""
    save_steps: int = execution_option(50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = execution_option(2, ge=1)
    """Newest checkpoints kept."""
    logging_steps: int = execution_option(1, ge=1)
    """Steps between rows of metrics."""
    report_to: tuple[str, ...] = execution_option(())
    """Trackers that transformers knows: `tensorboard`, `wandb`, `mlflow`, `trackio`, ..."""

    _seed: int = PrivateAttr(default=0)

    def with_seed(self, seed: int) -> Self:
        """The same settings with the run's seed, which decides the order of the rows and any dropout."""
        copy = self.model_copy()
        copy._seed = seed
        return copy

    def arguments(self, output_dir: Path) -> dict[str, Any]:
        """The same settings as keyword arguments of `transformers.TrainingArguments`."""
        from torch import accelerator

        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.prompts_per_step % world_size:
            raise ConfigError(
                f"prompts_per_step is {self.prompts_per_step}, expected a multiple of the {world_size} processes"
            )
        return {
            "output_dir": str(output_dir),
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler,
            "warmup_steps": self.warmup,
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "per_device_train_batch_size": self.prompts_per_step // world_size,
            "gradient_accumulation_steps": 1,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "bad_step": self.bad_step,
            "max_loss_growth": float("inf") if self.max_loss_growth is None else self.max_loss_growth,
            "bf16": self.dtype == "bfloat16",
            "use_cpu": not accelerator.is_available(),
            "seed": self._seed,
            "token_budget": self.token_budget,
            "share_prompts": self.share_prompts,
            "gradient_checkpointing": self.gradient_checkpointing,
            "save_strategy": "steps",
            "save_steps": self.save_steps,
            "save_total_limit": self.keep_checkpoints,
            "logging_strategy": "steps",
            "logging_steps": self.logging_steps,
            "report_to": list(self.report_to) or "none",
            "disable_tqdm": True,
        }


class SftConfig(OptimizationConfig):
    """How the reference policy is fine-tuned."""

    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW."""

    def to_training_arguments(self, output_dir: str | Path) -> "CompletionTrainingArguments":
        """The same settings for `qrpo.training.trainer.CompletionTrainer`."""
        from qrpo.training.trainer import CompletionTrainingArguments

        return CompletionTrainingArguments(**self.arguments(Path(output_dir)))


class LoraConfig(Section):
    """Low-rank adapters to train instead of the weights."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get one; by default all linear layers but the head."""


class PolicyConfig(OptimizationConfig):
    """How the policy is trained."""

    loss: Literal["qrpo", "dpo", "rebel", "simpo", "sft"] = "qrpo"
    """The objective: QRPO, one of the pairwise losses it is compared with, or maximum likelihood of chosen completions."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the KL penalty to the reference; `qrpo theory` says what each value promises for QRPO. For SimPO, which has
    no reference, the scale of its rewards, usually 2 to 10. Idle for `sft`."""
    transform: str = "identity"
    """f, applied to the quantile reward before the objective; a name that `qrpo theory` lists."""
    partition: Literal["continuous", "finite"] = "continuous"
    """Z for a quantile reward uniform on [0, 1], or on the num_ref + 1 values that an estimate can take."""
    pairs: Literal["best-worst", "random", "dataset"] = "best-worst"
    """Idle for `qrpo`. Of a prompt's completions, which are the chosen and the rejected one: the best and the worst reward, two at
    random in each epoch, or the dataset's own preference (`quantiles.train_on: offline` or `both`). `sft` learns the chosen one."""
    rebel_reward: Literal["reward", "quantile_reward"] = "reward"
    """What `rebel` regresses differences of: the reward itself, or the transformed quantile reward."""
    gamma_beta_ratio: float = Field(default=0.5, ge=0)
    """SimPO's target margin, as a share of beta."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate of AdamW."""
    seed: int | None = None
    """Seed of the training run alone; null for the run's own. With another one the same shards are trained on again."""
    processes: int = execution_option(1, ge=1)
    """Processes of this machine to train with, one for each GPU; `prompts_per_step` is over all of them."""
    fsdp: bool = execution_option(False)
    """Shard weights, gradients and optimizer over the processes (FSDP) instead of each having all (DDP)."""
    lora: LoraConfig | None = None
    """Train low-rank adapters (`pip install 'qrpo-pipeline[peft]'`) instead of the weights; the policy is saved merged, an ordinary model
    folder. Null for full fine-tuning."""
    eval_shards: int = Field(default=0, ge=0)
    """Hold this many shards out of training, the last ones, and report the loss on them (`eval_loss`) as training goes on. Fresh
    samples of the policy are the `evaluation` stage's."""
    eval_steps: int = Field(default=50, ge=1)
    """Steps between such reports."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many reports in a row without a lower `eval_loss`; the policy is the one that had the lowest. Null: never."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Steps between models on the way that stay in the policy's artifact, for `qrpo evaluate --checkpoint`; null: none stay."""
    max_initial_log_ratio: float | None = execution_option(None, gt=0)
    """Largest mean |log pi - log ref| per square root of a token before the first step; by default, what rounding
    explains in the dtype."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.patience is not None and not self.eval_shards:
            raise ValueError("patience: needs a held-out loss, and eval_shards is 0")
        if self.lora is not None and self.fsdp:
            raise ValueError(
                "lora: cannot be merged from sharded weights; use fsdp: false, as adapters need little memory"
            )
        return self

    @field_validator("transform")
    @classmethod
    def _known_transform(cls, name: str) -> str:
        try:
            get_transform(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    def idle_fields(self) -> frozenset[str]:
        """Settings that this loss does not look at."""
        regresses_quantiles = self.loss == "rebel" and self.rebel_reward == "quantile_reward"
        used = {
            "beta": self.loss != "sft",
            "transform": self.loss == "qrpo" or regresses_quantiles,
            "partition": self.loss == "qrpo",
            "pairs": self.loss != "qrpo",
            "rebel_reward": self.loss == "rebel",
            "gamma_beta_ratio": self.loss == "simpo",
            "lora": self.lora is not None,
            "eval_shards": self.eval_shards > 0,
            "eval_steps": self.patience is not None,
            "patience": self.patience is not None,
            "checkpoint_steps": self.checkpoint_steps is not None,
        }
        return frozenset(name for name, is_used in used.items() if not is_used)

    def columns(self) -> tuple[str, ...]:
        """The columns of a training shard that this loss reads."""
        common = ("prompt_id", "prompt_token_ids", "completion_token_ids", "ref_logprob")
        quantiles = ("quantile_reward", "num_ref", "ref_std") if "transform" not in self.idle_fields() else ()
        pairs = () if self.loss == "qrpo" else ("reward", "origin", "sample_index")
        return (*common, *quantiles, *pairs)

    def to_training_arguments(self, output_dir: str | Path) -> "QRPOConfig":
        """The same settings for `qrpo.training.trainer.QRPOTrainer`."""
        from qrpo.training.trainer import QRPOConfig

        return QRPOConfig(
            **self.arguments(Path(output_dir)),
            loss=self.loss,
            pairs=self.pairs,
            rebel_reward=self.rebel_reward,
            gamma_beta_ratio=self.gamma_beta_ratio,
            beta=self.beta,
            transform=self.transform,
            partition=self.partition,
            max_initial_log_ratio=self.max_initial_log_ratio,
            fsdp=self.fsdp or None,
            eval_strategy="steps" if self.eval_shards else "no",
            eval_steps=self.eval_steps,
            patience=self.patience,
        )
