"""The base of every configuration section, and the line between what is computed and how fast.

A section is frozen and refuses unknown keys. Each section lives beside the code that it configures; the pipeline's
configuration only composes them. A field declared with `knob` (batch sizes, workers, memory, time-outs) can change
without changing any result, so it stays out of fingerprints: turning it never throws work away.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Section", "keyed", "knob"]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def idle_fields(self) -> frozenset[str]:
        """Fields that change nothing as the others are set; left out of fingerprints like knobs."""
        return frozenset()


def knob(default: Any, **constraints: Any) -> Any:
    """A field with this default that does not change results and is left out of fingerprints."""
    return Field(default, json_schema_extra={"fingerprint": False}, **constraints)


def keyed(section: BaseModel) -> dict[str, Any]:
    """The section as plain JSON values without its knobs and idle fields, nested sections included."""
    idle = section.idle_fields() if isinstance(section, Section) else frozenset()
    return {
        name: _plain(getattr(section, name))
        for name in type(section).model_fields
        if name not in idle and not _is_knob(section, name)
    }


def _is_knob(section: BaseModel, name: str) -> bool:
    extra = type(section).model_fields[name].json_schema_extra
    return isinstance(extra, dict) and extra.get("fingerprint") is False


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return keyed(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
