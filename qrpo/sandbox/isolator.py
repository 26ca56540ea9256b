"""The command line of a jail: a Python interpreter in bubblewrap that sees only what it needs to
run.

The jail has its own namespaces (users, processes, mounts, network, IPC, host name, control groups),
an empty environment, and a root with a few read-only folders: this interpreter without its
site-packages, the system's shared libraries, three devices, and the code in `inside`. It has no
/proc, no /etc and no home folder. The zygote keeps CAP_SYS_ADMIN in its own user namespace, to
isolate each process that it forks; those processes have no capability. Where root runs the pipeline
it keeps three more, to make them another user's.

bubblewrap is the only supported isolation backend.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import signal
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from qrpo.errors import EngineError, RewardError
from qrpo.sandbox.inside.solution import INPUT

PACKAGES = "/packages"
"""The folder in the jail that holds the packages that solutions may import."""

SOLUTION_USER = 1000
"""The user in the jail that solutions run as."""

_INSIDE = Path(__file__).with_name("inside")
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.zygote import main; main(int(sys.argv[2]), sys.argv[3])"
_PYTHON = ("-P", "-s", "-S", "-B", "-c", _BOOT)
# if memory ends, it ends here first
_AS_VICTIM = 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"'
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
    "PYTHONHASHSEED": "0",  # sets have the same order in all runs, so verdicts are deterministic
    "LD_LIBRARY_PATH": "/python/lib",
    "LD_BIND_NOW": "1",  # symbols are bound before the fork, not in every forked process
    "MALLOC_ARENA_MAX": "1",
    # threads that a package starts at import do not survive the fork, and each takes address space
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class StartError(EngineError):
    """No jail can be created on this machine."""


def find_bubblewrap() -> str:
    """The path of `bwrap`; RewardError with the install command if there is none."""
    found = shutil.which("bwrap")
    if found is None:
        raise RewardError(
            "code rewards run what a model wrote, inside bubblewrap, and there is no `bwrap` here. Install it: `apt install "
            "bubblewrap`, `dnf install bubblewrap`, `pacman -S bubblewrap` or `apk add bubblewrap`. (allow_unsandboxed: true "
            "runs the code with all rights of this user instead: only for code that you would run yourself.)"
        )
    return found


def find_packages(names: Sequence[str]) -> dict[str, Path]:
    """The paths of packages or modules by name; RewardError if one is not installed."""
    found = {}
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise RewardError(
                f"the sandbox's package {name!r} is not installed here: `pip install` it, or remove it from `packages`"
            )
        origin = Path(spec.origin)
        found[name] = origin.parent if spec.submodule_search_locations else origin
    return found


def _libraries(name: str, package: Path) -> list[Path]:
    """The folders next to a package that hold the shared libraries of its wheel."""
    distributions = _distributions().get(name, [])
    files = [path for wanted in distributions for path in importlib.metadata.files(wanted) or ()]
    folders = {path.parts[0] for path in files if path.parts[0].endswith(".libs")}
    return [package.parent / folder for folder in sorted(folders)]


def map_users(info: IO[bytes], blocked: IO[bytes]) -> None:
    """Give a new user namespace root, as 0, and a user that no account has, as `SOLUTION_USER`, as
    soon as bubblewrap tells its process; let it go on.

    The kernel does not count the threads of root, so solutions run as the other one.
    """
    if (told := re.search(rb'"child-pid": (\d+)', info.read(4096))) is None:
        return  # bubblewrap has ended, and said why
    process = int(told[1])
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    unused = next(number for number in range(65533, 0, -1) if number not in taken)
    try:
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process}/{name}").write_text(f"0 0 1\n{SOLUTION_USER} {unused} 1\n")
        blocked.write(b"1")
    except OSError as error:
        os.kill(process, signal.SIGKILL)
        raise StartError(
            f"root runs the sandbox, and solutions cannot run as another user: {error}. Run the pipeline as a user that "
            "is not root, or give the container the capabilities SETUID and SETGID"
        ) from error


def jail_command(
    control: int, settings: str, packages: Mapping[str, Path], users: tuple[int, int] | None
) -> list[str]:
    """The command that starts the zygote in a jail, with its socket at descriptor `control`.

    `users`: descriptors where it writes its process and waits until `map_users` has been called; by
    default it has one user.
    """
    user = ["--uid", str(SOLUTION_USER), "--gid", str(SOLUTION_USER)]
    capabilities = ["CAP_SYS_ADMIN"]
    if users is not None:
        user = ["--info-fd", str(users[0]), "--userns-block-fd", str(users[1])]
        capabilities += ["CAP_SETUID", "CAP_SETGID", "CAP_KILL"]
    options = ["--unshare-all", "--unshare-user", "--hostname", "sandbox", "--new-session", "--clearenv"]
    options += [*user, "--cap-drop", "ALL", *(part for name in capabilities for part in ("--cap-add", name))]
    options += _file_system()
    options += ["--dir", PACKAGES] if packages else []
    for name, package in packages.items():
        for path in (package, *_libraries(name, package)):
            options += ["--ro-bind", str(path), f"{PACKAGES}/{path.name}"]
    options += ["--remount-ro", "/", "--chdir", "/tmp"]
    options += [part for variable in _ENVIRONMENT.items() for part in ("--setenv", *variable)]
    interpreter = ["/python/bin/python3", *_PYTHON, "/sandbox", str(control), settings]
    return ["/bin/sh", "-c", _AS_VICTIM, "sh", find_bubblewrap(), *options, *interpreter]


def bare_command(control: int, settings: str) -> list[str]:
    """How to start the zygote without isolation."""
    return [sys.executable, *_PYTHON, str(_INSIDE.parent), str(control), settings]


_distributions = cache(importlib.metadata.packages_distributions)


@cache
def _file_system() -> Sequence[str]:
    arguments: list[str] = []
    # bubblewrap makes folders that it is not told of for their owner alone
    folders = ["/dev", "/lib", "/python", "/python/bin", "/sandbox", "/usr", "/usr/lib"]
    machine = str(sysconfig.get_config_var("MULTIARCH"))
    for folder in map(Path, _LIBRARIES):
        if folder.is_symlink():
            arguments += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():  # Debian and its derivatives keep shared libraries in a folder per architecture
            shared = folder / machine if (folder / machine).is_dir() else folder
            folders += [str(folder)] if shared != folder else []
            arguments += ["--ro-bind", str(shared), str(shared)]
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    library = f"/python/{sys.platlibdir}"
    arguments += ["--ro-bind", str(Path(sys.executable).resolve()), "/python/bin/python3"]
    arguments += ["--ro-bind", str(stdlib.parent), library]
    hidden = [stdlib / "site-packages", stdlib / "dist-packages", stdlib.parent / "python3" / "dist-packages"]
    for folder in hidden:
        if folder.is_dir():
            covered = f"{library}/{folder.relative_to(stdlib.parent)}"
            arguments += ["--tmpfs", covered, "--remount-ro", covered]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    arguments += ["--symlink", INPUT, "/dev/stdin"]
    made = (part for folder in folders if not Path(folder).is_symlink() for part in ("--dir", folder))
    return (*made, *arguments, "--ro-bind", str(_INSIDE), "/sandbox/inside", "--tmpfs", "/tmp")
