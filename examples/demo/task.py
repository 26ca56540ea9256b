"""The demo's generated task: letters to sort alphabetically, and a small Llama with random weights.

    prompt      "sort kfbanjc"
    completion  "acbfjnk"      by a careless teacher: letters often come too early
    answer      "abcfjkn"      for the reward only

Fine-tuning on the teacher's answers gives a mediocre reference policy: it solves the task about as
carelessly as its teacher. The reward (reward.py) measures how careless an answer is. The policy is
trained only on the reference's samples and their rewards.
"""

import json
import random
import string
from pathlib import Path

from qrpo.tiny import build_tiny_model

__all__ = ["ALPHABET", "LETTERS", "careless", "write_demo"]

ALPHABET = string.ascii_lowercase[:14]
LETTERS = 7
CARELESSNESS = 0.35


def write_demo(folder: str | Path, *, prompts: int = 1500, seed: int = 0) -> Path:
    """Write `prompts.jsonl` and the base model's folder `base/` into `folder`; the same files every
    time.

    No two prompts have the same letters, so no answer to a held-out prompt can be memorized.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < prompts:
        letters = rng.sample(ALPHABET, LETTERS)
        answer = "".join(sorted(letters))
        if answer not in rows:
            rows[answer] = {
                "prompt": "sort " + "".join(letters),
                "completion": "".join(careless(answer, rng)),
                "answer": answer,
            }
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows.values())
    texts = [row["prompt"] for row in rows.values()]
    # 256 bytes, 6 special tokens and 3 merges, which spell "sort": every letter stays a separate
    # token.
    build_tiny_model(
        folder / "base", texts, hidden_size=128, vocab_size=265, max_length=64, tied=True, seed=seed
    )
    return folder


def careless(answer: str, rng: random.Random) -> list[str]:
    """The letters of an answer by a careless teacher.

    It takes the first remaining letter, but skips it, repeatedly, with probability CARELESSNESS.
    """
    left, said = list(answer), []
    while left:
        place = 0
        while place + 1 < len(left) and rng.random() < CARELESSNESS:
            place += 1
        said.append(left.pop(place))
    return said
