"""Garbage collection: a plan of what no run needs, with keys and sizes, and its execution.

A plan keeps

- manifests that a kept run names, and the manifests they were computed from;
- the parts of every kept manifest;
- the families that a kept run notes for its unfinished stages;
- the families that a live run protects by its heartbeat;
- committed parts that no manifest lists, unless `unfinished` is set: a stage that was killed left them;
- files younger than a grace period, because a run without a heartbeat may be writing them.

Other parts, manifests, dropped runs with their logs, and dead leases are removed, manifests before parts,
so that a kill leaves no manifest without its parts. So is what killed runs left: files of a part that its
record does not name (a second copy of a model), work folders of committed parts, temporary files, and
copies of removed models in the user's cache. `families/` and `answers/` are never touched.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.artifact import named_artifacts, run_versions, unfinished_families
from storage.errors import DamagedError, StoreError
from storage.files import FileInfo
from storage.leases import CLAIMS, HOLDERS, Watch, claim_holder
from storage.manifest import Manifest, manifest_key
from storage.parts import PartKey
from storage.processes import cache_folder
from storage.store import Store

__all__ = ["GcPlan", "collect", "plan_gc"]

_DEAD_AFTER = 3600.0  # seconds without a heartbeat; more than the clocks of two machines may differ
_TEMPORARY_AGE = 24 * 3600.0  # seconds

Progress = Callable[[int, int], None]


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
    work: Mapping[Path, int]
    """Folders on this machine to remove, and their sizes: work folders, copies of models."""
    kept_bytes: int
    versions: int | None
    """How many versions of each kept run are kept; None: all."""

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

    With rules, a run is kept if it is in `keep_runs`, among the `newest` N, or younger than `max_age`
    seconds. Nothing younger than `grace` seconds is removed. `unfinished` also removes the parts of
    stages that were never finished, except those of kept and live runs. Of a kept run all `versions` are
    kept, or the newest N (one for each configuration that had its name). `progress` gets the number of
    manifests read so far and their total. Raises StoreError where a kept run is missing or cannot be
    read.
    """
    files = {info.key: info for info in store.listing() if not info.key.startswith("work/")}
    runs = {
        key[5:-5]: info for key, info in files.items() if key.startswith("runs/") and key.endswith(".json")
    }
    _refuse_unknown_runs(files)
    live, families = _live_holders(store, files)
    kept = _kept_runs(runs, tuple(keep_runs), newest, max_age)
    manifests = _read_manifests(store, files, progress)
    noted = _versions(store, kept, versions)
    families = families.union(*map(unfinished_families, noted))
    needed = _needed_manifests(noted, manifests)
    stale = {
        key
        for key, manifest in manifests.items()
        if key not in needed and not (_families(manifest) & families) and not _is_young(files[key], grace)
    }
    needed_parts = _parts_of(manifest for key, manifest in manifests.items() if key not in stale)
    finished_parts = _parts_of(manifests.values())
    dead_leases, claimed = _leases(store, files, live)

    parts: dict[PartKey, list[FileInfo]] = {}
    for key, info in files.items():
        if (part := _part_of(key)) is not None:
            parts.setdefault(part, []).append(info)
    unneeded = {
        part: infos
        for part, infos in parts.items()
        if part not in needed_parts
        and part.family not in families
        and part.fingerprint not in claimed
        and not any(_is_young(info, grace) for info in infos)
    }
    without_manifest = {
        part: infos
        for part, infos in unneeded.items()
        if part not in finished_parts and part.record in (info.key for info in infos)
    }
    removed_parts = {
        part: infos for part, infos in unneeded.items() if unfinished or part not in without_manifest
    }
    stale_folders = {_folder(key) for key in stale}
    others = {key for key in files if key not in stale and _folder(key) in stale_folders} | dead_leases
    drop_runs = set(runs) - kept
    others |= {key for key in files if key.startswith("logs/") and key.split("/")[1] in drop_runs}
    named = {
        file.key
        for manifest in manifests.values()
        if manifest
        for part in manifest.parts
        for file in part.files
    }
    others |= {
        info.key
        for part in (needed_parts & parts.keys()) - removed_parts.keys()
        if part.family not in families and part.fingerprint not in claimed
        for info in parts[part]
        if info.key not in named and not _is_young(info, grace) and _is_orphan(store, part, info.key)
    }
    removed = stale | others | {_run_key(name) for name in drop_runs}
    removed |= {info.key for infos in removed_parts.values() for info in infos}
    size = sum(files[key].bytes for key in removed)
    begun = {stage for run in noted for stage in run.get("families", {})}
    committed = {part.fingerprint for part in parts if part.record in files}
    work = {
        folder: _size(folder)
        for stage, fingerprint, folder in store.work_folders()
        if fingerprint not in claimed and not _is_recent(folder, grace)
        if fingerprint in committed or (unfinished and stage not in begun)
    }
    records = [part for key in stale if (manifest := manifests[key]) for part in manifest.parts]
    copies = [cache_folder() / "folders" / record.digest for record in records if record.key in removed_parts]
    work |= {folder: _size(folder) for folder in copies if folder.is_dir()}
    return GcPlan(
        keep_runs=tuple(sorted(kept)),
        drop_runs=tuple(sorted(drop_runs)),
        manifests=tuple(sorted(stale)),
        parts=tuple(sorted(removed_parts, key=lambda part: part.record)),
        others=tuple(sorted(others)),
        unfinished=tuple(sorted(without_manifest, key=lambda part: part.record)),
        unfinished_bytes=sum(info.bytes for infos in without_manifest.values() for info in infos),
        files={key: files[key] for key in sorted(removed)},
        work=work,
        kept_bytes=sum(info.bytes for info in files.values()) - size,
        versions=versions,
    )


def collect(store: Store, plan: GcPlan, progress: Progress | None = None) -> int:
    """Execute a plan; returns the bytes freed.

    What a run has come to need since the plan stays: runs and manifests are read again first, and
    heartbeats before each removal. `progress` gets the number of keys processed so far and their total.
    """
    total = len(plan.keys)
    guard = _Guard(store, plan)
    spared: set[str] = set()
    for done, key in enumerate(plan.single_files, start=1):
        if guard.needs_file(key):
            spared.add(key)
        else:
            store.delete(key)
        if progress is not None:
            progress(done, total)
    spared_parts = set()
    for done, part in enumerate(plan.parts, start=len(plan.single_files) + 1):
        if guard.needs_part(part):
            spared_parts.add(part)
        else:
            store.discard_part(part)
        if progress is not None:
            progress(done, total)
    freed = [
        info.bytes
        for key, info in plan.files.items()
        if key not in spared and _part_of(key) not in spared_parts
    ]
    for done, (folder, size) in enumerate(plan.work.items(), start=total - len(plan.work) + 1):
        if not guard.needs_work(folder):
            shutil.rmtree(folder, ignore_errors=True)
            freed.append(size)
        if progress is not None:
            progress(done, total)
    return sum(freed) + sum(info.bytes for info in store.files.sweep(_TEMPORARY_AGE))


class _Guard:
    """What runs need while a plan is executed.

    The heartbeats are read before the runs and manifests. A run keeps its heartbeat until it has
    written its manifest and its note, so one of the two shows each part that it needs. A family that
    was protected once stays protected.
    """

    def __init__(self, store: Store, plan: GcPlan) -> None:
        self._store = store
        self._watch = Watch(store)
        self._dead = set(plan.others)
        self._families: set[str] = set()
        self._look()
        runs = {info.key: info for info in store.listing("runs")}
        dropped = {_run_key(name) for name in plan.drop_runs}
        self._changed_runs = {key for key in dropped if key in runs and runs[key] != plan.files[key]}
        kept = [
            key[5:-5] for key in runs if key.endswith(".json") and key not in dropped - self._changed_runs
        ]
        noted = _versions(store, kept, plan.versions)
        self._families = self._families.union(*map(unfinished_families, noted))
        manifests = _read_manifests(store, [info.key for info in store.listing("artifacts")], None)
        needed = _needed_manifests(noted, manifests)
        planned = set(plan.manifests)
        self._family_of = {key: _families(manifests.get(key)) for key in planned}
        self._manifests = {_folder(key) for key in needed}
        self._parts = _parts_of(
            manifest for key, manifest in manifests.items() if key in needed or key not in planned
        )

    def needs_file(self, key: str) -> bool:
        """Whether a run needs the manifest, or the file next to it, or has changed its note."""
        self._look()
        if key.startswith(f"{CLAIMS}/"):  # another run may have taken it over
            return claim_holder(self._store, key) in self._live
        if key in self._changed_runs or _folder(key) in self._manifests:
            return True
        if (part := _part_of(key)) is not None:
            return part.family in self._families or not _is_orphan(self._store, part, key)
        families = self._family_of.get(f"{_folder(key)}/manifest.json", set())
        return bool(families & self._families)

    def needs_part(self, part: PartKey) -> bool:
        """Whether a run needs the part."""
        self._look()
        return part in self._parts or part.family in self._families

    def needs_work(self, folder: Path) -> bool:
        """Whether a run has claimed the part of a work folder since."""
        claim = f"{CLAIMS}/{folder.parent.name}/{folder.name}.json"
        return claim not in self._dead and claim_holder(self._store, claim) is not None

    def _look(self) -> None:
        live = [holder for holder in self._watch.holders() if holder.key not in self._dead]
        self._live = {holder.id for holder in live}
        self._families |= {family for holder in live for family in holder.families}


def _refuse_unknown_runs(files: Mapping[str, FileInfo]) -> None:
    """Raise StoreError where a run's note was set aside and not written anew: what it needs is unknown."""
    for key in files:
        if key.startswith("runs/") and key.endswith(".damaged") and f"{key[:-8]}.json" not in files:
            raise StoreError(
                f"{key} is the damaged note of a run, so gc does not know what that run needs. Start the run again: it "
                "finds what it has and is noted anew. Or delete the file to give the run up."
            )


def _is_orphan(store: Store, part: PartKey, key: str) -> bool:
    """Whether a part is committed and this file is not one of it: a killed run left it."""
    try:
        record = store.part(part)
    except DamagedError:
        return False
    return record is not None and key not in {part.record, *(file.key for file in record.files)}


def _is_recent(folder: Path, age: float) -> bool:
    """Whether anything in a folder is younger than `age` seconds."""
    return any(path.lstat().st_mtime > time.time() - age for path in (folder, *folder.rglob("*")))


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _kept_runs(
    runs: dict[str, FileInfo], keep: tuple[str, ...], newest: int | None, max_age: float | None
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


def _versions(store: Store, runs: Iterable[str], newest: int | None) -> list[Mapping[str, Any]]:
    """The `newest` versions of each of these runs, or all."""
    return [version for name in runs for version in run_versions(store.run(name) or {})[:newest]]


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


def _live_holders(store: Store, files: dict[str, FileInfo]) -> tuple[set[str], set[str]]:
    """The ids of the holders that may be alive, and the families that they protect.

    A holder on another machine counts as dead after a silence longer than any difference of clocks.
    """
    live = [
        holder
        for holder in Watch(store).holders()
        if holder.key not in files or _is_young(files[holder.key], max(_DEAD_AFTER, 2 * holder.ttl))
    ]
    return {holder.id for holder in live}, {family for holder in live for family in holder.families}


def _leases(store: Store, files: Iterable[str], live: set[str]) -> tuple[set[str], set[str]]:
    """The lease files of dead holders, and the fingerprints of the parts that live holders claim.

    A run that is killed between commit and release leaves the claim of a committed part, which no run
    asks for again.
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
