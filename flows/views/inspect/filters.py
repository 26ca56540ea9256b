"""SQL conditions from outside: one Boolean expression over the row at hand, in Polars' SQL.

    reward > 0.9 AND finish_reason = 'length'
    text ILIKE '%sorry%' OR ARRAY_LENGTH(token_ids) > 512

Polars' SQL knows subqueries, and in them functions that read any file; it knows padding functions that make a gigabyte of one row, and
aggregates, which would see only the rows that happen to be read together. So before Polars sees the text, every word in it that is
called like a function has to be on a list, and no word may begin a query. What is parsed then may name only the table's columns.
"""

import re
from collections.abc import Iterable

import polars as pl

from qrpo.errors import DataError

__all__ = ["FUNCTIONS", "apply_condition", "parse_condition"]

_NUMBERS = (
    "ABS CEIL CEILING FLOOR ROUND SIGN MOD DIV EXP LN LOG LOG2 LOG10 LOG1P POW POWER SQRT CBRT GREATEST LEAST"
)
_TEXTS = (
    "LENGTH CHAR_LENGTH CHARACTER_LENGTH OCTET_LENGTH BIT_LENGTH LOWER UPPER INITCAP LEFT RIGHT SUBSTR SUBSTRING STRPOS "
    "STARTS_WITH ENDS_WITH REGEXP_LIKE TRIM LTRIM RTRIM REVERSE"
)
_LISTS = "ARRAY_LENGTH ARRAY_CONTAINS ARRAY_MAX ARRAY_MIN ARRAY_MEAN ARRAY_SUM ARRAY_GET"
_TYPES = "COALESCE NULLIF IFNULL IF CAST TRY_CAST"
FUNCTIONS = frozenset(f"{_NUMBERS} {_TEXTS} {_LISTS} {_TYPES}".split())
"""Functions that a condition may use; each gives one small value for one row."""

_WORDS_BEFORE_BRACKETS = "AND OR NOT IN LIKE ILIKE RLIKE REGEXP BETWEEN WHEN THEN ELSE CASE IS"
_OPERATORS = frozenset(_WORDS_BEFORE_BRACKETS.split())
_WORDS_OF_QUERIES = (
    "SELECT WITH FROM TABLE UNION INTERSECT EXCEPT VALUES OVER INTO INSERT UPDATE DELETE CREATE DROP ALTER ATTACH COPY "
    "EXISTS ANY ALL SOME UNNEST LATERAL"
)
_FORBIDDEN = frozenset(_WORDS_OF_QUERIES.split())
_TOKEN = re.compile(
    r"""(?P<text>'(?:[^']|'')*')|(?P<quoted>"(?:[^"]|"")*")|(?P<word>[^\W\d]\w*)|(?P<number>\d[\w.]*)"""
    r"""|(?P<space>\s+)|(?P<sign>::|<=|>=|<>|!=|!~\*|!~|~\*|~|\|\||[-+*/%<>=(),.\[\]])""",
    re.UNICODE,
)
_LONGEST = 2000  # characters: a chain of ORs that long is still shallow enough for the parser's stack
_EXAMPLE = """for example: reward > 0.9 AND finish_reason = 'length'"""


def parse_condition(text: str, schema: pl.Schema) -> pl.Expr:
    """The condition as an expression on a table of this schema; raises DataError with what is wrong."""
    _check_words(text)
    try:
        condition = pl.sql_expr(text)
        names = condition.meta.root_names()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"the condition cannot be read: {_line(error)}; {_EXAMPLE}") from None
    unknown = sorted(set(names) - set(schema))
    if unknown:
        raise DataError(
            f"the condition names {', '.join(unknown)}, which is no column; the columns are {', '.join(schema)}. "
            "Texts go in single quotes"
        )
    result = apply_condition(
        pl.DataFrame(schema={name: schema[name] for name in names}), condition, check=True
    )
    assert result.is_empty()
    return condition


def apply_condition(frame: pl.DataFrame, condition: pl.Expr, *, check: bool = False) -> pl.DataFrame:
    """The rows for which the condition holds; raises DataError where it cannot be evaluated."""
    try:
        if check:
            kind = frame.lazy().select(condition.alias("condition")).collect_schema()["condition"]
            if kind not in (pl.Boolean, pl.Null):
                raise DataError(f"the condition is {kind}, not true or false; {_EXAMPLE}")
        return frame.filter(condition)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"the condition cannot be evaluated: {_line(error)}") from None


def _check_words(text: str) -> None:
    if len(text) > _LONGEST:
        raise DataError(f"the condition has {len(text)} characters, {_LONGEST} are allowed")
    tokens = list(_tokens(text))
    if not tokens:
        raise DataError(f"the condition is empty; {_EXAMPLE}")
    for (kind, token), (next_kind, following) in zip(tokens, [*tokens[1:], ("end", "")], strict=True):
        if kind not in ("word", "quoted"):
            continue
        word = token.strip('"').upper()
        if kind == "word" and next_kind == "text" and word not in _OPERATORS:
            raise DataError(
                f"{token}{following} is not a text that a condition may hold: write it as {following}"
            )
        if kind == "word" and word in _FORBIDDEN:
            raise DataError(
                f"{token} is not allowed: a condition looks at the row's own columns, it is not a query. "
                f"A column of that name goes in double quotes; {_EXAMPLE}"
            )
        if following == "(" and not (word in FUNCTIONS or (kind == "word" and word in _OPERATORS)):
            raise DataError(
                f"the function {token} is not allowed; allowed are {', '.join(sorted(FUNCTIONS))}"
            )


def _tokens(text: str) -> Iterable[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or text.startswith(("--", "/*"), at):
            raise DataError(
                f"{text[at : at + 2].strip()!r} has no place in a condition (character {at + 1}); {_EXAMPLE}"
            )
        if found.lastgroup == "text" and re.search(r"\\'", found.group()):
            raise DataError("a text may not have a backslash before a quote: it can be read in two ways")
        if found.lastgroup != "space":
            assert found.lastgroup is not None
            yield found.lastgroup, found.group()
        at = found.end()


def _line(error: BaseException) -> str:
    line = str(error).partition("\n")[0]
    return line if len(line) <= 300 else line[:300] + " ..."
