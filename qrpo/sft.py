"""Supervised fine-tuning on completions: how a base model becomes the reference policy (the paper's "SFT on chosen").

    loss = - sum over a step's completion tokens of log pi(token) / number of those tokens

The same code as the policy's training: the same log-probabilities, micro-batches, checkpoints and exact resume. Prompt
tokens carry no loss.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qrpo.chat import load_tokenizer
from qrpo.models import ModelConfig
from qrpo.objectives import SftObjective
from qrpo.optimization import SftConfig
from qrpo.trainer import CompletionTrainer
from qrpo.training import load_policy, require_rows, run_training, stored_dtype

__all__ = ["train_sft"]


def train_sft(
    model: ModelConfig | str | Path,
    rows: Sequence[Mapping[str, Any]],
    config: SftConfig,
    output_dir: str | Path,
    *,
    resume: bool = True,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Fine-tune `model` on rows of `prompt_token_ids` and `completion_token_ids` (a list of token lists).

    Returns the folder `output_dir/final`; resumes and reports as `qrpo.policy.train_policy` does.
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
