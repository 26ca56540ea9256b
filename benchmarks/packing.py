"""Padding-free packing beside length-sorted micro-batches: forward and backward of the backbone, processor seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/packing.py [--rounds 5] [--out packing.json]

The same conversations of log-normal lengths, under one token budget: sorted by length and padded (`qrpo.batches`), or end to end in rows
of the budget, with positions that begin anew and a block-diagonal causal mask. Rounds alternate. Without a kernel for
variable lengths (flash attention, CUDA alone), attention computes what the mask throws away.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo.batches import length_sorted_batches

BUDGET, ROWS = 2048, 24


def main() -> None:
    """Measure both ways, print and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=2, **sizes)).model
    rng = np.random.default_rng(0)
    rows = [
        torch.tensor(rng.integers(4, 8000, length))
        for length in np.clip(rng.lognormal(5, 0.7, ROWS), 16, 1000).astype(int)
    ]

    def sorted_batches() -> None:
        for batch in length_sorted_batches([len(row) for row in rows], BUDGET):
            tokens_BT = torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True)
            hidden_BTD = model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            sum(hidden_BTD[place, : len(rows[i])].sum() for place, i in enumerate(batch)).backward()

    def packed() -> None:
        bins: list[list[torch.Tensor]] = [[]]
        for row in sorted(rows, key=len, reverse=True):
            place = next((bin_ for bin_ in bins if sum(map(len, bin_)) + len(row) <= BUDGET), None)
            if place is None:
                bins.append(place := [])
            place.append(row)
        for bin_ in bins:
            turn_T = torch.cat([torch.full((len(row),), number) for number, row in enumerate(bin_)])
            seen_TT = (turn_T[:, None] == turn_T[None]).tril()
            positions_T = torch.cat([torch.arange(len(row)) for row in bin_])
            hidden_BTD = model(
                input_ids=torch.cat(bin_)[None],
                attention_mask=seen_TT[None, None],
                position_ids=positions_T[None],
                use_cache=False,
            ).last_hidden_state
            hidden_BTD.sum().backward()

    ways = {"sorted": sorted_batches, "packed": packed}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients = {}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            model.zero_grad()
            started = time.process_time()
            way()
            seconds[name].append(time.process_time() - started)
            gradients[name] = model.layers[0].self_attn.q_proj.weight.grad.clone()
    torch.testing.assert_close(gradients["packed"], gradients["sorted"], rtol=1e-3, atol=1e-3)
    result = {
        name: {"cpu_seconds": statistics.median(taken[1:]), "range": [min(taken[1:]), max(taken[1:])]}
        for name, taken in seconds.items()
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
