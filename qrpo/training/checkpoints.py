"""Training checkpoints: written to a temporary folder, then renamed; which are complete, and the
newest of them.

A trainer writes a checkpoint as a folder of many files. A kill or a full disk while it writes
leaves a folder that looks like a checkpoint. So it is written under `UNFINISHED` and renamed once,
after every file is flushed to disk. A marker in the folder lists each file's size: a folder that
does not match its marker is damaged and not used.
"""

import json
import os
import shutil
from pathlib import Path

from qrpo.errors import TrainingError

MARKER = "whole.json"
UNFINISHED = "unfinished"
"""The folder, next to the checkpoints, in which the next one is written."""


def commit_checkpoint(folder: Path, step: int, *, keep: int | None, keep_also: Path | None = None) -> Path:
    """Rename the checkpoint of `step` from `folder/unfinished`, then delete all but the newest
    `keep` and `keep_also`.

    An existing checkpoint of the same step is replaced.
    """
    written, named = folder / UNFINISHED / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    write_marker(written)
    if named.exists():
        shutil.rmtree(named)
    written.rename(named)
    _flush(folder)
    old = [path for path in _checkpoints(folder) if path not in (named, keep_also)]
    for path in old[: max(0, len(old) + 1 - keep)] if keep is not None else ():
        _remove(path)
    return named


def write_marker(checkpoint: Path) -> None:
    """Flush every file of a checkpoint folder to disk, then write its marker."""
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARKER:
            _flush(path)
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    temporary = checkpoint / f"{MARKER}.tmp"
    temporary.write_text(json.dumps({"files": sizes}, indent=1))
    _flush(temporary)
    temporary.rename(checkpoint / MARKER)
    _flush(checkpoint)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in `folder`; None if there is none."""
    return next((path for path in reversed(_checkpoints(folder)) if _is_complete(path)), None)


def remove_broken_checkpoints(folder: Path) -> None:
    """Delete the unfinished and incomplete checkpoints in `folder`."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for path in _checkpoints(folder):
        if not _is_complete(path):
            _remove(path)


def write_error(what: str, folder: Path, error: Exception) -> TrainingError:
    """The error to raise if `what` could not be written; deletes its partial files, because the
    disk may be full."""
    free = shutil.disk_usage(folder).free  # not every writer's error says that the disk is full
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    newest = latest_checkpoint(folder)
    rest = "there is no older checkpoint" if newest is None else f"{newest.name} is complete"
    return TrainingError(
        f"{what} cannot be written to {folder} ({type(error).__name__}: {str(error).splitlines()[0]}; {free / 1e6:,.1f} MB free); "
        f"{rest}. Free disk space there, then run the same command again: it resumes from the newest complete checkpoint"
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, ordered by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MARKER).read_text())["files"]
    except FileNotFoundError:
        return False
    files = {name: checkpoint / name for name in sizes}
    return all(path.is_file() and path.stat().st_size == sizes[name] for name, path in files.items())


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first, so that a kill leaves nothing that looks complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
