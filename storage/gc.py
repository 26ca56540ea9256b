"""Garbage collection: a plan of what no run needs, with keys and sizes, and its execution.

A plan keeps

- manifests that a kept run names, and the manifests they were computed from;
- the parts of every kept manifest;
- the families that a live run protects by its heartbeat;
- files younger than a grace period, because a run without a heartbeat may be writing them.

Everything else is removed, manifests before parts, so that a kill leaves no manifest without its parts.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from storage.artifact import named_artifacts
from storage.errors import DamagedError, StoreError
from storage.files import FileInfo, LocalFiles
from storage.leases import CLAIMS, HOLDERS, Watch, claim_holder
from storage.manifest import Manifest, manifest_key
from storage.parts import PartKey
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
    bytes: int
    kept_bytes: int

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys to remove; for a part, the key of its record."""
        return (*self.single_files, *(key.record for key in self.parts))

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
    progress: Progress | None = None,
) -> GcPlan:
    """Plan what to remove. Without a rule every run is kept.

    With rules, a run is kept if it is in `keep_runs`, among the `newest` N, or younger than `max_age`
    seconds. Nothing younger than `grace` seconds is removed. `progress` gets the number of manifests
    read so far and their total. Raises StoreError where a kept run is missing or cannot be read.
    """
    files = {info.key: info for info in store.listing()}
    runs = {
        key[5:-5]: info for key, info in files.items() if key.startswith("runs/") and key.endswith(".json")
    }
    live, families = _live_holders(store, files)
    kept = _kept_runs(runs, tuple(keep_runs), newest, max_age)
    manifests = _read_manifests(store, files, progress)
    needed = _needed_manifests(store, kept, manifests)
    stale = {
        key
        for key, manifest in manifests.items()
        if key not in needed
        and not (manifest is not None and manifest.family in families)
        and not _is_young(files[key], grace)
    }
    needed_parts = {
        record.key
        for key, manifest in manifests.items()
        if manifest is not None and key not in stale
        for record in manifest.parts
    }
    dead_leases, claimed = _leases(store, files, live)

    parts: dict[PartKey, list[FileInfo]] = {}
    for key, info in files.items():
        if (part := _part_of(key)) is not None:
            parts.setdefault(part, []).append(info)
    removed_parts = {
        part: infos
        for part, infos in parts.items()
        if part not in needed_parts
        and part.family not in families
        and part.fingerprint not in claimed
        and not any(_is_young(info, grace) for info in infos)
    }
    stale_folders = {_folder(key) for key in stale}
    others = {key for key in files if key not in stale and _folder(key) in stale_folders} | dead_leases
    drop_runs = set(runs) - kept
    removed = stale | others | {_run_key(name) for name in drop_runs}
    removed |= {info.key for infos in removed_parts.values() for info in infos}
    size = sum(files[key].bytes for key in removed)
    return GcPlan(
        keep_runs=tuple(sorted(kept)),
        drop_runs=tuple(sorted(drop_runs)),
        manifests=tuple(sorted(stale)),
        parts=tuple(sorted(removed_parts, key=lambda part: part.record)),
        others=tuple(sorted(others)),
        bytes=size,
        kept_bytes=sum(info.bytes for info in files.values()) - size,
    )


def collect(store: Store, plan: GcPlan, progress: Progress | None = None) -> int:
    """Execute a plan; returns the bytes freed. Families protected since the plan stay.

    `progress` gets the number of keys processed so far and their total.
    """
    total = len(plan.keys)
    for done, key in enumerate(plan.single_files, start=1):
        store.delete(key)
        if progress is not None:
            progress(done, total)
    families = {family for holder in Watch(store).holders() for family in holder.families}
    for done, part in enumerate(plan.parts, start=len(plan.single_files) + 1):
        if part.family not in families:
            store.discard_part(part)
        if progress is not None:
            progress(done, total)
    swept = store.files.sweep(_TEMPORARY_AGE) if isinstance(store.files, LocalFiles) else ()
    return plan.bytes + sum(info.bytes for info in swept)


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


def _needed_manifests(store: Store, runs: Iterable[str], manifests: dict[str, Manifest | None]) -> set[str]:
    """The manifests that these runs name, and those they were computed from."""
    waiting = [
        manifest_key(*named) for name in runs for named in named_artifacts(store.run(name) or {}).items()
    ]
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
