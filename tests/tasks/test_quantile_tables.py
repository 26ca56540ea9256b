import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.stages import TABLES
from tasks.stages.quantiles import QuantilesConfig, quantile_table

Rows = list[tuple[str, str, int, float | None]]

rows_of_prompts = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "other"]),
        st.sampled_from(["reference", "offline"]),
        st.integers(0, 7),
        st.none() | st.sampled_from([-2.0, -0.0, 0.0, 0.5, 0.5, 3.25]) | st.floats(-1e6, 1e6, width=32),
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
)
def test_table_equals_one_made_row_by_row(rows: Rows, train_on, ties, keep):
    config = QuantilesConfig(train_on=train_on, ties=ties, num_completions=keep)
    prompts = ["c", "a", "b"]

    table, rejects = quantile_table(pa.array(prompts), _rewards(rows), config, "train", seed=0)

    expected, left_out = {}, []
    for prompt in prompts:
        scored = sorted(
            (origin, index, np.float32(reward))
            for p, origin, index, reward in rows
            if p == prompt and reward is not None
        )
        references = sorted(reward for origin, _, reward in scored if origin == "reference")
        if len(references) < (1 if train_on == "offline" else 2):
            left_out.append(prompt)
            continue
        lists = []
        for origin, index, reward in scored:
            if train_on != "both" and origin != train_on:
                continue
            if origin == "reference" and keep is not None and index >= keep:
                continue
            others = list(references)
            if origin == "reference":
                others.remove(reward)
            below, at_most = sum(s < reward for s in others), sum(s <= reward for s in others)
            count = {"weak": at_most, "strict": below, "mid": (below + at_most) / 2}[ties]
            lists.append((origin, index, reward, count / len(others)))
        expected[prompt] = (references, lists)
    assert [reject["key"] for reject in rejects] == left_out
    assert table.schema == TABLES["quantiles"].schema
    assert table["prompt_id"].to_pylist() == list(expected)
    for row in table.to_pylist():
        references, lists = expected[row["prompt_id"]]
        assert row["ref_rewards"] == references
        assert row["num_ref"] == len(references)
        assert row["ref_mean"] == pytest.approx(np.mean(references), rel=1e-5, abs=1e-6)
        if len(references) > 1:
            assert row["ref_std"] == pytest.approx(
                np.std(references, dtype=np.float64, ddof=1), rel=1e-4, abs=1e-6
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


def test_held_out_prompts_have_reference_rewards_and_no_training_completions():
    rows = [("a", "reference", index, float(index)) for index in range(4)]
    table, _ = quantile_table(pa.array(["a"]), _rewards(rows), QuantilesConfig(), "eval", seed=0)
    assert table["ref_rewards"].to_pylist() == [[0.0, 1.0, 2.0, 3.0]]
    assert table["reward"].to_pylist() == [[]]
