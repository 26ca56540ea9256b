"""Objects named by a string, and the source that they stand on."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from qrpo.callables import load_callable, source_digests, split_target
from qrpo.errors import ConfigError


def package(root: Path) -> Path:
    """A package whose modules import each other in every way."""
    files = {
        "pack/__init__.py": "from . import first\n",
        "pack/first.py": "from .deep.second import two\nimport json\n\ndef one():\n    return two()\n",
        "pack/deep/second.py": "import beside\nfrom ..third import *\n\ndef two():\n    return beside.VALUE + THREE\n",
        "pack/third.py": "import pack.first  # a circle\nTHREE = 3\n",
        "pack/unused.py": "raise RuntimeError\n",
        "beside.py": "VALUE = 4\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_imports_are_followed_through_packages_and_circles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = package(tmp_path)
    monkeypatch.syspath_prepend(root)
    assert list(source_digests("pack.first:one")) == [
        "beside.py",
        "pack/__init__.py",
        "pack/deep/second.py",
        "pack/first.py",
        "pack/third.py",
    ]


def test_imports_from_elsewhere_count_and_installed_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = package(tmp_path / "library")
    monkeypatch.syspath_prepend(root)
    (tmp_path / "main.py").write_text("import numpy, json, sys, qrpo.seeds\nfrom pack.third import THREE\n")
    before = source_digests(f"{tmp_path}/main.py:f")
    assert list(before) == [
        *(f"elsewhere/{name}" for name in ("beside.py", "pack/__init__.py", "pack/deep/second.py")),
        *(f"elsewhere/{name}" for name in ("pack/first.py", "pack/third.py")),
        "main.py",
    ]
    (root / "beside.py").write_text("VALUE = 5\n")
    after = source_digests(f"{tmp_path}/main.py:f")
    assert {name for name in after if after[name] != before[name]} == {"elsewhere/beside.py"}


def test_a_package_of_an_import_hook_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pip install -e` makes importable some projects."""
    root = package(tmp_path)

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if name != "pack":
                return None
            return spec_from_file_location(
                name, root / "pack/__init__.py", submodule_search_locations=[str(root / "pack")]
            )

    monkeypatch.setattr("sys.meta_path", [*sys.meta_path, Finder])
    assert "pack/first.py" in source_digests("pack.first:one")


def test_imports_inside_functions_count(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("def f():\n    if True:\n        import late\n    return late\n")
    (tmp_path / "late.py").write_text("")
    assert list(source_digests(f"{tmp_path}/main.py:f")) == ["late.py", "main.py"]


def test_nothing_is_run_to_read_the_source(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('ran')\n")
    assert list(source_digests(f"{tmp_path}/main.py:f")) == ["main.py"]


def test_a_file_is_loaded_once_and_sees_its_siblings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    (tmp_path / "with_sibling.py").write_text("import the_sibling\n\ndef f():\n    return the_sibling.X\n")
    (tmp_path / "the_sibling.py").write_text("X = 5\n")
    found = load_callable(f"{tmp_path}/with_sibling.py:f")
    assert found() == 5
    assert load_callable(f"{tmp_path}/with_sibling.py:f") is found


@pytest.mark.parametrize("target", ["", "f", ":f", "file.py:", "file.py:1f", "file.py:a.b"])
def test_targets_that_name_nothing_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 'path/to/file\.py:function'"):
        split_target(target)


def test_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text("VALUE = 1\ndef reward(): ...\n")
    with pytest.raises(ConfigError, match=r"no function 'VALUE' \(it has reward\)"):
        load_callable(f"{tmp_path}/some.py:VALUE")
    with pytest.raises(ConfigError, match=r"no file .*other\.py"):
        load_callable(f"{tmp_path}/other.py:f")
    with pytest.raises(ConfigError, match=r"no module 'pyarrow\.nothing'"):
        load_callable("pyarrow.nothing:f")
    with pytest.raises(ConfigError, match=r"has no Python module 'pyarrow\.nothing'"):
        source_digests("pyarrow.nothing:f")


def test_an_installed_package_is_its_version_and_the_file() -> None:
    import fsspec

    digests = source_digests("fsspec.core:open")
    assert set(digests) == {"fsspec", "fsspec/core.py"}
    assert digests["fsspec"] == f"version {fsspec.__version__}"
    assert source_digests("json:dumps")["json"].startswith("Python 3")
