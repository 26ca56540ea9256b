"""A judge's grade: the mean over the grades' token probabilities, or read from the text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from qrpo.rewards.chat_client import RequestFailed
from qrpo.rewards.protocol import RewardSection, Score

__all__ = ["GradeSection"]


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
    last match counts. By default the answer's first token (probabilities), or the last grade that
    the text names."""
    min_probability: float = Field(0.5, ge=0.0, le=1.0)
    """Minimum probability of all grades together; with less, the row fails."""

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

    def extract(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """What is stored of a response: text, alternatives of the grade's token, tokens used."""
        usage = response.get("usage") or {}
        try:
            choice = response["choices"][0]
            text = choice["message"].get("content") or ""
            steps = (choice.get("logprobs") or {}).get("content") or []
            index = self._grade_token([str(step["token"]) for step in steps])
            top = (
                None if index is None else [[t["token"], t["logprob"]] for t in steps[index]["top_logprobs"]]
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RequestFailed(
                f"the judge's answer has an unknown form ({error!r})", refused=True
            ) from error
        return {"text": text, "top": top, "tokens": int(usage.get("total_tokens") or 0)}

    def score(self, answer: Mapping[str, Any]) -> Score:
        """The score in what `extract` returned, or the reason why there is none."""
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
        labels = "|".join(re.escape(label) for label in sorted(self.grades, key=len, reverse=True))
        found = re.findall(self.pattern or rf"(?<!\w)({labels})(?!\w)", text)
        grade = found[-1].strip() if found else None
        if grade not in self.grades:
            return Score(None, f"the judge named no grade; it said {text[-80:]!r}")
        return Score(self.grades[grade])
