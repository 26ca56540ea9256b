"""What every training run of the pipeline has in common: its restart after a kill, its progress, its result.

A run owns a folder:

    checkpoint-<step>/    to go on from after a kill; the newest whole one is used, broken ones are removed
    unfinished/           where the next checkpoint, or the final model, is being written
    checkpoints/<step>/   models on the way, kept to be evaluated
    metrics.parquet       one row per logged step
    final/                the trained model and its tokenizer, written last and named at once: when it is there, it is whole
"""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qrpo.data.chat import load_tokenizer
from qrpo.errors import DataError, TrainingError
from qrpo.models import ModelConfig, load_causal_lm, load_model_config
from qrpo.processes.preemption import noting_sigterm, sigterm_came
from qrpo.training.adapters import merged, with_lora
from qrpo.training.checkpoints import UNFINISHED, latest_checkpoint, remove_broken_checkpoints, unwritten
from qrpo.training.objectives import SftObjective
from qrpo.training.settings import PolicyConfig, SftConfig
from qrpo.training.trainer import CompletionTrainer, QRPOTrainer

__all__ = ["load_policy", "train_policy", "train_sft"]


def train_policy(
    model: ModelConfig | str | Path,
    dataset: Any,
    config: PolicyConfig,
    output_dir: str | Path,
    *,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
    mean_ref_std: float | None = None,
    resume: bool = True,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train the reference `model` into a policy on rows of shards; returns the folder `output_dir/final`.

    `dataset` is what `QRPOTrainer` takes: rows, or a reader with `iterate(epoch, start)` and a length. Killed at any
    moment, the same call goes on from its newest whole checkpoint (`resume`) and ends with the same weights. Writes
    `metrics.parquet` beside `final`, and `checkpoints/<step>` where `config.checkpoint_steps` asks for them. `eval_rows` are held out for `eval_loss`. `mean_ref_std` is needed by transforms that are scaled per prompt. Raises TrainingError where the reference does not match, or the loss is not finite.
    """
    require_rows(dataset)
    arguments = config.to_training_arguments(output_dir)
    arguments.mean_ref_std = mean_ref_std
    policy = load_policy(model)
    if config.lora is not None:
        policy = with_lora(policy, config.lora, arguments.seed)
    trainer = QRPOTrainer(
        policy,
        arguments,
        dataset,
        load_tokenizer(model if isinstance(model, ModelConfig) else str(model), chat_template=False),
        eval_dataset=eval_rows,
    )
    return run_training(
        trainer,
        Path(output_dir),
        resume=resume,
        stored_dtype=stored_dtype(model),
        on_progress=on_progress,
        checkpoint_steps=config.checkpoint_steps,
    )


def train_sft(
    model: ModelConfig | str | Path,
    rows: Sequence[Mapping[str, Any]],
    config: SftConfig,
    output_dir: str | Path,
    *,
    resume: bool = True,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Supervised fine-tuning: fit `model` to rows of `prompt_token_ids` and `completion_token_ids` (a list of token lists).

    Returns the folder `output_dir/final`; resumes and reports as `train_policy` does.
    """
    require_rows(rows)
    trainer = CompletionTrainer(
        load_policy(model),
        config.to_training_arguments(output_dir),
        rows,
        SftObjective(),
        load_tokenizer(model if isinstance(model, ModelConfig) else str(model), chat_template=False),
    )
    return run_training(
        trainer, Path(output_dir), resume=resume, stored_dtype=stored_dtype(model), on_progress=on_progress
    )


def load_policy(model: ModelConfig | str | Path, device: str | None = None) -> Any:
    """The model to train, or to score with as training does: float32 weights, in evaluation mode.

    Mixed precision needs float32 weights; a reference scored with them in the same autocast agrees with the policy at
    step 0. `device` is the first GPU where there is one, else the CPU.
    """
    config = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
    return load_causal_lm(config.model_copy(update={"dtype": "float32"}), device)


def run_training(
    trainer: CompletionTrainer,
    output_dir: Path,
    *,
    resume: bool,
    stored_dtype: torch.dtype | None,
    on_progress: Callable[[dict[str, Any]], None] | None,
    checkpoint_steps: int | None = None,
) -> Path:
    """Train to the end, from the newest whole checkpoint where `resume`; returns `output_dir/final`.

    Every `checkpoint_steps` steps the model is kept as `output_dir/checkpoints/<step>`. `on_progress` is called after each logged step with `step`, `total_steps`, `epoch`, `loss` and the other metrics.
    The final weights are saved in `stored_dtype` (float32 where None). A SIGTERM saves a checkpoint after the step at
    hand, then raises TrainingError, as does anything that keeps a checkpoint from being written. In a process that
    `torchrun` or `accelerate launch` started, this is one rank's part, and all ranks must call it.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Watcher(trainer, on_progress))
    if checkpoint_steps is not None:
        trainer.add_callback(_Keeper(trainer, output_dir, checkpoint_steps, stored_dtype))
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
            f"stopped by SIGTERM after step {step} of {steps}; its checkpoint is saved, and the same command goes on from it"
        )
    weights = _gathered(trainer)
    if trainer.args.should_save:
        try:
            _write_metrics(trainer.state.log_history, output_dir / "metrics.parquet")
            model = trainer.accelerator.unwrap_model(trainer.model)
            _save_model(trainer, model, output_dir, "final", stored_dtype, weights)
            shutil.rmtree(output_dir / UNFINISHED)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise unwritten("the trained model", output_dir, error) from error
    trainer.accelerator.wait_for_everyone()
    return output_dir / "final"


def stored_dtype(model: ModelConfig | str | Path) -> torch.dtype | None:
    """The precision of the weights in the model's own files, as its configuration states it."""
    config = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
    dtype = load_model_config(config).dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def require_rows(dataset: Any) -> None:
    """Raise DataError where a sized dataset has no rows."""
    if hasattr(dataset, "__len__") and not len(dataset):
        raise DataError("there are no rows to train on: look at the rejects of the stages before")


def _stopped(trainer: CompletionTrainer) -> bool:
    """Whether any process was sent a SIGTERM: all must stop after the same step."""
    came = torch.tensor(float(sigterm_came()), device=trainer.args.device)
    return bool(trainer.accelerator.reduce(came, "sum") > 0)


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Passes progress on, stops after a SIGTERM, and logs with every checkpoint, so that a resumed run logs what an uninterrupted
    one does."""

    def __init__(
        self, trainer: CompletionTrainer, on_progress: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self.trainer = trainer
        self.on_progress = on_progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if _stopped(self.trainer):
            control.should_save = control.should_training_stop = True
        if (
            control.should_save or control.should_evaluate
        ):  # an evaluation may be the best so far, and be saved
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if self.on_progress is not None and state.is_world_process_zero and "loss" in logs:
            self.on_progress({"step": state.global_step, "total_steps": state.max_steps, **logs})


class _Keeper(TrainerCallback):  # type: ignore[misc]
    """Keeps the model of every so many steps. It comes before the checkpoint of the same step, so that going on from one misses none."""

    def __init__(
        self, trainer: CompletionTrainer, output_dir: Path, every: int, dtype: torch.dtype | None
    ) -> None:
        self.trainer, self.output_dir, self.every, self.dtype = trainer, output_dir, every, dtype

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every:
            return
        trainer, name = self.trainer, f"checkpoints/{state.global_step}"
        weights = _gathered(trainer)
        if args.should_save:
            model = trainer.accelerator.unwrap_model(trainer.model)
            if weights is None:
                model = copy.deepcopy(model)  # saving merges adapters and rounds: training needs it as it is
            try:
                _save_model(trainer, model, self.output_dir, name, self.dtype, weights)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise unwritten(f"the model of step {state.global_step}", self.output_dir, error) from error
        trainer.accelerator.wait_for_everyone()


def _gathered(trainer: CompletionTrainer) -> dict[str, torch.Tensor] | None:
    """The weights of a sharded model, on the first process; None where the model holds them itself."""
    if not trainer.is_fsdp_enabled:
        return None
    weights: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
    return weights


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
    trainer: CompletionTrainer,
    model: Any,
    output_dir: Path,
    name: str,
    dtype: torch.dtype | None,
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """Write the model, which is used up, and its tokenizer aside, then name them. `weights` are those of a model that is sharded."""
    written, named = output_dir / UNFINISHED / name, output_dir / name
    shutil.rmtree(written, ignore_errors=True)
    model = merged(model)
    if weights is not None and dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        model.config.dtype = dtype
    elif dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(written, state_dict=weights)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(written)
    shutil.rmtree(named, ignore_errors=True)
    named.parent.mkdir(exist_ok=True)
    written.rename(named)
