"""One training step: `QRPOTrainer` beside TRL's DPOTrainer, a plain padded step, and a bare floor.

    OMP_NUM_THREADS=1 python -m benchmarks.training_step --trl-python PYTHON [--out FILE]

PYTHON is an interpreter of another environment (`python3.11 -m venv trl-venv`,
`trl-venv/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.19.0`); without it TRL is
skipped. Every way does the same work on random weights: prompts with a chosen and a rejected
completion of log-normal lengths, forward, backward, gradient clipping and an update, in float32 on
one thread of a CPU, with SGD, which keeps no state. `benchmarks.gpu` measures a GPU.

    floor            sequences one by one, unpadded; the head on completion tokens only, in chunks
                     of 16 MiB of logits that are computed again in the backward pass; QRPO's loss,
                     a bare loop
    floor_64mib      the same with chunks of 64 MiB, each a block that glibc maps again
    floor_our_head   the same with `qrpo.training.head` for the head: what remains is the trainer's
                     work and padding
    ours_qrpo        QRPOTrainer, loss qrpo, reference log-probabilities from the data
    ours_dpo         QRPOTrainer, loss dpo
    plain            padded batches in the order of the rows, all logits, log_softmax and gather;
                     QRPO's loss, a bare loop, one batch
    trl_default      DPOTrainer with its defaults: the whole step in one padded batch, reference
                     computed in each step
    trl_precomputed  DPOTrainer with precompute_ref_log_probs, the whole step in one padded batch
    trl_best         the same, one pair at a time by gradient accumulation, which pads least

Each sample is a process that takes `--steps` steps: medians of all but the first. Ways that
minimize the same loss must report the same gradient norm. Peak memory is the process's largest
resident size, libraries included, and `step_mib` the part of it that came after the model was
loaded.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Case, Sample, clocks, command_line, compare, report, run_command, since

BETA = 0.1
FLOORS, OURS = ("floor", "floor_64mib", "floor_our_head"), ("ours_qrpo", "ours_dpo")
WAYS = (*FLOORS, *OURS, "plain", "trl_default", "trl_precomputed", "trl_best")
SAME_LOSS = ((*FLOORS, "ours_qrpo", "plain"), ("ours_dpo", "trl_default", "trl_precomputed", "trl_best"))
CHUNK = 2**22  # logits at a time in the floor, as in ours on a CPU: 16 MiB in float32


def make_rows(vocab_size: int) -> list[dict[str, Any]]:
    """Prompts with two completions each; token 1 ends a completion.

    Fewer where the vocabulary is large, so that TRL's step, all logits of one padded batch, fits 24
    GiB of memory.
    """
    rng = np.random.default_rng(0)
    prompts = 4 if vocab_size < 100_000 else 2
    prompt_size, completion_size = (60, 0.6, 200), (100, 0.8, 400)

    def ids(median: float, sigma: float, most: int) -> list[int]:
        length = int(np.clip(median * np.exp(sigma * rng.normal()), 8, most))
        return [int(token) for token in rng.integers(4, vocab_size, length)]

    return [
        {
            "prompt_id": str(place),
            "prompt_token_ids": ids(*prompt_size),
            "completion_token_ids": [[*ids(*completion_size), 1] for _ in range(2)],
            "quantile_reward": [0.9, 0.2],
            "num_ref": 20,
        }
        for place in range(prompts)
    ]


def make_model(options: argparse.Namespace) -> Any:
    """The same Llama in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab[0],
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Stopwatch:
    """Samples of the steps of this process."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._samples, self._loaded = list[Sample](), 0.0
        self._completions = sum(len(c) for row in rows for c in row["completion_token_ids"])
        self._tokens = self._completions + sum(2 * len(row["prompt_token_ids"]) for row in rows)

    def start(self) -> None:
        """Begin a step."""
        self._loaded = self._loaded or self._memory("VmRSS")
        self._began = clocks()

    def stop(self, grad_norm: float) -> None:
        """End it."""
        self._samples.append({**since(self._began), "grad_norm": grad_norm})

    def sample(self) -> Sample:
        """Medians of all steps but the first, which has the gradient norm of the initial
        weights."""
        counted = self._samples[1:]
        wall, cpu = (statistics.median(step[clock] for step in counted) for clock in ("wall", "cpu"))
        peak = self._memory("VmHWM")
        return {
            "wall": wall,
            "cpu": cpu,
            "tokens_per_second": self._tokens / cpu,
            "peak_mib": peak,
            "step_mib": peak - self._loaded,
            "grad_norm": self._samples[0]["grad_norm"],
        }

    def _memory(self, field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def bare_loop(
    model: Any, batches: list[Any], logprobs: Callable[[Any], Any], watch: Stopwatch, steps: int
) -> None:
    """QRPO's gradient over batches of (row number, prompt, completion, quantile), clipping and
    update, with nothing else."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model.train()
    rows = sum(map(len, batches))
    with torch.no_grad():
        reference = [logprobs(batch) for batch in batches]
    for _ in range(steps):
        watch.start()
        for batch, ref_B in zip(batches, reference, strict=True):
            target_B = torch.tensor([target(quantile) for _, _, quantile in batch])
            ((target_B - BETA * (logprobs(batch) - ref_B)).square().sum() / rows).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.stop(float(norm))


def target(quantile: float) -> float:
    """q - beta log Z, with the continuous partition function of the identity."""
    return quantile - BETA * (math.log(BETA) + 1 / BETA + math.log1p(-math.exp(-1 / BETA)))


def sequences(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int], float]]:
    """(prompt, completion, quantile) of every completion."""
    return [
        (row["prompt_token_ids"], completion, quantile)
        for row in rows
        for completion, quantile in zip(row["completion_token_ids"], row["quantile_reward"], strict=True)
    ]


def run_floor(model: Any, rows: list[Any], watch: Stopwatch, options: argparse.Namespace) -> None:
    """One sequence at a time; the head in chunks of completion tokens, recomputed in the backward
    pass."""
    from torch.utils.checkpoint import checkpoint

    size = (4 if options.way == "floor_64mib" else 1) * CHUNK // model.config.vocab_size

    def head(hidden_CD: Any, targets_C: Any) -> Any:
        logits_CV = model.lm_head(hidden_CD)
        return (logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(1)).sum()

    def logprobs(batch: list[Any]) -> Any:
        ((prompt, completion, _),) = batch
        ids = torch.tensor([[*prompt, *completion]])
        hidden_TD = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        targets_T = ids[0, len(prompt) :]
        if options.way == "floor_our_head":
            from qrpo.training.head import token_logprobs

            return token_logprobs(model, hidden_TD, targets_T, CHUNK).sum()[None]
        chunks = zip(hidden_TD.split(size), targets_T.split(size), strict=True)
        return sum(checkpoint(head, *chunk, use_reentrant=False) for chunk in chunks)[None]

    bare_loop(model, [[each] for each in sequences(rows)], logprobs, watch, options.steps)


def run_plain(model: Any, rows: list[Any], watch: Stopwatch, options: argparse.Namespace) -> None:
    """Padded, with an attention mask and all logits, as a first version is written."""

    def logprobs(batch: list[Any]) -> Any:
        longest = max(len(prompt) + len(completion) for prompt, completion, _ in batch)
        tokens_BT = torch.full((len(batch), longest), 2)
        attended_BT, mask_BT = torch.zeros_like(tokens_BT), torch.zeros(tokens_BT.shape)
        for place, (prompt, completion, _) in enumerate(batch):
            end = len(prompt) + len(completion)
            tokens_BT[place, :end] = torch.tensor([*prompt, *completion])
            attended_BT[place, :end] = 1
            mask_BT[place, len(prompt) : end] = 1
        output = model(input_ids=tokens_BT, attention_mask=attended_BT, use_cache=False)
        logits_BTV = output.logits[:, :-1].float()
        token_BT = logits_BTV.log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
        return (token_BT * mask_BT[:, 1:]).sum(1)

    every = sequences(rows)
    bare_loop(model, [every], logprobs, watch, options.steps)


def run_ours(model: Any, rows: list[Any], watch: Stopwatch, options: argparse.Namespace) -> None:
    """`QRPOTrainer`, with everything that it does around a step."""
    from qrpo import QRPOConfig, QRPOTrainer
    from qrpo.training import logprobs

    budget = options.token_budget
    for row, scores in zip(rows, logprobs.score_logprobs(model, rows, budget), strict=True):
        row["ref_logprob"] = scores
    with tempfile.TemporaryDirectory() as folder:
        loss = options.way.removeprefix("ours_")
        settings = trainer_arguments(folder, options)
        args = QRPOConfig(
            loss=loss,
            pairs="dataset",
            beta=BETA,
            token_budget=budget,
            per_device_train_batch_size=len(rows),
            **settings,
        )
        train(QRPOTrainer(model, args, rows), watch)


def run_trl(model: Any, rows: list[Any], watch: Stopwatch, options: argparse.Namespace) -> None:
    """TRL's `DPOTrainer`; every token is a word, so that the tokens are the same."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{i}" for i in range(4, model.config.vocab_size))]
    vocabulary = {word: token for token, word in enumerate(words)}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, **special)

    def text(ids: list[int]) -> str:
        return "".join(f" w{token}" for token in ids)

    names = ("prompt", "chosen", "rejected")
    data = [
        dict(zip(names, map(text, (row["prompt_token_ids"], chosen[:-1], rejected[:-1])), strict=True))
        for row in rows
        for chosen, rejected in [row["completion_token_ids"]]
    ]
    pairs = 1 if options.way == "trl_best" else len(data)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            beta=BETA,
            per_device_train_batch_size=pairs,
            gradient_accumulation_steps=len(data) // pairs,
            precompute_ref_log_probs=options.way != "trl_default",
            precompute_ref_batch_size=1,
            gradient_checkpointing=False,
            max_length=None,
            bf16=False,
            **trainer_arguments(folder, options),
        )
        model.save_pretrained(f"{folder}/model")  # TRL loads its reference from there
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        dataset = Dataset.from_list(data)
        train(DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer), watch)


def trainer_arguments(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of both trainers."""
    return {
        "output_dir": folder,
        "max_steps": options.steps,
        "optim": "sgd",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(trainer: Any, watch: Stopwatch) -> None:
    """Train; a step ends when the Trainer has logged it."""
    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "grad_norm" in logs:
                watch.stop(float(logs["grad_norm"]))

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    trainer.train()


def run_way(options: argparse.Namespace) -> Sample:
    """The steps of one way, in this process."""
    torch.set_num_threads(1)
    rows = make_rows(options.vocab[0])
    watch = Stopwatch(rows)
    run = {"floor": run_floor, "ours": run_ours, "plain": run_plain, "trl": run_trl}[
        options.way.split("_")[0]
    ]
    run(make_model(options), rows, watch, options)
    return watch.sample()


def measure_way(way: str, vocab_size: int, options: argparse.Namespace) -> Sample:
    """The sample that a process of one way prints in its last line."""
    python = options.trl_python if way.startswith("trl") else sys.executable
    settings = ("--steps", str(options.steps), "--token-budget", str(options.token_budget))
    words = ("--way", way, "--vocab", str(vocab_size), *settings)
    text = run_command(python, "-m", "benchmarks.training_step", *words)[1]
    return dict(json.loads(text.splitlines()[-1]))


def measure(options: argparse.Namespace) -> list[Case]:
    """All ways at each vocabulary."""
    ways = [way for way in options.ways if options.trl_python or not way.startswith("trl")]
    cases = []
    for vocab_size in options.vocab:
        by_way = {way: partial(measure_way, way, vocab_size, options) for way in ways}
        found = compare(by_way, options.rounds, ways[0], untimed=0)
        for group in SAME_LOSS:
            norms = [found[way]["grad_norm"]["median"] for way in group if way in found]
            assert np.allclose(norms, norms[:1], rtol=2e-3), f"other gradients: {norms} of {group}"
        cases.append({"vocabulary": vocab_size, "ways": found})
    return cases


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument(
        "--steps", type=int, default=2, help="steps of each process; the first is not counted"
    )
    parser.add_argument("--token-budget", type=int, default=512, help="of ours (default: %(default)s)")
    parser.add_argument("--trl-python")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first is the floor")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_way(options)))
    else:
        report(options, measure(options))
