"""Writing one ranked shard: the same rows always give the same bytes (with one pyarrow version) and the same hashes."""

import hashlib
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.errors import RunError
from corpus.hashing import digest_table
from corpus.manifest import Unit, unit_shard
from corpus.rank import rank_cells
from corpus.schema import COUNTS_TYPE, ROW_GROUP_CELLS, TOKENS_TYPE, shard_schema
from corpus.store import Store

# Entries encoded in one go: the default of 1,024 makes lists a third slower to write.
_BATCH_ENTRIES = 1 << 16


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
    return shard_table(cells, indptr, *rank_cells(indptr, tokens, counts, medians))


def shard_table(cells: pa.Table, indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> pa.Table:
    """Lay cells out as a shard.

    Parameters
    ----------
    cells
        As for `ranked_table`.
    indptr, tokens, counts
        int64[cells + 1], uint16[entries], uint32[entries]: the cells' genes in rank order.
    """
    offsets = pa.array(indptr, pa.int32())  # overflow raises: a shard is far below 2^31 entries
    columns = {
        "length": pa.array(np.diff(indptr), pa.uint32()),
        "tokens": pa.ListArray.from_arrays(offsets, pa.array(tokens, pa.uint16()), type=TOKENS_TYPE),
        "counts": pa.ListArray.from_arrays(offsets, pa.array(counts, pa.uint32()), type=COUNTS_TYPE),
    }
    numbers = {"cell_id", "dataset_id", "n_counts", "n_genes", "mito_fraction"}
    schema = shard_schema([name for name in cells.column_names if name not in numbers])
    arrays = [columns.get(name) if name in columns else cells[name] for name in schema.names]
    return pa.table(arrays, schema=schema)


def shard_bytes(table: pa.Table) -> bytes:
    """Encode a shard as Parquet.

    Tokens and counts get byte-stream split: it gathers the bytes that are always zero (two of a token in Parquet's
    32-bit physical type, nearly all upper ones of a count), and zstd removes them. A quarter faster to write than a
    dictionary of counts, and smaller (benchmarks/parquet_encoding.py).
    """
    sink = pa.BufferOutputStream()
    leaf = {"tokens": "tokens.list.element", "counts": "counts.list.element"}
    dictionary = [name for name in table.column_names if name not in leaf and name != "cell_id"]
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_CELLS,
        write_batch_size=_BATCH_ENTRIES,
        compression="zstd",
        compression_level=1,
        use_dictionary=dictionary,
        use_byte_stream_split=list(leaf.values()),
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
    The unit's record, the stored one if there is one already.

    Raises
    ------
    RunError
        If a shard or a record of this name is there with another content. A unit is a pure function of its id, so
        one of them was changed.
    """
    data = shard_bytes(table)
    content = digest_table(table)
    if not store.create(unit_shard(unit_id), data):
        data = _same_content(store, unit_shard(unit_id), data, content)
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
            "content_sha256": content,
        }
    )
    if store.create(unit.record, unit.to_json()):
        return unit
    recorded = Unit.model_validate_json(store.read_bytes(unit.record))
    if recorded.model_dump(exclude={"source"}) != unit.model_dump(exclude={"source"}):
        raise RunError(f"{store.uri}/{unit.record}: says otherwise than this run; move it away and run again")
    return recorded


def _same_content(store: Store, path: str, data: bytes, content: str) -> bytes:
    """Bytes of a shard that is already there: another pyarrow may have encoded the same rows otherwise."""
    stored = store.read_bytes(path)
    if stored == data:
        return data
    try:
        same = digest_table(pq.read_table(pa.BufferReader(stored))) == content
    except pa.ArrowException:
        same = False
    if not same:
        raise RunError(f"{store.uri}/{path}: is already there with another content; move it away and run again")
    return stored
