"""Rows that were computed before, in parts that are cut differently or were asked for less.

A part's fingerprint covers its whole slice, so another cut (prompts appended or removed, `num_ref`
raised, another part size) makes new parts. Their rows need not be new: a row of the same family
answers for its name wherever it is. Rows of another family serve where the stage says so
(`RowReuse.serves`): a score does not depend on its weight.

`with_candidates` names for each missing part the committed parts that hold some of its prompts. The
stage's `compute` takes the rows that match and computes the rest; `count_rows` tells the plan how
many those are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from storage import DamagedError, PartKey, PartRecord, Store
from storage.parts import dump_checksummed
from tasks.plan import PartPlan, StagePlan
from tasks.stage import RowReuse, Stage
from tasks.work import Work

if TYPE_CHECKING:
    import polars as pl

Name = tuple[Any, ...]


@dataclass(frozen=True)
class RowCount:
    """What a stage's missing parts cost: units to compute, and units that committed rows save."""

    unit: str
    compute: int
    reuse: int


def note_family(store: Store, stage: Stage[Any], plan: StagePlan) -> None:
    """Write what a family's name is the hash of, before its first part:
    `families/<stage>/<family>.json`."""
    key = _family_key(stage.name, plan.family)
    if not store.exists(key):
        store.write_bytes(key, dump_checksummed(_family_of(stage, plan)))


@lru_cache(256)
def noted_family(store: Store, stage: str, family: str) -> dict[str, Any] | None:
    """What a family's name is the hash of: `version`, `settings`, `outside`.

    None for a family without a sound note and without a finished artifact.
    """
    try:
        return store.read_note(_family_key(stage, family))
    except (FileNotFoundError, DamagedError):
        return _families_of_manifests(store, stage).get(family)


def family_names(store: Store, stage: str) -> set[str]:
    """The families of a stage that the store can describe (`noted_family`)."""
    prefix = f"families/{stage}"
    names = {key.removeprefix(f"{prefix}/").removesuffix(".json") for key in store.list(prefix)}
    return names | _families_of_manifests(store, stage).keys()


@lru_cache(16)
def _families_of_manifests(store: Store, stage: str) -> dict[str, dict[str, Any]]:
    """The families of finished artifacts, as their manifests describe them."""
    families: dict[str, dict[str, Any]] = {}
    prefix = f"artifacts/{stage}/"
    for name in {key.removeprefix(prefix).partition("/")[0] for key in store.list(prefix.rstrip("/"))}:
        manifest = store.manifest(stage, name)
        if manifest is not None:
            version = manifest.metadata.get("version")
            described = {"settings": dict(manifest.config), "outside": dict(manifest.inputs)}
            families[manifest.family] = {"version": version, **described}
    return families


def with_candidates(
    store: Store,
    stage: Stage[Any],
    plan: StagePlan,
    missing: Sequence[PartPlan],
    uncommitted: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
) -> tuple[PartPlan, ...]:
    """The missing parts, each with the committed parts whose rows may serve in it.

    Reads one column of those parts, once a stage; nothing where there are none, or where the stage
    reuses no rows.
    """
    if stage.reuse is None or not missing:
        return tuple(missing)
    by_prompt: dict[str, list[PartRecord]] = {}
    for record in _servants(store, stage, plan, missing):
        names = store.read_part(record, columns=["prompt_id"])["prompt_id"].unique().to_pylist()
        for prompt_id in names:
            by_prompt.setdefault(prompt_id, []).append(record)
    if not by_prompt:
        return tuple(missing)
    prompts = _Prompts(store, plan, uncommitted)
    return tuple(
        replace(
            part, reuse=_candidates(stage.reuse, plan, part, prompts.of(part.slice["prompts"]), by_prompt)
        )
        for part in missing
    )


def reusable_rows(work: Work[Any], part: PartPlan, on: Sequence[str]) -> "pl.DataFrame":
    """Rows of the candidate parts for this part's slice, unique by the columns `on`; an empty frame
    where there are none."""
    import polars as pl

    records = [record for record in (work.store.part(key) for key in part.reuse) if record is not None]
    if not records:
        return pl.DataFrame()
    frames = [work.store.scan([record]).with_columns(family=pl.lit(record.family)) for record in records]
    rows = pl.concat(frames, how="diagonal_relaxed")  # parts of an earlier version may hold float32
    if not set(on) <= set(rows.collect_schema().names()):  # parts of an earlier version lack a column
        return pl.DataFrame()
    return rows.unique(subset=["family", *on], keep="first", maintain_order=True).collect()


def count_rows(
    store: Store,
    stage: Stage[Any],
    settings: Any,
    plan: StagePlan,
    uncommitted: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
) -> RowCount | None:
    """What the missing parts of a plan cost; None where the stage's rows cost next to nothing.

    `uncommitted` has the rows of prompts parts that were read for the plan alone.
    """
    reuse = stage.reuse
    if reuse is None:
        return None
    ours = _family_of(stage, plan)
    own = {part.key.family for part in plan.parts}
    prompts = _Prompts(store, plan, uncommitted)

    @cache
    def price(family: str | None, same: bool = True) -> int:
        if family is None or family in own:
            return reuse.costs(ours, ours if family else None, same)
        return reuse.costs(ours, noted_family(store, stage.name, family), same)

    @cache
    def names(key: PartKey) -> frozenset[Name]:
        record = store.part(key)
        return frozenset() if record is None else frozenset(_names(store, record, reuse))

    @cache
    def prompts_of(key: PartKey) -> Mapping[str, _Prompt]:
        record = store.part(key)
        return prompts.of(record.metadata.get("prompts")) if record is not None else {}

    to_compute = saved = 0
    for part in with_candidates(store, stage, plan, plan.missing, uncommitted):
        cheapest_first = sorted(part.reuse, key=lambda key: price(key.family))
        present = prompts.of(part.slice["prompts"])
        offline = {prompt_id: prompt.offline for prompt_id, prompt in present.items()}
        for name in reuse.wanted(settings, part, offline):
            donor = next((key for key in cheapest_first if name in names(key)), None)
            cost = price(None)
            if donor is not None:
                earlier = prompts_of(donor).get(name[0])
                cost = price(donor.family, earlier in (None, present[name[0]]))
            to_compute += cost
            saved += price(None) - cost
    return RowCount(reuse.unit, to_compute, saved)


@dataclass(frozen=True)
class _Prompt:
    offline: int
    """Number of the dataset's own completions."""
    columns: str
    """The other columns of its row, as JSON."""


class _Prompts:
    """The prompts of prompts parts, by the part's fingerprint; each part is read once."""

    def __init__(
        self, store: Store, plan: StagePlan, uncommitted: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        self._store = store
        self._uncommitted = uncommitted
        keys = [key for part in plan.parts for key in part.inputs if key.stage == "prompts"]
        self._family = keys[0].family if keys else None
        self._read: dict[str, dict[str, _Prompt]] = {}

    def of(self, fingerprint: str | None) -> dict[str, _Prompt]:
        """Empty for a part that is not there."""
        if fingerprint is None or self._family is None:
            return {}
        if fingerprint not in self._read:
            record = self._store.part(PartKey("prompts", self._family, fingerprint))
            columns = ["prompt_id", "offline_completions", "metadata"]
            rows = self._uncommitted.get(fingerprint, ())
            if record is not None:
                rows = self._store.read_part(record, columns=columns).to_pylist()
            self._read[fingerprint] = {
                row["prompt_id"]: _Prompt(len(row["offline_completions"]), row["metadata"]) for row in rows
            }
        return self._read[fingerprint]


def _servants(
    store: Store, stage: Stage[Any], plan: StagePlan, missing: Sequence[PartPlan]
) -> Iterable[PartRecord]:
    """Committed parts of every family whose rows may serve, without those that are about to be
    computed."""
    assert stage.reuse is not None
    replaced = {part.key for part in missing}  # made from other bytes of their parents, or forced
    families = {part.key.family for part in missing}
    if plan.family in families:
        ours, versions = _family_of(stage, plan), (None, stage.version, *stage.reuse.versions)
        for family in family_names(store, stage.name):
            theirs = noted_family(store, stage.name, family)
            if theirs is not None and theirs["version"] in versions and stage.reuse.serves(theirs, ours):
                families.add(family)
    parts = (record for family in sorted(families) for record in store.family_parts(stage.name, family))
    return (record for record in parts if record.key not in replaced)


def _candidates(
    reuse: RowReuse[Any],
    plan: StagePlan,
    part: PartPlan,
    prompts: Iterable[str],
    by_prompt: Mapping[str, Sequence[PartRecord]],
) -> tuple[PartKey, ...]:
    found: dict[str, PartKey] = {}
    for prompt_id in prompts:
        for record in by_prompt.get(prompt_id, ()):
            foreign = record.family != part.key.family and part.key.family != plan.family
            if not foreign and _overlaps(part, record) and reuse.matches(part, record.metadata):
                found[record.fingerprint] = record.key
    return tuple(found[name] for name in sorted(found))


def _overlaps(part: PartPlan, record: PartRecord) -> bool:
    """Whether a committed part holds samples of the same kind, and of the same indices where these
    are cut too."""
    theirs, ours = record.metadata, part.slice
    if any(theirs.get(name) != ours.get(name) for name in ("origin", "model")):
        return False
    if "start" not in ours or "start" not in theirs:
        return True
    return bool(ours["start"] < theirs["stop"] and theirs["start"] < ours["stop"])


def _names(store: Store, record: PartRecord, reuse: RowReuse[Any]) -> Iterable[Name]:
    """The names of a committed part's rows that may serve."""
    import polars as pl

    rows = store.scan([record])
    if reuse.unless:
        rows = rows.filter(pl.col(reuse.unless).is_null())
    names = rows.select(reuse.columns).collect()
    lists = [name for name, kind in names.schema.items() if kind == pl.List]
    return (names.explode(lists, empty_as_null=False) if lists else names).iter_rows()


def _family_of(stage: Stage[Any], plan: StagePlan) -> dict[str, Any]:
    return {"version": stage.version, "settings": dict(plan.settings), "outside": dict(plan.outside)}


def _family_key(stage: str, family: str) -> str:
    return f"families/{stage}/{family}.json"
