"""Deterministic random choices: hashes of names, equal on every machine."""

import hashlib


def seeded_hash(*parts: object) -> bytes:
    """The sha256 of the parts, joined by NUL bytes; parts other than bytes by their `str`."""
    return hashlib.sha256(
        b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)
    ).digest()
