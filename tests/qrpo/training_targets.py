"""What the training tests run in processes of their own: generator functions for `qrpo.processes.child` and `qrpo.training.ranks`, and a
server that forks training runs.

Importing torch and transformers takes seconds of processor time, and the kill test starts 22 runs: the server imports
once, starts no thread, and forks a process for each run.

    {"folder": ..., "shards": ..., "output": ..., "settings": {...}, "reports": ..., "full_from": null}   ->  {"pid": ...}
    "wait"                                                                                              ->  {"status": ...}
"""

import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def train(
    folder: Path, rows: Path, output: Path, settings: dict[str, Any], sigterm_after: int | None = None
) -> Iterator[dict[str, Any]]:
    """Train on pickled rows; yields what was reported, at the end. Rank 0 sends itself a SIGTERM after a step."""
    import torch

    from qrpo.training.runs import train_policy
    from qrpo.training.settings import PolicyConfig

    torch.set_num_threads(1)
    reports: list[dict[str, Any]] = []

    def on_progress(report: dict[str, Any]) -> None:
        reports.append(report)
        if report["step"] == sigterm_after:
            os.kill(os.getpid(), signal.SIGTERM)

    rows_read = pickle.loads(rows.read_bytes())  # noqa: S301
    train_policy(folder, rows_read, PolicyConfig(**settings), output, on_progress=on_progress)
    yield from reports


def start_ranks(processes: int, folder: Path) -> Iterator[int]:
    """Start so many ranks that wait for ever; yields this process's id."""
    from qrpo.training.ranks import stream_ranks

    yield from stream_ranks(f"{__file__}:leave_pid_and_wait", folder, processes=processes)


def leave_pid_and_wait(folder: Path) -> Iterator[int]:
    """Leave this process's id in a file, then wait for ever; yields the parent's."""
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    yield os.getppid()
    time.sleep(1000)


def _run(request: dict[str, Any]) -> None:
    import resource

    from qrpo.training.runs import train_policy
    from qrpo.training.settings import PolicyConfig
    from storage import ShardReader, Store

    records = pickle.loads(Path(request["shards"], "records").read_bytes())  # noqa: S301
    reader = ShardReader(Store(request["shards"]), records, seed=3)
    with open(request["reports"], "a", buffering=1) as reports:

        def on_progress(report: dict[str, Any]) -> None:
            reports.write(json.dumps(report) + "\n")
            if report["step"] == request.get("full_from"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        train_policy(
            request["folder"],
            reader,
            PolicyConfig(**request["settings"]),
            request["output"],
            seed=5,
            on_progress=on_progress,
        )


def main() -> None:
    """Serve requests from standard input until it ends."""
    import torch

    import qrpo.training.runs
    import storage

    assert qrpo.training.runs
    assert storage
    torch.set_num_threads(1)
    pid = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request == "wait":
            _, status = os.waitpid(pid, 0)
            answer = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if not pid:
                status = 0
                try:
                    _run(request)
                except BaseException as error:
                    status = 1
                    Path(request["reports"]).with_suffix(".error").write_text(
                        f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                    )
                os._exit(status)
            answer = {"pid": pid}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
