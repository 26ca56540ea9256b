"""The suites on files in their published formats: AlpacaEval with a judge at an OpenAI-compatible address, LeetCode in the sandbox."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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

SHARED = Path(__file__).parents[3] / "shared" / "data"
OUTPUT = re.compile(r'"model_identifier": "(m|M)",\s*"output": """(.*?)"""', re.DOTALL)


class Judge:
    """A judge at an address: `prefer(answer of m, answer of M)` says how likely it finds m the better one."""

    def __init__(self, prefer: Callable[[str, str], float]):
        self.prefer = prefer
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append({"path": self.path, **request})
                judge.keys.append(self.headers["Authorization"])
                answer = json.dumps(judge.answer(request)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        outputs = dict(OUTPUT.findall(request["messages"][-1]["content"]))
        chance = self.prefer(outputs["m"], outputs["M"])
        chances = {"m": chance, "M": 1 - chance} if 0 < chance < 1 else {"Both": 1.0}
        top = [
            {"token": token, "bytes": None, "logprob": float(np.log(p))}
            for token, p in sorted(chances.items(), key=lambda item: -item[1])
        ]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": top[0]["token"]},
            "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [choice],
            "usage": usage,
        }


@pytest.fixture
def judge_for() -> Iterator[Callable[[Callable[[str, str], float]], Judge]]:
    judges: list[Judge] = []

    def start(prefer: Callable[[str, str], float]) -> Judge:
        judges.append(Judge(prefer))
        threading.Thread(target=judges[-1].server.serve_forever, daemon=True).start()
        return judges[-1]

    yield start
    for judge in judges:
        judge.server.shutdown()
        judge.server.server_close()


def write_pair(folder: Path, baseline: list[str], outputs: list[str]) -> tuple[Path, Path]:
    """The two files of a comparison, in the package's format."""
    rows = [
        {"instruction": f"question {number}", "output": text, "generator": "baseline", "dataset": "made"}
        for number, text in enumerate(baseline)
    ]
    write_outputs(folder / "baseline.json", rows)
    write_outputs(folder / "outputs.json", model_outputs(rows, dict(enumerate(outputs)), "policy"))
    return folder / "outputs.json", folder / "baseline.json"


def longer(first: str, second: str) -> float:
    """Likes what is longer, by the logarithm of the ratio, and nothing else."""
    return len(first) / (len(first) + len(second))


@pytest.mark.slow
def test_win_rate_is_the_judges_mean_preference_and_length_explains_it_all(
    judge_for: Callable[..., Judge], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-of-the-test")
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 60)
    ratios = rng.choice([1.0, 1.5, 2.0, 3.0], 60)
    outputs, baseline = write_pair(
        tmp_path,
        ["b" * n for n in lengths],
        ["p" * round(n * r) for n, r in zip(lengths, ratios, strict=True)],
    )
    judge = judge_for(longer)
    settings = AlpacaEvalJudge(url=judge.url, model="my/judge", api_key="MY_KEY")

    result = judge_outputs(outputs, baseline, tmp_path / "judged", settings)

    mine = np.array([len(row["output"]) for row in json.loads(outputs.read_text())])
    expected = 100 * np.mean(mine / (mine + lengths))
    assert result["win_rate"] == pytest.approx(expected, abs=1e-3)
    assert result["win_rate"] > 55
    assert result["length_controlled_win_rate"] == pytest.approx(50, abs=2.5)
    assert result["length_control"] == "length_controlled_minimal"
    assert (result["judged"], result["unreadable"]) == (60, 0)
    assert result["mean_length"] == pytest.approx(mine.mean())
    assert len(judge.asked) == 60
    assert {row["model"] for row in judge.asked} == {"my/judge"}
    assert {row["path"] for row in judge.asked} == {"/v1/chat/completions"}
    assert set(judge.keys) == {"Bearer secret-of-the-test"}
    kept = "".join(path.read_text() for path in (tmp_path / "judged").iterdir())
    assert "secret-of-the-test" not in kept

    again = judge_outputs(outputs, baseline, tmp_path / "judged", settings)

    numbers = {key: value for key, value in result.items() if not isinstance(value, str)}
    assert {key: again[key] for key in numbers} == pytest.approx(numbers, rel=1e-6)
    assert len(judge.asked) == 60, "what was judged before was paid for again"


@pytest.mark.slow
def test_published_regression_takes_the_difficulties_from_a_local_file(
    judge_for: Callable[..., Judge], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    outputs, baseline = write_pair(
        tmp_path, ["b" * 40] * 30, ["p" * int(n) for n in rng.integers(30, 90, 30)]
    )
    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for gamed in ("verbose", "concise"):  # the published file's order, on which the package relies
        for index in range(30):
            lines.append(
                f"{gamed},{index},{rng.uniform(0.2, 0.8):.3f},{rng.normal():.3f},{rng.normal():.3f},False"
            )
    (tmp_path / "df_gamed.csv").write_text("\n".join(lines) + "\n")

    result = judge_outputs(
        outputs,
        baseline,
        tmp_path / "judged",
        AlpacaEvalJudge(url=judge_for(longer).url),
        difficulty=tmp_path / "df_gamed.csv",
    )

    assert result["length_control"] == "length_controlled_v1"
    assert 0 < result["length_controlled_win_rate"] < result["win_rate"]


@pytest.mark.slow
def test_answers_of_a_judge_that_cannot_be_read_are_counted_and_none_at_all_is_an_error(
    judge_for: Callable[..., Judge], tmp_path: Path
) -> None:
    outputs, baseline = write_pair(tmp_path, ["one", "two", "three", "four"], ["1", "2", "3", "4"])
    some = judge_for(lambda first, second: 0.0 if "three" in (first, second) else 0.5)
    none = judge_for(lambda first, second: 0.0)

    result = judge_outputs(outputs, baseline, tmp_path / "some", AlpacaEvalJudge(url=some.url))
    assert (result["judged"], result["unreadable"]) == (3, 1)
    assert result["win_rate"] == pytest.approx(50)
    assert result["length_controlled_win_rate"] is None
    assert "5 are needed" in result["length_control"]

    with pytest.raises(DataError, match="none of the judge's 4 answers could be read"):
        judge_outputs(outputs, baseline, tmp_path / "none", AlpacaEvalJudge(url=none.url))


@pytest.mark.slow
def test_judge_that_does_not_answer_is_told_apart_from_one_that_is_not_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, baseline = write_pair(tmp_path, ["a"], ["b"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{closed.server_port}/v1"
    closed.server_close()

    with pytest.raises(ConfigError, match="no OPENAI_API_KEY"):
        judge_outputs(outputs, baseline, tmp_path, AlpacaEvalJudge())
    with pytest.raises(EngineError, match="cannot be asked"):
        judge_outputs(outputs, baseline, tmp_path, AlpacaEvalJudge(url=url))
    with pytest.raises(ConfigError, match="has no configuration 'nobody'"):
        judge_outputs(outputs, baseline, tmp_path, AlpacaEvalJudge(url=url, annotator="nobody"))


@pytest.mark.slow
def test_real_preferences_of_real_instructions_come_out_as_their_mean(
    judge_for: Callable[..., Judge], tmp_path: Path
) -> None:
    path = SHARED / "alpaca_eval_rewards_200.parquet"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside this checkout")
    import polars as pl

    table = pl.read_parquet(path)
    model = table["model"].cast(pl.String).sort()[0]
    rows = table.filter(pl.col("model").cast(pl.String) == model).sort("prompt_index").head(40)
    preference = {
        f"answer {row['prompt_index']}": row["preference"] - 1 for row in rows.iter_rows(named=True)
    }

    def judged(first: str, second: str) -> float:
        chance = preference[first] if first in preference else 1 - preference[second]
        return min(max(chance, 1e-6), 1 - 1e-6)

    baseline = [
        {"instruction": text, "output": "baseline", "generator": "gpt4"} for text in rows["instruction"]
    ]
    write_outputs(tmp_path / "baseline.json", baseline)
    answers = dict(enumerate(preference))
    write_outputs(
        tmp_path / "outputs.json", model_outputs(read_baseline(tmp_path / "baseline.json"), answers, model)
    )

    result = judge_outputs(
        tmp_path / "outputs.json",
        tmp_path / "baseline.json",
        tmp_path,
        AlpacaEvalJudge(url=judge_for(judged).url),
    )

    assert result["judged"] == 40
    assert result["win_rate"] == pytest.approx(100 * np.mean(list(preference.values())), abs=0.01)


def test_rows_come_from_lists_and_lines_and_a_bad_one_is_named(tmp_path: Path) -> None:
    rows = [{"instruction": "say [1]", "output": "é"}, {"instruction": "b", "output": "c"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
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
        with pytest.raises(DataError, match=message):
            read_rows(tmp_path / name, ("instruction", "output"))


def problem(name: str, body: str) -> dict[str, Any]:
    return {
        "task_id": name,
        "query": f"Write {name}",
        "prompt": "from math import *\n",
        "entry_point": "Solution().f",
        "test": body,
    }


def solution(expression: str) -> str:
    return f"Here it is.\n```python\nclass Solution:\n    def f(self, x):\n        return {expression}\n```\n"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="the sandbox needs bubblewrap: `make system` installs it"
)
def test_tests_passed_and_pass_at_1_are_means_over_problems() -> None:
    problems = [
        problem(
            "square", "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"
        ),
        problem(
            "root", "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(9) == 3\n"
        ),
        problem("unasked", "def check(candidate):\n    assert candidate(1) == 1\n"),
    ]

    summary, rows = score_solutions(
        problems,
        {"square": [solution("x * x"), solution("x + 2")], "root": ["no code", solution("isqrt(x)")]},
    )

    shares = {(row["task_id"], row["solution"]): row["tests_passed"] for row in rows}
    assert shares == {("square", 0): 1.0, ("square", 1): 0.5, ("root", 0): 0.0, ("root", 1): 1.0}
    assert summary["problems"] == 2
    assert summary["samples"] == 4
    assert summary["tests_passed"]["mean"] == pytest.approx((0.75 + 0.5) / 2)
    assert summary["pass_at_1"]["mean"] == pytest.approx(0.5)
    assert summary["unusable"] == {}


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="the sandbox needs bubblewrap: `make system` installs it"
)
def test_published_solutions_of_real_problems_pass_and_another_problems_do_not() -> None:
    path = SHARED / "leetcode_train_100.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside this checkout")
    problems = read_problems(path, limit=12)
    names = [row["task_id"] for row in problems]
    right = {row["task_id"]: [row["response"]] for row in problems}
    wrong = dict(zip(names, [*list(right.values())[1:], right[names[0]]], strict=True))

    assert score_solutions(problems, right)[0]["pass_at_1"]["mean"] == 1.0
    assert score_solutions(problems, wrong)[0]["pass_at_1"]["mean"] == 0.0
