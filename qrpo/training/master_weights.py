"""Weights in bfloat16, with a float32 copy of each in the optimizer's state.

No pass casts the weights, and no update is lost: gradients accumulate in float32, the optimizer
steps on the float32 copies, and the bfloat16 weights are those copies rounded. A weight has 18
bytes with AdamW, instead of 16 in float32: this is for speed, not for memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MASTER = "master"


def keep_masters(optimizer: Any) -> None:
    """Let this optimizer step on float32 copies of its bfloat16 weights. Call it before the first
    step."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.narrow = [weight for weight in weights if weight.dtype == torch.bfloat16]
    optimizer.holds = False
    for weight in optimizer.narrow:
        weight.grad_dtype = torch.float32

    def widen(*_: Any) -> None:
        for weight in optimizer.narrow:
            master = optimizer.state[weight].pop(MASTER, None)  # an optimizer takes any entry for its own
            weight.data = weight.data.float() if master is None else master

    def narrow(*_: Any) -> None:
        for weight in optimizer.narrow:
            optimizer.state[weight][MASTER] = weight.data
            weight.data = weight.data if optimizer.holds else weight.data.bfloat16()

    optimizer.register_step_pre_hook(widen)
    optimizer.register_step_post_hook(narrow)


@contextmanager
def masters_loaded(optimizer: Any) -> Iterator[None]:
    """A context to load the optimizer's state in, whose tensors get the precision of the weights;
    afterwards the weights are those of the state."""
    weights = getattr(optimizer, "narrow", [])
    optimizer.holds = True
    for weight in weights:
        weight.data = weight.data.float()
    yield
    optimizer.holds = False
    for weight in weights:
        weight.data = optimizer.state[weight][MASTER].bfloat16()
