"""What all commands of `qrpo` share: options, the two consoles, and error lines."""

import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from flows.environment import require_home
from tasks.stages import STAGE_NAMES

app = typer.Typer(
    name="qrpo",
    help="Align language models to absolute rewards, stage by stage. Start with `qrpo demo`. "
    "`qrpo --install-completion` adds shell completion of commands, options and stages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# no markup: text that models wrote is printed as it is
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

F = TypeVar("F", bound=Callable[..., Any])


def _complete_stage(incomplete: str) -> list[str]:
    """Shell completion of stages."""
    return [stage for stage in STAGE_NAMES if stage.startswith(incomplete)]


def _known_stage(given: Any) -> Any:
    """Pass on one stage, a list of stages or None; raise BadParameter for a stage that does not exist."""
    for name in given if isinstance(given, list) else [given]:
        if name is not None and name not in STAGE_NAMES:
            raise typer.BadParameter(f"no stage {name!r}; the stages are {', '.join(STAGE_NAMES)}")
    return given


def stage_option(flag: str, text: str) -> Any:
    """An option whose values are stages."""
    return typer.Option(
        flag, metavar="STAGE", help=text, autocompletion=_complete_stage, callback=_known_stage
    )


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML configuration.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or a configuration file.")]
StageName = Annotated[
    str, typer.Argument(metavar="STAGE", autocompletion=_complete_stage, callback=_known_stage)
]
StoreUrl = Annotated[
    str, typer.Option("--store", envvar="QRPO_STORE", help="Folder or fsspec URL of the store.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set policy.beta=0.1"),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Run code that a configuration in the store names, such as a reward function."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]
Cron = Annotated[
    str | None, typer.Option("--cron", metavar="'M H D M W'", help="Schedule of the pipeline. Default: none.")
]
Timezone = Annotated[str, typer.Option("--timezone", help="The schedule's time zone.")]
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Runs that may use a GPU at the same time.")]
Notify = Annotated[
    str | None,
    typer.Option("--notify", metavar="TYPE/NAME", help="Prefect notification block that announces failures."),
]
_Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log line.")]


def command(name: str | None = None) -> Callable[[F], F]:
    """Make a function a command of `qrpo` that also takes --debug and prints each error as one line."""

    def register(function: F) -> F:
        @wraps(function)
        def run(*arguments: Any, debug: bool = False, **options: Any) -> Any:
            with _errors_as_lines(debug):
                return function(*arguments, **options)

        # typer reads both
        signature = inspect.signature(function)
        added = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
        parameters = [*signature.parameters.values(), added]
        run.__dict__["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {**function.__annotations__, "debug": _Debug}
        app.command(name)(run)
        return function

    return register


def print_result(value: Any, table: Any, as_json: bool) -> None:
    """Print `value` as JSON or `table` as text on standard output."""
    print_json(value) if as_json else out.print(table)


def print_json(value: Any) -> None:
    """Print one line on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


class _LineHandler(logging.Handler):
    """Print log records without folding them, so that a path in one can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


@contextmanager
def _errors_as_lines(debug: bool) -> Iterator[None]:
    """Print an error as one line with its exit code; with `debug`, let it rise with its traceback."""
    from qrpo.errors import ConfigError, QRPOError
    from storage import StoreError

    logger = logging.getLogger("qrpo")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logger.handlers = [_LineHandler()]
    logging.raiseExceptions = debug  # no traceback where a log file or Prefect's server takes no line
    try:
        require_home()
        yield
    except (typer.Exit, typer.BadParameter, typer.Abort):
        raise
    except KeyboardInterrupt:
        err.print("interrupted; the parts that were finished are kept; the same command continues from there")
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        text = str(error)
        if not isinstance(error, (QRPOError, StoreError)):
            text = f"{type(error).__name__}: {error} (run again with --debug for the traceback)"
        with suppress(OSError):  # the disk that standard error is on may be full
            err.print(f"error: {text}", style="red")
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
