"""Valid names and keys, and redaction of secrets.

A key is a relative POSIX path of plain ASCII segments. Every backend accepts such keys, so a store
can be copied from a disk to a bucket and back. Prompt ids, run names and metadata from outside
become a key only through these checks, so no write can leave the store's folder.
"""

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from storage.errors import StoreURLError, UnsafeNameError

TEMPORARY = ".tmp-"
"""The prefix of unfinished files, which are hidden from readers and removed by `gc`."""

_NAME = re.compile(r"[A-Za-z0-9._+@=][A-Za-z0-9._+@=-]{0,199}")
_MAX_KEY = 900
_SECRET_OPTION = re.compile(r"secret|token|passw|credential|(^|_)key(_|$)|signature", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(
    r"(?i)([?&](?:X-(?:Amz|Goog)-[a-z-]+|AWSAccessKeyId|Signature|sig|sv|\w*token|\w*key)=)[^&\s'\"]+"
)
# Shown of a URL's query: short numbers. A password may have a slash.
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s'\"?]*\?)([^\s'\"]+)", re.IGNORECASE)
_QUERY_VALUE = re.compile(r"=(?!\d{1,6}(?:&|$))[^&]+")
_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)[^/@\s\"':]*:(?!\d*/)[^@\s\"']+@", re.IGNORECASE)
_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "PREFECT_API_KEY",
    "WANDB_API_KEY",
)


def check_name(name: str, what: str = "name") -> str:
    """The name if it is a valid segment of a key; raises UnsafeNameError otherwise."""
    if not isinstance(name, str) or not _is_segment(name):
        raise UnsafeNameError(
            f"{what} {_shown(name)} cannot be used in a store: expected 1 to 200 letters, digits or any of . _ + @ = - "
            f"(not first), and not '.' or '..'. Choose another {what}."
        )
    return name


@lru_cache(1 << 16)  # most segments of a large store's keys repeat
def _is_segment(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and set(name) != {"."} and not name.startswith(TEMPORARY)


def check_key(key: str) -> str:
    """The key if it is a safe relative path; raises UnsafeNameError otherwise."""
    if not isinstance(key, str) or len(key) > _MAX_KEY:
        raise UnsafeNameError(
            f"key {_shown(key)} cannot be used in a store: expected at most {_MAX_KEY} characters."
        )
    for segment in key.split("/"):
        if not _is_segment(segment):
            raise UnsafeNameError(
                f"key {_shown(key)} cannot be used in a store: segment {_shown(segment)} is not a plain name "
                "(letters, digits and . _ + @ = -, not '..', not empty), so it could leave the store's folder."
            )
    return key


def is_key(key: str) -> bool:
    """Whether a listed name can be a key. Other files in a store's folder are ignored."""
    try:
        check_key(key)
    except UnsafeNameError:
        return False
    return True


def public_url(url: str) -> str:
    """The URL if it has no credentials; raises StoreURLError otherwise, without repeating them."""
    if "://" in url:
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise StoreURLError(
                f"the store's URL cannot be read: {error}. Write PROTOCOL://NAME/FOLDER; [ and ] may be in FOLDER only."
            ) from None
        if "@" in parts.netloc or parts.query:
            raise StoreURLError(
                f"the store's URL {parts.scheme}://***{parts.path} has credentials or a query, which logs and manifests "
                "would show. Set credentials in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, "
                "...) or fsspec's configuration file, and pass the plain URL."
            )
    return url


def secrets_of(options: Mapping[str, Any]) -> frozenset[str]:
    """The values of fsspec options, nested ones included, whose names sound secret."""
    found: set[str] = set()
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= secrets_of(value)
        elif isinstance(value, str) and len(value) >= 4 and _SECRET_OPTION.search(name):
            found.add(value)
    return frozenset(found)


def environment_secrets() -> frozenset[str]:
    """The credentials in the environment of this process."""
    values = (os.environ.get(name, "") for name in _SECRET_VARIABLES)
    return frozenset(value for value in values if len(value) >= 8)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these secrets; of URLs' queries and users only what cannot be secret."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _QUERY.sub(lambda url: url[1] + _QUERY_VALUE.sub("=***", url[2]), text)
    return _SECRET_IN_TEXT.sub(r"\1***", _USERINFO.sub(r"\1***@", text))


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."
