"""One training step on a small Llama: ours beside TRL's DPOTrainer, a plain padded step, and the bare floor.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --trl-python PYTHON [--rounds 5] [--out training_step.json]

PYTHON is an interpreter of an environment of its own (`python3.11 -m venv trl-venv`, `trl-venv/bin/pip install torch==2.13.0 trl==1.16.0
transformers==5.19.0`); without it TRL is left out. Every variant does the same work: prompts with a chosen and a rejected completion of log-normal lengths, forward, backward, gradient clipping and an SGD
update (which keeps no state, so what is measured is the step), float32, one CPU thread.

    floor            sequences one by one, unpadded; the head on completion tokens only, in chunks of 16 MiB of logits that are
                     computed again in the backward pass; QRPO's loss, a bare loop
    floor_64mib      the same with chunks of 64 MiB, each a block that glibc maps anew
    floor_our_head   the same with `qrpo.training.head` for the head: what is left to the trainer and to padding
    ours_qrpo        QRPOTrainer, loss qrpo, reference log-probabilities from the data
    ours_dpo         QRPOTrainer, loss dpo
    plain            one padded batch, all logits, log_softmax and gather; QRPO's loss, a bare loop
    trl_default      DPOTrainer as it comes: the whole step in one padded batch, reference computed in each step
    trl_precomputed  DPOTrainer with precompute_ref_log_probs, the whole step in one padded batch
    trl_best         the same, one pair at a time by gradient accumulation, which pads least

Each variant lives in a process of its own and waits for its turn: the steps of all variants alternate. The first step of each is not
counted. All that minimise one loss must report one gradient norm. Peak memory is the process's largest resident size, libraries
included, and `step_mib` what of it came after the model was loaded.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED, BETA = 0, 0.1
FLOORS = ("floor", "floor_64mib", "floor_our_head")
VARIANTS = (*FLOORS, "ours_qrpo", "ours_dpo", "plain", "trl_default", "trl_precomputed", "trl_best")
TOKEN_BUDGET = 512
CHUNK = 2**22  # logits at a time in the floor, as in ours on a CPU: 16 MiB in float32

Step = Callable[[], float]  # runs one step, returns the gradient norm
Turn = Callable[[], None]  # waits for this variant's turn
Report = Callable[[float], None]  # ends the turn, with the gradient norm


def prompts_in_a_step(vocab_size: int) -> int:
    """Fewer where the vocabulary is large, so that TRL's step, all logits of one padded batch, fits 24 GiB of memory."""
    return 4 if vocab_size < 100_000 else 2


def make_rows(vocab_size: int) -> list[dict[str, Any]]:
    """Prompts with two completions each; token 1 ends a completion."""
    rng = np.random.default_rng(SEED)

    def ids(median: float, sigma: float, most: int) -> list[int]:
        length = int(np.clip(median * np.exp(sigma * rng.normal()), 8, most))
        return [int(token) for token in rng.integers(4, vocab_size, length)]

    return [
        {
            "prompt_id": str(place),
            "prompt_token_ids": ids(60, 0.6, 200),
            "completion_token_ids": [[*ids(100, 0.8, 400), 1] for _ in range(2)],
            "quantile_reward": [0.9, 0.2],
            "num_ref": 20,
        }
        for place in range(prompts_in_a_step(vocab_size))
    ]


def make_model(vocab_size: int) -> Any:
    """The same small Llama in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def bare_loop(model: Any, backward: Callable[[], None], turn: Turn, report: Report, steps: int) -> None:
    """Gradient, clipping and SGD update, with nothing else around them."""
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model.train()
    for _ in range(steps):
        turn()
        backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(float(norm))


def run_floor(kind: str, vocab_size: int, turn: Turn, report: Report, steps: int) -> None:
    """One sequence at a time; the head in chunks of completion tokens, recomputed in the backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from qrpo.training.head import token_logprobs

    model, rows = make_model(vocab_size), make_rows(vocab_size)
    size = (4 * CHUNK if kind == "floor_64mib" else CHUNK) // vocab_size

    def head(hidden_CD: Any, targets_C: Any) -> Any:
        logits_CV = model.lm_head(hidden_CD)
        return (logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(1)).sum()

    def logprob(prompt: list[int], completion: list[int]) -> Any:
        ids = torch.tensor([[*prompt, *completion]])
        hidden_TD = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        targets_T = torch.tensor(completion)
        if kind == "floor_our_head":
            return token_logprobs(model, hidden_TD, targets_T, CHUNK).sum()
        chunks = zip(hidden_TD.split(size), targets_T.split(size), strict=True)
        return sum(checkpoint(head, *chunk, use_reentrant=False) for chunk in chunks)

    with torch.no_grad():
        reference = [
            [float(logprob(r["prompt_token_ids"], c)) for c in r["completion_token_ids"]] for r in rows
        ]

    def backward() -> None:
        for row, ref_K in zip(rows, reference, strict=True):
            for completion, quantile, ref in zip(
                row["completion_token_ids"], row["quantile_reward"], ref_K, strict=True
            ):
                log_ratio = logprob(row["prompt_token_ids"], completion) - ref
                ((target(quantile) - BETA * log_ratio) ** 2 / (2 * len(rows))).backward()

    bare_loop(model, backward, turn, report, steps)


def run_plain(vocab_size: int, turn: Turn, report: Report, steps: int) -> None:
    """Everything in one padded batch, as a first version is written."""
    import torch

    model, rows = make_model(vocab_size), make_rows(vocab_size)
    pairs = [(row["prompt_token_ids"], ids) for row in rows for ids in row["completion_token_ids"]]
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens_BT = torch.full((len(pairs), longest), 2)
    attended_BT, mask_BT = torch.zeros_like(tokens_BT), torch.zeros(len(pairs), longest)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        tokens_BT[row, :end] = torch.tensor([*prompt, *completion])
        attended_BT[row, :end] = 1
        mask_BT[row, len(prompt) : end] = 1

    def logprobs() -> Any:
        logits_BTV = model(input_ids=tokens_BT, attention_mask=attended_BT).logits[:, :-1]
        token_BT = logits_BTV.log_softmax(-1).gather(2, tokens_BT[:, 1:, None])[..., 0]
        return (token_BT * mask_BT[:, 1:]).sum(1)

    with torch.no_grad():
        reference_B = logprobs()
    target_B = torch.tensor([target(q) for row in rows for q in row["quantile_reward"]])

    def backward() -> None:
        ((target_B - BETA * (logprobs() - reference_B)) ** 2).mean().backward()

    bare_loop(model, backward, turn, report, steps)


def target(quantile: float) -> float:
    """q - beta log Z, with the continuous partition function of the identity."""
    return quantile - BETA * (math.log(BETA) + 1 / BETA + math.log1p(-math.exp(-1 / BETA)))


def run_ours(loss: str, vocab_size: int, turn: Turn, report: Report, steps: int) -> None:
    """`QRPOTrainer`, with everything that it does around a step."""
    from qrpo import QRPOConfig, QRPOTrainer
    from qrpo.training import logprobs

    model, rows = make_model(vocab_size), make_rows(vocab_size)
    for row, scores in zip(rows, logprobs.score_logprobs(model, rows, TOKEN_BUDGET), strict=True):
        row["ref_logprob"] = scores
    with tempfile.TemporaryDirectory() as folder:
        args = QRPOConfig(
            loss=loss,
            pairs="dataset",
            beta=BETA,
            token_budget=TOKEN_BUDGET,
            per_device_train_batch_size=len(rows),
            **trainer_arguments(folder, steps),
        )
        trainer = QRPOTrainer(model, args, rows)
        train_by_turns(trainer, turn, report)


def run_trl(variant: str, vocab_size: int, turn: Turn, report: Report, steps: int) -> None:
    """TRL's `DPOTrainer`; every token is a word, so that the tokens are the same."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocab_size)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )

    def text(ids: list[int]) -> str:
        return "".join(f" w{token}" for token in ids)

    data = [
        {
            "prompt": text(row["prompt_token_ids"]),
            "chosen": text(row["completion_token_ids"][0][:-1]),
            "rejected": text(row["completion_token_ids"][1][:-1]),
        }
        for row in make_rows(vocab_size)
    ]
    pairs = 1 if variant == "trl_best" else len(data)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            beta=BETA,
            per_device_train_batch_size=pairs,
            gradient_accumulation_steps=len(data) // pairs,
            precompute_ref_log_probs=variant != "trl_default",
            precompute_ref_batch_size=1,
            gradient_checkpointing=False,
            max_length=None,
            bf16=False,
            **trainer_arguments(folder, steps),
        )
        make_model(vocab_size).save_pretrained(f"{folder}/model")  # TRL loads its reference from there
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        trainer = DPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        train_by_turns(trainer, turn, report)


def trainer_arguments(folder: str, steps: int) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "max_steps": steps,
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


def train_by_turns(trainer: Any, turn: Turn, report: Report) -> None:
    """Train; each step waits for its turn and reports when the Trainer has logged it."""
    from transformers import PrinterCallback, TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "grad_norm" in logs:
                report(float(logs["grad_norm"]))

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Turns())
    trainer.train()


def work(variant: str, vocab_size: int, steps: int) -> None:
    """A variant's process: one line of JSON when it is ready, and one after each step that it is told to do."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to stderr
    clock: dict[str, float] = {}
    taken = 0

    def turn() -> None:
        nonlocal taken
        if not taken:
            clock["loaded"] = memory("VmRSS")
            print(json.dumps({"ready": True}), file=answers)
        taken += 1
        if not sys.stdin.readline():
            raise SystemExit(1)
        clock.update(wall=time.perf_counter(), cpu=time.process_time())

    def report(norm: float) -> None:
        answer = {
            "wall": time.perf_counter() - clock["wall"],
            "cpu": time.process_time() - clock["cpu"],
            "grad_norm": norm,
            "peak_mib": memory("VmHWM"),
            "step_mib": memory("VmHWM") - clock["loaded"],
        }
        print(json.dumps(answer), file=answers)

    if variant in FLOORS:
        run_floor(variant, vocab_size, turn, report, steps)
    elif variant == "plain":
        run_plain(vocab_size, turn, report, steps)
    elif variant.startswith("ours"):
        run_ours(variant.removeprefix("ours_"), vocab_size, turn, report, steps)
    else:
        run_trl(variant, vocab_size, turn, report, steps)


def memory(field: str) -> float:
    """A size of this process in MiB, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(vocab_size: int, rounds: int, variants: list[str], trl_python: str | None) -> dict[str, Any]:
    """All variants by turns, a round at a time."""
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with contextlib.ExitStack() as stack:
        workers = {}
        for variant in variants:
            python = str(trl_python) if variant.startswith("trl") else sys.executable
            command = [python, __file__, "--work", variant, str(vocab_size), str(rounds + 1)]
            log = stack.enter_context(tempfile.TemporaryFile())
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
            stack.callback(worker.kill)
            workers[variant] = worker, log
            answer_of(variant, *workers[variant])
        for _ in range(rounds + 1):
            for variant, (worker, log) in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                samples[variant].append(answer_of(variant, worker, log))
    rows = make_rows(vocab_size)
    tokens = sum(len(r["prompt_token_ids"]) + len(c) for r in rows for c in r["completion_token_ids"])
    return {variant: summary(answers, tokens) for variant, answers in samples.items()}


def answer_of(variant: str, worker: Any, log: Any) -> dict[str, float]:
    """The next line that a variant's process says."""
    if not (line := worker.stdout.readline()):
        log.seek(0)
        raise SystemExit(f"{variant} ended:\n{log.read().decode()[-2000:]}")
    return dict(json.loads(line))


def summary(answers: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    """Medians and ranges of all steps but the first."""
    counted = answers[1:]
    cpu, wall = sorted(a["cpu"] for a in counted), sorted(a["wall"] for a in counted)
    return {
        "cpu_seconds": statistics.median(cpu),
        "cpu_seconds_range": [cpu[0], cpu[-1]],
        "wall_seconds": statistics.median(wall),
        "wall_seconds_range": [wall[0], wall[-1]],
        "tokens_per_cpu_second": tokens / statistics.median(cpu),
        "peak_mib": answers[-1]["peak_mib"],
        "step_mib": answers[-1]["step_mib"],
        "first_grad_norm": answers[0]["grad_norm"],
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl-python")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("VARIANT", "VOCAB", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], int(options.work[1]), int(options.work[2]))
        return
    variants = [name for name in options.variants if options.trl_python or not name.startswith("trl")]
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "vocabularies": {}}
    for vocab_size in options.vocab:
        measured = measure(vocab_size, options.rounds, variants, options.trl_python)
        for loss in (
            (*FLOORS, "ours_qrpo", "plain"),
            ("ours_dpo", "trl_default", "trl_precomputed", "trl_best"),
        ):
            norms = [measured[name]["first_grad_norm"] for name in loss if name in measured]
            assert np.allclose(norms, norms[:1], rtol=2e-3), f"other gradients: {norms} of {loss}"
        results["vocabularies"][str(vocab_size)] = measured
        floor = measured.get("floor", measured[variants[0]])
        print(
            f"\nvocabulary {vocab_size}\n\n| way | processor s | x floor | tokens/s | peak MiB | x floor | step MiB |"
        )
        print("|---|---|---|---|---|---|---|")
        for name, one in measured.items():
            print(
                f"| {name} | {one['cpu_seconds']:.2f} | {one['cpu_seconds'] / floor['cpu_seconds']:.2f} | "
                f"{one['tokens_per_cpu_second']:.0f} | {one['peak_mib']:.0f} | {one['peak_mib'] / floor['peak_mib']:.2f} | "
                f"{one['step_mib']:.0f} |"
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
