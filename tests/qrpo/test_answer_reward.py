"""Right answers in the forms of MATH, GSM8K, NuminaMath and DAPO, in every type that data can hold."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qrpo.data.prompts import PromptsConfig, parse_row
from qrpo.data.sources import read_rows
from qrpo.errors import RewardError
from qrpo.rewards import AnswerRewardConfig, Score, open_reward
from qrpo.rewards.answer import AnswerReward
from tests.support.rewards import DATA, HI

MATH: list[tuple[Any, list[str], list[str]]] = [
    # right answer of the data, completions that give it, completions that do not
    (
        r"1 - \sqrt{2}",
        [r"\boxed{1-\sqrt{2}}", r"The answer is 1 - \sqrt{2}."],
        [r"\boxed{1}", "The answer is 1."],
    ),
    (r"2\sqrt{3}", [r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$"], [r"\boxed{2}", "2"]),
    (r"\frac{1}{2}", ["0.5", r"\boxed{\frac12}", "1/2"], ["1", "2", r"\boxed{\frac{1}{3}}"]),
    (r"\left(3, \frac{\pi}{2}\right)", [r"\boxed{(3, \frac{\pi}{2})}"], [r"\boxed{3}", r"\boxed{(3, \pi)}"]),
    ("(1,2)", [r"\boxed{(1, 2)}"], [r"\boxed{1}", r"\boxed{(2,1)}"]),
    ("(1,2), (3,4)", [r"\boxed{(3,4), (1,2)}"], [r"\boxed{(1,2)}", r"\boxed{1}"]),
    ("[2,5)", [r"\boxed{[2,5)}"], [r"\boxed{2}", r"\boxed{[2,5]}"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"\boxed{(-\infty,2)\cup(3,\infty)}"], [r"\boxed{(-\infty,2)}"]),
    (r"x \in [-2,7]", [r"\boxed{[-2,7]}", r"\boxed{x \in [-2,7]}"], [r"\boxed{7}"]),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        [r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"],
        [r"\boxed{1}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}"],
    ),
    ("6,12,18", [r"\boxed{6, 12, 18}"], [r"\boxed{6}", r"\boxed{6,12}"]),
    ("$x = 3$, $y = 4$", [r"\boxed{x=3, y=4}"], [r"\boxed{3}"]),
    (r"$\frac{3}{4}$", ["0.75"], ["3"]),
    (r"5\text{ cm}", [r"\boxed{5}", r"\boxed{5\text{ cm}}"], [r"\boxed{6\text{ cm}}"]),
    ("2t", [r"\boxed{2t}"], [r"\boxed{2}"]),
    ("3 + t", [r"\boxed{t + 3}"], [r"\boxed{3}"]),
    (r"18\%", [r"\boxed{18\%}", "0.18"], ["1"]),
    (r"\$1{,}200", ["1200", r"\boxed{1,200}"], ["1"]),
    (r"1\,200", [r"\boxed{1200}", r"\boxed{1\,200}"], [r"\boxed{201}"]),
    ("2 1/2", [r"\boxed{2.5}", r"\boxed{2 1/2}", r"\boxed{2\frac{1}{2}}"], [r"\boxed{1.5}", "2"]),
    ("sqrt(2)/2", [r"\boxed{\frac{\sqrt{2}}{2}}"], ["2"]),
    ("\u221a2", [r"\boxed{\sqrt{2}}"], ["2"]),
    ("\u22125", [r"\boxed{-5}"], [r"\boxed{5}"]),
    (r"10 \mathrm{~cm}", [r"\boxed{10}", r"\boxed{10 \text { cm }}"], ["1"]),
    (r"x=1 \text { or } x=2", [r"\boxed{x=1, x=2}"], [r"\boxed{1}"]),
    (r"\varnothing", [r"\boxed{\emptyset}"], [r"\boxed{0}"]),
    (r"\frac{1}{3} \times 10^2", [r"\boxed{\frac{100}{3}}"], [r"\boxed{\frac{1}{300}}"]),
    (r"1/3 \times 10^2", [r"\boxed{\frac{100}{3}}"], [r"\boxed{\frac{1}{300}}"]),
    (r"204_5", [r"\boxed{204_{5}}"], [r"\boxed{204}", r"\boxed{204_7}"]),
    (r"\text{Monday}", [r"\boxed{\text{Monday}}", "The answer is Monday."], [r"\boxed{Tuesday}"]),
    (r"\text{(C)}", [r"\boxed{C}", "The answer is (C).", "**C**"], [r"\boxed{B}", "C or D"]),
    ("yes", [r"\boxed{\text{Yes}}", "yes"], ["no"]),
    (True, ["True"], ["False"]),
    ("Then $x=3$, so the value is \\boxed{\\frac{9}{2}}.", ["4.5"], ["3"]),
    ("24 and 48 make\n#### 1,072", ["1072", "It is 1,072 dollars."], ["24"]),
    (["34"], ["34"], ["35"]),
    ('["34"]', ["34"], ["35"]),
    (r"\pi r^2 h", [r"\boxed{\pi r^{2}h}"], [r"\boxed{\pi r^2}"]),
    (r"\frac{1}{2} b h", [r"\boxed{\frac{bh}{2}}"], [r"\boxed{\frac{1}{2}}", r"\boxed{\frac{b}{2}}"]),
    (r"x^2 t", [r"\boxed{tx^2}"], [r"\boxed{x^2}"]),
    (r"3 + 2\mathrm{i}", [r"\boxed{3+2i}", r"\boxed{3+2\mathrm{i}}"], [r"\boxed{5}", r"\boxed{3}"]),
    ("2i", [r"\boxed{2 i}", r"\boxed{\sqrt{4}i}", r"\boxed{-\frac{2}{i}}"], [r"\boxed{2}", r"\boxed{-2i}"]),
    (r"2^{10} = 1024", [r"\boxed{1024}", r"\boxed{2^{10}}"], [r"\boxed{4=4}", r"\boxed{10}"]),
    (r"\frac{9}{10} = 90\%", [r"\boxed{\frac{9}{10}}"], [r"\boxed{9}"]),
    ("42", ["<answer>42</answer>", "`42`", r"\boxed{42cm}"], [r"\boxed{42_5}", r"\boxed{42\text{ million}}"]),
    (
        "42",
        [r"\boxed{42 \text{ km}/\text{h}}"],
        [r"\boxed{42\text{ hours }30\text{ minutes}}", r"\boxed{4 2}"],
    ),
    (r"7\,\mathrm{cm}", [r"\boxed{7}", r"\boxed{7\ \text{cm}}"], [r"\boxed{8}"]),
    ("64", ["48 + 16 = <<48+16=64>>64 points.\n#### 64"], ["48 + 16 = <<48+16=64>>64 points.\n#### 66"]),
    (r"48\mathrm{km}/\mathrm{h}", [r"\boxed{48}", r"\boxed{48 km/h}"], [r"\boxed{4}"]),
    ("12 cm^2", [r"\boxed{12}", r"\boxed{12\text{ cm}^2}"], [r"\boxed{144}"]),
    (r"5 \text{ cm}, 3 \text{ cm}", [r"\boxed{5, 3}"], [r"\boxed{5}"]),
    (r"2.5 \text{ million}", [r"\boxed{2500000}", "2.5 million"], [r"\boxed{2.5}"]),
    ("3.5", ["The answer is 3 1/2."], ["3"]),
    ("41", ["The answer is not 42 but 41.", "The answer is 41, not 42."], ["The answer is not 41."]),
    ("42", ["The answer is 42."], ["The answer is not 42 but 41.", "The answer is 41, not 42."]),
    (0.10000000149011612, ["0.1", "0.10000000149011612"], ["0.2"]),  # 0.1 of a float32 column
    (12345.677734375, ["12345.678", "12345.677734375"], ["12345.679", "12345"]),
    ("1 000 000", ["1000000", r"\boxed{10^6}"], ["1"]),
    ("\u20ac50", ["50"], ["5"]),
    ("5 dollars", ["5", "$5"], ["6"]),
    (r"\boldsymbol{6}", [r"\boxed{6}"], ["5"]),
    ("0x1F", ["0x1f"], ["0", "31"]),
    # numbers of JSON and Parquet
    (72, [r"\boxed{72}"], ["7"]),
    (72.0, [r"\boxed{72}"], ["7"]),
    (2**63 - 1, [str(2**63 - 1)], [str(2**63)]),
    (1e16, [r"\boxed{10^{16}}", "10000000000000000", "1e16"], [r"\boxed{1}", "16"]),
    (6.02e23, [r"\boxed{6.02 \times 10^{23}}", "6.02e23", "6" + "02" + "0" * 21], ["6.02", r"\boxed{6.02}"]),
    ("6.02e23", [r"\boxed{6.02 \times 10^{23}}", "6.02e23"], ["6.02", "23"]),
    (2.5e-07, [r"$2.5 \times 10^{-7}$", "0.00000025", "2.5e-7"], ["2.5", "0", "0.0000003", "7"]),
    ("1e-07", ["0.0000001"], ["1", "0"]),
    (r"3 \times 10^8", [r"\boxed{300000000}", "3e8"], ["3", "8"]),
]

REFUSED = [
    ("", "is empty"),
    ("proof", "stands for a missing answer"),
    ("notfound", "stands for a missing answer"),
    ("It follows that x is the answer, 5", "within mathematics"),
    (r"\textbf{(B)}\ 12", "the text '(B)' within mathematics"),
    (r"5 \text{ hours } 20 \text{ minutes}", "the text 'hours' within mathematics"),
    (r"5 \text{ feet}, 3 \text{ inches}", "has several units: feet, inches"),
    (r"n \text{ is even}", "the text 'is even' within mathematics"),
    ("2 t", "has the letter 't', which is a variable or a unit"),
    ("5'6\"", "is not mathematics"),
    ("3h20m", "is not mathematics"),
    ("0.333...", "is not mathematics"),
    (r"7 \quad 8", "is not mathematics"),
    (r"\gcd(m,n)", "is not mathematics"),
    (r"1 + 2 + \cdots + n", "is not mathematics that math-verify can read"),
    (["1", "2"], "is a list of 2 items, expected one answer"),
    ([], "is a list of 0 items"),
    ({"value": "1"}, "has the fields value, expected one answer: set `column` to COLUMN.FIELD"),
    (float("inf"), "is of type float, expected text or a number"),
]


def rewards(settings: dict[str, Any], completions: list[str], right: list[Any]) -> list[Score]:
    column = settings.get("column", "answer").partition(".")[0]
    reward = AnswerReward(AnswerRewardConfig(**settings))
    return reward.call([HI] * len(right), completions, {column: right}, False)


@pytest.mark.parametrize(("right", "correct", "wrong"), MATH, ids=lambda value: str(value)[:30])
def test_a_right_answer_is_read_as_its_dataset_writes_it(
    right: Any, correct: list[str], wrong: list[str]
) -> None:
    said = correct + wrong
    expected = [Score(1.0)] * len(correct) + [Score(0.0)] * len(wrong)
    assert dict(zip(said, rewards({}, said, [right] * len(said)), strict=True)) == dict(
        zip(said, expected, strict=True)
    )


@pytest.mark.parametrize(("right", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_right_answer_that_cannot_be_read_rejects_its_row(right: Any, reason: str) -> None:
    (score,) = rewards({}, ["5"], [right])
    assert score.reward is None
    assert reason in str(score.error)
    assert "Fix 'answer' of the row" in str(score.error)


def test_answers_in_prose_and_to_given_digits() -> None:
    pairs = [
        ("First 3, then 4. The answer is 1,200 dollars.", "1200", 1.0),
        ("$x^2 + 2x + 1$", "$(x+1)^2$", 1.0),
        ("The answer is 12.", "13", 0.0),
        ("I do not know.", "13", 0.0),
        ("0.3333333", "1/3", 1.0),
    ]
    said, right, expected = zip(*pairs, strict=True)
    assert [score.reward for score in rewards({}, list(said), list(right))] == list(expected)
    assert rewards({"digits": 2}, ["0.051", "0.056"], ["0.05", "0.05"]) == [Score(1.0), Score(0.0)]


def test_answers_are_compared_as_text_where_asked() -> None:
    settings = {"match": "exact", "completion_after": "Answer:", "right": 2.0, "wrong": -1.0}
    said = [
        "B or C? Answer: C",
        "Answer:  new  YORK ",
        "C",
        "Answer: D",
        "Answer: B",
        "Answer: 72",
        "Answer: 72",
    ]
    right = ["c", "New York", "c", None, ["B"], 72.0, "72.0"]
    expected = [2.0, 2.0, -1.0, None, 2.0, 2.0, -1.0]
    assert rewards(settings, said, right) == [Score(reward) for reward in expected]


def test_a_field_of_a_struct_is_named_with_a_dot() -> None:
    settings = {"column": "reward_model.ground_truth"}  # DAPO
    right = [{"ground_truth": "34", "style": "rule"}, {"ground_truth": None}, None, {"other": 1}, "34"]
    scores = rewards(settings, ["34"] * 5, right)
    assert scores[:4] == [Score(1.0), Score(None), Score(None), Score(None)]
    assert "is no struct, so it has no field 'ground_truth'" in str(scores[4].error)
    assert AnswerReward(AnswerRewardConfig(column="a.b")).call([HI], ["1"], {"a.b": ["1"]}, False) == [
        Score(1.0)
    ]
    with pytest.raises(RewardError, match="the data has no column 'solution' with the right answer"):
        AnswerReward(AnswerRewardConfig(column="solution.x")).call([HI], ["1"], {"answer": ["1"]}, False)


def test_the_pool_sends_the_struct_of_a_dotted_column() -> None:
    reward = open_reward(AnswerRewardConfig(column="reward_model.ground_truth", answer_after="####"))
    try:
        columns = {"reward_model": [{"ground_truth": "24 and 48\n#### 72"}], "other": ["x"]}
        assert reward.score([HI], ["72"], columns) == [Score(1.0)]
    finally:
        reward.close()


TYPES: list[tuple[pa.DataType, Any, str, str]] = [
    # Arrow type, value, a right completion, a wrong one
    (pa.string(), "72", "72", "7"),
    (pa.large_string(), "72", "72", "7"),
    (pa.dictionary(pa.int32(), pa.string()), "72", "72", "7"),
    (pa.binary(), b"7", "7", "8"),
    (pa.int8(), 7, "7", "8"),
    (pa.uint64(), 2**64 - 1, str(2**64 - 1), "1"),
    (pa.float16(), 0.5, "0.5", "0"),
    (pa.float32(), 0.1, "0.1", "0.2"),
    (pa.float64(), 1e16, r"\boxed{10^{16}}", "1"),
    (pa.decimal128(10, 2), Decimal("72.00"), "72", "7200"),
    (pa.decimal128(38, 10), Decimal("2.5E-7"), "0.00000025", "2.5"),
    (pa.bool_(), True, "True", "False"),
    (pa.date32(), datetime.date(2024, 5, 1), "2024-05-01", "2018"),
    (pa.timestamp("s"), datetime.datetime(2024, 5, 1, 6, 30), "2024-05-01 06:30:00", "2018"),
    (pa.list_(pa.string()), ["72"], "72", "7"),
    (pa.list_(pa.float64(), 1), [2.5e-7], "2.5e-7", "2.5"),
]


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_every_type_of_parquet_and_datasets_is_the_answer_that_it_says(tmp_path: Path, kind: str) -> None:
    arrays = {str(n): pa.array([value], type_) for n, (type_, value, _, _) in enumerate(TYPES)}
    table = pa.table({"prompt": ["What?"], **arrays})
    source = tmp_path / "data.parquet"
    if kind == "parquet":
        pq.write_table(table, source)
    else:
        source = tmp_path / "saved"
        kept = table.drop_columns(["2"])  # `datasets` reads dictionaries as plain text
        datasets.Dataset(kept).save_to_disk(str(source))
    ((_, row),) = read_rows(str(source) if kind == "parquet" else f"hf://{source}")
    assert isinstance(row, dict)
    columns = {
        name: [value]
        for name, value in json.loads(parse_row(row, PromptsConfig(source="s")).metadata).items()
    }
    for number, (type_, _, correct, wrong) in enumerate(TYPES):
        if str(number) in columns:
            reward = AnswerReward(AnswerRewardConfig(column=str(number)))
            found = [reward.call([HI], [said], columns, False)[0].reward for said in (correct, wrong)]
            assert found == [1.0, 0.0], type_
            exact = AnswerReward(AnswerRewardConfig(column=str(number), match="exact"))
            plain = [correct, wrong] if "\\" not in correct else ["1e16", wrong]
            found = [exact.call([HI], [said], columns, False)[0].reward for said in plain]
            assert found == [1.0, 0.0], type_


def test_bytes_that_are_no_text_are_no_answer() -> None:
    row = {"prompt": "What?", "answer": b"\xff\x00"}
    metadata = json.loads(parse_row(row, PromptsConfig(source="s")).metadata)
    (score,) = rewards({}, ["1"], [metadata["answer"]])
    assert "has the fields base64, expected one answer" in str(score.error)


def test_every_answer_in_the_format_of_gsm8k_is_read() -> None:
    lines = (DATA / "word_problems.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    numbers = [answer.rpartition("####")[2].strip() for answer in answers]
    assert rewards({}, [rf"So it is \boxed{{{number}}}." for number in numbers], answers) == [
        Score(1.0)
    ] * len(answers)
    assert {score.reward for score in rewards({}, [f"{n}1" for n in numbers], answers)} == {0.0}
