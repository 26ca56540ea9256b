"""Scoring with a reward model: our batches and our whole stage beside the ways that people write it.

    OMP_NUM_THREADS=1 python benchmarks/rewards.py [--runs 3] [--out benchmarks/results/rewards.json]

Completions of log-normal lengths (50 a prompt), a small Llama with one logit, float32. `floor` scores as many conversations
of as many tokens, in batches where all are equally long: no padding, token ids at hand. `sorted` is ours, from
messages to scores: template, tokenizer, length-sorted batches of a token budget. `one by one` and `a prompt a batch` (all completions
of a prompt in one padded batch, the research code's way) get token ids at hand, too. These four share 1,000 completions.

`stage` is the pipeline's: it reads completion parts from a store, starts a child process, loads the model there, scores, and
commits validated, checksummed reward parts. It has 25,000 completions, a minute or so, since its start costs the same
however much there is to do, and a floor of its own, `floor of the stage`. `start` is the same stage on a single completion.

All rewards are compared, and all ways run with the allocator settings that the stage's child process has. Medians of
interleaved runs (one of the slowest way), processor seconds beside wall seconds (a shared machine disturbs those less).
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qrpo.data.chat import encode_conversation, load_tokenizer
from qrpo.models import ModelConfig
from qrpo.rewards.model import KEEP_MEMORY, ModelReward, ModelRewardConfig
from qrpo.tiny import build_tiny_reward_model
from storage import PartKey, Store
from tasks.config import PipelineConfig, parse_config
from tasks.engines import close_engine
from tasks.plan import PartPlan
from tasks.stages import rewards
from tasks.stages.completions import TABLE
from tasks.work import Work

N = 50  # completions a prompt
MEDIAN, SIGMA, LONGEST = 60, 0.8, 1500  # of completions, in words, each about one token
CONTEXT = 2048
PART = 10  # prompts in a part of the stage
WORDS = [
    "the",
    "answer",
    "is",
    "that",
    "we",
    "can",
    "see",
    "how",
    "many",
    "of",
    "them",
    "there",
    "are",
    "when",
    "it",
    "does",
    "not",
    "say",
    "what",
    "to",
    "do",
    "next",
]

# name -> the floor that it is compared with
WAYS = {
    "floor": "floor",
    "sorted": "floor",
    "one by one": "floor",
    "a prompt a batch": "floor",
    "floor of the stage": "floor of the stage",
    "stage": "floor of the stage",
    "start": "floor of the stage",
}

Rows = list[tuple[list[dict[str, str]], str]]


def conversations(prompts: int) -> Rows:
    """(prompt, completion) rows, a prompt's completions together."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(prompts):
        prompt = [
            {"role": "user", "content": f"what is the answer to {number} " + "and why " * (number % 20)}
        ]
        lengths = np.clip(rng.lognormal(np.log(MEDIAN), SIGMA, N), 4, LONGEST).astype(int)
        rows += [(prompt, " ".join(rng.choice(WORDS, length))) for length in lengths]
    return rows


def forward(model: Any, batch: Sequence[Sequence[int]], pad: int) -> list[float]:
    """One padded batch."""
    longest = max(map(len, batch))
    input_ids = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=mask).logits
    return [float(logit) for logit in logits[:, 0]]


def floor_batches(ids: Sequence[Sequence[int]], budget: int) -> list[list[list[int]]]:
    """The length-sorted batches with every conversation of a batch cut or stretched to the batch's mean length.

    So as many conversations and tokens, of lengths spread as they are, but no padding.
    """
    ordered = sorted(ids, key=len, reverse=True)
    batches = []
    while ordered:
        rows = max(1, budget // len(ordered[0]))
        batch, ordered = ordered[:rows], ordered[rows:]
        mean = round(sum(map(len, batch)) / len(batch))
        batches.append([(list(sequence) * 2)[:mean] for sequence in batch])
    return batches


def write_parts(store: Store, rows: Rows, name: str) -> tuple[PartPlan, ...]:
    """Prompts and completions parts as the stages before would leave them; the reward parts to make of them."""
    plans = []
    for number, start in enumerate(range(0, len(rows), PART * N)):
        keys = {
            stage: PartKey(stage, name, f"{number:08d}") for stage in ("prompts", "completions", "rewards")
        }
        prompts: dict[str, Any] = {}
        completions = []
        for place, (messages, text) in enumerate(rows[start : start + PART * N]):
            prompt_id = f"{(start + place) // N:032x}"
            prompts[prompt_id] = {
                "prompt_id": prompt_id,
                "messages": messages,
                "split": "train",
                "source": "bench",
                "offline_completions": [],
                "metadata": "{}",
                "conversational": True,
            }
            completions.append(
                {
                    "prompt_id": prompt_id,
                    "sample_index": place % N,
                    "origin": "reference",
                    "text": text,
                    "token_ids": list(range(len(text.split()))),
                    "finish_reason": "stop",
                    "sampled_logprob": -1.0,
                }
            )
        store.commit_part(keys["prompts"], pa.Table.from_pylist(list(prompts.values())))
        table = pa.Table.from_pylist(completions, schema=TABLE.schema)
        store.commit_part(keys["completions"], table)
        parents = (keys["completions"], keys["prompts"])
        plans.append(PartPlan(keys["rewards"], parents, {"prompts": keys["prompts"].fingerprint}))
    return tuple(plans)


def stage(store: Store, plans: Sequence[PartPlan], config: PipelineConfig) -> list[float]:
    """The pipeline's stage over these parts; all rewards in order."""
    for plan in plans:
        store.discard_part(plan.key)
    records = list(rewards.compute(Work("rewards", config, store.url, tuple(plans))))
    close_engine()  # as the end of a stage does
    return [reward for record in records for reward in store.read_part(record)["reward"].to_pylist()]


def timed(way: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall and processor seconds of a call, its child processes included, and what it returned."""
    before, begin = _cpu(), time.perf_counter()
    result = way()
    return {"wall": time.perf_counter() - begin, "cpu": _cpu() - before}, result


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def compare(
    prompts: int, stage_prompts: int, runs: int, budget: int, hidden: int, chosen: Sequence[str]
) -> dict[str, Any]:
    """The chosen ways, interleaved."""
    rows, stage_rows = conversations(prompts), conversations(stage_prompts)
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_reward_model(
            Path(folder) / "model", [" ".join(WORDS)] * 20, hidden_size=hidden, max_length=CONTEXT
        )
        settings = {"model": {"path": str(path)}, "batch_tokens": budget, "device": "cpu"}
        config = parse_config(
            {
                "prompts": {"source": "none"},
                "reference": {"model": {"path": str(path)}},
                "completions": {"num_ref": N},
                "rewards": [{"kind": "model", **settings}],
                "run": {"part_size": PART},
            }
        )
        reward = ModelReward(ModelRewardConfig.model_validate(settings))
        tokenizer = load_tokenizer(ModelConfig(path=str(path)))
        model, pad = reward.model, tokenizer.pad_token_id

        def encoded(rows: Rows) -> list[list[int]]:
            return [
                encode_conversation(tokenizer, [*m, {"role": "assistant", "content": t}]) for m, t in rows
            ]

        def scored(rows: Rows) -> list[float]:
            return [score.reward or 0.0 for score in reward.score(*map(list, zip(*rows, strict=True)))]

        ids, stage_ids = encoded(rows), encoded(stage_rows)
        even, stage_even = floor_batches(ids, budget), floor_batches(stage_ids, budget)
        store = Store(Path(folder) / "store")
        plans, single = write_parts(store, stage_rows, "bench"), write_parts(store, rows[:1], "one")
        ways: dict[str, Callable[[], Any]] = {
            "floor": lambda: [forward(model, batch, pad) for batch in even],
            "sorted": lambda: scored(rows),
            "one by one": lambda: [forward(model, [sequence], pad)[0] for sequence in ids],
            "a prompt a batch": lambda: [
                r for start in range(0, len(ids), N) for r in forward(model, ids[start : start + N], pad)
            ],
            "floor of the stage": lambda: [forward(model, batch, pad) for batch in stage_even],
            "stage": lambda: stage(store, plans, config),
            "start": lambda: stage(store, single, config),
        }
        expected = {name: scored(rows) for name in ("sorted", "one by one", "a prompt a batch")}
        if "stage" in chosen:
            expected["stage"] = scored(stage_rows)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in ways if name in chosen}
        for run in range(runs):
            for name in times:
                if run and name == "a prompt a batch":
                    continue  # the slowest: once is enough to place it
                taken, found = timed(ways[name])
                times[name].append(taken)
                print(f"run {run + 1}, {name}: {taken}", file=sys.stderr)
                if name in expected:
                    assert np.allclose(found, expected[name], atol=1e-4), name
    return {
        "work": {"ways": _work(ids), "stage": _work(stage_ids)},
        "batch_tokens": budget,
        "hidden_size": hidden,
        "runs": runs,
        "ways": {name: _summary(found, times[WAYS[name]]) for name, found in times.items()},
    }


def _work(ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    lengths = np.array(list(map(len, ids)))
    quantiles = {str(q): int(np.quantile(lengths, q)) for q in (0.05, 0.5, 0.95, 1.0)}
    return {"completions": len(ids), "tokens": int(lengths.sum()), "lengths": quantiles}


def _summary(found: Sequence[dict[str, float]], base: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians, spreads, and the median over runs of the ratio to that run's floor."""
    return {
        kind: {
            "median": statistics.median(run[kind] for run in found),
            "min": min(run[kind] for run in found),
            "max": max(run[kind] for run in found),
            "times_floor": statistics.median(
                run[kind] / floor_run[kind] for run, floor_run in zip(found, base, strict=False)
            ),
        }
        for kind in ("wall", "cpu")
    }


def main() -> None:
    """Print, and with --out write, the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--stage-prompts", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="their floors among them")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(1)
    result = compare(
        arguments.prompts,
        arguments.stage_prompts,
        arguments.runs,
        arguments.batch_tokens,
        arguments.hidden_size,
        arguments.ways,
    )
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
