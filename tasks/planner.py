"""Plans of a run's stages, made one after another as they are asked for, once for each.

A stage's plan follows from those before it. So a run plans each stage when its parents are
complete, and again only what it has just computed; `qrpo plan` asks for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from qrpo.errors import ConfigError
from storage import PartRecord, Store
from storage.artifact import named_artifacts, run_versions
from tasks.config import PipelineConfig
from tasks.plan import StagePlan, Upstream, as_planned, previous_policy
from tasks.stages import STAGE_NAMES, STAGES


class Planner:
    """The plans of one configuration on one store.

    `prompts` is a plan of prompts to keep to, whatever their source holds by now; `policy` the
    policy that a later round starts from, by default the one that the run `rounds.from_run` notes.
    """

    def __init__(
        self,
        config: PipelineConfig,
        store: Store,
        prompts: StagePlan | None = None,
        policy: PartRecord | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.prompts = prompts
        self.uncommitted: dict[str, list[dict[str, Any]]] = {}
        """Rows of the source that were read for a plan, by the fingerprint of their part."""
        self.plans: dict[str, StagePlan] = {}
        self.checked = False
        """Whether `tasks.preflight` found no problem."""
        self._checked: set[str] = set()  # by `check_files`
        self._previous = policy or previous_policy(config.rounds.from_run, store)

    def plan(self, stage: str, *, read_source: bool = False) -> StagePlan:
        """The plan of a stage, with what the store has of it; stages before it are planned first.

        Where the prompts have not been read yet, their plan and all that follow are not `known`;
        `read_source` then reads and cuts the source in memory, without writing anything.
        """
        for name in STAGE_NAMES[len(self.plans) : STAGE_NAMES.index(stage) + 1]:
            self.plans[name] = self._make(name, read_source)
        return self.plans[stage]

    def following(self, config: PipelineConfig) -> "Planner":
        """The planner of a later round or another candidate, on the prompts that this one read and
        from its policy."""
        prompts, policy = self.plans.get("prompts"), self.plans.get("policy")
        same = config.prompts == self.config.prompts and prompts is not None and prompts.complete
        before = None
        if policy is not None and config.rounds.from_run == self.config.name:
            before = next(iter(policy.records.values()), None)
        planner = Planner(config, self.store, prompts if same else None, before)
        planner.checked = self.checked
        return planner

    def cut_anew(self, stage: str) -> StagePlan:
        """The plan of a stage in parts of the configured size, also where a finished artifact has
        another cut."""
        self._forget(stage)
        return self.plans.setdefault(stage, self._make(stage, keep_cut=False))

    def computed(self, plan: StagePlan) -> StagePlan:
        """Note that the parts of `plan` were computed: read their records again, and forget the
        plans of later stages."""
        self._forget(plan.stage)
        return self.plans.setdefault(plan.stage, self._with_records(plan, keep_cut=False))

    def read(self, plan: StagePlan, records: tuple[PartRecord, ...]) -> StagePlan:
        """Note the parts that reading the source gave."""
        self._forget(plan.stage)
        found = {record.fingerprint: record for record in records}
        read = replace(plan, parts=as_planned(records), records=found, known=True)
        return self.plans.setdefault(plan.stage, read)

    def require_parents(self, stage: str) -> None:
        """Raise ConfigError where a stage that `stage` is made from has parts missing."""
        for parent in STAGES[stage].parents:
            plan = self.plan(parent)
            if not plan.complete:
                lacking = (
                    f"{len(plan.missing)} of {len(plan.parts)} parts are missing"
                    if plan.known
                    else "it has not run yet"
                )
                raise ConfigError(
                    f"{stage}: its parent stage {parent} is not complete: {lacking}. "
                    f"Run it first: `qrpo run CONFIG --until {parent}`"
                )

    def check_files(self, stage: str) -> None:
        """Raise DamagedError where a file of `stage`, or of a stage before it, is gone or has
        another size."""
        for name in STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]:
            if name not in self._checked:
                self.store.check_sizes(self.plan(name).records.values())
                self._checked.add(name)

    def _forget(self, stage: str) -> None:
        for name in STAGE_NAMES[STAGE_NAMES.index(stage) :]:
            self.plans.pop(name, None)

    def _make(self, name: str, read_source: bool = False, keep_cut: bool = True) -> StagePlan:
        stage = STAGES[name]
        settings = stage.settings_of(self.config)
        if name == "prompts" and self.prompts is not None:
            plan = self.prompts
        else:
            plan = stage.plan(settings, Upstream(self.plans, self.store, self._previous))
        if stage.read is not None and not plan.known and read_source:
            parts = []
            for part, rows in stage.read(settings):
                parts.append(part)
                self.uncommitted[part.key.fingerprint] = rows
            plan = replace(plan, parts=tuple(parts), known=True)
        if not all(before.known for before in self.plans.values()):
            plan = replace(plan, known=False)
        return self._with_records(plan, keep_cut)

    def _with_records(self, plan: StagePlan, keep_cut: bool) -> StagePlan:
        digests: dict[str, str] = {}
        if self._previous is not None:
            digests[self._previous.fingerprint] = self._previous.digest
        for before in self.plans.values():
            digests |= before.digests
        return plan.with_records(self.store, digests, keep_cut=keep_cut)


def plan_pipeline(
    config: PipelineConfig, store: Store, until: str = STAGE_NAMES[-1], *, read_source: bool = False
) -> dict[str, StagePlan]:
    """The plans of all stages up to `until`; see `Planner.plan`."""
    planner = Planner(config, store)
    planner.plan(until, read_source=read_source)
    return planner.plans


_active: ContextVar[Planner | None] = ContextVar("planner", default=None)


@contextmanager
def planning(planner: Planner) -> Iterator[Planner]:
    """Let stages that run inside the block, also as Prefect subflows, share one planner."""
    token = _active.set(planner)
    try:
        yield planner
    finally:
        _active.reset(token)


def planner_of(config: PipelineConfig, store_url: str, first: str = STAGE_NAMES[0]) -> Planner:
    """The planner of the block for this configuration and store, or a new one.

    A new one reads the source as it is now only to run the stage of prompts; from a later stage
    `first`, it keeps to the prompts of the run's note.
    """
    active, store = _active.get(), Store(store_url)
    if active is not None and active.config == config and active.store.url == store.url:
        return active
    return Planner(config, store, None if first == STAGE_NAMES[0] else noted_prompts(config, store))


def noted_prompts(config: PipelineConfig, store: Store) -> StagePlan | None:
    """The plan of the prompts that this run noted last for these settings; None where it noted
    none."""
    for version in run_versions(store.run(config.name) or {}):
        artifact = named_artifacts(version).get("prompts")
        same = version.get("config", {}).get("prompts") == config.prompts.model_dump(mode="json")
        manifest = store.manifest("prompts", artifact) if artifact and same else None
        if manifest is not None:
            described = ("prompts", manifest.family, dict(manifest.config), dict(manifest.inputs))
            return StagePlan(*described, as_planned(manifest.parts), {}, artifact=artifact, manifest=manifest)
    return None
