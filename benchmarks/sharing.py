"""Prompts computed once for all their completions beside once for each: forward and backward, processor seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/sharing.py [--rounds 5] [--out sharing.json]

A Llama of 4 layers and width 128; 8 prompts with K completions, each as long as its heading says, so nothing is padded either way. Rounds
alternate, the first of each way is not counted; both ways must give the same gradient.
"""

from functools import partial
from typing import Any

import numpy as np
from alternating import VOCABULARY, alternate, run
from transformers import LlamaForCausalLM

from qrpo.training.logprobs import completion_logprobs

PROMPTS = 8
# tokens of a prompt, of a completion, and K
SHAPES = ((60, 100, 2), (60, 100, 4), (300, 100, 2), (300, 100, 4))


def measure(model: LlamaForCausalLM, rounds: int) -> list[dict[str, Any]]:
    """Both ways on every shape."""
    return [_measure_shape(model, shape, rounds) for shape in SHAPES]


def _measure_shape(model: LlamaForCausalLM, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    prompt, completion, number = shape
    rng = np.random.default_rng(0)
    prompts, completions = [], []
    for _ in range(PROMPTS):
        tokens = rng.integers(4, VOCABULARY, prompt).tolist()
        for _ in range(number):
            prompts.append(tokens)  # the same list: that is how rows are known to share it
            completions.append(rng.integers(4, VOCABULARY, completion).tolist())

    def forward_and_backward(share: bool) -> None:
        completion_logprobs(model, prompts, completions, share_prompts=share).sum().backward()

    ways = {"apart": partial(forward_and_backward, False), "shared": partial(forward_and_backward, True)}
    taken = alternate(model, ways, rounds)
    (apart, apart_range), (shared, shared_range) = taken["apart"], taken["shared"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "completions": number,
        "tokens_saved": prompt * (number - 1) / (number * (prompt + completion)),
        "apart_cpu_seconds": apart,
        "apart_range": apart_range,
        "shared_cpu_seconds": shared,
        "shared_range": shared_range,
        "shared_over_apart": shared / apart,
    }


if __name__ == "__main__":
    run(__doc__, measure)
