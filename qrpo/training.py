"""What every training run of the pipeline has in common: its restart after a kill, its progress, its result.

A run owns a folder:

    checkpoint-<step>/    to go on from after a kill; the newest whole one is used, broken ones are removed
    metrics.parquet       one row per logged step
    final/                the trained model and its tokenizer, written last and named at once: when it is there, it is whole
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qrpo.checkpoints import latest_checkpoint, remove_broken_checkpoints
from qrpo.errors import DataError
from qrpo.models import ModelConfig, load_causal_lm, load_model_config

if TYPE_CHECKING:
    from qrpo.trainer import CompletionTrainer

__all__ = ["load_policy", "run_training"]


def load_policy(model: ModelConfig | str | Path, device: str | None = None) -> Any:
    """The model to train, or to score with as training does: float32 weights, in evaluation mode.

    Mixed precision needs float32 weights; a reference scored with them in the same autocast agrees with the policy at
    step 0. `device` is the first GPU where there is one, else the CPU.
    """
    config = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
    return load_causal_lm(config.model_copy(update={"dtype": "float32"}), device)


def run_training(
    trainer: "CompletionTrainer",
    output_dir: Path,
    *,
    resume: bool,
    stored_dtype: torch.dtype | None,
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> Path:
    """Train to the end, from the newest whole checkpoint where `resume`; returns `output_dir/final`.

    `on_progress` is called after each logged step with `step`, `total_steps`, `epoch`, `loss` and the other metrics.
    The final weights are saved in `stored_dtype` (float32 where None).
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Watcher(on_progress))
    remove_broken_checkpoints(output_dir)
    checkpoint = latest_checkpoint(output_dir) if resume else None
    if not resume:
        for path in output_dir.glob("checkpoint-*"):
            shutil.rmtree(path)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.args.should_save:
        _write_metrics(trainer.state.log_history, output_dir / "metrics.parquet")
        _save_final(trainer, output_dir / "final", stored_dtype)
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


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Passes progress on, and logs with every checkpoint, so that a resumed run logs what an uninterrupted one does."""

    def __init__(self, on_progress: Callable[[dict[str, Any]], None] | None) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if control.should_save:
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if self.on_progress is not None and state.is_world_process_zero and "loss" in logs:
            self.on_progress({"step": state.global_step, "total_steps": state.max_steps, **logs})


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


def _save_final(trainer: "CompletionTrainer", folder: Path, dtype: torch.dtype | None) -> None:
    temporary = folder.with_name("final.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(temporary)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
