"""Which training checkpoints are whole, and the newest of them.

A trainer writes a checkpoint as a folder of many files; a kill, or a full disk, in the middle leaves a folder that looks
like one. So a marker is written last, after every file has reached the disk; it names each file with its size. What
has no marker, or no longer fits it, is not a checkpoint.
"""

import json
import os
import shutil
from pathlib import Path

__all__ = ["latest_checkpoint", "mark_whole", "remove_broken_checkpoints"]

MARKER = "whole.json"


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
    """Delete the checkpoint folders under `folder` that are not whole, so that nothing mistakes them for one."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            shutil.rmtree(path)


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
