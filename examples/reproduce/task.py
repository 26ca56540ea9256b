"""The comparison's task: the demo's letters, and exclamation marks that a preference judge likes
and the reward ignores.

    prompt      "sort kfbanjc"
    chosen      "abcfjnk!!!"    the preferred one of two careless answers
    rejected    "abcfkjn"
    answer      "abcfjkn"       for the reward only

Both answers come from the demo's careless teacher, who adds up to four exclamation marks. The judge
looks at the reward, but also likes each exclamation mark, so it prefers longer answers, as in human
preference data.
"""

import json
import random
from pathlib import Path

from examples.demo.reward import closeness
from examples.demo.task import ALPHABET, LETTERS, careless
from qrpo.tiny import build_tiny_model

__all__ = ["write_task"]

MOST_MARKS = 4
LIKING = 0.04  # value of an exclamation mark to the judge, in units of reward


def write_task(folder: str | Path, *, prompts: int = 1200, seed: int = 1) -> Path:
    """Write `prompts.jsonl` and the base model's folder `base/` into `folder`; the same files every
    time."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < prompts:
        letters = rng.sample(ALPHABET, LETTERS)
        answer = "".join(sorted(letters))
        if answer not in rows:
            pair = [(careless(answer, rng), rng.randint(0, MOST_MARKS)) for _ in range(2)]
            pair.sort(key=lambda one: closeness("".join(one[0]), answer) + LIKING * one[1])
            rejected, chosen = ("".join(said) + "!" * marks for said, marks in pair)
            rows[answer] = {
                "prompt": "sort " + "".join(letters),
                "chosen": chosen,
                "rejected": rejected,
                "answer": answer,
            }
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows.values())
    texts = [row["prompt"] for row in rows.values()]
    build_tiny_model(folder / "base", texts, hidden_size=128, vocab_size=265, max_length=64, tied=True)
    return folder
