"""Text that models wrote, made harmless: no control character reaches a terminal, no direction mark
reverses a page."""

import re
from typing import Any

INVISIBLE = re.compile(
    # C0 and C1 controls except tab and newline; soft hyphen; marks of width, joining and direction;
    # line and paragraph separators; tags; variation selectors past the plain ones; unassigned and
    # surrogate code points
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff]"
)
"""Characters that views write out instead of printing. A carriage return before a newline is one of
them."""


def escape(character: str) -> str:
    r"""The character written out, as in Python: \\x1b, \\u202e."""
    return character.encode("unicode_escape", "surrogatepass").decode()


def visible(text: str) -> str:
    """The text with invisible and control characters written out; newlines and tabs stay."""
    return INVISIBLE.sub(lambda found: escape(found.group()), text)


def one_line(value: Any, limit: int = 400) -> str:
    """Any value of a row as a short harmless text that says how long the whole value is."""
    if isinstance(value, float):
        return f"{value:.5g}"
    more = f" ... ({len(value):,} elements)" if isinstance(value, list) and len(value) > limit else ""
    if isinstance(value, list):
        first, value = next(iter(value), None), value[:limit]
        if isinstance(first, dict) and first.keys() == {"name", "value"}:
            value = ", ".join(f"{item['name']} {one_line(item['value'])}" for item in value)
        elif isinstance(first, float):
            value = "[" + ", ".join("null" if item is None else f"{item:.4g}" for item in value) + "]"
    text = str(value)
    if len(text) > limit and not more:
        more = f" ... ({len(text):,} characters)"
    return visible(text[:limit]) + more
