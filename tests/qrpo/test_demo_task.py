import json

import pytest
from transformers import AutoTokenizer

from examples.demo.reward import reward
from examples.demo.task import write_demo


def score(said, right="abdfhkn"):
    (value,) = reward(prompts=["sort nkhfdba"], completions=[said], answer=[right], prompt_id=["x"])
    return value


def test_the_reward_is_graded_by_distance_in_the_alphabet():
    assert score("abdfhkn") == score(" abdfhkn ") == 1.0
    # two neighbours swapped: each is two letters from the one that belongs there
    assert score("adbfhkn") == pytest.approx(1 - 4 / (14 * 7))
    assert score("nbdfhka") < score("adbfhkn")
    assert score("abdfhk") == score("abdfhk?") == pytest.approx(1 - 1 / 7)
    assert score("") == 0.0
    assert score("abdfhkn" * 3) < 0


def test_the_demo_is_the_same_every_time_and_holds_no_answer_twice(tmp_path):
    rows = []
    for name in ("one", "two"):
        folder = write_demo(tmp_path / name, prompts=100)
        rows.append([json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()])

    assert rows[0] == rows[1]
    assert len({row["answer"] for row in rows[0]}) == 100
    assert all(sorted(row["completion"]) == list(row["answer"]) for row in rows[0])
    weights = [(tmp_path / name / "base" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_every_letter_is_one_token(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_demo(tmp_path, prompts=50) / "base")

    assert tokenizer.tokenize("sort kfbanjc") == ["sort", "Ġ", *"kfbanjc"]


def test_the_teacher_is_careless(tmp_path):
    lines = (write_demo(tmp_path, prompts=300) / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    rewards = reward(
        [row["prompt"] for row in rows], [row["completion"] for row in rows], [row["answer"] for row in rows]
    )

    assert sum(r == 1 for r in rewards) < 0.2 * len(rewards)
    assert 0.7 < sum(rewards) / len(rewards) < 0.95
