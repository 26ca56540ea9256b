"""The one hash from which everything random takes its seed."""

import hashlib

__all__ = ["seeded_hash"]


def seeded_hash(*parts: object) -> bytes:
    """32 bytes that depend on the text of all parts (a purpose, a seed, what it is for) and on nothing else."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
