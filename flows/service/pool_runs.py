"""The flow runs of a work pool, as `qrpo serve` shows and ends them."""

import time
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Cancelling

from qrpo.processes.child import Child

_STOP_SECONDS = 15.0  # for cancelled runs to end


def _runs(client: SyncPrefectClient, pool: str, **filters: Any) -> list[FlowRun]:
    """The newest flow runs of a work pool that fit the filters."""
    body = {"flow_runs": filters, "work_pools": {"name": {"any_": [pool]}}, "sort": "START_TIME_DESC"}
    found = client.request("POST", "/flow_runs/filter", json=body).json()
    return [FlowRun.model_validate(run) for run in found]


def changes(pool: str, since: datetime, shown: dict[UUID, str]) -> list[str]:
    """A line for each run that started or ended since the last call."""
    lines = []
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        for run in reversed(_runs(client, pool, start_time={"after_": since.isoformat()})):
            state = run.state
            if state is None or shown.get(run.id) == state.name:
                continue
            shown[run.id] = str(state.name)
            reason = f": {state.message}" if state.message and not state.is_completed() else ""
            lines.append(f"{run.name}: {state.name}{reason}")
    return lines


def end_runs(pool: str, state: State[Any]) -> None:
    """End every run of the pool that a worker has taken. Call it while no worker runs: each keeps
    its place in the queue."""
    with get_client(sync_client=True) as client:
        for run in _runs(client, pool, state={"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}):
            client.set_flow_run_state(run.id, state, force=True)


def cancel_runs(pool: str, worker: Child) -> list[str]:
    """Cancel the runs of this pool, wait some seconds for them, then kill the worker's process
    group; return the runs' names."""
    message = "`qrpo serve` ended; committed parts are kept."
    names: list[str] = []
    try:
        with get_client(sync_client=True) as client:
            for run in _runs(client, pool, state={"type": {"any_": ["RUNNING", "PENDING"]}}):
                client.set_flow_run_state(run.id, Cancelling(message=message))
                names.append(run.name)
            deadline = time.monotonic() + _STOP_SECONDS
            while time.monotonic() < deadline and _runs(
                client, pool, state={"type": {"any_": ["CANCELLING"]}}
            ):
                time.sleep(0.5)
        worker.close()
        end_runs(pool, Cancelled(message=message))  # they did not react, or the worker took them meanwhile
    except httpx.HTTPError:
        pass  # the server is already gone
    finally:
        worker.close()
    return names
