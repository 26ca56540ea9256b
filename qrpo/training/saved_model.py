"""The models that a run saves: ordinary folders, in a precision that keeps what training changed.

Weights are trained in float32. Small updates vanish if they are rounded to the bfloat16 of the
starting model's files: at a learning rate of 1e-7 about nine tenths of the change in
log-probability, at 1e-6 a tenth to a third, at 1e-5 next to nothing. So each model is measured
before it is written: the log-probabilities of some rows before training, now, and with rounded
weights.
"""

import copy
import json
import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from qrpo.models import ModelConfig, load_model_config, saved_dtype
from qrpo.training.adapters import merged
from qrpo.training.checkpoints import UNFINISHED, write_error
from qrpo.training.rows import flatten_rows, take
from qrpo.training.sharding import whole_weights
from qrpo.training.trainer import CompletionTrainer

log = logging.getLogger("qrpo")

MAX_LOST = 0.05
"""Fraction of the mean change in log-probability that rounding may undo."""
MEASURED = 32  # completions
START = "start.json"  # log-probabilities before training, next to the checkpoints


class ModelSaver(TrainerCallback):  # type: ignore[misc]
    """Saves the models of a run, the intermediate ones of every `every` steps as a callback. It
    runs before the checkpoint of the same step, so a resumed run misses none."""

    def __init__(
        self,
        trainer: CompletionTrainer,
        model: ModelConfig,
        output_dir: Path,
        save_dtype: str,
        every: int | None = None,
    ) -> None:
        self._trainer, self._output_dir, self._every = trainer, output_dir, every
        self._config = load_model_config(model)
        name = saved_dtype(model) if save_dtype == "auto" else save_dtype
        self._dtype: torch.dtype = getattr(torch, name)
        self._decides = save_dtype == "auto"
        self._rounds = self._dtype in (torch.bfloat16, torch.float16)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the log-probabilities before training."""
        if self._rounds and state.global_step == 0:
            logprobs = self._logprobs(self._trainer.accelerator.unwrap_model(self._trainer.model))
            if args.should_save:
                self._output_dir.mkdir(parents=True, exist_ok=True)
                (self._output_dir / START).write_text(json.dumps(logprobs.tolist()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save an intermediate model."""
        if self._every is not None and state.global_step % self._every == 0:
            self.save(f"checkpoints/{state.global_step}", keep=True)

    def save(self, name: str, keep: bool = False) -> None:
        """Write the model, adapters merged, and its tokenizer to a temporary folder, then rename
        it; without `keep`, after which training cannot go on, also `metrics.parquet`. All ranks
        must call it."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        trained = self._logprobs(model) if self._rounds else None
        if keep and hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model)
        model = merged(model)
        dtype = self._dtype if trained is None else self._measure(model, trained)
        weights = whole_weights(model)
        if trainer.args.should_save:
            written, named = self._output_dir / UNFINISHED / name, self._output_dir / name
            try:
                if not keep:
                    _write_metrics(trainer.state.log_history, self._output_dir / "metrics.parquet")
                shutil.rmtree(written, ignore_errors=True)
                weights = {
                    name: weight.to("cpu", dtype if weight.is_floating_point() else weight.dtype)
                    for name, weight in weights.items()
                }
                model.save_pretrained(written, state_dict=weights)
                self._config.dtype = dtype  # the Trainer changed the model's own configuration
                self._config.architectures = self._config.architectures or model.config.architectures
                self._config.save_pretrained(written)
                if trainer.processing_class is not None:
                    trainer.processing_class.save_pretrained(written)
                shutil.rmtree(named, ignore_errors=True)
                named.parent.mkdir(exist_ok=True)
                written.rename(named)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise write_error(f"the model {name}", self._output_dir, error) from error
        trainer.accelerator.wait_for_everyone()

    def _measure(self, model: Any, trained: torch.Tensor) -> torch.dtype:
        """The precision to save in; logs what the narrow one loses."""
        weights = [getattr(weight, "_local_tensor", weight).detach() for weight in model.parameters()]
        backup = [weight.to("cpu", copy=True) for weight in weights]
        for weight in weights:
            weight.copy_(weight.to(self._dtype))
        lost = (self._logprobs(model) - trained).abs().mean().item()
        for weight, whole in zip(weights, backup, strict=True):
            weight.copy_(whole)
        logs, changed, start = {"saved_log_ratio/mean_abs": lost}, 0.0, self._output_dir / START
        if start.is_file():
            changed = (trained - torch.tensor(json.loads(start.read_text()))).abs().mean().item()
            logs["learned_log_ratio/mean_abs"] = changed
        should_log = self._trainer.control.should_log
        self._trainer.log(logs)
        self._trainer.control.should_log = should_log  # `log` clears it, and the step's loss would be lost
        if lost <= MAX_LOST * changed:
            return self._dtype
        dtype = torch.float32 if self._decides else self._dtype
        log.warning(
            "weights rounded to %s change log-probabilities by %.4g nats on average, training by %.4g: saved in %s%s",
            str(self._dtype).removeprefix("torch."),
            lost,
            changed,
            str(dtype).removeprefix("torch."),
            "" if self._decides else "; set save_dtype to `float32` to keep what was learned",
        )
        return dtype

    def _logprobs(self, model: Any) -> torch.Tensor:
        """Log-probabilities of some training rows, the same in every call, in the training
        precision. All ranks must call it."""
        dataset = self._trainer.train_dataset
        rows = dataset.iterate(0) if hasattr(dataset, "iterate") else iter(dataset)
        columns = flatten_rows([row for row in islice(rows, MEASURED) if len(row["completion_token_ids"])])
        columns = take(columns, range(min(MEASURED, len(columns["length"]))))
        return self._trainer.score(model, columns).float().cpu()


def _write_metrics(history: list[dict[str, float]], path: Path) -> None:
    import polars as pl

    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        by_step.setdefault(int(entry["step"]), {}).update(entry)
    names = dict.fromkeys(name for entry in history for name in entry)
    schema = {"step": pl.Int64} | {name: pl.Float64 for name in names if name != "step"}
    temporary = path.with_suffix(".tmp")
    pl.DataFrame([by_step[step] for step in sorted(by_step)], schema, strict=False).write_parquet(temporary)
    temporary.rename(path)
