"""Named instants of every change to a store, so that tests can kill the process at each of them.

`crash_point` is called before and after every change. In production it costs one comparison. A
test's child process registers a listener with `on_crash_point`, counts the instants of one run, and
kills itself at the first, the second, ... in later runs. No setting or environment variable enables
this.
"""

from collections.abc import Callable

CRASH_POINTS = {
    "scratch-opened": "a temporary file exists, empty",
    "scratch-half": "about half of a temporary file's bytes are written",
    "scratch-written": "a temporary file is written, not yet flushed to the disk",
    "scratch-synced": "a temporary file is on the disk",
    "published": "the file has its final name; the folder is not yet flushed",
    "published-synced": "the file and its name are on the disk",
    "folder-made": "a new folder exists and is flushed into its parent",
    "put-before": "an object is about to be sent in one PUT",
    "put-after": "the object is whole in the store",
    "delete-before": "a file or object is about to be deleted",
    "delete-after": "the file or object is gone",
}
"""Every name that `crash_point` gets, and what is true at that instant."""

_listener: Callable[[str, str], None] | None = None


def crash_point(name: str, key: str) -> None:
    """Call the listener, if any: this instant is reached for this key."""
    if _listener is not None:
        assert name in CRASH_POINTS, name
        _listener(name, key)


def on_crash_point(listener: Callable[[str, str], None] | None) -> None:
    """Call `listener(name, key)` at every crash point of this process; None stops it."""
    global _listener
    _listener = listener
