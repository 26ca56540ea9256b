"""What all commands of `qrpo` share: options, the two consoles, and error lines."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import typer
from rich.console import Console
from typer import Argument, Option

from flows.environment import require_home
from tasks.stages import STAGE_NAMES

app = typer.Typer(
    name="qrpo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("qrpo-pipeline"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Align language models to absolute rewards, stage by stage. Start with `qrpo demo`.

    `qrpo --install-completion` adds shell completion of commands, options and stages.
    """


# no markup: text that models wrote is printed as it is
out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

F = TypeVar("F", bound=Callable[..., Any])


def _complete_stage(incomplete: str) -> list[str]:
    return [stage for stage in STAGE_NAMES if stage.startswith(incomplete)]


def _known_stage(given: Any) -> Any:
    """Pass on one stage, a list of stages or None; raise BadParameter for a stage that does not
    exist."""
    for name in given if isinstance(given, list) else [given]:
        if name is not None and name not in STAGE_NAMES:
            raise typer.BadParameter(f"no stage {name!r}; the stages are {', '.join(STAGE_NAMES)}")
    return given


def stage_option(flag: str, text: str) -> Any:
    """An option whose values are stages."""
    return Option(flag, metavar="STAGE", help=text, autocompletion=_complete_stage, callback=_known_stage)


ConfigPath = Annotated[Path, Argument(metavar="CONFIG", help="The YAML configuration.")]
RunName = Annotated[str, Argument(metavar="RUN", help="A run's name, or a configuration file.")]
_STAGES = f"One of {', '.join(STAGE_NAMES)}."
StageName = Annotated[
    str, Argument(metavar="STAGE", help=_STAGES, autocompletion=_complete_stage, callback=_known_stage)
]
Overrides = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a setting: --set policy.beta=0.1")
]
Trust = Annotated[
    bool,
    Option("--trust", help="Run code that a configuration in the store names, such as a reward function."),
]
Cron = Annotated[str | None, Option(metavar="'M H D M W'", help="Schedule of the pipeline. Default: none.")]
Timezone = Annotated[str, Option(help="The schedule's time zone.")]
Gpus = Annotated[int, Option(min=1, help="Runs that may use a GPU at the same time.")]
Notify = Annotated[
    str | None, Option(metavar="TYPE/NAME", help="Prefect notification block that announces failures.")
]
_SHARED = {
    "store": (str, "artifacts", Option(envvar="QRPO_STORE", help="Folder or fsspec URL of the store.")),
    "as_json": (bool, False, Option("--json", help="Print one JSON object for programs.")),
    "debug": (bool, False, Option("--debug", help="Show tracebacks and every log line.")),
}


class Answer(NamedTuple):
    """What a command answers: the object that `--json` prints, what it prints otherwise, whether
    the exit code is 1."""

    value: Any
    view: Any
    failed: bool = False

    def print(self, as_json: bool) -> None:
        """Print it on standard output, as JSON on one line."""
        if as_json:
            sys.stdout.write(json.dumps(self.value, ensure_ascii=False, default=str) + "\n")
            sys.stdout.flush()
        else:
            out.print(self.view)


def command(name: str | None = None, *, shared: Sequence[str] = tuple(_SHARED)) -> Callable[[F], F]:
    """Make a function a command of `qrpo`, with the options `shared`; its Answer is printed, each
    error is one line.

    The function gets the store as its argument `store`, and `as_json` if it has such an argument.
    """

    def register(function: F) -> F:
        own = signature(function).parameters
        added = [
            Parameter(key, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
            for key, (kind, default, option) in _SHARED.items()
            if key in shared
        ]

        def run(*, debug: bool, store: str = "artifacts", as_json: bool = False, **options: Any) -> None:
            with _errors_as_lines(debug):
                from storage import Store

                if "store" in own:
                    options["store"] = Store(store)
                if "as_json" in own:
                    options["as_json"] = as_json
                answer = function(**options)
                if answer is not None:
                    answer.print(as_json)
                    if answer.failed:
                        raise typer.Exit(1)

        parameters = [*(item for key, item in own.items() if key not in _SHARED), *added]
        run.__dict__["__signature__"] = Signature(parameters)
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name)(run)
        return function

    return register


class _LineHandler(logging.Handler):
    """Print log records without folding them, so that a path in one can be copied."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # the disk that standard error is on may be full
            err.print(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


@contextmanager
def _errors_as_lines(debug: bool) -> Iterator[None]:
    """Print an error as one line with its exit code; with `debug`, let it rise with its
    traceback."""
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
