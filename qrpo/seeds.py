"""Deterministic pseudo-random choices: hashes of names, equal on every machine and in every version."""

import hashlib

__all__ = ["seeded_hash"]


def seeded_hash(*parts: object) -> bytes:
    """The sha256 of the parts, joined by NUL bytes; bytes count as they are, anything else as its `str`."""
    return hashlib.sha256(
        b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    ).digest()
