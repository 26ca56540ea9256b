"""Messages to token ids and back, by the model's own chat template, the one way that every stage uses.

A prompt's ids end where the assistant's turn begins; a completion's ids follow them, up to and including the token
that ends the turn, just as an engine samples them. Prompt and completion are encoded apart and put together, never
cut out of one encoding, because a tokenizer may merge text across the border. The template alone decides about the
beginning-of-sequence token: no tokenizer adds a second one here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig, is_local, location, require_model

__all__ = [
    "Messages",
    "encode_completion",
    "encode_conversation",
    "encode_conversations",
    "encode_prompt",
    "foreign_tokens",
    "load_tokenizer",
]

Messages = Sequence[Mapping[str, str]]
"""A conversation: mappings with `role` and `content`."""


def load_tokenizer(model: ModelConfig | str, *, chat_template: bool = True) -> Any:
    """The model's fast tokenizer; ModelError where it, or its chat template unless not needed, is missing."""
    if isinstance(model, str):
        model = ModelConfig(path=model)
    require_model(model)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location(model), revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = (
            "save it into the folder with `tokenizer.save_pretrained(...)`"
            if is_local(model)
            else "check the id"
        )
        raise ModelError(f"no usable tokenizer in {model.path}: {first}. Remedy: {remedy}") from error
    if not len(tokenizer):
        raise ModelError(
            f"{model.path} has no tokenizer files: save them into the folder with `tokenizer.save_pretrained(...)`"
        )
    if chat_template and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {model.path} has no chat template, so messages cannot become a prompt: put a "
            "`chat_template.jinja` into the folder, best the one that the model was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.path} has no end-of-sequence token: set `eos_token` and save it"
        )
    return tokenizer


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of the conversation so far, up to where the assistant begins to speak."""
    return _encode(tokenizer, _render(tokenizer, messages, generation=True))


def encode_completion(tokenizer: Any, messages: Messages, text: str) -> list[int]:
    """Token ids that follow `encode_prompt(tokenizer, messages)` when the assistant says `text`, end token included.

    Checked: prompt ids and completion ids together decode to what the template renders for the whole conversation,
    up to the end token, which is the first special token after the text. Where the template ends the turn without
    one, the tokenizer's end-of-sequence token is added, since it is what ends a sampled completion. Raises DataError
    where the text holds the end token, or the template does not render the prompt as the conversation's beginning.
    """
    prompt = _render(tokenizer, messages, generation=True)
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": text}], generation=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"the chat template renders the prompt otherwise once it is answered: expected {prompt[-80:]!r} to begin "
            f"the conversation, got {whole[: len(prompt)][-80:]!r}; use a template whose generation prompt begins its "
            "assistant turns"
        )
    said = whole[len(prompt) :]
    tail = _after_completion(tokenizer, messages)
    end = len(said) - len(tail)
    if not said.endswith(tail) or not said[:end].endswith((text, text.strip())):  # many templates trim
        raise DataError(f"the chat template does not render the completion as it stands: got {said[:200]!r}")
    body_ids = _encode(tokenizer, said[:end])
    tail_ids = _encode(tokenizer, tail)
    special = _special_ids(tokenizer)
    place = next((place for place, token_id in enumerate(tail_ids) if token_id in special), None)
    tail_ids = [tokenizer.eos_token_id] if place is None else tail_ids[: place + 1]
    if ends := {tail_ids[-1], tokenizer.eos_token_id} & set(body_ids):
        token = tokenizer.convert_ids_to_tokens(ends.pop())
        raise DataError(f"the completion's text holds the end token {token!r} itself: strip it from the data")
    ids = body_ids + tail_ids
    rendered = prompt + said[:end] + _decode(tokenizer, tail_ids)
    decoded = _decode(tokenizer, _encode(tokenizer, prompt) + ids)
    if decoded != rendered and _decode(tokenizer, _encode(tokenizer, rendered)) != decoded:
        raise DataError(
            f"the completion's tokens do not decode to what the chat template renders: got {decoded[-80:]!r}, "
            f"expected {rendered[-80:]!r}"
        )
    return ids


def foreign_tokens(tokenizer: Any, prompt_token_ids: Sequence[int]) -> str | None:
    """Why a prompt's ids are not this tokenizer's work, in words; None where they may be.

    Another tokenizer's ids decode to a text that is encoded otherwise; another template's do not end as this one's prompts do.
    """
    ids = [int(token_id) for token_id in prompt_token_ids]
    if not ids:
        return None
    if max(ids) >= len(tokenizer):
        return f"its token {max(ids)} comes from another tokenizer, this one has {len(tokenizer)}"
    text = _decode(tokenizer, ids)
    if (again := _encode(tokenizer, text)) != ids:
        return f"its {len(ids)} tokens come from another tokenizer, this one writes the same text in {len(again)}, others"
    if tokenizer.chat_template is None:
        return None
    words = "QRPO-ends-here"
    try:
        prompt = _render(tokenizer, [{"role": "user", "content": words}], generation=True)
    except DataError:  # a template that wants more than one user's message
        return None
    ending = prompt.rpartition(words)[2]
    if not text.endswith(ending):
        return f"it comes from another chat template, this one's prompts end in {ending!r}, it in {text[-len(ending) :]!r}"
    return None


def encode_conversation(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a finished conversation as the template renders it: what a reward model reads."""
    return _encode(tokenizer, _render(tokenizer, messages, generation=False))


def encode_conversations(tokenizer: Any, conversations: Sequence[Messages]) -> list[list[int] | DataError]:
    """`encode_conversation` of many at once, in one call of the tokenizer; a refused one is its DataError."""
    rendered: dict[int, str] = {}
    results: dict[int, list[int] | DataError] = {}
    for row, messages in enumerate(conversations):
        try:
            rendered[row] = _render(tokenizer, messages, generation=False)
        except DataError as error:
            results[row] = error
    if rendered:
        encoded = tokenizer(list(rendered.values()), add_special_tokens=False)["input_ids"]
        results |= zip(rendered, encoded, strict=True)
    return [results[row] for row in range(len(conversations))]


def _render(tokenizer: Any, messages: Messages, *, generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        roles = " ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses the messages (roles: {roles}): {error}") from error


def _after_completion(tokenizer: Any, messages: Messages) -> str:
    """What the template puts behind an assistant's last words, seen on words that occur nowhere else."""
    words = "QRPO-ends-here"
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": words}], generation=False)
    return whole.rpartition(words)[2]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]


def _special_ids(tokenizer: Any) -> set[int]:
    """Control tokens. The first after a completion's text ends the turn, whatever the model family calls it."""
    added = tokenizer.added_tokens_decoder.items()
    return {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)
