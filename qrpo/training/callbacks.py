"""Callbacks of the trainers: stop or skip a step that went wrong, and stop early.

A step is bad if its loss or its gradient norm is not finite, or if the loss is `max_loss_growth`
times the largest of the first logged losses. It is checked after the gradients are reduced and
before the optimizer uses them. So all processes check the same numbers, and a bad step never
changes the weights.
"""

import logging
import math
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from qrpo.errors import TrainingError

log = logging.getLogger("qrpo")

FIRST_LOSSES = 10
"""Logged losses before growth is checked: the first steps say little about the loss's scale."""
_NAMED = 5


class StepGuard(TrainerCallback):  # type: ignore[misc]
    """Collects the losses of a step from the trainer, and stops the run or drops the gradients if
    the step is bad."""

    def __init__(
        self, trainer: Trainer, bad_step: Literal["stop", "skip"], max_loss_growth: float | None
    ) -> None:
        self._trainer = trainer
        self._bad_step = bad_step
        self._max_loss_growth = math.inf if max_loss_growth is None else max_loss_growth
        self._clear()

    def _clear(self) -> None:
        self.grad_norm: float | torch.Tensor | None = None
        self._loss: torch.Tensor | float = 0.0
        self._seen: list[tuple[torch.Tensor, list[str]]] = []

    def note_terms(self, losses_U: torch.Tensor, prompt_ids: list[str]) -> None:
        """Note the loss of each term of a micro-batch; `prompt_ids` has one entry per completion,
        equally many per term."""
        self._seen.append((losses_U.detach(), prompt_ids[:: len(prompt_ids) // len(losses_U)]))

    def note_loss(self, loss: torch.Tensor) -> None:
        """Add this process's loss of one batch of the step."""
        self._loss = self._loss + loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the step: raise TrainingError with the prompts to look at, or drop the
        gradients."""
        mean = self._trainer.accelerator.reduce(torch.as_tensor(self._loss, device=args.device), "mean")
        fault = self._fault(float(mean), state.log_history)
        if fault is not None:
            text = f"step {state.global_step + 1}: {fault}: {self._suspects()}"
            if self._bad_step == "stop":
                raise TrainingError(
                    f"{text}. Look at their rewards and log-probabilities. If those are right, the policy has diverged: "
                    "lower the learning rate, or raise beta. `bad_step: skip` skips such steps"
                )
            log.warning("%s. The step is skipped", text)
            self._trainer.optimizer.zero_grad()  # to None, which an optimizer ignores
        self._clear()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reset the Trainer's sum of losses: it subtracts the sum from itself, which would keep a
        NaN forever."""
        if not self._trainer._tr_loss.isfinite():
            self._trainer._tr_loss.zero_()

    def _fault(self, loss: float, history: list[dict[str, float]]) -> str | None:
        if not math.isfinite(loss):
            return "the loss is not finite for these prompts"
        if self.grad_norm is not None and not math.isfinite(float(self.grad_norm)):
            return "the gradient is not finite; the prompts with the largest losses"
        logged = [entry["loss"] for entry in history if math.isfinite(entry.get("loss", math.nan))]
        first = logged[:FIRST_LOSSES]
        if len(first) == FIRST_LOSSES and loss > self._max_loss_growth * max(first):
            return (
                f"the loss is {loss:.4g}, more than {self._max_loss_growth:g} times the largest of the first "
                f"{FIRST_LOSSES} logged, {max(first):.4g}; the prompts with the largest losses"
            )
        return None

    def _suspects(self) -> str:
        """The prompts to name, from all processes: those without a finite loss, else those with the
        largest losses."""
        worst: dict[str, float] = {}
        for losses_U, names in self._seen:
            losses = losses_U.float().nan_to_num(nan=math.inf).abs().tolist()
            for loss, name in zip(losses, names, strict=True):
                worst[name] = max(worst.get(name, 0.0), loss)
        everyone = list(worst.items())
        if self._trainer.accelerator.num_processes > 1:
            everyone = gather_object(everyone)
        ranked = sorted(everyone, key=lambda item: (-item[1], item[0]))
        names = [name for name, loss in ranked if math.isinf(loss)] or [name for name, _ in ranked]
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more


def mean_loss(history: list[dict[str, float]]) -> float:
    """The mean loss of all logged steps; a logged loss is the mean since the log before it. NaN
    without a log."""
    total, last = 0.0, 0.0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else math.nan


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Stops after `patience` evaluations in a row without a lower `eval_loss`.

    It counts in the logged history, which checkpoints hold, so a resumed run stops at the same step
    as an uninterrupted one; transformers' own callback starts to count again. The Trainer keeps the
    best weights (`load_best_model_at_end`).
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if the lowest loss is `patience` evaluations old."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        losses = [math.inf if math.isnan(loss) else loss for loss in losses]
        if len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True
