"""Kills a small run at every crash point, resumes it, and compares with an uninterrupted one. Prints one JSON object.

    python crash_run.py URL kill       at every point: SIGKILL, then resume
    python crash_run.py URL power      at every point: power is cut, in two ways, then resume (local folders)
    python crash_run.py URL twice      at every third point: the resumed run is killed too, at a random point (fixed seed)

Each run happens in a fork of this process, which has imported everything and started nothing. For `power`, the real
calls of os.fsync, link, replace and unlink are recorded in the killed process, and the folder is then put into the
worst state that a disk may be in: contents that were never flushed are gone, and names (given, replaced or removed)
whose folder was not flushed since are as they were before, or, in the second way, as they would be.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import storage
from storage.crashpoints import on_crash_point

REJECTS = storage.rejects_table([{"stage": "rewards", "key": "3", "reason": "NaN"}])


def key(stage: str, number: int) -> storage.PartKey:
    return storage.PartKey(stage, "family", f"part-{number}")


def rewards(number: int, rows: int = 40) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [f"{number}-{row}" for row in range(rows)],
            "sample_index": pa.array([0] * rows, pa.int32()),
            "origin": ["reference"] * rows,
            "reward": pa.array(np.random.default_rng(number).normal(size=rows), pa.float32()),
            "components": pa.nulls(rows),
            "error": pa.nulls(rows, pa.string()),
        }
    )


def pipeline(url: str, computed: Callable[[storage.PartKey], None]) -> None:
    """Parts with and without rejects, a folder, a part that is discarded and made again, manifests, a run."""
    store = storage.Store(url)
    records = []
    for number in (1,) if "://" in url else (0, 1):  # fewer where each run takes a second
        if (record := store.part(key("rewards", number))) is None:
            computed(key("rewards", number))
            rejects = REJECTS if number == 1 else None
            tables = iter([rewards(number)])
            record = store.commit_part(key("rewards", number), tables, rejects=rejects)
        records.append(record)
    store.commit_manifest(storage.manifest_of("rewards", "family", records))
    if "://" not in url and store.part(key("policy", 0)) is None:
        computed(key("policy", 0))
        work = store.work_dir(key("policy", 0))
        (work / "config.json").write_text("{}")
        (work / "model.bin").write_bytes(bytes(1000))
        record = store.commit_folder(key("policy", 0), work)
    store.clear_work(key("policy", 0))
    if store.run("run") is None:
        old = store.part(key("metrics", 0)) or store.commit_part(
            key("metrics", 0), pa.table({"version": [1]})
        )
        if store.read_part(old)["version"].to_pylist() == [1]:
            store.commit_part(key("metrics", 0), pa.table({"version": [2]}), replace=True)
        store.write_run("run", {"stages": {}})


def in_fork(url: str, kill_at: int | None, record: Path | None = None) -> tuple[int, list[str]]:
    """Exit status of one run in a process of its own, killed at that point, and the parts that it computed."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def reached(name: str, point_key: str) -> None:
                nonlocal count
                if count == kill_at:
                    if record is not None:
                        recorder.save(record)
                    os.write(write_end, f"@{name} {point_key}\n".encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

            recorder = Recorder(Path(url), record.parent / "graveyard") if record else None
            on_crash_point(reached)
            pipeline(url, lambda part: os.write(write_end, f"{part.record}\n".encode()) and None)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    return status, lines


class Recorder:
    """Notes what is safe on the disk, by the calls that are really made."""

    def __init__(self, root: Path, graveyard: Path) -> None:
        graveyard.mkdir(parents=True, exist_ok=True)
        self.root, self.graveyard = str(root), graveyard
        self.flushed: dict[int, int] = {}  # inode -> bytes on the disk
        self.pending: dict[
            str, str | None
        ] = {}  # path -> what the disk's name still leads to (None: nothing)
        self.count = 0
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
    for name in store.list("parts"):
        if is_record(name):
            stage, family, fingerprint = name.removeprefix("parts/").removesuffix(".json").split("/")
            record = store.part(storage.PartKey(stage, family, fingerprint))
            assert record is not None
            for entry in record.files:
                data = store.read_bytes(entry.key)
                assert hashlib.sha256(data).hexdigest() == entry.sha256, f"{entry.key} is damaged"
            paths = [
                store.local_path(entry) for entry in (record.key.record, *(file.key for file in record.files))
            ]
            found[name] = [
                (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path is not None
            ]
    return found


def contents(url: str) -> dict[str, str]:
    """Key -> sha256 of every file, without the times in records and manifests."""
    store = storage.Store(url)
    found = {}
    for name in store.list():
        data = store.read_bytes(name)
        if is_record(name) or name.endswith("manifest.json"):
            value = json.loads(data)
            for part in [value, *value.get("parts", [])]:
                del part["created"]
            value.pop("sha256")
            data = json.dumps(value, sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def is_record(name: str) -> bool:
    return name.startswith("parts/") and name.endswith(".json") and name.count("/") == 3


def main(url: str, mode: str) -> None:
    status, _ = in_fork(f"{url}/uninterrupted", None)
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
            status, lines = in_fork(place, at, record)
            if status == 0:
                sys.stdout.write(json.dumps({**totals, "names": names}))
                return
            assert os.WIFSIGNALED(status), f"point {at} ended with {status}"
            assert os.WTERMSIG(status) == signal.SIGKILL
            name = lines[-1].removeprefix("@")
            names[name.split()[0]] = names.get(name.split()[0], 0) + 1
            if record is not None:
                cut_power(Path(place), record, bool(names_survive))
            if mode == "twice":
                in_fork(place, random_point.randrange(30))
            before = committed(place)
            status, computed_again = in_fork(place, None)
            same = contents(place) == expected
            if not same:
                differs = contents(place).items() ^ expected.items()
                sys.stderr.write(f"point {at} {name}: differs in {differs}\n")
            after = committed(place)
            totals["points"] += 1
            totals["resumed"] += status == 0
            totals["identical"] += same
            totals["recomputed"] += len(set(computed_again) & set(before))
            totals["rewritten"] += sum(
                after[part] != before[part] for part in before if "/metrics/" not in part
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
