"""Training checkpoints: written aside, then named; which are whole, and the newest of them.

A trainer writes a checkpoint as a folder of many files; a kill, or a full disk, in the middle leaves a folder that looks
like one. So it is written under `UNFINISHED`, and gets its name by one rename after every file has reached the disk. A
marker beside the files says each one's size: what does not fit it was damaged since, and is not a checkpoint either.
"""

import json
import os
import shutil
from pathlib import Path

from qrpo.errors import TrainingError

__all__ = [
    "UNFINISHED",
    "commit_checkpoint",
    "latest_checkpoint",
    "mark_whole",
    "remove_broken_checkpoints",
    "unwritten",
]

MARKER = "whole.json"
UNFINISHED = "unfinished"
"""The folder, beside the checkpoints, in which the next is written."""


def commit_checkpoint(folder: Path, step: int, *, keep: int | None, also: Path | None = None) -> Path:
    """Name the checkpoint of `step` that was written in `folder/unfinished`, then delete all but the newest `keep`.

    `also` is kept besides (the best one). A checkpoint of the same step that was there is replaced.
    """
    written, named = folder / UNFINISHED / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    mark_whole(written)
    if named.exists():
        shutil.rmtree(named)
    written.rename(named)
    _flush(folder)
    old = [path for path in _checkpoints(folder) if path not in (named, also)]
    for path in old[: max(0, len(old) + 1 - keep)] if keep is not None else ():
        _remove(path)
    return named


def mark_whole(checkpoint: Path) -> None:
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
    """The whole checkpoint of the highest step under `folder`; None where there is none."""
    return next((path for path in reversed(_checkpoints(folder)) if _is_whole(path)), None)


def remove_broken_checkpoints(folder: Path) -> None:
    """Delete what is unfinished under `folder`, and checkpoints that are not whole, so that nothing mistakes them for one."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for path in _checkpoints(folder):
        if not _is_whole(path):
            _remove(path)


def unwritten(what: str, folder: Path, error: Exception) -> TrainingError:
    """The error to raise where `what` could not be written; removes what there is of it, for the disk may be full."""
    free = shutil.disk_usage(
        folder
    ).free  # asked here, for not every writer's error says that the disk is full
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    newest = latest_checkpoint(folder)
    rest = "there is no older checkpoint" if newest is None else f"{newest.name} is whole"
    return TrainingError(
        f"{what} cannot be written to {folder} ({type(error).__name__}: {str(error).splitlines()[0]}; {free / 1e6:,.1f} MB free); "
        f"{rest}. "
        "Make room there, then start the same command again: it goes on from the newest whole checkpoint"
    )


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / MARKER).read_text())["files"]
    except FileNotFoundError:
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first: a kill in the middle leaves nothing that looks whole."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
