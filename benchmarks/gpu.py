"""Training and scoring on one GPU: `QRPOTrainer` in its ways beside TRL's DPOTrainer at its best.

    python -m benchmarks.gpu [--sizes 1b 8b] [--groups train score sft lora repeat] [--out gpu.json]
    python -m benchmarks.gpu --sizes tiny --device cpu --steps 4   # checks the script

Every way runs in a fresh process on rows whose shapes it has not seen, so start-up, planning of
kernels and recompilation count: `first_seconds` is the first step, the other figures are of the
third step on. A step has 16 prompts with 2 completions each, of log-normal lengths (medians 200 and
350 tokens). 1B trains float32 weights under bf16 autocast, 8B bfloat16 weights. Weights are random.

    ours              QRPOTrainer, loss qrpo, defaults: packed rows, compiled layers, checkpointing
                      by need
    ours_eager        the same without compiled layers
    ours_padded       padded rows, layers not compiled
    trl               DPOTrainer with precomputed reference log-probabilities, 4 pairs a pass
    trl_liger         the same with Liger's fused kernels
    trl_nocheckpoint  the same without checkpointing (1B)
    score             score_logprobs with bfloat16 weights, no gradients
    sft, lora         the loss `sft`; LoRA of rank 16 on all linear layers (needs peft)
    repeat            two equal runs and one that is resumed: whether their weights are equal to the
                      bit

`mfu` is of the bfloat16 peak of `--peak` (dense operations a second): 6 per weight and token, the
output layer on completion tokens only, attention not counted. Needs torch, transformers, NumPy,
pydantic; trl and datasets for TRL's ways, which are reported as failed where they are missing.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.harness import command_line, report, run_command

BETA, PROMPTS, COMPLETIONS = 0.1, 16, 2
# hidden, intermediate, layers, heads, key-value heads, vocabulary: the last two as Llama 3.2 1B and
# 3.1 8B
SIZES = {
    "tiny": (64, 172, 2, 2, 1, 1_000),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "8b": (4096, 14336, 32, 32, 8, 128_256),
}
GROUPS = {
    "train": ["ours", "ours_eager", "ours_padded", "trl", "trl_liger", "trl_nocheckpoint"],
    "score": ["score"],
    "sft": ["sft"],
    "lora": ["lora"],
    "repeat": ["repeat"],
}


def make_rows(vocab_size: int, steps: int) -> list[dict[str, Any]]:
    """Rows for that many steps; token 2 ends a completion."""
    rng = np.random.default_rng(0)

    def ids(median: float, largest: int) -> list[int]:
        length = int(np.clip(median * np.exp(0.7 * rng.normal()), 16, largest))
        return [int(token) for token in rng.integers(4, vocab_size, length)]

    return [
        {
            "prompt_id": str(number),
            "prompt_token_ids": ids(200, 1024),
            "completion_token_ids": [[*ids(350, 1536), 2] for _ in range(COMPLETIONS)],
            "quantile_reward": rng.random(COMPLETIONS).tolist(),
            "reward": [1.0, 0.0],
            "num_ref": 50,
        }
        for number in range(steps * PROMPTS)
    ]


def make_model(size: str, device: str, half: bool) -> Any:
    """A random Llama, created on its device."""
    hidden, intermediate, layers, heads, kv_heads, vocab_size = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=size == "1b",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16 if half else torch.float32)


def operations(size: str, rows: list[dict[str, Any]], passes: int) -> tuple[int, float]:
    """Tokens of the rows, and operations of that many passes (1 forward, 3 with the backward
    pass)."""
    hidden, intermediate, layers, heads, kv_heads, vocab_size = SIZES[size]
    body = layers * hidden * (2 * hidden + 2 * hidden * kv_heads // heads + 3 * intermediate)
    completion = sum(len(ids) for row in rows for ids in row["completion_token_ids"])
    tokens = completion + sum(COMPLETIONS * len(row["prompt_token_ids"]) for row in rows)
    return tokens, 2.0 * passes * (body * tokens + vocab_size * hidden * completion)


class InOrder:
    """A reader of rows in their own order."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def iterate(self, epoch: int, start: int = 0) -> Any:
        """The rows from `start` on."""
        return iter(self.rows[start:])


class StepClock(TrainerCallback):  # type: ignore[misc]
    """The time at the begin of the first step and after each."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note the begin."""
        if not self.times:
            self.times.append(now())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the end."""
        self.times.append(now())


def now() -> float:
    """Seconds, after all work of the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(options: argparse.Namespace, rows: list[Any], seconds: list[float], passes: int = 3) -> Any:
    """Speed from the third step on."""
    size, first = options.sizes[0], min(2, len(seconds) - 1)
    steps = [operations(size, rows[i * PROMPTS : (i + 1) * PROMPTS], passes) for i in range(len(seconds))]
    kept = list(zip(seconds, steps, strict=True))[first:]
    total = sum(taken for taken, _ in kept)
    sample = {
        "tokens_per_second": sum(tokens for _, (tokens, _) in kept) / total,
        "mfu": sum(done for _, (_, done) in kept) / total / options.peak,
        "step_seconds": statistics.median(taken for taken, _ in kept),
        "first_seconds": seconds[0],
    }
    if torch.cuda.is_available():
        sample["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return sample


def train_ours(
    options: argparse.Namespace, folder: str, resume: bool = False, steps: int | None = None, **changes: Any
) -> tuple[Any, list[float]]:
    """A trainer after its run, and the seconds of its steps."""
    from qrpo import QRPOConfig, QRPOTrainer

    size, half = options.sizes[0], options.sizes[0] == "8b"
    rows = make_rows(SIZES[size][-1], options.steps)
    for row in rows:
        row["ref_logprob"] = [-np.log(SIZES[size][-1]) * len(ids) for ids in row["completion_token_ids"]]
    lora, settings = changes.pop("lora", False), {"gradient_checkpointing": "auto", **changes}
    args = QRPOConfig(
        output_dir=folder,
        use_cpu=options.device == "cpu",
        beta=BETA,
        per_device_train_batch_size=PROMPTS,
        max_steps=steps or options.steps,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        bf16=options.device == "cuda" and not half,
        max_initial_log_ratio=float("inf"),
        **settings,
    )
    model, clock = make_model(size, options.device, half), StepClock()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trainer = QRPOTrainer(model, args, InOrder(rows), callbacks=[clock])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, np.diff(clock.times).tolist()


def run_ours(options: argparse.Namespace) -> Any:
    """One of the ways of `QRPOTrainer`."""
    changes = {
        "ours": {"compile_layers": options.device == "cuda"},
        "ours_eager": {"compile_layers": False},
        "ours_padded": {"compile_layers": False, "packing": False},
        "sft": {"compile_layers": options.device == "cuda", "loss": "sft"},
        "lora": {"compile_layers": options.device == "cuda", "lora": True},
    }[options.way]
    with tempfile.TemporaryDirectory() as folder:
        trainer, seconds = train_ours(options, folder, save_strategy="no", **changes)
    rows = trainer.train_dataset.rows
    if options.way == "sft":  # trains on the chosen completion alone
        rows = [{**row, "completion_token_ids": row["completion_token_ids"][:1]} for row in rows]
    return measured(options, rows, seconds)


def run_score(options: argparse.Namespace) -> Any:
    """Log-probabilities without gradients, bfloat16 weights."""
    from qrpo.training.logprobs import best_layout, score_logprobs
    from qrpo.training.memory import default_token_budget, device_bytes

    size = options.sizes[0]
    rows = make_rows(SIZES[size][-1], options.steps)
    model = make_model(size, options.device, half=True)
    budget, layout = 2 * default_token_budget(device_bytes(model.device)), best_layout(model)
    seconds = []
    for start in range(0, len(rows), PROMPTS):
        batch = rows[start : start + PROMPTS]
        started = now()
        list(score_logprobs(model, batch, budget, layout=layout))
        seconds.append(now() - started)
    return measured(options, rows, seconds, passes=1)


def run_repeat(options: argparse.Namespace) -> Any:
    """Two runs, and one that stops half way and is resumed."""
    half = max(1, options.steps // 2)
    settings = {"save_strategy": "steps", "save_steps": half, "compile_layers": False, "learning_rate": 1e-5}

    def digest(folder: str, **further: Any) -> str:
        trainer, _ = train_ours(options, folder, **settings, **further)
        weights = (weight.detach().float().cpu().numpy() for weight in trainer.model.parameters())
        return hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest()

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, again = digest(one), digest(other)
        for path in Path(one).glob(f"checkpoint-{options.steps}/*"):
            path.unlink()
        for path in Path(one).glob(f"checkpoint-{options.steps}"):
            path.rmdir()
        resumed = digest(one, resume=True)
    return {"equal_again": float(first == again), "equal_resumed": float(first == resumed)}


def run_trl(options: argparse.Namespace) -> Any:
    """TRL's `DPOTrainer`; every token is a word, so the tokens are the same."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    size, half = options.sizes[0], options.sizes[0] == "8b"
    vocab_size = SIZES[size][-1]
    rows = make_rows(vocab_size, options.steps)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )

    def text(ids: list[int]) -> str:
        return "".join(f" w{token}" for token in ids)

    pairs = [
        {
            "prompt": text(row["prompt_token_ids"]),
            "chosen": text(chosen[:-1]),
            "rejected": text(rejected[:-1]),
        }
        for row in rows
        for chosen, rejected in [row["completion_token_ids"]]
    ]

    class InTheirOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            use_cpu=options.device == "cpu",
            bf16=options.device == "cuda" and not half,
            beta=BETA,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=PROMPTS // 4,
            gradient_checkpointing=options.way != "trl_nocheckpoint",
            use_liger_kernel=options.way == "trl_liger",
            max_length=4096,
            max_steps=options.steps,
            learning_rate=1e-6,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        model = make_model(size, options.device, half)
        data = datasets.Dataset.from_list(pairs)
        trainer = InTheirOrder(
            model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.train()
    return measured(options, rows, np.diff(clock.times).tolist())


RUN: dict[str, Callable[[argparse.Namespace], Any]] = {"score": run_score, "repeat": run_repeat}


def run_way(options: argparse.Namespace) -> Any:
    """The sample of one way in this process, or `failed` and why."""
    run = RUN.get(options.way, run_trl if options.way.startswith("trl") else run_ours)
    try:
        return run(options)
    except (ImportError, torch.OutOfMemoryError) as error:
        return {"failed": str(error).split("\n")[0]}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One case for each size."""
    cases = []
    ways = [way for group in options.groups for way in GROUPS[group]]
    for size in options.sizes:
        found: dict[str, Any] = {}
        failed = {}
        for way in ways:
            if size == "8b" and way == "trl_nocheckpoint":
                continue
            words = ("--way", way, "--sizes", size, "--device", options.device, "--steps", options.steps)
            text = run_command(
                sys.executable, "-m", "benchmarks.gpu", *map(str, words), "--peak", str(options.peak)
            )[1]
            sample = json.loads(text.splitlines()[-1])
            print(f"{size}, {way}: {sample}", file=sys.stderr, flush=True)
            if reason := sample.get("failed"):
                failed[way] = reason
            else:
                found[way] = {name: {"median": value} for name, value in sample.items()}
        device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        cases.append({"size": size, "device": device, "failed": failed, "ways": found})
    return cases


if __name__ == "__main__":
    parser = command_line(__doc__, rounds=None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "8b"])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--peak", type=float, default=989e12, help="operations a second (default: H100, H200)"
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_way(options)))
    else:
        report(options, measure(options))
