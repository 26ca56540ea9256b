"""The suites' published files: a JSON list or JSON lines, one object a row."""

import json
from pathlib import Path
from typing import Any

from qrpo.errors import DataError

__all__ = ["read_rows"]


def read_rows(path: Path, required: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of a JSON list or of JSON lines; DataError naming the file and row where one lacks a required field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise DataError(f"{path}: neither a JSON list nor JSON lines: {error}") from None
    for number, row in enumerate(rows):
        lacking = [
            name for name in required if not isinstance(row, dict) or not isinstance(row.get(name), str)
        ]
        if lacking:
            raise DataError(f"{path}, row {number}: expected text in {', '.join(map(repr, lacking))}")
    if not rows:
        raise DataError(f"{path}: there are no rows")
    return list(rows)
