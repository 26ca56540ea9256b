"""The digest of a table's rows: one number for their contents, however the rows are cut into parts.

The digest is the sum modulo 2**256 of the sha256 of every row. So it does not depend on the order
of rows, and the digests of parts add up to that of the whole. Repeated rows count each time.

The bytes of a row are defined here and not by a library's writer, so that a new version of Polars
or Arrow changes no digest:

    row     sha256 of the types, then the values of the columns in the order of their names
    value   one byte, 0 for a null and 1 otherwise, then
            fixed width   little-endian bytes, zero for a null (floats bit by bit, booleans as a
                          byte)
            text, binary  length (8 bytes), UTF-8 or raw bytes
            list          number of items (8 bytes), the items
            struct        the fields in the order of their names
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.table import is_list

_STEP = 16_384  # rows that are encoded together: bounds the memory


def row_digest(table: pa.Table, exclude: Sequence[str] = ()) -> int:
    """The sum modulo 2**256 of the sha256 of every row, without the columns in `exclude`.

    Column order, chunks and encodings (dictionary, large or view types) do not matter; the types of
    numbers do. Raises TypeError for a type without a definition, such as a map.
    """
    names = sorted(set(table.column_names) - set(exclude))
    assert len(set(table.column_names)) == table.num_columns, "column names repeat"
    kinds = "".join(f"{len(name)}:{name}{_kind(table.schema.field(name).type)}" for name in names)
    header = pa.scalar(hashlib.sha256(kinds.encode()).digest(), pa.large_binary())
    total = 0
    for first in range(0, table.num_rows, _STEP):
        rows = table.select(names).slice(first, _STEP).combine_chunks()
        texts = _join([header, *(_encoded(rows[name].chunk(0)) for name in names)], rows.num_rows)
        ends = np.frombuffer(texts.buffers()[1], np.int64).tolist()
        data = memoryview(texts.buffers()[2])
        digests = b"".join(hashlib.sha256(data[start:end]).digest() for start, end in pairwise(ends))
        words = np.frombuffer(digests, "<u4").reshape(-1, 8).sum(axis=0, dtype=np.uint64)
        total += sum(int(word) << 32 * place for place, word in enumerate(words))
    return total % 2**256


def _kind(kind: pa.DataType) -> str:
    """The name of a type; the same for all encodings of the same values."""
    t = pa.types
    if t.is_dictionary(kind):
        return _kind(kind.value_type)
    if t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return "<text>"
    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind) or t.is_fixed_size_binary(kind):
        return "<binary>"
    if is_list(kind):
        return f"<list {_kind(kind.value_type)}>"
    if t.is_struct(kind):
        fields = sorted(kind, key=lambda field: field.name)
        return f"<struct {''.join(f'{len(field.name)}:{field.name}{_kind(field.type)}' for field in fields)}>"
    return f"<{kind}>"


def _encoded(array: pa.Array) -> pa.Array:
    """The bytes of every value, as large_binary without nulls."""
    kind, t = array.type, pa.types
    if t.is_dictionary(kind):
        return _encoded(array.dictionary_decode())
    valid = np.asarray(array.is_valid())
    if _kind(kind) in ("<text>", "<binary>"):
        data = array.cast(pa.large_binary()).fill_null(b"")
        return _join([_column(valid), _column(np.asarray(pc.binary_length(data))), data], len(array))
    if is_list(kind):
        counts = np.asarray(pc.list_value_length(array).fill_null(0)).astype(np.int64)
        items = _encoded(array.flatten())
        ends = np.frombuffer(items.buffers()[1], np.int64)[np.concatenate([[0], np.cumsum(counts)])]
        return _join([_column(valid), _column(counts), _binary(ends, items.buffers()[2])], len(array))
    if t.is_struct(kind):
        fields = sorted(zip(kind, array.flatten(), strict=True), key=lambda pair: pair[0].name)
        return _join([_column(valid), *(_encoded(values) for _, values in fields)], len(array))
    if t.is_null(kind):
        return _column(valid)
    if t.is_boolean(kind):
        array = array.cast(pa.uint8())
    try:
        width = array.type.bit_width // 8
    except ValueError:
        raise TypeError(f"a column of type {kind} has no row digest.") from None
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)[array.offset * width :][: len(array) * width]
    values = np.empty((len(array), 1 + width), np.uint8)
    values[:, 0] = valid
    values[:, 1:] = data.reshape(-1, width)
    values[~valid, 1:] = 0
    return _column(values)


def _join(columns: Sequence[pa.Array | pa.Scalar], rows: int) -> pa.Array:
    if not rows:
        return _binary(np.zeros(1, np.int64), pa.py_buffer(b""))
    return pc.binary_join_element_wise(*columns, pa.scalar(b"", pa.large_binary()))


def _column(values: npt.NDArray[np.generic]) -> pa.Array:
    """The bytes of each row of an array."""
    width = values.nbytes // len(values) if len(values) else 0
    return _binary(
        np.arange(len(values) + 1, dtype=np.int64) * width, pa.py_buffer(np.ascontiguousarray(values))
    )


def _binary(ends: npt.NDArray[np.int64], data: pa.Buffer) -> pa.Array:
    return pa.Array.from_buffers(pa.large_binary(), len(ends) - 1, [None, pa.py_buffer(ends), data])
