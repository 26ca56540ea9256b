"""Isolation of one forked process, applied before it runs a line of foreign code.

The process gets a new process namespace, a private /tmp, no capabilities, limits on time, memory,
files and threads, and the system-call filter. Nothing outlives the namespace's first process, and
nothing can leave the namespace.

The main cost of a fork is the memory that it writes to, which the kernel copies page by page. So
everything possible is prepared before the fork.
"""

import ctypes
import os
import platform
import random
import resource
from collections.abc import Mapping

from .seccomp import Filter

_NEW_PROCESSES = 0x20000000
_NO_SUID_DEV_EXEC = 2 | 4 | 8
_DETACH = 2
_SOLUTION_USER = 1000  # as in `qrpo.sandbox.isolator`
_CAPABILITY_VERSION_3 = 0x20080522
_STACK = 64 << 20  # deep recursion needs more than the usual 8 MiB


class Isolation:
    """Forks isolated processes, one at a time. `bare`: limits only, no namespaces and no filter."""

    def __init__(self, limits: Mapping[str, int], *, bare: bool):
        self._bare = bare
        self._limits = _limits(limits, bare=bare)
        if bare:
            return
        self._libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL holds the interpreter's lock, as `fork` needs
        self._own_processes = os.pidfd_open(os.getpid())
        self._other_user = _SOLUTION_USER if limits["other_user"] else None
        owner = f",uid={_SOLUTION_USER},gid={_SOLUTION_USER}" if limits["other_user"] else ""
        self._tmp_options = f"size={limits['tmp_bytes']},nr_inodes=1024,mode=0700{owner}".encode()
        self._mount_tmp()
        no_capability = ((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
        self._drop_capabilities = (self._libc.capset, no_capability)
        self._filter = Filter(self._libc, platform.machine())

    def fork(self) -> int:
        """Fork a child that is the first process of a new process namespace, with an empty /tmp.

        Calls the C library's fork: what `os.fork` does besides serves processes with several
        threads, and writes to a quarter of all pages that a job ever writes to.
        """
        if self._bare:
            return os.fork()
        if self._state_of_tmp() != self._pristine:
            self._check(self._libc.umount2(b"/tmp", _DETACH), "unmount /tmp")
            self._mount_tmp()
        self._check(self._libc.unshare(_NEW_PROCESSES), "unshare")
        child: int = self._libc.fork()
        if child:
            self._check(self._libc.setns(self._own_processes, _NEW_PROCESSES), "setns")
        if child < 0:
            raise OSError("cannot fork")
        return child

    def limit(self) -> None:
        """In the child: start a session and set the limits."""
        os.setsid()
        if self._bare:
            random.seed(0)  # `os.fork` has reseeded it
        for limit, value in self._limits:
            resource.setrlimit(limit, value)

    def drop_privileges(self) -> None:
        """The last step before foreign code: drop all capabilities and install the filter."""
        if self._bare:
            return
        if self._other_user is not None:
            os.setgroups([])
            os.setresgid(*(self._other_user,) * 3)
            os.setresuid(*(self._other_user,) * 3)
        os.chdir("/tmp")
        call, arguments = self._drop_capabilities
        self._check(call(*arguments), "capset")
        self._filter.install()

    def _mount_tmp(self) -> None:
        mounted = self._libc.mount(b"tmpfs", b"/tmp", b"tmpfs", _NO_SUID_DEV_EXEC, self._tmp_options)
        self._check(mounted, "mount /tmp")
        self._pristine = self._state_of_tmp()

    def _state_of_tmp(self) -> tuple[int, ...]:
        """Differs from the state of a new /tmp once anything was created, even if removed."""
        folder, space = os.stat("/tmp"), os.statvfs("/tmp")
        return folder.st_ino, folder.st_mode, folder.st_ctime_ns, space.f_bfree, space.f_ffree

    def _check(self, result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _limits(limits: Mapping[str, int], *, bare: bool) -> list[tuple[int, tuple[int, int]]]:
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_STACK: _STACK,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 1,  # 0 would not keep the kernel from starting a handler of cores
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if not bare:  # it would count the user's other processes
        wanted[resource.RLIMIT_NPROC] = limits["threads"]
    hard = {limit: resource.getrlimit(limit)[1] for limit in wanted}
    least = {
        limit: value if hard[limit] == resource.RLIM_INFINITY else min(value, hard[limit])
        for limit, value in wanted.items()
    }
    return [(limit, (value, value)) for limit, value in least.items()]
