"""What orchestration costs: the cold start of a run, seconds and memory for each part, and how long a cached run and a plan take.

    python benchmarks/orchestration.py --parts 100 1000 10000 --out benchmarks/results/orchestration.json

Each size has so many prompts, one prompt in each part, and is run twice: in parts of one prompt and in parts of 256. What the first
takes longer is the cost of the parts themselves: commits (each with several flushes to the disk), leases, records, manifests and Prefect's
tasks. The model has a few thousand weights and says one token. Runs are processes of their own beside one Prefect server.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

QRPO = Path(sys.executable).with_name("qrpo")
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
    """`write_task` in a process of its own: a child's peak memory counts from its parent's, which must stay small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(write_task, (folder, prompts, part_size))


def measure(*command: str | Path, **environment: str) -> dict[str, Any]:
    """Run a command: seconds on the clock and of processor time, peak memory in MiB of its biggest process, its JSON."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=errors, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{errors.read().decode()}")
        text = output.read().decode().strip()
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": usage.ru_maxrss // 1024,
        "answer": json.loads(text) if text.startswith("{") else None,
    }


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """A Prefect server on a free port with a database of its own; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)  # SQLite makes no folders
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    server = subprocess.Popen(
        [QRPO.with_name("prefect"), "server", "start", "--port", str(port)],
        env=environment,
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


def by_parts(folder: Path, parts: int, url: str, repeats: int) -> dict[str, Any]:
    """One size: both cuts computed, then the fine one cached and planned."""
    seconds: dict[str, dict[str, float]] = {}
    found: dict[str, Any] = {"parts_per_stage": parts}
    for size in (1, 256):
        config = written(folder, parts, size)
        run = (QRPO, "run", config, "--store", folder / f"store-{size}", "--until", "quantiles", "--json")
        done = measure(*run, PREFECT_API_URL=url)
        seconds[str(size)] = {
            name: stage["seconds"]
            for name, stage in done["answer"]["stages"].items()
            if stage["parts_computed"]
        }
        found[f"run_in_parts_of_{size}"] = {k: done[k] for k in ("seconds", "cpu_seconds", "peak_mib")}
        if size == 1:
            cached = [measure(*run) for _ in range(repeats)]
            planned = [
                measure(QRPO, "plan", config, "--store", folder / "store-1", "--json") for _ in range(repeats)
            ]
    found["milliseconds_per_part"] = {
        stage: round(1e3 * (fine - seconds["256"][stage]) / parts, 2) for stage, fine in seconds["1"].items()
    }
    for name, runs in (("cached_run", cached), ("plan", planned)):
        found[name] = {
            key: median(run[key] for run in runs) for key in ("seconds", "cpu_seconds", "peak_mib")
        }
    return found


def cold_start(folder: Path, url: str, repeats: int) -> dict[str, Any]:
    """The whole of a run of one part, up to the prompts: beside a server that runs, and with one of its own."""
    config = written(folder, 1, 1)
    (folder / "home").mkdir()
    found = {}
    for name, environment in (("server running", {"PREFECT_API_URL": url}), ("own server", {})):
        runs = []
        for number in range(repeats):
            store = folder / f"cold-{name.replace(' ', '-')}-{number}"
            run = (QRPO, "run", config, "--store", store, "--until", "prompts", "--json")
            runs.append(measure(*run, PREFECT_HOME=str(folder / "home"), **environment))
        found[name] = {key: median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
    found["qrpo --help"] = {
        key: median(measure(QRPO, "--help")[key] for _ in range(repeats))
        for key in ("seconds", "cpu_seconds")
    }
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.pop("PREFECT_API_URL", None)
    folder = arguments.folder or Path(tempfile.mkdtemp())
    results: dict[str, Any] = {"cores": os.cpu_count(), "python": platform.python_version()}
    with prefect_server(folder / "prefect") as url:
        results["cold_start"] = cold_start(folder / "cold", url, arguments.repeats)
        print(json.dumps(results["cold_start"]))
        results["sizes"] = []
        for parts in arguments.parts:
            results["sizes"].append(by_parts(folder / str(parts), parts, url, arguments.repeats))
            print(json.dumps(results["sizes"][-1]), flush=True)
            results["load_average_at_the_end"] = round(os.getloadavg()[0], 1)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
