"""What every engine does with tokens: which of them end a completion, and what text they are."""

from collections.abc import Collection, Sequence
from typing import Any

from qrpo.data.chat import end_of_turn
from qrpo.engines.sampling import SamplingConfig
from qrpo.errors import ConfigError
from qrpo.models import ModelConfig, generation_config

_CONTEXT = 8  # tokens of the prompt that decide how the completion's first token is written


def stop_token_ids(tokenizer: Any, model: ModelConfig, sampling: SamplingConfig) -> frozenset[int]:
    """The token ids that end a completion: the end tokens of the tokenizer and of the generation
    config, the token that ends a turn in the chat template, and those that the settings name."""
    special = _special_tokens(tokenizer)
    ends = generation_config(model).eos_token_id
    found = {tokenizer.eos_token_id, end_of_turn(tokenizer), *sampling.stop_token_ids}
    found |= set(ends if isinstance(ends, list) else [ends]) - {None}
    if unknown := [token_id for token_id in sampling.stop_token_ids if token_id >= len(tokenizer)]:
        raise ConfigError(
            f"sampling.stop_token_ids: got {unknown[0]}, but the tokenizer of {model.path} has {len(tokenizer)} tokens"
        )
    return frozenset(found | {special[text] for text in sampling.stop if text in special})


def stop_strings(tokenizer: Any, sampling: SamplingConfig) -> list[str]:
    """The stop strings that are text. One that is a special token is a stop token; ConfigError for
    one that only contains a special token, since no completion's text does."""
    special = _special_tokens(tokenizer)
    strings = [text for text in sampling.stop if text not in special]
    for text in strings:
        if found := [token for token in special if token in text]:
            raise ConfigError(
                f"sampling.stop: {text!r} contains the special token {found[0]!r}, which a completion's text never has: "
                f"stop at {found[0]!r} alone"
            )
    return strings


def completion_text(
    tokenizer: Any,
    prompt_token_ids: Sequence[int],
    token_ids: Sequence[int],
    stops: Collection[int],
    strings: Sequence[str],
) -> str:
    """The text of a completion as it continues its prompt: without special tokens, without the stop
    token or string that ended it, and without the half of a character that the length limit cut."""
    ended = bool(token_ids) and token_ids[-1] in stops
    context, body = list(prompt_token_ids[-_CONTEXT:]), list(token_ids[:-1] if ended else token_ids)
    before, whole = _decode(tokenizer, context), _decode(tokenizer, context + body)
    text = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, body)
    cuts = [start for string in strings if (start := text.find(string)) >= 0]
    if cuts:
        return text[: min(cuts)]
    return text if ended else text.rstrip("\ufffd")


def _decode(tokenizer: Any, token_ids: list[int]) -> str:
    return tokenizer.decode(  # type: ignore[no-any-return]
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
