"""The exceptions of `qrpo`.

QRPOError
├── ConfigError     a setting is unknown, missing or invalid; the message starts with the key's path
├── DataError       an input file or row cannot be read or used
├── ModelError      a model, tokenizer or chat template is missing or unsuitable
├── RewardError     a reward cannot be loaded, or fails on every row
├── EngineError     a generation engine, or another child process, died
└── TrainingError   training cannot continue (log-ratio mismatch at step 0, loss not finite, ...)

A message says what was found, what was expected, where, and what to do. Internal invariants are
asserted instead.
"""


class QRPOError(Exception):
    """Base of all errors that a user can fix."""


class ConfigError(QRPOError):
    """A setting is unknown, missing or invalid."""


class DataError(QRPOError):
    """An input file or row cannot be read or used."""


class ModelError(QRPOError):
    """A model, tokenizer or chat template is missing or unsuitable."""


class RewardError(QRPOError):
    """A reward cannot be loaded, or fails on every row."""


class EngineError(QRPOError):
    """A generation engine, or another child process, died.

    `transient` says that the same work may succeed in a new process: the system killed this one.
    """

    def __init__(self, message: str, *, transient: bool = False):
        super().__init__(message)
        self.transient = transient


class TrainingError(QRPOError):
    """Training cannot continue."""
