"""The `qrpo` command.

Standard output carries the result: a table, or one JSON object with `--json`. Progress and warnings
go to standard error. Exit codes: 0 done, 1 failed, 2 bad usage or configuration.

    app            what all commands share: options, consoles, error lines
    run            demo, run, compare, plan
    store          ls, show, inspect, browse, verify, gc
    results        theory, evaluate, report
    service        serve, deploy
    pipeline_run   run a span of stages and print the summary

A command imports what it needs when it is called, so that `--help` and shell completion answer at
once.
"""

import os
import sys
import threading

from flows.cli import results, run, service, store  # noqa: F401  (each adds its commands)
from flows.cli.app import app
from flows.environment import set_defaults

__all__ = ["app", "main"]

_EXIT_SECONDS = 30.0


def main() -> None:
    """Run the `qrpo` console script."""
    set_defaults(
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL", PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL="CRITICAL"
    )
    try:
        app()
    finally:
        # Prefect waits at exit until its server has every event and log line
        limit = threading.Timer(_EXIT_SECONDS, os._exit, (getattr(sys.exception(), "code", 1) or 0,))
        limit.daemon = True
        limit.start()
