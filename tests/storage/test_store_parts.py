import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq
import pytest

import storage
from storage import (
    DamagedError,
    PartKey,
    PartRecord,
    Store,
    StoreUnavailableError,
    StoreURLError,
    manifest_of,
)
from storage.gc import plan_gc
from storage.verify import verify
from tests.support.storage import REJECT, REJECTS, SCORES, at_once, commit_scores, part_key, run_code, scores


def test_a_committed_part_is_found_and_read_back(store: Store) -> None:
    key = part_key("rewards")
    assert store.part(key) is None
    record = store.commit_part(
        key,
        scores(10),
        rejects=REJECTS,
        parents={"f" * 32: "0" * 64},
        metadata={"engine": "vllm"},
        seconds=1.25,
    )
    assert store.part(key) == record
    assert store.find_parts([key, part_key("rewards", 1)]) == {key.fingerprint: record}
    assert store.family_parts("rewards", key.family) == [record]
    assert (record.rows, record.rejects, record.seconds) == (10, 1, 1.25)
    assert store.read_part(record).to_pylist() == scores(10).to_pylist()
    assert store.read_part(record, ["reward"]).column_names == ["reward"]
    assert store.read_rejects(record).to_pylist() == [REJECT]
    table = record.table
    assert table is not None
    data = store.read_bytes(table.key)
    assert (len(data), hashlib.sha256(data).hexdigest()) == (table.bytes, table.sha256)
    assert table.key == f"parts/rewards/{record.family}/{record.fingerprint}.parquet"
    assert store.list("parts") == [f"parts/rewards/{record.family}/{record.fingerprint}.json", table.key]
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 (for another process)
    assert copy.part(key) == record
    assert store.commit_part(key, scores(10, seed=1)) == record, "never written again"
    assert store.read_bytes(table.key) == data


def test_equal_rows_give_equal_bytes_however_they_arrive(store: Store) -> None:
    rows = scores(5000)
    whole = store.commit_part(part_key("rewards", 0), rows, table=SCORES)
    pieces = store.commit_part(
        part_key("rewards", 1), (rows.slice(at, 37) for at in range(0, 5000, 37)), table=SCORES
    )
    polars = store.commit_part(part_key("rewards", 2), pl.from_arrow(rows).to_arrow(), table=SCORES)
    assert whole.digest == pieces.digest == polars.digest
    assert whole.rows == pieces.rows == 5000


def test_replace_puts_the_new_rows_in_place_of_the_old_unless_they_fail(store: Store) -> None:
    key = part_key("rewards")
    old = store.commit_part(key, scores(10), rejects=REJECTS)
    with pytest.raises(storage.SchemaError):
        store.commit_part(key, scores(12).drop_columns("reward"), table=SCORES, replace=True)
    assert store.part(key) == old
    assert store.read_part(old).num_rows == 10
    new = store.commit_part(key, scores(12, seed=1), replace=True)
    assert new.digest != old.digest
    assert store.part(key) == new
    assert store.read_part(new).num_rows == 12
    assert store.list() == [key.record, key.table]


def test_a_failing_iterator_leaves_nothing_behind(store: Store) -> None:
    def rows():
        yield scores(70_000)
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"):
        store.commit_part(part_key("rewards"), rows())
    assert store.list() == []
    root = store.local_path("x")
    if root is not None:
        assert not [name for _, _, names in os.walk(root.parent) for name in names]


def test_rejects_may_be_known_only_after_the_last_row(store: Store) -> None:
    left_out: list[dict[str, str | None]] = []

    def rows():
        yield scores(10)
        left_out.append(REJECT)

    record = store.commit_part(part_key("rewards"), rows(), rejects=lambda: storage.rejects_table(left_out))
    assert record.rejects == 1


def test_a_part_may_have_no_rows(store: Store) -> None:
    for number, tables in enumerate([[], SCORES.schema.empty_table()]):
        record = store.commit_part(part_key("rewards", number), tables, table=SCORES)
        assert record.rows == 0
        assert store.read_part(record).schema == SCORES.schema


def test_discard_makes_a_part_uncommitted_and_leaves_no_file(store: Store) -> None:
    key, other = part_key("rewards", 0), part_key("rewards", 1)
    store.commit_part(key, scores(10), rejects=REJECTS)
    kept = store.commit_part(other, scores(10))
    store.discard_part(key)
    assert store.part(key) is None
    assert store.list() == [other.record, other.table]
    assert store.part(other) == kept


def test_a_payload_left_by_a_killed_run_is_taken_as_it_is(store: Store) -> None:
    key = part_key("rewards")
    first = store.commit_part(key, scores(10, seed=0), rejects=REJECTS)
    store.delete(key.record)  # as if killed before the commit
    second = store.commit_part(key, scores(12, seed=1), rejects=storage.rejects_table([REJECT, REJECT]))
    assert second.files == first.files
    assert (second.rows, second.rejects) == (10, 1)
    assert len(store.list()) == 3


def test_a_payload_left_by_a_killed_discard_is_not_taken(store: Store) -> None:
    key = part_key("rewards")
    store.commit_part(key, scores(10, seed=0))
    store.write_bytes(f"{key.folder}.discarded", b"{}")
    store.delete(key.record)
    record = store.commit_part(key, scores(12, seed=1))
    assert store.read_part(record).num_rows == 12
    assert store.list() == [key.record, key.table]


def test_a_torn_payload_without_a_record_is_written_anew(store: Store) -> None:
    key = part_key("rewards")
    store.write_bytes(key.table, b"PAR1 and nothing more")
    record = store.commit_part(key, scores(10))
    assert store.read_part(record).num_rows == 10


@pytest.mark.parametrize("harm", ["missing", "truncated", "other rows"])
def test_reading_a_damaged_part_names_its_file(store: Store, harm: str) -> None:
    record = store.commit_part(part_key("rewards"), scores(10))
    assert record.table is not None
    key = record.table.key
    data = store.read_bytes(key)
    if harm == "missing":
        store.delete(key)
    elif harm == "truncated":
        store.write_bytes(key, data[:-1])
    else:
        record = replace(record, rows=11)
    with pytest.raises(DamagedError, match=key):
        store.read_part(record)


def test_a_record_edited_by_hand_is_refused(store: Store) -> None:
    key = part_key("rewards")
    store.commit_part(key, scores(10))
    data = store.read_bytes(key.record)
    store.write_bytes(key.record, data.replace(b'"rows":10', b'"rows":11'))
    with pytest.raises(DamagedError, match="was changed after it was written"):
        store.part(key)
    with pytest.raises(DamagedError, match=key.record):
        store.find_parts([key])
    store.write_bytes(part_key("rewards", 1).record, data)
    with pytest.raises(DamagedError, match="moved or copied"):
        store.part(part_key("rewards", 1))


def test_a_folder_is_committed_and_fetched(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    record = store.commit_folder(part_key("policy"), model, metadata={"steps": 3})
    assert store.part(part_key("policy")) == record
    fetched = store.fetch_folder(record)
    assert storage.folder_digest(fetched) == storage.folder_digest(model)
    assert store.fetch_folder(record) == fetched
    store.delete(record.key.record)
    store.delete(record.files[1].key)  # half a copy is no part
    assert store.part(record.key) is None
    assert store.commit_folder(record.key, model).digest == record.digest
    store.discard_part(part_key("policy"))
    assert store.list() == []


def test_many_parts_are_read_as_one_table(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records = commit_scores(store, 3)
    lazy = store.scan(records).filter(pl.col("sample_index") == 1).select("prompt_id", "reward")
    assert lazy.collect().shape == (15, 2)
    glob = str(tmp_path / "parts" / "rewards" / records[0].family / "*.parquet")
    assert pl.scan_parquet(glob).select(pl.len()).collect().item() == 30
    assert duckdb.sql(f"select count(*), count(distinct prompt_id) from '{glob}'").fetchall() == [(30, 15)]


@pytest.mark.parametrize("name", ["run[x]", "[0-9]", "a*", "{b,c}", "50% off", "~me"])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_folder_of_a_store_is_never_a_pattern(
    tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name / "cache"))
    store = Store(tmp_path / name / "store" if kind == "local" else f"memory://{tmp_path.name}/{name}/store")
    decoy = Store(tmp_path / "runx" / "store" if kind == "local" else f"memory://{tmp_path.name}/runx/store")
    commit_scores(decoy, 4, rows=2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")

    records = commit_scores(store, 2, rejected=lambda n: True)
    model = store.commit_folder(part_key("policy"), tmp_path / "model")
    made = store.commit_manifest(manifest_of("rewards", records[0].family, records))
    store.write_run("run", {"stages": {"rewards": made.fingerprint}})

    assert store.scan(records).collect().height == store.dataset(records).count_rows() == 20
    assert storage.open(store, "run", "rewards").rejects.num_rows == 2
    assert (store.fetch_folder(model) / "weights").read_bytes() == b"1"
    assert len(store.family_parts("rewards", records[0].family)) == 2
    assert list(verify(store)) == []
    assert [part.stage for part in plan_gc(store, grace=-1, unfinished=True).parts] == ["policy"]
    with pytest.raises(StoreURLError, match="in FOLDER only"):
        Store("memory://[x]/folder")


def test_row_groups_and_statistics_let_a_reader_skip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = store.commit_part(part_key("rewards"), scores(150_000), table=SCORES)
    with pq.ParquetFile(store.local_path(record.key.table)) as file:
        assert [file.metadata.row_group(i).num_rows for i in range(3)] == [65_536, 65_536, 18_928]
        column = file.metadata.row_group(0).column(0)
        assert column.compression == "ZSTD"
        assert column.statistics.has_min_max


def test_a_work_folder_moves_to_its_next_holder(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    key = part_key("policy")
    (store.work_dir(key) / "of-an-earlier-release").touch()
    first = store.work_dir(key, "a")
    assert [path.name for path in first.iterdir()] == ["of-an-earlier-release"]
    (first / "checkpoint").write_text("1")
    second = store.work_dir(key, "b")
    assert second == store.work_dir(key, "b") != first
    assert (second / "checkpoint").read_text() == "1"
    assert not first.exists()
    store.clear_work(key)
    assert list(store.work_dir(key).iterdir()) == []


def test_threads_that_commit_one_part_agree_on_the_first(store: Store) -> None:
    for number in range(5):
        key = part_key("rewards", number)

        def commit(seed: int, key: PartKey = key) -> PartRecord:
            return store.commit_part(key, scores(10 + seed, seed), rejects=REJECTS if seed % 2 else None)

        records = at_once(4, commit)
        assert len(records) == 4
        assert len({record.files for record in records}) == 1
        assert store.read_part(records[0]).num_rows == records[0].rows
        assert store.read_rejects(records[0]).num_rows == records[0].rejects
    assert list(verify(store)) == []


@pytest.mark.parametrize("place", ["/proc/no-store", "file"])
def test_a_store_that_cannot_be_written_is_one_readable_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = Store(tmp_path / place)
    with pytest.raises(StoreUnavailableError, match="choose another store"):
        store.commit_part(part_key("rewards"), scores(10))
    with pytest.raises(StoreUnavailableError, match="choose another store"):
        store.write_run("run", {})


def test_a_full_disk_is_one_readable_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, sys, numpy as np, pyarrow as pa, storage
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
key = storage.PartKey("metrics", "family", "part")
table = pa.table({"x": np.random.default_rng(0).random(100_000)})
try:
    storage.Store(sys.argv[1]).commit_part(key, table)
except storage.StoreUnavailableError as error:
    print(error)
"""
    assert "File too large. Nothing committed is lost" in run_code(code, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
