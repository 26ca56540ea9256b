"""Bytes by key on any other fsspec file system (S3, GCS, memory, ...), with retries.

An object store needs no rename: one PUT is atomic. `create` is a conditional PUT (If-None-Match)
where the backend has one, as S3 does. Reads and commits list nothing, and fsspec's cache of
listings is off. Each request is tried up to ATTEMPTS times with growing pauses, unless it can never
succeed (no such key, no permission).
"""

import io
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar, cast

from storage.crashpoints import crash_point
from storage.errors import StoreUnavailableError
from storage.files import FileInfo, LocalFiles, sweep_machine
from storage.names import check_key, environment_secrets, is_key, redact, secrets_of
from storage.processes import temporary_name

T = TypeVar("T")

ATTEMPTS = 8
"""How often a request is tried before StoreUnavailableError is raised."""

PAUSES = (0.2, 1.0, 2.5)
"""Seconds to wait before each new attempt to read what seems damaged: longer than old bodies are
served."""

_FIRST_PAUSE = 0.1  # seconds; doubles up to the longest
_LONGEST_PAUSE = 8.0
_WHOLE = 64 << 20  # bytes: smaller objects are read by one request
_PARALLEL = 32  # requests
_connections: dict[tuple[int, str, str, str], Any] = {}
_memory_lock = threading.Lock()  # fsspec's memory file system checks and writes in two steps
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    TypeError,
    ValueError,
    AttributeError,
)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NoSuchBucket")


class RemoteFiles:
    """The methods of `LocalFiles` on an fsspec file system.

    Each process makes a connection, also after a fork.
    """

    def __init__(self, protocol: str, root: str, options: dict[str, Any]) -> None:
        self.protocol = protocol
        self.root = root
        self.options = options
        self._secrets = secrets_of(options) | environment_secrets()
        self._connection: tuple[int, Any] | None = None
        self.pauses: tuple[float, ...] = (0.0,) if protocol == "memory" else PAUSES
        # without this, s3fs asks for the size before it reads
        self._reading = {"max_concurrency": 1} if protocol in ("s3", "s3a") else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    @property
    def filesystem(self) -> Any:
        """The fsspec file system, shared in this process by equal options and environment."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), _connect(self.protocol, self.options))
        return self._connection[1]

    def path(self, key: str) -> None:
        return

    def read(self, key: str) -> bytes:
        return self._tried("read", key, lambda fs, name: cast(bytes, fs.cat_file(name, **self._reading)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a key."""

        def read(fs: Any, name: str) -> bytes:
            data = cast(bytes, fs.cat_file(name, start=start, end=stop))
            if len(data) != stop - start:
                raise OSError(f"expected {stop - start} bytes from {start}, got {len(data)}")
            return data

        return self._tried("read", key, read)

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:

        def read(key: str) -> tuple[str, bytes | None]:
            try:
                return key, self.read(key)
            except FileNotFoundError:
                return key, None

        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="store-read") as pool:
            return {key: data for key, data in pool.map(read, keys) if data is not None}

    def write(self, key: str, data: bytes) -> None:
        crash_point("put-before", key)
        self._tried("write", key, lambda fs, name: fs.pipe_file(name, data))
        crash_point("put-after", key)

    def create(self, key: str, data: bytes) -> bool:
        """Create an object; False where it exists with other bytes.

        A PUT whose answer was lost is sent again and finds its own object. So an object with
        exactly these bytes counts as created.
        """

        def put(fs: Any, name: str) -> bool:
            while True:
                try:
                    with _memory_lock if self.protocol == "memory" else nullcontext():
                        fs.pipe_file(name, data, mode="create")
                    return True
                except FileExistsError:
                    with suppress(FileNotFoundError):  # deleted in the meantime: the name is free again
                        return self.read(key) == data

        crash_point("put-before", key)
        created = self._tried("write", key, put)
        crash_point("put-after", key)
        return created

    def scratch(self, key: str) -> Path:
        check_key(key)
        return Path(tempfile.gettempdir(), temporary_name())

    def create_from(self, key: str, scratch: Path) -> bool:
        return self.copy_from(key, scratch)

    def copy_from(self, key: str, source: Path) -> bool:
        if source.stat().st_size <= _WHOLE or self.protocol == "memory":
            return self.create(key, source.read_bytes())

        def send(fs: Any, name: str) -> bool:
            try:
                fs.put_file(str(source), name, mode="create")
            except FileExistsError:
                return False
            return True

        crash_point("put-before", key)
        created = self._tried("write", key, send)
        crash_point("put-after", key)
        return created

    def size(self, key: str) -> int | None:
        try:
            answer = self._tried("look up", key, lambda fs, name: cast(dict[str, Any], fs.info(name)))
        except FileNotFoundError:
            return None
        return int(answer["size"]) if answer["type"] == "file" else None

    def delete(self, key: str) -> None:
        crash_point("delete-before", key)
        with suppress(FileNotFoundError):
            self._tried("delete", key, lambda fs, name: fs.rm_file(name))
        crash_point("delete-after", key)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        root = f"{self.root}/{check_key(prefix)}" if prefix else self.root

        def find(fs: Any, _: str) -> dict[str, dict[str, Any]]:
            try:
                return cast(dict[str, dict[str, Any]], fs.find(root, detail=True))
            except FileNotFoundError:
                return {}

        listed = self._tried("list", prefix, find)
        skip = len(self.root) + 1
        for name in sorted(listed):
            key = name[skip:]
            if is_key(key):
                yield FileInfo(key, int(listed[name]["size"]), _modified(listed[name]))

    def open_input(self, key: str, size: int | None = None) -> BinaryIO:
        if size is None or size > _WHOLE:
            size = self.size(key)
            if size is None:
                raise FileNotFoundError(self._shown(key))
        if size <= _WHOLE:
            return io.BytesIO(self.read(key))
        return io.BufferedReader(_Ranges(self, key, size), buffer_size=4 << 20)

    def open_ranges(self, key: str, size: int) -> BinaryIO:
        """The object of `size` bytes, read by ranges on demand."""
        return io.BufferedReader(_Ranges(self, key, size), buffer_size=128 << 10)

    def sweep(self, older_than: float) -> Iterator[FileInfo]:
        yield from sweep_machine(older_than)
        if self.protocol in ("s3", "s3a"):  # uploads in pieces, which cost space and which no listing shows
            bucket, _, folder = self.root.partition("/")
            found = self._tried(
                "list",
                "",
                lambda fs, _: fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{folder}/"),
            )
            for upload in found.get("Uploads", ()):
                key, begun = upload["Key"].removeprefix(f"{folder}/"), upload["Initiated"].timestamp()
                if begun <= time.time() - older_than:
                    arguments = (bucket, upload["Key"], upload["UploadId"])
                    self._tried("abort the upload of", key, lambda fs, _, of=arguments: fs.abort_mpu(*of))  # type: ignore[misc]
                    yield FileInfo(key, 0, begun)

    def _name(self, key: str) -> str:
        return f"{self.root}/{check_key(key)}"

    def _shown(self, key: str) -> str:
        return redact(f"{self.protocol}://{self.root.lstrip('/')}/{key}", self._secrets)

    def _tried(self, verb: str, key: str, request: Callable[[Any, str], T]) -> T:
        """The answer of a request, tried up to ATTEMPTS times."""
        name = self._name(key) if key or verb != "list" else self.root
        pause = _FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return request(self.filesystem, name)
            except FileNotFoundError as error:
                if verb != "write":
                    raise
                raise StoreUnavailableError(
                    f"cannot write {self._shown(key)}: {redact(str(error), self._secrets) or 'no such place'}. "
                    "Create the bucket first, or check the store's URL."
                ) from None
            except StoreUnavailableError:
                raise
            except Exception as error:  # each backend has other classes
                final = isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES
                if final or attempt == ATTEMPTS:
                    why = redact(f"{type(error).__name__}: {error}", self._secrets)
                    tries = "" if final else f" after {ATTEMPTS} attempts"
                    unavailable = StoreUnavailableError(
                        f"cannot {verb} {self._shown(key)}{tries}: {why}. Check the store's URL, the network and the "
                        "credentials in the environment. Committed parts are safe: start the same command again."
                    )
                    unavailable.transient = not final
                    # not chained: the original text may contain signed URLs or keys
                    raise unavailable from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")


Files: TypeAlias = LocalFiles | RemoteFiles


class _Ranges(io.RawIOBase):
    """A large object as a seekable file; every read is one ranged request."""

    def __init__(self, files: RemoteFiles, key: str, size: int) -> None:
        self._files, self._key, self._size, self._at = files, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        start, self._at = self._at, self._size
        return self._files.read_range(self._key, start, self._size) if start < self._size else b""

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0
        data = self._files.read_range(self._key, self._at, stop)
        buffer[: len(data)] = data
        self._at = stop
        return len(data)


def _connect(protocol: str, options: dict[str, Any]) -> Any:
    # not fsspec's own cache, which returns connections made under another environment
    environment = [pair for pair in os.environ.items() if pair[0].startswith(("AWS_", "GOOGLE_", "AZURE_"))]
    identity = (os.getpid(), protocol, repr(sorted(options.items())), repr(sorted(environment)))
    if identity not in _connections:
        settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **options}
        if protocol in ("s3", "s3a"):
            # retries happen here; botocore's would multiply them
            config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 0}}
            settings["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
        import fsspec  # not needed for a local store, and slow to import

        filesystem = fsspec.filesystem(protocol, **settings)
        if hasattr(filesystem, "retries"):
            filesystem.retries = 1
        _connections[identity] = filesystem
    return _connections[identity]


def _modified(info: dict[str, Any]) -> float | None:
    for name in ("LastModified", "updated", "mtime", "created", "last_modified"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
