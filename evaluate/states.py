"""Centroids of cell states: the mean embedding of each state's cells, streamed and kept under a hash."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.hashing import digest_json
from corpus.reader import Corpus
from corpus.store import Store
from evaluate.scan_compute import Scanner

_SCHEMA = pa.schema(
    [
        pa.field("state", pa.string(), nullable=False),
        pa.field("n_cells", pa.int64(), nullable=False),
        pa.field("centroid", pa.list_(pa.float64()), nullable=False),
    ]
)


def state_mean(scanner: Scanner, corpus: Corpus, cells: np.ndarray) -> np.ndarray:
    """Mean embedding of some cells, one row group in memory at a time.

    Parameters
    ----------
    cells
        int64[cells], ascending.

    Returns
    -------
    float64[d].
    """
    total = np.zeros(scanner.encoder.config.hidden_size)
    for batch in corpus.iter_cells(cells):
        total += scanner.embed(batch).sum(axis=0)
    return total / len(cells)


def states_id(readout_id: str, state_cells: dict[str, np.ndarray]) -> str:
    """Name centroids by all that they depend on: model, corpus and read-out (`readout_id`), and the cells."""
    return digest_json({"readout": readout_id, "cells": {s: cells.tolist() for s, cells in state_cells.items()}}, 32)


def load_centroids(store: Store, name: str) -> dict[str, np.ndarray] | None:
    """Read centroids that were saved under this name; None if there are none."""
    path = f"states/{name}.parquet"
    if not store.exists(path):
        return None
    table = pq.read_table(io.BytesIO(store.read_bytes(path)))
    return dict(zip(table["state"].to_pylist(), map(np.array, table["centroid"].to_pylist()), strict=True))


def save_centroids(store: Store, name: str, centroids: dict[str, np.ndarray], num_cells: dict[str, int]) -> None:
    """Write centroids unless they are there already."""
    rows = [{"state": s, "n_cells": num_cells[s], "centroid": c.tolist()} for s, c in centroids.items()]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
    store.create(f"states/{name}.parquet", sink.getvalue())
