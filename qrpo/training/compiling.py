"""Decoder layers compiled by `torch.compile`: their element-wise work becomes a few kernels.

Only the layers are compiled, with dynamic shapes. All layers of a model share one compiled
function, so a model of any depth costs one compilation, and packed rows of any length use the same
code. The first step is slow (14 s at 1B, 23 s at 8B on one H200); torch keeps the result on disk
for the next process.
"""

import logging
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from qrpo.training.batches import Layout
from qrpo.training.logprobs import completion_logprobs

MIN_STEPS = 100
"""Runs shorter than this do not gain what compilation costs."""

_log = logging.getLogger(__name__)


def compile_layers(model: Any, layout: Layout, *, probe: bool = True) -> bool:
    """Compile the decoder layers of a transformers model in place; whether that succeeded.

    With `probe` a forward and backward pass on a few tokens finds out whether the model can be
    compiled; if not, a warning is logged and the layers stay as they were.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        _log.warning("compile_layers: %s has no layers that can be compiled", type(model).__name__)
        return False
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    if not probe:
        return True
    training = model.training
    ids = list(range(3, 19))
    try:
        with torch.random.fork_rng():
            model.train()
            completion_logprobs(model, [ids, ids[2:]], [ids, ids[:9]], layout=layout).sum().backward()
    except Exception as error:  # torch.compile raises whatever its stages raise
        for layer in layers:
            del layer.forward
        _log.warning(
            "compile_layers: trained without, since compilation failed: %s", str(error).split("\n")[0]
        )
        return False
    finally:
        model.train(training)
        model.zero_grad()
    return True
