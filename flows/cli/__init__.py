"""The `qrpo` command.

Standard output carries what was asked for (a table, or one JSON object with `--json`); progress and warnings go to standard error.
Exit codes: 0 done, 1 failed, 2 bad usage or configuration.

    app        what every command shares
    run        demo, run, compare, plan
    store      ls, show, inspect, browse, verify, gc
    results    theory, evaluate, report
    service    serve, deploy

A command imports what it needs when it is called: `--help` and the shell's completion must answer at once.
"""

from flows.cli import results, run, service, store  # noqa: F401  (each adds its commands)
from flows.cli.app import app
from flows.environment import set_defaults

__all__ = ["app", "main"]


def main() -> None:
    """The console script's entry."""
    set_defaults(
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL", PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL="CRITICAL"
    )
    app()
