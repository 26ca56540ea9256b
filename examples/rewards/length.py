"""A reward with TRL's GRPO signature: correct answers, shorter is better."""


def short_and_right(
    prompts: list[str], completions: list[str], answer: list[str | None], **columns: object
) -> list[float | None]:
    """1 plus up to 1 for brevity where the completion has the answer, else 0; None (does not apply)
    where the dataset has no answer."""
    return [
        None if right is None else float(right in said) * (1 + 1 / (1 + len(said)))
        for said, right in zip(completions, answer, strict=True)
    ]
