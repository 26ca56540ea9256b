"""Keep the log lines of Prefect and other libraries in a file, and the terminal quiet.

Engines, rewards and training write their own logs, see `tasks.work.Work.log`. An error from one of
them names its log.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage import Store
from storage.processes import cache_folder

log = logging.getLogger("qrpo")
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s  %(message)s"


def log_path(store: Store, name: str) -> Path:
    """The path of `logs/name` in a local store, otherwise in the user's cache folder. Creates its
    folder."""
    path = store.local_path(f"logs/{name}") or cache_folder() / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append all log records and warnings of this process to `path`; log the path if the block
    fails.

    Call it after Prefect has set up its logging, which would remove other handlers.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(_FORMAT))
    loggers = (logging.getLogger(), logging.getLogger("qrpo"))  # ours does not propagate
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except Exception:
        log.info("the run's log: %s", path)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        with suppress(OSError):  # a full disk must not hide the error of the block
            handler.close()
