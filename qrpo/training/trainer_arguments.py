"""Arguments of the trainers: `transformers.TrainingArguments` with the settings of
`qrpo.training.arguments`."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from qrpo.errors import ConfigError
from qrpo.training.arguments import CompletionSettings, QRPOSettings, check_settings


@dataclass
class CompletionTrainingArguments(CompletionSettings, TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` of `CompletionTrainer`; a batch is counted in prompts."""

    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    logging_nan_inf_filter: bool = False
    save_total_limit: int | None = 2
    ddp_find_unused_parameters: bool | None = False
    accelerator_config: Any = None
    data_seed: int | None = None

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most one, so transformers never uses `nn.DataParallel`."""
        visible: int = super().n_gpu
        return min(1, visible)

    def __post_init__(self) -> None:
        check_settings(self)
        # Each rank reads its own rows, and their order is a function of the seed and the epoch.
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed


@dataclass
class QRPOConfig(QRPOSettings, CompletionTrainingArguments):
    """Arguments of `QRPOTrainer`: those of `transformers.TrainingArguments` and
    `qrpo.training.arguments.QRPOSettings`."""

    learning_rate: float = 1e-6

    def __post_init__(self) -> None:
        if self.patience is not None:
            self.metric_for_best_model, self.greater_is_better = "eval_loss", False
        super().__post_init__()
        # Set after transformers' check that save_steps fit eval_steps: every best evaluation is
        # saved anyway.
        if self.patience is not None:
            self.load_best_model_at_end = True


def training_arguments(config: Any, output_dir: str | Path, seed: int = 0) -> Any:
    """The arguments of the trainer for a section of `qrpo.training.settings`: `QRPOConfig` for the
    policy. Fields of the same name are passed on."""
    kind = QRPOConfig if isinstance(config, QRPOSettings) else CompletionTrainingArguments
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.prompts_per_step % world_size:
        raise ConfigError(
            f"prompts_per_step is {config.prompts_per_step}, expected a multiple of the {world_size} processes"
        )
    names = {field.name for field in fields(kind)}
    given = {name: value for name, value in config if name in names}
    given |= {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": config.prompts_per_step // world_size,
        "max_steps": config.max_steps or -1,
        "report_to": list(config.report_to) or "none",
        "fsdp": (config.fsdp and world_size > 1) or None,
        "seed": given.get("seed") if given.get("seed") is not None else seed,
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
    }
    return kind(**given)


def check_arguments(config: Any) -> None:
    """Raise ConfigError if the optimizer or the schedule that these settings give refuses them.

    A package that is missing here may be there where the training runs.
    """
    environment = dict(os.environ)  # TrainingArguments leaves settings there, for Accelerate to find
    one_process = {"fsdp": False} if isinstance(config, QRPOSettings) else {}
    try:
        arguments = training_arguments(config.model_copy(update=one_process), "unused")
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        steps = config.max_steps or 10 * max(10_000, int(config.warmup_steps))
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
        for _ in range(min(steps, 1000)):
            optimizer.step()
            schedule.step()
    except ImportError:
        return
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"transformers or torch refuses these settings together: {reason}") from error
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
