"""Writing one ranked shard: the same rows always give the same bytes (with one pyarrow version) and the same hashes."""

import hashlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.hashing import digest_table
from corpus.manifest import Unit
from corpus.rank import rank_cells
from corpus.schema import ROW_GROUP_CELLS, shard_schema
from corpus.store import Store


def ranked_table(
    cells: pa.Table, indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray, medians: np.ndarray
) -> pa.Table:
    """Rank cells and lay them out as a shard.

    Parameters
    ----------
    cells
        Every column of the shard schema but `length`, `tokens` and `counts`; one row a cell.
    indptr, tokens, counts, medians
        As for `corpus.rank.rank_cells`.
    """
    ranked_tokens, ranked_counts = rank_cells(indptr, tokens, counts, medians)
    offsets = pa.array(indptr, pa.int32())  # overflow raises: a shard is far below 2^31 entries
    columns = {
        "length": pa.array(np.diff(indptr), pa.uint32()),
        "tokens": pa.ListArray.from_arrays(offsets, pa.array(ranked_tokens, pa.uint16())),
        "counts": pa.ListArray.from_arrays(offsets, pa.array(ranked_counts, pa.uint32())),
    }
    numbers = {"cell_id", "dataset_id", "n_counts", "n_genes", "mito_fraction"}
    schema = shard_schema([name for name in cells.column_names if name not in numbers])
    arrays = [columns.get(name) if name in columns else cells[name] for name in schema.names]
    return pa.table(arrays, schema=schema)


def shard_bytes(table: pa.Table) -> bytes:
    """Encode a shard as Parquet.

    Tokens hardly repeat inside a page and get byte-stream split, which moves the two empty bytes of Parquet's 32-bit
    physical type where zstd removes them; counts repeat a lot and get a dictionary (benchmarks/parquet_encoding.py).
    """
    sink = pa.BufferOutputStream()
    leaf = {"tokens": "tokens.list.element", "counts": "counts.list.element"}
    dictionary = [name for name in table.column_names if name not in leaf and name != "cell_id"] + [leaf["counts"]]
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_CELLS,
        compression="zstd",
        compression_level=1,
        use_dictionary=dictionary,
        use_byte_stream_split=[leaf["tokens"]],
        write_statistics=[name for name in table.column_names if name not in leaf],
        store_schema=True,
    )
    return sink.getvalue().to_pybytes()


def write_shard(
    store: Store, table: pa.Table, *, unit_id: str, source: Mapping[str, str | int], dropped: Mapping[str, int]
) -> Unit:
    """Create a shard and its record, if absent.

    Parameters
    ----------
    source
        `dataset_id`, `source`, `source_sha256`, `start`, `stop` of the unit.
    dropped
        Cells of the row range that are not in the shard, per rule.

    Returns
    -------
    The unit's record. A unit is a pure function of its id, so a file that is already there is the same file; the
    hashes in the record are of the bytes made here, and `ingest verify` compares them with what is stored.
    """
    data = shard_bytes(table)
    rows = table.num_rows
    unit = Unit.model_validate(
        {
            **source,
            "unit_id": unit_id,
            "rows": rows,
            "dropped": dict(sorted(dropped.items())),
            "row_groups": [min(ROW_GROUP_CELLS, rows - first) for first in range(0, rows, ROW_GROUP_CELLS)],
            "num_tokens": len(table["tokens"].combine_chunks().flatten()),
            "size_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "content_sha256": digest_table(table),
        }
    )
    store.create(unit.shard, data)
    store.create(unit.record, unit.to_json())
    return unit
