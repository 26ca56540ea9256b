"""One solution's own cell, made by its process around itself before it runs a line of foreign code.

A cell is a new process and mount namespace with a /tmp of its own, no capability, limits on time, memory, files and
threads, and the system-call filter. Nothing in it outlives its first process, and nothing can leave it.
"""

import ctypes
import os
import platform
import resource
from collections.abc import Mapping

from .seccomp import build_filter, install_filter

__all__ = ["Cells"]

_NEW_MOUNTS, _NEW_PROCESSES = 0x00020000, 0x20000000
_NO_SUID_DEV_EXEC = 2 | 4 | 8
_STACK = 64 << 20  # deep recursion needs more than the usual 8 MiB


class Cells:
    """Makes cells. `bare` ones have the limits alone: no namespaces, no filter."""

    def __init__(self, limits: Mapping[str, int], *, bare: bool):
        self._limits = limits
        self._bare = bare
        self._libc = ctypes.CDLL(None, use_errno=True)
        if not bare:
            self._own_processes = os.pidfd_open(os.getpid())
            self._filter = build_filter(platform.machine())

    def fork(self) -> int:
        """`os.fork`, with the child the first of a new process namespace."""
        if self._bare:
            return os.fork()
        self._check(self._libc.unshare(_NEW_PROCESSES), "unshare")
        try:
            child = os.fork()
        except OSError:
            child = -1
        if child:
            self._check(self._libc.setns(self._own_processes, _NEW_PROCESSES), "setns")
        if child < 0:
            raise OSError("cannot fork")
        return child

    def enter(self) -> None:
        """In the child: all that is left, but for `seal`."""
        os.setsid()
        if self._bare:
            self._set_limits()
            return
        self._check(self._libc.unshare(_NEW_MOUNTS), "unshare")
        size = f"size={self._limits['tmp_bytes']},nr_inodes=1024,mode=0700".encode()
        self._check(self._libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _NO_SUID_DEV_EXEC, size), "mount /tmp")
        os.chdir("/tmp")
        self._set_limits()

    def seal(self) -> None:
        """The last step before foreign code: no capabilities, and the filter."""
        if self._bare:
            return
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        nothing = (ctypes.c_uint32 * 6)()
        self._check(self._libc.capset(header, nothing), "capset")
        install_filter(self._libc, self._filter)

    def _set_limits(self) -> None:
        for limit, value in (
            (resource.RLIMIT_CPU, self._limits["cpu_seconds"]),
            (resource.RLIMIT_AS, self._limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, self._limits["file_bytes"]),
            (resource.RLIMIT_STACK, _STACK),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_NPROC, self._limits["threads"]),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            if self._bare and limit == resource.RLIMIT_NPROC:
                continue  # it would count the user's other processes
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))

    def _check(self, result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
