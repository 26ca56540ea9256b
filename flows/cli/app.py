"""What every command of `qrpo` shares: the options, the two consoles, and how errors are told."""

import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from tasks.stages import STAGE_NAMES

__all__ = [
    "AsJson",
    "ConfigPath",
    "Cron",
    "Gpus",
    "Notify",
    "Overrides",
    "RunName",
    "StageName",
    "StoreUrl",
    "Timezone",
    "app",
    "command",
    "complete_stage",
    "err",
    "known_stage",
    "out",
    "print_json",
    "tell",
]

app = typer.Typer(
    name="qrpo",
    help="Align language models to absolute rewards, stage by stage. Start with `qrpo demo`. "
    "`qrpo --install-completion` teaches the shell commands, options and stages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# no markup: what models wrote is printed as it is
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

F = TypeVar("F", bound=Callable[..., Any])


def complete_stage(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [stage for stage in STAGE_NAMES if stage.startswith(incomplete)]


def known_stage(given: Any) -> Any:
    """A stage, several or none as they were given; raises BadParameter for one that does not exist."""
    for name in given if isinstance(given, list) else [given]:
        if name is not None and name not in STAGE_NAMES:
            raise typer.BadParameter(f"no stage {name!r}; the stages are {', '.join(STAGE_NAMES)}")
    return given


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML configuration.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a configuration file.")]
StageName = Annotated[
    str, typer.Argument(metavar="STAGE", autocompletion=complete_stage, callback=known_stage)
]
StoreUrl = Annotated[
    str, typer.Option("--store", envvar="QRPO_STORE", help="Folder or fsspec URL of the store.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set policy.beta=0.1"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Cron = Annotated[
    str | None,
    typer.Option(
        "--cron", metavar="'M H D M W'", help="When to run the pipeline; by default never by itself."
    ),
]
Timezone = Annotated[str, typer.Option("--timezone", help="The schedule's time zone.")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Runs that may use a GPU at the same time.")]
Notify = Annotated[
    str | None,
    typer.Option(
        "--notify", metavar="TYPE/NAME", help="Prefect notification block that is told of failures."
    ),
]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log line.")]


def command(name: str | None = None) -> Callable[[F], F]:
    """Make a function a command of `qrpo` that also takes --debug, and whose errors are told in one line."""

    def register(function: F) -> F:
        @wraps(function)
        def told(*arguments: Any, debug: bool = False, **options: Any) -> Any:
            with _errors_as_lines(debug):
                return function(*arguments, **options)

        # what typer reads
        signature = inspect.signature(function)
        added = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
        parameters = [*signature.parameters.values(), added]
        told.__dict__["__signature__"] = signature.replace(parameters=parameters)
        told.__annotations__ = {**function.__annotations__, "debug": _Debug}
        app.command(name)(told)
        return function

    return register


def tell(value: Any, table: Any, as_json: bool) -> None:
    """`value` for machines or `table` for people, on standard output."""
    print_json(value) if as_json else out.print(table)


def print_json(value: Any) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


class _Lines(logging.Handler):
    """Log records as lines that are never folded, so that a path in one can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


@contextmanager
def _errors_as_lines(debug: bool) -> Iterator[None]:
    """One readable line for what a user can mend; a traceback only with --debug."""
    logger = logging.getLogger("qrpo")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logger.handlers = [_Lines()]
    try:
        yield
    except (typer.Exit, typer.BadParameter, typer.Abort):
        raise
    except KeyboardInterrupt:
        err.print(
            "interrupted; the parts that were finished are kept, and the same command goes on from there"
        )
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        raise typer.Exit(_report(error)) from None


def _report(error: Exception) -> int:
    from qrpo.errors import ConfigError, QRPOError
    from storage import StoreError

    if isinstance(error, (QRPOError, StoreError)):
        err.print(f"error: {error}", style="red")
    else:
        err.print(
            f"error: {type(error).__name__}: {error} (run again with --debug for the traceback)", style="red"
        )
    return 2 if isinstance(error, ConfigError) else 1
