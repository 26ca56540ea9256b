"""One training step on one GPU: a Llama of 1B to 8B random weights, nothing to download.

    python benchmarks/training_step_cuda.py --size 1b [--steps 6] [--out training_step_cuda.json]
    python benchmarks/training_step_cuda.py --size tiny --device cpu        # only that the script runs

Needs torch, transformers and pyarrow, and this repository on the path (`qrpo.training.logprobs` and `qrpo.training.throughput` import nothing else).
Rows come from a Parquet file, as shards do: prompts with two completions of log-normal lengths. Weights, gradients and AdamW's state
are bfloat16, so that 8B fits 80 GB. Two ways, each in a process of its own:

    ours    length-sorted batches under a token budget, log-probabilities from hidden states in chunks (`completion_logprobs`)
    plain   batches of the same number of rows in the order they come, padded, all logits

Reported: tokens per second (padding not counted), MFU (see `qrpo.training.throughput`), peak memory that torch allocated, medians over
all steps but the first. `plain` may run out of memory, which is then its result.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qrpo.training.batches import length_sorted_batches
from qrpo.training.logprobs import completion_logprobs
from qrpo.training.throughput import Meter

BETA = 0.1
# hidden, intermediate, layers, heads, key-value heads, vocabulary: those of Llama 3.2 1B, 3B and Llama 3.1 8B
SIZES = {
    "tiny": (64, 172, 2, 2, 1, 1_000),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "3b": (3072, 8192, 28, 24, 8, 128_256),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
}

Rows = list[tuple[list[int], list[int], float]]  # prompt, completion, regression target
LogProbs = Callable[[Any, Rows], torch.Tensor]


def write_rows(path: Path, prompts: int, vocab_size: int) -> None:
    """A shard's columns, as far as a step needs them."""
    rng = np.random.default_rng(0)

    def ids(median: float, sigma: float, most: int) -> list[int]:
        return rng.integers(
            4, vocab_size, int(np.clip(median * np.exp(sigma * rng.normal()), 16, most))
        ).tolist()

    rows = [
        {
            "prompt_token_ids": ids(200, 0.7, 1024),
            "completion_token_ids": [ids(350, 0.7, 1536) for _ in range(2)],
            "quantile_reward": rng.random(2).tolist(),
        }
        for _ in range(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def read_rows(path: Path) -> Rows:
    """One entry for each completion."""
    return [
        (row["prompt_token_ids"], completion, quantile)
        for row in pq.read_table(path).to_pylist()
        for completion, quantile in zip(row["completion_token_ids"], row["quantile_reward"], strict=True)
    ]


def make_model(size: str, device: str, checkpointing: bool) -> Any:
    """Random weights made on the device itself, in bfloat16 on a GPU and float32 on a CPU."""
    hidden, intermediate, layers, heads, kv_heads, vocab_size = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=size in ("1b", "3b"),
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def our_logprobs(model: Any, batch: Rows) -> torch.Tensor:
    """The project's own."""
    return completion_logprobs(model, [row[0] for row in batch], [row[1] for row in batch])


def plain_logprobs(model: Any, batch: Rows) -> torch.Tensor:
    """Padded, with an attention mask and all logits."""
    device = next(model.parameters()).device
    lengths = [len(prompt) + len(completion) for prompt, completion, _ in batch]
    tokens_BT = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    attended_BT, mask_BT = torch.zeros_like(tokens_BT), torch.zeros(tokens_BT.shape)
    for place, ((prompt, completion, _), end) in enumerate(zip(batch, lengths, strict=True)):
        tokens_BT[place, :end] = torch.tensor([*prompt, *completion])
        attended_BT[place, :end] = 1
        mask_BT[place, len(prompt) : end] = 1
    tokens_BT, attended_BT, mask_BT = (tokens_BT.to(device), attended_BT.to(device), mask_BT.to(device))
    logits_BTV = (
        model(input_ids=tokens_BT, attention_mask=attended_BT, use_cache=False).logits[:, :-1].float()
    )
    token_BT = logits_BTV.log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
    return (token_BT * mask_BT[:, 1:]).sum(1)


def measure(way: str, options: argparse.Namespace, shard: Path) -> dict[str, Any]:
    """All steps of one way, in this process."""
    cuda = options.device != "cpu"
    rows = read_rows(shard)
    model = make_model(options.size, options.device, options.gradient_checkpointing)
    dtype = next(model.parameters()).dtype
    lengths = [len(prompt) + len(completion) for prompt, completion, _ in rows]
    sorted_batches = length_sorted_batches(lengths, options.token_budget)
    if way == "ours":
        batches, logprobs = sorted_batches, our_logprobs
    else:
        size = -(-len(rows) // len(sorted_batches))
        batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        logprobs = plain_logprobs
    reference = {}
    with torch.no_grad():
        for batch in batches:
            reference[batch[0]] = logprobs(model, [rows[place] for place in batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)
    meter = Meter(model, dtype)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seen: list[dict[str, float]] = []
    for step in range(options.steps):
        started = time.perf_counter()
        meter.start(step)
        for batch in batches:
            chosen = [rows[place] for place in batch]
            target_B = torch.tensor([row[2] for row in chosen], device=options.device)
            log_ratio_B = logprobs(model, chosen) - reference[batch[0]]
            ((target_B - BETA * log_ratio_B).square().sum() / len(rows)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        meter.add(sum(lengths), sum(len(row[1]) for row in rows))
        seen.append(
            {"seconds": time.perf_counter() - started, "grad_norm": float(norm)}
            | meter.read(step + 1, options.steps, 1)
        )
    counted = seen[1:] or seen
    names = [name for name in ("seconds", "tokens_per_second", "mfu") if name in counted[0]]
    return {
        **{name: statistics.median(entry[name] for entry in counted) for name in names},
        "first_grad_norm": seen[0]["grad_norm"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "forward_passes": len(batches),
        "padded_tokens": sum(max(lengths[place] for place in batch) * len(batch) for batch in batches),
        "tokens": sum(lengths),
        "dtype": str(dtype).removeprefix("torch."),
    }


def main() -> None:
    """Measure each way in a process of its own; print and write one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        try:
            print(json.dumps(measure(options.way, options, options.shard)))
        except torch.OutOfMemoryError as error:
            print(json.dumps({"out_of_memory": str(error).splitlines()[0]}))
        return
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "size": options.size, "ways": {}}
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "shard.parquet")
        write_rows(shard, options.prompts, SIZES[options.size][-1])
        for way in ("ours", "plain"):
            child = [sys.executable, *sys.argv, "--way", way, "--shard", str(shard)]
            answer = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout
            results["ways"][way] = json.loads(answer.splitlines()[-1])
    print(json.dumps(results, indent=2))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
