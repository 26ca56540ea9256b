"""Pages of the documentation that come from elsewhere: files of the repository, and the code
itself."""

import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

import qrpo
from flows.cli import app
from qrpo.config import is_execution_option
from tasks.config import PipelineConfig
from tasks.stages import STAGES

ROOT = Path(__file__).parents[1]
# Files of the repository -> their pages.
PAGES = {
    "README.md": "index.md",
    "deployments/README.md": "deployments.md",
    "benchmarks/README.md": "benchmarks.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {page: _relink(ROOT / source) for source, page in PAGES.items()}
    pages["reference/configuration.md"] = configuration()
    pages["reference/commands.md"] = commands()
    pages["reference/library.md"] = library()
    pages["reference/tables.md"] = tables()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files of the repository at their pages."""
    return re.sub(r"\]\(\.\./([^)#]+)", lambda match: f"]({PAGES.get(match[1], match[0][2:])}", markdown)


def _relink(path: Path) -> str:
    """The text of a file, with its links relative to `docs/`. Links to code become plain text."""

    def target(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        if link.startswith(("http", "#")):
            return match[0]
        name, _, anchor = link.partition("#")
        file = (path.parent / name).resolve().relative_to(ROOT).as_posix()
        page = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        return f"[{text}]({page}{'#' + anchor if anchor else ''})" if page else text

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", target, path.read_text(encoding="utf-8"))


def configuration() -> str:
    """Every key of the configuration, from the models that read it."""
    lines = [
        "# Configuration",
        "",
        "One YAML file configures a run. `qrpo run CONFIG --show-config` prints it with every default.",
        "**Execution options** change no result and recompute nothing.",
        "",
    ]
    fields = PipelineConfig.model_fields
    lines += _settings(PipelineConfig, [name for name in fields if not _sections(fields[name].annotation)])
    for name, field in fields.items():
        sections = _sections(field.annotation)
        for section in sections:
            kind = section.model_fields["kind"].default if len(sections) > 1 else None
            lines += [
                "",
                f"## {name}: {kind}" if kind else f"## {name}",
                "",
                inspect.getdoc(section) or "",
                "",
            ]
            lines += _settings(section, list(section.model_fields))
    return "\n".join(lines) + "\n"


def _settings(section: type[BaseModel], names: list[str]) -> list[str]:
    """A table of fields, then the sections inside them."""
    lines = ["| key | type | default | description |", "|---|---|---|---|"]
    nested: list[str] = []
    for name in names:
        field = section.model_fields[name]
        option = "**Execution option.** " if is_execution_option(section, name) else ""
        default = "required" if field.is_required() else _default(field)
        cells = [f"`{name}`", _type(field.annotation), default, option + (field.description or "")]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
        for inner in _sections(field.annotation):
            nested += ["", f"### {name}", "", inspect.getdoc(inner) or "", ""]
            nested += _settings(inner, list(inner.model_fields))
    return lines + nested


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return "null" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"


def _type(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(item) for item in get_args(annotation) if item is not NoneType)
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), getattr(get_origin(annotation), "__name__", str(annotation))
    )


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section classes within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for item in get_args(annotation) for section in _sections(item)]


def commands() -> str:
    """Every command with its help and options."""
    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Exit status: 0 done, 1 failed, 2 bad usage or configuration.", ""]
    for name, command in group.commands.items():
        arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["qrpo", name, *arguments, "[OPTIONS]"])
        lines += [f"## qrpo {name}", "", f"`{usage}`", ""]
        lines += [
            re.sub(r"^ {2}(?=qrpo)", "    ", line)
            for line in inspect.cleandoc(command.help or "").splitlines()
        ]
        lines += ["", "| option | effect |", "|---|---|"]
        for parameter in command.params:
            if parameter.opts[0].startswith("-"):
                help_text = " ".join((parameter.help or "").split()).replace("|", "\\|")
                lines.append(f"| `{', '.join(parameter.opts)}` | {help_text} |")
        lines.append("")
    return "\n".join(lines)


def library() -> str:
    """The public names of `qrpo`, with signature and docstring."""
    lines = ["# Library", "", "    from qrpo import " + ", ".join(sorted(qrpo.__all__)[:4]) + ", ...", ""]
    for name in qrpo.__all__:
        value = getattr(qrpo, name)
        lines += [f"## {name}", ""]
        if callable(value) and not (inspect.isclass(value) and issubclass(value, Exception)):
            lines += ["```python", f"{name}{inspect.signature(value)}", "```", ""]
        lines += ["```text", inspect.getdoc(value) or "", "```", ""]
    return "\n".join(lines)


def tables() -> str:
    """The columns of every stage's table."""
    lines = ["# Tables", "", "Every artifact is Parquet. Rejected rows are in `rejects.parquet`.", ""]
    for name, stage in STAGES.items():
        lines += [f"## {name}", "", f"{stage.summary} One row per {stage.unit.removesuffix('s')}.", ""]
        if stage.table is None:
            lines += ["A folder, not a table.", ""]
            continue
        lines += ["| column | type | null |", "|---|---|---|"]
        lines += [f"| `{c.name}` | `{c.type}` | {'yes' if c.nullable else ''} |" for c in stage.table.schema]
        lines += ["", f"Key: {', '.join(f'`{key}`' for key in stage.table.key)}.", ""]
    return "\n".join(lines)
