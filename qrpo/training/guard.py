"""Watches every optimizer step, and stops the run, or leaves the step out, where its loss or gradient went wrong.

A step is bad where its loss or its gradient's norm is not finite, or where the loss is `max_loss_growth` times the
largest of the first logged ones. It is judged after the gradients were reduced and before the optimizer uses them, so
all processes judge the same numbers, and a bad step never reaches the weights.
"""

import logging
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from qrpo.errors import TrainingError

if TYPE_CHECKING:
    from qrpo.training.trainer import CompletionTrainer

__all__ = ["BadStep", "StepGuard"]

log = logging.getLogger("qrpo")

BadStep = Literal["stop", "skip"]
FIRST_LOSSES = 10
"""Logged losses before growth is judged: the first steps of a small batch say little about its scale."""
_NAMED = 5


class StepGuard(TrainerCallback):  # type: ignore[misc]
    """What a trainer tells about its step, and the judgement on it."""

    def __init__(self, trainer: "CompletionTrainer", bad_step: BadStep, max_loss_growth: float) -> None:
        self._trainer = trainer
        self._bad_step = bad_step
        self._max_loss_growth = max_loss_growth
        self._clear()

    def _clear(self) -> None:
        self.grad_norm: float | torch.Tensor | None = None
        self._loss: torch.Tensor | float = 0.0
        self._seen: list[tuple[torch.Tensor, list[str]]] = []

    def note_terms(self, losses_U: torch.Tensor, prompt_ids: list[str]) -> None:
        """The loss of each term of one micro-batch, and the prompts of its completions, equally many a term."""
        self._seen.append((losses_U.detach(), prompt_ids[:: len(prompt_ids) // len(losses_U)]))

    def note_loss(self, loss: torch.Tensor) -> None:
        """This process's loss of a whole micro-step."""
        self._loss = self._loss + loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge the step; raises TrainingError with the prompts to look at, or drops the gradients."""
        mean = self._trainer.accelerator.reduce(torch.as_tensor(self._loss, device=args.device), "mean")
        fault = self._fault(float(mean), state.log_history)
        if fault is not None:
            text = f"step {state.global_step + 1}: {fault}: {self._suspects()}"
            if self._bad_step == "stop":
                raise TrainingError(
                    f"{text}. Look at their rewards and log-probabilities; if those are right, the policy has diverged: "
                    "lower the learning rate, or raise beta. `bad_step: skip` leaves such steps out"
                )
            log.warning("%s. The step is left out", text)
            self._trainer.optimizer.zero_grad()  # to None, which an optimizer passes over
        self._clear()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer's sum of losses begins anew: it subtracts the sum from itself, which leaves a NaN for ever."""
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
        """The prompts of the step, on all processes, that are to be named: those without a finite loss, else the worst."""
        worst: dict[str, float] = {}
        for losses_U, names in self._seen:
            losses = losses_U.float().nan_to_num(nan=math.inf).abs().tolist()
            for loss, name in zip(losses, names, strict=True):
                worst[name] = max(worst.get(name, 0.0), loss)
        everyone = list(worst.items())
        if self._trainer.accelerator.num_processes > 1:
            everyone = gather_object(everyone)
        ranked = sorted(everyone, key=lambda item: (-item[1], item[0]))
        bad = [name for name, loss in ranked if math.isinf(loss)]
        names = bad or [name for name, _ in ranked]
        more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more
