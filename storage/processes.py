"""This machine and its processes: the user's cache, which process wrote a file, and whether it has
ended.

Names of temporary files say who writes them, so that `gc` removes those of killed processes at
once.
"""

import hashlib
import os
import secrets
from functools import cache
from pathlib import Path

from storage.errors import StoreError
from storage.names import TEMPORARY


def cache_folder() -> Path:
    """The user's cache folder for copies from stores that are not local."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrpo"
    except RuntimeError:
        raise StoreError("the user has no home folder. Set HOME or XDG_CACHE_HOME to a folder.") from None


def machine() -> str:
    """The running kernel and the process namespace; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(process: int) -> str:
    """When a process started, in kernel ticks since boot; empty where it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def temporary_name() -> str:
    """A new name of a temporary file, which says which process writes it."""
    return f"{TEMPORARY}{_short_machine()}-{os.getpid()}-{secrets.token_hex(8)}"


def has_ended(name: str) -> bool:
    """Whether the writer of a temporary file ran on this machine and has ended. False if
    unknown."""
    fields = name.removeprefix(TEMPORARY).split("-")
    known = len(fields) >= 3 and fields[0] == _short_machine() != "" and fields[1].isdigit()
    return known and not started(int(fields[1]))


@cache
def _short_machine() -> str:
    name = machine()
    return hashlib.sha256(name.encode()).hexdigest()[:8] if name else ""
