"""Every error that the store raises on purpose.

StoreError
├── StoreURLError          the store's URL cannot be used (unknown protocol, credentials in it)
├── UnsafeNameError        a key, run name or prompt-made name would leave the store's folder
├── StoreUnavailableError  the backend refuses or does not answer: no permission, disk full, retries used up
├── SchemaError            a table does not fit its stage: columns, types, nulls, ranges, duplicate keys
├── DamagedError           what is stored is not what was committed: missing, truncated, altered, edited by hand
└── LeaseLostError         another run took over what this one was working on

A message says what was got, what was expected, where, and the remedy. Credentials never appear in one.
"""

__all__ = [
    "DamagedError",
    "LeaseLostError",
    "SchemaError",
    "StoreError",
    "StoreURLError",
    "StoreUnavailableError",
    "UnsafeNameError",
]


class StoreError(Exception):
    """Base of all errors of the store that a user can mend."""


class StoreURLError(StoreError):
    """The store's URL cannot be used."""


class UnsafeNameError(StoreError):
    """A name or key would leave the store's folder, or holds characters that some backend cannot keep."""


class StoreUnavailableError(StoreError):
    """The backend refuses or does not answer. `may_pass` says which: what did not answer may do so later."""

    may_pass = False


class SchemaError(StoreError):
    """A table does not fit its stage."""


class DamagedError(StoreError):
    """What is stored is not what was committed."""


class LeaseLostError(StoreError):
    """Another run took over what this one was working on."""
