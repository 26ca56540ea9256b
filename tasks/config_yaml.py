"""YAML 1.2 for configurations: `read_yaml` and `write_yaml`.

PyYAML follows YAML 1.1, where `010` is 8, `1:30` is 90, `on` is true, `1e-6` is text and of two
equal keys the last one wins in silence. Here numbers and booleans are those of YAML 1.2's core
schema, and a key that is given twice is an error.
"""

import re
from typing import Any

import yaml

_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {"<": [(_MERGE, re.compile("<<"))]}
for _kind, (_pattern, _first_letters) in _SCALARS.items():
    for _letter in _first_letters:
        _RESOLVERS.setdefault(_letter, []).append(
            (f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"))
        )


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a key is a {key.id}, expected text")
            if key.tag != _MERGE:
                key.tag = _TEXT  # as written: `2.50: 1` is no key "2.5"
            if key.value in seen:
                first = seen[key.value]
                raise yaml.YAMLError(
                    f"line {line}: the key `{key.value}` is given twice, first in line {first}"
                )
            seen[key.value] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text: str = self.construct_scalar(node)
        digits = text.lstrip("+-")
        return int(text, 0) if digits[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS


def read_yaml(text: str) -> Any:
    """The value of one YAML document; raises `yaml.YAMLError` where it is not valid."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def write_yaml(value: Any, **options: Any) -> str:
    """The value as YAML that `read_yaml` reads as the same; `options` are those of `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **options)  # type: ignore[no-any-return]
