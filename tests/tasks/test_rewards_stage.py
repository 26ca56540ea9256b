"""The rewards stage on stores of several kinds: what a reward sees, what is committed, and that answers are paid for once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from qrpo.errors import RewardError
from qrpo.rewards import Score, combine
from storage import PartKey, Store
from tasks.answers import StoredAnswers
from tasks.config import PipelineConfig, load_config, parse_config
from tasks.plan import PartPlan
from tasks.planner import plan_pipeline
from tasks.stages import rewards as rewards_stage
from tasks.stages.rewards import STAGE, input_digest, known_scores, missing_rewards, reward_settings
from tests.support.servers import FakeChatServer, Reply, token_completion
from tests.support.views import row, table

FUNCTIONS = """\
calls = 0

def number_of_tokens(completions, completion_ids, **columns):
    global calls
    calls += 1
    return [len(ids) + 1000 * calls for ids in completion_ids]

def precise(completions, **columns):
    return [1e9 + len(text) + 1e-6 for text in completions]

def even(completions, level):
    return [None if n is None else float(n % 2 == 0) for n in level]
"""


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    """Grades a completion by its number of words, 1 to 5."""

    def grade(_: int, body: dict[str, Any]) -> Reply:
        return token_completion(str(min(5, len(body["messages"][0]["content"].split()))), tokens=7)

    with FakeChatServer(grade) as server:
        yield server


def config_of(rewards: Sequence[Mapping[str, Any]]) -> PipelineConfig:
    return parse_config(
        {
            "prompts": {"source": "none"},
            "reference": {"model": {"path": "org/none"}},
            "completions": {"num_ref": 3},
            "rewards": list(rewards),
        }
    )


def judge(url: str, **settings: Any) -> dict[str, Any]:
    base = {"kind": "judge", "name": "judge", "base_url": url, "model": "m", "rubric": "r"}
    return {**base, "template": "{{ completion }}", "backoff": 0.01, **settings}


def scored(store: Store, rewards: Sequence[Mapping[str, Any]], attempt: str = "1") -> list[dict[str, Any]]:
    """Three parts of two prompts with three completions each, through the stage; all rows in order."""
    parts = []
    for number in range(3):
        keys = {stage: PartKey(stage, "test", f"{number:08d}") for stage in ("prompts", "completions")}
        ids = [f"{2 * number + n:032x}" for n in range(2)]
        asked = {"messages": [{"role": "user", "content": "hi"}], "conversational": False}
        levels = [json.dumps({"level": None if number == 2 else n}) for n in range(2)]
        prompts = [row("prompts", of, metadata=one, **asked) for of, one in zip(ids, levels, strict=True)]
        said = {n: {"text": "word " * n, "token_ids": list(range(n + 1))} for n in range(3)}
        completions = [
            row("completions", of, **{**one, "sample_index": n, "text": f"{of} {one['text']}"})
            for of in ids
            for n, one in said.items()
        ]
        store.commit_part(keys["prompts"], table("prompts", prompts))
        store.commit_part(keys["completions"], table("completions", completions))
        key = PartKey("rewards", f"test{attempt}", f"{number:08d}")
        slice_ = {"prompts": keys["prompts"].fingerprint}
        parts.append(PartPlan(key, (keys["completions"], keys["prompts"]), slice_))
    records = list(STAGE.compute(STAGE.work(config_of(rewards), store, parts)))
    assert [record.key for record in records] == [part.key for part in parts]
    return [row for record in records for row in store.read_part(record).to_pylist()]


def test_small_parts_are_scored_in_one_call_and_every_component_is_kept(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    length = {"kind": "function", "name": "length", "function": f"{tmp_path}/f.py:number_of_tokens"}
    even = {"kind": "function", "name": "even", "weight": 0.5, "function": f"{tmp_path}/f.py:even"}
    rows = scored(Store(tmp_path / "store"), [length, even])
    first = [1001.0, 1002.0, 1003.0]  # one call: the function counts them
    assert [row["components"][0] for row in rows] == [{"name": "length", "value": v} for v in first * 6]
    assert [row["reward"] for row in rows[:6]] == [1001.5, 1002.5, 1003.5, 1001.0, 1002.0, 1003.0]
    assert [row["reward"] for row in rows[12:]] == first * 2  # `even` does not apply where level is null
    assert [len(row["components"]) for row in rows] == [2] * 12 + [1] * 6
    assert [row["error"] for row in rows] == [None] * 18


def function(tmp_path: Path, name: str, **settings: Any) -> dict[str, Any]:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return {"kind": "function", "name": name, "function": f"{tmp_path}/f.py:{name}", **settings}


def test_values_are_float64_from_the_function_to_the_table(tmp_path: Path) -> None:
    rows = scored(Store(tmp_path / "store"), [function(tmp_path, "precise")])
    assert [row["reward"] for row in rows[:3]] == [1e9 + n + 1e-6 for n in (33, 38, 43)]
    assert rows[0]["components"] == [{"name": "precise", "value": 1e9 + 33 + 1e-6}]


def test_a_watched_reward_that_fails_or_does_not_apply_changes_nothing(
    tmp_path: Path, server: FakeChatServer
) -> None:
    weighted = function(tmp_path, "precise")
    plain = scored(Store(tmp_path / "plain"), [weighted])
    down = judge("http://127.0.0.1:9/v1", name="judge", weight=0.0, attempts=1)
    watched = [weighted, function(tmp_path, "even", weight=0.0), down]
    store = Store(tmp_path / "store")
    rows = scored(store, watched)
    assert [(row["reward"], row["error"]) for row in rows] == [(row["reward"], None) for row in plain]
    assert {row["components"][-1]["value"] for row in rows} == {None}  # failed
    assert [len(row["components"]) for row in rows] == [3] * 12 + [2] * 6  # `even` does not apply to the last


def test_only_a_models_values_serve_from_the_version_that_rounded_them(
    tiny_reward_model: Path, tmp_path: Path
) -> None:
    rewards = [
        {"kind": "model", "name": "model", "model": {"path": str(tiny_reward_model)}},
        function(tmp_path, "precise"),
    ]
    config = config_of(rewards).rewards
    settings, outside = reward_settings(config)
    earlier = {
        name: {key: value for key, value in of.items() if key != "precision"} for name, of in outside.items()
    }
    ours, theirs = ({"settings": settings, "outside": of} for of in (outside, earlier))
    assert missing_rewards(ours, None) == 2
    assert missing_rewards(ours, theirs) == 1
    assert STAGE.reuse is not None
    assert 1 in STAGE.reuse.versions


def test_answers_are_paid_for_once_on_any_store(
    store: Store, server: FakeChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-123456")
    rows = scored(store, [judge(server.url, api_key_env="JUDGE_KEY")])
    assert [row["reward"] for row in rows] == [1.0, 2.0, 3.0] * 6
    assert len(server.requests) == 18
    nowhere = "http://127.0.0.1:9/v1"  # answers from here would be an error
    again = scored(store, [judge(nowhere, weight=2.0, attempts=1)], attempt="2")
    assert [row["reward"] for row in again] == [2.0, 4.0, 6.0] * 6
    written = b"".join(store.read_bytes(key) for key in store.list())
    assert b"secret-123456" not in written


def test_a_budget_stops_the_stage_and_the_next_run_pays_only_for_the_rest(
    tmp_path: Path, server: FakeChatServer
) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(RewardError, match=r"budget is used up .* raise max_calls"):
        scored(store, [judge(server.url, max_calls=5)])
    assert len(server.requests) == 5
    assert store.family_parts("rewards", "test1") == []
    assert len(scored(store, [judge(server.url, max_calls=18)])) == 18
    assert len(server.requests) == len({request.prompt for request in server.requests}) == 18


def test_a_damaged_file_of_answers_costs_its_answers_and_nothing_else(store: Store) -> None:
    answers = StoredAnswers(store)
    answers.keep("group", {"a": "1", "b": "2"})
    answers.keep("group", {"c": "3"})
    assert answers.load("group") == {"a": "1", "b": "2", "c": "3"}
    assert answers.load("other") == {}
    store.write_bytes("answers/group/broken.parquet", b"PAR1 not really")
    assert answers.load("group") == {"a": "1", "b": "2", "c": "3"}


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"rubric": "another"}, True),
        ({"template": "another {{ completion }}"}, True),
        ({"model": "another"}, True),
        ({"version": "2"}, True),
        ({"grades": {"1": 0, "2": 1}}, True),
        ({"temperature": 1.0}, True),
        ({"extra": {"seed": 1}}, True),
        ({"min_probability": 0.9}, True),
        ({"weight": 2.0}, True),
        ({"base_url": "http://elsewhere/v1"}, False),
        ({"api_key_env": "KEY"}, False),
        ({"concurrency": 1}, False),
        ({"attempts": 1}, False),
        ({"backoff": 9.0}, False),
        ({"timeout": 1.0}, False),
        ({"max_calls": 1}, False),
        ({"max_total_tokens": 1}, False),
    ],
)
def test_what_could_change_a_grade_changes_fingerprints_and_nothing_else_does(
    change: dict[str, Any], counts: bool
) -> None:
    before = reward_settings(config_of([judge("http://here/v1")]).rewards)
    after = reward_settings(config_of([judge("http://here/v1", **change)]).rewards)
    assert (before != after) is counts


EXAMPLES = Path(__file__).parents[2] / "examples" / "rewards"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_of_a_kind_can_be_planned_offline(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    plans = plan_pipeline(load_config(path), Store(tmp_path / "store"), until="rewards", read_source=True)
    assert plans["rewards"].parts
    assert plans["rewards"].missing == plans["rewards"].parts


def test_a_reference_solution_that_fails_its_own_tests_is_named(caplog: pytest.LogCaptureFixture) -> None:
    origins = [("a", "offline"), ("a", "reference"), ("b", "offline"), ("b", "reference")]
    rows = [{"prompt_id": prompt_id, "origin": origin} for prompt_id, origin in origins]
    failed = Score(0.0, note="line 2: AssertionError")
    rewards_stage._warn_of_broken_tests(rows, [failed, failed, failed, Score(1.0)])
    (message,) = caplog.messages
    assert "prompt a: all 2 completions have the reward 0.0" in message
    assert "line 2: AssertionError" in message


def test_notes_of_rows_that_are_reused_are_kept(tmp_path: Path) -> None:
    rewards = config_of(
        [{"kind": "code", "name": name, "tests": name} for name in ("check", "stdio")]
    ).rewards
    names = ("prompt_id", "conversational", "metadata", "text", "origin")
    row = {**dict.fromkeys(names, ""), "sample_index": 0, "token_ids": []}
    scores = {"check": Score(0.5, note="line 2: TypeError; x"), "stdio": Score(0.0, note="exit code 1")}
    (combined,) = combine([(name, 1.0, [score]) for name, score in scores.items()])
    committed = pl.DataFrame(
        {
            "family": ["f"],
            "input_digest": [input_digest(row, tokens=False)],
            "components": [[{"name": name, "value": score.reward} for name, score in scores.items()]],
            "error": [None],
            "note": [combined.note],
        }
    )
    (known,) = known_scores(rewards, [row], committed, Store(tmp_path), "rewards")
    assert known == scores
    assert {name: score.note for name, score in known.items()} == {n: s.note for n, s in scores.items()}
