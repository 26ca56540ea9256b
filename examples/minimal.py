"""QRPO in one file: from prompts to a better policy, in plain torch and transformers.

    python -m examples.minimal          # two minutes on one CPU core, no downloads

The task is the demo's: sort seven letters. Each numbered step is a stage of the pipeline. Shapes in
names: P prompts, N reference completions of a prompt, K completions to rank.
"""

import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from examples.demo.reward import closeness
from examples.demo.task import write_demo

NUM_REF = 16  # reference completions per prompt
BETA = 0.1  # strength of the KL penalty

Tokens = list[int]
Row = tuple[Tokens, Tokens]  # a prompt and its completion


def logprobs(model: PreTrainedModel, rows: list[Row]) -> Tensor:
    """Sum of the completion tokens' log-probabilities of each row, in nats."""
    tokens = [torch.tensor(prompt + completion) for prompt, completion in rows]
    labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)  # -100: no loss on this token
    # Padding is on the right, where causal attention does not look: no mask is needed.
    logits = model(pad_sequence(tokens, batch_first=True), use_cache=False).logits.transpose(1, 2)
    # The logits at position t predict token t + 1.
    return -cross_entropy(logits[..., :-1], labels[:, 1:], reduction="none").sum(-1)


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: AutoTokenizer, prompts: list[Tokens], n: int) -> list[list]:
    """n rows for each prompt, drawn from the model's own distribution, as the method assumes."""
    rows, end = [], tokenizer.eos_token_id
    for start in range(0, len(prompts), 32):
        batch = prompts[start : start + 32]
        inputs = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt")
        drawn = model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=n, max_new_tokens=12)
        for i, ids in enumerate(drawn[:, inputs["input_ids"].shape[1] :].tolist()):
            # The end token belongs to the completion. Padding follows it.
            rows.append((batch[i // n], ids[: ids.index(end) + 1] if end in ids else ids))
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def quantile_rewards(rewards_PK: Tensor, ref_rewards_PN: Tensor, own: int = 0) -> Tensor:
    """(P, K) shares of the reference rewards below each reward; ties count half. With `own` = 1 the
    completions are the references, and none is compared with itself."""
    below = (ref_rewards_PN[:, None] < rewards_PK[:, :, None]).sum(-1)
    equal = (ref_rewards_PN[:, None] == rewards_PK[:, :, None]).sum(-1) - own
    return (below + 0.5 * equal) / (ref_rewards_PN.shape[1] - own)


def train(model: PreTrainedModel, batches: list, loss: Callable, learning_rate: float) -> None:
    """Take one step of AdamW per batch: a cosine schedule with warm-up, clipped gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = cosine_schedule(optimizer, len(batches) // 10, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main(num_prompts: int = 1500, seed: int = 0) -> tuple[float, float]:
    """Run every step; return quantile reward and KL on held-out prompts."""
    set_seed(seed)
    folder = write_demo(tempfile.mkdtemp(), prompts=num_prompts)
    data = [json.loads(line) for line in Path(folder, "prompts.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for row in data:
        chat = [{"role": "user", "content": row["prompt"]}]
        row["ids"] = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    held_out, data = data[: num_prompts // 5], data[num_prompts // 5 :]

    def score(groups: list[list[Row]], problems: list[dict]) -> Tensor:
        rewards = []
        for group, problem in zip(groups, problems, strict=True):
            texts = tokenizer.batch_decode([ids for _, ids in group], skip_special_tokens=True)
            rewards.append([closeness(text.strip(), problem["answer"]) for text in texts])
        return torch.tensor(rewards)

    print("1. Make the reference policy: fine-tune the base model on careless answers")
    reference = AutoModelForCausalLM.from_pretrained(folder / "base")
    texts = [row["completion"] + tokenizer.eos_token for row in data]
    answers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = list(zip([row["ids"] for row in data], answers, strict=True))
    epochs = [random.sample(rows, len(rows)) for _ in range(7)]
    batches = [epoch[i : i + 16] for epoch in epochs for i in range(0, len(epoch), 16)]

    def sft_loss(batch: list[Row]) -> Tensor:
        return -logprobs(reference, batch).sum() / sum(len(completion) for _, completion in batch)

    train(reference, batches, sft_loss, learning_rate=2e-3)

    print("2. Sample reference completions")
    groups = sample(reference, tokenizer, [row["ids"] for row in data], NUM_REF)

    print("3. Score them, and turn each reward into its quantile among the references of its prompt")
    rewards_PN = score(groups, data)
    quantiles_PN = quantile_rewards(rewards_PN, rewards_PN, own=1)

    print("4. Compute the reference's log-probabilities once, before training")
    with torch.no_grad():
        ref_logprobs_PN = torch.stack([logprobs(reference, group) for group in groups])

    print("5. Fit the policy by regression")
    # Quantiles are uniform under the reference: Z is the integral of exp(t / beta) over [0, 1].
    log_z = math.log(BETA * math.expm1(1 / BETA))
    policy = AutoModelForCausalLM.from_pretrained(folder / "base")
    policy.load_state_dict(reference.state_dict())

    def qrpo_loss(batch: list[int]) -> Tensor:
        rows = [row for p in batch for row in groups[p]]
        log_ratio = logprobs(policy, rows) - ref_logprobs_PN[batch].flatten()
        # At the optimum, beta * log(policy / reference) = quantile - beta * log Z.
        return (quantiles_PN[batch].flatten() - BETA * log_z - BETA * log_ratio).square().mean()

    order = random.sample(range(len(data)), len(data))
    train(policy, [order[i : i + 8] for i in range(0, len(data), 8)], qrpo_loss, learning_rate=5e-4)

    print("6. Compare fresh samples of both models on held-out prompts")
    prompts = [row["ids"] for row in held_out]
    ref_rewards_PN = score(sample(reference, tokenizer, prompts, NUM_REF), held_out)
    groups = sample(policy, tokenizer, prompts, 8)
    rewards_PK = score(groups, held_out)
    quantiles_PK = quantile_rewards(rewards_PK, ref_rewards_PN)
    with torch.no_grad():
        kl = torch.stack([logprobs(policy, rows) - logprobs(reference, rows) for rows in groups]).mean()
    print(f"   reward {ref_rewards_PN.mean():.3f} -> {rewards_PK.mean():.3f}, KL {kl:.3f} nats")
    optimum = 1 / -math.expm1(-1 / BETA) - BETA
    print(f"   quantile reward 0.5 -> {quantiles_PK.mean():.3f}; {optimum:.3f} at the optimum of this beta")
    return quantiles_PK.mean().item(), kl.item()


if __name__ == "__main__":
    main()
