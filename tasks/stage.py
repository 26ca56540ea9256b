"""The stage: one object that says everything about one step of the pipeline.

A module `tasks/stages/<name>.py` declares its configuration section, its `Settings` (what it reads
of the configuration), its table, `plan` and `compute`, and one `STAGE` that holds them.
`tasks.stages` lists the modules. The flow, the order, the choices of the command line, the
deployments and the artifacts in Prefect's UI follow from that list.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from qrpo.config import Section, effective
from storage import Manifest, Store, Table
from tasks.plan import PartPlan, StagePlan, Upstream
from tasks.work import Work

S = TypeVar("S")
_ABSENT = object()


def setting(path: str, *, key: str | None = None) -> Any:
    """A field of a stage's `Settings` that is read from `path` of the configuration; without it,
    from the field's own name.

    `key` names the key of the YAML file that decides it, where `path` is a property.
    """
    return field(metadata={"path": path, "key": key or path})


def setting_paths(kind: type[Any]) -> dict[str, str]:
    """Field name -> dotted path, for a stage's `Settings`."""
    return {item.name: item.metadata.get("path", item.name) for item in fields(kind)}


@dataclass(frozen=True)
class RowReuse(Generic[S]):
    """How rows of committed parts serve in a part that is cut differently or asks for more.

    A row is named by a tuple (prompt_id, origin or model, sample_index). `tasks.reuse` finds the
    parts; the stage's `compute` takes the rows with `tasks.reuse.reusable_rows`, and `qrpo plan`
    counts them.
    """

    unit: str
    """What costs: completions to sample, scores, log-probabilities."""
    wanted: Callable[[S, PartPlan, Mapping[str, int]], Sequence[tuple[Any, ...]]]
    """The rows of a part, given its prompts as prompt_id -> number of the dataset's own
    completions."""
    columns: Sequence[str]
    """Columns of the stage's table that name a row: scalars, or a scalar `prompt_id` and lists of
    one length."""
    versions: Sequence[int] = ()
    """Earlier versions of the stage's code whose rows may serve."""
    unless: str | None = None
    """A column that must be null in a row that serves."""
    serves: Callable[[Mapping[str, Any], Mapping[str, Any]], bool] = lambda theirs, ours: theirs == ours
    """Whether rows of a family may serve: both families as `{"version", "settings", "outside"}`."""
    matches: Callable[[PartPlan, Mapping[str, Any]], bool] = lambda part, metadata: True
    """Whether a part's rows may serve, given the committed part's metadata."""
    costs: Callable[[Mapping[str, Any], Mapping[str, Any] | None, bool], int] = lambda ours, theirs, same: (
        int(theirs is None)
    )
    """Units that one row costs, without (None) or with a row of the other family, and whether that
    has the same prompt and columns."""


@dataclass(frozen=True)
class Stage(Generic[S]):
    """One step of the pipeline. `S` is the dataclass of what it reads of the configuration."""

    name: str
    version: int
    """Raised when the code's rows change; every part is then computed again."""
    summary: str
    unit: str
    """What one of its rows is, in the plural."""
    parents: tuple[str, ...]
    settings: type[S]
    plan: Callable[[S, Upstream], StagePlan]
    compute: Callable[..., Iterator[Any]]
    """`compute(work)` commits the parts of `work` and yields their records, or Progress in between.
    A module's own function, so that a child process finds it by its name."""
    section: type[Section] | None = None
    """The configuration section of the stage's name."""
    table: Table | None = None
    """The schema, key and checks of its rows; None for a folder."""
    prepare: Callable[[Work[S]], Any] | None = None
    """Runs in the task's own process before `compute`, which gets its result as a second
    argument."""
    in_child: bool = False
    """Whether `compute` runs in a child process, because it loads a model whose memory must come
    back."""
    trains: bool = False
    """Whether it saves a checkpoint on SIGTERM, and so gets time to."""
    uses_gpu: bool = True
    gpus: Callable[[S], int] = lambda settings: 1
    """GPUs that a worker needs, where it uses one."""
    reuse: RowReuse[S] | None = None
    read: Callable[[S], Iterator[tuple[PartPlan, list[dict[str, Any]]]]] | None = None
    """For the stage that reads outside data: its parts and their rows, without committing anything.
    Its `compute` yields (record, whether it is new) of every part, and the plan of what it read."""
    lost_rows: Callable[[Manifest, Store], tuple[int, int]] = lambda manifest, store: (
        manifest.rejects,
        manifest.rows + manifest.rejects,
    )
    """(rows lost, rows there would be)."""
    describe: Callable[[S, Store, StagePlan], dict[str, Any]] | None = None
    """What the manifest says of the artifact beyond its parts."""
    remark: Callable[[Manifest], str | None] | None = None
    """A warning about the artifact as a whole, or None."""
    why_empty: str = "no prompt reaches this stage"
    chart: str | None = None
    """`module:function` that draws the artifact's chart (see `tasks.charts`), loaded only to
    draw."""

    @property
    def target(self) -> str:
        """`compute` as a child process finds it: `module:function`."""
        return f"{self.compute.__module__}:{self.compute.__qualname__}"

    def settings_of(self, config: BaseModel) -> S:
        """What this stage reads of the configuration."""
        paths = setting_paths(self.settings).items()
        return self.settings(**{name: reduce(getattr, path.split("."), config) for name, path in paths})

    def work(self, config: Any, store: Store, parts: Sequence[PartPlan] = ()) -> Work[S]:
        """Parts to compute, with what this stage reads of a `PipelineConfig`."""
        return Work(self.name, self.settings_of(config), config.run, config.name, store, tuple(parts))

    def read_values(self, config: BaseModel) -> dict[str, Any]:
        """The same as nested JSON values by path, without what cannot change a row: `qrpo plan`
        compares them."""
        dumped = effective(config)
        values: dict[str, Any] = {}
        for item in fields(self.settings):  # type: ignore[arg-type]
            path = item.metadata.get("key", item.name)
            value: Any = dumped
            for step in path.split("."):
                value = value.get(step, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT:
                values[path] = value
        return values
