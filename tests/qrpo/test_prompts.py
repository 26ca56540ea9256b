"""Rows in every format that TRL's users bring become prompts; rows that cannot say why."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qrpo.data.prompts import Prompt, PromptsConfig, parse_row, prompt_id, split_of
from qrpo.errors import DataError

USER = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}


def parse(row: Mapping[str, Any], **settings: Any) -> Prompt:
    return parse_row(row, PromptsConfig(source="x.jsonl", **settings))


# ------------------------------------------------------------------------------------------- formats


def test_a_string_prompt_is_one_user_message() -> None:
    prompt = parse({"prompt": "The sky is"})
    assert prompt.messages == [{"role": "user", "content": "The sky is"}]
    assert not prompt.conversational
    assert prompt.offline_completions == []
    assert prompt.metadata == "{}"


def test_a_prompt_of_messages_stays_as_it_is() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *USER, BLUE, {"role": "user", "content": "Why?"}]
    prompt = parse({"prompt": messages})
    assert prompt.messages == messages
    assert prompt.conversational


@pytest.mark.parametrize(
    ("row", "conversational", "completions"),
    [
        ({"prompt": "The sky is", "completion": " blue."}, False, [" blue."]),
        ({"prompt": USER, "completion": [BLUE]}, True, ["It is blue."]),
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, False, [" blue.", " green."]),
        ({"prompt": USER, "chosen": [BLUE], "rejected": [GREEN]}, True, ["It is blue.", "It is green."]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, False, [" blue.", " green."]),
        ({"chosen": [*USER, BLUE], "rejected": [*USER, GREEN]}, True, ["It is blue.", "It is green."]),
        (
            {"prompt": "dropped", "chosen": [*USER, BLUE], "rejected": [*USER, GREEN]},
            True,
            ["It is blue.", "It is green."],
        ),
        ({"messages": [*USER, BLUE]}, True, ["It is blue."]),
        ({"messages": USER}, True, []),
    ],
)
def test_every_format_gives_prompt_and_completions(
    row: dict[str, Any], conversational: bool, completions: list[str]
) -> None:
    prompt = parse(row)
    assert prompt.conversational is conversational
    assert prompt.messages == (USER if conversational else [{"role": "user", "content": "The sky is"}])
    assert prompt.offline_completions == completions


def test_chosen_and_rejected_that_are_the_same_keep_their_answer() -> None:
    prompt = parse({"chosen": [*USER, BLUE], "rejected": [*USER, BLUE]})
    assert prompt.messages == USER
    assert prompt.offline_completions == ["It is blue.", "It is blue."]


def test_sharegpt_conversations_are_read() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": 7}
    prompt = parse(row)
    assert prompt.messages == [{"role": "user", "content": "Hi"}]
    assert prompt.offline_completions == ["Hello"]
    assert json.loads(prompt.metadata) == {"id": 7}


def test_content_in_text_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    assert parse({"prompt": [{"role": "user", "content": parts}]}).messages[0]["content"] == "What now?"


# ------------------------------------------------------------------------------------------- columns


def test_columns_are_mapped_and_the_others_become_metadata() -> None:
    row = {"question": "1+1?", "answer": "2", "level": 3, "seen": None, "score": float("nan")}
    prompt = parse(row, columns={"prompt": "question"})
    assert prompt.messages[0]["content"] == "1+1?"
    assert json.loads(prompt.metadata) == {"answer": "2", "level": 3, "seen": None, "score": None}


def test_a_column_that_is_mapped_away_stays_in_the_metadata() -> None:
    row = {"query": "Solve", "prompt": "import math", "completion": "def f(): ..."}
    prompt = parse(row, columns={"prompt": "query", "completion": None})
    assert prompt.messages[0]["content"] == "Solve"
    assert prompt.offline_completions == []
    assert json.loads(prompt.metadata) == {"prompt": "import math", "completion": "def f(): ..."}


def test_a_mapped_column_that_is_missing_is_named() -> None:
    with pytest.raises(DataError, match=r"no column 'question' \(prompts\.columns\.prompt\).*'q', 'a'"):
        parse({"q": 1, "a": 2}, columns={"prompt": "question"})


def test_a_system_prompt_is_put_before_those_without_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert parse({"prompt": "Hi"}, system_prompt="Be brief.").messages[0] == system
    own = {"role": "system", "content": "Be long."}
    assert parse({"prompt": [own, *USER]}, system_prompt="Be brief.").messages == [own, *USER]


def test_both_ways_to_hold_out_are_refused() -> None:
    with pytest.raises(ValidationError, match="eval_fraction and eval_source"):
        PromptsConfig(source="x", eval_fraction=0.1, eval_source="y")


# ------------------------------------------------------------------------------------------- rejects


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no prompt: expected a column 'prompt'"),
        ({"text": "x"}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [{"role": "user", "content": " "}]}, "the prompt is empty: its last message has no text"),
        ({"prompt": 7}, "'prompt' is of type int, expected a string or a list of messages"),
        ({"prompt": ["a", "b"]}, r"prompt\[0\] is of type str, expected a message"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] has content of type NoneType"),
        (
            {"prompt": [{"role": "bot", "content": "x"}]},
            r"prompt\[0\] has role 'bot', expected one of assistant",
        ),
        ({"prompt": [*USER, BLUE]}, "ends with a message of role 'assistant'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "content that is not text"),
        ({"prompt": "x", "chosen": "y"}, "'rejected' is missing or null"),
        ({"prompt": "x", "chosen": "y", "rejected": [GREEN]}, "is a string and the other is messages"),
        ({"chosen": "abc", "rejected": "xyz"}, "do not begin alike"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "do not begin alike"),
        (
            {"prompt": USER, "completion": [*USER, BLUE]},
            r"roles \[user assistant\] after the prompt, expected \[assistant\]",
        ),
        ({"messages": "not a list"}, "'messages' is of type str"),
        ({"prompt": "lone \ud800 surrogate"}, "not valid Unicode"),
        ({"prompt": "x", "other": "\udcff"}, "not valid Unicode"),
    ],
)
def test_unusable_rows_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse(row)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
columns = st.sampled_from(
    ["prompt", "completion", "chosen", "rejected", "messages", "conversations", "other"]
)


@given(st.dictionaries(columns, json_values, max_size=4))
def test_any_row_is_understood_or_refused_with_a_data_error(row: dict[str, Any]) -> None:
    try:
        prompt = parse(row)
    except DataError:
        return
    assert prompt.messages
    assert prompt.prompt_id == prompt_id(prompt.messages)
    json.loads(prompt.metadata)


# ------------------------------------------------------------------------------------------- identity and split


def test_a_prompt_id_depends_on_roles_and_contents_alone() -> None:
    ids = [
        prompt_id([{"role": "user", "content": "Hi"}]),
        prompt_id([{"content": "Hi", "role": "user"}]),
        prompt_id([{"role": "system", "content": "Hi"}]),
        prompt_id([{"role": "user", "content": "Hi "}]),
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert all(len(identity) == 32 and int(identity, 16) >= 0 for identity in ids)


def test_a_prompt_id_never_changes_between_versions() -> None:
    # stored artifacts carry it: if this fails, everything ever computed would be computed again
    assert prompt_id([{"role": "user", "content": "naïve 日本"}]) == "e41800f1b9bf503499bf163b657db032"


def test_the_split_is_stable_and_near_its_fraction() -> None:
    ids = [prompt_id([{"role": "user", "content": str(number)}]) for number in range(4000)]
    small = {identity for identity in ids if split_of(identity, 0.1) == "eval"}
    large = {identity for identity in ids if split_of(identity, 0.2) == "eval"}
    assert small < large
    assert 0.08 < len(small) / len(ids) < 0.12
    assert not any(split_of(identity, 0.0) == "eval" for identity in ids)
    assert all(split_of(identity, 1.0) == "eval" for identity in ids)
