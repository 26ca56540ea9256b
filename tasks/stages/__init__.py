"""The stages in the order in which a run goes through them, one module each.

A new stage is a module here with a `STAGE`, and its name in `STAGE_NAMES`. Modules are loaded when
`STAGES` is first used, so a command that only needs the names starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # slow to load, and the names do not need it
    from storage import Table
    from tasks.stage import Stage

STAGE_NAMES = (
    "prompts",
    "reference",
    "completions",
    "rewards",
    "quantiles",
    "shards",
    "policy",
    "evaluation",
)

STAGES: dict[str, "Stage[Any]"]
"""All stages by name, in order."""

TABLES: dict[str, "Table"]
"""The tables of the stages that have one; the others commit folders."""


def __getattr__(name: str) -> Any:
    if name not in ("STAGES", "TABLES"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stages = {stage: _load(stage) for stage in STAGE_NAMES}
    tables = {stage.name: stage.table for stage in stages.values() if stage.table is not None}
    globals().update(STAGES=stages, TABLES=tables)
    return globals()[name]


def _load(name: str) -> "Stage[Any]":
    """The stage of a module; ImportError says what is wrong with it."""
    stage: Stage[Any] | None = getattr(import_module(f"{__name__}.{name}"), "STAGE", None)
    where = f"tasks/stages/{name}.py"
    if stage is None or stage.name != name:
        found = "no STAGE" if stage is None else f"the STAGE {stage.name!r}"
        raise ImportError(f"{where}: found {found}, expected a STAGE named {name!r}")
    for parent in stage.parents:
        if parent not in STAGE_NAMES[: STAGE_NAMES.index(name)]:
            raise ImportError(f"{where}: its parent {parent!r} is not an earlier stage of STAGE_NAMES")
    return stage
