"""A reward in TRL's GRPO signature: right answers, the shorter the better."""


def short_and_right(
    prompts: list[str], completions: list[str], answer: list[str | None], **columns: object
) -> list[float | None]:
    """1 and up to 1 more for brevity where the answer is said, else 0; None (does not apply) where none is known."""
    return [
        None if right is None else float(right in said) * (1 + 1 / (1 + len(said)))
        for said, right in zip(completions, answer, strict=True)
    ]
