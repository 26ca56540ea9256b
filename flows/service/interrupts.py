"""A flow run of this process, as `qrpo run` starts it, that ends as a person expects: by Ctrl-C, or cancelled in Prefect's UI.

Prefect leaves both to a worker. Here a thread asks the server now and then, and interrupts the run as Ctrl-C would; the run
then ends as cancelled, not as crashed. Parts that were committed stay, engines end with their owners.
"""

import logging
import os
import signal
import threading
from typing import Any
from uuid import UUID

__all__ = ["CancellableRun"]

log = logging.getLogger("qrpo")
_ASK_EVERY = 2.0  # seconds


class CancellableRun:
    """Give `started` to a flow as its `on_running` hook, and call `interrupted` where a KeyboardInterrupt came out of it."""

    def __init__(self) -> None:
        self._id: UUID | None = None
        self._over = threading.Event()

    def started(self, flow: Any, flow_run: Any, state: Any) -> None:
        """Begin to watch; of a flow run that is started again after a retry, too."""
        if self._id is None:
            self._id = flow_run.id
            threading.Thread(target=self._watch, name="watch-cancellation", daemon=True).start()

    def over(self) -> None:
        """Watch no longer."""
        self._over.set()

    def interrupted(self) -> None:
        """Say in Prefect that the run was cancelled."""
        from httpx import HTTPError
        from prefect.client.orchestration import get_client
        from prefect.states import Cancelled

        if self._id is None:
            return
        try:
            with get_client(sync_client=True) as client:
                message = "Interrupted; what was committed is kept, and the next run goes on from there."
                client.set_flow_run_state(self._id, Cancelled(message=message), force=True)
        except HTTPError as error:
            log.debug("the run could not be marked as cancelled: %s", error)

    def _watch(self) -> None:
        from httpx import HTTPError
        from prefect.client.orchestration import get_client

        assert self._id is not None
        while not self._over.wait(_ASK_EVERY):
            try:
                with get_client(sync_client=True) as client:
                    state = client.read_flow_run(self._id).state
            except HTTPError:
                continue  # a server that restarts is asked again
            if state is not None and (state.is_cancelling() or state.is_cancelled()):
                if not self._over.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
                return
