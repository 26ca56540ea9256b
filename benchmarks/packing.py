"""Padding-free packing beside length-sorted micro-batches: forward and backward of the backbone, processor seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/packing.py [--rounds 5] [--out packing.json]

The same conversations of log-normal lengths, under one token budget: sorted by length and padded (`qrpo.training.batches`), or end to end in rows
of the budget, with positions that begin anew and a block-diagonal causal mask. Rounds alternate. Without a kernel for
variable lengths (flash attention, CUDA alone), attention computes what the mask throws away.
"""

from typing import Any

import numpy as np
import torch
from alternating import VOCABULARY, alternate, run
from transformers import LlamaForCausalLM

from qrpo.training.batches import length_sorted_batches

BUDGET, ROWS = 2048, 24


def measure(llama: LlamaForCausalLM, rounds: int) -> dict[str, Any]:
    """Both ways on the same conversations."""
    model = llama.model
    rng = np.random.default_rng(0)
    rows = [
        torch.tensor(rng.integers(4, VOCABULARY, length))
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

    taken = alternate(llama, {"sorted": sorted_batches, "packed": packed}, rounds)
    return {name: {"cpu_seconds": median, "range": spread} for name, (median, spread) in taken.items()}


if __name__ == "__main__":
    run(__doc__, measure)
