import json
from dataclasses import replace

import pyarrow as pa
import pytest

from storage import DamagedError, Manifest, PartKey, Store, StoreError, manifest_of
from storage.gc import plan_gc
from storage.parts import dump_checksummed
from storage.verify import repair, verify
from tests.support.storage import REJECTS, SCORES, commit_scores, part_key, scores


@pytest.fixture
def manifest(store: Store) -> Manifest:
    """A committed artifact of four parts, one with rejects, named by a run."""
    records = commit_scores(store, 4, rows=20, rejected=lambda n: n == 0)
    made = store.commit_manifest(manifest_of("rewards", records[0].family, records))
    store.write_run("run", {"stages": {"rewards": made.fingerprint}})
    return made


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_sound_store_has_no_findings(store: Store, manifest: Manifest) -> None:
    seen: list[tuple[int, int]] = []
    assert list(verify(store, progress=lambda done, total: seen.append((done, total)))) == []
    assert list(verify(store, [manifest])) == []
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("harm", "kind"),
    [
        ("flip", "altered"),
        ("truncate", "truncated"),
        ("delete", "missing"),
        ("delete record", "missing"),
        ("edit record", "record"),
        ("swap", "altered"),
        ("flip rejects", "altered"),
    ],
)
def test_a_harmed_part_is_named_and_only_it_is_computed_again(
    store: Store, manifest: Manifest, harm: str, kind: str
) -> None:
    record = manifest.parts[0]
    assert record.table is not None
    assert record.rejects_file is not None
    key = record.table.key
    data = store.read_bytes(key)
    match harm:
        case "flip":
            store.write_bytes(key, flipped(data, len(data) // 2))
        case "truncate":
            store.write_bytes(key, data[:-7])
        case "delete":
            store.delete(key)
        case "delete record":
            key = record.key.record
            store.delete(key)
        case "edit record":
            key = record.key.record
            store.write_bytes(key, store.read_bytes(key).replace(b'"rejects":1', b'"rejects":2'))
        case "swap":  # another part's bytes, padded to the same size
            other = store.read_bytes(manifest.parts[1].key.table)
            store.write_bytes(key, other[: len(data)].ljust(len(data), b"\0"))
        case "flip rejects":
            key = record.rejects_file.key
            store.write_bytes(key, flipped(store.read_bytes(key), 10))

    findings = list(verify(store))
    assert [(finding.kind, finding.key, finding.part) for finding in findings] == [(kind, key, record.key)]
    assert key in str(findings[0])

    repair(store, findings)
    missing = [part for part in manifest.parts if store.part(part.key) is None]
    assert missing == [record]
    again = store.commit_part(record.key, scores(20, seed=0), rejects=REJECTS)
    assert again.files == record.files
    store.commit_manifest(manifest_of("rewards", manifest.family, [again, *manifest.parts[1:]]))
    assert list(verify(store)) == []


def test_a_record_and_payload_that_were_both_replaced_do_not_match_the_manifest(
    store: Store, manifest: Manifest
) -> None:
    record = manifest.parts[1]
    store.commit_part(record.key, scores(20, seed=99), replace=True)
    (finding,) = verify(store)
    assert finding.kind == "manifest"
    assert "disagree in files" in finding.message
    assert finding.manifest == manifest.key


def test_a_manifest_edited_by_hand_is_named_and_dropped(store: Store, manifest: Manifest) -> None:
    value = json.loads(store.read_bytes(manifest.key))
    value["rows"] = 81
    store.write_bytes(manifest.key, dump_checksummed({k: of for k, of in value.items() if k != "sha256"}))
    (finding,) = verify(store)
    assert "says 81 rows, its parts have 80" in finding.message  # with a new checksum, too
    store.write_bytes(manifest.key, json.dumps(value).encode())
    (finding,) = verify(store)
    assert (finding.kind, finding.key) == ("manifest", manifest.key)
    repair(store, [finding])
    assert store.manifest("rewards", manifest.fingerprint) is None
    assert len(store.find_parts(part.key for part in manifest.parts)) == 4  # no part is lost


def test_a_missing_manifest_of_a_run_and_missing_rejects_are_named(store: Store, manifest: Manifest) -> None:
    store.delete(manifest.rejects_key)
    (finding,) = verify(store)
    assert (finding.kind, finding.key) == ("missing", manifest.rejects_key)
    repair(store, [finding])
    (finding,) = verify(store)
    assert (finding.kind, finding.key) == ("missing", manifest.key)
    assert "run run names rewards" in finding.message
    store.commit_manifest(manifest)
    assert list(verify(store)) == []


def test_a_payload_whose_schema_does_not_match_its_stage_is_named(store: Store) -> None:
    key = part_key("rewards", 9)
    made = store.commit_part(PartKey("other", "family", "x"), pa.table({"prompt_id": ["a"]}))
    assert made.table is not None
    store.write_bytes(key.table, store.read_bytes(made.table.key))
    moved = replace(made, **vars(key), files=(replace(made.table, key=key.table),))
    store.write_bytes(key.record, moved.to_file())
    (finding,) = verify(store, tables={"rewards": SCORES})
    assert finding.kind == "schema"
    assert "column sample_index is missing" in finding.message


def test_parts_of_an_unfinished_run_are_compared_with_their_records(store: Store) -> None:
    record = store.commit_part(part_key("rewards"), scores(10))
    assert list(verify(store)) == []
    store.write_bytes(record.key.record, dump_checksummed({**record.to_json(), "rows": 11}))
    (finding,) = verify(store)
    assert (finding.kind, finding.part) == ("rows", record.key)
    assert "has 10 rows, its record says 11" in finding.message
    store.delete(record.key.table)
    assert [finding.part for finding in verify(store)] == [record.key]


def test_rows_that_their_parent_does_not_have_are_found(store: Store, manifest: Manifest) -> None:
    stranger = store.commit_part(part_key("rewards", 7), scores(20, seed=7))
    parent_part = store.commit_part(part_key("completions"), scores(20, seed=0), table=SCORES)
    parent = store.commit_manifest(manifest_of("completions", "family", [parent_part]))
    parents = {"completions": parent.fingerprint}
    sound = store.commit_manifest(manifest_of("rewards", "family-a", [manifest.parts[0]], parents=parents))
    tables = {"rewards": SCORES, "completions": SCORES}
    assert list(verify(store, [sound], tables=tables)) == []
    wrong = store.commit_manifest(
        manifest_of("rewards", "family-b", [manifest.parts[0], stranger], parents=parents)
    )
    (finding,) = verify(store, [wrong], tables=tables)
    assert finding.kind == "reference"
    assert "'prompt_id': 'prompt-7-" in finding.message


def test_a_folder_part_is_verified_file_by_file(store: Store, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(100))
    (tmp_path / "model" / "config.json").write_text("{}")
    record = store.commit_folder(part_key("policy"), tmp_path / "model")
    assert list(verify(store)) == []
    store.write_bytes(record.files[1].key, bytes(99) + b"1")
    (finding,) = verify(store)
    assert (finding.kind, finding.key) == ("altered", record.files[1].key)


def test_a_part_made_from_bytes_that_are_no_more_is_stale(store: Store) -> None:
    parent = store.commit_part(part_key("rewards", 0), scores(10, seed=0))
    parents = {parent.fingerprint: parent.digest}
    child = store.commit_part(part_key("metrics", 0), pa.table({"x": [1]}), parents=parents)
    other = store.commit_part(part_key("metrics", 1), pa.table({"x": [1]}))
    again = store.commit_part(parent.key, scores(10, seed=0), replace=True)
    assert list(verify(store)) == []  # the same bytes: nothing to do
    assert not child.is_stale({again.fingerprint: again.digest})
    changed = store.commit_part(parent.key, scores(10, seed=1), replace=True)
    (finding,) = verify(store)
    assert (finding.kind, finding.part) == ("stale", child.key)
    assert child.is_stale({changed.fingerprint: changed.digest})
    repair(store, [finding])
    assert store.part(child.key) is None
    assert store.part(other.key) == other


def test_what_an_earlier_version_computed_from_an_altered_part_is_dropped(store: Store) -> None:
    parent = store.commit_part(part_key("rewards"), scores(10))
    parents = {parent.fingerprint: parent.digest}
    checked, unchecked = (
        store.commit_part(part_key("metrics", n), pa.table({"x": [n]}), parents=parents) for n in (0, 1)
    )
    old = {name: value for name, value in unchecked.to_json().items() if name != "checked"}
    store.write_bytes(unchecked.key.record, dump_checksummed(old))
    grandchild = store.commit_part(
        part_key("metrics", 2), pa.table({"x": [2]}), parents={unchecked.fingerprint: unchecked.digest}
    )
    assert list(verify(store)) == []

    store.write_bytes(parent.key.table, flipped(store.read_bytes(parent.key.table), 10))
    findings = list(verify(store))

    assert {(finding.kind, finding.part) for finding in findings} == {
        ("altered", parent.key),
        ("stale", unchecked.key),
    }
    repair(store, findings)
    assert set(store.find_parts(part_key("metrics", n) for n in range(3))) == {
        checked.fingerprint,
        grandchild.fingerprint,
    }
    assert grandchild.is_stale({unchecked.fingerprint: "another digest"})  # so it follows if that changed


@pytest.mark.parametrize("note", [b"", b"\0garbage", b"[]", b"null", b'{"stages": {'])
def test_a_damaged_note_of_a_run_is_set_aside(store: Store, manifest: Manifest, note: bytes) -> None:
    store.write_bytes("runs/run.json", note)
    with pytest.raises(DamagedError, match=r"runs/run\.json.*qrpo verify --repair"):
        store.run("run")
    (finding,) = verify(store)
    assert (finding.kind, finding.key) == ("run", "runs/run.json")
    repair(store, [finding])
    assert store.run("run") is None
    assert store.runs() == []
    assert list(verify(store)) == []
    with pytest.raises(StoreError, match="does not know what that run needs"):  # its parts stay
        plan_gc(store, grace=0)
    store.write_run("run", {"stages": {"rewards": manifest.fingerprint}})
    assert plan_gc(store, grace=0).parts == ()
