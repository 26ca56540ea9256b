"""A judge's grade: the mean over the grades' token probabilities, or read from the text.

A text gives its grade in one of these forms; any other is the row's error, never a guess:

    Grade: 2, "score": 2, rating is 2, [[2]]    marked; all marks must agree, those of a final or
                                                overall grade win
    2 on the first or last line alone           also **2**, 2/5, 2 out of 5
    I rate it 2 out of 5.                       the only number, in a sentence that rates
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qrpo.rewards.chat_client import RequestFailed
from qrpo.rewards.protocol import RewardSection, Score

_UNFINISHED = ("length", "max_tokens", "content_filter", "error", "abort")
_AROUND = " \t.,;:!*_`'\"[](){}#"  # punctuation and markup around a grade
_MARK = re.compile(
    r"(?i)\b(?:(final|overall)(?:\s+(?:grade|score|rating|verdict))?|grade|score|rating|verdict)\b"
    r"[\"'*_\s]*(?:\([^()]*\)\s*)?(?:[-=]>|:|=|>|\bis\b|\bof\b|\s[-\u2013\u2014]\s)"
    r"[\"'*_\[({\s]*((?:[^\s\"'*_\])},;<]|,(?=\d))+)|(?:\[\[|\\boxed\{)([^\[\]{}]+)(?:\]\]|\})"
)
_HEDGE = r"\b(?:not|least|most|than|maybe|perhaps|almost|nearly|below|above|under|over|between)\b|n't"
_RATES = rf"(?is)^(?!.*(?:{_HEDGE})).*\b(?:rat|giv|grad|scor|award|assign|deserv)\w*[^.!?\n]*\d"
_SCALE = r"(?i)(?<=\d)[\s\"',(]*(?:/|(?:out[ _])?of\b|max\w*|scale|on an?\b)[\s\"':]*(\d+|ten\b|hundred\b)"


class GradeSection(RewardSection):
    """The settings that say which grades there are and how an answer is read."""

    grades: dict[str, float] = Field(
        default_factory=lambda: {str(grade): float(grade) for grade in range(1, 6)}, min_length=2
    )
    """What the judge may answer, worst first, and the value of each answer."""
    read: Literal["probabilities", "text"] = "probabilities"
    """The mean over the grades' token probabilities, or the grade that the text names."""
    pattern: str | None = None
    """Where the grade is in a longer answer: a regular expression whose one group is the grade; its
    last match counts. By default the answer's first token (probabilities), or a form of the text
    that says clearly which grade it gives (`qrpo.rewards.grades`)."""
    min_probability: float = Field(0.5, ge=0.0, le=1.0)
    """Minimum probability of all grades together; with less, the row fails."""

    max_tokens: int | None = Field(None, ge=1)
    """Maximum length of an answer; by default 1 token where that is the grade, else 1024. A longer
    answer that is cut off is the row's error."""

    @field_validator("grades", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return {str(label): worth for label, worth in value.items()} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _grades_are_readable(self) -> Self:
        labels = list(self.grades)
        if any(label != label.strip() or not label for label in labels):
            raise ValueError(f"grades: the labels {labels} may not be empty, nor begin or end with a space")
        if not all(map(math.isfinite, self.grades.values())):
            raise ValueError("grades: each value must be a finite number")
        if self.read == "probabilities":
            for one in labels:
                if longer := [other for other in labels if other != one and other.startswith(one)]:
                    raise ValueError(
                        f"grades: {longer[0]!r} begins with {one!r}, so a first token cannot distinguish them; use "
                        "other labels (0 to 9, letters), or `read: text`"
                    )
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern: not a regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"pattern: expected one group, the grade, got {groups}")
        return self

    @property
    def reads_first_token(self) -> bool:
        """Whether the grade is the answer's first token, so that nothing after it matters."""
        return self.max_tokens == 1 or (self.read == "probabilities" and self.pattern is None)

    def extract(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """What is stored of a response: text, alternatives of the grade's token, tokens used, why
        it ended."""
        try:
            tokens = int((response.get("usage") or {}).get("total_tokens") or 0)
            choice = response["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                text = "".join(part.get("text") or "" for part in text)
            steps = (choice.get("logprobs") or {}).get("content") or []
            index = self._grade_token([str(step["token"]) for step in steps])
            top = (
                None if index is None else [[t["token"], t["logprob"]] for t in steps[index]["top_logprobs"]]
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise RequestFailed(
                f"the judge's answer has an unknown form ({error!r})", refused=True
            ) from error
        return {"text": text, "top": top, "tokens": tokens, "finish": choice.get("finish_reason")}

    def score(self, answer: Mapping[str, Any]) -> Score:
        """The score in what `extract` returned, or the reason why there is none."""
        finish = str(answer.get("finish")).casefold()
        if not self.reads_first_token and finish in _UNFINISHED:
            remedy = ": raise max_tokens" if finish in ("length", "max_tokens") else ""
            said = answer["text"][-80:]
            return Score(
                None, f"the judge's answer is unfinished (finish_reason {finish}){remedy}; it ends {said!r}"
            )
        return self._from_text(answer["text"]) if self.read == "text" else self._from_probabilities(answer)

    def _grade_token(self, tokens: Sequence[str]) -> int | None:
        """The index of the token that holds the grade; None where there is none."""
        if self.read != "probabilities" or not tokens:
            return None
        if self.pattern is None:
            return 0
        matches = list(re.finditer(self.pattern, "".join(tokens)))
        if not matches:
            return None
        start, end = matches[-1].start(1), 0
        for index, token in enumerate(tokens):
            end += len(token)
            if start < end:
                return index
        return None

    def _from_probabilities(self, answer: Mapping[str, Any]) -> Score:
        if answer["top"] is None:
            return Score(
                None, f"the judge gave no probabilities for a grade; it said {answer['text'][:80]!r}"
            )
        total = mean = 0.0
        for token, logprob in answer["top"]:
            if (value := self.grades.get(token.strip())) is not None:
                total += math.exp(logprob)
                mean += math.exp(logprob) * value
        if total < self.min_probability or not total:
            likely = ", ".join(repr(token) for token, _ in answer["top"][:5])
            return Score(
                None,
                f"the judge gives the grades only {total:.1%} together, expected {self.min_probability:.0%} "
                f"(min_probability); likeliest: {likely}",
            )
        return Score(mean / total)

    def _from_text(self, text: str) -> Score:
        if self.pattern is not None:
            found = re.findall(self.pattern, text)
            grade = found[-1].strip() if found else None
        else:
            grade = self._named(text.rpartition("</think>")[2].partition("<think>")[0])
        if grade not in self.grades:
            return Score(None, f"the judge named no grade, or not clearly one; it said {text[-80:]!r}")
        return Score(self.grades[grade])

    def _named(self, text: str) -> str | None:
        """The one grade that a text gives; None where it gives none or several."""
        text = text.replace("\u2212", "-")
        text = re.sub(r"(?im)^(\W*)final answer(?=\W*:)", r"\1grade", text)
        text = re.sub(r"(?<=\d)\s*(?:[-\u2013\u2014]|or|to)\s*(?=\d)", "-", text)  # a range is one token
        text = re.sub(_SCALE, r"/\1", text)
        scale = re.escape(list(self.grades)[-1])
        text = re.sub(rf"(?<=\d)(?:/{scale}(?![\w/-]|\.\d))?(?: (?:star|point)s?\b)?", "", text)
        marks = [(match[1], self._label(match[2] or match[3])) for match in _MARK.finditer(text)]
        given = {label for _, label in marks if label is not None}
        finals = {label for final, label in marks if final and label is not None}
        if given:
            return _only(finals or given)
        lines = [line.strip(_AROUND) for line in text.strip().splitlines() if line.strip(_AROUND)]
        given = {line for line in (*lines[:1], *lines[-1:]) if self._label(line)}
        numbers = set(re.findall(r"(?:[-+~<>\u2248\u2264\u2265]\s*)?\d[\w.,/:%+-]*", text))
        if not given and re.search(_RATES, text) and (only := _only(numbers)) is not None:
            given = {self._label(only) or ""}
        return self._label(_only(given) or "")

    def _label(self, token: str) -> str | None:
        """The grade in a token; "" for a number that is no grade, None for another word."""
        token = token.strip(_AROUND)
        whole = re.sub(r"(?<=\d)\.0+$", "", token)
        if found := next((label for label in (token, whole) if label in self.grades), None):
            return found
        return "" if re.match(r"[-+]?\d", token) else None


def _only(found: set[str]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None
