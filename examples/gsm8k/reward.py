"""Whether the completion's last number is the answer: a verifiable reward for GSM8K's `answer`
column ("... #### 72")."""

import re

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 for the right number, 0.1 for another number (the form is right), 0 where there is none."""
    return [_score(said, right) for said, right in zip(completions, answer, strict=True)]


def _score(said: str, right: str) -> float:
    numbers = NUMBER.findall(said)
    if not numbers:
        return 0.0
    return 1.0 if _value(numbers[-1]) == _value(right.rpartition("####")[2]) else 0.1


def _value(text: str) -> float:
    return float(text.strip().replace(",", ""))
