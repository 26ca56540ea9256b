from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import storage
from storage import PartKey, SchemaError, Store
from tasks.stages import TABLES
from tests.support.views import row

PER_COMPLETION = {
    "sample_index": [0, 1],
    "origin": ["offline", "reference"],
    "reward": [0.5, 1.0],
    "quantile_reward": [0.5, 1.0],
    "quantile_low": [0.0, 0.5],
    "quantile_high": [1.0, 1.0],
}
GOOD: dict[str, dict[str, Any]] = {
    "prompts": row("prompts", messages=[{"role": "user", "content": "hi"}], offline_completions=["yes"]),
    "completions": row("completions", token_ids=[1, 2]),
    "rewards": row("rewards", reward=0.5, components=[{"name": "length", "value": 0.5}]),
    "quantiles": row("quantiles", ref_rewards=[0.0, 1.0, 1.0], ref_std=None, **PER_COMPLETION, num_ref=3),
    "shards": row(
        "shards", completion_token_ids=[[3], [4, 5]], ref_logprob=[-1.0, -2.0], **PER_COMPLETION, num_ref=3
    ),
    "evaluation": row("evaluation", model="policy", token_ids=[1], quantile_reward=1.0),
}


def commit(stage: str, rows: list[dict[str, Any]]) -> storage.PartRecord:
    store = Store("memory://tables-test")
    key = PartKey(stage, "family", storage.fingerprint([stage, repr(rows)]))
    table = TABLES[stage]
    return store.commit_part(key, pa.Table.from_pylist(rows, schema=table.schema), table=table)


@pytest.mark.parametrize("stage", list(TABLES))
def test_a_right_row_is_accepted_from_arrow_and_polars(stage: str) -> None:
    assert commit(stage, [GOOD[stage]]).rows == 1
    store, arrow = Store("memory://tables-test"), pa.Table.from_pylist([GOOD[stage]], TABLES[stage].schema)
    key = PartKey(stage, "polars", "part")
    record = store.commit_part(key, pl.from_arrow(arrow).to_arrow(), table=TABLES[stage])
    assert store.read_part(record).equals(arrow)


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("prompts", {"prompt_id": None}, "prompt_id is null in 1 of 1 rows, first in row 0"),
        ("prompts", {"split": "test"}, "split holds 'test', expected one of train, eval"),
        ("prompts", {"offline_completions": [None]}, "offline_completions of row 0 holds a null"),
        ("completions", {"origin": "model"}, "origin holds 'model'"),
        ("completions", {"sample_index": -1}, "sample_index holds -1, expected at least 0"),
        ("completions", {"token_ids": [1, -7]}, "token_ids holds -7"),
        ("completions", {"token_ids": [1, None]}, "token_ids holds a null"),
        ("completions", {"sampled_logprob": float("nan")}, "sampled_logprob holds a NaN"),
        ("rewards", {"reward": float("inf")}, "reward holds a NaN or an infinity"),
        ("rewards", {"reward": None}, "either a reward or an error"),
        ("rewards", {"error": "boom"}, "either a reward or an error"),
        ("quantiles", {"num_ref": 4}, "num_ref equal to the length of ref_rewards"),
        ("quantiles", {"ref_rewards": [1.0, 0.0, 1.0]}, "not ascending"),
        ("quantiles", {"ref_rewards": [0.0, float("nan"), 1.0]}, "ref_rewards holds a NaN"),
        ("quantiles", {"quantile_reward": [0.5]}, "lists of one length in sample_index and quantile_reward"),
        ("quantiles", {"quantile_reward": [0.5, 1.5]}, r"quantile_reward ranges over \[0.5, 1.5\]"),
        ("quantiles", {"quantile_low": [-0.1, 0.5]}, "quantile_low ranges over"),
        ("quantiles", {"quantile_high": [0.0, 0.4]}, "quantile_low is above its quantile_high"),
        ("quantiles", {"reward": [0.5, None]}, "reward of row 0 holds a null"),
        (
            "shards",
            {"completion_token_ids": [[3]]},
            "lists of one length in sample_index and completion_token_ids",
        ),
        ("shards", {"completion_token_ids": [[3], [-4]]}, "completion_token_ids holds -4"),
        ("shards", {"ref_logprob": [-1.0, float("-inf")]}, "ref_logprob holds a NaN or an infinity"),
        ("shards", {"num_ref": 0, "ref_mean": None}, "num_ref holds 0, expected at least 1"),
        ("evaluation", {"model": ""}, "must name its model"),
        ("evaluation", {"quantile_reward": -0.5}, "quantile_reward ranges over"),
        (
            "evaluation",
            {"ref_token_logprobs": [-1.0, -2.0]},
            "one length in token_ids and ref_token_logprobs",
        ),
    ],
)
def test_a_wrong_row_is_refused_with_its_fault(stage: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        commit(stage, [{**GOOD[stage], **change}])


@pytest.mark.parametrize("stage", list(TABLES))
def test_two_rows_with_one_key_are_refused(stage: str) -> None:
    other = {**GOOD[stage], "prompt_id": "q"}
    with pytest.raises(SchemaError, match=r"'prompt_id': 'p'.* appears 2 times"):
        commit(stage, [GOOD[stage], other, GOOD[stage]])
