"""What the benchmarks that compare ways to one gradient share: a small Llama, rounds that alternate, the command line."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 8000


def small_llama() -> LlamaForCausalLM:
    """4 layers of width 128, random weights, always the same ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def alternate(
    model: LlamaForCausalLM, ways: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, tuple[float, list[float]]]:
    """Processor seconds of each way: median, and [least, most].

    A way is a forward and backward. The first round is not counted; all ways must give the same gradient.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            model.zero_grad()
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
            gradients[name] = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    first, *others = gradients.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3)
    return {
        name: (statistics.median(taken[1:]), [min(taken[1:]), max(taken[1:])])
        for name, taken in seconds.items()
    }


def run(description: str | None, measure: Callable[[LlamaForCausalLM, int], Any]) -> None:
    """Read `--rounds` and `--out`, measure on one thread, print and write the JSON."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = json.dumps(measure(small_llama(), options.rounds), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
