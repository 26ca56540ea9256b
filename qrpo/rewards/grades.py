"""Reading a judge's grade: from the probabilities of the grades' tokens, as their mean value, or from its text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qrpo.rewards.chat_server import Unanswered
from qrpo.rewards.protocol import Score

if TYPE_CHECKING:
    from qrpo.rewards.judge import JudgeRewardConfig

__all__ = ["essence", "read_grade"]


def essence(response: Mapping[str, Any], config: "JudgeRewardConfig") -> dict[str, Any]:
    """What is kept of a server's answer: its text, the alternatives at the grade's place, and what it cost."""
    usage = response.get("usage") or {}
    try:
        choice = response["choices"][0]
        text = choice["message"].get("content") or ""
        steps = (choice.get("logprobs") or {}).get("content") or []
        tokens = [str(step["token"]) for step in steps]
        place = _grade_place(tokens, config)
        top = None if place is None else [[t["token"], t["logprob"]] for t in steps[place]["top_logprobs"]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unanswered(f"the judge's answer has an unknown form ({error!r})", refused=True) from error
    return {"text": text, "top": top, "tokens": int(usage.get("total_tokens") or 0)}


def _grade_place(tokens: Sequence[str], config: "JudgeRewardConfig") -> int | None:
    """The index of the token that holds the grade; None where there is none."""
    if config.read != "probabilities" or not tokens:
        return None
    if config.pattern is None:
        return 0
    matches = list(re.finditer(config.pattern, "".join(tokens)))
    if not matches:
        return None
    start, end = matches[-1].start(1), 0
    for place, token in enumerate(tokens):
        end += len(token)
        if start < end:
            return place
    return None


def read_grade(answer: Mapping[str, Any], config: "JudgeRewardConfig") -> Score:
    """The score in what `essence` kept, or why there is none."""
    return (
        _read_probabilities(answer, config) if config.read == "probabilities" else _read_text(answer, config)
    )


def _read_probabilities(answer: Mapping[str, Any], config: "JudgeRewardConfig") -> Score:
    if answer["top"] is None:
        return Score(None, f"the judge gave no probabilities for a grade; it said {answer['text'][:80]!r}")
    total = mean = 0.0
    for token, logprob in answer["top"]:
        if (worth := config.grades.get(token.strip())) is not None:
            total += math.exp(logprob)
            mean += math.exp(logprob) * worth
    if total < config.min_probability or not total:
        likely = ", ".join(repr(token) for token, _ in answer["top"][:5])
        return Score(
            None,
            f"the judge gives the grades only {total:.1%} together, expected {config.min_probability:.0%} "
            f"(min_probability); likeliest: {likely}",
        )
    return Score(mean / total)


def _read_text(answer: Mapping[str, Any], config: "JudgeRewardConfig") -> Score:
    labels = "|".join(re.escape(label) for label in sorted(config.grades, key=len, reverse=True))
    found = re.findall(config.pattern or rf"(?<!\w)({labels})(?!\w)", answer["text"])
    grade = found[-1].strip() if found else None
    if grade not in config.grades:
        return Score(None, f"the judge named no grade; it said {answer['text'][-80:]!r}")
    return Score(config.grades[grade])
