"""An estimate of the device memory of training, from the shape of the model.

| part | bytes |
|---|---|
| weights | as stored, on each process or sharded over them |
| gradients, AdamW's two moments | three times the trained weights, sharded likewise |
| activations of a token, kept for the backward pass | 2 L (12 D + 6 I) for L layers of width D and inner width I |
| the same with checkpointing | 4 L D, and one layer of the above |
| logits of one chunk of the head, twice | 8 x `GPU_CHUNK` |

The activation formula is fitted to bf16 autocast with fused attention on one H200. Llama 1B with
8,192 tokens measured 39.7 GiB without and 22.7 GiB with checkpointing; the estimate is 36.9 and
21.0 GiB. Compiled layers keep about half.
"""

from typing import Any

import torch

from qrpo.training.logprobs import GPU_CHUNK

USABLE = 0.85  # of a device's memory; the rest is the context, the allocator's fragments, one batch of inputs
SMALL_BUDGET, LARGE_BUDGET = 8192, 16384


def training_bytes(model: Any, token_budget: int, *, checkpointing: bool, shards: int = 1) -> int:
    """Bytes on one of the `shards` devices that hold the weights together, at the peak of a step."""
    config = model.config.get_text_config()
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    stored = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    trained = sum(
        weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad
    )
    layer = 2 * (12 * width + 6 * inner)
    kept = 4 * layers * width + layer if checkpointing else layers * layer
    return int(stored + 3 * trained) // shards + token_budget * kept + 8 * GPU_CHUNK


def default_token_budget(device: torch.device) -> int:
    """Tokens of one forward pass: large enough to keep the device busy, with few passes a step."""
    return LARGE_BUDGET if _memory(device) >= 40 * 2**30 else SMALL_BUDGET


def needs_checkpointing(model: Any, token_budget: int, device: torch.device, shards: int = 1) -> bool:
    """Whether training fits into the device's memory only with gradient checkpointing. False on a
    CPU, whose memory is not known to be free."""
    needed = training_bytes(model, token_budget, checkpointing=False, shards=shards)
    return device.type == "cuda" and needed > USABLE * _memory(device)


def _memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
