"""The device memory that training needs, from the shape of the model.

| part | bytes |
|---|---|
| weights, gradients | 4 a weight and 4 a trained weight, on each process or sharded over them |
| optimizer | AdamW: 8 a trained weight, sharded likewise; 12 with weights in bfloat16 |
| activations of a token | 2 L (12 D + 6 I) for L layers of width D and inner width I |
| the same with checkpointing | 4 L D, and one layer of the above |
| logits of one chunk of the head, twice | 8 x `GPU_CHUNK` |

The activation formula is fitted to bf16 autocast with fused attention on one H200. Llama 1B with
8,192 tokens measured 39.7 GiB without and 22.7 GiB with checkpointing; the estimate is 36.9 and
21.0 GiB. Compiled layers keep about half.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from qrpo.errors import ConfigError
from qrpo.models import ModelConfig, load_causal_lm
from qrpo.training.logprobs import GPU_CHUNK
from qrpo.training.settings import OptimizationConfig

USABLE = 0.85  # of a device's memory; the rest is the context, the allocator's fragments, one batch of inputs
SMALL_BUDGET, LARGE_BUDGET = 8192, 16384
# Bytes of optimizer state for each trained weight, by names that begin or end so.
STATE = {"sgd": 0, "adafactor": 0, "lion": 4, "8bit": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {size / 2**30:.1f}" for name, size in asdict(self).items())
        return f"{self.total / 2**30:.1f} GiB ({parts})"


def training_memory(
    model: Any, token_budget: int, *, checkpointing: bool, shards: int = 1, optim: str = "adamw"
) -> Memory:
    """The memory of each of the `shards` devices that hold this model's weights together."""
    config = model.config.get_text_config()
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    parameters = list(model.parameters())
    stored = sum(weight.numel() * weight.element_size() for weight in parameters)
    trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
    masters = sum(4 * w.numel() for w in parameters if w.requires_grad and w.element_size() == 2)
    state = next((size for part, size in STATE.items() if optim.startswith(part) or optim.endswith(part)), 8)
    layer = 2 * (12 * width + 6 * inner)
    kept = 4 * layers * width + layer if checkpointing else layers * layer
    return Memory(
        weights=stored // shards,
        gradients=4 * trained // shards,
        optimizer=(state * trained + masters) // shards,
        activations=token_budget * kept,
        logits=8 * GPU_CHUNK,
    )


def planned_memory(
    model: ModelConfig, config: OptimizationConfig, processes: int, device_bytes: int
) -> Memory:
    """The memory of one of these processes in a run of a section, from the model's configuration
    alone.

    Raises ConfigError, with the arithmetic, if a device of `device_bytes` is too small.
    """
    shape = load_causal_lm(model.model_copy(update={"dtype": config.weights}), "meta", empty=True)
    if config.lora is not None:
        _freeze_and_adapt(shape, config.lora.rank)
    needed = training_memory(
        shape,
        config.token_budget or default_token_budget(device_bytes),
        checkpointing=bool(config.gradient_checkpointing),
        shards=processes if config.fsdp else 1,
        optim=str(config.further.get("optim", "adamw")),
    )
    if needed.total > device_bytes:
        count = f"each of {processes} GPUs" if processes > 1 else "one GPU"
        raise ConfigError(
            f"training {model.path} needs {needed} on {count}, which has {device_bytes / 2**30:.1f} GiB: shard it over more "
            "processes (fsdp), train adapters (lora), set gradient_checkpointing to true, or lower token_budget"
        )
    return needed


def default_token_budget(device_bytes: int) -> int:
    """Tokens of one forward pass: large enough to keep the device busy, with few passes a step."""
    return LARGE_BUDGET if device_bytes >= 40 * 2**30 else SMALL_BUDGET


def needs_checkpointing(model: Any, token_budget: int, device: torch.device, shards: int = 1) -> bool:
    """Whether training fits into the device's memory only with gradient checkpointing. False on a
    CPU, whose memory is not known to be free."""
    needed = training_memory(model, token_budget, checkpointing=False, shards=shards)
    return device.type == "cuda" and needed.total > USABLE * device_bytes(device)


def device_bytes(device: torch.device) -> int:
    """The memory of a GPU; 0 for a CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def _freeze_and_adapt(model: torch.nn.Module, rank: int) -> None:
    """Leave the weights that adapters of all linear layers but the head would add as the trained
    ones."""
    head = model.get_output_embeddings()
    linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    model.requires_grad_(False)
    size = sum(rank * (layer.in_features + layer.out_features) for layer in linear)
    model.register_parameter("adapters", torch.nn.Parameter(torch.empty(size, device="meta")))
