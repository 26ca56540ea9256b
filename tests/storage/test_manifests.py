import json

import pytest

import storage
from storage import DamagedError, Store, manifest_of
from tests.support.storage import commit_scores, part_key, scores


@pytest.fixture
def manifest(store: Store) -> storage.Manifest:
    records = commit_scores(store, 3)
    return manifest_of(
        "rewards",
        records[0].family,
        records,
        config={"reward": {"kind": "function"}},
        inputs={"reward": "0" * 64},
        parents={"completions": "f" * 32},
        seconds=2.0,
    )


def test_a_manifest_is_read_back_whole(store: Store, manifest: storage.Manifest) -> None:
    assert store.manifest("rewards", manifest.fingerprint) is None
    assert store.commit_manifest(manifest) == manifest
    later = storage.Manifest(**{**manifest.__dict__, "created": "2099-01-01T00:00:00Z"})
    assert store.commit_manifest(later) == manifest, "the first stays"
    assert store.manifest("rewards", manifest.fingerprint) == manifest
    store.write_run("run", {"stages": {"rewards": {"fingerprint": manifest.fingerprint}}})
    assert storage.open(store, "run", "rewards").rejects.num_rows == 2
    assert (manifest.rows, manifest.rejects) == (30, 2)
    assert manifest.bytes == sum(
        info.bytes
        for info in store.listing()
        if info.key.endswith(".parquet") and "artifacts" not in info.key
    )


def test_a_manifest_follows_a_part_that_was_computed_again(store: Store, manifest: storage.Manifest) -> None:
    store.commit_manifest(manifest)
    again = store.commit_part(part_key("rewards", 1), scores(10, seed=9), replace=True)
    repaired = manifest_of("rewards", manifest.family, [manifest.parts[0], again, manifest.parts[2]])
    assert repaired.fingerprint == manifest.fingerprint
    assert store.commit_manifest(repaired) == repaired == store.manifest("rewards", manifest.fingerprint)


def test_a_manifest_edited_by_hand_is_refused(store: Store, manifest: storage.Manifest) -> None:
    store.commit_manifest(manifest)
    value = json.loads(store.read_bytes(manifest.key))
    store.write_bytes(manifest.key, json.dumps(value, indent=2).encode())
    assert store.manifest("rewards", manifest.fingerprint) == manifest, "another format is no edit"
    value["config"]["reward"]["kind"] = "model"
    store.write_bytes(manifest.key, json.dumps(value).encode())
    with pytest.raises(DamagedError, match=manifest.key):
        store.manifest("rewards", manifest.fingerprint)
    store.write_bytes(manifest.key, b"{")
    with pytest.raises(DamagedError, match="is not readable"):
        store.manifest("rewards", manifest.fingerprint)


def test_the_summary_gives_urls_that_others_can_read(store: Store, manifest: storage.Manifest) -> None:
    import fsspec

    summary = storage.artifact_summary(store, manifest)
    assert summary["rows"] == 30
    for url in summary["parts"]:
        with fsspec.open(url, "rb") as file:
            assert file.read(4) == b"PAR1"
    json.dumps(summary)
