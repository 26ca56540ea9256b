"""Scoring with a reward model: our batches and our whole stage beside other ways to do it.

    OMP_NUM_THREADS=1 python -m benchmarks.rewards [--rounds 3] [--out rewards.json]

Completions of log-normal lengths (50 for each prompt), a small Llama with one logit, float32.

    floor             as many conversations and tokens, in batches where all have one length: no
                      padding; starts from token ids
    sorted            ours, from messages to scores: template, tokenizer, length-sorted batches of a
                      token budget
    one by one        from token ids, no batches
    a prompt a batch  from token ids, all completions of a prompt in one padded batch, as the
                      research code does it (one round)
    stage             the pipeline's: reads completion parts from a store, starts a child process,
                      loads the model there, scores, and commits validated, checksummed reward parts
    start             the stage with a single completion

The first four share 1,000 completions. `stage` has 25,000, a minute or so, because its start costs
the same for any number, and the floor of as many completions. All rewards are compared, and all
ways run with the allocator settings of the stage's child process. Processor seconds (child
processes included) depend less on other work of the machine than wall seconds.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import store_data
from benchmarks.harness import Case, command_line, compare, report, timed
from qrpo.data.chat import encode_conversation, load_tokenizer
from qrpo.models import ModelConfig
from qrpo.rewards.model import KEEP_MEMORY, ModelReward, ModelRewardConfig
from qrpo.tiny import build_tiny_reward_model
from storage import Store
from tasks.engines import close_engine
from tasks.plan import PartPlan
from tasks.stages import rewards

NUM_REF = 50  # completions of a prompt
MEDIAN, SIGMA, LONGEST = 60, 0.8, 1500  # of completions, in words, each about one token
CONTEXT = 2048
PART_PROMPTS = 10
SPEECH = "the answer is that we can see how many of them there are when it does not say what to do next"

Ids = Sequence[Sequence[int]]


def make_conversations(prompts: int) -> tuple[list[str], list[list[str]]]:
    """A question for each prompt, and its completions."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEDIAN), SIGMA, (prompts, NUM_REF)), 4, LONGEST).astype(int)
    texts = [[" ".join(rng.choice(SPEECH.split(), length)) for length in row] for row in lengths]
    return [f"what is the answer to {i} " + "and why " * (i % 20) for i in range(prompts)], texts


def forward(model: Any, pad: int, batch: Ids) -> list[float]:
    """One padded batch."""
    longest = max(map(len, batch))
    input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=mask).logits
    return [float(logit) for logit in logits[:, 0]]


def floor_batches(ids: Ids, budget: int) -> list[list[list[int]]]:
    """The length-sorted batches with every conversation of a batch cut or stretched to the batch's
    mean length.

    So there are as many conversations and tokens, of lengths spread in the same way, but no
    padding.
    """
    ordered = sorted(ids, key=len, reverse=True)
    batches = []
    while ordered:
        rows = max(1, budget // len(ordered[0]))
        batch, ordered = ordered[:rows], ordered[rows:]
        mean = round(sum(map(len, batch)) / len(batch))
        batches.append([(list(sequence) * 2)[:mean] for sequence in batch])
    return batches


def write_parts(store: Store, questions: Sequence[str], texts: Sequence[Sequence[str]]) -> list[PartPlan]:
    """Commit prompts and completions parts; the reward parts to compute from them."""
    rng, parts = np.random.default_rng(0), []
    for start in range(0, len(questions), PART_PROMPTS):
        some = texts[start : start + PART_PROMPTS]
        ids = [f"{start + place:032x}" for place in range(len(some))]
        name = f"{len(questions)}x{len(some[0])}-{start:08d}"
        keys = store_data.part_keys(("prompts", "completions", "rewards"), name)
        said = pa.array([text for row in some for text in row])
        lengths = np.array([len(text.split()) for row in some for text in row])
        row_keys = store_data.row_keys(ids, np.arange(len(some[0])))
        questions_here = questions[start : start + PART_PROMPTS]
        store.commit_part(keys["prompts"], store_data.prompts_table(ids, questions_here))
        store.commit_part(keys["completions"], store_data.completions_table(row_keys, said, lengths, rng))
        parents = (keys["completions"], keys["prompts"])
        parts.append(PartPlan(keys["rewards"], parents, {"prompts": keys["prompts"].fingerprint}))
    return parts


def measure(options: Any) -> list[Case]:
    """1,000 completions without the pipeline, 25,000 with it, by default."""
    budget, cases = options.batch_tokens, []
    with tempfile.TemporaryDirectory() as folder:
        path = str(
            build_tiny_reward_model(
                Path(folder) / "model",
                [SPEECH] * 20,
                hidden_size=options.hidden_size,
                max_length=CONTEXT,
            )
        )
        settings = {"model": {"path": path}, "batch_tokens": budget, "device": "cpu"}
        config = store_data.pipeline_config(
            path, NUM_REF, rewards=[{"kind": "model", **settings}], run={"part_size": PART_PROMPTS}
        )
        reward = ModelReward(ModelRewardConfig.model_validate(settings))
        tokenizer = load_tokenizer(ModelConfig(path=path))
        store, run = Store(Path(folder) / "store"), partial(forward, reward.model, tokenizer.pad_token_id)

        def stage(parts: Sequence[PartPlan]) -> list[float]:
            records = store_data.compute(rewards, store, parts, config)
            close_engine()  # as the end of a stage does
            return [value for record in records for value in store.read_part(record)["reward"].to_pylist()]

        for name, prompts in (("ways", options.prompts), ("stage", options.stage_prompts)):
            questions, texts = make_conversations(prompts)
            messages = [[{"role": "user", "content": question}] for question in questions]
            rows = [(message, text) for message, row in zip(messages, texts, strict=True) for text in row]
            ids = [encode_conversation(tokenizer, [*m, {"role": "assistant", "content": t}]) for m, t in rows]
            even, prompt_starts = floor_batches(ids, budget), range(0, len(ids), NUM_REF)

            def scores(rows: list[Any] = rows) -> list[float]:
                return [score.reward or 0.0 for score in reward.score(*map(list, zip(*rows, strict=True)))]

            expected = scores()

            def check(found: list[float], expected: list[float] = expected) -> None:
                np.testing.assert_allclose(found, expected[: len(found)], atol=1e-4)

            ways = {"floor": timed(lambda even=even: [run(batch) for batch in even])}
            if name == "ways":
                ways["sorted"] = timed(scores, check)
                ways["one by one"] = timed(lambda ids=ids: [run([each])[0] for each in ids], check)
                ways["a prompt a batch"] = timed(
                    lambda ids=ids, starts=prompt_starts: [
                        score for start in starts for score in run(ids[start : start + NUM_REF])
                    ],
                    check,
                )
            else:
                parts, single = (
                    write_parts(store, questions, texts),
                    write_parts(store, questions[:1], [texts[0][:1]]),
                )
                ways["stage"] = timed(partial(stage, parts), check)
                ways["start"] = timed(partial(stage, single), check)
            lengths = np.array(list(map(len, ids)))
            quantiles = {str(q): int(np.quantile(lengths, q)) for q in (0.05, 0.5, 0.95, 1.0)}
            found = compare(ways, options.rounds, "floor", untimed=0, once=("a prompt a batch",))
            cases.append(
                {"completions": len(ids), "tokens": int(lengths.sum()), "lengths": quantiles, "ways": found}
            )
    return cases


if __name__ == "__main__":
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--stage-prompts", type=int, default=500)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    options = parser.parse_args()
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # the allocator reads them when a process starts
        words = [sys.executable, "-m", "benchmarks.rewards", *sys.argv[1:]]
        os.execve(sys.executable, words, {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(1)
    report(options, measure(options))
