from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.views.inspect.lookup import PromptLookup
from flows.views.inspect.rows import Query
from flows.views.inspect.stage import inspect_stage
from flows.views.results import equal_rewards as theory_counts
from flows.views.runs import RunArtifacts
from tasks.stages import TABLES
from tasks.stages.quantiles import QuantilesConfig, quantile_table
from tests.support.pipeline import TinyPipeline

Rows = list[tuple[str, str, int, float | None]]

rows_of_prompts = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "other"]),
        st.sampled_from(["reference", "offline"]),
        st.integers(0, 7),
        st.none() | st.sampled_from([-2.0, -0.0, 0.0, 0.5, 0.5, 3.25]) | st.floats(-1e39, 1e39),
    ),
    max_size=40,
    unique_by=lambda row: row[:3],
)


def _rewards(rows: Rows) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    schema = pa.schema(
        [TABLES["rewards"].schema.field(name) for name in ("prompt_id", "origin", "sample_index", "reward")]
    )
    return pa.Table.from_arrays(
        [pa.array(list(c), f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
    )


@settings(max_examples=150)
@given(
    rows=rows_of_prompts,
    train_on=st.sampled_from(["reference", "offline", "both"]),
    ties=st.sampled_from(["weak", "strict", "mid"]),
    keep=st.none() | st.integers(1, 4),
    equal=st.sampled_from(["exclude", "keep"]),
)
def test_table_equals_one_made_row_by_row(rows: Rows, train_on, ties, keep, equal):
    config = QuantilesConfig(train_on=train_on, ties=ties, num_completions=keep, equal_rewards=equal)
    prompts = ["c", "a", "b"]

    table, rejects = quantile_table(pa.array(prompts), _rewards(rows), config, "train", seed=0)

    expected, num_excluded = {}, []
    for prompt in prompts:
        scored = sorted(
            (origin, index, reward) for p, origin, index, reward in rows if p == prompt and reward is not None
        )
        references = sorted(reward for origin, _, reward in scored if origin == "reference")
        if len(references) < (1 if train_on == "offline" else 2):
            num_excluded.append(prompt)
            continue
        lists, ignored = [], 0
        for origin, index, reward in scored:
            if train_on != "both" and origin != train_on:
                continue
            if origin == "reference" and keep is not None and index >= keep:
                continue
            if equal == "exclude" and set(references) == {reward}:
                ignored += 1
                continue
            others = list(references)
            if origin == "reference":
                others.remove(reward)
            below, at_most = sum(s < reward for s in others), sum(s <= reward for s in others)
            count = {"weak": at_most, "strict": below, "mid": (below + at_most) / 2}[ties]
            lists.append((origin, index, reward, count / len(others)))
        expected[prompt] = (references, lists, ignored)
    assert [reject["key"] for reject in rejects] == num_excluded
    assert table.schema == TABLES["quantiles"].schema
    assert table["prompt_id"].to_pylist() == list(expected)
    for row in table.to_pylist():
        references, lists, ignored = expected[row["prompt_id"]]
        assert row["num_excluded"] == ignored
        assert row["ref_rewards"] == references
        assert row["num_ref"] == len(references)
        assert row["ref_mean"] == pytest.approx(
            np.mean(references), rel=1e-9, abs=1e-9 * max(map(abs, references))
        )
        if len(references) > 1:
            assert row["ref_std"] == pytest.approx(
                np.std(references, ddof=1), rel=1e-6, abs=1e-12 * max(map(abs, references))
            )
        else:
            assert row["ref_std"] is None
        got = list(
            zip(row["origin"], row["sample_index"], row["reward"], row["quantile_reward"], strict=True)
        )
        assert [item[:3] for item in got] == [item[:3] for item in lists]
        np.testing.assert_allclose([item[3] for item in got], [item[3] for item in lists], atol=1e-6)
        for q, low, high in zip(
            row["quantile_reward"], row["quantile_low"], row["quantile_high"], strict=True
        ):
            assert 0 <= low <= q <= high <= 1


def test_large_whole_rewards_keep_their_ranks():
    rows = [("a", "reference", index, 1e9 + index) for index in range(24)]
    table, _ = quantile_table(pa.array(["a"]), _rewards(rows), QuantilesConfig(), "train", seed=0)
    quantiles = np.array(table["quantile_reward"][0].as_py())
    np.testing.assert_allclose(quantiles, np.arange(24) / 23, atol=1e-7)


def test_rewards_of_an_earlier_version_are_read_as_they_were_stored():
    rows = [("a", "reference", index, reward) for index, reward in enumerate([0.1, 0.2, 0.2, 0.3])]
    stored = _rewards(rows).set_column(3, "reward", pa.array([row[3] for row in rows], pa.float32()))
    table, _ = quantile_table(pa.array(["a"]), stored, QuantilesConfig(), "train", seed=0)
    np.testing.assert_allclose(table["quantile_reward"][0].as_py(), [0, 2 / 3, 2 / 3, 1], atol=1e-7)


ODD = """\
def odd(prompts, completions, **columns):
    numbers = [int(prompt.split()[-1]) for prompt in prompts]
    return [float(number % 2 and place) for place, number in enumerate(numbers)]
"""


@pytest.mark.parametrize("equal_rewards", ["exclude", "keep"])
def test_prompts_whose_reference_rewards_are_all_equal_are_counted_and_not_trained_on(
    tmp_path: Path, tiny_model: Path, drawn: list[Any], equal_rewards: str
):
    pipeline = TinyPipeline.create(tmp_path / "base", tiny_model)
    (pipeline.folder / "odd.py").write_text(ODD)
    reward = {"kind": "function", "name": "odd", "function": f"{pipeline.folder / 'odd.py'}:odd"}
    changes = {"reference.sft": None, "rewards": [reward], "quantiles.equal_rewards": equal_rewards}
    config = pipeline.config(changes)

    results = pipeline.run(config, until="shards")

    manifest = RunArtifacts(pipeline.store, "tiny").manifest("quantiles")
    rows = pipeline.store.scan(manifest.parts).collect()
    equal = rows.filter(pl.col("ref_rewards").list.min() == pl.col("ref_rewards").list.max())
    trained = rows.filter(pl.col("quantile_reward").list.len() > 0)
    counts = theory_counts(pipeline.store, "tiny")
    assert len(equal) == counts["equal_rewards"] == manifest.metadata["equal_rewards"] > 0
    assert counts["note"].startswith(f"the reference rewards of {len(equal)} of 24 prompts are all equal; ")
    assert results["shards"].rows == len(trained)
    assert results["shards"].rejects == 0
    if equal_rewards == "exclude":
        assert set(trained["prompt_id"]).isdisjoint(equal["prompt_id"])
        assert (
            f"{rows['num_excluded'].sum()} training completions with the same reward are excluded"
            in counts["note"]
        )
    else:
        assert rows["num_excluded"].sum() == 0
        assert "keeps the quantile that `ties: weak` gives" in counts["note"]
    shown = inspect_stage(PromptLookup(pipeline.store, "tiny"), "quantiles", Query(limit=1))
    assert shown["note"] == counts["note"]


def test_held_out_prompts_have_reference_rewards_and_no_training_completions():
    rows = [("a", "reference", index, float(index)) for index in range(4)]
    table, _ = quantile_table(pa.array(["a"]), _rewards(rows), QuantilesConfig(), "eval", seed=0)
    assert table["ref_rewards"].to_pylist() == [[0.0, 1.0, 2.0, 3.0]]
    assert table["reward"].to_pylist() == [[]]
