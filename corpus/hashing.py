"""Content hashes: the names of units, gene tables and checkpoints."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

_CHUNK_BYTES = 1 << 20


def digest_json(value: Any, length: int = 64) -> str:
    """Hash a JSON value by its canonical text (sorted keys, no blanks); hexadecimal, `length` characters."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def digest_stream(stream: BinaryIO) -> str:
    """SHA-256 of all that is left in a binary stream, in bounded memory."""
    sha = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        sha.update(chunk)
    return sha.hexdigest()


def digest_table(table: pa.Table) -> str:
    """SHA-256 of the values of an Arrow table, whatever its chunks and whichever file it came from.

    Parquet bytes differ between pyarrow versions; this hash does not. Null and empty are told apart.
    """
    sha = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        sha.update(f"{name}:{_type_name(column.type)}:{len(column)};".encode())
        for part in _plain_parts(column):
            sha.update(np.ascontiguousarray(part).data)
    return sha.hexdigest()


def _type_name(kind: pa.DataType) -> str:
    """Name of a type that does not tell how it is stored: Parquet renames the items of lists, Polars widens strings."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_type_name(kind.value_type)}>"
    return "string" if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else str(kind)


def _plain_parts(column: pa.ChunkedArray) -> Iterable[np.ndarray]:
    """Yield buffers that determine a column: validity, list lengths, then the values."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of a column without chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    yield array.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        yield from _plain_parts(pa.chunked_array([array.flatten()]))
    elif _type_name(array.type) == "string":
        text = array.fill_null("").cast(pa.large_string()).cast(pa.large_binary())
        yield np.frombuffer(b"".join(text.to_pylist()), dtype=np.uint8)
        yield np.diff(np.frombuffer(text.buffers()[1], dtype=np.int64)[text.offset : text.offset + len(text) + 1])
    else:
        yield array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False)
