"""`QRPOTrainer`: quantile reward policy optimization as a `transformers.Trainer`, for anybody's data.

    trainer = QRPOTrainer(model, QRPOConfig(output_dir="policy", beta=0.1), train_dataset=rows, processing_class=tokenizer)
    trainer.train()

`CompletionTrainer` is what every loss on whole completions shares. One item of the data loader is a prompt with its K
completions. A step takes its prompts, sorts all their completions by length, and goes through them in micro-batches
under a token budget, so memory is bounded and little is padded; `per_device_train_batch_size` and
`gradient_accumulation_steps` only say how many prompts make a step. The loss of each completion is divided by the number
of completions in the whole step, on all ranks, so how a step is cut changes nothing.

What is left out: no reference model (its log-probabilities come with the data, or are computed from the initial
model once, before the first step), no evaluation loop (a policy is judged by fresh samples, another stage's work).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from qrpo.checkpoints import mark_whole
from qrpo.errors import ConfigError, DataError, TrainingError
from qrpo.logprobs import completion_logprobs, length_sorted_batches, score_logprobs
from qrpo.losses import LossType, qrpo_loss
from qrpo.partition import Partition
from qrpo.rows import StreamedRows, collate_rows, flatten_rows, take, training_rows
from qrpo.transforms import get_transform, reference_scale

__all__ = ["CompletionTrainer", "CompletionTrainingArguments", "QRPOConfig", "QRPOTrainer"]

# How far rounding alone carries the mean |log pi - log ref| at step 0, per square root of a token.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class CompletionTrainingArguments(TrainingArguments):  # type: ignore[misc]
    """`TrainingArguments` with a token budget; a batch is counted in prompts."""

    token_budget: int = field(
        default=8192,
        metadata={
            "help": "Most tokens of one forward pass, padding included. Changes memory and speed, not results."
        },
    )
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    logging_nan_inf_filter: bool = False
    save_total_limit: int | None = 2
    accelerator_config: Any = None
    data_seed: int | None = None

    def __post_init__(self) -> None:
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit={self.save_total_limit}: expected at least 2, for the older checkpoint is deleted "
                "before the newer one is known to be whole"
            )
        # Each rank reads its own rows, and their order is a function of the seed and the epoch.
        if self.accelerator_config is None:
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed


@dataclass
class QRPOConfig(CompletionTrainingArguments):
    """Arguments of `QRPOTrainer`: those of `transformers.TrainingArguments`, and the method's own."""

    beta: float = field(default=0.1, metadata={"help": "Strength of the KL penalty to the reference; > 0."})
    transform: str = field(
        default="identity",
        metadata={"help": "f, applied to the quantile reward; a name known to qrpo.transforms."},
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
        default="mse", metadata={"help": "`mse`, or another that qrpo.losses.qrpo_loss knows."}
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
    """A `transformers.Trainer` whose loss is a sum over completions, computed from their log-probabilities.

    A subclass says what a completion's loss is (`completion_losses`) and how much of the step's total it counts
    (`count_items`).
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: torch.nn.Module,
        args: CompletionTrainingArguments,
        train_dataset: Any,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if hasattr(train_dataset, "iterate"):
            train_dataset = StreamedRows(train_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_rows,
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._metrics: dict[str, tuple[float, int]] = {}  # sum over completions, and their number
        self._tokens = 0
        self._clock: float | None = None

    def completion_losses(self, logprob_B: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Loss (B,) of each completion; `batch` is flattened rows."""
        raise NotImplementedError

    def step_metrics(self, logprob_B: torch.Tensor, columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Scalars about all of a step's completions on this rank; NaN where one says nothing."""
        raise NotImplementedError

    def count_items(self, rows: Sequence[Any]) -> int:
        """By how much the summed losses of these rows are divided."""
        raise NotImplementedError

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward through the rows in micro-batches; returns this rank's share of the step's loss."""
        rows = inputs["rows"]
        self._clock = self._clock or time.perf_counter()
        if self.state.global_step == 0:
            self.before_first_step(rows)
        model.train()
        scale = self.accelerator.num_processes / float(num_items_in_batch or self.count_items(rows))
        columns = flatten_rows(rows)
        batches = length_sorted_batches(columns["length"], self.args.token_budget)
        total = torch.zeros((), device=self.args.device)
        seen_B = torch.zeros(len(columns["length"]), device=self.args.device)
        for number, indices in enumerate(batches):
            batch = take(columns, indices)
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                logprob_B = self.logprobs(model, batch)
                losses_B = self.completion_losses(logprob_B, batch)
                self._require_finite(losses_B, batch)
                loss = losses_B.sum() * scale
                self.accelerator.backward(loss)
            total += loss.detach()
            seen_B[indices] = logprob_B.detach().to(seen_B.dtype)
        with torch.no_grad():
            self._add_metrics(self.step_metrics(seen_B, columns), columns)
        return total

    def logprobs(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """log pi(y|x) (B,) of flattened rows, in the training precision."""
        inner = self.accelerator.unwrap_model(model)

        def compute(*arguments: Any) -> torch.Tensor:
            return completion_logprobs(inner, *arguments)

        with self.accelerator.autocast():
            return _through_wrapper(
                model, inner, compute, batch["prompt_token_ids"], batch["completion_token_ids"]
            )

    def before_first_step(self, rows: Sequence[Any]) -> None:
        """Called with the rows of the first step, before anything has been learned from them."""

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[Any, Any]:
        """The batches of one optimizer step, and the number of items in them on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(self.count_items(batch["rows"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, over this rank's completions, to what the Trainer reports."""
        if "loss" in logs and self._clock is not None:
            now = time.perf_counter()
            logs = logs | {name: total / weight for name, (total, weight) in self._metrics.items()}
            logs["tokens_per_second"] = self._tokens * self.accelerator.num_processes / (now - self._clock)
            self._metrics, self._tokens, self._clock = {}, 0, now
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token: forward and backward, attention's own part left out."""
        tokens = sum(flatten_rows(inputs["rows"])["length"])
        return int(6 * tokens * self.model.num_parameters(exclude_embeddings=True))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, StreamedRows):
            return torch.utils.data.SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")

    def _add_metrics(self, metrics: dict[str, torch.Tensor], columns: dict[str, Any]) -> None:
        count = len(columns["length"])
        for name, value in metrics.items():
            total, weight = self._metrics.get(name, (0.0, 0))
            if not math.isnan(scalar := value.item()):
                self._metrics[name] = total + scalar * count, weight + count
        self._tokens += sum(columns["length"])

    def _require_finite(self, losses_B: torch.Tensor, batch: dict[str, Any]) -> None:
        finite_B = torch.isfinite(losses_B.detach())
        if not finite_B.all():
            bad = sorted({str(batch["prompt_id"][i]) for i in (~finite_B).nonzero().flatten().tolist()})
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss is not finite for {len(bad)} prompts: "
                f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}. Look at their rewards and log-probabilities; "
                "if those are finite, the policy has diverged: lower the learning rate, or raise beta."
            )


class QRPOTrainer(CompletionTrainer):
    """Trains a policy towards pi*(y|x) = ref(y|x) exp(f(q)/beta) / Z (arXiv 2507.08068).

    `train_dataset` is one of
    - rows with `prompt_token_ids`, `completion_token_ids` (K token lists), `quantile_reward` (K,) and `ref_logprob` (K,):
      any map-style or iterable dataset of them, or a reader with `iterate(epoch, start)` and a length;
    - a list or `datasets.Dataset` in one of TRL's formats (see `qrpo.rows.training_rows`) with rewards: their
      quantiles are computed, and their reference log-probabilities come from `model` as it is given.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: QRPOConfig,
        train_dataset: Any,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        rows = training_rows(train_dataset, processing_class)
        if get_transform(args.transform).needs_scale and args.mean_ref_std is None:
            args.mean_ref_std = _mean_ref_std(rows)
        super().__init__(model, args, rows, processing_class, callbacks, optimizers)
        if rows is not train_dataset:
            dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            scores = score_logprobs(self.model, rows, args.token_budget, dtype=dtype)
            for row, ref_logprob_K in zip(rows, scores, strict=True):
                row["ref_logprob"] = ref_logprob_K

    def completion_losses(self, logprob_B: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """The paper's squared error of each completion (its equation 11)."""
        loss_B, _ = self._loss(logprob_B, batch)
        return loss_B

    def step_metrics(self, logprob_B: torch.Tensor, columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What `qrpo_loss` reports of (P, K) completions, with a mask where prompts have fewer than K."""
        counts = list(Counter(columns["prompt_index"]).values())
        place_PK = torch.zeros(len(counts), max(counts), dtype=torch.long, device=logprob_B.device)
        mask_PK = torch.zeros_like(place_PK, dtype=torch.bool)
        for prompt, count in enumerate(counts):
            mask_PK[prompt, :count] = True
        place_PK[mask_PK] = torch.arange(sum(counts), device=logprob_B.device)
        _, metrics = self._loss(logprob_B, columns, place_PK, mask_PK)
        return metrics | {"quantile_reward": metrics["quantile_rewards/mean"]}

    def count_items(self, rows: Sequence[Any]) -> int:
        """The number of completions."""
        return sum(len(row["completion_token_ids"]) for row in rows)

    def before_first_step(self, rows: Sequence[Any]) -> None:
        """Compare the policy with the data's reference: before the first step they are the same model."""
        columns = flatten_rows(rows)
        # The last batch holds the shortest: a quick look, within the memory that the step needs anyway.
        shown = length_sorted_batches(columns["length"], self.args.token_budget)[-1][:64]
        batch = take(columns, shown)
        self.model.eval()
        with torch.no_grad():
            logprob_B = self.logprobs(self.model, batch)
        ratio_B = (logprob_B - self._tensor(batch["ref_logprob"], logprob_B)).abs()
        tokens_B = self._tensor([len(ids) for ids in batch["completion_token_ids"]], logprob_B)
        drift = (ratio_B / tokens_B.clamp(min=1).sqrt()).mean().item()
        limit = self.args.max_initial_log_ratio
        if limit is None:
            limit = ROUNDING[self._compute_dtype()]
        mean, largest = ratio_B.mean().item(), ratio_B.max().item()
        self.log({"initial_log_ratio/mean_abs": mean, "initial_log_ratio/max_abs": largest})
        # A NaN is left to the loss, which names its prompt.
        if drift > limit:
            raise TrainingError(
                f"before the first step, log pi - log ref of {len(shown)} completions has mean {mean:.4g} and maximum "
                f"{largest:.4g} in absolute value: {drift:.4g} per square root of a token, expected at most {limit:g}. The "
                "reference log-probabilities come from other weights, another chat template or another tokenizer than "
                "the model to be trained. Compute them again from this model, or raise max_initial_log_ratio."
            )

    def _compute_dtype(self) -> torch.dtype:
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        dtype: torch.dtype = self.model.dtype
        return dtype if dtype in ROUNDING else torch.float32

    def _loss(
        self,
        logprob_B: torch.Tensor,
        batch: dict[str, Any],
        place: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`qrpo_loss` of completions (B,), or of the completions at these places, in their shape."""

        def column(name: str) -> torch.Tensor | None:
            if name not in batch:
                return None
            values_B = self._tensor(batch[name], logprob_B)
            return values_B if place is None else values_B[place]

        ref_logprob, quantile_reward = column("ref_logprob"), column("quantile_reward")
        if ref_logprob is None or quantile_reward is None:
            raise DataError(
                "training rows have no `ref_logprob` or no `quantile_reward`, expected both beside the token ids"
            )
        args: QRPOConfig = self.args
        ref_std = column("ref_std") if get_transform(args.transform).needs_scale else None
        return qrpo_loss(
            logprob_B if place is None else logprob_B[place],
            ref_logprob,
            quantile_reward,
            args.beta,
            transform=args.transform,
            partition=args.partition,
            num_ref=column("num_ref"),
            scale=None if ref_std is None else reference_scale(ref_std, args.mean_ref_std or 0.0),
            mask=mask,
            loss_type=args.loss_type,
        )

    @staticmethod
    def _tensor(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.float64), dtype=like.dtype, device=like.device)


def _mean_ref_std(rows: Any) -> float:
    if not isinstance(rows, Sequence):
        raise ConfigError(
            "mean_ref_std is not set, and the rows are streamed: expected the mean of their `ref_std`, by which the "
            "transform scales each prompt"
        )
    return float(np.mean([row["ref_std"] for row in rows]))


def _through_wrapper(
    model: torch.nn.Module, inner: torch.nn.Module, compute: Callable[..., torch.Tensor], *arguments: Any
) -> torch.Tensor:
    """Call `compute` inside the forward of what wraps `inner` (DDP, FSDP), whose hooks gather and reduce there."""
    if inner is model:
        return compute(*arguments)

    def forward(*forwarded: Any) -> torch.Tensor:
        restore()
        return compute(*forwarded)

    def restore() -> None:
        if own is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = own

    own = inner.__dict__.get("forward")
    inner.forward = forward
    try:
        result: torch.Tensor = model(*arguments)
    finally:
        restore()
    return result
