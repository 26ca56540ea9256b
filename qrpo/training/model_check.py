"""Whether a model can be trained on completions: refuse, freeze or warn before the first step."""

import logging
from typing import Any

import torch

from qrpo.errors import ConfigError

__all__ = ["check_model"]

log = logging.getLogger("qrpo")


def check_model(model: Any, learning_rate: float) -> None:
    """Raise ConfigError for prompt learning, freeze weights that text does not reach, and warn of
    weights that are too coarse to move."""
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise ConfigError(
                f"the adapter {name!r} is of type {config.peft_type.value}, which adds virtual tokens to the prompt: "
                "log-probabilities of completions do not see them. Use LoRA or another adapter inside the layers"
            )
    if model.config.get_text_config() is not model.config:
        _freeze_unreached(model)
    _warn_of_coarse_weights(model, learning_rate)


def _freeze_unreached(model: Any) -> None:
    """Freeze what a multimodal model has for other inputs: without gradients, for which DDP and
    FSDP would wait."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    reached = {id(weight) for part in parts for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in reached:
            weight.requires_grad_(False)


def _warn_of_coarse_weights(model: Any, learning_rate: float) -> None:
    """An optimizer such as Adam moves a weight by about the learning rate; a step below a quarter
    of the dtype's epsilon, relative to the weight, is rounded away."""
    stuck = total = 0
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            smallest = learning_rate * 4 / torch.finfo(weight.dtype).eps
            stuck += int((weight.detach().abs() > smallest).sum())
            total += weight.numel()
    if stuck > total / 2:
        log.warning(
            "at a learning rate of %g, %.0f%% of the weights in %s stay as they are, because a step is smaller than their "
            "precision: load the model with dtype=torch.float32, and set bf16=True to compute in bfloat16",
            learning_rate,
            100 * stuck / total,
            str(model.dtype).removeprefix("torch."),
        )
