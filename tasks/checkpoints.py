"""Training checkpoints in the store, where that is not on this machine's disk: another machine goes on from them.

    work/<stage>/<fingerprint>/checkpoint-<step>/<file>      the marker `whole.json` is written last and deleted first

The newest is kept, and the best where training stops early. All go once the part is committed.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from qrpo.training.checkpoints import MARKER, latest_checkpoint
from storage import PartKey, Store


def keep_checkpoints(store: Store, key: PartKey, folder: Path) -> None:
    """Bring the store's checkpoints of a part to those of its work folder."""
    if store.local_path(key.record) is not None:
        return
    local = {path.parent.name: path.parent for path in folder.glob(f"checkpoint-*/{MARKER}")}
    newest = latest_checkpoint(folder)
    stored = _stored(store, key)
    for name, path in local.items():
        if path == newest or f"{name}/{MARKER}" not in stored:
            _delete(store, key, (file for file in stored if file.startswith(f"{name}/")))
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
            for file in (*files, path / MARKER):
                store.files.copy_from(f"{_root(key)}/{name}/{file.relative_to(path).as_posix()}", file)
    _delete(store, key, (file for file in stored if file.partition("/")[0] not in local))


def fetch_checkpoints(store: Store, key: PartKey, folder: Path) -> None:
    """Bring the store's complete checkpoints into the work folder, where their newest is newer than its own."""
    if store.local_path(key.record) is not None:
        return
    stored = _stored(store, key)
    whole = [file.partition("/")[0] for file in stored if file.endswith(f"/{MARKER}")]
    newest = latest_checkpoint(folder)
    if max(map(_step, whole), default=0) <= (0 if newest is None else _step(newest.name)):
        return
    for name in whole:
        shutil.rmtree(folder / name, ignore_errors=True)
        for file in sorted((file for file in stored if file.startswith(f"{name}/")), key=_marker_last):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with store.open_input(f"{_root(key)}/{file}") as source, (folder / file).open("wb") as written:
                shutil.copyfileobj(source, written)


def clear_checkpoints(store: Store, key: PartKey) -> None:
    """Remove the store's checkpoints of a part."""
    if store.local_path(key.record) is None:
        _delete(store, key, _stored(store, key))


def _root(key: PartKey) -> str:
    return f"work/{key.stage}/{key.fingerprint}"


def _stored(store: Store, key: PartKey) -> list[str]:
    """The files of the part's checkpoints, such as checkpoint-20/optimizer.pt."""
    return [name.removeprefix(f"{_root(key)}/") for name in store.list(_root(key))]


def _delete(store: Store, key: PartKey, files: Iterable[str]) -> None:
    for file in sorted(files, key=_marker_last, reverse=True):
        store.delete(f"{_root(key)}/{file}")


def _marker_last(file: str) -> bool:
    return file.endswith(f"/{MARKER}")


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))
