"""`QRPOTrainer`: quantile reward policy optimization as a `transformers.Trainer`, for any dataset.

    config = QRPOConfig(output_dir="policy", beta=0.1)
    trainer = QRPOTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()

`CompletionTrainer` is what all losses on whole completions share. One item of the data loader is a
prompt with its K completions. A step reads its prompts, selects the completions that its loss uses
(`qrpo.training.objectives`), sorts them by length, and runs them in micro-batches under a token
budget. So memory is bounded and little is padded; `per_device_train_batch_size` and
`gradient_accumulation_steps` only set the number of prompts in a step. Each term of the loss is
divided by the number of terms in the whole step, on all ranks, so the micro-batches do not change
the result.

There is no reference model: its log-probabilities come with the data, or are computed from the
initial model before the first step. There is no sampling: evaluation here is the loss on held-out
rows.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from qrpo.errors import ConfigError, DataError
from qrpo.method.transforms import get_transform
from qrpo.training.adapters import adapters_off
from qrpo.training.batches import Layout, cut_batches, saved_tokens
from qrpo.training.callbacks import EarlyStopping, StepGuard, mean_loss
from qrpo.training.checkpoints import UNFINISHED, commit_checkpoint, write_error
from qrpo.training.checks import ROUNDING, check_model, check_reference
from qrpo.training.compiling import MIN_STEPS, compile_layers
from qrpo.training.head import choose_head, inside_forward
from qrpo.training.loader import ShuffledRows, is_idle, step_loader
from qrpo.training.logprobs import best_layout, completion_logprobs, score_logprobs, set_layout, unwrapped
from qrpo.training.memory import default_token_budget, device_bytes, needs_checkpointing
from qrpo.training.objectives import Objective, make_objective
from qrpo.training.packing import attention_window
from qrpo.training.rows import (
    PER_COMPLETION,
    collate_rows,
    flatten_rows,
    merge_columns,
    select_completions,
    take,
    training_rows,
)
from qrpo.training.sharding import ShardingTrainer, reshard
from qrpo.training.throughput import Meter
from qrpo.training.trainer_arguments import CompletionTrainingArguments, QRPOConfig


class CompletionTrainer(ShardingTrainer):
    """A `transformers.Trainer` that minimises an objective of completions' log-probabilities."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: torch.nn.Module,
        args: CompletionTrainingArguments,
        train_dataset: Any,
        objective: Objective,
        **options: Any,
    ) -> None:
        """`options` are further arguments of `transformers.Trainer`, such as `eval_dataset`."""
        check_model(model, args.learning_rate, args.weights == "bfloat16")
        super().__init__(
            model=model, args=args, data_collator=collate_rows, train_dataset=train_dataset, **options
        )
        self.objective = objective
        self.guard = StepGuard(self, args.bad_step, args.max_loss_growth)
        self.add_callback(self.guard)
        self.around_save: Callable[[], AbstractContextManager[None]] = nullcontext
        self._saving = False
        # For each batch since the last log: (log-probabilities, columns) of this rank, None without
        # rows.
        self._seen: list[tuple[torch.Tensor, dict[str, Any]] | None] = []
        self._layout = self._try_model()
        args.token_budget = args.token_budget or default_token_budget(device_bytes(args.device))
        if args.gradient_checkpointing == "auto":
            shards = args.world_size if self.is_fsdp_enabled else 1
            args.gradient_checkpointing = needs_checkpointing(
                self.model, args.token_budget, args.device, shards
            )
        if self._compiles():
            with self.accelerator.autocast():
                compile_layers(self.model, self._layout, probe=not self.is_fsdp_enabled)
        self._meter = Meter(self.model, self.compute_dtype())

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward through the rows in micro-batches; returns this rank's share of the
        step's loss."""
        objective, rows = self.objective, inputs["rows"]
        self._meter.start(self.state.global_step)
        if self.state.global_step == 0:
            self.before_first_step(rows or inputs["placeholder"])
        model.train()
        scale = self.accelerator.num_processes / float(num_items_in_batch or objective.count(rows) or 1)
        # A rank without rows computes one completion with weight 0: the other ranks wait for its
        # gradients.
        empty = not rows
        columns = flatten_rows(inputs["placeholder"] if empty else rows)
        micro_batches, layout = self._micro_batches(columns, 1 if empty else objective.group)
        number = self._largest_over_ranks(len(micro_batches))
        total = torch.zeros((), device=self.args.device)
        seen_B = torch.zeros(len(columns["length"]), device=self.args.device)
        for position in range(number):
            # Beyond its own micro-batches a rank repeats its last one with weight 0.
            repeated = position >= len(micro_batches)
            indices = micro_batches[-1 if repeated else position]
            batch = take(columns, indices)
            with self.accelerator.no_sync(model) if position < number - 1 else nullcontext():
                logprob_B = self.logprobs(model, batch, layout)
                losses_U = 0 * logprob_B if empty or repeated else objective.loss(logprob_B, batch)
                loss = losses_U.sum() * scale
                self.accelerator.backward(loss)
            self.guard.note_terms(losses_U, batch["prompt_id"])
            total += loss.detach()
            seen_B[indices] = logprob_B.detach().to(seen_B.dtype)
        self.guard.note_loss(total)
        if self.args.logging_strategy != "no":
            self._seen.append(None if empty else (seen_B.cpu(), _without_tokens(columns, layout)))
        return total

    def logprobs(
        self, model: torch.nn.Module, batch: dict[str, Any], layout: Layout = "padded"
    ) -> torch.Tensor:
        """log pi(y|x) (B,) of flattened rows, in the training precision."""
        inner = self.accelerator.unwrap_model(model)
        compute = partial(completion_logprobs, inner, layout=layout)
        with self.accelerator.autocast():
            return inside_forward(
                model, inner, compute, batch["prompt_token_ids"], batch["completion_token_ids"]
            )

    def score(self, model: torch.nn.Module, columns: dict[str, Any]) -> torch.Tensor:
        """log pi(y|x) (B,) of flattened rows in the training precision, without gradients. The
        ranks of a sharded model must call it with the same rows."""
        training = model.training
        model.eval()
        with torch.no_grad():
            batches, layout = self._micro_batches(columns, 1)
            parts = [self.logprobs(model, take(columns, indices), layout) for indices in batches]
        model.train(training)
        reshard(model)
        order = torch.tensor([index for indices in batches for index in indices])
        return torch.cat(parts)[order.argsort()]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's mean loss and metrics on held-out rows. Every process computes all rows,
        so that all agree."""
        rows = self.objective.select(self._usable(list(eval_dataset or self.eval_dataset)), 0)
        if not rows:
            raise DataError("no held-out row has completions for this loss")
        columns = flatten_rows(rows)
        logprob_B = self.score(self.model_wrapped, columns)
        found = self.objective.metrics(logprob_B, columns)
        found["loss"] = self.objective.loss(logprob_B, columns).double().sum() / self.objective.count(rows)
        metrics = {f"{metric_key_prefix}_{name}": value.item() for name, value in found.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def before_first_step(self, rows: Sequence[Any]) -> None:
        """Called with the rows of the first step, before the weights change."""

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[Any, Any]:
        """The batches of one optimizer step with the selected completions, and the number of loss
        terms on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        for batch in batches:
            rows = batch["rows"]
            batch["placeholder"] = [_placeholder(rows)]
            batch["rows"] = [] if is_idle(rows) else self.objective.select(self._usable(rows), step)
        count = torch.tensor(sum(self.objective.count(batch["rows"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(count, "sum").clamp(min=1)

    def _run_epoch(self, **arguments: Any) -> None:
        """Take no step after the last one.

        `transformers` would, where a training that has finished is resumed and its epoch has not.
        """
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**arguments)
        else:
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means since the last log, over the completions of all ranks, to what the Trainer
        reports. All ranks must call it."""
        if "loss" in logs:
            logs = logs | self._means_since_last_log()
            logs |= self._meter.read(
                self.state.global_step, self.state.max_steps, self.accelerator.num_processes
            )
        if "train_loss" in logs:  # the Trainer's own is over the steps since the last continuation
            logs["train_loss"] = mean_loss(self.state.log_history)
        super().log(logs, start_time)

    def _means_since_last_log(self) -> dict[str, float]:
        ranks, self._seen = gather_object([self._seen]), []
        sums: dict[str, tuple[float, int]] = {}
        for of_ranks in zip(*ranks, strict=True):
            if not (parts := [part for part in of_ranks if part is not None]):
                continue
            columns = merge_columns([columns for _, columns in parts])
            found = self.objective.metrics(torch.cat([logprob_B for logprob_B, _ in parts]), columns)
            count = len(columns["length"])
            for name, value in found.items():
                total, weight = sums.get(name, (0.0, 0))
                if not math.isnan(scalar := value.item()):
                    sums[name] = total + scalar * count, weight + count
            completion_tokens = sum(map(len, columns["completion_token_ids"]))
            counts = sum(columns["length"]), completion_tokens, sum(columns["saved"])
            self._meter.add(*(number / len(ranks) for number in counts))
        return {name: total / weight for name, (total, weight) in sums.items()}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per parameter and token (forward and backward), without attention's own."""
        rows = inputs["rows"]
        tokens = sum(flatten_rows(rows)["length"]) if rows else 0
        return int(6 * tokens * self.model.num_parameters(exclude_embeddings=True))

    def compute_dtype(self) -> torch.dtype:
        """Precision of the matrix products."""
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        dtype: torch.dtype = self.model.dtype
        return dtype if dtype in ROUNDING else torch.float32

    def _micro_batches(self, columns: dict[str, Any], group: int) -> tuple[list[list[int]], Layout]:
        """Indices into the columns, one list per forward pass within the token budget, `group`
        neighbours together; and the layout of the passes."""
        prompts, completions = columns["prompt_token_ids"], columns["completion_token_ids"]
        window = attention_window(self.model)
        return cut_batches(prompts, completions, self.args.token_budget, self._layout, group, window)

    def _try_model(self) -> Any:
        """How to compute the model's logits (`choose_head`) and its rows' layout. Rank 0 tries,
        since only it has the weights of a model that will be sharded."""
        inner, found = unwrapped(self.model), None
        args = self.args
        on_cuda = args.device.type == "cuda"
        # The kernel for packed rows has no float32, and sharing was not measured to pay on CUDA.
        packs = args.packing and not (on_cuda and self.compute_dtype() == torch.float32)
        if self.accelerator.is_main_process:
            head = choose_head(inner)
            found = head, best_layout(self.model, args.share_prompts and not on_cuda) if packs else "padded"
        head, layout = broadcast_object_list([found])[0]
        choose_head(inner, head)
        set_layout(inner, layout)
        return layout

    def _compiles(self) -> bool:
        """Whether to compile the layers: as set, else on CUDA in a run that is long enough."""
        args, dataset = self.args, self.train_dataset
        if args.compile_layers is not None or args.device.type != "cuda":
            return bool(args.compile_layers)
        steps = args.max_steps
        if steps <= 0 and hasattr(dataset, "__len__"):
            steps = args.num_train_epochs * len(dataset) / (args.train_batch_size * args.world_size)
        return bool(steps >= MIN_STEPS)

    def _usable(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The rows that have completions; DataError if a column that the loss needs is missing."""
        rows = [row for row in rows if len(row["completion_token_ids"])]
        for row in rows:
            if missing := [name for name in self.objective.needs if row.get(name) is None]:
                raise DataError(
                    f"prompt {row.get('prompt_id')}: its row has no {', '.join(f'`{name}`' for name in missing)}, which the "
                    f"loss needs in addition to the token ids; it has {', '.join(row)}"
                )
        return rows

    def get_train_dataloader(self) -> Any:
        """This process's rows, in an order that depends on the seed and the epoch; an iterable
        dataset in its own order."""
        args, reader = self.args, self.train_dataset
        if not hasattr(reader, "iterate") and not isinstance(reader, torch.utils.data.IterableDataset):
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
        """Write a checkpoint to a temporary folder, then rename it; raises TrainingError if it
        cannot be written."""
        args, state, folder, best = self.args, self.state, Path(self._get_output_dir(trial)), None
        with self.around_save() if args.should_save else nullcontext():
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
                if state.best_global_step:  # the Trainer noted the temporary folder
                    best = folder / f"checkpoint-{state.best_global_step}"
                    state.best_model_checkpoint = str(best)
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    written = folder / UNFINISHED / f"checkpoint-{state.global_step}"
                    state.save_to_json(str(written / "trainer_state.json"))
                    commit_checkpoint(folder, state.global_step, keep=args.save_total_limit, keep_also=best)
            except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
                raise write_error(f"the checkpoint of step {state.global_step}", folder, error) from error
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

    def _largest_over_ranks(self, number: int) -> int:
        """The maximum of `number` over all ranks. A sharded model gathers its weights in every
        forward, so all ranks must run equally many."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.args.device)).max())


class QRPOTrainer(CompletionTrainer):
    """Trains a policy towards pi*(y|x) = ref(y|x) exp(f(q)/beta) / Z (arXiv 2507.08068), or with
    another loss (`args.loss`).

    `train_dataset` is one of
    - rows with `prompt_token_ids`, `completion_token_ids` (K token lists) and what the loss needs:
      for QRPO `quantile_reward` (K,) and `ref_logprob` (K,). Any map-style or iterable dataset of
      them, or a reader with `iterate(epoch, start)` and a length;
    - a list or `datasets.Dataset` in one of TRL's formats (see `qrpo.training.rows.training_rows`):
      quantiles are computed from the rewards, and reference log-probabilities from `model` as it is
      given, or from its base if it is a PEFT model. `eval_dataset` is of the same kind, in memory;
      with `eval_strategy` its mean loss is logged as `eval_loss`.
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
        objective = make_objective(args, args.seed)
        rows, eval_rows = (
            given if given is None else training_rows(given, processing_class, objective.needs)
            for given in (train_dataset, eval_dataset)
        )
        scaled = "quantile_reward" in objective.needs and get_transform(args.transform).needs_scale
        if scaled and args.mean_ref_std is None:
            args.mean_ref_std = _mean_ref_std(rows)
        options = {"processing_class": processing_class, "callbacks": callbacks, "optimizers": optimizers}
        super().__init__(model, args, rows, objective, eval_dataset=eval_rows, **options)
        if args.patience is not None:
            self.add_callback(EarlyStopping(args.patience))
        for given, encoded in ((train_dataset, rows), (eval_dataset, eval_rows)):
            if encoded is not given and "ref_logprob" in objective.needs:
                self._add_reference(encoded)

    def _add_reference(self, rows: Any) -> None:
        args = self.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        with adapters_off(self.model):
            scores = score_logprobs(self.model, rows, args.token_budget, dtype=dtype, layout=self._layout)
            for row, ref_logprob_K in zip(rows, scores, strict=True):
                row["ref_logprob"] = ref_logprob_K

    def before_first_step(self, rows: Sequence[Any]) -> None:
        """Compare the policy with the data's reference: before the first step they are the same
        model."""
        if "ref_logprob" not in rows[0]:
            return
        limit = self.args.max_initial_log_ratio
        mean, largest = check_reference(
            rows,
            partial(self.score, self.model),
            limit=ROUNDING[self.compute_dtype()] if limit is None else limit,
            token_budget=self.args.token_budget,
            vocab_size=self.model.config.get_text_config().vocab_size,
            tokenizer=self.processing_class,
        )
        ranks = np.array(gather_object([(mean, largest)]))
        known = ranks[~np.isnan(ranks[:, 0])] if not np.isnan(ranks).all() else ranks
        self.log(
            {"initial_log_ratio/mean_abs": known[:, 0].mean(), "initial_log_ratio/max_abs": known[:, 1].max()}
        )


def _placeholder(rows: Sequence[Any]) -> dict[str, Any]:
    """A row with one completion, for a rank that has none to train on."""
    for row in rows:
        if len(row["completion_token_ids"]):
            return select_completions(row, [0])
    unknown = {name: [math.nan] for name in PER_COMPLETION if name in rows[0]}
    return {**rows[0], **unknown, "completion_token_ids": [[0]]}


def _without_tokens(columns: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """What metrics need of the columns: lengths in place of tokens."""
    prompts, completions = columns["prompt_token_ids"], columns["completion_token_ids"]
    rest = {name: column for name, column in columns.items() if name not in ("prompt_token_ids", "prompt_id")}
    saved = [saved_tokens(prompts) if layout == "shared" else 0]
    return {**rest, "completion_token_ids": [range(len(ids)) for ids in completions], "saved": saved}


def _mean_ref_std(rows: Any) -> float:
    if not isinstance(rows, Sequence):
        raise ConfigError(
            "mean_ref_std is not set, and the rows are streamed: set it to the mean of their `ref_std`, which the transform "
            "divides each prompt's by"
        )
    return float(np.mean([row["ref_std"] for row in rows]))
