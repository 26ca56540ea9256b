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

for _name in ("qrpo", "storage", "tasks"):
    _ours, _found = str(Path(__file__).parents[1] / _name), find_spec(_name)
    _theirs = list(_found.submodule_search_locations or ()) if _found else []
    if _ours not in _theirs:
        raise ImportError(
            f"{''.join(_theirs[:1])} is another package than the `{_name}` of qrpo-pipeline in {_ours}, and Python finds it first. "
            "Start Python with -P (or PYTHONSAFEPATH=1) so that the current folder is not searched, or call the command `qrpo`"
        )

from flows.environment import set_defaults  # noqa: E402  (after the check, whose error says what is wrong)
from tasks.stages import STAGE_NAMES  # noqa: E402

__all__ = ["pipeline", *STAGE_NAMES]

set_defaults()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flows' has no attribute {name!r}")
    module = import_module("flows.algorithm" if name == "pipeline" else "flows.stages")
    return getattr(module, name)
