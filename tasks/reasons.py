"""Why a stage has something to compute: which setting, input, parent or version changed since the
run's last artifact."""

from collections.abc import Mapping
from typing import Any

from storage import Manifest
from storage.artifact import named_artifacts, run_versions
from tasks.plan import StagePlan, changes, flat
from tasks.planner import Planner
from tasks.reuse import RowCount
from tasks.stages import STAGES


def reasons(
    plan: StagePlan, planner: Planner, noted: Mapping[str, Any], counts: Mapping[str, RowCount | None]
) -> list[str]:
    """The causes in words, none for a complete stage. `noted` is what the run noted of itself
    (`Store.run`).

    `counts` says what this stage and those before it cost.
    """
    stage, config, store = STAGES[plan.stage], planner.config, planner.store
    if not plan.known:
        if stage.read is not None:
            return [f"{config.prompts.source} has not been read yet"]
        return ["the prompts are not known yet"]
    if plan.complete:
        return [] if plan.parts else [stage.why_empty]
    artifacts = (named_artifacts(version).get(plan.stage) for version in run_versions(noted))
    artifact = next(filter(None, artifacts), None)
    previous = store.manifest(plan.stage, artifact) if artifact else None
    words: list[str] = []
    if previous is not None:
        words += _changed_settings(previous, plan, planner, noted)
        words += changes(flat(previous.inputs), flat(plan.outside), f"{plan.stage}.")
        version = previous.metadata.get("version")
        if version not in (None, stage.version):
            words.append(
                f"the version of the {plan.stage} stage's code changed from {version} to {stage.version}"
            )
        elif version is None and previous.family != plan.family and not words:
            words.append(f"the artifact was written by an earlier version of the {plan.stage} stage's code")
        if stage.read is not None:
            words.append("the source or how it is read changed: only parts with other prompts are new")
    for parent in stage.parents:
        before = planner.plan(parent)
        cost = counts.get(parent)
        if not before.complete and cost is not None and cost.reuse and not cost.compute:
            words.append(
                f"{parent} is written anew ({cost.reuse:,} of {cost.reuse:,} {cost.unit} are reused)"
            )
        elif not before.complete:
            words.append(f"{parent} is computed anew")
        elif previous is not None and previous.parents.get(parent, before.fingerprint) != before.fingerprint:
            words.append(f"{parent} changed")
    if store.find_parts([part.key for part in plan.missing]):
        words.append("its parents hold other bytes now than when it was computed")
    if not words and previous is not None:
        had = {record.fingerprint for record in previous.parts}
        if not {part.key.fingerprint for part in plan.missing} <= had:
            words.append("the prompts or their columns changed")
    if not words:
        words.append("never computed" if previous is None else "parts are missing from the store")
    count = counts.get(plan.stage)
    if count is not None and count.reuse:
        words.append(f"{count.reuse:,} of {count.compute + count.reuse:,} {count.unit} are reused")
    return words


def _changed_settings(
    previous: Manifest, plan: StagePlan, planner: Planner, noted: Mapping[str, Any]
) -> list[str]:
    """`key changed from old to new` for every setting that the stage reads."""
    new = flat(STAGES[plan.stage].read_values(planner.config))
    if "reads" in previous.metadata:
        old = flat(previous.metadata["reads"])
    else:  # written by an earlier version: the run's note has the configuration, with keys that may be others
        known = flat(noted.get("config", {}))
        old = {key: known.get(key, value) for key, value in new.items()}
    return changes(old, new)
