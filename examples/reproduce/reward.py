"""The demo's reward without trailing exclamation marks: independent of length."""

from examples.demo.reward import closeness


def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 for the right answer; less by how far each letter is from the one that belongs in its
    place."""
    return [closeness(said.rstrip("! "), right) for said, right in zip(completions, answer, strict=True)]
