"""How well the letters are sorted: the demo's reward, in the signature that TRL's GRPOTrainer uses
too."""

ALPHABET = 14  # the task's letters are a to n


def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 for the right answer; less by how far each letter is, in the alphabet, from the one that
    belongs in its place.

    A missing letter, one too many, and anything that is not a small letter count as the whole
    alphabet away. `answer` is the column of that name in prompts.jsonl.
    """
    return [closeness(said.strip(), right) for said, right in zip(completions, answer, strict=True)]


def closeness(said: str, right: str) -> float:
    """The reward of one answer."""
    distances = [_distance(letter, belongs) for letter, belongs in zip(said, right, strict=False)]
    distances += [ALPHABET] * abs(len(said) - len(right))
    return 1.0 - sum(distances) / (ALPHABET * len(right))


def _distance(letter: str, belongs: str) -> int:
    return min(abs(ord(letter) - ord(belongs)), ALPHABET) if "a" <= letter <= "z" else ALPHABET
