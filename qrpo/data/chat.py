"""Messages to token ids by the model's chat template, for all stages.

A prompt's ids end where the assistant's turn begins. A completion's ids follow them, up to and
including the token that ends the turn, as an engine samples them. They are the end of one encoding
of the whole conversation, since many tokenizers put a space token before text that is encoded
alone. Only where a token crosses the border are the completion's ids encoded apart from the
prompt's. Only the template adds a beginning-of-sequence token.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig, is_local, location, require_model

_MARKER = "QRPO-ends-here"  # a text that occurs in no template

_SCORED_ON = datetime(2024, 7, 26)  # the day that Llama's templates fall back to

Messages = Sequence[Mapping[str, Any]]
"""A conversation: mappings with `role` and `content`, and maybe `tool_calls` and the like."""

Tools = Sequence[Mapping[str, Any]] | None
"""JSON schemas of the functions that the assistant may call, as templates take them."""


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
    if (
        chat_template
        and isinstance(tokenizer.chat_template, dict)
        and "default" not in tokenizer.chat_template
    ):
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ModelError(
            f"the tokenizer of {model.path} has chat templates with the names {names}, and none named `default`: save the "
            "one to use as `chat_template.jinja` in the folder"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.path} has no end-of-sequence token: set `eos_token` and save it"
        )
    return tokenizer


def encode_prompt(tokenizer: Any, messages: Messages, tools: Tools = None) -> list[int]:
    """Token ids of the conversation so far, up to the beginning of the assistant's turn."""
    return _encode(tokenizer, _render(tokenizer, messages, tools, generation=True))


def encode_completion(tokenizer: Any, messages: Messages, text: str, tools: Tools = None) -> list[int]:
    """Token ids that follow `encode_prompt(tokenizer, messages, tools)` if the assistant answers
    `text`, end token included.

    The end token is the first special token after the text in the rendered conversation. If the
    template ends the turn without one, the tokenizer's end-of-sequence token is added, since it
    ends sampled completions. Raises DataError if the text contains the end token, if the template
    does not render the prompt as the conversation's beginning, or if no tokens follow the prompt's
    that decode to the rendered conversation.
    """
    now = datetime.now().strftime
    prompt = _render(tokenizer, messages, tools, generation=True, strftime_now=now)
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": text}], tools, strftime_now=now)
    if not whole.startswith(prompt):
        raise DataError(
            f"the chat template renders the prompt differently once it is answered: expected {prompt[-80:]!r} to begin "
            f"the conversation, got {whole[: len(prompt)][-80:]!r}; use a template whose generation prompt begins its "
            "assistant turns"
        )
    answer = whole[len(prompt) :]
    tail = _after_completion(tokenizer, messages, tools, strftime_now=now)
    end = len(answer) - len(tail)
    if not answer.endswith(tail) or not answer[:end].endswith(
        (text, text.strip())
    ):  # many templates strip the text
        raise DataError(f"the chat template changes the completion: got {answer[:200]!r}")
    special = _special_ids(tokenizer)
    end_id = next((token_id for token_id in _encode(tokenizer, tail) if token_id in special), None)
    if end_id is None:
        ids = [*_following(tokenizer, prompt, answer[:end]), tokenizer.eos_token_id]
    else:
        end_text = tokenizer.convert_ids_to_tokens(end_id)
        before_end = tail.partition(end_text)[0]
        ids = _following(tokenizer, prompt, answer[:end] + before_end + end_text)
    if ends := {ids[-1], tokenizer.eos_token_id} & set(ids[:-1]):
        token = tokenizer.convert_ids_to_tokens(ends.pop())
        raise DataError(f"the completion's text contains the end token {token!r}: remove it from the data")
    return ids


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends the assistant's turn, as in `encode_completion`."""
    try:
        tail = _after_completion(tokenizer, [{"role": "user", "content": _MARKER}])
    except (DataError, ValueError):  # no template, or one that requires other messages
        return int(tokenizer.eos_token_id)
    special = _special_ids(tokenizer)
    return next((i for i in _encode(tokenizer, tail) if i in special), int(tokenizer.eos_token_id))


def encode_text(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of a plain prompt and of its continuation, which ends with one end-of-sequence
    token.

    The prompt gets the special tokens that the tokenizer puts before a text, not those behind.
    Raises DataError if a completion goes on after the end-of-sequence token.
    """
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    added = list(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))
    first = next((index for index, (_, is_added) in enumerate(added) if not is_added), len(added))
    prompt_ids = [
        token_id for index, (token_id, is_added) in enumerate(added) if index < first or not is_added
    ]
    ids, end_id = _following(tokenizer, prompt, completion), tokenizer.eos_token_id
    if ids[-1:] == [end_id]:
        del ids[-1]
    if end_id in ids:
        token = tokenizer.convert_ids_to_tokens(end_id)
        raise DataError(f"the completion's text contains the end token {token!r}: remove it from the data")
    return prompt_ids, [*ids, end_id]


def _following(tokenizer: Any, before: str, text: str) -> list[int]:
    """The ids of `text` where it follows the ids of `before`; DataError if there are none."""
    before_ids = _encode(tokenizer, before)
    ids, ends = _encode_with_ends(tokenizer, before + text)
    size = len(before_ids)
    if ids[:size] == before_ids and ends[:size][-1:] <= [len(before)]:
        return ids[size:]
    # A token crosses the border. The text alone, or after a line break, may give tokens without the
    # space that some tokenizers put first.
    rendered = before + text
    expected = (rendered, _decode(tokenizer, ids))
    for anchor in ("", "\n"):
        ids, ends = _encode_with_ends(tokenizer, anchor + text)
        anchor_ids = _encode(tokenizer, anchor)
        first = len(anchor_ids)
        decoded = _decode(tokenizer, before_ids + ids[first:])
        if ids[:first] == anchor_ids and decoded in expected and ends[:first][-1:] <= [len(anchor)]:
            return ids[first:]
    raise DataError(
        f"the completion's tokens do not decode to what the chat template renders: got {decoded[-80:]!r}, "
        f"expected {rendered[-80:]!r}"
    )


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
    again = _encode(tokenizer, text)
    if again != ids and _encode(tokenizer, _decode(tokenizer, again)) == again:
        return f"its {len(ids)} tokens come from another tokenizer, this one encodes the same text as {len(again)} other tokens"
    if tokenizer.chat_template is None:
        return None
    try:
        prompt = _render(tokenizer, [{"role": "user", "content": _MARKER}], generation=True)
    except DataError:  # the template requires more than one user message
        return None
    ending = _decode(tokenizer, _encode(tokenizer, prompt)).rpartition(_MARKER)[2]
    if not text.endswith(ending):
        return f"it comes from another chat template, this one's prompts end in {ending!r}, it in {text[-len(ending) :]!r}"
    return None


def encode_conversation(tokenizer: Any, messages: Messages, tools: Tools = None) -> list[int]:
    """Token ids of a complete conversation as the template renders it; reward models read these.

    A template that writes the date writes the same one every day, so a score does not change.
    """
    return _encode(tokenizer, _render(tokenizer, messages, tools, strftime_now=_SCORED_ON.strftime))


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Messages], tools: Sequence[Tools] | None = None
) -> list[list[int] | DataError]:
    """`encode_conversation` of many, in one call of the tokenizer; DataErrors in place of refused
    ones."""
    rendered: dict[int, str] = {}
    results: dict[int, list[int] | DataError] = {}
    for row, messages in enumerate(conversations):
        given = tools[row] if tools else None
        try:
            rendered[row] = _render(tokenizer, messages, given, strftime_now=_SCORED_ON.strftime)
        except DataError as error:
            results[row] = error
    if rendered:
        encoded = tokenizer(list(rendered.values()), add_special_tokens=False)["input_ids"]
        results |= zip(rendered, encoded, strict=True)
    return [results[row] for row in range(len(conversations))]


def _render(
    tokenizer: Any, messages: Messages, tools: Tools = None, *, generation: bool = False, **variables: Any
) -> str:
    from jinja2 import TemplateError

    def apply(messages: Messages, tools: Tools) -> str:
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=generation,
            **variables,
        )

    try:
        rendered = apply(messages, tools)
        if tools and rendered == apply(messages, None):
            raise DataError("the chat template ignores the tools: use one that shows them to the model")
        without = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
        if without != list(messages) and rendered == apply(without, tools):
            raise DataError("the chat template ignores tool calls: use one that shows them to the model")
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = " ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses the messages (roles: {roles}): {error}") from error
    return rendered


def _after_completion(tokenizer: Any, messages: Messages, tools: Tools = None, **variables: Any) -> str:
    """The text that the template appends to an assistant's answer."""
    answered = [*messages, {"role": "assistant", "content": _MARKER}]
    return _render(tokenizer, answered, tools, **variables).rpartition(_MARKER)[2]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _encode_with_ends(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and where in the text each token ends (nothing for a tokenizer that cannot
    say)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    return list(encoded["input_ids"]), [end for _, end in encoded.get("offset_mapping", ())]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]


def _special_ids(tokenizer: Any) -> set[int]:
    """Control tokens. The first one after a completion's text ends the turn."""
    added = tokenizer.added_tokens_decoder.items()
    return {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)
