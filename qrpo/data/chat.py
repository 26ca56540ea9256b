"""Messages to token ids by the model's chat template, for all stages.

A prompt's ids end where the assistant's turn begins. A completion's ids follow them, up to and
including the token that ends the turn, as an engine samples them. Prompt and completion are encoded
separately and concatenated, never sliced from one encoding, because a tokenizer may merge text
across the boundary. Only the template adds a beginning-of-sequence token.
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
    "end_of_turn",
    "foreign_tokens",
    "load_tokenizer",
]

_MARKER = "QRPO-ends-here"  # a text that occurs in no template

Messages = Sequence[Mapping[str, str]]
"""A conversation: mappings with `role` and `content`."""


def load_tokenizer(model: ModelConfig | str, *, chat_template: bool = True) -> Any:
    """The model's fast tokenizer; ModelError if it, or a required chat template, is missing."""
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
            "`chat_template.jinja` into the folder, preferably the one that the model was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.path} has no end-of-sequence token: set `eos_token` and save it"
        )
    return tokenizer


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of the conversation so far, up to the beginning of the assistant's turn."""
    return _encode(tokenizer, _render(tokenizer, messages, generation=True))


def encode_completion(tokenizer: Any, messages: Messages, text: str) -> list[int]:
    """Token ids that follow `encode_prompt(tokenizer, messages)` if the assistant answers `text`,
    end token included.

    The end token is the first special token after the text in the rendered conversation. If the
    template ends the turn without one, the tokenizer's end-of-sequence token is added, since it
    ends sampled completions. Checks that prompt and completion ids together decode to the rendered
    conversation up to the end token. Raises DataError if they do not, if the text contains the end
    token, or if the template does not render the prompt as the conversation's beginning.
    """
    prompt = _render(tokenizer, messages, generation=True)
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": text}], generation=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"the chat template renders the prompt differently once it is answered: expected {prompt[-80:]!r} to begin "
            f"the conversation, got {whole[: len(prompt)][-80:]!r}; use a template whose generation prompt begins its "
            "assistant turns"
        )
    answer = whole[len(prompt) :]
    tail = _after_completion(tokenizer, messages)
    end = len(answer) - len(tail)
    if not answer.endswith(tail) or not answer[:end].endswith(
        (text, text.strip())
    ):  # many templates strip the text
        raise DataError(f"the chat template changes the completion: got {answer[:200]!r}")
    body_ids = _encode(tokenizer, answer[:end])
    tail_ids = _encode(tokenizer, tail)
    special = _special_ids(tokenizer)
    end_index = next((index for index, token_id in enumerate(tail_ids) if token_id in special), None)
    tail_ids = [tokenizer.eos_token_id] if end_index is None else tail_ids[: end_index + 1]
    if ends := {tail_ids[-1], tokenizer.eos_token_id} & set(body_ids):
        token = tokenizer.convert_ids_to_tokens(ends.pop())
        raise DataError(f"the completion's text contains the end token {token!r}: remove it from the data")
    ids = body_ids + tail_ids
    rendered = prompt + answer[:end] + _decode(tokenizer, tail_ids)
    decoded = _decode(tokenizer, _encode(tokenizer, prompt) + ids)
    if decoded != rendered and _decode(tokenizer, _encode(tokenizer, rendered)) != decoded:
        raise DataError(
            f"the completion's tokens do not decode to what the chat template renders: got {decoded[-80:]!r}, "
            f"expected {rendered[-80:]!r}"
        )
    return ids


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends the assistant's turn, as in `encode_completion`."""
    try:
        tail = _after_completion(tokenizer, [{"role": "user", "content": _MARKER}])
    except (DataError, ValueError):  # no template, or one that requires other messages
        return int(tokenizer.eos_token_id)
    special = _special_ids(tokenizer)
    return next((i for i in _encode(tokenizer, tail) if i in special), int(tokenizer.eos_token_id))


def foreign_tokens(tokenizer: Any, prompt_token_ids: Sequence[int]) -> str | None:
    """The reason why a prompt's ids cannot come from this tokenizer and chat template; None if they
    can.

    Text decoded from another tokenizer's ids is encoded to other ids; another template's prompts
    have another ending.
    """
    ids = [int(token_id) for token_id in prompt_token_ids]
    if not ids:
        return None
    if max(ids) >= len(tokenizer):
        return f"its token {max(ids)} comes from another tokenizer, this one has {len(tokenizer)}"
    text = _decode(tokenizer, ids)
    if (again := _encode(tokenizer, text)) != ids:
        return f"its {len(ids)} tokens come from another tokenizer, this one encodes the same text as {len(again)} other tokens"
    if tokenizer.chat_template is None:
        return None
    try:
        prompt = _render(tokenizer, [{"role": "user", "content": _MARKER}], generation=True)
    except DataError:  # the template requires more than one user message
        return None
    ending = prompt.rpartition(_MARKER)[2]
    if not text.endswith(ending):
        return f"it comes from another chat template, this one's prompts end in {ending!r}, it in {text[-len(ending) :]!r}"
    return None


def encode_conversation(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a complete conversation as the template renders it; reward models read these."""
    return _encode(tokenizer, _render(tokenizer, messages, generation=False))


def encode_conversations(tokenizer: Any, conversations: Sequence[Messages]) -> list[list[int] | DataError]:
    """`encode_conversation` of many, in one call of the tokenizer; DataErrors in place of refused
    ones."""
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
    """The text that the template appends to an assistant's answer."""
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": _MARKER}], generation=False)
    return whole.rpartition(_MARKER)[2]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]


def _special_ids(tokenizer: Any) -> set[int]:
    """Control tokens. The first one after a completion's text ends the turn."""
    added = tokenizer.added_tokens_decoder.items()
    return {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)
