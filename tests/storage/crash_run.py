"""Kills a small run at every crash point, resumes it, and compares with an uninterrupted run. Prints one JSON object.

    python -m tests.storage.crash_run URL kill     at every point: SIGKILL, then resume
    python -m tests.storage.crash_run URL power    at every point: a power cut, in two ways, then resume (local folders)
    python -m tests.storage.crash_run URL twice    at every third point: the resumed run is killed too, at a random point

Each run is a fork of this process, which has imported everything and started nothing. For `power`, the
killed process records its real calls of os.fsync, link, replace and unlink. The folder is then put
into the worst state that a disk may have: contents that were never flushed are lost, and names whose
folder was not flushed since are as before the call, or, in the second way, as after it.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

import storage
from tests.support.crashes import in_fork, timeless
from tests.support.storage import REJECTS, SCORES, scores


def key(stage: str, number: int) -> storage.PartKey:
    return storage.PartKey(stage, "family", f"part-{number}")


def pipeline(url: str, computed: Callable[[str], object]) -> None:
    """Parts with and without rejects, a folder, a part that is replaced, manifests, a run."""
    store = storage.Store(url)
    records = []
    for number in (1,) if "://" in url else (0, 1):  # fewer where each run takes a second
        part = key("rewards", number)
        if (record := store.part(part)) is None:
            computed(part.record)
            rejects = REJECTS if number == 1 else None
            tables = iter([scores(40, seed=number)])
            record = store.commit_part(part, tables, table=SCORES, rejects=rejects)
        records.append(record)
    store.commit_manifest(storage.manifest_of("rewards", "family", records))
    policy = key("policy", 0)
    if "://" not in url and store.part(policy) is None:
        computed(policy.record)
        work = store.work_dir(policy)
        (work / "config.json").write_text("{}")
        (work / "model.bin").write_bytes(bytes(1000))
        store.commit_folder(policy, work)
    store.clear_work(policy)
    if store.run("run") is None:
        metrics = key("metrics", 0)
        old = store.part(metrics) or store.commit_part(metrics, pa.table({"version": [1]}))
        if store.read_part(old)["version"].to_pylist() == [1]:
            store.commit_part(metrics, pa.table({"version": [2]}), replace=True)
        store.write_run("run", {"stages": {}})


def run(url: str, kill_at: int | None = None, record: Path | None = None) -> tuple[int, list[str]]:
    """The exit code and the reports of one run, killed at that point. With `record`, its calls are saved there."""
    recorder = Recorder(Path(url), record.parent / "graveyard") if record else None

    def work(report: Callable[[str], object]) -> None:
        if recorder is not None:
            recorder.install()
        pipeline(url, report)

    return in_fork(work, kill_at, (lambda: recorder.save(record)) if recorder and record else None)


class Recorder:
    """Records what is safe on the disk, from the real calls of this process."""

    def __init__(self, root: Path, graveyard: Path) -> None:
        graveyard.mkdir(parents=True, exist_ok=True)
        self.root, self.graveyard = str(root), graveyard
        self.flushed: dict[int, int] = {}  # inode -> bytes on the disk
        self.pending: dict[str, str | None] = {}  # path -> what the name on the disk leads to
        self.count = 0

    def install(self) -> None:
        """Replace the functions of `os` by ones that record."""
        real = {name: getattr(os, name) for name in ("fsync", "link", "replace", "unlink", "mkdir")}
        self.link = real["link"]

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            status = os.fstat(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if os.path.isdir(path):
                for name in [name for name in self.pending if os.path.dirname(name) == path]:
                    del self.pending[name]
            else:
                self.flushed[status.st_ino] = status.st_size

        def link(source: Any, target: Any, **kwargs: Any) -> None:
            real["link"](source, target, **kwargs)
            self.pending.setdefault(str(target), None)

        def replace(source: Any, target: Any) -> None:
            self.bury(str(target))
            real["replace"](source, target)

        def unlink(path: Any, **kwargs: Any) -> None:
            if os.path.exists(path) and not kwargs:
                self.bury(str(path))
            real["unlink"](path, **kwargs)

        def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
            real["mkdir"](path, *args, **kwargs)
            self.pending.setdefault(str(path), None)

        os.fsync, os.link, os.replace, os.unlink, os.mkdir = fsync, link, replace, unlink, mkdir

    def bury(self, path: str) -> None:
        if not path.startswith(self.root) or path in self.pending:
            return
        buried = None
        if os.path.exists(path):
            self.count += 1
            buried = str(self.graveyard / str(self.count))
            self.link(path, buried)
        self.pending[path] = buried

    def save(self, path: Path) -> None:
        state = {"flushed": self.flushed, "pending": self.pending}
        with open(path, "w") as file:
            json.dump(state, file)


def cut_power(root: Path, record: Path, names_survive: bool) -> None:
    """Put the folder into the worst state that the disk may be in after the recorded calls."""
    state = json.loads(record.read_text())
    flushed = {int(inode): size for inode, size in state["flushed"].items()}
    for path in [
        path for path in root.rglob("*") if path.is_file() and "work" not in path.relative_to(root).parts
    ]:
        status = path.stat()
        if flushed.get(status.st_ino, 0) < status.st_size:
            os.truncate(path, flushed.get(status.st_ino, 0))
    if names_survive:
        return
    for name, before in sorted(state["pending"].items(), key=lambda item: -len(item[0])):
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if before is not None and path.parent.is_dir():
            os.link(before, path)
    for path in root.rglob(".tmp-*"):
        path.unlink()


def committed(url: str) -> dict[str, Any]:
    """Every committed part of a store, after checking all its files' digests; and what identifies them on a disk."""
    store = storage.Store(url)
    found: dict[str, Any] = {}
    for name in filter(is_record, store.list("parts")):
        record = store.part(storage.PartKey(*name.removesuffix(".json").split("/")[1:]))
        assert record is not None
        for entry in record.files:
            digest = hashlib.sha256(store.read_bytes(entry.key)).hexdigest()
            assert digest == entry.sha256, f"{entry.key} is damaged"
        paths = [store.local_path(key) for key in (name, *(file.key for file in record.files))]
        found[name] = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path is not None]
    return found


def contents(url: str) -> dict[str, str]:
    """Key -> sha256 of every file, without the times in records and manifests."""
    store = storage.Store(url)
    found = {}
    for name in store.list():
        data = store.read_bytes(name)
        if is_record(name) or name.endswith("manifest.json"):
            data = json.dumps(timeless(json.loads(data)), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def is_record(name: str) -> bool:
    return name.startswith("parts/") and name.endswith(".json") and name.count("/") == 3


def main(url: str, mode: str) -> None:
    status, _ = run(f"{url}/uninterrupted")
    assert status == 0
    expected = contents(f"{url}/uninterrupted")
    names: dict[str, int] = {}
    totals = {"points": 0, "resumed": 0, "identical": 0, "recomputed": 0, "rewritten": 0}
    random_point = random.Random(0)
    variants = {"kill": [None], "twice": [None], "power": [False, True]}[mode]
    for at in range(0, 10_000, 3 if mode == "twice" else 1):
        for names_survive in variants:
            place = f"{url}/{at}-{names_survive}"
            record = None if names_survive is None else Path(f"{place}.state", "calls.json")
            status, reports = run(place, at, record)
            if status == 0:
                sys.stdout.write(json.dumps({**totals, "names": names}))
                return
            assert status == -signal.SIGKILL, f"point {at} ended with {status}"
            point = reports[-1].removeprefix("@")
            name = point.split()[0]
            names[name] = names.get(name, 0) + 1
            if record is not None:
                cut_power(Path(place), record, bool(names_survive))
            if mode == "twice":
                run(place, random_point.randrange(30))
            before = committed(place)
            status, computed_again = run(place)
            differs = contents(place).items() ^ expected.items()
            if differs:
                sys.stderr.write(f"point {at} {point}: differs in {differs}\n")
            after = committed(place)
            totals["points"] += 1
            totals["resumed"] += status == 0
            totals["identical"] += not differs
            totals["recomputed"] += len(set(computed_again) & set(before))
            totals["rewritten"] += sum(
                after[part] != before[part] for part in before if "/metrics/" not in part
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
