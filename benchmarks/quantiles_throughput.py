"""How fast are quantile rewards? `quantile_rewards` beside plain NumPy broadcasting, sorting with searchsorted, and SciPy.

    python benchmarks/quantiles_throughput.py [--out quantiles.json]

One core, float32, references and rewards in memory as Arrow would hand them over. Medians of 5 interleaved runs; SciPy
works prompt by prompt, so it is timed on the first 2,000 prompts and scaled up. All answers are compared before timing.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from qrpo.method.quantiles import quantile_bounds, quantile_rewards

RUNS = 5
SCIPY_PROMPTS = 2_000


def broadcasting(rewards: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Dense only: (P, K, N) comparisons at once."""
    return (references[:, None, :] <= rewards[:, :, None]).mean(-1)


def sorting(rewards: np.ndarray, references: np.ndarray, ref_offsets: np.ndarray) -> np.ndarray:
    """Any raggedness: (prompt, reward) packed into one 64-bit key, sorted once, searched once."""

    def ordered(values: np.ndarray) -> np.ndarray:
        bits = values.view(np.uint32)
        return bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))

    prompt = np.arange(len(rewards), dtype=np.uint64) << np.uint64(32)
    keys = np.sort(np.repeat(prompt, np.diff(ref_offsets)) | ordered(references))
    found = np.searchsorted(keys, (prompt[:, None] | ordered(rewards)).ravel(), side="right")
    return (found.reshape(rewards.shape) - ref_offsets[:-1, None]) / np.diff(ref_offsets)[:, None]


def scipy_percentiles(rewards: np.ndarray, references: np.ndarray, ref_offsets: np.ndarray) -> np.ndarray:
    """One call of percentileofscore for each prompt."""
    return np.array(
        [
            stats.percentileofscore(references[ref_offsets[p] : ref_offsets[p + 1]], rewards[p], kind="weak")
            / 100
            for p in range(min(SCIPY_PROMPTS, len(rewards)))
        ]
    )


def measure(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(RUNS):
        for name, candidate in candidates.items():
            begin = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def case(prompts: int, lengths: np.ndarray, completions: int, *, dense: bool) -> dict[str, object]:
    """One size: seconds, and comparisons per second, of every way that can do it."""
    rng = np.random.default_rng(0)
    ref_offsets = np.concatenate([[0], np.cumsum(lengths)])
    references = rng.normal(size=ref_offsets[-1]).astype(np.float32)
    rewards = rng.normal(size=(prompts, completions)).astype(np.float32)
    comparisons = int(ref_offsets[-1]) * completions

    def ours() -> np.ndarray:
        if dense:
            return quantile_rewards(rewards, references.reshape(prompts, -1))
        return quantile_rewards(rewards, references, ref_offsets=ref_offsets)

    candidates: dict[str, Callable[[], np.ndarray]] = {
        "quantile_rewards": ours,
        "sort and searchsorted": lambda: sorting(rewards, references, ref_offsets),
    }
    if dense:
        candidates["NumPy broadcasting"] = lambda: broadcasting(rewards, references.reshape(prompts, -1))
    expected = ours()
    for candidate in candidates.values():
        np.testing.assert_allclose(candidate(), expected, atol=1e-6)
    candidates["SciPy percentileofscore"] = lambda: scipy_percentiles(rewards, references, ref_offsets)
    np.testing.assert_allclose(candidates["SciPy percentileofscore"](), expected[:SCIPY_PROMPTS], atol=1e-6)
    seconds = measure(candidates)
    seconds["SciPy percentileofscore"] *= prompts / min(SCIPY_PROMPTS, prompts)
    return {
        "prompts": prompts,
        "references": f"{lengths.min()}" if dense else f"{lengths.min()} to {lengths.max()}",
        "completions": completions,
        "comparisons": comparisons,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "relative": {name: round(value / seconds["quantile_rewards"], 1) for name, value in seconds.items()},
    }


def main() -> None:
    """Run all sizes and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    cases = [
        case(100_000, np.full(100_000, 50), 2, dense=True),
        case(100_000, rng.integers(10, 91, 100_000), 2, dense=False),
        case(1_000_000, np.full(1_000_000, 50), 2, dense=True),
        case(40_000, np.full(40_000, 50), 50, dense=True),
    ]
    q = np.tile(np.arange(51) / 50, 100_000 // 51 + 1)[:100_000, None].astype(np.float32)
    bounds = measure({"bounds": lambda: quantile_bounds(q, np.full(100_000, 50))})
    result = {
        "benchmark": "quantiles_throughput",
        "machine": {"processor": platform.machine(), "numpy": np.__version__, "threads": 1},
        "cases": cases,
        "clopper_pearson_bounds_1e5_seconds": round(bounds["bounds"], 4),
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
