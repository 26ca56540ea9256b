"""Environment variables that are set unless the user sets them: no telemetry, quiet logs, our log
lines in Prefect's UI.

Libraries read them at import, so `flows` sets them when it is imported.
"""

import os
import pwd
import resource
from pathlib import Path

from qrpo.errors import ConfigError

_ADDRESS_SPACE = 4 << 30  # a process of the demo reserves 2 GiB, of which it uses 0.7

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
    # wait for a server that restarts or fails, with pauses of 2, 4, ... 32 seconds; see
    # flows.service.flow_runs
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
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # libraries ask for the user's name
        os.environ.setdefault("LOGNAME", f"uid-{os.getuid()}")


def require_home() -> None:
    """Raise ConfigError if the user has no home folder, where Prefect and Hugging Face keep
    files."""
    try:
        Path.home()
    except RuntimeError:
        raise ConfigError(
            f"the user with id {os.getuid()} has no home folder: set HOME to a folder that it can write to"
        ) from None


def require_memory() -> None:
    """Raise ConfigError if `ulimit -v` is too low for a process of a run."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < _ADDRESS_SPACE:
        raise ConfigError(
            f"the limit of the address space (ulimit -v) is {limit / 2**30:.1f} GiB, expected at least "
            f"{_ADDRESS_SPACE >> 30} GiB: processes reserve much more than they use. Set `ulimit -v unlimited`, and limit "
            "memory by a control group (`systemd-run --scope -p MemoryMax=...`)"
        )
