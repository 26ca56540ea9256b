"""Training checkpoints in the store, where that is not on this machine's disk: another machine goes
on from them.

    work/<stage>/<fingerprint>/checkpoint-<step>/<file>
    work/<stage>/<fingerprint>/checkpoint-<step>/sha256.json    the digest of each file

The marker `whole.json` is written last and deleted first. The newest is kept, and the best where
training stops early. All go once the part is committed.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from qrpo.training.checkpoints import MARKER, latest_checkpoint
from storage import DamagedError, PartKey, Store, file_digest
from storage.contents import again
from storage.fingerprints import canonical_json

log = logging.getLogger("qrpo")

_DIGESTS = "sha256.json"


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
            files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
            digests = {file: file_digest(source) for file, source in files.items()}
            store.write_bytes(f"{_root(key)}/{name}/{_DIGESTS}", canonical_json(digests))
            for file in sorted(files, key=lambda file: (file == MARKER, file)):
                store.files.copy_from(f"{_root(key)}/{name}/{file}", files[file])
    _delete(store, key, (file for file in stored if file.partition("/")[0] not in local))


def fetch_checkpoints(store: Store, key: PartKey, folder: Path) -> None:
    """Bring the store's complete checkpoints into the work folder, where their newest is newer than
    its own."""
    if store.local_path(key.record) is not None:
        return
    stored = _stored(store, key)
    whole = [file.partition("/")[0] for file in stored if file.endswith(f"/{MARKER}")]
    newest = latest_checkpoint(folder)
    if max(map(_step, whole), default=0) <= (0 if newest is None else _step(newest.name)):
        return
    for name in whole:
        shutil.rmtree(folder / name, ignore_errors=True)
        try:
            again(store.files, lambda: _fetch(store, key, name, folder, stored))  # noqa: B023
        except DamagedError as error:
            shutil.rmtree(folder / name, ignore_errors=True)
            log.warning("%s; the training goes on without this checkpoint", error)


def _fetch(store: Store, key: PartKey, name: str, folder: Path, stored: Iterable[str]) -> None:
    """Copy one checkpoint; raises DamagedError where a file is not the one that was saved."""
    known = f"{name}/{_DIGESTS}"
    try:
        digests = json.loads(store.read_bytes(f"{_root(key)}/{known}")) if known in stored else {}
    except ValueError:
        raise DamagedError(f"{_root(key)}/{known} is not readable") from None
    files = (file for file in stored if file.startswith(f"{name}/") and file != known)
    for file in sorted(files, key=_marker_last):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        with store.open_input(f"{_root(key)}/{file}") as source, (folder / file).open("wb") as written:
            shutil.copyfileobj(source, written)
        saved = digests.get(file.removeprefix(f"{name}/"))
        if saved not in (None, file_digest(folder / file)):
            raise DamagedError(f"{_root(key)}/{file} is not the file that was saved")


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
