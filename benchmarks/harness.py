"""What all benchmarks share: clocks, interleaved rounds, summaries, machine facts, command line,
JSON.

A benchmark compares *ways* to do the same work. A way is a callable that does the work once and
returns a sample: numbers by name, such as `wall` and `cpu` seconds or `peak_mib`. `timed` makes a
way from a function, `command` runs a process, `forked` runs a function in a fork. `interleave` runs
all ways in turn, so that a busy moment of the machine hits all of them; `summarize` reduces the
samples. A benchmark reports *cases*: facts about the work, and under `ways` the summary.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Sample = dict[str, float]
Way = Callable[[], Sample]
Case = dict[str, Any]


def clocks() -> Sample:
    """Wall time and processor time, user and system, of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"wall": time.perf_counter(), "cpu": sum(usage.ru_utime + usage.ru_stime for usage in used)}


def since(start: Sample) -> Sample:
    """Seconds since `start`, a reading of `clocks`."""
    return {name: now - start[name] for name, now in clocks().items()}


def peak_mib() -> float:
    """The largest resident size that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(
    work: Callable[[], Any], check: Callable[[Any], None] | None = None, *, warm_up: bool = False
) -> Way:
    """A way that calls `work`; `check` gets its answer after the clocks stop.

    With `warm_up`, an untimed call comes first: it brings caches and the allocator into the same
    state each time.
    """

    def way() -> Sample:
        if warm_up:
            work()
        start = clocks()
        answer = work()
        sample = since(start)
        if check is not None:
            check(answer)
        return sample

    return way


def run_command(*words: str | Path, **environment: str) -> tuple[Sample, str]:
    """Run a process to its end: its sample and its standard output. Exits where the process fails.

    The sample has `peak_mib` where that exceeds the peak of this process, from whose size a fork
    starts.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(word) for word in words], stdout=output, stderr=errors, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(map(str, words))} failed:\n{errors.read().decode()[-4000:]}")
        text = output.read().decode()
    sample = {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}
    return sample | ({"peak_mib": peak} if (peak := usage.ru_maxrss / 1024) > peak_mib() else {}), text


def command(*words: str | Path, **environment: str) -> Way:
    """A way that runs a process."""
    return lambda: run_command(*words, **environment)[0]


def forked(action: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of `action` in a fork of this process, which keeps its imports and nothing that it
    opens."""
    answers, answer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: answer.send(action(*arguments)))
    process.start()
    answer.close()
    try:
        return answers.recv()
    except EOFError:
        raise RuntimeError(f"{action.__name__}{arguments} failed, see above") from None
    finally:
        process.join()


def interleave(
    ways: Mapping[str, Way], rounds: int, *, untimed: int = 1, once: Sequence[str] = ()
) -> dict[str, list[Sample]]:
    """The samples of every way: all ways in turn, `rounds` times, after `untimed` rounds that fill
    caches.

    The ways named in `once` are so slow that they run in the first timed round only.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for number in range(1 - untimed, rounds + 1):
        for name, way in ways.items():
            if name in once and number != 1:
                continue
            sample = way()
            print(f"round {number}, {name}: {shown(sample)}", file=sys.stderr, flush=True)
            if number > 0:
                samples[name].append(sample)
    return samples


def summarize(samples: Mapping[str, Sequence[Sample]], floor: str | None = None) -> dict[str, Any]:
    """Median, minimum and maximum of each number of each way.

    With `floor`, also the median over rounds of the ratio to that way in the same round.
    """
    found: dict[str, Any] = {}
    for way, taken in samples.items():
        found[way] = {}
        for name in [name for name in taken[0] if all(name in sample for sample in taken)]:
            values = [sample[name] for sample in taken]
            found[way][name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            base = [sample.get(name, 0.0) for sample in samples[floor]] if floor else []
            if base and all(base):
                ratios = [value / least for value, least in zip(values, base, strict=False)]
                found[way][name]["times_floor"] = statistics.median(ratios)
    return found


def compare(ways: Mapping[str, Way], rounds: int, floor: str | None = None, **options: Any) -> dict[str, Any]:
    """`interleave`, then `summarize`."""
    return summarize(interleave(ways, rounds, **options), floor)


def shown(sample: Sample) -> str:
    """Numbers in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in sample.items())


def table(ways: Mapping[str, Any]) -> str:
    """A summary in Markdown: medians, and their ratios to the floor in brackets."""
    names = list(dict.fromkeys(name for numbers in ways.values() for name in numbers))
    lines = [f"| way | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for way, numbers in ways.items():
        cells = [way]
        for name in names:
            number = numbers.get(name)
            ratio = f" ({number['times_floor']:.2f})" if number and "times_floor" in number else ""
            cells.append(f"{number['median']:.4g}{ratio}" if number else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("numpy", "torch", "transformers", "polars", "duckdb", "datasets")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages if name in sys.modules},
    }


def command_line(description: str | None, rounds: int | None = 5) -> argparse.ArgumentParser:
    """A parser with `--out` and, unless `rounds` is None, `--rounds`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")
    return parser


def report(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Print each case and its table; write everything to `options.out`."""
    for case in cases:
        facts = {name: value for name, value in case.items() if name != "ways"}
        print(f"\n{json.dumps(facts, indent=None if 'ways' in case else 2)}")
        if "ways" in case:
            print(f"\n{table(case['ways'])}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    if options.out:
        result = {
            "benchmark": Path(sys.argv[0]).stem,
            "machine": machine(),
            "options": settings,
            "cases": cases,
        }
        options.out.write_text(json.dumps(result, indent=1, default=str) + "\n")
