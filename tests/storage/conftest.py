import pytest


@pytest.fixture(autouse=True)
def own_temporary_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """gc looks for temporary files in TMPDIR and in the user's cache: what others left there is not counted."""
    folder = tmp_path_factory.mktemp("machine")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
