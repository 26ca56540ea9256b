"""Bytes by key on any other fsspec file system: S3, GCS, memory, ... and the one place where trouble is retried.

An object store has no rename and needs none: one PUT is atomic. `create` is a conditional PUT (If-None-Match) where
the backend knows it, as S3 does. No listing is used to read or commit, only by the housekeeping commands, and
fsspec's cache of listings is off. Each request is tried up to ATTEMPTS times with growing pauses; what can never
succeed (no such key, no permission) is not tried again.
"""

import io
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from storage.crashpoints import crash_point
from storage.errors import StoreUnavailableError
from storage.files import FileInfo
from storage.names import TEMPORARY, check_key, environment_secrets, is_key, redact, secrets_of

__all__ = ["ATTEMPTS", "RemoteFiles"]

T = TypeVar("T")

ATTEMPTS = 8
"""How often one request is tried before the store counts as unavailable."""

_FIRST_PAUSE = 0.1  # seconds; doubles up to the longest
_LONGEST_PAUSE = 8.0
_WHOLE = 64 << 20  # bytes: objects up to here are read by one request
_connections: dict[tuple[int, str, str, str], Any] = {}
_memory_lock = threading.Lock()  # fsspec's memory looks and writes in two steps
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class RemoteFiles:
    """Files on an fsspec file system. Can be pickled and used after a fork: each process makes its own connection."""

    def __init__(self, protocol: str, root: str, options: dict[str, Any]) -> None:
        self.protocol = protocol
        self.root = root
        self.options = options
        self._secrets = secrets_of(options) | environment_secrets()
        self._connection: tuple[int, Any] | None = None
        # s3fs would first ask for the size of what it reads: one request is enough.
        self._reading = {"max_concurrency": 1} if protocol in ("s3", "s3a") else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    @property
    def filesystem(self) -> Any:
        """The fsspec file system: one for all stores of this process with the same options and environment."""
        if self._connection is None or self._connection[0] != os.getpid():
            self._connection = (os.getpid(), _connect(self.protocol, self.options))
        return self._connection[1]

    def path(self, key: str) -> None:
        """None: there is no local path."""
        return

    def read(self, key: str) -> bytes:
        """All bytes of a key."""
        return self._tried("read", key, lambda fs, name: cast(bytes, fs.cat_file(name, **self._reading)))

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a key."""
        data = self._tried(
            "read", key, lambda fs, name: cast(bytes, fs.cat_file(name, start=start, end=stop))
        )
        if len(data) != stop - start:
            raise StoreUnavailableError(
                f"{self._shown(key)}: bytes {start} to {stop} were asked for, {len(data)} came."
            )
        return data

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The bytes of those keys that exist, read side by side; a failed one is read again by itself."""
        names = {self._name(key): key for key in keys}
        if not names:
            return {}
        try:
            answers = self.filesystem.cat(list(names), on_error="return", **self._reading)
        except FileNotFoundError:
            answers = {}
        except Exception as error:
            answers = dict.fromkeys(names, error)
        found = {}
        for name, key in names.items():
            answer = answers.get(name)
            if isinstance(answer, bytes):
                found[key] = answer
            elif not isinstance(answer, FileNotFoundError | KeyError):
                try:
                    found[key] = self.read(key)
                except FileNotFoundError:
                    continue
        return found

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object by one PUT."""
        crash_point("put-before", key)
        self._tried("write", key, lambda fs, name: fs.pipe_file(name, data))
        crash_point("put-after", key)

    def create(self, key: str, data: bytes) -> bool:
        """Create an object; False where it exists with other bytes.

        A PUT whose answer was lost is sent again, by us or by the HTTP client, and then meets itself: so an object
        with just these bytes counts as created.
        """

        def put(fs: Any, name: str) -> bool:
            while True:
                try:
                    with _memory_lock if self.protocol == "memory" else nullcontext():
                        fs.pipe_file(name, data, mode="create")
                    return True
                except FileExistsError:
                    with suppress(
                        FileNotFoundError
                    ):  # deleted since it was in the way: the name is free again
                        return self.read(key) == data

        crash_point("put-before", key)
        created = self._tried("write", key, put)
        crash_point("put-after", key)
        return created

    def scratch(self, key: str) -> Path:
        """A new name in the machine's folder for temporary files."""
        check_key(key)
        folder = Path(tempfile.gettempdir())
        return folder / f"{TEMPORARY}{os.getpid()}-{random.SystemRandom().getrandbits(64):016x}"

    def create_from(self, key: str, scratch: Path) -> bool:
        """Send a scratch file as a new object; False where the key exists. The caller removes the file."""
        return self.copy_from(key, scratch)

    def copy_from(self, key: str, source: Path) -> bool:
        """Send a local file as a new object, in pieces where it is big; False where the key exists."""
        if source.stat().st_size <= _WHOLE or self.protocol == "memory":
            return self.create(key, source.read_bytes())
        crash_point("put-before", key)
        created = self._tried("write", key, lambda fs, name: _send(fs, name, source))
        crash_point("put-after", key)
        return created

    def size(self, key: str) -> int | None:
        """Size in bytes; None where there is no such object."""
        try:
            answer = self._tried("look up", key, lambda fs, name: cast(dict[str, Any], fs.info(name)))
        except FileNotFoundError:
            return None
        return int(answer["size"]) if answer["type"] == "file" else None

    def delete(self, key: str) -> None:
        """Delete an object; nothing happens where there is none."""
        crash_point("delete-before", key)
        with suppress(FileNotFoundError):
            self._tried("delete", key, lambda fs, name: fs.rm_file(name))
        crash_point("delete-after", key)

    def list(self, prefix: str) -> Iterator[FileInfo]:
        """Every object under a prefix that ends at a slash."""
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
        """The object: held in memory where it is small, else read by ranges as they are asked for."""
        if size is None or size > _WHOLE:
            size = self.size(key)
            if size is None:
                raise FileNotFoundError(self._shown(key))
        if size <= _WHOLE:
            return io.BytesIO(self.read(key))
        return io.BufferedReader(_Ranges(self, key, size), buffer_size=4 << 20)

    def open_ranges(self, key: str, size: int) -> BinaryIO:
        """The object of `size` bytes, read by ranges as they are asked for however small it is."""
        return io.BufferedReader(_Ranges(self, key, size), buffer_size=128 << 10)

    def _name(self, key: str) -> str:
        return f"{self.root}/{check_key(key)}"

    def _shown(self, key: str) -> str:
        return redact(f"{self.protocol}://{self.root.lstrip('/')}/{key}", self._secrets)

    def _tried(self, verb: str, key: str, request: Callable[[Any, str], T]) -> T:
        """The request's answer, after as many attempts as it takes, ATTEMPTS at most."""
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
                    "Make the bucket first, or check the store's URL."
                ) from None
            except StoreUnavailableError:
                raise
            except Exception as error:  # each backend has its own tree: sort by what can never succeed
                final = isinstance(error, _FINAL) or _is_refusal(error)
                if final or attempt == ATTEMPTS:
                    why = redact(f"{type(error).__name__}: {error}", self._secrets)
                    tries = "" if final else f" after {ATTEMPTS} attempts"
                    unavailable = StoreUnavailableError(
                        f"cannot {verb} {self._shown(key)}{tries}: {why}. Check the store's URL, the network and the "
                        "credentials in the environment; what is committed is safe, so start the same command again."
                    )
                    unavailable.may_pass = not final
                    # The original is not chained: its text may hold signed URLs or keys.
                    raise unavailable from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")


class _Ranges(io.RawIOBase):
    """A big object as a seekable file; every read is one ranged request."""

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
    # Kept here rather than by fsspec, which would hand out a connection made under another environment.
    environment = [pair for pair in os.environ.items() if pair[0].startswith(("AWS_", "GOOGLE_", "AZURE_"))]
    made_for = (os.getpid(), protocol, repr(sorted(options.items())), repr(sorted(environment)))
    if made_for not in _connections:
        settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **options}
        if protocol in ("s3", "s3a"):
            # Retries are ours; botocore's own would multiply them.
            config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 0}}
            settings["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
        import fsspec  # not needed for a local store, and slow to import

        made = fsspec.filesystem(protocol, **settings)
        if hasattr(made, "retries"):
            made.retries = 1
        _connections[made_for] = made
    return _connections[made_for]


def _send(fs: Any, name: str, source: Path) -> bool:
    try:
        fs.put_file(str(source), name, mode="create")
    except FileExistsError:
        return False
    return True


def _is_refusal(error: Exception) -> bool:
    """Whether an error says that this can never succeed: bad credentials, no such bucket, a mistake in the request."""
    name = type(error).__name__
    return isinstance(error, TypeError | ValueError | AttributeError) or name in (
        "NoCredentialsError",
        "PartialCredentialsError",
        "ParamValidationError",
        "NoSuchBucket",
    )


def _modified(info: dict[str, Any]) -> float | None:
    for name in ("LastModified", "updated", "mtime", "created", "last_modified"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
