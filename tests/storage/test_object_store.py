"""The store against a real S3 server behind a line that fails: errors, resets, lost answers, cut and slow bodies."""

import http.client
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import storage
from storage import ShardReader, Store, StoreUnavailableError, manifest_of, read, remote
from storage.leases import Leases, check_claim
from storage.verify import verify
from tests.support.storage import REJECTS, SHARDS, commit_scores, part_key, scores, shards

pytestmark = pytest.mark.slow

KINDS = ("500", "503", "reset", "lost answer", "cut body", "slow")
ALTERED = ("flipped body", "short body")
"""Faults without a checksum that shows them."""


@dataclass
class Line:
    """What the proxy does to requests, and what it saw."""

    endpoint: str
    rate: float = 0.0
    kinds: tuple[str, ...] = KINDS
    empty_listings: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def fault(self) -> str | None:
        if self.dice.random() >= self.rate:
            return None
        kind = self.dice.choice(self.kinds)
        self.faults[kind] = self.faults.get(kind, 0) + 1
        return kind


@pytest.fixture
def line(s3_endpoint: str) -> Iterator[Line]:
    """A proxy before the S3 server; `line.endpoint` is its address."""
    target = urlsplit(s3_endpoint)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            line.seen.append((self.command, self.path))
            fault = line.fault()
            if fault in ("500", "503"):
                code = "InternalError" if fault == "500" else "SlowDown"
                self.answer(
                    int(fault), {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                )
                return
            if fault == "reset":
                self.close_connection = True
                return
            if line.empty_listings and "list-type=2" in self.path:
                empty = b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><KeyCount>0</KeyCount></ListBucketResult>'
                self.answer(200, {"Content-Type": "application/xml"}, empty)
                return
            upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            response = upstream.getresponse()
            data = response.read()
            upstream.close()
            if fault == "lost answer":
                self.close_connection = True
                return
            headers = {
                k: v
                for k, v in response.headers.items()
                if k.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server")
            }
            if fault in ALTERED and self.command == "GET" and "list-type" not in self.path and data:
                headers = {k: v for k, v in headers.items() if "checksum" not in k.lower()}
                at = line.dice.randrange(len(data))
                flipped = data[:at] + bytes([data[at] ^ 1 << line.dice.randrange(8)]) + data[at + 1 :]
                data = data[:at] if fault == "short body" else flipped
            length = int(response.headers.get("Content-Length") or 0) if self.command == "HEAD" else len(data)
            if fault == "slow":
                time.sleep(0.2)
            self.answer(response.status, headers, data, length, cut=fault == "cut body")

        def answer(
            self,
            status: int,
            headers: dict[str, str],
            data: bytes,
            length: int | None = None,
            cut: bool = False,
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut and data else data)
            self.close_connection = self.close_connection or cut

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    line = Line(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield line
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def far_store(line: Line, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, reached through the line."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.005)
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.05)
    return Store(s3_store.url, client_kwargs={"endpoint_url": line.endpoint})


def test_a_whole_run_survives_a_line_that_fails_every_fourth_time(
    far_store: Store,
    s3_store: Store,
    line: Line,
    tmp_path: Path,
    monkeypatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "ATTEMPTS", 12)
    line.rate = 0.25
    with Leases(far_store, ttl=30) as leases:
        keys = [part_key("rewards", n) for n in range(8)]
        done, mine, others = leases.share(keys)
        assert (done, mine, others) == ({}, keys, [])
        records = []
        for number, key in enumerate(keys):
            records.append(far_store.commit_part(key, scores(50, seed=number), rejects=REJECTS))
            leases.release(key)
    made = far_store.commit_manifest(manifest_of("rewards", records[0].family, records))
    far_store.write_run("run", {"stages": {"rewards": made.fingerprint}})
    shard = far_store.commit_part(part_key("shards"), shards(2000), table=SHARDS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)) * 1000)
    model = far_store.commit_folder(part_key("policy"), tmp_path / "model")

    assert far_store.find_parts(keys) == {record.fingerprint: record for record in records}
    assert storage.open(far_store, "run", "rewards").rejects.num_rows == 8
    assert sum(far_store.read_part(record).num_rows for record in records) == 400
    assert len(list(ShardReader(far_store, [shard]).iterate(0))) == 2000
    assert storage.folder_digest(far_store.fetch_folder(model)) == storage.folder_digest(tmp_path / "model")
    assert far_store.list("leases") == []
    assert list(verify(far_store)) == []
    far_store.discard_part(keys[0])
    assert set(line.faults) == set(KINDS)
    line.rate = 0
    assert s3_store.part(keys[0]) is None
    assert [finding.key for finding in verify(s3_store)] == [keys[0].record]


def test_altered_bodies_are_read_again_by_every_reader(
    far_store: Store, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(far_store.files, "pauses", (0.0,) * 8)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)) * 100)
    records = commit_scores(far_store, 6, rows=50)
    monkeypatch.setattr(read, "_SMALL", 1000)
    big = far_store.commit_part(part_key("shards"), shards(3000), table=SHARDS)
    model = far_store.commit_folder(part_key("policy"), tmp_path / "model")
    made = far_store.commit_manifest(manifest_of("rewards", records[0].family, [*records]))
    far_store.write_run("run", {"stages": {"rewards": made.fingerprint}})
    assert big.bytes > 1000  # its columns are read by ranges

    def read_everything() -> list[object]:
        return [
            far_store.manifest("rewards", made.fingerprint),
            far_store.run("run"),
            far_store.find_parts(record.key for record in records),
            [far_store.read_part(record) for record in records],
            far_store.scan(records).collect().to_arrow(),
            far_store.dataset(records).to_table(),
            far_store.read_rows(big, 1500, 20),
            list(far_store.read_groups(big, ["num_ref"])),
            far_store.footer(big).num_rows,
            storage.folder_digest(far_store.fetch_folder(model)),
        ]

    sound = read_everything()
    line.rate, line.kinds = 0.3, ALTERED
    for _ in range(3):
        shutil.rmtree(tmp_path / "cache")
        assert read_everything() == sound
    assert list(verify(far_store)) == []
    assert set(line.faults) == set(ALTERED)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_is_survived_by_reads_and_writes(far_store: Store, line: Line, kind: str) -> None:
    line.rate, line.kinds = 0.5, (kind,)
    for number in range(6):
        data = bytes(range(256)) * (number + 1)
        far_store.write_bytes(f"parts/{number}", data)
        assert far_store.read_bytes(f"parts/{number}") == data
        assert far_store.files.create(f"created/{number}", data)
        assert not far_store.files.create(f"created/{number}", b"other")
        assert far_store.read_bytes(f"created/{number}") == data
    with pytest.raises(FileNotFoundError):
        far_store.read_bytes("parts/missing")
    assert line.faults[kind] > 5


def test_a_line_that_always_fails_ends_in_one_readable_error(
    far_store: Store, s3_store: Store, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    line.rate, line.kinds = 1.0, ("503",)
    with pytest.raises(
        StoreUnavailableError, match=r"cannot read s3://bucket-\d+/some/folder/parts.* after 3 attempts"
    ):
        far_store.part(part_key("rewards"))
    with pytest.raises(StoreUnavailableError, match="start the same command again"):
        far_store.commit_part(part_key("rewards"), scores(10))
    assert len(line.seen) == 6
    line.rate = 0
    gone = Store(s3_store.url, client_kwargs={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StoreUnavailableError, match="after 3 attempts"):
        gone.read_bytes("x")
    with pytest.raises(
        StoreUnavailableError, match=r"s3://no-such-bucket-here/folder/x: .*Create the bucket first"
    ):
        Store("s3://no-such-bucket-here/folder").write_bytes("x", b"1")


def test_the_way_of_a_run_lists_nothing_and_reads_once(far_store: Store, line: Line) -> None:
    keys = [part_key("rewards", n) for n in range(5)]
    assert far_store.find_parts(keys) == {}
    records = commit_scores(far_store, 5)
    made = far_store.commit_manifest(manifest_of("rewards", "family", records))
    far_store.write_run("run", {})
    assert not [path for _, path in line.seen if "list-type" in path]

    line.seen.clear()
    assert far_store.manifest("rewards", made.fingerprint) == made
    assert [command for command, _ in line.seen] == ["GET"]
    line.seen.clear()
    far_store.find_parts(keys)
    assert [command for command, _ in line.seen] == ["GET"] * 5
    line.seen.clear()
    far_store.read_part(records[0])
    assert [command for command, _ in line.seen] == ["GET"]
    line.seen.clear()
    far_store.commit_part(part_key("rewards", 9), scores(10))
    assert [command for command, _ in line.seen] == ["GET", "PUT", "PUT"]


def test_keys_that_are_not_listed_yet_are_found_all_the_same(far_store: Store, line: Line) -> None:
    line.empty_listings = True
    key = part_key("rewards")
    record = far_store.commit_part(key, scores(10))
    made = far_store.commit_manifest(manifest_of("rewards", key.family, [record]))
    assert far_store.family_parts("rewards", key.family) == []
    assert far_store.part(key) == record
    assert far_store.find_parts([key]) == {key.fingerprint: record}
    assert far_store.manifest("rewards", made.fingerprint) == made
    assert far_store.read_part(record).num_rows == 10


def test_credentials_are_nowhere_in_what_is_stored_or_said(
    far_store: Store,
    s3_store: Store,
    line: Line,
    tmp_path: Path,
    monkeypatch,
    caplog,
) -> None:
    caplog.set_level("INFO")
    secret, token, key_id = "verysecretaccesskey", "verysecretsessiontoken", "AKIATESTTESTTEST"
    store = Store(
        s3_store.url, key=key_id, secret=secret, token=token, client_kwargs={"endpoint_url": line.endpoint}
    )
    record = store.commit_part(part_key("rewards"), scores(10), metadata={"store": store.url})
    made = store.commit_manifest(manifest_of("rewards", record.family, [record]))
    store.write_run("run", {"summary": storage.artifact_summary(store, made), "store": repr(store)})
    with Leases(store) as leases:
        leases.acquire(part_key("rewards", 1))
        stored = b"".join(store.read_bytes(key) for key in store.list())
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    line.rate, line.kinds = 1.0, ("503", "reset")
    said = [repr(store), store.url, store.url_of("x"), caplog.text]
    for act in (lambda: store.read_bytes("x"), lambda: store.write_bytes("x", b""), lambda: store.list()):
        with pytest.raises(StoreUnavailableError) as caught:
            act()
        assert caught.value.__cause__ is None
        said.append(str(caught.value))
    for word in (secret, token, key_id):
        assert word.encode() not in stored
        assert not [text for text in said if word in text]


def test_a_big_object_is_sent_in_pieces_and_read_by_ranges(
    s3_store: Store, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "_WHOLE", 1 << 20)
    data = random.Random(0).randbytes(12 << 20)
    (tmp_path / "big").write_bytes(data)
    assert s3_store.files.create_from("big", tmp_path / "big")
    assert not s3_store.files.create_from("big", tmp_path / "big")
    with s3_store.open_input("big") as file:
        file.seek(5 << 20)
        assert file.read(1000) == data[5 << 20 : (5 << 20) + 1000]
        file.seek(-10, 2)
        assert file.read() == data[-10:]
        file.seek(0)
        assert file.read() == data


def test_uploads_that_killed_writers_left_are_aborted(s3_store: Store) -> None:
    files = s3_store.files
    assert isinstance(files, remote.RemoteFiles)
    bucket, _, folder = files.root.partition("/")
    uploads = [f"{folder}/parts/big", "elsewhere/big"]
    for key in uploads:
        files.filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

    assert list(files.sweep(4e9)) == []  # younger: they may still go on
    assert [info.key for info in files.sweep(0)] == ["parts/big"]

    left = files.filesystem.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["elsewhere/big"]


def test_an_altered_claim_is_no_loss(far_store: Store, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_store.files, "pauses", (0.0,) * 8)
    key = part_key("rewards")
    with Leases(far_store) as mine, Leases(far_store) as other:
        assert mine.acquire(key)
        line.rate, line.kinds = 0.3, ALTERED
        for _ in range(20):
            check_claim(far_store, key, mine.holder)
            assert not other.acquire(key)
        mine.release(key)
        line.rate = 0
        assert other.acquire(key)
    assert set(line.faults) == set(ALTERED)
