"""The note of a run, `runs/<name>.json`: what each configuration that had the name produced.

    {"name", "config", "config_digest", "stages", "families", "updated", "history": [version, ...]}

The top level is the version that was written last, and `history` has the others, newest first. A
version belongs to one configuration, and its artifacts were made from each other. `stages` names
the finished artifacts; `families` names the parts of stages that are not finished. gc keeps both,
of every version. A lock in the store makes each change atomic.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qrpo.config import effective
from storage import fingerprint
from storage.artifact import named_artifacts, run_versions, unfinished_families
from storage.leases import Leases
from storage.manifest import now
from tasks.config import PipelineConfig
from tasks.plan import StagePlan, changes, flat
from tasks.planner import Planner
from tasks.stages import STAGE_NAMES

log = logging.getLogger("qrpo")

_CHANGES = 3  # that a line names
_DESCRIBES = ("config", "config_digest", "stages", "families")

Version = Mapping[str, Any]


def is_noted(planner: Planner, plan: StagePlan) -> bool:
    """Whether the run's current version names this finished artifact, so that gc keeps it."""
    noted = planner.store.run(planner.config.name) or {}
    return plan.manifest is not None and named_artifacts(noted).get(plan.stage) == plan.fingerprint


def note_families(planner: Planner, stage: str, families: Sequence[str], leases: Leases) -> None:
    """Note the families that an unfinished stage computes."""
    _change(planner, stage, leases, {"families": {stage: list(families)}})


def note_artifact(planner: Planner, stage: str, entry: Mapping[str, Any], leases: Leases) -> None:
    """Note a finished artifact. Its manifest keeps its parts from now on, so the note of its
    families ends."""
    _change(planner, stage, leases, {"stages": {stage: dict(entry)}})


def _change(planner: Planner, stage: str, leases: Leases, change: Mapping[str, Mapping[str, Any]]) -> None:
    """Apply a change to this configuration's version, which becomes the current one."""
    config, store = planner.config, planner.store
    made = {name: planner.plan(name).fingerprint for name in STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]}
    with leases.locked("runs", config.name):
        run = store.run(config.name) or {}
        versions = run_versions(run)
        own = next((one for one in versions if _is_own(one, config, made)), None)
        version = {**(own or _begun(versions, made)), **_described(config)}
        version["stages"] = {**version["stages"], **change.get("stages", {})}
        families = {**version.get("families", {}), **change.get("families", {})}
        version["families"] = {
            name: value for name, value in families.items() if name not in change.get("stages", {})
        }
        others = [one for one in versions if one is not own and not _is_within(one, version)]
        if own is not versions[0]:
            _say_what_is_replaced(config, versions[0], version)
        if not version["families"]:
            del version["families"]
        new = {"name": config.name, **version, **({"history": others} if others else {})}
        if (
            own is None
            or own is not versions[0]
            or any(own.get(key) != version.get(key) for key in _DESCRIBES)
        ):
            store.write_run(config.name, {**new, "updated": now()})


def _described(config: PipelineConfig) -> dict[str, Any]:
    """A configuration in full, and the digest of all that a result depends on."""
    settings = {key: value for key, value in effective(config, outside=True).items() if key != "compare"}
    return {"config": config.model_dump(mode="json"), "config_digest": fingerprint(settings)}


def _is_own(version: Version, config: PipelineConfig, made: Mapping[str, str]) -> bool:
    """Whether a version belongs to this configuration, and to these artifacts, as far as they
    exist."""
    described = _described(config)
    key = "config_digest" if "config_digest" in version else "config"  # absent in notes of earlier releases
    named = named_artifacts(version)
    return version.get(key) == described[key] and all(
        named.get(name, is_) == is_ for name, is_ in made.items()
    )


def _begun(versions: Sequence[Version], made: Mapping[str, str]) -> dict[str, Any]:
    """A new version, with what other versions noted of the artifacts that it shares with them."""
    entries = {
        name: one["stages"][name]
        for one in reversed(versions)
        for name, artifact in named_artifacts(one).items()
        if made.get(name) == artifact
    }
    return {"stages": {name: entries[name] for name in made if name in entries}}


def _is_within(version: Version, other: Version) -> bool:
    """Whether `other` keeps all that a version keeps."""
    return named_artifacts(version).items() <= named_artifacts(other).items() and unfinished_families(
        version
    ) <= unfinished_families(other)


def _say_what_is_replaced(config: PipelineConfig, before: Version, version: Version) -> None:
    left = named_artifacts(before).items() - named_artifacts(version).items()
    if not left:
        return
    old, new = (flat({**one.get("config", {}), "run": None}) for one in (before, version))
    changed = changes(old, new)
    more = f" and {len(changed) - _CHANGES} more settings" if len(changed) > _CHANGES else ""
    stages = ", ".join(name for name in STAGE_NAMES if name in dict(left))
    log.warning(
        "run %s: %s%s. The run's artifacts of %s are replaced: they stay in the store, and running the former "
        "configuration again shows them again. `qrpo gc --versions 1` removes them",
        config.name,
        "; ".join(changed[:_CHANGES]) or "its inputs changed",
        more,
        stages,
    )
