"""The suites' published files: a JSON list or JSON lines, one object per row."""

from pathlib import Path
from typing import Any

from qrpo.data import sources
from qrpo.errors import DataError


def read_rows(path: Path, required: tuple[str, ...]) -> list[dict[str, Any]]:
    """All rows of a file; DataError if a row lacks text in a required field."""
    rows: list[dict[str, Any]] = []
    for where, row in sources.read_rows(str(path)):
        if isinstance(row, DataError):
            raise row
        if missing := [repr(name) for name in required if not isinstance(row.get(name), str)]:
            raise DataError(f"{where}: expected text in {', '.join(missing)}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: there are no rows")
    return rows
