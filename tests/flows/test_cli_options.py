"""The options of `qrpo` are a contract: other programs call it. A change of one must change `cli_options.yaml`, too.

Write the file again with `python tests/flows/test_cli_options.py > tests/flows/cli_options.yaml`.
"""

from pathlib import Path
from typing import Any

import typer
import yaml

from flows.cli import app

RECORD = Path(__file__).with_name("cli_options.yaml")


def options_of(command: Any) -> dict[str, str]:
    """Every argument and flag of a command, with its type, default, environment variable and whether it repeats."""
    found = {}
    for parameter in command.params:
        flags = "/".join([*parameter.opts, *parameter.secondary_opts])
        name = f"[{parameter.name}]" if parameter.param_type_name == "argument" else flags
        annotation = parameter.type_descriptor.annotation
        text = f"{getattr(annotation, '__name__', annotation)}, default {parameter.default}"
        if parameter.nargs == -1 or parameter.multiple:
            text += ", repeats"
        if parameter.envvar:
            text += f", from {parameter.envvar}"
        found[name] = text
    return found


def cli_options() -> dict[str, dict[str, str]]:
    group: Any = typer.main.get_command(app)
    return {name: options_of(command) for name, command in sorted(group.commands.items())}


def test_commands_and_options_are_those_on_record() -> None:
    assert cli_options() == yaml.safe_load(RECORD.read_text())


if __name__ == "__main__":
    print(yaml.safe_dump(cli_options(), sort_keys=False, width=200), end="")  # noqa: T201
