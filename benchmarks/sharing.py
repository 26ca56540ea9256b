"""Prompts computed once for all their completions beside once for each: forward and backward, processor seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/sharing.py [--rounds 5] [--out sharing.json]

A Llama of 4 layers and width 128; 8 prompts with K completions, each as long as its heading says, so nothing is padded either way. Rounds
alternate, the first of each way is not counted; both ways must give the same gradient.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo.logprobs import completion_logprobs

PROMPTS = 8
SHAPES = (
    (60, 100, 2),
    (60, 100, 4),
    (300, 100, 2),
    (300, 100, 4),
)  # tokens of a prompt, of a completion, and K


def measure(model: LlamaForCausalLM, shape: tuple[int, int, int], rounds: int) -> dict[str, object]:
    """Both ways on prompts and completions of one shape."""
    prompt, completion, number = shape
    rng = np.random.default_rng(0)
    prompts, completions = [], []
    for _ in range(PROMPTS):
        tokens = rng.integers(4, 8000, prompt).tolist()
        for _ in range(number):
            prompts.append(tokens)  # the same list: that is how rows are known to share it
            completions.append(rng.integers(4, 8000, completion).tolist())
    seconds: dict[bool, list[float]] = {False: [], True: []}
    gradients = {}
    for _ in range(rounds + 1):
        for share in (False, True):
            model.zero_grad()
            started = time.process_time()
            completion_logprobs(model, prompts, completions, share_prompts=share).sum().backward()
            seconds[share].append(time.process_time() - started)
            gradients[share] = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-3)
    apart, shared = (statistics.median(seconds[share][1:]) for share in (False, True))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "completions": number,
        "tokens_saved": prompt * (number - 1) / (number * (prompt + completion)),
        "apart_cpu_seconds": apart,
        "apart_range": [min(seconds[False][1:]), max(seconds[False][1:])],
        "shared_cpu_seconds": shared,
        "shared_range": [min(seconds[True][1:]), max(seconds[True][1:])],
        "shared_over_apart": shared / apart,
    }


def main() -> None:
    """Measure every shape, print and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=2, **sizes))
    result = [measure(model, shape, options.rounds) for shape in SHAPES]
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
