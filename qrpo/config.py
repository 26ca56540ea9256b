"""The base class of every configuration section, and the two kinds of fields it has.

A section is frozen and refuses unknown keys. Each section is declared next to the code it
configures; the pipeline's configuration composes them. A field is one of

- a setting: it changes results, so it is part of fingerprints;
- an execution option (`execution_option`): batch sizes, workers, memory, time-outs. It changes no
  result and no fingerprint.

A setting declared with `json_schema_extra={"fingerprint": False}` changes results but enters
fingerprints in another way, which its stage's `plan` decides (for example `completions.num_ref`,
which selects parts).
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Section", "execution_option", "is_execution_option", "keyed"]


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def idle_fields(self) -> frozenset[str]:
        """Fields that have no effect given the values of the others; fingerprints ignore them."""
        return frozenset()

    def fingerprint_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What fingerprints hash; override it to keep the names of earlier versions."""
        return settings


def execution_option(default: Any, **constraints: Any) -> Any:
    """A field that changes no result: it is not part of any fingerprint."""
    return Field(default, json_schema_extra={"fingerprint": False, "execution_option": True}, **constraints)


def is_execution_option(section: type[BaseModel], name: str) -> bool:
    """Whether the field `name` of `section` was declared with `execution_option`."""
    return _extra(section, name).get("execution_option") is True


def keyed(section: BaseModel) -> dict[str, Any]:
    """The section's settings as plain JSON values with nested sections, for fingerprints."""
    idle = section.idle_fields() if isinstance(section, Section) else frozenset()
    settings = {
        name: _plain(getattr(section, name))
        for name in type(section).model_fields
        if name not in idle and _extra(type(section), name).get("fingerprint") is not False
    }
    return section.fingerprint_settings(settings) if isinstance(section, Section) else settings


def _extra(section: type[BaseModel], name: str) -> dict[str, Any]:
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return keyed(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
