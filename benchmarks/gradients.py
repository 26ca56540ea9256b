"""The layouts of `qrpo.training.logprobs` compared: padded, packed, and shared prompts.

    OMP_NUM_THREADS=1 python -m benchmarks.gradients [--rounds 5] [--out gradients.json]

Forward and backward of a Llama with 4 layers of width 128 and random weights, processor seconds of
one thread. All layouts of a case must give the same gradient. In the first case prompts and
completions have log-normal lengths, in the others equal ones, so nothing is padded.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case, command_line, compare, report, timed
from qrpo.training.batches import Layout, cut_batches
from qrpo.training.logprobs import best_layout, completion_logprobs

VOCABULARY = 8000
BUDGET, PROMPTS = 2048, 8
# median tokens of a prompt, of a completion, K, and the spread of log-normal lengths
SHAPES = ((60, 100, 2, 0.7), (60, 100, 2, 0.0), (60, 100, 4, 0.0), (300, 100, 2, 0.0), (300, 100, 4, 0.0))


def small_llama() -> LlamaForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def compare_gradients(
    model: LlamaForCausalLM, ways: dict[str, Callable[[], None]], rounds: int
) -> dict[str, object]:
    """A summary of ways that each run forward and backward; raises AssertionError where their
    gradients differ."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    gradients: list[torch.Tensor] = []

    def check(_: None) -> None:
        gradients.append(weight.grad.clone())
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-3, atol=1e-3)
        model.zero_grad()

    return compare({name: timed(way, check) for name, way in ways.items()}, rounds, "padded")


def measure(
    model: LlamaForCausalLM,
    rounds: int,
    prompt_tokens: float,
    completion_tokens: float,
    number: int,
    spread: float,
) -> Case:
    """All layouts of prompts with `number` completions each, of these median lengths."""
    rng = np.random.default_rng(0)

    def ids(median: float) -> list[int]:
        length = max(1, int(median * np.exp(spread * rng.normal())))
        return [int(token) for token in rng.integers(4, VOCABULARY, length)]

    prompts, completions = [], []
    for _ in range(PROMPTS):
        prompts += [ids(prompt_tokens)] * number  # the same list object marks rows that share it
        completions += [ids(completion_tokens) for _ in range(number)]

    def forward_and_backward(layout: Layout) -> None:
        batches, _ = cut_batches(prompts, completions, BUDGET, layout)
        for batch in batches:
            of_batch = ([each[i] for i in batch] for each in (prompts, completions))
            completion_logprobs(model, *of_batch, layout=layout).sum().backward()

    layouts: tuple[Layout, ...] = ("padded", "packed", "shared")
    ways = {layout: partial(forward_and_backward, layout) for layout in layouts}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "completions": number,
        "spread": spread,
        "tokens_saved": prompt_tokens * (number - 1) / (number * (prompt_tokens + completion_tokens)),
        "ways": compare_gradients(model, ways, rounds),
    }


if __name__ == "__main__":
    options = command_line(__doc__).parse_args()
    torch.set_num_threads(1)
    llama = small_llama()
    assert best_layout(llama) == "shared"
    report(options, [measure(llama, options.rounds, *shape) for shape in SHAPES])
