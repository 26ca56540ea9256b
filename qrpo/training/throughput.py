"""Training speed: tokens per second, model FLOPs utilization (MFU), and the remaining time.

MFU counts the operations that the mathematics needs: 2 per weight and token forward and 4 backward
(2 if the weight is frozen), the head on completion tokens only, without attention's own, relative
to the device's dense peak in the precision of the matrix products. Recomputed activations are not
counted, as usual. A CPU or an unknown device has no MFU.
"""

import time
from typing import Any

import torch

# Dense bfloat16 peaks in operations per second (vendors' data sheets), by part of the device name.
PEAK_BF16 = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "MI300X": 1.307e15,
}


class Meter:
    """Counts tokens between two readings."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        head = model.get_output_embeddings().weight
        outside = {id(model.get_input_embeddings().weight), id(head)}
        self._body = sum(_operations(weight) for weight in model.parameters() if id(weight) not in outside)
        self._head = _operations(head)
        self._peak = _peak(next(model.parameters()).device, dtype)
        self._tokens = self._flops = 0.0
        self._since: tuple[float, int] | None = None

    def start(self, step: int) -> None:
        """Start to count, unless it has started."""
        self._since = self._since or (time.perf_counter(), step)

    def add(self, tokens: float, completion_tokens: float, saved: float = 0) -> None:
        """Count what a process trained on, in the mean over processes: all tokens, and those of
        completions. `saved` tokens needed no forward, because completions shared their prompt's."""
        self._tokens += tokens
        self._flops += (tokens - saved) * self._body + completion_tokens * self._head

    def read(self, step: int, last_step: int, processes: int) -> dict[str, float]:
        """Speeds of all processes since the last reading, and the remaining seconds."""
        if self._since is None:
            return {}
        now = time.perf_counter()
        seconds, steps = now - self._since[0], step - self._since[1]
        found = {"tokens_per_second": self._tokens * processes / seconds}
        if self._peak:
            found["mfu"] = self._flops / seconds / self._peak
        if steps:
            found["eta_seconds"] = (last_step - step) * seconds / steps
        self._tokens, self._flops, self._since = 0.0, 0.0, (now, step)
        return found


def _operations(weight: Any) -> int:
    return int(weight.numel()) * (6 if weight.requires_grad else 4)


def _peak(device: torch.device, dtype: torch.dtype) -> float | None:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)
