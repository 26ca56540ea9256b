"""How fast do training samples come, and how soon after a resume? `storage.ShardReader` beside six streaming readers.

    python -m venv peers && peers/bin/pip install -r benchmarks/requirements-streaming.txt
    PYTHONPATH=. peers/bin/python -P benchmarks/streaming_readers.py --out benchmarks/results/streaming_readers.json

An epoch of 50,000 samples of 400 token ids, shuffled as each one shuffles, in batches of 64 stacked into a tensor; one
process, no workers, data on local disk and in the page cache. Then the time from opening the data with the state that
was saved after 40,000 samples to the next sample. Each measurement has a process of its own, forked from one that has
imported all readers; the runs are interleaved. The sum of what was read is compared with what was written.

The floors: `read` only reads the Parquet column, `read and collate` also stacks its rows into batches, in file order.
"""

import argparse
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLES, TOKENS, BATCH, RESUME_AT, FILES = 50_000, 400, 64, 40_000, 50
PER_FILE = SAMPLES // FILES
PACKAGES = {
    "HF datasets, streaming": "datasets",
    "HF datasets, map-style": "datasets",
    "MosaicML streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "torchdata over Parquet": "torchdata",
    "WebDataset": "webdataset",
}

Reader = Callable[[], Iterable[Any]]
"""Opens the data and iterates over batches."""
Resume = Callable[[Any], Iterator[Any]]
"""Opens the data with a saved state and iterates over samples or batches."""


def tokens_of(file: int) -> np.ndarray:
    """The samples of one file (PER_FILE, TOKENS)."""
    return np.random.default_rng(file).integers(0, 32_000, (PER_FILE, TOKENS), dtype=np.int32)


def stacked(samples: Iterable[np.ndarray]) -> Iterator[Any]:
    """Tensors (BATCH, TOKENS) of consecutive samples."""
    import torch

    samples = iter(samples)
    while batch := list(itertools.islice(samples, BATCH)):
        yield torch.from_numpy(np.stack(batch))


def collate(samples: list[Any]) -> Any:
    """The same for a data loader, from arrays or from dicts of them."""
    import torch

    rows = [sample["input_ids"] if isinstance(sample, dict) else sample for sample in samples]
    return torch.from_numpy(np.stack(rows))


# ---------------------------------------------------------------------------------------------- ways to write


def write_parquet(data: Path) -> None:
    """For the floors, HF and torchdata."""
    (data / "parquet").mkdir()
    for file in range(FILES):
        column = pa.FixedSizeListArray.from_arrays(tokens_of(file).ravel(), TOKENS)
        table = pa.table({"input_ids": column.cast(pa.list_(pa.int32()))})
        pq.write_table(table, data / "parquet" / f"{file:03}.parquet", compression="zstd")


def write_store(data: Path) -> None:
    """Ours: the same tables as committed parts."""
    from storage import PartKey, Store

    store = Store(data / "store")
    records = [
        store.commit_part(PartKey("samples", "benchmark", f"{file:03}"), pq.read_table(path))
        for file, path in enumerate(sorted((data / "parquet").iterdir()))
    ]
    (data / "records").write_bytes(pickle.dumps(records))


def import_mosaic() -> Any:
    """MosaicML's `streaming`. It imports torchvision for its image sets, which are not used here: where that is not installed
    (its wheels do not go with a CPU build of torch), empty classes stand in."""
    import types

    if importlib.util.find_spec("torchvision") is None:
        for name in (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        ):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    return importlib.import_module("streaming")


def write_mosaic(data: Path) -> None:
    """MDS shards."""

    columns = {"input_ids": f"ndarray:int32:{TOKENS}"}
    with import_mosaic().MDSWriter(out=str(data / "mosaic"), columns=columns) as writer:
        for file in range(FILES):
            for sample in tokens_of(file):
                writer.write({"input_ids": sample})


def litdata_tokens(file: int) -> Iterator[Any]:
    """One document per sample, as litdata's `TokensLoader` wants it."""
    import torch

    for sample in tokens_of(file):
        yield torch.from_numpy(sample)


def write_litdata(data: Path) -> None:
    """Chunks of tokens."""
    import litdata

    litdata.optimize(
        fn=litdata_tokens,
        inputs=list(range(FILES)),
        output_dir=str(data / "litdata"),
        chunk_size=(TOKENS * PER_FILE),
        item_loader=litdata.TokensLoader(),
        num_workers=1,
        start_method="fork",
    )


def write_webdataset(data: Path) -> None:
    """Tar files of .npy files."""
    import webdataset

    (data / "webdataset").mkdir()
    with webdataset.ShardWriter(
        str(data / "webdataset" / "%03d.tar"), maxcount=PER_FILE, verbose=0
    ) as writer:
        for file in range(FILES):
            for number, sample in enumerate(tokens_of(file)):
                writer.write({"__key__": f"{file:03}{number:06}", "npy": sample})


# ---------------------------------------------------------------------------------------------- ways to read


def bare_read(data: Path) -> tuple[Reader, Resume | None]:
    """Columns as they lie in the files."""

    def read() -> Iterator[Any]:
        for path in sorted((data / "parquet").iterdir()):
            column = pq.read_table(path, use_threads=False)["input_ids"].combine_chunks()
            yield column.values.to_numpy().reshape(-1, TOKENS)

    return read, None


def read_and_collate(data: Path) -> tuple[Reader, Resume | None]:
    """The least that a loader of single samples must do."""
    read, _ = bare_read(data)
    return lambda: stacked(sample for samples in read() for sample in samples), None


def ours(data: Path) -> tuple[Reader, Resume | None]:
    """`storage.ShardReader`; the state is one integer."""
    from storage import ShardReader, Store

    def rows(start: int = 0) -> Iterator[Any]:
        records = pickle.loads((data / "records").read_bytes())  # noqa: S301
        reader = ShardReader(Store(data / "store"), records, seed=1, columns=["input_ids"])
        return (row["input_ids"] for row in reader.iterate(0, start))

    return lambda: stacked(rows()), lambda state: rows(RESUME_AT)


def hf_stream(data: Path) -> Any:
    """An `IterableDataset` with a buffer of 1,000 samples."""
    from datasets import load_dataset

    files = sorted(map(str, (data / "parquet").iterdir()))
    loaded = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return loaded.shuffle(seed=1, buffer_size=1000).with_format("numpy")


def hf_streaming(data: Path) -> tuple[Reader, Resume | None]:
    """Through torch's loader."""
    from torch.utils.data import DataLoader

    def resume(state: Any) -> Iterator[Any]:
        dataset = hf_stream(data)
        dataset.load_state_dict(state)
        return iter(dataset)

    return lambda: DataLoader(hf_stream(data), batch_size=BATCH, collate_fn=collate), resume


def hf_streaming_state(data: Path) -> Any:
    """Its state after 40,000 samples."""
    dataset = hf_stream(data)
    for _ in itertools.islice(dataset, RESUME_AT):
        pass
    return dataset.state_dict()


def hf_map(data: Path) -> tuple[Reader, Resume | None]:
    """A memory-mapped `Dataset`; no state is needed to skip."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    def dataset() -> Any:
        files = sorted(map(str, (data / "parquet").iterdir()))
        loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(data / "hf-cache"))
        return loaded.shuffle(seed=1).with_format("numpy")

    return (
        lambda: DataLoader(dataset(), batch_size=BATCH, collate_fn=collate),
        lambda state: iter(dataset().skip(RESUME_AT)),
    )


def mosaic_dataset(data: Path) -> Any:
    """With its default shuffle."""
    return import_mosaic().StreamingDataset(
        local=str(data / "mosaic"), shuffle=True, shuffle_seed=1, batch_size=BATCH
    )


def mosaic(data: Path) -> tuple[Reader, Resume | None]:
    """Through its own loader."""
    streaming = import_mosaic()

    def resume(state: Any) -> Iterator[Any]:
        dataset = mosaic_dataset(data)
        dataset.load_state_dict(state)
        return iter(dataset)

    return lambda: streaming.StreamingDataLoader(
        mosaic_dataset(data), batch_size=BATCH, collate_fn=collate
    ), resume


def mosaic_state(data: Path) -> Any:
    """Its state after 40,000 samples."""
    return mosaic_dataset(data).state_dict(RESUME_AT, False)


def litdata_loader(data: Path) -> Any:
    """Its token loader, the fastest way it has for samples of equal length."""
    import litdata

    dataset = litdata.StreamingDataset(
        str(data / "litdata"), item_loader=litdata.TokensLoader(block_size=TOKENS), shuffle=True, seed=1
    )
    return litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)


def litdata(data: Path) -> tuple[Reader, Resume | None]:
    """Through its own loader."""

    def resume(state: Any) -> Iterator[Any]:
        loader = litdata_loader(data)
        loader.load_state_dict(state)
        return iter(loader)

    return lambda: litdata_loader(data), resume


def litdata_state(data: Path) -> Any:
    """Its state after 40,000 samples."""
    loader = litdata_loader(data)
    for _ in itertools.islice(loader, RESUME_AT // BATCH):
        pass
    return loader.state_dict()


def torchdata_loader(data: Path) -> Any:
    """Nodes over the Parquet files: torchdata leaves reading to its user."""
    from torchdata import nodes

    class Rows(nodes.BaseNode):  # type: ignore[misc]
        """Rows of files in a shuffled order, and shuffled within each: the state is the file and the row."""

        def reset(self, initial_state: dict[str, Any] | None = None) -> None:
            super().reset(initial_state)
            self._file, self._row = (initial_state or {"at": (0, 0)})["at"]
            self._order = np.random.default_rng(1).permutation(FILES)
            self._samples: Any = None

        def next(self) -> Any:
            if self._samples is None:
                if self._file == FILES:
                    raise StopIteration
                path = data / "parquet" / f"{self._order[self._file]:03}.parquet"
                column = pq.read_table(path, use_threads=False)["input_ids"].combine_chunks()
                samples = column.values.to_numpy().reshape(-1, TOKENS)
                self._samples = samples[np.random.default_rng(self._file).permutation(len(samples))]
            sample = self._samples[self._row]
            self._row += 1
            if self._row == len(self._samples):
                self._file, self._row, self._samples = self._file + 1, 0, None
            return sample

        def get_state(self) -> dict[str, Any]:
            return {"at": (self._file, self._row)}

    batches = nodes.Batcher(Rows(), BATCH, drop_last=False)
    return nodes.Loader(nodes.Mapper(batches, collate))


def torchdata(data: Path) -> tuple[Reader, Resume | None]:
    """Through its own loader."""

    def resume(state: Any) -> Iterator[Any]:
        loader = torchdata_loader(data)
        loader.load_state_dict(state)
        return iter(loader)

    return lambda: torchdata_loader(data), resume


def torchdata_state(data: Path) -> Any:
    """Its state after 40,000 samples."""
    loader = torchdata_loader(data)
    for _ in itertools.islice(loader, RESUME_AT // BATCH):
        pass
    return loader.state_dict()


def webdataset(data: Path) -> tuple[Reader, Resume | None]:
    """Tar files in a shuffled order and a buffer of 1,000 samples."""
    import webdataset as wds

    urls = sorted(map(str, (data / "webdataset").iterdir()))

    def samples() -> Any:
        pipeline = wds.WebDataset(urls, shardshuffle=FILES, seed=1, empty_check=False)
        return pipeline.shuffle(1000, seed=1).decode().to_tuple("npy").map(lambda sample: sample[0])

    # it keeps no state: what was seen is read again
    return lambda: stacked(samples()), lambda state: itertools.islice(iter(samples()), RESUME_AT, None)


READERS: dict[str, Any] = {
    "floor: read": bare_read,
    "floor: read and collate": read_and_collate,
    "ShardReader": ours,
    "litdata": litdata,
    "torchdata over Parquet": torchdata,
    "HF datasets, map-style": hf_map,
    "WebDataset": webdataset,
    "HF datasets, streaming": hf_streaming,
    "MosaicML streaming": mosaic,
}
STATES: dict[str, Callable[[Path], Any]] = {
    "litdata": litdata_state,
    "torchdata over Parquet": torchdata_state,
    "HF datasets, streaming": hf_streaming_state,
    "MosaicML streaming": mosaic_state,
}
WRITERS: list[tuple[str, Callable[[Path], None]]] = [
    ("parquet", write_parquet),
    ("store", write_store),
    ("mosaic", write_mosaic),
    ("litdata", write_litdata),
    ("webdataset", write_webdataset),
]


def run_one(name: str, data: Path) -> dict[str, Any]:
    """One epoch and one resume, in this process; `hf-cache`, `state-*` must be there."""
    import torch

    torch.set_num_threads(1)
    read, _ = READERS[name](data)
    started, processor = time.perf_counter(), time.process_time()
    samples = total = 0
    for batch in read():
        samples += len(batch)
        total += int(batch[:, 0].sum())
    result: dict[str, Any] = {
        "epoch_seconds": time.perf_counter() - started,
        "epoch_cpu_seconds": time.process_time() - processor,
    }
    expected = sum(int(tokens_of(file)[:, 0].sum(dtype=np.int64)) for file in range(FILES))
    assert (samples, total) == (SAMPLES, expected), (
        f"{name} read {samples} samples, or others than were written"
    )
    return result


def resume_one(name: str, data: Path) -> dict[str, Any]:
    """The time from a saved state to the next sample, in this process."""
    _, resume = READERS[name](data)
    if resume is None:
        return {}
    saved = data / f"state-{name}"
    state = pickle.loads(saved.read_bytes()) if saved.exists() else None  # noqa: S301
    started, processor = time.perf_counter(), time.process_time()
    next(iter(resume(state)))
    return {
        "resume_seconds": time.perf_counter() - started,
        "resume_cpu_seconds": time.process_time() - processor,
    }


def in_process(action: str, name: str, data: Path) -> dict[str, Any]:
    """The answer of one action, in a fork of this process: everything is imported, nothing is open."""
    answers, answer = multiprocessing.Pipe(duplex=False)

    def target() -> None:
        answer.send(act(action, name, data))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    answer.close()
    try:
        found: dict[str, Any] = answers.recv()
    except EOFError:
        raise RuntimeError(f"{name}, {action}: it failed, see above") from None
    process.join()
    return found


def act(action: str, name: str, data: Path) -> dict[str, Any]:
    """One action in this process."""
    if action == "write":
        dict(WRITERS)[name](data)
    elif action == "state" and name in STATES:
        (data / f"state-{name}").write_bytes(pickle.dumps(STATES[name](data)))
    elif action == "epoch":
        return run_one(name, data)
    elif action == "resume":
        return resume_one(name, data)
    return {}


def measure(data: Path, runs: int) -> dict[str, Any]:
    """Write the data, run all readers `runs` times, and say the medians."""
    import_mosaic()
    for package in ("datasets", "litdata", "storage", "torch.utils.data", "torchdata.nodes", "webdataset"):
        importlib.import_module(package)
    for name, _ in WRITERS:
        if not (data / name).exists():
            in_process("write", name, data)
    for name in READERS:
        if not (data / f"state-{name}").exists():
            in_process("state", name, data)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in READERS}
    for run in range(runs + 1):
        for name in READERS:
            for action in ("epoch", "resume"):
                for key, value in in_process(action, name, data).items():
                    if run:  # the first fills the caches
                        found[name].setdefault(key, []).append(value)
                    print(f"run {run}, {name}: {key} {value:.4f}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(values) for key, values in keys.items()} for name, keys in found.items()
    }
    own, floor = medians["ShardReader"], medians["floor: read and collate"]
    peers = [medians[name] for name in PACKAGES]
    return {
        "benchmark": "streaming",
        "samples": SAMPLES,
        "tokens": TOKENS,
        "batch": BATCH,
        "resume_at": RESUME_AT,
        "runs": runs,
        "versions": {
            package: importlib.metadata.version(package) for package in sorted(set(PACKAGES.values()))
        },
        "readers": {
            name: {
                **{key: round(value, 4) for key, value in medians[name].items()},
                "epoch_seconds_all": [round(value, 3) for value in found[name]["epoch_seconds"]],
                "resume_seconds_all": [round(value, 4) for value in found[name].get("resume_seconds", [])],
            }
            for name in READERS
        },
        "ours_to_fastest_peer": {
            key: round(own[key] / min(peer[key] for peer in peers), 3)
            for key in ("epoch_seconds", "epoch_cpu_seconds")
        },
        "ours_to_read_and_collate": {
            key: round(own[key] / floor[key], 3) for key in ("epoch_seconds", "epoch_cpu_seconds")
        },
    }


def resume_far(data: Path, runs: int) -> dict[str, Any]:
    """The time to the first of ten million samples of 4 tokens from here and there, in this process."""
    from storage import PartKey, ShardReader, Store

    rows = 100_200
    offsets, values = np.arange(rows + 1, dtype=np.int32) * 4, np.arange(rows * 4, dtype=np.int32)
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))})
    store = Store(data / "far")
    records = [store.commit_part(PartKey("samples", "far", f"{part:03}"), table) for part in range(100)]
    found: dict[int, list[tuple[float, float]]] = {10: [], 5_000_000: [], 10_000_000: []}
    for _ in range(runs):
        for start, times in found.items():
            clock, processor = time.perf_counter(), time.process_time()
            samples = ShardReader(store, records, seed=1).iterate(0, start)
            next(samples)
            times.append((time.perf_counter() - clock, time.process_time() - processor))
            samples.close()
    return {
        str(start): dict(
            zip(("seconds", "cpu_seconds"), map(statistics.median, zip(*times, strict=True)), strict=True)
        )
        for start, times in found.items()
    }


def main() -> None:
    """All readers, or one action of one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data", type=Path, help="keep the data in this folder, and use what is there")
    parser.add_argument(
        "--far", action="store_true", help="only how long a resume takes at sample ten million"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = resume_far if arguments.far else measure
        text = json.dumps(work(arguments.data or Path(folder), arguments.runs), indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
