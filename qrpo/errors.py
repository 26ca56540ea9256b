"""Every error that the method raises on purpose.

QRPOError
├── ConfigError     a setting is unknown, missing or impossible; the message starts with the key's path
├── DataError       an input file or row cannot be read or used
├── ModelError      a model, tokenizer or chat template is missing or does not fit
├── RewardError     a reward cannot be loaded, or fails on every row
├── EngineError     a generation engine, or another child process, died
└── TrainingError   training cannot go on (log-ratio mismatch at step 0, loss not finite, ...)

A message says what was got, what was expected, where, and the remedy. Invariants of our own are asserted instead.
"""

__all__ = [
    "ConfigError",
    "DataError",
    "EngineError",
    "ModelError",
    "QRPOError",
    "RewardError",
    "TrainingError",
]


class QRPOError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(QRPOError):
    """A setting is unknown, missing or impossible."""


class DataError(QRPOError):
    """An input file or row cannot be read or used."""


class ModelError(QRPOError):
    """A model, tokenizer or chat template is missing or does not fit."""


class RewardError(QRPOError):
    """A reward cannot be loaded, or fails on every row."""


class EngineError(QRPOError):
    """A generation engine, or another child process, died."""


class TrainingError(QRPOError):
    """Training cannot go on."""
