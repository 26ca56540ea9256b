"""The `prompts` stage: read the source, understand each row, hold some prompts out, and cut the
rest into parts.

A part's fingerprint is the hash of its rows, so the other rows of the source do not matter to it.
Where a part ends depends on the prompts near its end alone (content-defined chunking, as in rsync
and restic): prompts inserted, removed or appended move one border, not all that follow.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pyarrow as pa

from qrpo.config import keyed
from qrpo.data.prompts import Prompt, PromptsConfig, parse_row, split_of
from qrpo.data.sources import dataset_names, is_dataset, read_rows, source_files
from qrpo.errors import DataError
from storage import PartKey, PartRecord, Store, file_digest, fingerprint, folder_digest
from storage.checks import no_null_items, one_of
from storage.processes import temporary_name
from storage.table import Table, column
from tasks.plan import PartPlan, StagePlan, Upstream, add_digests, as_planned, make_family
from tasks.stage import Stage, setting
from tasks.work import Work

VERSION = 1

TOOL_USE = column("tool_use", pa.string(), null=True)
"""JSON of `messages` with their tool calls and of `tools`; null for a prompt without."""

TABLE = Table(
    schema=pa.schema(
        [
            column("prompt_id", pa.string()),
            column(
                "messages",
                pa.list_(pa.struct([column("role", pa.string()), column("content", pa.string())])),
            ),
            column("split", pa.string()),
            column("source", pa.string()),
            column("offline_completions", pa.list_(pa.string())),
            column("metadata", pa.string()),
            column("conversational", pa.bool_()),
            TOOL_USE,
        ]
    ),
    key=("prompt_id",),
    checks=(one_of("split", ("train", "eval")), no_null_items("offline_completions")),
)


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: PromptsConfig = setting("prompts")
    part_size: int = setting("run.part_size")


class PromptsPart:
    """One part as it fills up: its rows, and the rejects met since the last part."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.rows: list[dict[str, Any]] = []
        self.rejects: list[dict[str, Any]] = []

    def plan(self) -> PartPlan:
        """The part's key and what later stages need to know of it without reading it."""
        family = make_family("prompts", VERSION, {}, {})
        key = PartKey("prompts", family, row_hash([family, self.split, self.rows, self.rejects]))
        ids = row_hash([row["prompt_id"] for row in self.rows])
        offline = row_hash([[row["prompt_id"], row["offline_completions"]] for row in self.rows])
        named = {"split": self.split, "rows": len(self.rows), "ids": ids, "offline": offline}
        tools = {TOOL_USE.name: True} if any(TOOL_USE.name in row for row in self.rows) else {}
        return PartPlan(key, (), {**named, **tools, **_content(self.rows)})


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """The parts as an earlier run of the same source and settings cut them; none are known where
    there was none."""
    empty = _unread(settings.section, source_identity(settings.section, {}))
    manifest = upstream.store.manifest("prompts", empty.fingerprint)
    if manifest is None:
        return empty
    return replace(empty, parts=as_planned(manifest.parts), known=True, manifest=manifest)


def _unread(config: PromptsConfig, outside: dict[str, Any]) -> StagePlan:
    """The plan without parts, for sources of this identity."""
    section = keyed(config)
    family = make_family("prompts", VERSION, section, outside)
    artifact = fingerprint(["prompts", family])
    return StagePlan("prompts", family, section, outside, (), {}, artifact=artifact, known=False)


def content(upstream: Upstream, split: str, columns: str) -> str:
    """The digest of some columns of all prompts of a split, in any order and any cut; see
    `_content`."""
    sums = []
    for part in upstream.prompt_parts(split):
        if columns in part.slice:
            sums.append(part.slice[columns])
        else:  # written by an earlier version
            record = upstream["prompts"].records[part.key.fingerprint]
            sums.append(_content(upstream.store.read_part(record).to_pylist())[columns])
    return add_digests(sums)


def prompt_rows(work: Work[Any], part: PartPlan, *columns: str) -> dict[str, dict[str, Any]]:
    """These columns of the prompts that `part` is made from, by prompt id, in the part's order.

    With `messages` also `tools`, as chat templates take them.
    """
    return {row["prompt_id"]: row for row in read_prompts(work.store, work.input(part, "prompts"), *columns)}


def read_prompts(store: Store, record: PartRecord, *columns: str) -> list[dict[str, Any]]:
    """These columns of a prompts part and the prompts' ids; with `messages` also `tools`."""
    wanted = ["prompt_id", *columns]
    if "messages" in columns and record.metadata.get(TOOL_USE.name):
        wanted.append(TOOL_USE.name)
    rows: list[dict[str, Any]] = store.read_part(record, columns=wanted).to_pylist()
    for row in rows if "messages" in columns else ():
        row |= {"tools": [], **json.loads(row.pop(TOOL_USE.name, None) or "{}")}
    return rows


def source_identity(config: PromptsConfig, copies: "Copies") -> dict[str, Any]:
    """What the sources, or their copies, are: the digests of files, or a hub dataset's name as it
    is given."""

    def identity(source: str) -> Any:
        if not is_dataset(source):
            files = copies[source].values() if source in copies else source_files(source)
            return [file_digest(file) for file in files]
        folder, *which = dataset_names(source)
        return {"which": which, "files": folder_digest(folder)} if os.path.isdir(folder) else source

    named = {"source": config.source, "eval_source": config.eval_source}
    return {name: identity(source) for name, source in named.items() if source is not None}


Copies = dict[str, dict[str, str]]
"""Source -> URL of each of its files -> a local copy."""


def _copied(config: PromptsConfig, folder: Path) -> Copies:
    """Copies of the sources' files as they are now: a source may grow or change while it is
    read."""
    copies: Copies = {}
    for source in (config.source, config.eval_source):
        if source is None or is_dataset(source):
            continue
        copies[source] = {}
        for number, url in enumerate(source_files(source)):
            suffixes = "".join(PurePosixPath(url).suffixes[-2:])
            copy = folder / f"{len(copies)}-{number}{suffixes}"
            try:
                with fsspec.open(url, "rb") as file, copy.open("xb") as written:
                    shutil.copyfileobj(file, written)
            except OSError as error:
                raise DataError(f"cannot copy {url} into {folder} to read it: {error}") from error
            copies[source][url] = str(copy)
    return copies


def cut(config: PromptsConfig, part_size: int, copies: Copies) -> Iterator[PromptsPart]:
    """The parts of the sources, of about `part_size` prompts each; a repeated prompt is a
    reject."""
    parts = {split: PromptsPart(split) for split in ("train", "eval")}
    seen: dict[str, str] = {}
    read = _read_source(config, config.source, None, copies)
    if config.eval_source is not None:
        read = chain(read, _read_source(config, config.eval_source, "eval", copies))
    for where, split, prompt in read:
        if isinstance(prompt, DataError):
            parts[split].rejects.append({"key": where, "reason": str(prompt)})
        elif prompt.prompt_id in seen:
            reason = f"the same prompt as at {seen[prompt.prompt_id]}"
            parts[split].rejects.append({"key": where, "reason": reason, "prompt_id": prompt.prompt_id})
        else:
            seen[prompt.prompt_id] = where
            parts[split].rows.append(_row(prompt, split, config.name))
            if _ends_part(prompt.prompt_id, len(parts[split].rows), part_size):
                yield parts[split]
                parts[split] = PromptsPart(split)
    for part in parts.values():
        if part.rows or part.rejects:
            yield part


def compute(work: Work[Settings]) -> Iterator[tuple[PartRecord, bool] | StagePlan]:
    """Read the sources as they are now and commit every part that the store does not have.

    Yields (record, whether it is new) for each part, and the plan of what was read.
    """
    section = work.settings.section
    place = work.store.local_path("work")
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{temporary_name()}-", dir=place) as folder:
        copies = _copied(section, Path(folder))
        yield _unread(section, source_identity(section, copies))
        for part in cut(section, work.settings.part_size, copies):
            started = time.monotonic()
            planned = part.plan()
            record = work.store.part(planned.key)
            new = record is None
            if record is None:
                record = work.commit(
                    planned,
                    pa.Table.from_pylist(part.rows, TABLE.schema),
                    table=TABLE,
                    started=started,
                    rejects=part.rejects,
                )
            yield record, new


def _read(settings: Settings) -> Iterator[tuple[PartPlan, list[dict[str, Any]]]]:
    for part in cut(settings.section, settings.part_size, {}):
        yield part.plan(), part.rows


def _rows(source: str, copies: Copies) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The rows of a source, from copies where it has some, each with its place in the source."""
    for url, path in copies.get(source, {source: source}).items():
        try:
            for where, row in read_rows(path):
                named = DataError(str(row).replace(path, url)) if isinstance(row, DataError) else row
                yield where.replace(path, url, 1), named
        except DataError as error:
            raise DataError(str(error).replace(path, url)) from error


def _read_source(
    config: PromptsConfig, source: str, split: str | None, copies: Copies
) -> Iterator[tuple[str, str, Prompt | DataError]]:
    """(where, split, prompt or why there is none) for every row of a source, in order."""
    for where, row in islice(_rows(source, copies), config.limit):
        try:
            if isinstance(row, DataError):
                raise row
            prompt = parse_row(row, config)
            yield where, split or split_of(prompt.prompt_id, config.eval_fraction), prompt
        except DataError as error:
            yield where, split or "train", error


def _ends_part(prompt_id: str, size: int, part_size: int) -> bool:
    """Cut after a prompt whose id says so, once half of `part_size` is reached: on average at about
    `part_size`."""
    half = max(1, part_size // 2)
    return size >= 2 * part_size or (size >= half and int(prompt_id[:8], 16) % half == 0)


def _row(prompt: Prompt, split: str, source: str) -> dict[str, Any]:
    plain = [{"role": message["role"], "content": message["content"]} for message in prompt.messages]
    tool_use = {"messages": prompt.messages, "tools": prompt.tools}
    further = {TOOL_USE.name: json.dumps(tool_use, ensure_ascii=False)}
    return {
        **(further if prompt.tools or plain != prompt.messages else {}),
        "prompt_id": prompt.prompt_id,
        "messages": plain,
        "split": split,
        "source": source,
        "offline_completions": prompt.offline_completions,
        "metadata": prompt.metadata,
        "conversational": prompt.conversational,
    }


def row_hash(value: Any) -> str:
    """32 hex digits of a row's content. Keeps text as it is, where `storage.fingerprint` escapes
    it; part names depend on it."""
    return _sha256(value)[:32]


def _content(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Digests of what different stages read of the prompts."""
    read: dict[str, Callable[[dict[str, Any]], Any]] = {
        "id_sum": lambda row: row["prompt_id"],
        "seen_sum": lambda row: [
            row[name] for name in ("prompt_id", "messages", "conversational", "metadata")
        ],
        "chosen_sum": lambda row: [row["prompt_id"], row["offline_completions"][:1]],
        "offline_sum": lambda row: [row["prompt_id"], row["offline_completions"]],
    }
    return {name: add_digests(_sha256(of(row)) for row in rows) for name, of in read.items()}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


STAGE = Stage(
    name="prompts",
    version=VERSION,
    summary="Read the prompts x, hold some out for evaluation, and cut the rest into parts.",
    unit="prompts",
    parents=(),
    settings=Settings,
    section=PromptsConfig,
    table=TABLE,
    plan=plan,
    compute=compute,
    read=_read,
    uses_gpu=False,
    describe=lambda settings, store, plan: settings.section.model_dump(include={"source", "eval_source"}),
)
