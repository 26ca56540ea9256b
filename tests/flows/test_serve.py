"""`qrpo serve` as a service manager runs it: from its start to SIGTERM in the middle of a run."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client import orchestration

from tests.support.flows import QRPO, clean_environment, parts_of
from tests.support.processes import descendants, eventually, free_port, running, survivors

pytestmark = pytest.mark.slow


def test_serve_runs_what_is_started_and_sigterm_cancels_it_and_leaves_no_process_behind(
    write_task: Callable[..., Path], tmp_path: Path
) -> None:
    config, store, log = tmp_path / "task" / "config.yaml", tmp_path / "store", tmp_path / "log"
    write_task(
        config.parent,
        completions__engine={"kind": "transformers", "max_num_seqs": 1},
        completions__num_ref=64,
        run__part_size=2,
    )
    port = free_port()
    command = [QRPO, "serve", config, "--store", store, "--port", port, "--cron", "0 3 * * *", "--json"]
    environment = clean_environment(PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_WORKER_QUERY_SECONDS="1")

    def served() -> Any:
        lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[0]) if lines else None

    with running(command, log, env=environment) as process:
        said = eventually(served, "the line that says what is served", log=log, process=process)
        api = f"http://127.0.0.1:{port}/api"
        login = httpx.BasicAuth(*said["login"].split(":"))
        refused = [
            httpx.get(f"{api}/deployments/name/pipeline/tiny"),
            httpx.get(f"{api}/deployments/name/pipeline/tiny", auth=httpx.BasicAuth("qrpo", "guessed")),
            httpx.post(f"{api}/flow_runs/filter", json={}, auth=login),
            httpx.get(f"{api}/deployments/name/pipeline/tiny", headers={"Host": "evil.example"}, auth=login),
        ]
        page = httpx.options(
            f"{api}/flow_runs/",
            headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
        )
        with orchestration.SyncPrefectClient(api, auth_string=said["login"]) as client:
            deployment = client.read_deployment_by_name("pipeline/tiny")
            client.create_flow_run_from_deployment(deployment.id)
        eventually(lambda: parts_of(store), "the first part", log=log, process=process)
        family = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=120)

    assert [answer.status_code for answer in refused] == [401, 401, 403, 400], (
        "no login, a wrong one, no CSRF token, a name that points here"
    )
    assert "access-control-allow-origin" not in page.headers
    assert said["url"] == f"http://127.0.0.1:{port}"
    assert len(said["deployments"]) == 9
    assert said["schedule"] == "0 3 * * *"
    assert said["automations"] == ["QRPO: silent runs have crashed"]
    assert code == 0, log.read_text()
    assert "tiny: prompts to evaluation (prompts.jsonl, model): Running" in log.read_text()
    cancelled = "cancelled tiny: prompts to evaluation (prompts.jsonl, model); finished parts are kept"
    assert cancelled in log.read_text()
    assert len(family) >= 4, "a server, a worker, a run and its engine"
    assert not survivors(family)
