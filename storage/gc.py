"""Removing what no run needs. First a plan with keys and sizes, that changes nothing; then its execution.

Kept is what a kept run names, with everything that it was made from; the parts of an artifact that is kept; what a
living run is making (it protects its families by its heartbeat); and whatever is younger than a grace time, as a run
of an older kind may be making it. All else goes: manifests first, then parts, so that a kill in between leaves no
manifest that lists a part that is gone.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from storage.artifact import named_artifacts
from storage.errors import DamagedError, StoreError
from storage.files import FileInfo, LocalFiles
from storage.leases import CLAIMS, HOLDERS, Holder, Watch, claim_holder
from storage.manifest import Manifest, manifest_key
from storage.parts import PartKey
from storage.store import Store

__all__ = ["GcPlan", "collect", "plan_gc", "usage"]


_LONG_SILENT = 3600.0  # seconds


@dataclass(frozen=True)
class GcPlan:
    """What would go, and what would stay. Sizes in bytes."""

    keep_runs: tuple[str, ...]
    drop_runs: tuple[str, ...]
    manifests: tuple[str, ...]
    parts: tuple[PartKey, ...]
    others: tuple[str, ...]
    bytes: int
    kept_bytes: int

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all that would go; for a part its record's."""
        runs = tuple(f"runs/{name}.json" for name in self.drop_runs)
        return (*runs, *self.manifests, *(key.record for key in self.parts), *self.others)


def plan_gc(
    store: Store,
    *,
    keep_runs: Iterable[str] = (),
    newest: int | None = None,
    max_age: float | None = None,
    grace: float = 3600.0,
    progress: Callable[[int, int], None] | None = None,
) -> GcPlan:
    """What can go. Without rules every run is kept, and only what no run needs goes.

    With rules a run is kept where one of them says so: it is named in `keep_runs`, among the `newest` so many, or
    younger than `max_age` seconds. Nothing younger than `grace` seconds goes. `progress` is told how many manifests of
    how many were read. Raises StoreError for a run to be kept
    that is not there, or that cannot be read: better nothing goes than too much.
    """
    files = {info.key: info for info in store.listing()}
    runs = {
        key[5:-5]: info for key, info in files.items() if key.startswith("runs/") and key.endswith(".json")
    }
    kept = _kept_runs(runs, tuple(keep_runs), newest, max_age)
    needed = _needed(store, kept, files)
    living = [holder for holder in Watch(store).holders() if not _fell_silent(holder, files.get(holder.key))]
    families = {family for holder in living for family in holder.families}
    young = time.time() - grace

    manifests = [key for key in files if key.startswith("artifacts/") and key.endswith("/manifest.json")]
    stale = [
        key
        for key in manifests
        if key not in needed and not _is_young(files[key], young) and not _is_protected(store, key, families)
    ]
    needed_parts = set[PartKey]()
    staying = set(manifests) - set(stale)
    for number, key in enumerate(staying, start=1):
        manifest = _manifest(store, key)
        needed_parts |= {record.key for record in manifest.parts} if manifest else set()
        if progress is not None:
            progress(number, len(staying))
    dead_leases, claimed = _leases(store, files, {holder.id for holder in living})

    doomed: dict[PartKey, list[FileInfo]] = {}
    for key, info in files.items():
        part = _part_of(key)
        if part is not None:
            doomed.setdefault(part, []).append(info)
    for part in list(doomed):
        needed_now = part in needed_parts or part.family in families or part.fingerprint in claimed
        if needed_now or any(_is_young(info, young) for info in doomed[part]):
            del doomed[part]
    beside = {key.removesuffix("manifest.json") for key in stale}
    others = [
        key for key in files if key not in stale and key.startswith("artifacts/") and _folder(key) in beside
    ]
    others += dead_leases
    gone = {*stale, *others, *(f"runs/{name}.json" for name in set(runs) - kept)}
    gone |= {info.key for infos in doomed.values() for info in infos}
    size = sum(files[key].bytes for key in gone)
    return GcPlan(
        keep_runs=tuple(sorted(kept)),
        drop_runs=tuple(sorted(set(runs) - kept)),
        manifests=tuple(sorted(stale)),
        parts=tuple(sorted(doomed, key=lambda part: part.record)),
        others=tuple(sorted(others)),
        bytes=size,
        kept_bytes=sum(info.bytes for info in files.values()) - size,
    )


def collect(store: Store, plan: GcPlan, progress: Callable[[int, int], None] | None = None) -> int:
    """Carry a plan out; the bytes that it freed. What a run began to make since the plan stays.

    `progress` is told how many keys of how many are done.
    """
    total = len(plan.keys)
    whole = (*(f"runs/{name}.json" for name in plan.drop_runs), *plan.manifests, *plan.others)
    for done, key in enumerate(whole, start=1):
        store.delete(key)
        if progress is not None:
            progress(done, total)
    families = {family for holder in Watch(store).holders() for family in holder.families}
    for done, part in enumerate(plan.parts, start=len(whole) + 1):
        if part.family not in families:
            store.discard_part(part)
        if progress is not None:
            progress(done, total)
    swept = 0
    if isinstance(store.files, LocalFiles):
        swept = sum(info.bytes for info in store.files.sweep(older_than=24 * 3600))
    return plan.bytes + swept


def usage(store: Store) -> dict[str, int]:
    """Bytes by kind of file, by a listing: parts, rejects, artifacts, runs, leases, work."""
    sizes: dict[str, int] = {}
    for info in store.listing():
        kind = info.key.split("/")[0]
        sizes[kind] = sizes.get(kind, 0) + info.bytes
    return sizes


def _kept_runs(
    runs: dict[str, FileInfo], keep: tuple[str, ...], newest: int | None, max_age: float | None
) -> set[str]:
    missing = sorted(set(keep) - set(runs))
    if missing:
        raise StoreError(
            f"there is no run {', '.join(missing)} to keep; there is {', '.join(sorted(runs)) or 'none'}."
        )
    if not keep and newest is None and max_age is None:
        return set(runs)
    by_age = sorted(runs, key=lambda name: runs[name].modified or float("inf"), reverse=True)
    kept = set(keep) | set(by_age[: max(0, newest or 0)])
    if max_age is not None:
        kept |= {name for name in runs if _is_young(runs[name], time.time() - max_age)}
    return kept


def _needed(store: Store, runs: Iterable[str], files: dict[str, FileInfo]) -> set[str]:
    """The manifests that these runs name, and those that they were made from."""
    waiting: list[str] = []
    for name in runs:
        waiting += [manifest_key(*named) for named in named_artifacts(store.run(name) or {}).items()]
    needed: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key in needed or key not in files:
            continue
        needed.add(key)
        manifest = _manifest(store, key)
        if manifest is None:
            raise StoreError(
                f"{key} is damaged, so what it was made from cannot be known. Run `qrpo verify --repair` first."
            )
        waiting += [manifest_key(stage, artifact) for stage, artifact in manifest.parents.items()]
    return needed


def _manifest(store: Store, key: str) -> Manifest | None:
    try:
        return store.manifest(key.split("/")[1], key.split("/")[2])
    except DamagedError:
        return None


def _is_protected(store: Store, key: str, families: set[str]) -> bool:
    if not families:
        return False
    manifest = _manifest(store, key)
    return manifest is not None and manifest.family in families


def _part_of(key: str) -> PartKey | None:
    """The part that a file under parts/ or rejects/ belongs to."""
    segments = key.split("/")
    if segments[0] == "parts" and len(segments) >= 4:
        return PartKey(segments[1], segments[2], segments[3].split(".")[0])
    if segments[0] == "rejects" and len(segments) == 4:
        return PartKey(segments[1], segments[2], segments[3].rpartition("-")[0] or segments[3])
    return None


def _leases(store: Store, files: dict[str, FileInfo], living: set[str]) -> tuple[list[str], set[str]]:
    """The files of leases whose holder is not among the living, and the fingerprints of parts claimed by those that are.

    Claims of committed parts are among the first: a run that was killed between commit and release leaves one, and nobody asks
    for it again.
    """
    dead, claimed = [], set()
    for key in files:
        name = key.rsplit("/", 1)[-1].removesuffix(".json")
        if key.startswith(f"{HOLDERS}/") and name not in living:
            dead.append(key)
        elif key.startswith(f"{CLAIMS}/"):
            if claim_holder(store, key) in living:
                claimed.add(name)
            else:
                dead.append(key)
    return dead, claimed


def _fell_silent(holder: Holder, heartbeat: FileInfo | None) -> bool:
    """Whether a holder is dead though it may have run elsewhere: silent for longer than any two clocks differ by."""
    silence = max(_LONG_SILENT, 2 * holder.ttl)
    return heartbeat is not None and not _is_young(heartbeat, time.time() - silence)


def _folder(key: str) -> str:
    return key.rsplit("/", 1)[0] + "/"


def _is_young(info: FileInfo, limit: float) -> bool:
    return info.modified is None or info.modified > limit
