"""The base class of every configuration section, and the three kinds of fields it has.

A section is frozen and refuses unknown keys. Each section is declared next to the code it
configures; the pipeline's configuration composes them. A field is one of

- a setting: it changes results, so it is part of fingerprints;
- an execution option (`execution_option`): batch sizes, workers, memory, time-outs. It changes no
  result and no fingerprint;
- an outside input (`outside_input`): a path, a URL. Fingerprints hold the identity of what is
  there.

A setting declared with `json_schema_extra={"fingerprint": False}` changes results but enters
fingerprints in another way, which its stage's `plan` decides (for example `completions.num_ref`,
which selects parts).
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""The seeds that NumPy, and so `transformers.set_seed`, takes."""


class Section(BaseModel):
    """A frozen part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def idle_fields(self) -> frozenset[str]:
        """Fields that have no effect given the values of the others; fingerprints ignore them."""
        return frozenset()

    def further_settings(self) -> dict[str, Any]:
        """Settings beyond the declared fields, where the section allows some."""
        return {}

    def fingerprint_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What fingerprints hash; override it to keep the names of earlier versions."""
        return settings


def execution_option(default: Any, **constraints: Any) -> Any:
    """A field that changes no result: it is not part of any fingerprint."""
    return Field(default, json_schema_extra={"fingerprint": False, "execution_option": True}, **constraints)


def outside_input(default: Any, **constraints: Any) -> Any:
    """A field that says where something is, such as a model folder. Fingerprints hold the identity
    of what is there."""
    return Field(default, json_schema_extra={"fingerprint": False, "outside_input": True}, **constraints)


def is_execution_option(section: type[BaseModel], name: str) -> bool:
    """Whether the field `name` of `section` was declared with `execution_option`."""
    return _extra(section, name).get("execution_option") is True


def keyed(section: BaseModel) -> dict[str, Any]:
    """The section's settings as plain JSON values with nested sections, for fingerprints."""
    idle = section.idle_fields() if isinstance(section, Section) else frozenset()
    settings = {
        name: _plain(getattr(section, name), keyed)
        for name in type(section).model_fields
        if name not in idle and _extra(type(section), name).get("fingerprint") is not False
    }
    if not isinstance(section, Section):
        return settings
    return section.fingerprint_settings(settings | section.further_settings())


def effective(section: BaseModel, *, outside: bool = False) -> dict[str, Any]:
    """Every setting that has an effect as the section is set, those that `fingerprint` excludes
    too. Plain JSON values.

    With `outside`, also the paths and URLs of outside inputs.
    """
    hidden = {"execution_option"} if outside else {"execution_option", "outside_input"}
    idle = section.idle_fields() if isinstance(section, Section) else frozenset()
    declared = {
        name: _plain(getattr(section, name), partial(effective, outside=outside))
        for name in type(section).model_fields
        if name not in idle and not hidden & _extra(type(section), name).keys()
    }
    return declared | (section.further_settings() if isinstance(section, Section) else {})


def _extra(section: type[BaseModel], name: str) -> dict[str, Any]:
    extra = section.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}


def _plain(value: Any, of_section: Callable[[BaseModel], dict[str, Any]]) -> Any:
    if isinstance(value, BaseModel):
        return of_section(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, of_section) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, of_section) for key, item in value.items()}
    return value
