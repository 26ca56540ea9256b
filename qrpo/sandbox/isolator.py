"""The command line of the jail: bubblewrap around a Python that sees nothing of this machine but how to run.

The jail has namespaces of its own (users, processes, mounts, network, IPC, host name, control groups), an empty
environment, and a root of a few read-only folders: this interpreter without its site-packages, the system's shared
libraries, three devices, and the sandbox's own program. There is no /proc, no /etc, no home. It keeps one capability,
CAP_SYS_ADMIN in its own user namespace, to make a cell for each solution; the cells have none.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from qrpo.errors import RewardError

__all__ = ["PACKAGES", "bare_command", "find_bubblewrap", "find_packages", "jail_command"]

PACKAGES = "/packages"
"""Where solutions find the packages that they may import."""

_INSIDE = Path(__file__).with_name("inside")
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.nursery import main; main(int(sys.argv[2]), sys.argv[3])"
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")


def find_bubblewrap() -> str:
    """The path of `bwrap`; RewardError with the install command where there is none."""
    found = shutil.which("bwrap")
    if found is None:
        raise RewardError(
            "code rewards run what a model wrote, inside bubblewrap, and there is no `bwrap` here. Install it: `apt install "
            "bubblewrap`, `dnf install bubblewrap`, `pacman -S bubblewrap` or `apk add bubblewrap`. (allow_unsandboxed: true "
            "runs the code with all rights of this user instead; only for code that you would run yourself.)"
        )
    return found


def find_packages(names: Sequence[str]) -> dict[str, Path]:
    """Where the packages or modules lie that solutions may import, by name; RewardError where one is not installed."""
    found = {}
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise RewardError(
                f"the sandbox's package {name!r} is not installed here: pip install it, or leave it out"
            )
        place = Path(spec.origin)
        found[name] = place.parent if spec.submodule_search_locations else place
    return found


def _libraries(name: str, package: Path) -> list[Path]:
    """The folders beside a package in which its wheel brings the shared libraries that it is linked with."""
    distributions = _distributions().get(name, [])
    files = [path for wanted in distributions for path in importlib.metadata.files(wanted) or ()]
    folders = {path.parts[0] for path in files if path.parts[0].endswith(".libs")}
    return [package.parent / folder for folder in sorted(folders)]


def jail_command(control: int, settings: str, packages: Mapping[str, Path]) -> list[str]:
    """How to start the nursery in a jail, with descriptor `control` as its socket and `packages` to import."""
    return [
        find_bubblewrap(),
        *("--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--hostname", "cell"),
        *("--new-session", "--clearenv", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"),
        *_file_system(),
        *(
            part
            for name, package in packages.items()
            for place in (package, *_libraries(name, package))
            for part in ("--ro-bind", str(place), f"{PACKAGES}/{place.name}")
        ),
        *("--remount-ro", "/", "--chdir", "/tmp"),
        # sets have one order in all runs, so a solution's verdict does not hang on chance
        *("--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/tmp", "--setenv", "PYTHONHASHSEED", "0"),
        *("--setenv", "LD_LIBRARY_PATH", "/python/lib", "--setenv", "MALLOC_ARENA_MAX", "1"),
        # bound before the fork, and not in every cell
        *("--setenv", "LD_BIND_NOW", "1"),
        # a package that starts threads when it is imported loses them by the fork, and each takes address space
        *("--setenv", "OMP_NUM_THREADS", "1", "--setenv", "OPENBLAS_NUM_THREADS", "1"),
        *("/python/bin/python3", "-P", "-s", "-S", "-B", "-c", _BOOT, "/sandbox", str(control), settings),
    ]


def bare_command(control: int, settings: str) -> list[str]:
    """How to start the nursery with nothing around it."""
    return [sys.executable, "-P", "-s", "-S", "-B", "-c", _BOOT, str(_INSIDE.parent), str(control), settings]


_distributions = cache(importlib.metadata.packages_distributions)


@cache
def _file_system() -> Sequence[str]:
    arguments: list[str] = []
    machine = str(sysconfig.get_config_var("MULTIARCH"))
    for folder in map(Path, _LIBRARIES):
        if folder.is_symlink():
            arguments += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():  # Debian's kin keep shared libraries apart from all else
            shared = folder / machine if (folder / machine).is_dir() else folder
            arguments += ["--ro-bind", str(shared), str(shared)]
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    library = f"/python/{sys.platlibdir}"
    arguments += ["--ro-bind", str(Path(sys.executable).resolve()), "/python/bin/python3"]
    arguments += ["--ro-bind", str(stdlib.parent), library]
    hidden = [stdlib / "site-packages", stdlib / "dist-packages", stdlib.parent / "python3" / "dist-packages"]
    for folder in hidden:
        if folder.is_dir():
            arguments += ["--tmpfs", f"{library}/{folder.relative_to(stdlib.parent)}"]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        arguments += ["--dev-bind", device, device]
    return (*arguments, "--ro-bind", str(_INSIDE), "/sandbox/inside", "--tmpfs", "/tmp")
