"""The suites on files in their published formats: AlpacaEval with a judge at an OpenAI-compatible address, LeetCode in the sandbox."""

import json
import re

import numpy as np
import pytest

from qrpo.errors import ConfigError, DataError, EngineError
from qrpo.evaluation.suites.alpaca_eval import (
    AlpacaEvalJudge,
    judge_outputs,
    model_outputs,
    read_baseline,
    write_outputs,
)
from qrpo.evaluation.suites.files import read_rows
from qrpo.evaluation.suites.leetcode import read_problems, score_solutions
from qrpo.rewards import CodeRewardConfig
from qrpo.sandbox import Limits
from tests.support.refusals import refuses
from tests.support.rewards import DATA, needs_bubblewrap
from tests.support.servers import FakeChatServer, closed_url, token_completion

OUTPUT = re.compile(r'"model_identifier": "(m|M)",\s*"output": """(.*?)"""', re.DOTALL)


def preferring(prefer):
    """A judge at a URL: `prefer(answer of m, answer of M)` is its probability that m is the better one."""

    def answer(number, body):
        outputs = dict(OUTPUT.findall(body["messages"][-1]["content"]))
        chance = prefer(outputs["m"], outputs["M"])
        chances = {"m": chance, "M": 1 - chance} if 0 < chance < 1 else {"Both": 1.0}
        return token_completion(max(chances, key=chances.__getitem__), chances)

    return FakeChatServer(answer)


def write_pair(folder, baseline, outputs):
    """The two files of a comparison, in the package's format."""
    rows = [
        {"instruction": f"question {number}", "output": text, "generator": "baseline", "dataset": "made"}
        for number, text in enumerate(baseline)
    ]
    write_outputs(folder / "baseline.json", rows)
    write_outputs(folder / "outputs.json", model_outputs(rows, dict(enumerate(outputs)), "policy"))
    return folder / "outputs.json", folder / "baseline.json"


def longer(first, second):
    """Likes what is longer, by the logarithm of the ratio, and nothing else."""
    return len(first) / (len(first) + len(second))


@pytest.mark.slow
def test_win_rate_is_the_judges_mean_preference_and_length_explains_it_all(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-of-the-test")
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 60)
    ratios = rng.choice([1.0, 1.5, 2.0, 3.0], 60)
    longer_answers = ["p" * round(n * r) for n, r in zip(lengths, ratios, strict=True)]
    outputs, baseline = write_pair(tmp_path, ["b" * n for n in lengths], longer_answers)
    with preferring(longer) as judge:
        settings = AlpacaEvalJudge(url=judge.url, model="my/judge", api_key="MY_KEY")
        result = judge_outputs(outputs, baseline, tmp_path / "judged", settings)
        assert len(judge.requests) == 60
        again = judge_outputs(outputs, baseline, tmp_path / "judged", settings)
        assert len(judge.requests) == 60, "what was judged before was paid for again"

    mine = np.array([len(row["output"]) for row in json.loads(outputs.read_text())])
    expected = 100 * np.mean(mine / (mine + lengths))
    assert result["win_rate"] == pytest.approx(expected, abs=1e-3)
    assert result["win_rate"] > 55
    assert result["length_controlled_win_rate"] == pytest.approx(50, abs=2.5)
    assert result["length_control"] == "length_controlled_minimal"
    assert (result["judged"], result["unreadable"]) == (60, 0)
    assert result["mean_length"] == pytest.approx(mine.mean())
    assert {request.body["model"] for request in judge.requests} == {"my/judge"}
    assert {request.path for request in judge.requests} == {"/v1/chat/completions"}
    headers = [{name.lower(): value for name, value in r.headers.items()} for r in judge.requests]
    assert {header["authorization"] for header in headers} == {"Bearer secret-of-the-test"}
    kept = "".join(path.read_text() for path in (tmp_path / "judged").iterdir())
    assert "secret-of-the-test" not in kept
    numbers = {key: value for key, value in result.items() if not isinstance(value, str)}
    assert {key: again[key] for key in numbers} == pytest.approx(numbers, rel=1e-6)


@pytest.mark.slow
def test_published_regression_takes_the_difficulties_from_a_local_file(
    tmp_path,
):
    rng = np.random.default_rng(1)
    outputs, baseline = write_pair(
        tmp_path, ["b" * 40] * 30, ["p" * int(n) for n in rng.integers(30, 90, 30)]
    )
    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for gamed in ("verbose", "concise"):  # the published file's order, on which the package relies
        numbers = np.column_stack([rng.uniform(0.2, 0.8, 30), rng.normal(size=(30, 2))]).round(3)
        lines += [f"{gamed},{index},{','.join(map(str, row))},False" for index, row in enumerate(numbers)]
    (tmp_path / "df_gamed.csv").write_text("\n".join(lines) + "\n")

    with preferring(longer) as server:
        judge = AlpacaEvalJudge(url=server.url)
        difficulty = tmp_path / "df_gamed.csv"
        result = judge_outputs(outputs, baseline, tmp_path / "judged", judge, difficulty=difficulty)

    assert result["length_control"] == "length_controlled_v1"
    assert 0 < result["length_controlled_win_rate"] < result["win_rate"]


@pytest.mark.slow
def test_answers_of_a_judge_that_cannot_be_read_are_counted_and_none_at_all_is_an_error(
    tmp_path,
):
    outputs, baseline = write_pair(tmp_path, ["one", "two", "three", "four"], ["1", "2", "3", "4"])
    with preferring(lambda first, second: 0.0 if "three" in (first, second) else 0.5) as some:
        result = judge_outputs(outputs, baseline, tmp_path / "some", AlpacaEvalJudge(url=some.url))
    assert (result["judged"], result["unreadable"]) == (3, 1)
    assert result["win_rate"] == pytest.approx(50)
    assert result["length_controlled_win_rate"] is None
    assert "5 are needed" in result["length_control"]

    with (
        preferring(lambda first, second: 0.0) as none,
        pytest.raises(DataError, match="none of the judge's 4 answers could be read"),
    ):
        judge_outputs(outputs, baseline, tmp_path / "none", AlpacaEvalJudge(url=none.url))


@pytest.mark.slow
def test_judge_that_does_not_answer_is_told_apart_from_one_that_is_not_set_up(tmp_path, monkeypatch):
    outputs, baseline = write_pair(tmp_path, ["a"], ["b"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    url = closed_url()
    refuses(ConfigError, "no OPENAI_API_KEY", judge_outputs, outputs, baseline, tmp_path, AlpacaEvalJudge())
    refuses(
        EngineError, "cannot be asked", judge_outputs, outputs, baseline, tmp_path, AlpacaEvalJudge(url=url)
    )
    refuses(
        ConfigError,
        "has no configuration 'nobody'",
        judge_outputs,
        outputs,
        baseline,
        tmp_path,
        AlpacaEvalJudge(url=url, annotator="nobody"),
    )


@pytest.mark.slow
def test_graded_preferences_come_out_as_their_mean(tmp_path):
    instructions = [
        f"Explain {subject} {way}"
        for subject in ("tides", "rust", "jazz", "tea", "snow", "ants")
        for way in ("briefly", "twice")
    ]
    preference = {f"answer {i}": i / 13 for i in range(len(instructions))}

    def judged(first, second):
        chance = preference[first] if first in preference else 1 - preference[second]
        return min(max(chance, 1e-6), 1 - 1e-6)

    baseline = [{"instruction": text, "output": "baseline", "generator": "gpt4"} for text in instructions]
    write_outputs(tmp_path / "baseline.json", baseline)
    answers = dict(enumerate(preference))
    write_outputs(
        tmp_path / "outputs.json", model_outputs(read_baseline(tmp_path / "baseline.json"), answers, "m")
    )

    with preferring(judged) as server:
        judge = AlpacaEvalJudge(url=server.url)
        result = judge_outputs(tmp_path / "outputs.json", tmp_path / "baseline.json", tmp_path, judge)

    assert result["judged"] == len(instructions)
    assert result["win_rate"] == pytest.approx(100 * np.mean(list(preference.values())), abs=0.01)


def test_rows_come_from_lists_and_lines_and_a_bad_one_is_named(tmp_path):
    rows = [{"instruction": "say\u2028[1]\x85", "output": "é"}, {"instruction": "b", "output": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "list.json").write_text(f"[{','.join(lines)}]", encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "bad.json").write_text('[{"instruction": "a", "output": "b"}, {"instruction": 3}]')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "broken.json").write_text("[{")

    assert read_baseline(tmp_path / "list.json") == rows == read_baseline(tmp_path / "lines.jsonl")
    assert read_baseline(tmp_path / "list.json", limit=1) == rows[:1]
    for name, message in (
        ("bad.json", r"\[1\]: expected text in 'instruction', 'output'"),
        ("empty.json", "there are no rows"),
        ("broken.json", "is not valid JSON"),
        ("none.json", "no file"),
    ):
        refuses(DataError, message, read_rows, tmp_path / name, ("instruction", "output"))


def problem(name, body):
    given = {"query": f"Write {name}", "prompt": "from math import *\n", "entry_point": "Solution().f"}
    return {"task_id": name, **given, "test": body}


def solution(expression):
    return f"Here it is.\n```python\nclass Solution:\n    def f(self, x):\n        return {expression}\n```\n"


@pytest.mark.slow
@needs_bubblewrap
def test_tests_passed_and_pass_at_1_are_means_over_problems():
    def tested(name, *pairs):
        asserts = "".join(f"    assert candidate({given}) == {wanted}\n" for given, wanted in pairs)
        return problem(name, f"def check(candidate):\n{asserts}")

    problems = [tested("square", (2, 4), (3, 9)), tested("root", (4, 2), (9, 3)), tested("unasked", (1, 1))]

    summary, rows = score_solutions(
        problems,
        {"square": [solution("x * x"), solution("x + 2")], "root": ["no code", solution("isqrt(x)")]},
        reward=CodeRewardConfig(limits=Limits(cpu_seconds=3), packages=("yaml",)),
    )

    shares = {(row["task_id"], row["solution"]): row["tests_passed"] for row in rows}
    assert shares == {("square", 0): 1.0, ("square", 1): 0.5, ("root", 0): 0.0, ("root", 1): 1.0}
    assert summary["problems"] == 2
    assert summary["samples"] == 4
    assert summary["tests_passed"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert summary["pass_at_1"]["mean"] == pytest.approx(0.5)
    assert summary["unusable"] == {}
    assert (summary["limits"]["cpu_seconds"], summary["packages"]) == (3, ["yaml"])
    assert {row["note"] != "" for row in rows if row["tests_passed"] < 1} == {True}


@pytest.mark.slow
@needs_bubblewrap
def test_published_solutions_of_real_problems_pass_and_another_problems_do_not():
    problems = read_problems(DATA / "code_problems.jsonl", limit=6)
    names = [row["task_id"] for row in problems]
    right = {row["task_id"]: [row["response"]] for row in problems}
    wrong = dict(zip(names, [*list(right.values())[1:], right[names[0]]], strict=True))

    assert score_solutions(problems, right)[0]["pass_at_1"]["mean"] == 1.0
    assert score_solutions(problems, wrong)[0]["pass_at_1"]["mean"] == 0.0
