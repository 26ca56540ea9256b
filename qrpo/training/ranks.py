"""Training on several processes of this machine, as `torchrun --standalone` does, with child
processes.

Each process is a `qrpo.processes.child.Child` with the variables that torchrun sets (RANK,
WORLD_SIZE, MASTER_ADDR, ...), so code that runs under torchrun or `accelerate launch` runs here.
The children pass on what rank 0 yields, raise their own errors instead of returning an exit code,
and never outlive this process. For several machines, start a script that calls `train_policy` with
torchrun on each.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo.errors import EngineError, QRPOError
from qrpo.processes.child import Child
from qrpo.processes.preemption import noting_sigterm, sigterm_came
from qrpo.training.settings import OptimizationConfig

_POLL_SECONDS = 0.2  # between checks for a SIGTERM
_CAUSE_SECONDS = 5.0  # when one rank fails, the others fail as a result, and may report it first


def number_of_processes(config: OptimizationConfig) -> int:
    """The processes to train with on this machine. `auto`: the most that GPUs are visible for and
    that divide `prompts_per_step`."""
    if config.processes != "auto" or config.weights == "bfloat16":
        return 1 if config.processes == "auto" else config.processes
    import torch

    gpus = range(1, torch.cuda.device_count() + 1)
    return max((number for number in gpus if config.prompts_per_step % number == 0), default=1)


def stream_ranks(target: str, *args: Any, processes: int, log: Path | None = None) -> Iterator[Any]:
    """Yield what rank 0 of `processes` copies of a generator function yields; drop the items of the
    others.

    `target` is "module:function" or "file.py:function". The first rank that fails ends all, and its
    error is raised. Closing the iterator kills all. A SIGTERM to this process is forwarded to each
    rank. Rank 0 logs to `log`, rank r to `<name>.rank<r><suffix>`.
    """
    from torch.distributed import TCPStore

    # Port 0: the system picks a free port, and the store keeps it open. All ranks join as clients.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    children = [
        Child(
            "qrpo.processes.serving:GeneratorFunction",
            target,
            name=f"{target}, rank {rank} of {processes},",
            log=log if log is None or rank == 0 else log.with_name(f"{log.stem}.rank{rank}{log.suffix}"),
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    events: queue.Queue[tuple[int, str, Any]] = queue.Queue()

    def follow(rank: int) -> None:
        try:
            for item in children[rank].stream("run", *args):
                events.put((rank, "item", item))
            events.put((rank, "end", None))
        except BaseException as error:
            events.put((rank, "error", error))

    for rank in range(processes):
        threading.Thread(target=follow, args=(rank,), name=f"rank-{rank}", daemon=True).start()
    running, forwarded = processes, False
    try:
        with noting_sigterm():
            while running:
                if sigterm_came() and not forwarded:
                    forwarded = True
                    for child in children:
                        if child.pid is not None:
                            os.kill(child.pid, signal.SIGTERM)
                try:
                    rank, kind, payload = events.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    continue
                if kind == "item" and rank == 0:
                    yield payload
                elif kind == "end":
                    running -= 1
                elif kind == "error":
                    raise _cause(payload, events)
    finally:
        for child in children:
            child.close(grace=0.0 if running else 5.0)
        del store


def _cause(error: BaseException, events: "queue.Queue[tuple[int, str, Any]]") -> BaseException:
    """The error to raise: the cause of the failure rather than that another rank disappeared."""
    deadline = time.monotonic() + _CAUSE_SECONDS
    while isinstance(error, EngineError) and (left := deadline - time.monotonic()) > 0:
        try:
            _, kind, other = events.get(timeout=left)
        except queue.Empty:
            break
        if kind == "error" and (not isinstance(other, EngineError) or "was killed" in str(other)):
            error = other
    return error if isinstance(error, QRPOError) else EngineError(str(error))
