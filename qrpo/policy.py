"""The pipeline's last step of computation: shards of quantile rewards and reference log-probabilities become a policy."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qrpo.adapters import with_lora
from qrpo.chat import load_tokenizer
from qrpo.models import ModelConfig
from qrpo.optimization import PolicyConfig
from qrpo.trainer import QRPOTrainer
from qrpo.training import load_policy, require_rows, run_training, stored_dtype

__all__ = ["train_policy"]


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
