"""Environment variables that are set unless the user sets them: no telemetry, quiet logs, our log lines in Prefect's UI.

Libraries read them at import, so `flows` sets them when it is imported.
"""

import os

__all__ = ["set_defaults"]

DEFAULTS = {
    # no telemetry
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Prefect's UI shows our log lines
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qrpo",
    # a busy machine needs more than Prefect's 20 seconds
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # wait for a server that restarts or fails, with pauses of 2, 4, ... 32 seconds; see flows.service.flow_runs
    "PREFECT_CLIENT_MAX_RETRIES": "5",
    "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",
    "PREFECT_API_REQUEST_TIMEOUT": "30",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # a run whose machine died is found by its missing heartbeat, see flows.service.automations
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


def set_defaults(**more: str) -> None:
    """Set the variables of `DEFAULTS` and `more` that are not set yet."""
    for name, value in {**DEFAULTS, **more}.items():
        os.environ.setdefault(name, value)
