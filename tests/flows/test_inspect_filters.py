"""Conditions from outside see the row at hand and nothing else."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from flows.views.inspect.filters import FUNCTIONS, apply_condition, parse_condition
from flows.views.inspect.rows import ArtifactRows
from qrpo.errors import DataError
from storage import PartKey, Store

FRAME = pl.DataFrame(
    {
        "reward": [0.1, 0.95, None],
        "text": ["short", "it's sorry\\d", "select from me"],
        "tokens": [[1, 2, 3], [4], []],
        "select": [1, 2, 3],
    },
    schema_overrides={"tokens": pl.List(pl.Int32)},
)


def chosen(condition: str) -> list[int]:
    frame = FRAME.with_row_index("row")
    return apply_condition(frame, parse_condition(condition, frame.schema))["row"].to_list()


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("reward > 0.9", [1]),
        ("reward IS NULL OR reward < 0.5", [0, 2]),
        ("text LIKE '%sorry%' AND NOT (reward < 0.5)", [1]),
        ("text = 'it''s sorry\\d'", [1]),
        ("text ILIKE 'SELECT FROM me'", [2]),
        ("text ~ '^s.*e$'", [2]),
        ("ARRAY_LENGTH(tokens) BETWEEN 1 AND 2", [1]),
        ("tokens[1] = 4", [1]),
        ('"select" IN (1, 3)', [0, 2]),
        ("CAST(reward AS INT) = 0", [0, 1]),
        ("reward::INT = 0", [0, 1]),
        ("CASE WHEN reward > 0.5 THEN true ELSE false END", [1]),
        ("LENGTH(text) > 5 AND UPPER(LEFT(text, 2)) = 'IT'", [1]),
        ("COALESCE(reward, 1.0) > 0.5", [1, 2]),
        ("-reward < -0.9", [1]),
    ],
)
def test_condition_chooses_rows(condition: str, rows: list[int]) -> None:
    assert chosen(condition) == rows


@pytest.mark.parametrize(
    "condition",
    [
        "reward IN (SELECT a FROM read_csv('{file}'))",
        "reward > (SELECT max(a) FROM read_csv('{file}'))",
        "reward IN (SeLeCt/**/a FROM read_csv('{file}'))",
        "reward IN (select a from \"read_csv\"('{file}'))",
        "EXISTS (SELECT 1 FROM read_parquet('{file}'))",
        "reward IN (WITH t AS (SELECT 1) SELECT * FROM t)",
        "reward IN (TABLE rewards)",
        "reward IN (VALUES (1))",
        "reward > ANY (SELECT 1)",
        "read_csv('{file}')",
        "\"read_csv\"('{file}') = 1",
        "scan_parquet('{file}') = 1",
        "text = '\\' OR reward IN (SELECT a FROM read_csv(' {file}')) --'",
        "text = E'\\' OR reward IN (SELECT a FROM read_csv(' {file}')) --'",
        "text = $$ $$ OR reward IN (SELECT 1)",
        "text = `x` OR 1 = 1",
        "reward > 1; DROP TABLE rewards",
        "reward > 1; ATTACH '{file}'",
        "reward > 1 -- and nothing else",
        "reward > 1 /* and */ AND 1 = 1",
        "COPY rewards TO '{file}'",
        "LPAD(text, 1000000000, 'x') = ''",
        "RPAD(text, 1000000000, 'x') = ''",
        "REPEAT(text, 1000000000) = ''",
        "text || text || text = ''",
        " OR ".join(["text ILIKE '%a%'"] * 13),
        "SUM(reward) OVER (PARTITION BY text) > 1",
        "COUNT(reward) > 1",
        "UNNEST(tokens) > 1",
        "COLUMNS('.*') > 1",
        "reward > 1) OR (1 = 1",
        "_POLARS_TMP_0 = 1",
        "reward",
        "text > 1",
        "nothing > 1",
        "",
        "reward > ",
        "reward = 1 OR " * 500 + "reward = 1",
        "(" * 900 + "reward > 1" + ")" * 900,
        "CAST(text AS INT) = 1",
    ],
)
def test_anything_but_a_condition_on_the_row_is_refused(
    condition: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("secret") / "secret.csv"
    file.write_text("a\n0.95\n")
    before = file.stat()

    with pytest.raises(DataError) as refused:
        chosen(condition.replace("{file}", str(file)))

    assert len(str(refused.value)) < 1000
    assert file.read_text() == "a\n0.95\n"
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in file.parent.iterdir()] == ["secret.csv"]


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_no_allowed_function_makes_much_of_a_row(function: str) -> None:
    """With any arguments that it takes, the answer for one row stays within twice what went in."""
    row = pl.DataFrame({"text": ["x" * 1000], "number": [1e9], "list": [[1.0] * 1000]})
    for arguments in (
        "text",
        "number",
        "list",
        "text, 1000000000",
        "number, 1000000000",
        "text, 'x'",
        "text, 1, 1000000000",
        "list, 1",
    ):
        try:
            made = row.select(pl.sql_expr(f"{function}({arguments})").alias("made"))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            continue
        assert made.height == 1
        assert made.estimated_size() < 20_000, (function, arguments)


def test_parts_of_an_earlier_version_have_nulls_in_a_new_column(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tables = {"new": {"a": [1, 2], "tokens": [[1], None]}, "old": {"a": [3]}}
    parts = [
        store.commit_part(PartKey("stage", "f", name), pa.table(columns)) for name, columns in tables.items()
    ]
    rows = ArtifactRows(store, parts)
    expected = [{"a": 1, "tokens": [1]}, {"a": 2, "tokens": None}, {"a": 3, "tokens": None}]
    assert rows.take([0, 1, 2]).to_dicts() == expected
    assert [frame["tokens"].to_list() for _, frame in rows.scan(["tokens"])] == [[[1], None, None]]
    assert store.scan(parts).collect().to_dicts() == expected
    assert store.scan(parts[::-1]).collect()["a"].to_list() == [3, 1, 2]
