"""`QRPOTrainer`: quantile reward policy optimization as a `transformers.Trainer`, for anybody's data.

    trainer = QRPOTrainer(model, QRPOConfig(output_dir="policy", beta=0.1), train_dataset=rows, processing_class=tokenizer)
    trainer.train()

`CompletionTrainer` is what every loss on whole completions shares. One item of the data loader is a prompt with its K
completions. A step takes its prompts, keeps the completions that its loss is about (`qrpo.training.objectives`), sorts them by length, and
goes through them in micro-batches under a token budget, so memory is bounded and little is padded;
`per_device_train_batch_size` and `gradient_accumulation_steps` only say how many prompts make a step. Each term of the
loss is divided by the number of terms in the whole step, on all ranks, so how a step is cut changes nothing.

What is left out: no reference model (its log-probabilities come with the data, or are computed from the initial
model once, before the first step), no sampling (evaluation here is the loss on held-out rows; a policy is judged by fresh
samples, another stage's work).
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments

from qrpo.errors import ConfigError, DataError
from qrpo.method.losses import LossType, PairChoice
from qrpo.method.partition import Partition
from qrpo.method.transforms import get_transform
from qrpo.training.adapters import adapters_off
from qrpo.training.batches import length_sorted_batches
from qrpo.training.checkpoints import UNFINISHED, commit_checkpoint, unwritten
from qrpo.training.early_stop import EarlyStop
from qrpo.training.guard import BadStep, StepGuard
from qrpo.training.initial_check import ROUNDING, check_reference
from qrpo.training.loader import ShuffledRows, is_idle, step_loader
from qrpo.training.logprobs import completion_logprobs, inside_forward, score_logprobs
from qrpo.training.objectives import Objective, make_objective, narrowed
from qrpo.training.rows import collate_rows, flatten_rows, take, training_rows
from qrpo.training.sharing import can_share, saved_tokens, shared_batches, worth_sharing
from qrpo.training.throughput import Meter

__all__ = ["CompletionTrainer", "CompletionTrainingArguments", "QRPOConfig", "QRPOTrainer"]


@dataclass
class CompletionTrainingArguments(TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` with a token budget; a batch is counted in prompts."""

    token_budget: int = field(
        default=8192,
        metadata={
            "help": "Most tokens of one forward pass, padding included. Changes memory and speed, not results."
        },
    )
    share_prompts: bool = field(
        default=True,
        metadata={
            "help": "Compute a prompt once for all its completions, where the model then gives the same log-probabilities and "
            "a tenth of the tokens is saved; see qrpo.training.sharing."
        },
    )
    bad_step: BadStep = field(
        default="stop",
        metadata={
            "help": "What to do about a step whose loss or gradient is not finite, or whose loss has exploded: `stop`, naming "
            "the prompts, or `skip` it, leaving the weights as they were."
        },
    )
    max_loss_growth: float = field(
        default=1000.0,
        metadata={
            "help": "A loss this many times the largest of the first 10 logged has exploded. `inf`: never."
        },
    )
    patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations in a row without a lower `eval_loss`, and go back to the weights that had the "
            "lowest. None: never."
        },
    )
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    logging_nan_inf_filter: bool = False
    save_total_limit: int | None = 2
    ddp_find_unused_parameters: bool | None = False
    accelerator_config: Any = None
    data_seed: int | None = None

    def __post_init__(self) -> None:
        # Each rank reads its own rows, and their order is a function of the seed and the epoch.
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        if self.patience is not None:
            self.metric_for_best_model, self.greater_is_better = "eval_loss", False
        super().__post_init__()
        # Set here, past a check that save_steps fit eval_steps: the trainer saves whenever an evaluation is the best so far.
        if self.patience is not None:
            self.load_best_model_at_end = True
        if self.data_seed is None:
            self.data_seed = self.seed


@dataclass
class QRPOConfig(CompletionTrainingArguments):
    """Arguments of `QRPOTrainer`: those of `transformers.TrainingArguments`, and the method's own."""

    loss: Literal["qrpo", "dpo", "rebel", "simpo", "sft"] = field(
        default="qrpo", metadata={"help": "The objective; see qrpo.training.objectives."}
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "Strength of the KL penalty to the reference, > 0; for simpo the scale of its rewards."
        },
    )
    transform: str = field(
        default="identity",
        metadata={"help": "f, applied to the quantile reward; a name known to qrpo.method.transforms."},
    )
    partition: Partition = field(
        default="continuous",
        metadata={
            "help": "Z's measure: `continuous` (q uniform on [0, 1]) or `finite` (on the num_ref + 1 values)."
        },
    )
    mean_ref_std: float | None = field(
        default=None,
        metadata={
            "help": "Mean over all prompts of `ref_std`, for transforms that are scaled per prompt. None: taken from the "
            "rows, where they are in memory."
        },
    )
    loss_type: LossType = field(
        default="mse", metadata={"help": "`mse`, or another that qrpo.method.losses.qrpo_loss knows."}
    )
    pairs: PairChoice = field(
        default="best-worst",
        metadata={
            "help": "Which completions are chosen and rejected, for losses on pairs; sft learns the chosen one."
        },
    )
    rebel_reward: Literal["reward", "quantile_reward"] = field(
        default="reward",
        metadata={
            "help": "What rebel regresses differences of: the reward, or the transformed quantile reward."
        },
    )
    gamma_beta_ratio: float = field(
        default=0.5, metadata={"help": "The target margin of simpo, as a share of beta."}
    )
    max_initial_log_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Before the first step, mean |log pi - log ref| per square root of a token may not exceed this. "
            "None: what rounding explains in the training dtype. `inf` turns the check off."
        },
    )
    learning_rate: float = 1e-6


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` that minimises an objective on completions, computed from their log-probabilities."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: torch.nn.Module,
        args: CompletionTrainingArguments,
        train_dataset: Any,
        objective: Objective,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        eval_dataset: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.objective = objective
        self.guard = StepGuard(self, args.bad_step, args.max_loss_growth)
        self.add_callback(self.guard)
        self._saving = False
        if args.patience is not None:
            self.add_callback(EarlyStop(args.patience))
        self._metrics: dict[str, tuple[float, int]] = {}  # sum over completions, and their number
        self._can_share = args.share_prompts and can_share(self.model)
        self._meter = Meter(self.model, self.compute_dtype())

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward through the rows in micro-batches; returns this rank's share of the step's loss."""
        objective, rows = self.objective, inputs["rows"]
        self._meter.start(self.state.global_step)
        if self.state.global_step == 0:
            self.before_first_step(rows or inputs["spare"])
        model.train()
        scale = self.accelerator.num_processes / float(num_items_in_batch or objective.count(rows) or 1)
        # A rank without any term takes part all the same, with a weight of 0: the others wait for its gradients.
        idle = not rows
        columns = flatten_rows(inputs["spare"] if idle else rows)
        cut, share = self._micro_batches(columns, 1 if idle else objective.group)
        batches = self._as_many_on_all_ranks(cut)
        total = torch.zeros((), device=self.args.device)
        seen_B = torch.zeros(len(columns["length"]), device=self.args.device)
        for number, (indices, repeated) in enumerate(batches):
            batch = take(columns, indices)
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                logprob_B = self.logprobs(model, batch, share)
                losses_U = 0 * logprob_B if idle or repeated else objective.loss(logprob_B, batch)
                loss = losses_U.sum() * scale
                self.accelerator.backward(loss)
            self.guard.note_terms(losses_U, batch["prompt_id"])
            total += loss.detach()
            seen_B[indices] = logprob_B.detach().to(seen_B.dtype)
        self.guard.note_loss(total)
        if not idle:
            with torch.no_grad():
                self._add_metrics(objective.metrics(seen_B, columns), columns, share)
        return total

    def logprobs(
        self, model: torch.nn.Module, batch: dict[str, Any], share_prompts: bool = False
    ) -> torch.Tensor:
        """log pi(y|x) (B,) of flattened rows, in the training precision."""
        inner = self.accelerator.unwrap_model(model)
        compute = partial(completion_logprobs, inner, share_prompts=share_prompts)
        with self.accelerator.autocast():
            return inside_forward(
                model, inner, compute, batch["prompt_token_ids"], batch["completion_token_ids"]
            )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's mean loss and metrics on held-out rows. Every process computes all of them, so that all agree."""
        rows = self.objective.select(self._usable(list(eval_dataset or self.eval_dataset)), 0)
        if not rows:
            raise DataError("no held-out row has completions for this loss")
        columns = flatten_rows(rows)
        total, seen_B = 0.0, torch.zeros(len(columns["length"]), device=self.args.device)
        self.model.eval()
        with torch.no_grad():
            batches, share = self._micro_batches(columns, self.objective.group)
            for indices in batches:
                batch = take(columns, indices)
                logprob_B = self.logprobs(self.model_wrapped, batch, share)
                total += self.objective.loss(logprob_B, batch).sum().item()
                seen_B[indices] = logprob_B.to(seen_B.dtype)
            found = self.objective.metrics(seen_B, columns)
        metrics = {f"{metric_key_prefix}_{name}": value.item() for name, value in found.items()}
        metrics[f"{metric_key_prefix}_loss"] = total / self.objective.count(rows)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def before_first_step(self, rows: Sequence[Any]) -> None:
        """Called with the rows of the first step, before anything has been learned from them."""

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[Any, Any]:
        """The batches of one optimizer step with the completions to train on, and the number of terms on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        batches = [
            {
                "rows": []
                if is_idle(batch["rows"])
                else self.objective.select(self._usable(batch["rows"]), step),
                "spare": [narrowed(row, [0]) for row in batch["rows"][:1]],
            }
            for batch in batches
        ]
        count = torch.tensor(sum(self.objective.count(batch["rows"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, over this rank's completions, to what the Trainer reports."""
        if "loss" in logs:
            logs = logs | {name: total / weight for name, (total, weight) in self._metrics.items()}
            logs |= self._meter.read(
                self.state.global_step, self.state.max_steps, self.accelerator.num_processes
            )
            self._metrics = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token: forward and backward, attention's own part left out."""
        rows = inputs["rows"]
        tokens = sum(flatten_rows(rows)["length"]) if rows else 0
        return int(6 * tokens * self.model.num_parameters(exclude_embeddings=True))

    def compute_dtype(self) -> torch.dtype:
        """Precision of the matrix products."""
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        dtype: torch.dtype = self.model.dtype
        return dtype if dtype in ROUNDING else torch.float32

    def _micro_batches(self, columns: dict[str, Any], group: int) -> tuple[list[list[int]], bool]:
        """Places in the columns, cut into forward passes within the token budget, a group of completions together; and whether
        those of a prompt share its forward."""
        prompts, completions = columns["prompt_token_ids"], columns["completion_token_ids"]
        if self._can_share and worth_sharing(prompts, completions):
            return shared_batches(prompts, completions, self.args.token_budget, group), True
        longest = [max(columns["length"][start : start + group]) for start in range(0, len(prompts), group)]
        units = length_sorted_batches(longest, max(1, self.args.token_budget // group))
        return [[unit * group + place for unit in batch for place in range(group)] for batch in units], False

    def _usable(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The rows; DataError where a column that the loss needs is missing."""
        for row in rows:
            if missing := [name for name in self.objective.needs if row.get(name) is None]:
                raise DataError(
                    f"prompt {row.get('prompt_id')}: its row has no {', '.join(f'`{name}`' for name in missing)}, which the "
                    f"loss needs beside the token ids; it has {', '.join(row)}"
                )
        return rows

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does, and FSDP on CPUs: torch shards there, but accelerate only asks it to on accelerators."""
        if self.args.fsdp and self.args.use_cpu and self.args.world_size > 1:
            PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def get_train_dataloader(self) -> Any:
        """This process's rows in an order that the seed and the epoch decide; an iterable dataset in its own order."""
        args, reader = self.args, self.train_dataset
        if isinstance(reader, torch.utils.data.IterableDataset):
            return super().get_train_dataloader()
        if not hasattr(reader, "iterate"):
            reader = ShuffledRows(reader, args.data_seed)
        return step_loader(
            reader,
            self._train_batch_size,
            args.process_index,
            args.world_size,
            drop_last=args.dataloader_drop_last,
        )

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self._saving else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, then name it; raises TrainingError where it cannot be written."""
        state, folder = self.state, Path(self._get_output_dir(trial))
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            best = None
            if state.best_global_step:  # the Trainer noted where it is written now, not where it will be
                best = folder / f"checkpoint-{state.best_global_step}"
                state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = folder / UNFINISHED / f"checkpoint-{state.global_step}"
                if best is not None:
                    state.save_to_json(str(written / "trainer_state.json"))
                commit_checkpoint(folder, state.global_step, keep=self.args.save_total_limit, also=best)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise unwritten(f"the checkpoint of step {state.global_step}", folder, error) from error
        finally:
            self._saving = False

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best: bool = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.guard.grad_norm = norm
        return norm

    def _as_many_on_all_ranks(self, batches: list[list[int]]) -> list[tuple[list[int], bool]]:
        """The micro-batches, and whether each only repeats the last and counts for nothing. A sharded model gathers its weights in
        each forward, so all ranks need the same number of them."""
        most = len(batches)
        if self.accelerator.num_processes > 1:
            number = torch.tensor([most], device=self.args.device)
            most = int(self.accelerator.gather(number).max())
        return [(batch, False) for batch in batches] + [(batches[-1], True)] * (most - len(batches))

    def _add_metrics(self, metrics: dict[str, torch.Tensor], columns: dict[str, Any], share: bool) -> None:
        count = len(columns["length"])
        for name, value in metrics.items():
            total, weight = self._metrics.get(name, (0.0, 0))
            if not math.isnan(scalar := value.item()):
                self._metrics[name] = total + scalar * count, weight + count
        saved = saved_tokens(columns["prompt_token_ids"]) if share else 0
        self._meter.add(sum(columns["length"]), sum(map(len, columns["completion_token_ids"])), saved)


class QRPOTrainer(CompletionTrainer):
    """Trains a policy towards pi*(y|x) = ref(y|x) exp(f(q)/beta) / Z (arXiv 2507.08068), or by `args.loss` another way.

    `train_dataset` is one of
    - rows with `prompt_token_ids`, `completion_token_ids` (K token lists) and what the loss needs: for QRPO
      `quantile_reward` (K,) and `ref_logprob` (K,). Any map-style or iterable dataset of them, or a reader with
      `iterate(epoch, start)` and a length;
    - a list or `datasets.Dataset` in one of TRL's formats (see `qrpo.training.rows.training_rows`): quantiles are computed from the
      rewards, and reference log-probabilities come from `model` as it is given; from its base, with the adapters off,
      where it is a PEFT model.
    `eval_dataset` is of the same kind, in memory; with `eval_strategy` its mean loss is logged as `eval_loss`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: QRPOConfig,
        train_dataset: Any,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        eval_dataset: Any = None,
    ) -> None:
        objective = make_objective(args)
        rows = training_rows(train_dataset, processing_class, objective.needs)
        eval_rows = (
            None if eval_dataset is None else training_rows(eval_dataset, processing_class, objective.needs)
        )
        scaled = "quantile_reward" in objective.needs and get_transform(args.transform).needs_scale
        if scaled and args.mean_ref_std is None:
            args.mean_ref_std = _mean_ref_std(rows)
        super().__init__(model, args, rows, objective, processing_class, callbacks, optimizers, eval_rows)
        for given, encoded in ((train_dataset, rows), (eval_dataset, eval_rows)):
            if encoded is not given and "ref_logprob" in objective.needs:
                self._add_reference(encoded)

    def _add_reference(self, rows: Any) -> None:
        args = self.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        with adapters_off(self.model):
            scores = score_logprobs(
                self.model, rows, args.token_budget, dtype=dtype, share_prompts=self._can_share
            )
            for row, ref_logprob_K in zip(rows, scores, strict=True):
                row["ref_logprob"] = ref_logprob_K

    def before_first_step(self, rows: Sequence[Any]) -> None:
        """Compare the policy with the data's reference: before the first step they are the same model."""
        if rows and "ref_logprob" in rows[0]:
            check_reference(self, rows)


def _mean_ref_std(rows: Any) -> float:
    if not isinstance(rows, Sequence):
        raise ConfigError(
            "mean_ref_std is not set, and the rows are streamed: expected the mean of their `ref_std`, by which the "
            "transform scales each prompt"
        )
    return float(np.mean([row["ref_std"] for row in rows]))
