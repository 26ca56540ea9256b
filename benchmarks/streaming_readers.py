"""How fast do training samples come, and how soon after a resume? `storage.ShardReader` beside six
streaming readers.

    python -m venv peers && peers/bin/pip install -r benchmarks/requirements-streaming.txt
    OMP_NUM_THREADS=1 peers/bin/python -m benchmarks.streaming_readers [--rounds 5] [--out FILE]

An epoch of 50,000 samples of 400 token ids, shuffled as each one shuffles, in tensors (64, 400) of
int32; one process, no workers, data on local disk and in the page cache. Then the time from opening
the data with the state that was saved after 40,000 samples to the next such tensor; for ours also
at rows 10, 5 million and 10 million of the same shards listed 201 times. Each measurement is a
process, forked from one that has imported all readers. What was read is compared with what was
written.

The floors: `read` only reads the Parquet column, `read and collate` also stacks its rows into
batches, in file order. Ours is measured three times: the reader, the data loader of
`qrpo.training.loader` that the trainer reads it through, and the same, stacking row by row.
"""

import importlib.machinery
import importlib.metadata
import itertools
import os
import pickle
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Case, Sample, clocks, command_line, compare, forked, report, since

SAMPLES, TOKENS, BATCH, RESUME_AT, FILES = 50_000, 400, 64, 40_000, 50
PER_FILE = SAMPLES // FILES
FAR, FAR_COPIES = (10, 5_000_000, 10_000_000), 201
OURS = ("ShardReader", "the trainer's loader")
FLOOR = "floor: read and collate"


def tokens_of(file: int) -> np.ndarray:
    """The samples of one file (PER_FILE, TOKENS)."""
    return np.random.default_rng(file).integers(0, 32_000, (PER_FILE, TOKENS), dtype=np.int32)


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
    """MosaicML's `streaming`. It imports torchvision for its image sets, which are not used here
    and whose wheels do not go with a CPU build of torch: empty classes stand in."""
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
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


# ------------------------------------------------------------------------------------- ways to read
# Each opens the data, with a saved state or from the start, and gives an iterable of batches.


def collate(samples: list[Any]) -> Any:
    """A batch from samples: arrays, or dicts of one."""
    import torch

    rows = [sample["input_ids"] if isinstance(sample, dict) else sample for sample in samples]
    return torch.from_numpy(np.stack(rows, dtype=np.int32))  # HF's NumPy format makes int64 of all integers


def collated(samples: Iterable[Any]) -> Iterator[Any]:
    """Batches of consecutive samples."""
    samples = iter(samples)
    while batch := list(itertools.islice(samples, BATCH)):
        yield collate(batch)


def parquet_files(data: Path) -> list[str]:
    """The files that `write_parquet` wrote."""
    return sorted(map(str, (data / "parquet").iterdir()))


def read_file(path: str) -> np.ndarray:
    """The samples of one of them (PER_FILE, TOKENS)."""
    column = pq.read_table(path, use_threads=False)["input_ids"].combine_chunks()
    return column.values.to_numpy().reshape(-1, TOKENS)


def bare_read(data: Path, state: None) -> Iterable[Any]:
    """Columns as they lie in the files."""
    return map(read_file, parquet_files(data))


def read_and_collate(data: Path, state: None) -> Iterable[Any]:
    """The least that a loader of single samples must do."""
    return collated(itertools.chain.from_iterable(bare_read(data, None)))


def shards(data: Path, copies: int) -> Any:
    """The store's shards, each `copies` times."""
    from storage import ShardReader, Store

    records = pickle.loads((data / "records").read_bytes())  # noqa: S301
    return ShardReader(Store(data / "store"), records * copies, seed=1, columns=["input_ids"])


def padded(rows: Any) -> Any:
    """Rows as columns to a tensor, padded to the longest."""
    import torch

    return torch.from_numpy(rows.columns["input_ids"].padded())


def reader(data: Path, state: int | None, copies: int = 1) -> Iterable[Any]:
    """`ShardReader` by itself; the state is one integer."""
    return map(padded, shards(data, copies).batches(BATCH, 0, state or 0))


def loader(
    data: Path, state: int | None, copies: int = 1, batch: Callable[[Any], Any] = padded
) -> Iterable[Any]:
    """As the trainer reads it, and resumes."""
    from accelerate import skip_first_batches

    from qrpo.training.loader import step_loader

    batches = step_loader(shards(data, copies), BATCH, 0, 1, drop_last=False)
    return (batch(found["rows"]) for found in skip_first_batches(batches, (state or 0) // BATCH))


def torch_loader(dataset: Any) -> Any:
    """Batches of a dataset by torch's own loader."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, batch_size=BATCH, collate_fn=collate)


def hf_streaming(data: Path, state: Any) -> Iterable[Any]:
    """An `IterableDataset` with a buffer of 1,000 samples."""
    from datasets import load_dataset

    loaded = load_dataset("parquet", data_files=parquet_files(data), split="train", streaming=True)
    dataset = loaded.shuffle(seed=1, buffer_size=1000).with_format("numpy")
    if state is not None:
        dataset.load_state_dict(state)
    return torch_loader(dataset)


def hf_map(data: Path, state: int | None) -> Iterable[Any]:
    """A memory-mapped `Dataset`; no state is needed to skip."""
    from datasets import load_dataset

    files, cache = parquet_files(data), str(data / "hf-cache")
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    return torch_loader(loaded.shuffle(seed=1).with_format("numpy").skip(state or 0))


def mosaic(data: Path, state: Any) -> Iterable[Any]:
    """MDS shards with the default shuffle, through its own loader."""
    streaming = import_mosaic()
    dataset = streaming.StreamingDataset(
        local=str(data / "mosaic"), shuffle=True, shuffle_seed=1, batch_size=BATCH
    )
    return resumed(streaming.StreamingDataLoader(dataset, batch_size=BATCH, collate_fn=collate), state)


def litdata(data: Path, state: Any) -> Iterable[Any]:
    """Its token loader, the fastest way it has for samples of equal length, through its own
    loader."""
    import litdata

    items = litdata.TokensLoader(block_size=TOKENS)
    dataset = litdata.StreamingDataset(str(data / "litdata"), item_loader=items, shuffle=True, seed=1)
    return resumed(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0), state)


def torchdata(data: Path, state: Any) -> Iterable[Any]:
    """Nodes over the Parquet files, through its own loader: torchdata leaves reading to its
    user."""
    from torchdata import nodes

    class Samples(nodes.BaseNode):  # type: ignore[misc]
        """Files in a shuffled order, and shuffled within each: the state is the file and the
        row."""

        def reset(self, initial_state: dict[str, Any] | None = None) -> None:
            super().reset(initial_state)
            self._file, self._row = (initial_state or {"at": (0, 0)})["at"]
            self._order = np.random.default_rng(1).permutation(parquet_files(data))
            self._samples: Any = None

        def next(self) -> Any:
            if self._samples is None:
                if self._file == FILES:
                    raise StopIteration
                samples = read_file(self._order[self._file])
                self._samples = samples[np.random.default_rng(self._file).permutation(len(samples))]
            sample = self._samples[self._row]
            self._row += 1
            if self._row == len(self._samples):
                self._file, self._row, self._samples = self._file + 1, 0, None
            return sample

        def get_state(self) -> dict[str, Any]:
            return {"at": (self._file, self._row)}

    batches = nodes.Mapper(nodes.Batcher(Samples(), BATCH, drop_last=False), collate)
    return resumed(nodes.Loader(batches), state)


def webdataset(data: Path, state: int | None) -> Iterable[Any]:
    """Tar files in a shuffled order and a buffer of 1,000 samples. It keeps no state: what was seen
    is read again."""
    import webdataset as wds

    urls = sorted(map(str, (data / "webdataset").iterdir()))
    tars = wds.WebDataset(urls, shardshuffle=FILES, seed=1, empty_check=False).shuffle(1000, seed=1)
    samples = tars.decode().to_tuple("npy").map(lambda sample: sample[0])
    return collated(itertools.islice(samples, state or 0, None))


def resumed(found: Any, state: Any) -> Any:
    """A loader that keeps its own state, set to a saved one."""
    if state is not None:
        found.load_state_dict(state)
    return found


class Way(NamedTuple):
    """A reader, its package, and its state after RESUME_AT samples, from what it opened; None where
    there is nothing to resume."""

    open: Callable[[Path, Any], Iterable[Any]]
    package: str | None = None
    save: Callable[[Any], Any] | None = lambda _: RESUME_AT


WAYS = {
    "floor: read": Way(bare_read, save=None),
    "floor: read and collate": Way(read_and_collate, save=None),
    "ShardReader": Way(reader),
    "the trainer's loader": Way(loader),
    "the trainer's loader, row by row": Way(partial(loader, batch=collate)),
    "torchdata over Parquet": Way(torchdata, "torchdata", lambda loader: loader.state_dict()),
    "litdata": Way(litdata, "litdata", lambda loader: loader.state_dict()),
    "HF datasets, map-style": Way(hf_map, "datasets"),
    "MosaicML streaming": Way(mosaic, "mosaicml-streaming", lambda loader: loader.state_dict()),
    "WebDataset": Way(webdataset, "webdataset"),
    "HF datasets, streaming": Way(hf_streaming, "datasets", lambda loader: loader.dataset.state_dict()),
}
WRITERS = {
    "parquet": write_parquet,
    "store": write_store,
    "mosaic": write_mosaic,
    "litdata": write_litdata,
    "webdataset": write_webdataset,
}


# ---------------------------------------------------------------------------------------- measuring


def save_state(name: str, data: Path) -> None:
    """Read up to RESUME_AT and keep the state; fill caches."""
    found = WAYS[name].open(data, None)
    for _ in itertools.islice(found, RESUME_AT // BATCH):
        pass
    save = WAYS[name].save
    assert save is not None
    (data / f"state {name}").write_bytes(pickle.dumps(save(found)))


def epoch(name: str, data: Path) -> Sample:
    """Read all samples."""
    start = clocks()
    samples = total = 0
    shapes = set()
    for batch in WAYS[name].open(data, None):
        samples += len(batch)
        total += int(batch[:, 0].sum())
        shapes.add((*batch.shape, str(batch.dtype)))
    taken = since(start)
    expected = sum(int(tokens_of(file)[:, 0].sum(dtype=np.int64)) for file in range(FILES))
    assert (samples, total) == (SAMPLES, expected), f"{name}: {samples} samples, or others than were written"
    same = {(rows, TOKENS, "torch.int32") for rows in (BATCH, SAMPLES % BATCH)}
    assert name == "floor: read" or shapes == same, f"{name}: batches of {shapes}"
    return taken


def resume(name: str, data: Path, row: int | None = None) -> Sample:
    """Open with the saved state, or one of ours at a row of ten million, and read a batch."""
    saved = data / f"state {name}"
    state = [row, FAR_COPIES] if row is not None else [pickle.loads(saved.read_bytes())]  # noqa: S301
    start = clocks()
    batch = next(iter(WAYS[name].open(data, *state)))
    taken = since(start)
    assert batch.shape == (BATCH, TOKENS), f"{name}: a batch of {batch.shape}"
    return taken


def measure(data: Path, rounds: int) -> list[Case]:
    """Write the data where it is missing, then read it in every way."""
    import accelerate
    import torch

    torch.set_num_threads(1)
    accelerate.PartialState()  # a trainer has it long before it reads
    import_mosaic()
    for module in (
        "datasets",
        "litdata",
        "qrpo.training.loader",
        "storage.reader",
        "torchdata.nodes",
        "webdataset",
    ):
        importlib.import_module(module)
    for name, write in WRITERS.items():
        if not (data / name).exists():
            forked(write, data)
    resumable = [name for name, way in WAYS.items() if way.save]
    for name in resumable:
        if not (data / f"state {name}").exists():
            forked(save_state, name, data)
    cases = [
        ("epoch", {name: partial(forked, epoch, name, data) for name in WAYS}, FLOOR),
        (
            f"first batch after {RESUME_AT:,}",
            {name: partial(forked, resume, name, data) for name in resumable},
            None,
        ),
        *(
            (
                f"first batch at row {row:,}",
                {name: partial(forked, resume, name, data, row) for name in OURS},
                None,
            )
            for row in FAR
        ),
    ]
    packages = sorted({way.package for way in WAYS.values() if way.package})
    sizes: Case = {"samples": SAMPLES, "tokens": TOKENS, "batch": BATCH}
    sizes["versions"] = {package: importlib.metadata.version(package) for package in packages}
    return [sizes, *({"read": what, "ways": compare(ways, rounds, floor)} for what, ways, floor in cases)]


if __name__ == "__main__":
    parser = command_line(__doc__)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    parser.add_argument("--data", type=Path, help="keep the data in this folder, and use what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder)
        data.mkdir(parents=True, exist_ok=True)
        report(options, measure(data, options.rounds))
