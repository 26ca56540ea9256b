"""End a flow run of this process as cancelled, on Ctrl-C or on Cancel in Prefect's UI.

Prefect handles both only for runs of a worker. Here a thread asks the server for the run's state and interrupts this process
when the run is cancelled. Committed parts are kept.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

__all__ = ["cancellable_run"]

log = logging.getLogger("qrpo")
_POLL_SECONDS = 2.0


@contextmanager
def cancellable_run() -> Iterator[Callable[[Any, Any, Any], None]]:
    """Yield the `on_running` hook of the flow that the block runs. Mark that run as cancelled on KeyboardInterrupt."""
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    run_ids: list[UUID] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            with (
                suppress(HTTPError),
                get_client(sync_client=True) as client,
            ):  # a server that restarts: ask again
                state = client.read_flow_run(run_ids[0]).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    if not over.is_set():
                        os.kill(os.getpid(), signal.SIGINT)
                    return

    def on_running(flow: Any, flow_run: Any, state: Any) -> None:
        if not run_ids:  # a retry of the run calls this hook again
            run_ids.append(flow_run.id)
            threading.Thread(target=watch, name="watch-cancellation", daemon=True).start()

    try:
        yield on_running
    except KeyboardInterrupt:
        message = "Interrupted; committed parts are kept, and the next run goes on from there."
        try:
            with get_client(sync_client=True) as client:
                for run_id in run_ids:
                    client.set_flow_run_state(run_id, Cancelled(message=message), force=True)
        except HTTPError as error:
            log.debug("the run could not be marked as cancelled: %s", error)
        raise
    finally:
        over.set()
