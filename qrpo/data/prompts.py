"""Dataset rows to prompts, in all formats that TRL supports.

| columns | prompt | offline completions |
|---|---|---|
| `prompt` | unchanged: a string (one user message) or messages | none |
| `prompt`, `completion` | the same | the completion |
| `prompt`, `chosen`, `rejected` | the same | both |
| `chosen`, `rejected` | their longest common prefix | the rest of both |
| `messages` | up to the last user message | the answer, if there is one |

As in TRL, if `prompt` is a string and `chosen` and `rejected` are messages, those messages contain
the prompt. ShareGPT's `conversations` with `from` and `value` are read as `messages`. All other
columns go into `metadata`, which reward functions receive. A row that cannot be used raises
DataError with the reason; the caller records it as a reject.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field, model_validator

from qrpo.config import Section, outside_input
from qrpo.data.sources import read_rows
from qrpo.errors import DataError
from qrpo.seeds import seeded_hash

__all__ = ["Message", "Prompt", "PromptsConfig", "parse_row", "prompt_id", "read_rows", "split_of"]

Message = dict[str, str]
Column = Literal["prompt", "completion", "chosen", "rejected", "messages"]

_COLUMNS: tuple[Column, ...] = ("prompt", "completion", "chosen", "rejected", "messages")
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class PromptsConfig(Section):
    """The source of prompts, and which of them are held out."""

    source: str = outside_input(..., min_length=1)
    """A JSONL, JSON, CSV or Parquet file (`.gz` and the like too): a path, glob or fsspec URL; or a
    Hugging Face dataset, `hf://org/name[/config][@revision][:split]`."""
    source_name: str | None = None
    """Value of the `source` column; by default the last part of the source's path."""
    columns: dict[Column, str | None] = Field(default_factory=dict)
    """The dataset's own names for `prompt`, `completion`, `chosen`, `rejected`, `messages`, as
    `{prompt: question}`; null keeps a column of that name out of it (it stays in the metadata)."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    limit: int | None = Field(None, ge=1)
    """Read only the first N rows."""
    eval_fraction: float = Field(0.0, ge=0.0, le=1.0)
    """Share of prompts held out for evaluation, by a hash of the prompt: new prompts move none."""
    eval_source: str | None = outside_input(None)
    """A source whose prompts are all held out, instead of `eval_fraction`."""

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> "PromptsConfig":
        if self.eval_source is not None and self.eval_fraction:
            raise ValueError("got both eval_fraction and eval_source, expected one of them")
        return self

    @property
    def name(self) -> str:
        """`source_name`, or the last part of the source's path."""
        return self.source_name or self.source.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One parsed row of the dataset."""

    prompt_id: str
    messages: list[Message]
    conversational: bool
    """False if the prompt was a plain string."""
    offline_completions: list[str]
    """From the completion, or chosen and rejected, in this order."""
    metadata: str
    """The other columns as a JSON object."""


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """32 hex characters that depend only on roles and contents."""
    canonical = json.dumps(
        [[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def split_of(prompt_id: str, eval_fraction: float) -> Literal["train", "eval"]:
    """The split of a prompt, which never changes: a hash of its id compared with the fraction."""
    position = int.from_bytes(seeded_hash("split", prompt_id)[:8], "big")
    return "eval" if position < eval_fraction * 2**64 else "train"


def parse_row(row: Mapping[str, Any], config: PromptsConfig) -> Prompt:
    """The prompt in a row; DataError with the reason if the row cannot be used."""
    values, rest = _pick_columns(row, config)
    prompt, completions = _split_prompt(values)
    conversational = not isinstance(prompt, str)
    messages = prompt if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
    if not messages:
        raise DataError("the prompt is empty: it has no messages")
    if not messages[-1]["content"].strip():
        raise DataError("the prompt is empty" + (": its last message has no text" if conversational else ""))
    if messages[-1]["role"] not in ("user", "tool"):
        raise DataError(
            f"the prompt ends with a message of role {messages[-1]['role']!r}, expected 'user' or 'tool'"
        )
    if config.system_prompt and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    try:
        metadata = json.dumps(_jsonable(rest), ensure_ascii=False, allow_nan=False)
        identity = prompt_id(messages)
        (metadata.encode(), json.dumps(messages, ensure_ascii=False).encode(), "".join(completions).encode())
    except UnicodeEncodeError as error:
        raise DataError(f"text that is not valid Unicode (a lone surrogate): {error}") from error
    return Prompt(identity, messages, conversational, completions, metadata)


def _pick_columns(row: Mapping[str, Any], config: PromptsConfig) -> tuple[dict[Column, Any], dict[str, Any]]:
    """The columns with a meaning, by our name, and all others by the dataset's name."""
    names: dict[Column, str | None] = {column: config.columns.get(column, column) for column in _COLUMNS}
    if "messages" not in config.columns and "messages" not in row and "conversations" in row:
        names["messages"] = "conversations"
    for column, name in config.columns.items():
        if name is not None and name not in row:
            raise DataError(
                f"no column {name!r} (prompts.columns.{column}); the row has {', '.join(map(repr, row)) or 'none'}"
            )
    values = {
        column: row[name] for column, name in names.items() if name is not None and row.get(name) is not None
    }
    rest = {str(name): value for name, value in row.items() if name not in names.values()}
    return values, rest


def _split_prompt(values: dict[Column, Any]) -> tuple[str | list[Message], list[str]]:
    """(prompt, offline completions) in the formats of the module's docstring."""
    prompt = _text_or_messages(values, "prompt")
    if "chosen" in values or "rejected" in values:
        chosen, rejected = (_text_or_messages(values, "chosen"), _text_or_messages(values, "rejected"))
        if chosen is None or rejected is None:
            missing = "chosen" if chosen is None else "rejected"
            raise DataError(
                f"{missing!r} is missing or null: expected both 'chosen' and 'rejected', or neither"
            )
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise DataError(
                "one of 'chosen' and 'rejected' is a string and the other is messages, expected one form"
            )
        explicit = prompt is not None and isinstance(prompt, str) == isinstance(chosen, str)
        if not explicit:
            prompt, chosen, rejected = _split_common_prefix(chosen, rejected)
        assert prompt is not None
        return prompt, [_completion_text(chosen, "chosen"), _completion_text(rejected, "rejected")]
    if prompt is not None:
        completion = _text_or_messages(values, "completion")
        return prompt, [] if completion is None else [_completion_text(completion, "completion")]
    messages = _text_or_messages(values, "messages")
    if isinstance(messages, list):
        if messages and messages[-1]["role"] == "assistant":
            return messages[:-1], [messages[-1]["content"]]
        return messages, []
    raise DataError(
        "no prompt: expected a column 'prompt', 'chosen' and 'rejected', or 'messages'; name yours in prompts.columns, "
        "as {prompt: question}"
    )


def _split_common_prefix(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The common prefix of `chosen` and `rejected`, and the rest of each, as in TRL."""
    length = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        length += 1
    if isinstance(chosen, str):
        if length > 0 and chosen[length - 1] == " ":
            length -= 1  # as in TRL: the space belongs to the answer's first token
    elif length == min(len(chosen), len(rejected)):  # the same answer twice: the prompt ends before it
        length = (
            max((index for index in range(length) if chosen[index]["role"] != "assistant"), default=-1) + 1
        )
    if length == 0:
        raise DataError(
            "'chosen' and 'rejected' do not begin alike, so there is no prompt: give a 'prompt' column"
        )
    return chosen[:length], chosen[length:], rejected[length:]


def _completion_text(completion: str | list[Message], column: str) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = " ".join(message["role"] for message in completion)
        raise DataError(
            f"{column!r} holds messages of roles [{roles}] after the prompt, expected [assistant]"
        )
    return completion[0]["content"]


def _text_or_messages(values: Mapping[Column, Any], column: Column) -> str | list[Message] | None:
    value = values.get(column)
    if value is None:
        return None
    if isinstance(value, str) and column != "messages":
        if not value.strip() and column == "prompt":
            raise DataError("the prompt is empty")
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        expected = "a list of messages" if column == "messages" else "a string or a list of messages"
        raise DataError(f"{column!r} is of type {type(value).__name__}, expected {expected}")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where} is of type {type(message).__name__}, expected a message with 'role' and 'content'"
        )
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        role, content = message["from"], message.get("value")
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLES:
        raise DataError(f"{where} has role {role!r}, expected one of {', '.join(sorted(_ROLES))}")
    if isinstance(content, (list, tuple)):
        content = _joined_text(content, where)
    if not isinstance(content, str):
        raise DataError(f"{where} has content of type {type(content).__name__}, expected a string")
    return {"role": role, "content": content}


def _joined_text(parts: Sequence[Any], where: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise DataError(f"{where} has content that is not text, expected text alone")
        texts.append(text)
    return "".join(texts)


def _jsonable(value: Any) -> Any:
    """Plain JSON values. Of Parquet's other types, decimals become numbers or their digits, bytes the text that
    they hold (`{"base64": ...}` where they hold none), dates and all others text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(item) for item in value]
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else format(value.normalize(), "f")
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return str(value)
