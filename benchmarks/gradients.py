"""Ways to compute the same gradient: packing beside padding, and shared prompts beside repeated ones.

    OMP_NUM_THREADS=1 python -m benchmarks.gradients [--rounds 5] [--out gradients.json]

Forward and backward of a Llama with 4 layers of width 128 and random weights, processor seconds of one thread. All ways of a case must
give the same gradient.

Packing: conversations of log-normal lengths under one token budget, sorted by length and padded (`qrpo.training.batches`), or end to
end in rows of the budget, with positions that start again and a block-diagonal causal mask. Without a kernel for variable lengths
(flash attention, CUDA only), attention computes what the mask discards.

Sharing: 8 prompts with K completions of equal length, so neither way pads; each prompt is computed once for all its completions, or
once for each.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Case, command_line, compare, report, timed
from qrpo.training.batches import length_sorted_batches
from qrpo.training.logprobs import completion_logprobs

VOCABULARY = 8000
BUDGET, ROWS = 2048, 24
PROMPTS = 8
# tokens of a prompt, of a completion, and K
SHAPES = ((60, 100, 2), (60, 100, 4), (300, 100, 2), (300, 100, 4))


def small_llama() -> LlamaForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))


def compare_gradients(
    model: LlamaForCausalLM, ways: dict[str, Callable[[], None]], rounds: int, floor: str
) -> dict[str, object]:
    """A summary of ways that each run forward and backward; raises AssertionError where their gradients differ."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    gradients: list[torch.Tensor] = []

    def check(_: None) -> None:
        gradients.append(weight.grad.clone())
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-3, atol=1e-3)
        model.zero_grad()

    return compare({name: timed(way, check) for name, way in ways.items()}, rounds, floor)


def packing(llama: LlamaForCausalLM, rounds: int) -> Case:
    """Padded and packed rows of the same conversations."""
    model = llama.model
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 0.7, ROWS), 16, 1000).astype(int)
    rows = [torch.tensor(rng.integers(4, VOCABULARY, length)) for length in lengths]

    def padded() -> None:
        for batch in length_sorted_batches([len(row) for row in rows], BUDGET):
            tokens_BT = torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True)
            hidden_BTD = model(input_ids=tokens_BT, use_cache=False).last_hidden_state
            sum(hidden_BTD[place, : len(rows[i])].sum() for place, i in enumerate(batch)).backward()

    def packed() -> None:
        bins: list[list[torch.Tensor]] = []
        for row in sorted(rows, key=len, reverse=True):
            fitting = (bin_ for bin_ in bins if sum(map(len, bin_)) + len(row) <= BUDGET)
            if (bin_ := next(fitting, None)) is None:
                bins.append(bin_ := [])
            bin_.append(row)
        for bin_ in bins:
            row_T = torch.cat([torch.full((len(row),), number) for number, row in enumerate(bin_)])
            mask_TT = (row_T[:, None] == row_T[None]).tril()
            hidden_BTD = model(
                input_ids=torch.cat(bin_)[None],
                attention_mask=mask_TT[None, None],
                position_ids=torch.cat([torch.arange(len(row)) for row in bin_])[None],
                use_cache=False,
            ).last_hidden_state
            hidden_BTD.sum().backward()

    ways = {"padded": padded, "packed": packed}
    return {"case": "packing", "ways": compare_gradients(llama, ways, rounds, "padded")}


def sharing(
    model: LlamaForCausalLM, rounds: int, prompt_tokens: int, completion_tokens: int, number: int
) -> Case:
    """Prompts computed once, and once for each completion."""
    rng = np.random.default_rng(0)
    prompts, completions = [], []
    for _ in range(PROMPTS):
        prompt = rng.integers(4, VOCABULARY, prompt_tokens).tolist()
        prompts += [prompt] * number  # the same list object marks rows that share it
        completions += rng.integers(4, VOCABULARY, (number, completion_tokens)).tolist()

    def forward_and_backward(share: bool) -> None:
        completion_logprobs(model, prompts, completions, share_prompts=share).sum().backward()

    ways = {name: partial(forward_and_backward, name == "shared") for name in ("repeated", "shared")}
    return {
        "case": "sharing",
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "completions": number,
        "tokens_saved": prompt_tokens * (number - 1) / (number * (prompt_tokens + completion_tokens)),
        "ways": compare_gradients(model, ways, rounds, "repeated"),
    }


if __name__ == "__main__":
    options = command_line(__doc__).parse_args()
    torch.set_num_threads(1)
    llama = small_llama()
    cases = [packing(llama, options.rounds), *(sharing(llama, options.rounds, *shape) for shape in SHAPES)]
    report(options, cases)
