"""One generation engine per process, kept between tasks.

Starting an engine costs up to a minute, so the tasks of a stage share one: on this machine through this module's single slot, on a
cluster once per worker. Asking for another model, or the end of the stage (`close_engine`), shuts the old one down and gives
its memory back before the reward model or the trainer needs it.
"""

import atexit
import threading
from pathlib import Path

from qrpo.engines import EngineConfig, open_engine
from qrpo.models import ModelConfig
from qrpo.sampling import Engine

__all__ = ["close_engine", "engine_for"]

_lock = threading.Lock()
_open: tuple[tuple[EngineConfig, ModelConfig], Engine] | None = None


def engine_for(config: EngineConfig, model: ModelConfig, log: Path) -> Engine:
    """The running engine for this model, started if need be; it writes to `log`."""
    global _open
    with _lock:
        if _open is not None and _open[0] == (config, model):
            return _open[1]
        _close()
        engine = open_engine(config, model, log=log)
        _open = (config, model), engine
        return engine


def close_engine() -> None:
    """Shut the engine down, if one runs."""
    with _lock:
        _close()


def _close() -> None:
    global _open
    if _open is not None:
        _open[1].close()
        _open = None


atexit.register(close_engine)
