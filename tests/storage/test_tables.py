from collections.abc import Callable

import pyarrow as pa
import pytest

from storage import PartKey, SchemaError, Store, fingerprint
from tests.support.storage import SCORES, scores

ROW = {
    "prompt_id": "p",
    "sample_index": 0,
    "origin": "offline",
    "reward": 0.5,
    "components": [{"name": "length", "value": 0.5}],
    "error": None,
}
TABLE = pa.Table.from_pylist([ROW], schema=SCORES.schema)


@pytest.fixture
def store() -> Store:
    return Store("memory://tables-test")


@pytest.mark.parametrize(
    ("tables", "fault"),
    [
        (lambda: [scores(70_000, seed=0), scores(2, seed=0)], "appears 2 times"),  # far apart
        (lambda: TABLE.drop_columns("reward"), "column reward is missing"),
        (
            lambda: TABLE.set_column(3, "reward", TABLE["reward"].cast(pa.float64())),
            "column reward has the type double, expected float",
        ),
        (lambda: [TABLE, TABLE.append_column("judge", pa.array(["a"]))], "different columns"),
    ],
    ids=["repeated key", "missing column", "wrong type", "different tables"],
)
def test_tables_that_do_not_fit_are_refused(
    store: Store, tables: Callable[[], pa.Table | list[pa.Table]], fault: str
) -> None:
    with pytest.raises(SchemaError, match=fault):
        store.commit_part(PartKey("rewards", "family", fingerprint(fault)), tables(), table=SCORES)


def test_columns_may_be_added_and_come_in_any_order_and_encoding(store: Store) -> None:
    table = TABLE.select(list(reversed(TABLE.column_names))).append_column("judge", pa.array(["a"]))
    record = store.commit_part(PartKey("rewards", "family", "added"), table, table=SCORES)
    assert store.read_part(record).column_names == [*SCORES.schema.names, "judge"]
    table = TABLE.set_column(2, "origin", TABLE["origin"].dictionary_encode())
    table = table.set_column(5, "error", pa.nulls(1))
    record = store.commit_part(PartKey("rewards", "dictionary", "part"), table, table=SCORES)
    assert store.read_part(record).equals(TABLE)


def test_rows_without_a_table_are_kept_as_they_are(store: Store) -> None:
    table = pa.table({"step": [1, 2], "loss": [0.5, 0.25]})
    record = store.commit_part(PartKey("metrics", "family", "part"), table)
    assert store.read_part(record).equals(table)
