"""Where the chatter goes: what Prefect and other libraries log is kept in a file, and the terminal stays quiet.

Engines, rewards and training write to logs of their own, see `tasks.work.Work.log`; an error that comes from one names it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from storage import Store
from storage.read import cache_folder

__all__ = ["log_file", "logging_to"]

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s  %(message)s"


def log_file(store: Store, run: str) -> Path:
    """The log of a run: beside a local store's data, else in the user's cache folder."""
    name = f"logs/{run}/run.log"
    path = store.local_path(name) or cache_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def logging_to(path: Path, console: Console) -> Iterator[None]:
    """Append every log record and warning of this process to `path`; where the block fails, say so on the console.

    Call it after Prefect has set up its own logging, which would remove other handlers.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(_FORMAT))
    loggers = (logging.getLogger(), logging.getLogger("qrpo"))  # ours does not propagate
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except Exception:
        console.print(f"the run's log: {path}")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
