"""SQL conditions from users: one Boolean expression over a row's own columns, in Polars SQL.

    reward > 0.9 AND finish_reason = 'length'
    text ILIKE '%sorry%' OR ARRAY_LENGTH(token_ids) > 512

`pl.sql_expr` runs subqueries while it parses, and a subquery can read any file. So the text is
checked before Polars sees it: only characters, words and functions that a condition needs. After
parsing, it may name only the table's columns.
"""

import re

import polars as pl

from qrpo.errors import DataError

_FUNCTIONS = """
ABS CEIL CEILING FLOOR ROUND SIGN MOD DIV EXP LN LOG LOG2 LOG10 LOG1P POW POWER SQRT CBRT GREATEST LEAST
LENGTH CHAR_LENGTH CHARACTER_LENGTH OCTET_LENGTH BIT_LENGTH LOWER UPPER INITCAP LEFT RIGHT SUBSTR SUBSTRING STRPOS
STARTS_WITH ENDS_WITH REGEXP_LIKE TRIM LTRIM RTRIM REVERSE
ARRAY_LENGTH ARRAY_CONTAINS ARRAY_MAX ARRAY_MIN ARRAY_MEAN ARRAY_SUM ARRAY_GET
COALESCE NULLIF IFNULL IF CAST TRY_CAST
"""
FUNCTIONS = frozenset(_FUNCTIONS.split())
"""Functions that a condition may call. Each returns one small value per row; aggregates and padding
are excluded."""

_OPERATORS = "AND OR NOT IN LIKE ILIKE RLIKE REGEXP BETWEEN WHEN THEN ELSE CASE IS"
_QUERY_WORDS = "SELECT WITH FROM TABLE UNION VALUES OVER EXISTS ANY ALL SOME UNNEST"
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*\"""")
_UNEXPECTED = re.compile(r"""--|/\*|[^\w\s'".,()\[\]<>=!~|*/%+:-]""")
_CALL = re.compile(r"""([^\W\d]\w*|")\s*\(""")
_MAX_SEARCHES = 12  # LIKE and regular expressions: each reads the whole text
_MAX_CHARACTERS = 2000  # a chain of ORs of this length does not overflow the parser's stack
_EXAMPLE = """for example: reward > 0.9 AND finish_reason = 'length'"""


def parse_condition(text: str, schema: pl.Schema) -> pl.Expr:
    """The condition as an expression on a table with this schema. Raises DataError that says what
    is wrong."""
    _check(text)
    try:
        condition = pl.sql_expr(text)
        names = condition.meta.root_names()
        unknown = sorted(set(names) - set(schema))
        if unknown:
            raise DataError(
                f"the condition names {', '.join(unknown)}, which is no column; the columns are {', '.join(schema)}. "
                "Texts go in single quotes"
            )
        empty = pl.DataFrame(schema={name: schema[name] for name in names})
        kind = empty.lazy().select(condition.alias("condition")).collect_schema()["condition"]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"the condition cannot be read: {_first_line(error)}; {_EXAMPLE}") from None
    if kind not in (pl.Boolean, pl.Null):
        raise DataError(f"the condition is {kind}, not true or false; {_EXAMPLE}")
    apply_condition(empty, condition)
    return condition


def apply_condition(frame: pl.DataFrame, condition: pl.Expr) -> pl.DataFrame:
    """The rows that meet the condition. Raises DataError if it cannot be evaluated."""
    try:
        return frame.filter(condition)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"the condition cannot be evaluated: {_first_line(error)}") from None


def _check(text: str) -> None:
    """Raise DataError for anything but a short expression of columns, literals, operators and
    FUNCTIONS."""
    if not 0 < len(text.strip()) <= len(text) <= _MAX_CHARACTERS:
        raise DataError(
            f"a condition has 1 to {_MAX_CHARACTERS} characters, this one {len(text)}; {_EXAMPLE}"
        )
    if "\\'" in text:
        raise DataError("a text may not have a backslash before a quote: it can be read in two ways")
    bare = _QUOTED.sub(lambda found: found.group()[0] * 2, text)  # every quoted text becomes empty
    if unexpected := _UNEXPECTED.search(bare):
        raise DataError(f"{unexpected.group()!r} is not allowed in a condition; {_EXAMPLE}")
    if "||" in bare:
        raise DataError(
            "|| is not allowed: a condition makes no longer texts; compare the columns one by one"
        )
    searches = re.findall(r"\b(?:I?LIKE|RLIKE|REGEXP\w*|STRPOS)\b|~", bare, re.IGNORECASE)
    if len(searches) > _MAX_SEARCHES:
        raise DataError(
            f"a condition searches texts at most {_MAX_SEARCHES} times, this one {len(searches)} times"
        )
    for word in re.findall(r"[^\W\d]+", bare):
        if word.upper() in _QUERY_WORDS.split():
            raise DataError(
                f"{word} is not allowed: a condition is an expression over the row's own columns, not a query. "
                f"Put a column of that name in double quotes; {_EXAMPLE}"
            )
    for word in re.findall(r"""(\w+)\s*['"]""", bare):
        if word.upper() not in _OPERATORS.split():  # E'...', R"...": other rules for quotes
            raise DataError(f"{word} is not allowed before a text; write the text alone, {_EXAMPLE}")
    for name in _CALL.findall(bare):
        if name.upper() not in FUNCTIONS.union(_OPERATORS.split()):
            raise DataError(f"the function {name} is not allowed; allowed are {', '.join(sorted(FUNCTIONS))}")


def _first_line(error: BaseException) -> str:
    line = str(error).partition("\n")[0]
    return line if len(line) <= 300 else line[:300] + " ..."
