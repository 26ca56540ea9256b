"""Environment variables that hold unless the user sets them: no telemetry of third parties, quiet logs, our lines in Prefect's UI.

Prefect and others read them when they are imported, so `flows` sets them when it is imported itself.
"""

import os

__all__ = ["DEFAULTS", "set_defaults"]

DEFAULTS = {
    # nothing is reported to anybody
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # what this project logs is seen in the UI, too
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qrpo",
    # a busy machine needs longer than Prefect's 20 seconds
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # a server that restarts is waited for: pauses of 2, 4, ... 256 seconds
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    # by which a run whose machine died is found, see flows.service.automations
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


def set_defaults(**more: str) -> None:
    """Set what is not set yet; `more` are further variables of the same kind."""
    for name, value in {**DEFAULTS, **more}.items():
        os.environ.setdefault(name, value)
