"""Run flows so that a Prefect server which does not answer costs the view, never the run.

Prefect asks its server for permission before a flow starts, and reports its state after it ended.
`call_flow` tells these requests apart from the flow's own function: where they fail, the function
runs without Prefect, or its result is used anyway. The end that the server did not hear of is
reported when it answers again, at the latest by `report_ends`.

Inside the function Prefect must ask for nothing. So tasks get no tags (for each tag Prefect asks
for a concurrency slot), and tasks and flows name their result storage, though they store no result
(Prefect asks which one is the server's default).
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import wraps
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect import Flow, tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Cancelled, Completed, Failed

T = TypeVar("T")

log = logging.getLogger("qrpo")
_POLL_SECONDS = 2.0
_HEALTH_SECONDS = 5.0
_unreported: dict[UUID, State[Any]] = {}
"""Flow runs of this process whose end the server does not know, and how they ended."""
_unseen = threading.Event()
"""Set while a flow's function runs without Prefect, and with it all that it calls."""


def call_flow(flow: Flow[..., T], config: Any, *arguments: Any, **options: Any) -> T:
    """The result of a flow that takes a configuration first; its run is tagged `run:NAME`. Raises
    what its function raises.

    `options` are those of a flow's call, such as `wait_for`.
    """
    results: list[T] = []
    errors: list[Exception] = []
    runs: list[UUID] = []

    @wraps(flow.fn)
    def function(*given: Any, **named: Any) -> T:
        try:
            with TagsContext(current_tags=set()):
                results.append(flow.fn(*given, **named))
        except Exception as error:
            errors.append(error)
            raise
        return results[0]

    def on_running(flow: Any, flow_run: Any, state: Any) -> None:
        runs.append(flow_run.id)

    if _unseen.is_set():
        return flow.fn(config, *arguments)
    shown: Any = copy(flow)
    state: State[Any] | None = None
    shown.fn = function
    shown.on_running_hooks = [on_running, *flow.on_running_hooks]
    try:
        _require_server()
        with tags(f"run:{config.name}"):
            state = shown(config, *arguments, **options, return_state=True)
    except Exception as error:
        log.warning("%s goes on without Prefect's UI: %s", flow.name, _reason(error))
        if not (results or errors):
            with _without_server(), suppress(Exception):
                function(config, *arguments)
    if state is not None and not (results or errors):
        cancelled: T = state.result()  # raises: it was cancelled before it began
        return cancelled
    ended: State[Any] = Failed(message=str(errors[0])) if errors else Completed()
    if runs and (state is None or state.type != ended.type):
        _unreported[runs[0]] = ended
    if errors:
        raise errors[0]
    return results[0]


def report_ends(patience: float) -> None:
    """Tell the server how flow runs ended whose end it does not know. Waits for it at most
    `patience` seconds."""
    deadline = time.monotonic() + patience
    while _unreported:
        try:
            _require_server()
        except Exception as error:
            if time.monotonic() > deadline:
                log.warning("the end of this run is not in Prefect's UI: %s", _reason(error))
                return
            time.sleep(1.0)


def _require_server() -> None:
    """Report what is not reported yet. Raises httpx.HTTPError if the server does not answer."""
    url = PREFECT_API_URL.value()
    if url is None:  # Prefect starts a server for this process
        return
    httpx.get(f"{url.rstrip('/')}/health", timeout=_HEALTH_SECONDS).raise_for_status()
    for run_id, state in list(_unreported.items()):
        with suppress(ObjectNotFound), get_client(sync_client=True) as client:  # not found in a new database
            client.set_flow_run_state(run_id, state, force=True)
        del _unreported[run_id]


@contextmanager
def _without_server() -> Iterator[None]:
    """Tasks in this block send nothing: Prefect would try for each log line and event, and wait for
    all of them at exit."""
    _unseen.set()
    EventsWorker.set_client_override(NullEventsClient)
    try:
        with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}):
            yield
    finally:
        EventsWorker.set_client_override(None)
        _unseen.clear()


def _reason(error: Exception) -> str:
    return (
        f"the server at {PREFECT_API_URL.value()} (PREFECT_API_URL) failed: {type(error).__name__}: {error}. Set "
        "PREFECT_API_URL to the API of a running server, such as http://HOST:4200/api, or unset it to start one"
    )


@contextmanager
def cancellable_run() -> Iterator[Callable[[Any, Any, Any], None]]:
    """Yield the `on_running` hook of the flow that the block runs. A run that is cancelled in the
    UI, or interrupted by Ctrl-C, raises KeyboardInterrupt and is marked as cancelled; its committed
    parts are kept.

    Prefect handles both only for runs of a worker. Here a thread asks the server for the run's
    state.
    """
    run_ids: list[UUID] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            # a server that restarts: ask again
            with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
                state = client.read_flow_run(run_ids[0]).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    if not over.is_set():
                        os.kill(os.getpid(), signal.SIGINT)
                    return

    def on_running(flow: Any, flow_run: Any, state: Any) -> None:
        if not run_ids:  # a retry of the run calls this hook again
            run_ids.append(flow_run.id)
            threading.Thread(target=watch, name="watch-cancellation", daemon=True).start()

    patience = 60.0
    try:
        yield on_running
    except KeyboardInterrupt:
        patience = 5.0
        message = "Interrupted; committed parts are kept, and the next run goes on from there."
        for run_id in run_ids:
            _unreported[run_id] = Cancelled(message=message)
        raise
    finally:
        over.set()
        report_ends(patience)
