"""Early stop: end where the held-out loss no longer falls. The best weights are kept by the Trainer, as `load_best_model_at_end` says."""

import math
from typing import Any

from transformers import TrainerCallback

__all__ = ["EarlyStop"]


class EarlyStop(TrainerCallback):  # type: ignore[misc]
    """Stops after `patience` evaluations in a row without a lower `eval_loss`.

    It counts in the logged history, which checkpoints hold, so a resumed run stops where an uninterrupted one does;
    transformers' own callback begins to count anew.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop where the lowest loss lies `patience` evaluations back."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        losses = [math.inf if math.isnan(loss) else loss for loss in losses]
        if len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True
