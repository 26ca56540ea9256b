"""Comparison of answers as mathematics, by math-verify.

math-verify finds answers in prose. A right answer is more often bare LaTeX (MATH, NuminaMath),
which it would cut to the first number: `1 - \\sqrt{2}` to 1. So `read_right` takes delimiters,
boxes and units away, has the whole rest parsed, and refuses what is neither mathematics nor words.
docs/rewards.md lists the forms.
"""

import contextlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.parser import normalize_latex
from sympy import Eq, I

_SECONDS = 5  # limit for parsing one expression and for comparing two; an answer that takes longer is wrong

_SIGNIFICANT = 3  # digits of a small number that must agree, where `digits` places show fewer
_PLACEHOLDERS = {"proof", "notfound", "not found", "n/a", "nan", "null"}
_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty|min|max|gcd"
_SENTENCE = re.compile(r"(?i)is|in|to|of|the|has|are|not|if|for|at|as|be|it|so|we")
_UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u221e": r"\infty ",
        "\u03c0": r"\pi ",
        "\u00b0": r"^\circ ",
        "\u00b2": "^{2}",
        "\u00b3": "^{3}",
        "\u00bd": r"\frac{1}{2}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u00a0": " ",
    }
)
_DIGIT_GROUP = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|~|[\u2009\u202f\xa0])(?=\d{3}(?!\d))")
_SCIENTIFIC = re.compile(
    r"(?<![\w.^}\\])(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,3})(?![\w.])"
    r"|\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|(-?\d{1,3})(?![\d{])))(?!\s*[\^!])"
)
_MIXED = re.compile(r"(?<![\w./^}])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w/]|\.\d)")
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'\u2019-]?[^\W\d_]+)*")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CONTENT = r"((?:[^{}]|\{[^{}]*\})*)"
_TEXT = re.compile(rf"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|rm)\s*\{{{_CONTENT}\}}")
_POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_POWER = re.compile(rf"(?<=\d)[\s~]*(\\(?:text|mathrm|mbox)\s*\{{\s*)?({'|'.join(_POWERS)})\b(\s*\}})?")
_QUANTITY = rf"{_TEXT.pattern}(?:\s*\^\s*(?:\d|\{{-?\d\}}))?"
_UNIT = re.compile(
    rf"(?<=[\w)}}])(?:\s|\\[,;:! ])*{_QUANTITY}(?:\s*/\s*{_QUANTITY})?(?=\s*(?:$|,|\\text\{{\s*(?:and|or)))"
)
_QUANTITIES = re.compile(r"\d\s*\\(?:text|mathrm)\s*\{(?!\s*(?:and|or|,|th)\b)\s*[a-z][^{}]*\}\s*\d")
_NO_UNIT = re.compile(r"\b(?:or|and|than|not|to|if|is|are|more|less|least|most|dozen|hundred|times|of)\b")
_BARE_UNIT = re.compile(  # after a number; `2m` and `2ab` are products
    r"(?<=[\d})])(?:\s*(?:[cdm]m|[km]g|ml|mL)|\s+(?:km|ft|in|mi|mph|cups?|USD|[Dd]ollars?|[Ee]uros?|m/s))"
    r"(?:\s*\^?\s*(?:[23]|\{[23]\}))?(?:\s*/\s*(?:h|hr|s))?$"
)
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+|\d+\s*/\s*\d+|\d*\s*\\frac\{\d+\}\{\d+\})"
_AMBIGUOUS = re.compile(
    r"\.\.\.|\\[lc]?dots|\d\s*[\"'\u2032\u2033]|\\?(?:gcd|lcm)(?![a-z])|(?<![\\A-Za-z])\d+\s*(?!(?:and|or)\b)[A-Za-z]+\s*\d"
)
_NOT_WORDS = re.compile(r"\\(?:begin|end|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")


@dataclass(frozen=True)
class MathAnswer:
    """A right answer: an expression, or words (a single letter is both)."""

    expression: tuple[Any, ...] = ()
    """As math-verify parsed it: a SymPy object, and its LaTeX."""
    words: str | None = None
    units: bool = True
    """Whether a letter at the end of an answer is a unit and not a variable."""
    leading_zeros: int = 0
    """Zeros after the decimal point of a number below 1."""


@lru_cache(4096)
def read_right(text: str) -> MathAnswer:
    """The answer in a text: an answer, a solution that ends in one, or mathematics between
    delimiters.

    Raises ValueError where it is neither mathematics nor words.
    """
    content = _unwrap(text)
    inner = _without_text(content).strip(" ().:")
    if inner.casefold() in _PLACEHOLDERS:
        raise ValueError("stands for a missing answer")
    is_words = _WORDS.fullmatch(inner) and not re.fullmatch(rf"pi|(?:{_FUNCTIONS})\s+\w", inner)
    if is_words or re.fullmatch(r"\d{4}-\d\d-\d\d.*|\d+_\{?\d+\}?|0[xX][\da-fA-F]+", inner):
        letter = _parsed(inner) if len(inner) == 1 and inner.isascii() else MathAnswer()
        return replace(letter, words=_plain(content))
    try:
        return _parsed(content)
    except ValueError:
        if _TEXT.fullmatch(content):
            return MathAnswer(words=_plain(content))
        raise


def is_right(right: MathAnswer, completion: str, digits: int, *, marked: bool = False) -> bool:
    """Whether a completion gives this answer, with numbers equal to `digits` decimal places, or to
    3 significant digits where those places of the right one are all zeros.

    `marked`: the completion is the answer alone, what follows a mark.
    """
    final, alone = _final_answer(completion)
    if right.words is not None and _plain(final) == right.words:
        return True
    if not right.expression:
        return False
    if _QUANTITIES.search(final) or re.match(r"(?i)\s*not\b", final):  # 5 hours 20 minutes, not 42
        return False
    given: list[Any] = []
    if alone or marked:
        with contextlib.suppress(ValueError):
            answer = read_right(final)
            if not answer.expression:
                return False
            given = list(answer.expression)
    if not given:  # prose: the last expression in it
        extraction = (_latex_config(right.units), ExprExtractionConfig())
        given = _parse(_tidy(completion), extraction)
    vanishes = right.leading_zeros >= max(digits, 1)
    places = right.leading_zeros + _SIGNIFICANT if vanishes else digits
    return bool(given) and bool(
        verify(list(right.expression), given, float_rounding=places, timeout_seconds=_SECONDS)
    )


def _unwrap(text: str) -> str:
    """The answer itself: behind `####`, in the last box, without delimiters, currency and the final
    period."""
    text = text.strip(" \t\r\n`")
    if (box := _last_box(text)) is not None:
        return _unwrap(box)
    if re.search(r"^####(?!#)", text, re.MULTILINE):  # GSM8K
        text = text.rpartition("####")[2].strip()
    text = re.sub(
        r"^(-?)(?:\\?\$|USD\s|[\u20ac\u00a3\u00a5])(?=\s*-?[\d.,]+[^$]*$)", r"\1", text
    )  # a currency
    text = re.sub(r"(?<!\\)\$+|(?<!\\)\\[()\[\]]", " ", text)
    text = re.sub(
        r"\\(?:displaystyle|left|right|boldsymbol|[dt](?=frac)|langle|rangle|varnothing)(?![a-eg-z])",
        _plainer,
        text,
    )
    text = re.sub(r"\\(text|mathrm|mbox)\s+\{", r"\\\1{", text)
    text = re.sub(r"\*\*\s*(-?\w+)", r"^{\1}", text.replace("~", " "))
    text = re.sub("\u221a" + r"\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}", _tidy(text).translate(_UNICODE))
    text = _MIXED.sub(_improper, text)
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text.strip()):
        text = text.replace(" ", "")
    return re.sub(r"(?:\\[ ,;!]|[\s,;]|(?<!\.)\.)+$", "", text).strip()


def _without_text(text: str) -> str:
    return _TEXT.sub(lambda match: match[1], text)


def _plainer(match: re.Match[str]) -> str:
    plainer = {r"\langle": "(", r"\rangle": ")", r"\varnothing": r"\emptyset", r"\d": "\\", r"\t": "\\"}
    return plainer.get(match[0], "")


def _improper(match: re.Match[str]) -> str:
    whole, top, bottom = map(int, match.groups())
    return f"{whole * bottom + top}/{bottom}"


def _parsed(content: str) -> MathAnswer:
    text = re.sub(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 ", _without_units(content))
    has_unit = re.fullmatch(rf"(?:.*[=,])?\s*{_NUMBER}\s+[A-Za-z]{{2}}[A-Za-z. ]*", text) is not None
    config = _latex_config(has_unit)
    normal = normalize_latex(text, config.normalization_config)
    bare = _NOT_WORDS.sub("|", normal)
    for word in re.findall(r"[A-Za-z]{2,}\s+[A-Za-z]|[A-Za-z]\s+[A-Za-z]{2,}|[A-Za-z]{2,}", bare):
        if len(word) > 3 or _SENTENCE.fullmatch(word):
            raise ValueError(f"has the word {word!r} within mathematics")
    if _AMBIGUOUS.search(text) or re.search(r"\d(?:\s|\\q?quad)+\d", normal):
        raise ValueError("is not mathematics that math-verify can read")
    found = _parse(rf"\boxed{{{text}}}", [config])
    if found and isinstance(found[0], Eq) and not found[0].free_symbols:  # 2^{10} = 1024
        return _parsed(content.rpartition("=")[2])
    if not found or isinstance(found[0], str) or not verify(found, found, timeout_seconds=_SECONDS):
        raise ValueError("is not mathematics that math-verify can read")
    small = re.fullmatch(r"[-+]?0*\.(0*)[1-9]\d*", text)
    letters = re.search(r"[A-Za-z]", bare) is not None
    return MathAnswer(tuple(found), units=not letters, leading_zeros=len(small[1]) if small else 0)


def _without_units(text: str) -> str:
    """The text without the unit of its numbers; ValueError where it has several units, or other
    text."""
    text = re.sub(r"\\(?:mathrm|mathbf|rm|text|textbf|mbox)\s*\{\s*([ie]|[-\d.,]+)\s*\}", r" \1", text)
    units = {" ".join(match[1].split()) for match in _UNIT.finditer(text)}
    plain = _BARE_UNIT.sub("", _UNIT.sub("", text))
    words = [*units, *(word[1] for word in _TEXT.finditer(plain))]
    for word in words:
        if (word not in units or _NO_UNIT.search(word)) and word.strip(" ,;") not in ("", "and", "or"):
            raise ValueError(f"has the text {word.strip()!r} within mathematics")
    if len(units) > 1:
        raise ValueError(f"has several units: {', '.join(sorted(units))}")
    if not units and (letter := re.fullmatch(rf"{_NUMBER}\s+([a-df-hj-zA-Z])", plain)):
        raise ValueError(f"has the letter {letter[1]!r}, which is a variable or a unit")
    return plain


def _parse(text: str, extraction: Sequence[Any]) -> list[Any]:
    """What math-verify finds; the symbol `i` is the imaginary unit, which math-verify sees in some
    places only."""
    found = parse(text, extraction, parsing_timeout=_SECONDS)
    with contextlib.suppress(TypeError):  # an inequality in i
        found = [
            item.xreplace({symbol: I for symbol in item.free_symbols if symbol.name == "i"})
            if hasattr(item, "xreplace")
            else item
            for item in found
        ]
    return list(found)


@lru_cache(2)
def _latex_config(units: bool) -> LatexExtractionConfig:
    """How math-verify reads LaTeX, with or without taking letters at the end for a unit."""
    config = LatexExtractionConfig()
    return replace(config, normalization_config=replace(config.normalization_config, units=units))


def _tidy(text: str) -> str:
    """The text with numbers that math-verify misreads as plain decimals: `6.02e23`,
    `2.5 \\times 10^{-7}`, `1\\,200`."""

    def decimal(match: re.Match[str]) -> str:
        before = match.string[: match.start()].rstrip()
        if match[2] is None and before.endswith(("/", "^", r"\div", r"\sqrt", r"\frac", r"\log", r"\ln")):
            return match[0]  # 1/3 \times 10^2 is no number over 300
        return format(Decimal(f"{match[1]}e{match[2] or match[3] or match[4]}"), "f")

    def power(match: re.Match[str]) -> str:
        opened = match[1] if match[1] and not match[3] else ""
        return rf" \times 10^{{{_POWERS[match[2]]}}} {opened}{match[3] if match[3] and not match[1] else ''}"

    return _SCIENTIFIC.sub(decimal, _POWER.sub(power, _DIGIT_GROUP.sub("", text)))


def _last_box(text: str) -> str | None:
    """The content of the last `\\boxed{...}` or `\\fbox{...}`; None without one."""
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    depth = 1
    for end in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[starts[-1] : end]
    return text[starts[-1] :]


def _final_answer(completion: str) -> tuple[str, bool]:
    """The last box, else what follows the last "answer is", else all of it; and whether it is an
    answer alone."""
    if tags := re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL):
        completion = tags[-1]
    if (box := _last_box(completion)) is not None:
        return box, len(_BOX.findall(completion)) == 1
    if numbers := re.findall(r"(?m)^#### ?(\S*\d\S*)\s*$", completion):  # GSM8K
        return numbers[-1], True
    marked = list(re.finditer(r"answer(?:\s+is)?\s*:?\s+", completion, re.IGNORECASE))
    if marked:
        final = completion[marked[-1].end() :].partition("\n")[0]
        final = re.sub(r"(?i)^not\b.*?\b(?:but|rather|instead)\s+", "", final)  # not 42 but 41
        return re.split(r"(?i)(?<=\S),\s+(?:and\s+)?not\s", final)[0], True
    return completion, "\n" not in completion.strip()


def _plain(text: str) -> str:
    """Words to compare: without LaTeX, case, spaces and the punctuation around them."""
    text = re.sub(r"[${}*]|\\[ ,;!()]", "", _without_text(text))
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:()")
