"""Prefect flows, one a stage and one for all, and the command line.

    from flows import pipeline, rewards
    from tasks.config import load_config

    pipeline(load_config("config.yaml"))
    rewards(load_config("config.yaml"))     # one stage alone

Names are loaded when they are first used, so that `qrpo --help` does not wait for Prefect.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def _require_own(name: str) -> None:
    """Raise ImportError where a package of the user has the name of one of ours."""
    ours, found = Path(__file__).parents[1] / name, find_spec(name)
    folders = list(map(Path, found.submodule_search_locations or ())) if found else []
    if ours not in folders:
        where = folders[0] if folders else name
        raise ImportError(
            f"{where} is another package than the `{name}` of qrpo-pipeline in {ours}, and Python finds it first. Start Python "
            "with -P (or PYTHONSAFEPATH=1) so that the current folder is not searched, or call the command `qrpo`"
        )


for _name in ("qrpo", "storage", "tasks"):
    _require_own(_name)

from flows.environment import set_defaults  # noqa: E402  (after the check, whose error says what is wrong)
from tasks.stages import STAGE_NAMES  # noqa: E402

__all__ = ["pipeline", *STAGE_NAMES]

set_defaults()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flows' has no attribute {name!r}")
    module = import_module("flows.algorithm" if name == "pipeline" else "flows.stages")
    return getattr(module, name)
