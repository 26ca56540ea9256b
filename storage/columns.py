"""Rows kept as columns: a batch is a slice of flat buffers; a row is built when it is read.

To Arrow a list of numbers can be a string of bytes like any other. So rows are reordered by one
copy each, in C++ and without Python's lock. That is several times as fast as Arrow's own `take` of
lists, which computes an index per item.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, TypeAlias, cast, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Values: TypeAlias = "npt.NDArray[Any] | Ragged | list[Any]"
Column: TypeAlias = "Ragged | list[Any]"
"""One value per row: nested lists of numbers, or Python values of any other kind."""


class Ragged(Sequence[Any]):
    """Lists of different lengths in one buffer: list i is `values[offsets[i]:offsets[i + 1]]`.

    `values` is an array, or `Ragged` again for lists of lists. Slices share its memory.
    """

    def __init__(self, offsets: npt.NDArray[np.int64], values: Values) -> None:
        self.offsets = offsets
        self.values = values

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> "Ragged": ...
    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return _item(self, index)
        start, stop, step = index.indices(len(self))
        assert step == 1, "only consecutive lists share a buffer"
        return Ragged(self.offsets[start : max(start, stop) + 1], self.values)

    def __iter__(self) -> Iterator[Any]:
        values = self.values
        if isinstance(values, Ragged):
            first = self.offsets[0]
            lists, bounds = list(values[first : self.offsets[-1]]), (self.offsets - first).tolist()
            return (lists[start:stop] for start, stop in pairwise(bounds))
        return (values[start:stop] for start, stop in pairwise(self.offsets.tolist()))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The length of each list (B,)."""
        return np.diff(self.offsets)

    @property
    def flat(self) -> Values:
        """The values of all lists in one array."""
        return self.values[self.offsets[0] : self.offsets[-1]]

    def padded(self, value: float = 0) -> npt.NDArray[Any]:
        """Lists of numbers as one array (B, T), padded on the right; no copy for equal lengths."""
        flat, lengths = cast(npt.NDArray[Any], self.flat), self.lengths
        longest = int(lengths.max(initial=0))
        if len(flat) == len(lengths) * longest:
            return flat.reshape(len(lengths), longest)
        padded = np.full((len(lengths), longest), value, dtype=flat.dtype)
        padded[np.arange(longest) < lengths[:, None]] = flat
        return padded


class ColumnBatch(Sequence[Any]):
    """Consecutive rows as `columns`. A row is a dict of arrays and Python values."""

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "ColumnBatch": ...
    def __getitem__(self, index: int | slice) -> Any:
        if not isinstance(index, slice):
            return _item(self, index)
        return ColumnBatch({name: column[index] for name, column in self.columns.items()})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        names = tuple(self.columns)
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def gather(array: pa.Array, rows: npt.NDArray[np.int64]) -> Column:
    """These rows of a column, in this order. Arrays are writable: torch warns about others."""
    # not pa.array and to_numpy: their first use imports pandas if installed (0.1 s)
    places = pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])
    if not pa.types.is_list(array.type) or array.null_count:  # Python values
        return cast(list[Any], array.take(places).to_pylist())
    offsets, items = (np.frombuffer(array.buffers()[1] or bytes(4), np.int32)[array.offset :], array.values)
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    letter = _letter(items.type)
    if letter is None or items.null_count:
        inner = np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])
        return Ragged(bounds, gather(items, inner))
    dtype = np.dtype(f"{letter}{items.type.bit_width // 8}")
    if not bounds[-1]:
        return Ragged(bounds, np.empty(0, dtype))
    ends = pa.py_buffer((offsets.astype(np.int64) + items.offset) * dtype.itemsize)
    texts = pa.Array.from_buffers(pa.large_binary(), len(array), [None, ends, items.buffers()[1]])
    return Ragged(bounds, np.frombuffer(texts.take(places).buffers()[2], dtype, int(bounds[-1])))


def concatenate(parts: Sequence[ColumnBatch]) -> ColumnBatch:
    """Batches with the same columns as one batch."""
    if len(parts) == 1:
        return parts[0]
    return ColumnBatch({name: _join([part.columns[name] for part in parts]) for name in parts[0].columns})


def _join(parts: Sequence[Values]) -> Any:
    if all(isinstance(part, Ragged) for part in parts):
        ragged = cast(Sequence[Ragged], parts)
        lengths = np.concatenate([[0], *(part.lengths for part in ragged)])
        return Ragged(np.cumsum(lengths), _join([part.flat for part in ragged]))
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(cast(Sequence[npt.NDArray[Any]], parts))
    return list(chain.from_iterable(parts))


def _item(sequence: Ragged | ColumnBatch, index: int) -> Any:
    if not -len(sequence) <= index < len(sequence):
        raise IndexError(f"index {index} of {len(sequence)}")
    index %= len(sequence)
    return next(iter(sequence[index : index + 1]))


def _letter(kind: pa.DataType) -> str | None:
    """NumPy's type character of a number type; None for other types."""
    if pa.types.is_floating(kind):
        return "f"
    if pa.types.is_integer(kind):
        return "i" if pa.types.is_signed_integer(kind) else "u"
    return None
