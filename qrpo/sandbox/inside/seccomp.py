"""The system calls that a solution may make: a seccomp filter, as a BPF program.

It is an allow-list. A solution may compute, use its memory, files and threads, and read the time.
It cannot create processes (so limits per process limit everything it does), sockets except a socket
pair, namespaces, mounts or shared memory, and cannot trace or inspect another process. Any other
call fails with EPERM. Call numbers are those of Linux's `unistd.h`; calls of another architecture
kill the process.
"""

import ctypes
import errno
import os
import struct

_X86_64 = """
    read=0 write=1 close=3 fstat=5 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15
    pread64=17 pwrite64=18 readv=19 writev=20 futex=202 openat=257 newfstatat=262 getrandom=318 clock_gettime=228 gettimeofday=96
    time=201 open=2 stat=4 lstat=6 statx=332 access=21 faccessat=269 faccessat2=439 readlink=89 readlinkat=267 getdents64=217
    getcwd=79 chdir=80 fchdir=81 mkdir=83 mkdirat=258 rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316
    ftruncate=77 truncate=76 fsync=74 fdatasync=75 dup=32 dup2=33 dup3=292 fcntl=72 pipe=22 pipe2=293 umask=95
    mremap=25 madvise=28 poll=7 ppoll=271 select=23 pselect6=270 epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281
    eventfd2=290 recvfrom=45 rt_sigpending=127 rt_sigtimedwait=128 sigaltstack=131 pause=34 alarm=37 getitimer=36 setitimer=38
    kill=62 tgkill=234 set_robust_list=273 rseq=334 set_tid_address=218 restart_syscall=219 sched_yield=24 sched_getaffinity=204
    getpid=39 gettid=186 getppid=110 getpgrp=111 getpgid=121 getsid=124 getuid=102 geteuid=107 getgid=104 getegid=108
    getgroups=115 getresuid=118 getresgid=120 getrlimit=97 getrusage=98 sysinfo=99 times=100 uname=63 clock_getres=229
    clock_nanosleep=230 nanosleep=35 exit=60 exit_group=231
    ioctl=16 clone=56 clone3=435 prlimit64=302 socketpair=53 sendto=44
"""
_AARCH64 = """
    read=63 write=64 close=57 fstat=80 lseek=62 mmap=222 mprotect=226 munmap=215 brk=214 rt_sigaction=134 rt_sigprocmask=135
    rt_sigreturn=139 pread64=67 pwrite64=68 readv=65 writev=66 futex=98 openat=56 newfstatat=79 getrandom=278 clock_gettime=113
    gettimeofday=169 statx=291 faccessat=48 faccessat2=439 readlinkat=78 getdents64=61 getcwd=17 chdir=49 fchdir=50 mkdirat=34
    unlinkat=35 renameat=38 renameat2=276 ftruncate=46 truncate=45 fsync=82 fdatasync=83 dup=23 dup3=24 fcntl=25
    pipe2=59 umask=166 mremap=216 madvise=233 ppoll=73 pselect6=72 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19
    recvfrom=207 rt_sigpending=136 rt_sigtimedwait=137 sigaltstack=132 getitimer=102 setitimer=103 kill=129 tgkill=131
    set_robust_list=99 rseq=293 set_tid_address=96 restart_syscall=128 sched_yield=124 sched_getaffinity=123 getpid=172 gettid=178
    getppid=173 getpgid=155 getsid=156 getuid=174 geteuid=175 getgid=176 getegid=177 getgroups=158 getresuid=148 getresgid=150
    getrlimit=163 getrusage=165 sysinfo=179 times=153 uname=160 clock_getres=114 clock_nanosleep=115 nanosleep=101 exit=93
    exit_group=94
    ioctl=29 clone=220 clone3=435 prlimit64=261 socketpair=199 sendto=206
"""


def _numbers(table: str) -> dict[str, int]:
    return {name: int(number) for name, number in (entry.split("=") for entry in table.split())}


ALLOWED = {"x86_64": _numbers(_X86_64), "aarch64": _numbers(_AARCH64)}
"""By machine: the allowed calls, some of them only with arguments that satisfy `_CONDITIONS`."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# (code, jump if true, jump if false, operand), as in struct sock_filter
_Instruction = tuple[int, int, int, int]
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_DENY = _ERRNO | errno.EPERM
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

# CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND and CLONE_THREAD: nothing of its own
_CLONE_THREAD = 0x00010F00
_CLONE_NAMESPACES = 0x7E020000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, no leases
_FCNTLS = (0, 1, 2, 3, 4, 1030)
_HARMLESS_IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX


def _argument(index: int, *, high: bool = False) -> _Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * high)


def _is_zero(index: int) -> list[_Instruction]:
    """Allow a null pointer."""
    return [
        _argument(index),
        (_EQUAL, 0, 3, 0),
        _argument(index, high=True),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]


def _is_one_of(index: int, values: tuple[int, ...]) -> list[_Instruction]:
    tests = [(_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [_argument(index), *tests, (_RETURN, 0, 0, _DENY), (_RETURN, 0, 0, _ALLOW)]


_CONDITIONS: dict[str, list[_Instruction]] = {
    "ioctl": _is_one_of(1, _HARMLESS_IOCTLS),
    "fcntl": _is_one_of(1, _FCNTLS),
    # they do nothing and succeed: the files are in memory, and a flood would slow the host's disk
    "fsync": [(_RETURN, 0, 0, _ERRNO)],
    "fdatasync": [(_RETURN, 0, 0, _ERRNO)],
    "socketpair": _is_one_of(0, (1,)),  # AF_UNIX
    "sendto": _is_zero(4),  # to the other end, never to an address
    "prlimit64": _is_zero(2),  # limits are read, not set
    "clone": [  # threads, not processes
        _argument(0),
        (_ANY_BIT, 3, 0, _CLONE_NAMESPACES),
        (_AND, 0, 0, _CLONE_THREAD),
        (_EQUAL, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ],
    # a filter cannot read its flags; the C library then uses clone
    "clone3": [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)],
}


def build_filter(machine: str) -> bytes:
    """The program for a `platform.machine()`; OSError if its call numbers are unknown."""
    if machine not in ALLOWED:
        raise OSError(f"no system-call filter for {machine}, expected {' or '.join(ALLOWED)}")
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32 calls
        (_RETURN, 0, 0, _DENY),
        *_search(sorted((number, name) for name, number in ALLOWED[machine].items())),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _search(calls: list[tuple[int, str]]) -> list[_Instruction]:
    """Binary search of a call number: the kernel tries every number on a new filter."""
    if len(calls) > 4:
        middle = len(calls) // 2
        below = _search(calls[:middle])
        return [(_AT_LEAST, len(below), 0, calls[middle][0]), *below, *_search(calls[middle:])]
    found: list[_Instruction] = []
    for number, name in calls:
        block = _CONDITIONS.get(name, [(_RETURN, 0, 0, _ALLOW)])
        found += [(_EQUAL, 0, len(block), number), *block]
    return [*found, (_RETURN, 0, 0, _DENY)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2


class Filter:
    """The program for a machine, ready to install."""

    def __init__(self, libc: ctypes.CDLL, machine: str):
        program = build_filter(machine)
        described = _Program(len(program) // 8, program)
        self._prctl = libc.prctl
        self._install = (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(described), 0, 0)

    def install(self) -> None:
        """Apply the program to this process and its future threads, permanently."""
        if self._prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or self._prctl(*self._install):
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
