"""Prefect flows, one a stage and one for all, and the command line.

    from flows import pipeline, rewards
    from tasks.config import load_config

    pipeline(load_config("config.yaml"))
    rewards(load_config("config.yaml"))     # one stage alone

Names are loaded when they are first used, so that `qrpo --help` does not wait for Prefect.
"""

from importlib import import_module
from typing import Any

from flows.environment import set_defaults
from tasks.stages import STAGE_NAMES

__all__ = ["pipeline", *STAGE_NAMES]

set_defaults()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flows' has no attribute {name!r}")
    module = import_module("flows.algorithm" if name == "pipeline" else "flows.stages")
    return getattr(module, name)
