"""Reward functions as users write them, right and wrong. test_rewards.py names them by this file's path."""

import asyncio
import os
import time

import reward_helper  # a sibling: the file's folder is on sys.path when it is loaded


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def matches_answer(completions, answer):  # takes only what it needs
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def number_of_messages(prompts, completions, **columns):
    """Messages come as lists of mappings, plain prompts as strings, never mixed in one call."""
    kinds = {type(value) for value in [*prompts, *completions]}
    assert len(kinds) == 1, kinds
    if kinds == {str}:
        return [-len(prompt) for prompt in prompts]
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    return [len(prompt) for prompt in prompts]


async def slowly(completions, **columns):
    async def one(text):
        await asyncio.sleep(0.01)
        return len(text)

    return await asyncio.gather(*map(one, completions))


def as_array(completions, **columns):
    import numpy as np

    return np.array([len(text) for text in completions], dtype=np.float32)


def echo(completions, returned):
    return returned[0]


def sometimes(completions, **columns):
    odd = {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "good", "true": True}
    return [odd.get(text, 1.0) for text in completions]


def raises_on_bad(completions, **columns):
    if "bad" in completions:
        raise ValueError("cannot judge this")
    return [1.0] * len(completions)


def always_raises(completions, **columns):
    raise RuntimeError("out of order")


def skips_empty(completions, **columns):
    return [1.0 for text in completions if text]


def one_number(completions, **columns):
    return 1.0


def hangs_on_bad(completions, **columns):
    if "bad" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


def hangs(completions, **columns):
    time.sleep(1000)


def dies_on_bad(completions, **columns):
    if "bad" in completions:
        os._exit(1)
    if "quit" in completions:
        raise SystemExit("I quit")
    return [1.0] * len(completions)


def with_helper(completions, **columns):
    return [reward_helper.VALUE for _ in completions]


def with_id(completions, completion_ids, **columns):
    return [len(ids) for ids in completion_ids]


def slow_process_id(completions, **columns):
    """So slow on a batch that no process gets two where there are as many processes as batches."""
    if "bad" in completions:
        raise ValueError("cannot judge this")
    if len(completions) > 1:
        time.sleep(1.0)
    return [os.getpid()] * len(completions)


def exits(prompts, completions, **columns):
    os._exit(3)
