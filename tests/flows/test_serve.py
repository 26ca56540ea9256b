"""`qrpo serve` as a service manager runs it: from start to SIGTERM."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.flows import QRPO, clean_environment
from tests.support.processes import descendants, eventually, free_port, running, survivors

pytestmark = pytest.mark.slow


def test_serve_says_what_it_serves_and_leaves_no_process_behind(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    config, log, port = write_task(tmp_path / "task"), tmp_path / "log", free_port()
    command = [QRPO, "serve", config, "--store", tmp_path / "store", "--port", port, "--json"]
    environment = clean_environment(PREFECT_HOME=str(tmp_path / "prefect"))

    def served() -> dict[str, str] | None:
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[0]) if lines else None

    with running([*command, "--cron", "0 3 * * *"], log, env=environment) as process:
        said = eventually(served, "the line that says what is served", log=log, process=process)
        worker_log = tmp_path / "store" / "logs" / "serve" / "worker.log"
        eventually(
            lambda: worker_log.exists() and "started!" in worker_log.read_text(),
            "the worker's start",
            log=log,
        )
        family = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)

    assert said is not None
    assert said["url"] == f"http://127.0.0.1:{port}"
    assert len(said["deployments"]) == 9
    assert said["schedule"] == "0 3 * * *"
    assert said["automations"] == ["QRPO: silent runs have crashed"]
    assert code == 0, log.read_text()
    assert len(family) >= 2, "a server and a worker"
    assert not survivors(family)
