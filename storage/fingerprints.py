"""Fingerprints name what was asked for; digests are hashes of what was computed.

A fingerprint is a hash of canonical JSON, so it is equal on every machine, Python and run, and easy
to recompute in another language. Values that JSON cannot hold exactly are refused: `str(object)`
would bring addresses and versions into cache keys.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from storage.errors import StoreError

_CHUNK = 1 << 20


def fingerprint(obj: Any) -> str:
    """32 hex digits for a JSON value; equal for tuples and lists, and for any order of keys.

    Floats are written by `repr`, and 1 and 1.0 differ. Raises TypeError with the path of a value
    that is not JSON, ValueError with the path of a NaN or an infinity.
    """
    return hashlib.sha256(canonical_json(obj)).hexdigest()[:32]


def canonical_json(obj: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII."""
    _check(obj, "$")
    return plain_json(obj)


def plain_json(obj: Any) -> bytes:
    """The same without checks, for a value that was parsed from JSON; ValueError for a NaN."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _check(value: Any, path: str) -> None:
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}: a fingerprint needs a finite number.")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"{path} has the key {key!r} of type {type(key).__name__}: expected a string."
                )
            _check(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
    else:
        raise TypeError(
            f"{path} is a {type(value).__name__}: expected None, bool, int, float, str, list, tuple or dict. "
            "Turn it into one of these so that its fingerprint is the same everywhere."
        )


def stream_digest(file: IO[bytes]) -> str:
    """The sha256 (64 hex digits) of the rest of an open file."""
    hasher = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        hasher.update(chunk)
    return hasher.hexdigest()


def file_digest(url: str | os.PathLike[str]) -> str:
    """The sha256 (64 hex digits) of a file, local or on any fsspec URL."""
    text = os.fspath(url)
    try:
        if "://" not in text:
            with open(text, "rb") as local:
                return stream_digest(local)
        import fsspec

        with fsspec.open(text, "rb") as file:
            return stream_digest(file)
    except FileNotFoundError:
        raise StoreError(f"{text} does not exist. Check the path.") from None
    except IsADirectoryError:
        raise StoreError(f"{text} is a folder, expected a file.") from None


def folder_digest(path: str | os.PathLike[str]) -> str:
    """The sha256 over the names and contents of all files under a local folder, links followed.

    The folder's own name, times and permissions do not count. Meant for model folders.
    """
    root = Path(path)
    if not root.is_dir():
        raise StoreError(f"{root} is not a folder. Check the path.")
    files = sorted(
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
    )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        digests = list(pool.map(lambda name: file_digest(root / name), files))
    return hashlib.sha256(canonical_json(list(zip(files, digests, strict=True)))).hexdigest()
