"""A new stage is one file and one line: it is planned, run, shown, inspected and offered by the command line like the others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAGE = '''\
"""The `lengths` stage: the mean length of each prompt's reference completions."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from qrpo.config import Section, keyed
from storage import PartRecord, Table, fingerprint
from storage.table import column
from tasks.plan import PartPlan, StagePlan, Upstream, make_family, part_key
from tasks.stage import Stage, setting
from tasks.work import Work

TABLE = Table(pa.schema([column("prompt_id", pa.string()), column("mean_length", pa.float32())]), ("prompt_id",))


class LengthsConfig(Section):
    """Lengths of completions."""

    unit: Literal["tokens", "characters"] = "tokens"
    """What is counted."""


@dataclass(frozen=True)
class Settings:
    """What this stage reads of the configuration."""

    section: LengthsConfig = setting("lengths")


def plan(settings: Settings, upstream: Upstream) -> StagePlan:
    """One part for every prompts part."""
    family = make_family("lengths", 1, keyed(settings.section), {})
    parts = []
    for prompts, completions in upstream["completions"].by_prompts().items():
        keys = tuple(part.key for part in completions)
        key = part_key("lengths", family, [key.fingerprint for key in keys])
        parts.append(PartPlan(key, keys, {"prompts": prompts, "split": completions[0].slice["split"]}))
    rows = {split: fingerprint([family, asked]) for split, asked in upstream["completions"].rows.items()}
    parents = upstream.parents("completions")
    return StagePlan("lengths", family, keyed(settings.section), {}, tuple(parts), parents, rows)


def compute(work: Work[Settings]) -> Iterator[PartRecord]:
    """Compute the group part by part."""
    column = {"tokens": "token_ids", "characters": "text"}[work.settings.section.unit]
    for part in work.parts:
        started = time.monotonic()
        lengths: dict[str, list[int]] = {}
        for record in work.inputs(part, "completions"):
            for row in work.store.read_part(record, columns=["prompt_id", column]).to_pylist():
                lengths.setdefault(row["prompt_id"], []).append(len(row[column]))
        rows = [{"prompt_id": name, "mean_length": sum(of) / len(of)} for name, of in lengths.items()]
        table = pa.Table.from_pylist(rows, schema=TABLE.schema)
        yield work.commit(part, table, table=TABLE, started=started)


STAGE = Stage(
    name="lengths",
    version=1,
    summary="Measure how long the reference completions of every prompt are.",
    unit="prompts",
    parents=("completions",),
    settings=Settings,
    section=LengthsConfig,
    table=TABLE,
    plan=plan,
    compute=compute,
    uses_gpu=False,
)
'''


PROGRAM = """
import json, sys
from typer.testing import CliRunner
from flows.cli import app

for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, [*command, "--store", sys.argv[2], "--json"])
    assert done.exit_code == 0, done.stderr
    print(json.dumps(json.loads(done.stdout)))
"""


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """The project with the stage added: one file, one line."""
    root = tmp_path / "extended"
    for package in ("flows", "tasks", "qrpo", "storage"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tasks" / "stages" / "lengths.py").write_text(STAGE)
    registry = root / "tasks" / "stages" / "__init__.py"
    source = registry.read_text()
    line = '    "completions",\n'
    assert source.count(line) == 1
    registry.write_text(source.replace(line, line + '    "lengths",\n'))
    return root


def test_a_stage_of_one_file_and_one_line_runs_like_the_others(
    extended: Path, tiny_model: Path, tmp_path: Path, prefect_server: str
) -> None:
    prompts = [{"prompt": f"Say {number}"} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "reward.py").write_text(
        "def reward(completions, **c):\n    return [len(c) for c in completions]\n"
    )
    config = {
        "name": "nine",
        "prompts": {"source": str(tmp_path / "prompts.jsonl")},
        "reference": {"model": {"path": str(tiny_model)}},
        "completions": {"num_ref": 2, "engine": {"kind": "transformers"}, "sampling": {"max_tokens": 4}},
        "rewards": [{"kind": "function", "function": f"{tmp_path / 'reward.py'}:reward"}],
        "run": {"part_size": 4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    path = str(tmp_path / "config.yaml")
    changes = ("--set", "lengths.unit=characters")
    commands = [
        ("plan", path),
        ("run", path, "--until", "lengths"),
        ("plan", path),
        ("plan", path, *changes),
        ("run", path, "--only", "lengths", *changes),
        ("show", "nine", "lengths"),
        ("inspect", "nine", "lengths", "--sort=-mean_length", "--limit", "3"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands), str(tmp_path / "store")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, ran, planned, changed, only, shown, inspected = map(json.loads, done.stdout.splitlines())

    assert list(first["stages"])[2:5] == ["completions", "lengths", "rewards"]
    ran = ran["stages"]
    assert ran["lengths"]["parts_computed"] == ran["prompts"]["parts_computed"] > 1
    planned = planned["stages"]["lengths"]
    assert planned["parts_cached"] == planned["parts_total"]
    changed = changed["stages"]
    assert changed["lengths"]["reasons"] == ["lengths.unit changed from tokens to characters"]
    assert changed["completions"]["reasons"] == []
    assert list(only["stages"]) == ["lengths"]
    assert shown["rows"] == len(prompts)
    rows = inspected["samples"]
    assert len(rows) == 3
    assert rows[0]["mean_length"] >= rows[1]["mean_length"] >= rows[2]["mean_length"] > 0
