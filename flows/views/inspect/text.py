"""What models wrote, made harmless to look at: no control character reaches a terminal, no direction mark turns a page around."""

import re
from typing import Any

__all__ = ["INVISIBLE", "escape", "one_line", "visible"]

INVISIBLE = re.compile(
    # C0 and C1 controls but for tab and newline; soft hyphen; marks of width, joining and direction; line and paragraph separators;
    # tags, variation selectors past the plain ones, and what has no meaning at all
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)
"""Characters that are written out wherever data is shown. A carriage return before a newline is one of them."""


def escape(character: str) -> str:
    r"""The character written out, as in Python: \\x1b, \\u202e."""
    return character.encode("unicode_escape", "surrogatepass").decode()


def visible(text: str) -> str:
    """The text with invisible and commanding characters written out; newlines and tabs stay."""
    return INVISIBLE.sub(lambda found: escape(found.group()), text)


def one_line(value: Any, most: int = 400) -> str:
    """Any value of a row in one short harmless text; says how much was left out."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if (
        isinstance(value, list)
        and value
        and isinstance(value[0], dict)
        and value[0].keys() == {"name", "value"}
    ):
        value = ", ".join(f"{item['name']} {one_line(item['value'])}" for item in value[:most])
    if isinstance(value, list) and value and isinstance(value[0], float):
        value = (
            "["
            + ", ".join("null" if item is None else f"{item:.4g}" for item in value[:most])
            + ", ..." * (len(value) > most)
            + "]"
        )
    text = str(value[:most] if isinstance(value, list) and len(value) > most else value)
    shown = visible(text[:most])
    if isinstance(value, list) and len(value) > most:
        return f"{shown} ... ({len(value):,} elements)"
    return shown if len(text) <= most else f"{shown} ... ({len(text):,} characters)"
