"""The errors of the store.

StoreError
├── StoreURLError          the store's URL cannot be used: unknown protocol, credentials in it
├── UnsafeNameError        a key or name would leave the store's folder
├── StoreUnavailableError  the backend refuses or does not answer: no permission, disk full, retries
                           used up
├── SchemaError            rows do not satisfy their table: columns, types, nulls, ranges, duplicate
                           keys
├── DamagedError           a stored file is not the committed one: missing, truncated, altered,
                           edited
└── LeaseLostError         another run took over a part of this run

A message says what was found, what was expected, where, and what to do. It never contains
credentials.
"""


class StoreError(Exception):
    """Base of all errors of the store that a user can fix."""


class StoreURLError(StoreError):
    """The store's URL cannot be used."""


class UnsafeNameError(StoreError):
    """A key or name would leave the store's folder, or has characters that a backend refuses."""


class StoreUnavailableError(StoreError):
    """The backend refuses, or does not answer. `transient` is set where a later try may succeed."""

    transient = False


class SchemaError(StoreError):
    """Rows do not satisfy their table."""


class DamagedError(StoreError):
    """A stored file is not the committed one."""


class LeaseLostError(StoreError):
    """Another run took over a part of this run."""
