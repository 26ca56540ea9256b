import pyarrow as pa
import pytest

from storage import PartKey, SchemaError, Store
from tests.support.storage import SCORES, scores

ROW = {
    "prompt_id": "p",
    "sample_index": 0,
    "origin": "offline",
    "reward": 0.5,
    "components": [{"name": "length", "value": 0.5}],
    "error": None,
}


@pytest.fixture
def store() -> Store:
    return Store("memory://tables-test")


def test_a_key_repeated_far_apart_is_found(store: Store) -> None:
    tables = [scores(70_000, seed=0), scores(2, seed=0)]
    with pytest.raises(SchemaError, match="appears 2 times"):
        store.commit_part(PartKey("rewards", "family", "far-apart"), tables, table=SCORES)


def test_a_missing_column_and_a_wrong_type_are_named(store: Store) -> None:
    table = pa.Table.from_pylist([ROW], schema=SCORES.schema)
    with pytest.raises(SchemaError, match="column reward is missing"):
        store.commit_part(PartKey("rewards", "family", "missing"), table.drop_columns("reward"), table=SCORES)
    at = table.column_names.index("reward")
    doubled = table.set_column(at, "reward", table["reward"].cast(pa.float64()))
    with pytest.raises(SchemaError, match="column reward has the type double, expected float"):
        store.commit_part(PartKey("rewards", "family", "doubled"), doubled, table=SCORES)


def test_columns_may_be_added_and_come_in_any_order(store: Store) -> None:
    table = pa.Table.from_pylist([ROW], schema=SCORES.schema)
    table = table.select(list(reversed(table.column_names))).append_column("judge", pa.array(["a"]))
    record = store.commit_part(PartKey("rewards", "family", "added"), table, table=SCORES)
    assert store.read_part(record).column_names == [*SCORES.schema.names, "judge"]


def test_tables_of_one_part_with_different_columns_are_refused(store: Store) -> None:
    table = pa.Table.from_pylist([ROW], schema=SCORES.schema)
    with pytest.raises(SchemaError, match="different columns"):
        store.commit_part(
            PartKey("rewards", "family", "different"),
            [table, table.append_column("judge", pa.array(["a"]))],
            table=SCORES,
        )


def test_dictionary_encoded_and_all_null_columns_are_accepted(store: Store) -> None:
    arrow = pa.Table.from_pylist([ROW], schema=SCORES.schema)
    table = arrow.set_column(2, "origin", arrow["origin"].dictionary_encode())
    table = table.set_column(5, "error", pa.nulls(1))
    record = store.commit_part(PartKey("rewards", "dictionary", "part"), table, table=SCORES)
    assert store.read_part(record).equals(arrow)


def test_rows_without_a_table_are_kept_as_they_are(store: Store) -> None:
    table = pa.table({"step": [1, 2], "loss": [0.5, 0.25]})
    record = store.commit_part(PartKey("metrics", "family", "part"), table)
    assert store.read_part(record).equals(table)
