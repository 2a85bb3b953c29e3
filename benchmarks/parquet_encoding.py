"""Size, time to write and time to read of a ranked shard under several Parquet encodings; one JSON line each.

    python -m benchmarks.parquet_encoding [--cells 8000] [--profile mca_combined_umi_sums.txt.zip]

Every variant is timed in turn, several rounds, and the best round counts: ratios within one run are what to look at.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.generated import builtin_profiles, draw_cells, mca_profiles
from corpus.rank import rank_cells
from corpus.schema import ROW_GROUP_CELLS

TOKENS, COUNTS = "tokens.list.element", "counts.list.element"


def ranked(cells: int, profile: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offsets, tokens, counts) of generated cells in rank order, with lognormal medians."""
    names, shares = builtin_profiles() if profile is None else mca_profiles(profile)
    indptr, genes, counts = draw_cells(shares, cells)
    medians = np.concatenate([np.full(4, np.nan), np.random.default_rng(1).lognormal(1, 1, len(names))])
    tokens, ordered = rank_cells(indptr, (genes + 4).astype(np.uint16), counts.astype(np.uint32), medians)
    return indptr, tokens, ordered


def as_lists(indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray, nullable: bool = True) -> pa.Table:
    """Two list columns."""
    offsets = pa.array(indptr, pa.int32())
    columns, fields = [], []
    for name, values in (("tokens", tokens), ("counts", counts)):
        kind = pa.list_(pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=nullable))
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(values)).cast(kind))
        fields.append(pa.field(name, kind, nullable=False))
    return pa.table(columns, schema=pa.schema(fields))


def as_blobs(indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> pa.Table:
    """Two binary columns: readable by this project alone, so only a yardstick for shards."""
    columns = {}
    for name, values in (("tokens", tokens), ("counts", counts)):
        offsets = pa.array(indptr * values.itemsize, pa.int32()).buffers()[1]
        columns[name] = pa.Array.from_buffers(
            pa.binary(), len(indptr) - 1, [None, offsets, pa.py_buffer(np.ascontiguousarray(values))]
        )
    return pa.table(columns)


def variants(indptr: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> dict[str, tuple[pa.Table, dict[str, Any]]]:
    """Tables and options of `write_table`, by name."""
    lists = as_lists(indptr, tokens, counts)
    split = {"use_byte_stream_split": [TOKENS], "use_dictionary": [COUNTS]}
    plain = {"use_dictionary": False}
    packed = {"use_dictionary": False, "column_encoding": {TOKENS: "BYTE_STREAM_SPLIT", COUNTS: "BYTE_STREAM_SPLIT"}}
    delta = {
        "use_dictionary": False,
        "column_encoding": {TOKENS: "DELTA_BINARY_PACKED", COUNTS: "DELTA_BINARY_PACKED"},
    }
    found: dict[str, tuple[pa.Table, dict[str, Any]]] = {}
    for codec in ("zstd", "lz4", "none"):
        level = {"compression_level": 1} if codec == "zstd" else {}
        found[f"split tokens, dictionary counts, {codec}"] = (lists, {**split, **level, "compression": codec})
        found[f"dictionary both, {codec}"] = (lists, {"use_dictionary": True, **level, "compression": codec})
        found[f"plain both, {codec}"] = (lists, {**plain, **level, "compression": codec})
        found[f"split both, {codec}"] = (lists, {**packed, **level, "compression": codec})
        found[f"delta both, {codec}"] = (lists, {**delta, **level, "compression": codec})
        found[f"binary values, {codec}"] = (
            as_blobs(indptr, tokens, counts),
            {"use_dictionary": False, **level, "compression": codec},
        )
    found["split both, zstd, elements not nullable"] = (
        as_lists(indptr, tokens, counts, nullable=False),
        {**packed, "compression": "zstd", "compression_level": 1},
    )
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all threads, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    """Print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    cells = ranked(options.cells, options.profile)
    entries = len(cells[1])
    tables = variants(*cells)
    best: dict[str, list[float]] = {name: [np.inf, np.inf, 0.0] for name in tables}
    for _ in range(options.rounds):
        for name, (table, arguments) in tables.items():
            sink = pa.BufferOutputStream()
            write, _done = timed(
                lambda table=table, sink=sink, arguments=arguments: pq.write_table(
                    table, sink, row_group_size=ROW_GROUP_CELLS, write_statistics=False, **arguments
                )
            )
            data = sink.getvalue()
            read, _table = timed(lambda data=data: pq.read_table(pa.BufferReader(data), use_threads=False))
            best[name] = [min(best[name][0], write), min(best[name][1], read), data.size]
    for name, (write, read, size) in best.items():
        facts = {
            "variant": name,
            "write_ns_per_entry": round(write / entries * 1e9, 1),
            "read_ns_per_entry": round(read / entries * 1e9, 1),
            "bytes_per_entry": round(size / entries, 2),
            "entries": entries,
            "pyarrow": pa.__version__,
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
