"""Python objects that a configuration names: `package.module:name` or `path/to/file.py:name`.

`load_callable` imports one. `source_digests` identifies its code without running it: the file and
the local files that its `import` statements reach, next to it or elsewhere on `sys.path`. So
editing a reward function, or a module that it uses, changes the fingerprint of its results. Data
files that the code opens are not covered.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qrpo.errors import ConfigError


def split_target(target: str) -> tuple[str, str]:
    """`"file.py:name"` or `"module:name"` as (file or module, name); ConfigError for anything
    else."""
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ConfigError(
            f"got {target!r}, expected 'path/to/file.py:function' or 'package.module:function': "
            "name the file or module, a colon, and the function in it"
        )
    return where, name


def load_callable(target: str) -> Callable[..., Any]:
    """Import the object that `target` names. Errors of importing its module are not caught.

    A file's folder is put first on `sys.path`, as when Python runs the file, so that it can import
    its siblings.
    """
    where, name = split_target(target)
    module = _load_file(_existing_file(where)) if where.endswith(".py") else _load_module(where)
    found = getattr(module, name, None)
    if not callable(found):
        functions = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise ConfigError(
            f"{where} has no function {name!r} (it has {', '.join(functions) or 'none'}): fix the name in {target!r}"
        )
    return found  # type: ignore[no-any-return]


def source_digests(target: str) -> dict[str, str]:
    """sha256 of the file that `target` names and of the local files that it imports, by path
    relative to its root.

    The root is the file's folder, or for a module the folder of its top package; its location does
    not matter. Imports from elsewhere are followed too, unless they are installed packages or this
    one. A module of an installed package is its file and the package's version. Nothing is imported
    or run. Raises ConfigError if the file is missing or has a syntax error.
    """
    where, _ = split_target(target)
    if where.endswith(".py"):
        first = _existing_file(where)
        root = first.parent
    else:
        root, first = _find_module(where)
        if _is_installed(root):
            package = where.split(".")[0]
            own = {first.relative_to(root).as_posix(): hashlib.sha256(first.read_bytes()).hexdigest()}
            return own | {package: _version(package)}
    digests: dict[str, str] = {}
    waiting = [(root, first)]
    while waiting:
        folder, path = waiting.pop()
        name = path.relative_to(folder).as_posix()
        key = name if folder == root else f"elsewhere/{name}"
        if key in digests:
            continue
        source = path.read_bytes()
        digests[key] = hashlib.sha256(source).hexdigest()
        try:
            tree = ast.parse(source, filename=str(path))
        except SyntaxError as error:
            raise ConfigError(f"{path}:{error.lineno} is not valid Python: {error.msg}") from error
        for module in _imported_modules(tree, name):
            for place in dict.fromkeys((root, folder, _local_root(module.split(".")[0]))):
                if place is not None and (files := _module_files(place, module)):
                    waiting += [(place, file) for file in files]
                    break
    return dict(sorted(digests.items()))


def _local_root(top: str) -> Path | None:
    """The folder from which Python imports the package or module `top`; None for installed ones and
    for this project."""
    root = None if top in sys.builtin_module_names else _root_of(top)
    ours = Path(__file__).resolve().parents[1]
    return None if root is None or root == ours or _is_installed(root) else root


def _root_of(top: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(top)  # asks import hooks too, and imports nothing
    except (ImportError, ValueError):
        return None
    if spec is not None and spec.has_location and spec.origin is not None:
        origin = Path(spec.origin).resolve()
        return origin.parent.parent if origin.name == "__init__.py" else origin.parent
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return None


def _existing_file(where: str) -> Path:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(
            f"no file {path}: give the path of a Python file (relative paths start at {Path.cwd()})"
        )
    return path


def _load_file(path: Path) -> Any:
    name = f"qrpo_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up while it runs
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"no module {error.name!r}: install it, or give a path such as 'reward.py:f'"
            ) from error
        raise


def _find_module(name: str) -> tuple[Path, Path]:
    """(the folder of the top package, the module's file), without importing anything."""
    top = name.split(".")[0]
    root = _root_of(top)
    if root is None:
        raise ConfigError(f"no module {top!r}: install it, or give a path such as 'reward.py:f'")
    files = _module_files(root, name)
    leaf = root.joinpath(*name.split("."))
    if not files or files[-1] not in (leaf.with_suffix(".py"), leaf / "__init__.py"):
        raise ConfigError(f"package {top!r} has no Python module {name!r}: fix the name")
    return root, files[-1]


def _is_installed(root: Path) -> bool:
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    return root in libraries or root.name in ("site-packages", "dist-packages")


def _version(package: str) -> str:
    for distribution in (package, *importlib.metadata.packages_distributions().get(package, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"version {importlib.metadata.version(distribution)}"
    return f"Python {sys.version_info.major}.{sys.version_info.minor}"


def _module_files(root: Path, module: str) -> list[Path]:
    """The files under root that `import module` runs: its packages' `__init__.py`, then its own."""
    files = []
    folder = root
    for part in module.split("."):
        if (init := folder / part / "__init__.py").is_file():
            files.append(init)
        elif (leaf := folder / f"{part}.py").is_file():
            files.append(leaf)
        elif not (folder / part).is_dir():
            break
        folder = folder / part
    return files


def _imported_modules(tree: ast.AST, name: str) -> Iterator[str]:
    """The dotted names that the file `name` (relative to the root) imports, relative ones
    resolved."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module:
                yield module
            # `from package import name`: name may be a module
            yield from (f"{module}.{alias.name}" if module else alias.name for alias in node.names)
