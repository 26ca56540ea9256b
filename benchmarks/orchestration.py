"""What orchestration costs: the cold start of a run, seconds and memory for each part, and how long
a cached run and a plan take.

    python -m benchmarks.orchestration --parts 100 1000 10000 --rounds 3 --out orchestration.json

Each size has that many prompts and is computed twice: in parts of one prompt and in parts of 256.
The difference is the cost of the
parts: commits (each with several flushes to the disk), leases, records, manifests and Prefect's
tasks. The model has a few thousand weights and samples one token. Every run is its own process
beside one Prefect server.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from benchmarks.harness import Case, command, command_line, compare, report, run_command, summarize

QRPO = Path(sys.executable).with_name("qrpo")
PARTS = (1, 256)  # prompts in a part
REWARD = """\
def reward(prompts, completions, answer, **columns):
    return [sum(letter in right for letter in said) for said, right in zip(completions, answer)]
"""


def write_task(folder: Path, prompts: int, part_size: int) -> Path:
    """Prompts, model, reward and configuration; the configuration's path."""
    from qrpo.tiny import build_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"say {n}: a b c", "answer": "abc"} for n in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    if not (folder / "model").exists():
        texts = [row["prompt"] for row in rows[:60]]
        build_tiny_model(
            folder / "model", texts, hidden_size=64, heads=2, layers=1, vocab_size=300, max_length=64
        )
    config = {
        "name": f"parts-of-{part_size}",
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "reference": {"model": {"path": str(folder / "model")}},
        "completions": {
            "num_ref": 2,
            "engine": {"kind": "transformers", "max_num_seqs": 512},
            "sampling": {"max_tokens": 1},
        },
        "rewards": [{"kind": "function", "name": "letters", "function": f"{folder / 'reward.py'}:reward"}],
        "run": {"part_size": part_size, "cpu_threads": 1},
    }
    path = folder / f"parts-of-{part_size}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def written(folder: Path, prompts: int, part_size: int) -> Path:
    """`write_task` in another process: a child's peak memory counts from its parent's, which must
    stay small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(write_task, (folder, prompts, part_size))


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """A Prefect server on a free port with a new database; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)  # SQLite makes no folders
    server = subprocess.Popen(
        [QRPO.with_name("prefect"), "server", "start", "--port", str(port)],
        env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/api"
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"the Prefect server ended with code {server.returncode}")
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def by_parts(folder: Path, parts: int, url: str, rounds: int) -> Case:
    """One size: both part sizes computed once, then the small parts cached and planned."""
    computed, seconds = {}, {}
    for size in PARTS:
        config = written(folder, parts, size)
        store = ("--store", folder / f"store-{size}", "--json")
        sample, text = run_command(QRPO, "run", config, "--until", "quantiles", *store, PREFECT_API_URL=url)
        computed[f"run in parts of {size}"] = [sample]
        stages = json.loads(text)["stages"]
        seconds[size] = {name: s["seconds"] for name, s in stages.items() if s["parts_computed"]}
    config, store = folder / "parts-of-1.yaml", ("--store", folder / "store-1", "--json")
    repeated = {
        "cached run": command(QRPO, "run", config, "--until", "quantiles", *store),
        "plan": command(QRPO, "plan", config, *store),
    }
    fine, coarse = (seconds[size] for size in PARTS)
    return {
        "parts_per_stage": parts,
        "milliseconds_per_part": {s: round(1e3 * (fine[s] - coarse[s]) / parts, 2) for s in fine},
        "ways": summarize(computed) | compare(repeated, rounds, untimed=0),
    }


def cold_start(folder: Path, url: str, rounds: int) -> Case:
    """A whole run of one part, up to the prompts: beside a running server, and with a server that
    it starts."""
    config = written(folder, 1, 1)
    (folder / "home").mkdir()

    def run(**environment: str) -> dict[str, float]:
        store = tempfile.mkdtemp(dir=folder)
        words = (QRPO, "run", config, "--store", store, "--until", "prompts", "--json")
        return run_command(*words, PREFECT_HOME=str(folder / "home"), **environment)[0]

    ways = {
        "server running": lambda: run(PREFECT_API_URL=url),
        "own server": run,
        "qrpo --help": command(QRPO, "--help"),
    }
    return {"case": "cold start", "ways": compare(ways, rounds, untimed=0)}


if __name__ == "__main__":
    parser = command_line(__doc__, rounds=3)
    parser.add_argument("--parts", type=int, nargs="+", default=[100, 1000])
    options = parser.parse_args()
    os.environ.pop("PREFECT_API_URL", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with prefect_server(folder / "prefect") as url:
            cases = [cold_start(folder / "cold", url, options.rounds)]
            for parts in options.parts:
                cases.append(by_parts(folder / str(parts), parts, url, options.rounds))
                report(options, cases)  # sizes take minutes to hours: keep what is there
