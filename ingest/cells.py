"""The cells file of a unit: written once, read by every stage that follows, removed when the corpus is published.

It is Parquet whose two long columns are one binary value a cell (the cell's genes, its counts, as little-endian
numbers of the narrowest type that holds them), not lists: a list costs ten times as much to write and to read
(benchmarks/parquet_encoding.py). In memory they are lists again, without a copy.
"""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.collapse import GeneCounts

_LONG = ("genes", "counts")
_DTYPE = b"dtype"


def encode_cells(columns: dict[str, pa.Array], counts: GeneCounts) -> bytes:
    """Encode a cells file.

    Parameters
    ----------
    columns
        Every other column, by name.
    counts
        Becomes the columns `genes` and `counts`.
    """
    table = pa.table(columns)
    for name, values in zip(_LONG, (counts.genes, counts.counts), strict=True):
        dtype = np.min_scalar_type(values.max(initial=0))
        flat = np.ascontiguousarray(values, dtype.newbyteorder("<"))
        offsets = pa.array(counts.indptr * dtype.itemsize, pa.int32())  # overflow raises
        blobs = pa.Array.from_buffers(
            pa.binary(), len(counts.indptr) - 1, [None, offsets.buffers()[1], pa.py_buffer(flat)]
        )
        table = table.append_column(pa.field(name, pa.binary(), metadata={_DTYPE: dtype.name.encode()}), blobs)
    sink = pa.BufferOutputStream()
    # Not compressed: it lives for minutes. Checksums, because nothing else would notice a count changed in between.
    texts = [name for name in columns if pa.types.is_string(table.schema.field(name).type) and name != "cell_id"]
    pq.write_table(
        table, sink, compression="none", use_dictionary=texts, write_statistics=False, write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def decode_cells(stream: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read (some columns of) a cells file; `genes` and `counts` are lists of unsigned numbers, one chunk a column.

    Raises
    ------
    OSError, pyarrow.ArrowException
        If the file is damaged.
    """
    wanted = None if columns is None else list(columns)
    table = pq.read_table(stream, columns=wanted, use_threads=False, page_checksum_verification=True).combine_chunks()
    for name in _LONG:
        if name in table.column_names:
            place = table.schema.get_field_index(name)
            dtype = np.dtype(table.schema.field(place).metadata[_DTYPE].decode()).newbyteorder("<")
            table = table.set_column(place, name, _as_lists(table[name], dtype))
    return table


def _as_lists(column: pa.ChunkedArray, dtype: np.dtype) -> pa.Array:
    if column.num_chunks == 0:
        return pa.array([], pa.list_(pa.from_numpy_dtype(dtype)))
    blobs = column.chunk(0)
    _, offsets, data = blobs.buffers()
    starts = np.frombuffer(offsets, np.int32)[blobs.offset : blobs.offset + len(blobs) + 1]
    values = np.frombuffer(data, dtype, count=starts[-1] // dtype.itemsize) if data is not None else np.zeros(0, dtype)
    return pa.ListArray.from_arrays(pa.array(starts // dtype.itemsize, pa.int32()), pa.array(values))
