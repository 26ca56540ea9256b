"""Dataset rows to prompts, in all formats that TRL supports.

| columns | prompt | offline completions |
|---|---|---|
| `prompt` | unchanged: a string (one user message) or messages | none |
| `prompt`, `completion` | the same | the completion |
| `prompt`, `chosen`, `rejected` | the same | both |
| `chosen`, `rejected` | their longest common prefix | the rest of both |
| `messages` | up to the last user message | the answer, if there is one |

As in TRL, if `prompt` is a string and `chosen` and `rejected` are messages, those messages contain
the prompt. ShareGPT's `conversations` with `from` and `value` are read as `messages`. Messages may
also be written as text (JSON or Python, as CSV files have them) or as one mapping of lists.

A column `tools` (JSON schemas, or their JSON text) and the messages' `tool_calls` belong to what
the model sees. Keys of theirs that are null are dropped, because Arrow adds them. `tools` and all
other columns go into `metadata`, which reward functions receive. A row that cannot be used raises
DataError with the reason; the caller records it as a reject.
"""

import ast
import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qrpo.config import Section, outside_input
from qrpo.data.sources import has_credentials
from qrpo.errors import DataError
from qrpo.seeds import seeded_hash

Message = dict[str, Any]
Column = Literal["prompt", "completion", "chosen", "rejected", "messages", "tools"]

_COLUMNS: tuple[Column, ...] = ("prompt", "completion", "chosen", "rejected", "messages", "tools")
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_FURTHER_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
_MESSAGES_AS_TEXT = re.compile(
    r"""\s*(array\()?(\[\s*\{\s*['"](role|content|from|value|tool_calls)|\{\s*['"]role)['"]\s*:"""
    r"""|\s*(array\()?\[\s*\{(?=.*['"](role|from)['"]\s*:)(?=.*['"](content|value)['"]\s*:)""",
    re.DOTALL,
)
_MEDIA = r"(?i)^data:|\.(?:png|jpe?g|gif|webp|bmp|tiff?|mp4|webm|wav|mp3|flac|ogg)$"
_MAX_LEVELS = 100


class PromptsConfig(Section):
    """The source of prompts, and which of them are held out."""

    source: str = outside_input(..., min_length=1)
    """A JSONL, JSON, CSV or Parquet file (`.gz` and the like too): a path, glob or fsspec URL; or a
    Hugging Face dataset, `hf://org/name[/config][@revision][:split]`."""
    source_name: str | None = None
    """Value of the `source` column; by default the last part of the source's path."""
    columns: dict[Column, str | None] = Field(default_factory=dict)
    """The dataset's own names for `prompt`, `completion`, `chosen`, `rejected`, `messages`,
    `tools`, as `{prompt: question}`; null keeps a column of that name out of it (it stays in the
    metadata)."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    limit: int | None = Field(None, ge=1)
    """Read only the first N rows."""
    eval_fraction: float = Field(0.0, ge=0.0, le=1.0)
    """Share of prompts held out for evaluation, by a hash of the prompt: new prompts move none."""
    eval_source: str | None = outside_input(None)
    """A source whose prompts are all held out, instead of `eval_fraction`."""

    @field_validator("source", "eval_source")
    @classmethod
    def _no_credentials(cls, source: str | None) -> str | None:
        if source is not None and has_credentials(source):
            raise ValueError(
                "a URL with credentials, which rejects, logs and Prefect's database would show: set them in the environment "
                "(AWS_ACCESS_KEY_ID, ...) or in fsspec's configuration file, or download the file"
            )
        return source

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
    tools: list[dict[str, Any]]
    """JSON schemas of the functions that the assistant may call."""


def prompt_id(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """32 hex characters that depend only on what the model sees: the messages and the tools."""
    seen: Any = [
        [m["role"], m["content"], *([further] if (further := _further(m)) else [])] for m in messages
    ]
    seen = [seen, list(tools)] if tools else seen
    canonical = json.dumps(seen, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def split_of(prompt_id: str, eval_fraction: float) -> Literal["train", "eval"]:
    """The split of a prompt, which never changes: a hash of its id compared with the fraction."""
    position = int.from_bytes(seeded_hash("split", prompt_id)[:8], "big")
    return "eval" if position < eval_fraction * 2**64 else "train"


def parse_row(row: Mapping[str, Any], config: PromptsConfig) -> Prompt:
    """The prompt in a row; DataError with the reason if the row cannot be used."""
    values, rest = _pick_columns(row, config)
    _refuse_media(rest, "the row")
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
        tools = functions(values.get("tools"), "tools")
        identity = prompt_id(messages, tools)
        (metadata.encode(), json.dumps(messages, ensure_ascii=False).encode(), "".join(completions).encode())
    except UnicodeEncodeError as error:
        raise DataError(f"text that is not valid Unicode (a lone surrogate): {error}") from error
    return Prompt(identity, messages, conversational, completions, metadata, tools)


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
    used = {name for column, name in names.items() if column != "tools"}
    rest = {str(name): value for name, value in row.items() if name not in used}
    if "tools" in values:
        rest["tools"] = values["tools"]
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
            return messages[:-1], [_completion_text(messages[-1:], "messages")]
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
    if "tool_calls" in completion[0]:
        raise DataError(f"the completion in {column!r} calls tools, expected an answer in text")
    return str(completion[0]["content"])


def _text_or_messages(values: Mapping[Column, Any], column: Column) -> str | list[Message] | None:
    value = values.get(column)
    if value is None:
        return None
    if isinstance(value, bytes):
        value = _jsonable(value)
    if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
        value = _parsed_text(value, column)
    if isinstance(value, str) and column != "messages":
        if not value.strip() and column == "prompt":
            raise DataError("the prompt is empty")
        return value
    if isinstance(value, Mapping):
        keys, lists = list(value), list(value.values())
        if (
            all(isinstance(items, (list, tuple)) for items in lists)
            and len({len(items) for items in lists}) == 1
        ):
            value = [dict(zip(keys, items, strict=True)) for items in zip(*lists, strict=True)]
        else:
            value = [value]
    if not isinstance(value, (list, tuple)):
        expected = "a list of messages" if column == "messages" else "a string or a list of messages"
        raise DataError(f"{column!r} is of type {type(value).__name__}, expected {expected}")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def _parsed_text(text: str, column: str) -> Any:
    """The messages, tools or tool calls that a text holds, as JSON or as Python prints them."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, (list, dict)):
            return value
    raise DataError(
        f"{column!r} is text that begins as {text[:40]!r}, expected it to be valid JSON throughout"
    )


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where} is of type {type(message).__name__}, expected a message with 'role' and 'content'"
        )
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        role, content = message["from"], message.get("value")
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where} has role {role!r}, expected one of {', '.join(sorted(_ROLES))}")
    _refuse_media(message, where)
    if message.get("function_call"):
        raise DataError(
            f"{where} has 'function_call', the form before 'tool_calls': rewrite it as 'tool_calls'"
        )
    further = {key: _without_nulls(_jsonable(value)) for key, value in _further(message).items()}
    if "tool_calls" in further:
        further["tool_calls"] = functions(further["tool_calls"], f"{where}.tool_calls")
        content = "" if content is None else content
    if isinstance(content, (list, tuple)):
        content = _joined_text(content, where)
    if not isinstance(content, str):
        raise DataError(f"{where} has content of type {type(content).__name__}, expected a string")
    return {"role": role, "content": content, **further}


def _refuse_media(values: Mapping[str, Any], where: str) -> None:
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        value = values.get(name)
        is_text = isinstance(value, (str, int, float)) and not re.search(_MEDIA, str(value))
        if value and not is_text:
            raise DataError(f"{where} has {name!r}, and prompts are text alone: use rows without it")


def _further(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has besides role and content."""
    return {key: message[key] for key in _FURTHER_KEYS if message.get(key)}


def functions(value: Any, where: str) -> list[dict[str, Any]]:
    """Tools or tool calls, as chat templates take them: every call's arguments as a mapping."""
    if not value:
        return []
    value = _parsed_text(value, where) if isinstance(value, str) else value
    functions = []
    for index, item in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        item = _without_nulls(_jsonable(_parsed_text(item, where) if isinstance(item, str) else item))
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}[{index}] names no function, expected {{'function': {{'name': ...}}}}")
        if isinstance(function.get("arguments"), str):
            text = function["arguments"] or "{}"
            function["arguments"] = _jsonable(_parsed_text(text, f"{where}[{index}].arguments"))
        if not isinstance(function.get("arguments", {}), dict):
            kind = type(function["arguments"]).__name__
            raise DataError(
                f"{where}[{index}].arguments is of type {kind}, expected an object with named values"
            )
        functions.append(item)
    return functions


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _joined_text(parts: Sequence[Any], where: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if kind == "text" else None
        if not isinstance(text, str):
            raise DataError(f"{where} has content that is not text (of type {kind!r}), expected text alone")
        texts.append(text)
    return "".join(texts)


def _jsonable(value: Any, levels: int = _MAX_LEVELS) -> Any:
    """Plain JSON values. Of Parquet's other types, decimals become numbers or their digits, bytes
    the text that they hold (`{"base64": ...}` where they hold none), dates and all others text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not levels:
        raise DataError(f"a column is nested more than {_MAX_LEVELS} levels deep")
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item, levels - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(item, levels - 1) for item in value]
    if isinstance(value, Decimal) and value.is_finite():
        return int(value) if value == value.to_integral_value() else format(value.normalize(), "f")
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return str(value)
