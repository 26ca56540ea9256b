"""Training runs of the pipeline: their restart after a kill, their progress, their result.

A run owns a folder:

    checkpoint-<step>/    to resume from after a kill; the newest complete one is used, broken ones are removed
    unfinished/           the checkpoint or model that is being written
    checkpoints/<step>/   models of intermediate steps, kept for evaluation
    metrics.parquet       one row per logged step
    final/                the trained model and its tokenizer; renamed to this last, so it is always complete
"""

import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, get_scheduler

from qrpo.data.chat import load_tokenizer
from qrpo.errors import ConfigError, DataError, TrainingError
from qrpo.models import ModelConfig, load_causal_lm, load_model_config
from qrpo.processes.preemption import noting_sigterm, sigterm_came
from qrpo.training.adapters import merged, with_lora
from qrpo.training.checkpoints import UNFINISHED, latest_checkpoint, remove_broken_checkpoints, write_error
from qrpo.training.objectives import SftObjective
from qrpo.training.settings import OptimizationConfig, PolicyConfig, SftConfig
from qrpo.training.trainer import CompletionTrainer, CompletionTrainingArguments, QRPOConfig, QRPOTrainer

__all__ = ["check_arguments", "load_policy", "train_policy", "train_sft", "training_arguments"]

OnProgress = Callable[[dict[str, Any]], None]


def training_arguments(config: OptimizationConfig, output_dir: str | Path, seed: int = 0) -> Any:
    """The arguments of the trainer for a YAML section: `QRPOConfig` for the policy. Fields of the
    same name are passed on."""
    kind = QRPOConfig if isinstance(config, PolicyConfig) else CompletionTrainingArguments
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
        "fsdp": given.get("fsdp") or None,
        "seed": given.get("seed") if given.get("seed") is not None else seed,
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
    }
    return kind(**given)


def check_arguments(config: OptimizationConfig) -> None:
    """Raise ConfigError if the optimizer or the schedule that these settings give refuses them.

    A package that is missing here may be there where the training runs.
    """
    environment = dict(os.environ)  # TrainingArguments leaves settings there, for Accelerate to find
    one_process = {"fsdp": False} if isinstance(config, PolicyConfig) else {}
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


def train_policy(
    model: ModelConfig | str | Path,
    dataset: Any,
    config: PolicyConfig,
    output_dir: str | Path,
    *,
    seed: int = 0,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
    resume: bool = True,
    on_progress: OnProgress | None = None,
) -> Path:
    """Train the reference `model` into a policy on rows of shards; returns the folder
    `output_dir/final`.

    `dataset` is what `QRPOTrainer` takes: rows, or a reader with `iterate(epoch, start)` and a
    length. `seed` is used if the section has none. `eval_rows` are held out for `eval_loss`. If the
    run is killed, the same call resumes from its newest complete checkpoint (`resume`) and ends
    with the same weights. Writes `metrics.parquet` next to `final`, and `checkpoints/<step>` if
    `config.checkpoint_steps` is set. Raises TrainingError if the reference does not match, or if
    the loss is not finite.
    """
    arguments = training_arguments(config, output_dir, seed)
    if eval_rows:
        arguments.eval_strategy = "steps"
    policy = load_policy(model)
    if config.lora is not None:
        policy = with_lora(policy, config.lora, arguments.seed)
    require_rows(dataset)
    trainer = QRPOTrainer(policy, arguments, dataset, _tokenizer(model), eval_dataset=eval_rows)
    return run_training(trainer, model, Path(output_dir), resume, on_progress, config.checkpoint_steps)


def train_sft(
    model: ModelConfig | str | Path,
    rows: Sequence[Mapping[str, Any]],
    config: SftConfig,
    output_dir: str | Path,
    *,
    seed: int = 0,
    resume: bool = True,
    on_progress: OnProgress | None = None,
) -> Path:
    """Supervised fine-tuning of `model` on rows of `prompt_token_ids` and `completion_token_ids` (a
    list of token lists).

    Returns the folder `output_dir/final`; resumes and reports as `train_policy` does.
    """
    require_rows(rows)
    arguments = training_arguments(config, output_dir, seed)
    trainer = CompletionTrainer(
        load_policy(model), arguments, rows, SftObjective(), processing_class=_tokenizer(model)
    )
    return run_training(trainer, model, Path(output_dir), resume, on_progress)


def load_policy(model: ModelConfig | str | Path, device: str | None = None) -> Any:
    """The model to train, or to score with as training does: float32 weights, in evaluation mode.

    Mixed precision needs float32 weights; a reference scored with them in the same autocast agrees
    with the policy at step 0. `device` defaults to the first GPU, or the CPU if there is none.
    """
    return load_causal_lm(_model_config(model).model_copy(update={"dtype": "float32"}), device)


def run_training(
    trainer: CompletionTrainer,
    model: ModelConfig | str | Path,
    output_dir: Path,
    resume: bool,
    on_progress: OnProgress | None,
    checkpoint_steps: int | None = None,
) -> Path:
    """Train to the end, from the newest complete checkpoint if `resume`; returns
    `output_dir/final`.

    Every `checkpoint_steps` steps the model is kept as `output_dir/checkpoints/<step>`.
    `on_progress` is called after each logged step with `step`, `total_steps`, `epoch`, `loss` and
    the other metrics. The final weights are saved in the precision of the files of `model`. A
    SIGTERM saves a checkpoint after the current step, then raises TrainingError, as does a
    checkpoint that cannot be written. In a process that `torchrun` or `accelerate launch` started,
    this is one rank's part, and all ranks must call it.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    dtype = load_model_config(_model_config(model)).dtype
    trainer.add_callback(_ReportAndStop(trainer, on_progress))
    if checkpoint_steps is not None:
        trainer.add_callback(_KeepModels(trainer, output_dir, checkpoint_steps, dtype))
    if trainer.args.should_save:
        remove_broken_checkpoints(output_dir)
        if not resume:
            for path in (*output_dir.glob("checkpoint-*"), *output_dir.glob("checkpoints")):
                shutil.rmtree(path)
    trainer.accelerator.wait_for_everyone()
    checkpoint = latest_checkpoint(output_dir)
    with noting_sigterm():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if _stopped(trainer) and step < steps:
        raise TrainingError(
            f"stopped by SIGTERM after step {step} of {steps}; its checkpoint is saved, and the same command resumes from it"
        )
    _save_model(trainer, output_dir, "final", dtype)
    if trainer.args.should_save:
        shutil.rmtree(output_dir / UNFINISHED)
    trainer.accelerator.wait_for_everyone()
    return output_dir / "final"


def require_rows(dataset: Any) -> None:
    """Raise DataError if a sized dataset has no rows."""
    if hasattr(dataset, "__len__") and not len(dataset):
        raise DataError("there are no rows to train on: look at the rejects of the earlier stages")


def _model_config(model: ModelConfig | str | Path) -> ModelConfig:
    return model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))


def _tokenizer(model: ModelConfig | str | Path) -> Any:
    return load_tokenizer(model if isinstance(model, ModelConfig) else str(model), chat_template=False)


def _stopped(trainer: CompletionTrainer) -> bool:
    """Whether any process received a SIGTERM: all must stop after the same step."""
    came = torch.tensor(float(sigterm_came()), device=trainer.args.device)
    return bool(trainer.accelerator.reduce(came, "sum") > 0)


class _ReportAndStop(TrainerCallback):  # type: ignore[misc]
    """Reports progress, stops after a SIGTERM, and logs with every checkpoint, so that a resumed
    run logs the same steps as an uninterrupted one."""

    def __init__(self, trainer: CompletionTrainer, on_progress: OnProgress | None) -> None:
        self.trainer = trainer
        self.on_progress = on_progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if _stopped(self.trainer):
            control.should_save = control.should_training_stop = True
        if control.should_save or control.should_evaluate:  # a best evaluation saves a checkpoint
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if self.on_progress is not None and state.is_world_process_zero and "loss" in logs:
            self.on_progress({"step": state.global_step, "total_steps": state.max_steps, **logs})


class _KeepModels(TrainerCallback):  # type: ignore[misc]
    """Keeps the model of every N-th step. It runs before the checkpoint of the same step, so a
    resumed run misses none."""

    def __init__(self, trainer: CompletionTrainer, output_dir: Path, every: int, dtype: Any) -> None:
        self.trainer, self.output_dir, self.every, self.dtype = trainer, output_dir, every, dtype

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            name = f"checkpoints/{state.global_step}"
            _save_model(self.trainer, self.output_dir, name, self.dtype, keep=True)


def _write_metrics(history: list[dict[str, float]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        by_step.setdefault(int(entry["step"]), {}).update(entry)
    rows = [by_step[step] for step in sorted(by_step)]
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {
        name: pa.array([row.get(name) for row in rows], pa.int64() if name == "step" else pa.float64())
        for name in ("step", *(name for name in names if name != "step"))
    }
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.rename(path)


def _save_model(
    trainer: CompletionTrainer, output_dir: Path, name: str, dtype: Any, keep: bool = False
) -> None:
    """Write the model and its tokenizer to a temporary folder, then rename it.

    Merges adapters and rounds weights to `dtype`; with `keep` in a copy, so that training can go
    on, else with the run's metrics. All ranks must call it.
    """
    sharded = trainer.is_fsdp_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if trainer.args.should_save:
        written, named = output_dir / UNFINISHED / name, output_dir / name
        model = trainer.accelerator.unwrap_model(trainer.model)
        if keep and not sharded:
            model = copy.deepcopy(model)
        try:
            if not keep:
                _write_metrics(trainer.state.log_history, output_dir / "metrics.parquet")
            shutil.rmtree(written, ignore_errors=True)
            model = merged(model)
            if weights is not None and isinstance(dtype, torch.dtype):
                weights = {name: weight.to(dtype) for name, weight in weights.items()}
                model.config.dtype = dtype
            elif isinstance(dtype, torch.dtype):
                model = model.to(dtype)
            model.save_pretrained(written, state_dict=weights)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(written)
            shutil.rmtree(named, ignore_errors=True)
            named.parent.mkdir(exist_ok=True)
            written.rename(named)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise write_error(f"the model {name}", output_dir, error) from error
    trainer.accelerator.wait_for_everyone()
