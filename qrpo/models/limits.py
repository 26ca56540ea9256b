"""Which rows a model takes: how many tokens, and which. Asked before the work, so that a row that
does not fit is rejected alone."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrpo.errors import ConfigError, ModelError
from qrpo.models import ModelConfig, config_json, is_local, load_model_config


@dataclass(frozen=True)
class Limits:
    """Which rows a model takes."""

    max_length: int
    """Maximum number of tokens, prompt and completion together."""
    vocab_size: int
    """Token ids are below it."""

    def problem(self, token_ids: Sequence[int], max_tokens: int | None = None) -> str | None:
        """Why the model cannot read these tokens; None if it can.

        With `max_tokens`, they are a prompt that a completion of at most that number of tokens
        follows. (An engine refuses the whole call for one prompt that is too long or has an unknown
        token, and silently shortens the completion of a prompt that is nearly too long.)
        """
        length = len(token_ids)
        if length == 0:
            return "the prompt has no tokens" if max_tokens is not None else "it has no tokens"
        if max_tokens is None and length > self.max_length:
            return f"the conversation has {length} tokens, but the reward model reads {self.max_length}"
        if max_tokens is not None and length + max_tokens > self.max_length:
            return (
                f"the prompt's {length} tokens and {max_tokens} for the completion (max_tokens) exceed the engine's "
                f"context of {self.max_length} tokens (max_model_len)"
            )
        return self.unknown_token(token_ids)

    def unknown_token(self, token_ids: Sequence[int]) -> str | None:
        """Names the largest token id if the model has no embedding for it."""
        if token_ids and not 0 <= (largest := max(token_ids)) < self.vocab_size:
            return f"a token id is outside the model's vocabulary of {self.vocab_size}: {largest}"
        return None


def model_limits(model: ModelConfig, max_length: int | None = None, setting: str = "max_model_len") -> Limits:
    """The limits of a model, with `max_length` tokens instead of its whole context if given.

    `setting` is the name of that setting. Raises ConfigError if it exceeds the context.
    """
    config = _text_config(model)
    context = _context(config)
    if context is None and max_length is None and setting is not None:
        raise ModelError(f"the configuration of {model.path} states no context length: set {setting}")
    if context is not None and max_length is not None and max_length > context:
        raise ConfigError(
            f"{setting}: got {max_length}, but {model.path} has a context of {context} tokens: lower it"
        )
    return Limits(max_length or context or sys.maxsize, int(config["vocab_size"]))


# Their position embeddings start after that of the padding token.
_POSITIONS_AFTER_PADDING = frozenset(
    [
        "camembert",
        "data2vec-text",
        "ibert",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)


def _text_config(model: ModelConfig) -> Mapping[str, Any]:
    """The configuration of the language model. Of a folder, `config.json` itself if it has what
    `model_limits` needs: that takes no import of transformers."""
    if is_local(model):
        stated = config_json(model)
        for section in (stated, stated.get("text_config") or {}):
            simple = section.get("model_type", "roberta") not in _POSITIONS_AFTER_PADDING
            if simple and {"max_position_embeddings", "vocab_size"} <= section.keys():
                return dict(section)
    return dict(load_model_config(model).get_text_config().to_dict())


def _context(config: Mapping[str, Any]) -> int | None:
    """The context of a text configuration; None if it states none."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    length: int | None = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if length is None:
        return None
    if config.get("model_type") in _POSITIONS_AFTER_PADDING:
        return int(length - config["pad_token_id"] - 1)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor") or 1.0
    if kind == "yarn":  # some files state the context before its extension, some the one after
        return max(length, int(factor * (rope.get("original_max_position_embeddings") or 0)))
    if kind in ("linear", "dynamic") and "gemma3" not in str(config.get("model_type")):
        return int(factor * length)
    return length
