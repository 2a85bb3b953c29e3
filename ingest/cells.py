"""The cells file of a unit: written once, read by every stage that follows, removed when the corpus is published.

It is Parquet, one row group for each block of about a million counts: whoever writes or reads it holds one block, which
fits the processor's cache and is reused for the next. Its two long columns are one binary value a cell (the cell's
genes, its counts, as little-endian numbers of the narrowest type that holds them), not lists: a list costs ten times as
much to write and to read (benchmarks/parquet_encoding.py). In memory they are arrays again, without a copy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.collapse import GeneCounts

BLOCK_ENTRIES = 1 << 20
_LONG = ("genes", "counts")
_BYTES_OF_A_GENE = b"bytes of a gene"


@dataclass(frozen=True)
class Block:
    """Some consecutive cells of a unit.

    Parameters
    ----------
    start
        Row of the first one in the unit.
    indptr, genes, counts
        As in `ingest.collapse.GeneCounts`.
    """

    start: int
    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray

    @property
    def stop(self) -> int:
        """Row after the last one in the unit."""
        return self.start + len(self.indptr) - 1


class CellsWriter:
    """Encodes a cells file block by block; the same blocks always give the same bytes."""

    def __init__(self) -> None:
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None

    def add(self, columns: Mapping[str, pa.Array], counts: GeneCounts) -> None:
        """Append cells.

        Parameters
        ----------
        columns
            Every other column, by name, the same in every block.
        counts
            Becomes the columns `genes` and `counts`.
        """
        wide = np.min_scalar_type(counts.counts.max(initial=0))
        arrays = {
            **columns,
            "genes": _as_blobs(counts.indptr, counts.genes),
            "counts": _as_blobs(counts.indptr, counts.counts.astype(wide, copy=False)),
        }
        fields = [pa.field(name, array.type) for name, array in arrays.items()]
        schema = pa.schema(fields, metadata={_BYTES_OF_A_GENE: str(counts.genes.itemsize)})
        if self._writer is None:
            texts = [name for name in columns if pa.types.is_string(columns[name].type) and name != "cell_id"]
            # Not compressed: it lives for minutes. Checksums: nothing else would notice a count changed in between.
            self._writer = pq.ParquetWriter(
                self._sink,
                schema,
                compression="none",
                use_dictionary=texts,
                write_statistics=False,
                write_page_checksum=True,
            )
        self._writer.write_table(pa.table(list(arrays.values()), schema=schema), row_group_size=1 << 40)

    def finish(self) -> bytes:
        """The whole file, which has at least one block."""
        assert self._writer is not None
        self._writer.close()
        return self._sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _as_blobs(indptr: np.ndarray, values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    offsets = pa.array(indptr * flat.itemsize, pa.int32())  # overflow raises
    return pa.Array.from_buffers(pa.binary(), len(indptr) - 1, [None, offsets.buffers()[1], pa.py_buffer(flat)])


def read_columns(stream: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read (some of) the short columns of a cells file, one chunk a column.

    Raises
    ------
    OSError, pyarrow.ArrowException
        If the file is damaged.
    """
    with pq.ParquetFile(stream, page_checksum_verification=True) as file:
        wanted = [name for name in file.schema_arrow.names if name not in _LONG] if columns is None else list(columns)
        return file.read(columns=wanted, use_threads=False).combine_chunks()


def read_blocks(stream: BinaryIO) -> Iterator[Block]:
    """Read the counts of a cells file, block by block.

    Raises
    ------
    OSError, pyarrow.ArrowException
        If the file is damaged.
    """
    with pq.ParquetFile(stream, page_checksum_verification=True) as file:
        gene_bytes = int(file.schema_arrow.metadata[_BYTES_OF_A_GENE])
        start = 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=list(_LONG), use_threads=False).combine_chunks()
            if table.num_rows == 0:
                continue
            starts, genes = _flat(table["genes"].chunk(0))
            _, counts = _flat(table["counts"].chunk(0))
            indptr = starts.astype(np.int64) // gene_bytes
            entries = int(indptr[-1])
            widths: Any = (gene_bytes, len(counts) // entries if entries else 1)
            kinds = [np.dtype(f"<u{width}") for width in widths]
            yield Block(start, indptr, genes.view(kinds[0]), counts.view(kinds[1]))
            start += table.num_rows


def _flat(blobs: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(int32[cells + 1] byte offsets, uint8[bytes]) of binary values, counted from the first one."""
    _, offsets, data = blobs.buffers()
    starts = np.frombuffer(offsets, np.int32)[blobs.offset : blobs.offset + len(blobs) + 1]
    if data is None:
        return starts, np.zeros(0, np.uint8)
    return starts - starts[0], np.frombuffer(data, np.uint8)[starts[0] : starts[-1]]
