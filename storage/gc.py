"""Garbage collection: a plan of what no run needs, with keys and sizes, and its execution.

A plan keeps

- manifests that a kept run names, and the manifests they were computed from;
- the parts of every kept manifest;
- the families that a kept run notes for its unfinished stages;
- the families that a live run protects by its heartbeat;
- committed parts that no manifest lists, unless `unfinished` is set: a stage that was killed left
  them;
- files younger than a grace period, because a run without a heartbeat may be writing them.

Other parts, manifests, dropped runs with their logs, and dead leases are removed, manifests before
parts, so that a kill leaves no manifest without its parts. So is what killed runs left: files of a
part that its record does not name (a second copy of a model), work folders of committed parts,
temporary files, and copies of removed models in the user's cache. `families/` and `answers/` are
never touched.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.artifact import named_artifacts, run_versions, unfinished_families
from storage.errors import DamagedError, StoreError
from storage.files import FileInfo
from storage.leases import CLAIMS, HOLDERS, Holder, Watch, claim_holder
from storage.manifest import Manifest, manifest_key
from storage.parts import PartKey
from storage.processes import cache_folder
from storage.store import Store

_DEAD_AFTER = 3600.0  # seconds without a heartbeat; more than the clocks of two machines may differ
_TEMPORARY_AGE = 24 * 3600.0  # seconds

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Rules:
    """The arguments of `plan_gc` that hold for every run."""

    grace: float
    unfinished: bool
    versions: int | None


@dataclass(frozen=True)
class GcPlan:
    """What `collect` would remove and keep. Sizes in bytes."""

    keep_runs: tuple[str, ...]
    drop_runs: tuple[str, ...]
    manifests: tuple[str, ...]
    parts: tuple[PartKey, ...]
    others: tuple[str, ...]
    unfinished: tuple[PartKey, ...]
    """Parts that no manifest lists and no kept run notes. `parts` has them only where asked for."""
    unfinished_bytes: int
    files: Mapping[str, FileInfo]
    """Every file to remove, as it was listed."""
    families: Mapping[str, set[str]]
    """File -> families: a live run that protects one of these keeps the file."""
    work: Mapping[Path, int]
    """Folders on this machine to remove, and their sizes: work folders, copies of models."""
    kept_bytes: int
    rules: _Rules

    @property
    def bytes(self) -> int:
        """The size of everything to remove."""
        return sum(info.bytes for info in self.files.values()) + sum(self.work.values())

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys and folders to remove; for a part, the key of its record."""
        return (*self.single_files, *(key.record for key in self.parts), *map(str, self.work))

    @property
    def single_files(self) -> tuple[str, ...]:
        """The keys of the files to remove that belong to no part."""
        return (*(_run_key(name) for name in self.drop_runs), *self.manifests, *self.others)


def plan_gc(
    store: Store,
    *,
    keep_runs: Iterable[str] = (),
    newest: int | None = None,
    max_age: float | None = None,
    grace: float = 3600.0,
    unfinished: bool = False,
    versions: int | None = None,
    progress: Progress | None = None,
) -> GcPlan:
    """Plan what to remove. Without a rule every run is kept.

    With rules, a run is kept if it is in `keep_runs`, among the `newest` N, or younger than
    `max_age` seconds. Nothing younger than `grace` seconds is removed. `unfinished` also removes
    the parts of stages that were never finished, except those of kept and live runs. Of a kept run
    all `versions` are kept, or the newest N (one for each configuration that had its name).
    `progress` gets the number of manifests read so far and their total. Raises StoreError where a
    kept run is missing or cannot be read.
    """

    def dropped(runs: Mapping[str, FileInfo]) -> set[str]:
        return runs.keys() - _kept_runs(runs, tuple(keep_runs), newest, max_age)

    return _plan(store, dropped, _Rules(grace, unfinished, versions), progress)


def collect(store: Store, plan: GcPlan, progress: Progress | None = None) -> int:
    """Execute a plan; returns the bytes freed.

    What runs need since the plan was made stays: the plan is made again, and heartbeats are read
    before each removal. `progress` gets the number of keys processed so far and their total.
    """

    def unchanged(runs: Mapping[str, FileInfo]) -> set[str]:
        return {name for name in plan.drop_runs if runs.get(name) == plan.files[_run_key(name)]}

    now = _plan(store, unchanged, plan.rules, None) if plan.keys else plan
    guard = _Guard(store, now)
    freed = done = 0

    def advance(size: int) -> None:
        nonlocal freed, done
        freed, done = freed + size, done + 1
        if progress is not None:
            progress(done, len(plan.keys))

    for key in plan.single_files:
        needed = guard.claims(key) if key.startswith(f"{CLAIMS}/") else guard.protects(plan.families[key])
        removable = key in now.files and not needed
        if removable:
            store.delete(key)
        advance(plan.files[key].bytes if removable else 0)
    sizes: dict[PartKey | None, int] = {}
    for key, info in plan.files.items():
        sizes[_part_of(key)] = sizes.get(_part_of(key), 0) + info.bytes
    parts = set(now.parts)
    for part in plan.parts:
        removable = part in parts and not guard.protects({part.family})
        if removable:
            store.discard_part(part)
        advance(sizes[part] if removable else 0)
    for folder, size in plan.work.items():
        removable = folder in now.work and not guard.claims(
            f"{CLAIMS}/{folder.parent.name}/{folder.name}.json"
        )
        if removable:
            shutil.rmtree(folder, ignore_errors=True)
        advance(size if removable else 0)
    return freed + sum(info.bytes for info in store.files.sweep(_TEMPORARY_AGE))


class _Guard:
    """What live runs need while a plan is executed. A family that was protected once stays
    protected."""

    def __init__(self, store: Store, plan: GcPlan) -> None:
        self._store, self._plan = store, plan
        self._watch = Watch(store)
        self._families: set[str] = set()

    def protects(self, families: set[str]) -> bool:
        live = self._live()
        self._families |= {family for holder in live for family in holder.families}
        return bool(families & self._families)

    def claims(self, claim: str) -> bool:
        """Whether a live run holds this claim: it may have taken it over since."""
        return claim_holder(self._store, claim) in {holder.id for holder in self._live()}

    def _live(self) -> list[Holder]:
        return [holder for holder in self._watch.holders() if holder.key not in self._plan.files]


def _plan(
    store: Store,
    drop: Callable[[Mapping[str, FileInfo]], set[str]],
    rules: _Rules,
    progress: Progress | None,
) -> GcPlan:
    """The plan that drops these runs.

    Heartbeats are read before manifests and runs are listed: a run keeps its heartbeat until it has
    written its manifest and its note, so one of the two shows each part that it needs.
    """
    tops = ("answers", "families", "logs", "parts", "rejects", "leases")
    files = {info.key: info for top in tops for info in store.listing(top)}
    holders = Watch(store).holders()
    files |= {info.key: info for top in ("artifacts", "runs") for info in store.listing(top)}
    live = [  # heard of lately, whatever the clocks of two machines differ by
        holder
        for holder in holders
        if holder.key not in files or _is_young(files[holder.key], max(_DEAD_AFTER, 2 * holder.ttl))
    ]
    runs = {
        key[5:-5]: info for key, info in files.items() if key.startswith("runs/") and key.endswith(".json")
    }
    _refuse_unknown_runs(files)
    drop_runs = drop(runs)
    kept = runs.keys() - drop_runs
    noted = [one for name in kept for one in run_versions(store.run(name) or {})[: rules.versions]]
    manifests = _read_manifests(store, files, progress)
    needed = _needed_manifests(noted, manifests)
    protected = {family for holder in live for family in holder.families}
    protected = protected.union(*map(unfinished_families, noted))

    def is_young(*infos: FileInfo) -> bool:
        return any(_is_young(info, rules.grace) for info in infos)

    stale = {
        key
        for key, manifest in manifests.items()
        if key not in needed and not _families(manifest) & protected and not is_young(files[key])
    }
    needed_parts = _parts_of(manifest for key, manifest in manifests.items() if key not in stale)
    finished_parts = _parts_of(manifests.values())
    dead_leases, claimed = _leases(store, files, {holder.id for holder in live})
    parts: dict[PartKey, list[FileInfo]] = {}
    for key, info in files.items():
        if (part := _part_of(key)) is not None:
            parts.setdefault(part, []).append(info)
    idle = {part for part in parts if part.family not in protected and part.fingerprint not in claimed}
    unneeded = {part for part in idle - needed_parts if not is_young(*parts[part])}
    committed = {part for part in parts if part.record in files}
    without_manifest = unneeded & committed - finished_parts
    removed_parts = unneeded if rules.unfinished else unneeded - without_manifest

    families = {
        key: _families(manifests[f"{_folder(key)}/manifest.json"])
        for key in files
        if f"{_folder(key)}/manifest.json" in stale
    }
    named = {
        key
        for manifest in manifests.values()
        if manifest
        for part in manifest.parts
        for key in (part.key.record, *(file.key for file in part.files))
    }
    families |= {
        info.key: {part.family}
        for part in idle & needed_parts
        for info in parts[part]
        if info.key not in named and not is_young(info) and _is_orphan(store, part, info.key)
    }
    logs = {key for key in files if key.startswith("logs/") and key.split("/")[1] in drop_runs}
    others = families.keys() - stale | dead_leases | logs
    removed = [
        *map(_run_key, drop_runs),
        *stale,
        *others,
        *(info.key for part in removed_parts for info in parts[part]),
    ]
    begun = {stage for one in noted for stage in one.get("families", {})}
    finished = {part.fingerprint for part in committed}
    folders = [
        folder
        for stage, fingerprint, folder in store.work_folders()
        if fingerprint not in claimed and not _is_recent(folder, rules.grace)
        if fingerprint in finished or (rules.unfinished and stage not in begun)
    ]
    records = [part for key in stale if (manifest := manifests[key]) for part in manifest.parts]
    copies = [cache_folder() / "folders" / record.digest for record in records if record.key in removed_parts]
    return GcPlan(
        keep_runs=tuple(sorted(kept)),
        drop_runs=tuple(sorted(drop_runs)),
        manifests=tuple(sorted(stale)),
        parts=_in_order(removed_parts),
        others=tuple(sorted(others)),
        unfinished=_in_order(without_manifest),
        unfinished_bytes=sum(info.bytes for part in without_manifest for info in parts[part]),
        files={key: files[key] for key in sorted(removed)},
        families={key: families.get(key, set()) for key in removed},
        work={folder: _size(folder) for folder in (*folders, *filter(Path.is_dir, copies))},
        kept_bytes=sum(info.bytes for info in files.values()) - sum(files[key].bytes for key in removed),
        rules=rules,
    )


def _in_order(parts: Iterable[PartKey]) -> tuple[PartKey, ...]:
    return tuple(sorted(parts, key=lambda part: part.record))


def _refuse_unknown_runs(files: Mapping[str, FileInfo]) -> None:
    """Raise StoreError where a run's note was set aside and not written anew: what it needs is
    unknown."""
    for key in files:
        if key.startswith("runs/") and key.endswith(".damaged") and f"{key[:-8]}.json" not in files:
            raise StoreError(
                f"{key} is the damaged note of a run, so gc does not know what that run needs. Start the run again: it "
                "finds what it has and is noted anew. Or delete the file to give the run up."
            )


def _is_orphan(store: Store, part: PartKey, key: str) -> bool:
    """Whether a part is committed and this file is not one of it: a killed run left it."""
    with suppress(DamagedError):
        record = store.part(part)
        return record is not None and key not in {part.record, *(file.key for file in record.files)}
    return False


def _is_recent(folder: Path, age: float) -> bool:
    """Whether anything in a folder is younger than `age` seconds."""
    return any(path.lstat().st_mtime > time.time() - age for path in (folder, *folder.rglob("*")))


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _kept_runs(
    runs: Mapping[str, FileInfo], keep: tuple[str, ...], newest: int | None, max_age: float | None
) -> set[str]:
    if missing := sorted(set(keep) - set(runs)):
        raise StoreError(
            f"there is no run {', '.join(missing)} to keep; there is {', '.join(sorted(runs)) or 'none'}."
        )
    if not keep and newest is None and max_age is None:
        return set(runs)
    by_age = sorted(runs, key=lambda name: runs[name].modified or float("inf"), reverse=True)
    kept = set(keep) | set(by_age[: max(0, newest or 0)])
    return kept | {name for name in runs if max_age is not None and _is_young(runs[name], max_age)}


def _read_manifests(
    store: Store, files: Iterable[str], progress: Progress | None
) -> dict[str, Manifest | None]:
    """Every manifest by its key; None for a damaged one."""
    keys = [key for key in files if key.startswith("artifacts/") and key.endswith("/manifest.json")]
    manifests: dict[str, Manifest | None] = {}
    for number, key in enumerate(keys, start=1):
        _, stage, artifact = key.split("/")[:3]
        try:
            manifests[key] = store.manifest(stage, artifact)
        except DamagedError:
            manifests[key] = None
        if progress is not None:
            progress(number, len(keys))
    return manifests


def _needed_manifests(runs: Iterable[Mapping[str, Any]], manifests: dict[str, Manifest | None]) -> set[str]:
    """The manifests that these runs name, and those they were computed from."""
    waiting = [manifest_key(*named) for run in runs for named in named_artifacts(run).items()]
    needed: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key in needed or key not in manifests:
            continue
        needed.add(key)
        manifest = manifests[key]
        if manifest is None:
            raise StoreError(
                f"{key} is damaged, so its parents are unknown. Run `qrpo verify --repair` first."
            )
        waiting += [manifest_key(stage, artifact) for stage, artifact in manifest.parents.items()]
    return needed


def _parts_of(manifests: Iterable[Manifest | None]) -> set[PartKey]:
    return {record.key for manifest in manifests if manifest is not None for record in manifest.parts}


def _families(manifest: Manifest | None) -> set[str]:
    """The families of an artifact's parts; none for a damaged manifest."""
    return set() if manifest is None else {manifest.family, *(record.family for record in manifest.parts)}


def _leases(store: Store, files: Iterable[str], live: set[str]) -> tuple[set[str], set[str]]:
    """The lease files of dead holders, and the fingerprints of the parts that live holders claim.

    A run that is killed between commit and release leaves the claim of a committed part, which no
    run asks for again.
    """
    dead, claimed = set(), set()
    for key in files:
        name = key.rsplit("/", 1)[-1].removesuffix(".json")
        if key.startswith(f"{HOLDERS}/") and name not in live:
            dead.add(key)
        elif key.startswith(f"{CLAIMS}/"):
            if claim_holder(store, key) in live:
                claimed.add(name)
            else:
                dead.add(key)
    return dead, claimed


def _part_of(key: str) -> PartKey | None:
    """The part of a file under parts/ or rejects/."""
    segments = key.split("/")
    if segments[0] == "parts" and len(segments) >= 4:
        return PartKey(segments[1], segments[2], segments[3].split(".")[0])
    if segments[0] == "rejects" and len(segments) == 4:
        return PartKey(segments[1], segments[2], segments[3].rpartition("-")[0] or segments[3])
    return None


def _run_key(name: str) -> str:
    return f"runs/{name}.json"


def _folder(key: str) -> str:
    return key.rsplit("/", 1)[0]


def _is_young(info: FileInfo, age: float) -> bool:
    return info.modified is None or info.modified > time.time() - age
