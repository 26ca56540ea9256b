"""Rows in every format that TRL's users bring become prompts; rows that cannot say why."""

import json
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qrpo.data.prompts import PromptsConfig, parse_row, prompt_id, split_of
from qrpo.errors import DataError
from tests.support.refusals import refuses

USER = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}],
}
RESULT = {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "1"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "title": None}}}]


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def parse(row, **settings):
    return parse_row(row, PromptsConfig(source="x.jsonl", **settings))


# ------------------------------------------------------------------------------------------- formats

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, *USER, BLUE, {"role": "user", "content": "Why?"}]
SKY = [{"role": "user", "content": "The sky is"}]
BOTH = ["It is blue.", "It is green."]
PARTS = [{"type": "text", "text": "What colour "}, {"type": "text", "text": "is the sky?"}]


@pytest.mark.parametrize(
    ("row", "messages", "completions"),
    [
        ({"prompt": "The sky is"}, SKY, []),
        ({"prompt": b"The sky is"}, SKY, []),
        ({"prompt": TURNS}, TURNS, []),
        ({"prompt": "The sky is", "completion": " blue."}, SKY, [" blue."]),
        ({"prompt": USER, "completion": [BLUE]}, USER, ["It is blue."]),
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, SKY, [" blue.", " green."]),
        ({"prompt": USER, "chosen": [BLUE], "rejected": [GREEN]}, USER, BOTH),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, SKY, [" blue.", " green."]),
        ({"chosen": [*USER, BLUE], "rejected": [*USER, GREEN]}, USER, BOTH),
        ({"chosen": [*USER, BLUE], "rejected": [*USER, BLUE]}, USER, ["It is blue."] * 2),
        ({"prompt": "dropped", "chosen": [*USER, BLUE], "rejected": [*USER, GREEN]}, USER, BOTH),
        ({"messages": [*USER, BLUE]}, USER, ["It is blue."]),
        ({"messages": USER}, USER, []),
        ({"messages": json.dumps([*USER, BLUE])}, USER, ["It is blue."]),
        ({"prompt": str(USER), "chosen": str([BLUE]), "rejected": str([GREEN])}, USER, BOTH),
        ({"messages": {"role": ["user"], "content": [USER[0]["content"]]}}, USER, []),
        ({"prompt": json.dumps([{"id": 1, **message} for message in USER])}, USER, []),
        ({"prompt": [{"role": "user", "content": PARTS}]}, USER, []),
    ],
)
def test_every_format_gives_prompt_and_completions(row, messages, completions):
    prompt = parse(row)
    assert prompt.messages == messages
    assert prompt.conversational is (messages != SKY)
    assert prompt.offline_completions == completions
    assert prompt.metadata == "{}"


def test_sharegpt_conversations_are_read():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": 7}
    prompt = parse(row)
    assert prompt.messages == [{"role": "user", "content": "Hi"}]
    assert prompt.offline_completions == ["Hello"]
    assert json.loads(prompt.metadata) == {"id": 7}


# ------------------------------------------------------------------------------------------- columns


def test_columns_are_mapped_and_the_others_become_metadata():
    row = {"question": "1+1?", "answer": "2", "level": 3, "seen": None, "score": float("nan")}
    prompt = parse(row, columns={"prompt": "question"})
    assert prompt.messages[0]["content"] == "1+1?"
    assert json.loads(prompt.metadata) == {"answer": "2", "level": 3, "seen": None, "score": None}


def test_a_column_that_is_mapped_away_stays_in_the_metadata():
    row = {"query": "Solve", "prompt": "import math", "completion": "def f(): ..."}
    prompt = parse(row, columns={"prompt": "query", "completion": None})
    assert prompt.messages[0]["content"] == "Solve"
    assert prompt.offline_completions == []
    assert json.loads(prompt.metadata) == {"prompt": "import math", "completion": "def f(): ..."}


def test_a_mapped_column_that_is_missing_is_named():
    refuses(
        DataError,
        r"no column 'question' \(prompts\.columns\.prompt\).*'q', 'a'",
        parse,
        {"q": 1, "a": 2},
        columns={"prompt": "question"},
    )


def test_a_system_prompt_is_put_before_those_without_one():
    own = {"role": "system", "content": "Be long."}
    assert parse({"prompt": "Hi"}, system_prompt="Be brief.").messages[0] == SYSTEM
    assert parse({"prompt": [own, *USER]}, system_prompt="Be brief.").messages == [own, *USER]
    both = {"source": "x", "eval_fraction": 0.1, "eval_source": "y"}
    refuses(ValidationError, "eval_fraction and eval_source", PromptsConfig, **both)


# ------------------------------------------------------------------------------------------- rejects


def user(content):
    return [{"role": "user", "content": content}]


def assistant(**message):
    return [{"role": "assistant", **message}]


UNQUOTED = "[{'role': 'user', 'content': 'a'}\n {'role': 'user'}]"
ARRAY = "array([{'role': 'user', 'content': 'a'}], dtype=object)"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no prompt: expected a column 'prompt'"),
        ({"text": "x"}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": user(" ")}, "the prompt is empty: its last message has no text"),
        ({"prompt": 7}, "'prompt' is of type int, expected a string or a list of messages"),
        ({"prompt": ["a", "b"]}, r"prompt\[0\] is of type str, expected a message"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] has content of type NoneType"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, r"\[0\] has role 'bot', expected one of assistant"),
        ({"prompt": [*USER, BLUE]}, "ends with a message of role 'assistant'"),
        ({"prompt": user([{"type": "image"}])}, "content that is not text"),
        ({"prompt": user([{"type": "image_url"}])}, "of type 'image_url'"),
        ({"prompt": "x", "chosen": "y"}, "'rejected' is missing or null"),
        ({"prompt": "x", "chosen": "y", "rejected": [GREEN]}, "is a string and the other is messages"),
        ({"chosen": "abc", "rejected": "xyz"}, "do not begin alike"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "do not begin alike"),
        (
            {"prompt": USER, "completion": [*USER, BLUE]},
            r"roles \[user assistant\] after the prompt, expected",
        ),
        ({"messages": "not a list"}, "'messages' is of type str"),
        ({"prompt": UNQUOTED}, "expected it to be valid JSON"),
        ({"prompt": ARRAY}, "expected it to be valid JSON"),
        ({"prompt": "[{'id': 1, 'role': 'user', 'content': 'a'} {}]"}, "expected it to be valid JSON"),
        ({"prompt": USER, "image": "coco/0001.jpg"}, "the row has 'image'"),
        ({"prompt": USER, "audio": {"bytes": b"x"}}, "the row has 'audio'"),
        ({"prompt": USER, "images": [{"bytes": b"x"}]}, "the row has 'images'"),
        ({"prompt": [{**USER[0], "images": ["a.png"]}]}, r"prompt\[0\] has 'images'"),
        ({"prompt": [*assistant(content="", function_call={"name": "f"}), *USER]}, "function_call"),
        ({"prompt": assistant(tool_calls=[{"name": "f", "arguments": "[1]"}])}, "of type list"),
        ({"prompt": "x", "deep": deep(600)}, "nested more than 100 levels"),
        ({"prompt": "x", "tools": [{"function": {}}]}, r"tools\[0\] names no function"),
        ({"prompt": "x", "tools": "add(x)"}, "'tools' is text that begins as 'add"),
        ({"prompt": USER, "completion": [CALL]}, "calls tools, expected an answer in text"),
        ({"messages": [*USER, CALL]}, "calls tools, expected an answer in text"),
        ({"prompt": "lone \ud800 surrogate"}, "not valid Unicode"),
        ({"prompt": "x", "other": "\udcff"}, "not valid Unicode"),
    ],
)
def test_unusable_rows_say_why(row, reason):
    refuses(DataError, reason, parse, row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
columns = st.sampled_from(
    ["prompt", "completion", "chosen", "rejected", "messages", "conversations", "tools", "other"]
)


# Threads that other tests left may draw from `random` meanwhile.
@pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
)
@given(st.dictionaries(columns, json_values, max_size=4))
def test_any_row_is_understood_or_refused_with_a_data_error(row):
    try:
        prompt = parse(row)
    except DataError:
        return
    assert prompt.messages
    assert prompt.prompt_id == prompt_id(prompt.messages, prompt.tools)
    json.loads(prompt.metadata)


def test_tools_and_tool_calls_belong_to_the_prompt():
    messages = [*USER, CALL, RESULT]
    given = {"type": "object"}  # null keys are Arrow's
    tools = [{"type": "function", "function": {"name": "add", "parameters": given}}]
    for said in (TOOLS, json.dumps(TOOLS)):
        prompt = parse({"prompt": messages, "tools": said})
        assert prompt.tools == tools
        assert json.loads(prompt.metadata)["tools"] == said
        assert prompt.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"x": 1}}
        assert prompt.messages[2] == {"role": "tool", "content": "2", "tool_call_id": "1"}
    other = {**CALL, "tool_calls": [{"name": "add", "arguments": {"x": 2}}]}
    rows = [
        {"prompt": messages, "tools": TOOLS},
        {"prompt": messages},
        {"prompt": [*USER, other, RESULT]},
        {"prompt": [*USER, {"role": "assistant", "content": ""}, RESULT]},
        {"prompt": [*USER, {"role": "assistant", "content": ""}, {**RESULT, "tool_call_id": None}]},
    ]
    assert len({parse(row).prompt_id for row in rows}) == len(rows)
    assert parse({"prompt": USER, "tools": []}).prompt_id == parse({"prompt": USER}).prompt_id


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (b"7", "7"),
        (b"\xff", {"base64": "/w=="}),
        (Decimal("1.50"), "1.5"),
        (Decimal("7.00"), 7),
        (date(2026, 1, 2), "2026-01-02"),
        (1e16, 1e16),
    ],
)
def test_values_of_other_types_become_plain_json(value, stored):
    assert json.loads(parse({"prompt": "x", "answer": value}).metadata) == {"answer": stored}


# ------------------------------------------------------------------------------------------- identity and split


def test_a_prompt_id_depends_on_roles_and_contents_alone():
    ids = [
        prompt_id([{"role": "user", "content": "Hi"}]),
        prompt_id([{"content": "Hi", "role": "user"}]),
        prompt_id([{"role": "system", "content": "Hi"}]),
        prompt_id([{"role": "user", "content": "Hi "}]),
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(len(identity) == 32 and int(identity, 16) >= 0 for identity in ids)


def test_a_prompt_id_never_changes_between_versions():
    # stored artifacts carry it: if this fails, everything ever computed would be computed again
    assert prompt_id([{"role": "user", "content": "naïve 日本"}]) == "e41800f1b9bf503499bf163b657db032"


def test_the_split_is_stable_and_near_its_fraction():
    ids = [prompt_id([{"role": "user", "content": str(number)}]) for number in range(4000)]
    small = {identity for identity in ids if split_of(identity, 0.1) == "eval"}
    large = {identity for identity in ids if split_of(identity, 0.2) == "eval"}
    assert small < large
    assert 0.08 < len(small) / len(ids) < 0.12
    assert not any(split_of(identity, 0.0) == "eval" for identity in ids)
    assert all(split_of(identity, 1.0) == "eval" for identity in ids)
