"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT.

The reference is the model with its adapters off. The adapters start with no effect, so a policy
starts as its reference, and precomputed reference log-probabilities are valid as in full
fine-tuning. Checkpoints hold the adapters only. The trained policy is saved merged into the
weights, an ordinary model folder that vLLM loads without PEFT.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qrpo.errors import ConfigError
from qrpo.training.settings import LoraConfig


def with_lora(model: Any, config: LoraConfig, seed: int, section: str = "policy") -> Any:
    """The model with new adapters without effect, drawn from the seed; its weights are frozen."""
    try:
        import peft
    except ImportError:
        raise ConfigError(
            f"{section}.lora needs PEFT, which is not installed: pip install 'qrpo-pipeline[peft]'"
        ) from None
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or "all-linear",
    )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # refused below
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:  # no layer has such a name
            raise ConfigError(f"{section}.lora.target_modules: {error}") from None
    if tied and (model.get_output_embeddings() is not head or model.get_input_embeddings() is not embedding):
        raise ConfigError(
            f"{section}.lora.target_modules: it names the head or the embedding, which have one weight in this model: merged, the adapter "
            "of one would change the other too. Leave them out of target_modules"
        )
    return adapted


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """A context in which a PEFT model computes as its base; any other model is unchanged."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def merged(model: Any) -> Any:
    """A PEFT model's base with the adapters added to its weights, which changes the model; any
    other model as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
