"""Keeps an engine, a reward model or a child process with a loaded model between the tasks of a
stage.

Starting an engine costs up to a minute, so the tasks of a stage share one: on this machine through
this module's single slot, on workers once in each. Asking for another one, or the end of the stage
(`close_engine`), shuts the old one down and gives its memory back before the reward model or the
trainer needs it.
"""

import atexit
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar, cast

from qrpo.engines import EngineConfig, open_engine
from qrpo.engines.sampling import Engine
from qrpo.models import ModelConfig


class Closable(Protocol):
    """Something that holds memory until it is closed."""

    def close(self) -> None:
        """Give everything back."""


Kept = TypeVar("Kept", bound=Closable)

_lock = threading.Lock()
_open: tuple[object, Closable] | None = None


def keep(key: object, start: Callable[[], Kept]) -> Kept:
    """What `start` made for an equal key, if that is still open, else what it makes now, after
    closing what was open."""
    global _open
    with _lock:
        if _open is not None and _open[0] == key:
            return cast(Kept, _open[1])
        _close()
        made = start()
        _open = key, made
        return made


def engine_for(config: EngineConfig, model: ModelConfig, log: Path) -> Engine:
    """The running engine for this model, started if need be; it writes to `log`."""
    return keep((config, model), lambda: open_engine(config, model, log=log))


def close_engine() -> None:
    """Shut down what is open, if anything is."""
    with _lock:
        _close()


def _close() -> None:
    global _open
    if _open is not None:
        closing, _open = _open[1], None
        closing.close()


atexit.register(close_engine)
