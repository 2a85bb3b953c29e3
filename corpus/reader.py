"""Reading a corpus: labels of all cells at once, tokens and counts of any cells, one row group at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.cache import ShardCache
from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.manifest import Manifest, Unit
from corpus.store import Store
from corpus.store_errors import told

# Footers of shards that are kept parsed: parsing one of 400 row groups takes 9 ms, reading a row group about as long.
_FOOTERS = 64


@dataclass(frozen=True)
class Cells:
    """Ragged tokens (and counts) of some cells.

    Parameters
    ----------
    index
        int64[cells]: numbers of the cells in the corpus.
    offsets
        int64[cells + 1]: cell i holds entries `offsets[i]:offsets[i + 1]`.
    tokens
        uint16[entries], in rank order.
    counts
        uint32[entries], raw counts (UMIs) in the same order; None if they were not asked for.
    """

    index: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """int64[cells]."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray, max_length: int | None = None) -> "Cells":
        """Select rows (int64[n], repeats allowed), in the order given; of each its first `max_length` tokens."""
        lengths = self.lengths[rows]
        if max_length is not None:
            lengths = np.minimum(lengths, max_length)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = self.offsets[rows]
        return Cells(
            self.index[rows],
            offsets,
            _gather(self.tokens, starts, offsets, np.empty(offsets[-1], self.tokens.dtype)),
            None
            if self.counts is None
            else _gather(self.counts, starts, offsets, np.empty(offsets[-1], self.counts.dtype)),
        )

    def truncate(self, max_length: int) -> "Cells":
        """Keep the first `max_length` tokens of each cell."""
        if not len(self) or self.lengths.max() <= max_length:
            return self
        return self.take(np.arange(len(self)), max_length)

    @staticmethod
    def concatenate(parts: Sequence["Cells"]) -> "Cells":
        """Join batches end to end."""
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
        counts = [part.counts for part in parts if part.counts is not None]
        return Cells(
            np.concatenate([part.index for part in parts]) if parts else np.zeros(0, np.int64),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.tokens for part in parts]) if parts else np.zeros(0, np.uint16),
            np.concatenate(counts) if counts else None,
        )


@numba.njit(cache=True, nogil=True)
def _gather(source, starts, offsets, out):  # type: ignore[no-untyped-def]
    """Fill `out[offsets[i]:offsets[i + 1]]` from `source[starts[i]:]`, for each i."""
    for i in range(len(starts)):
        size = offsets[i + 1] - offsets[i]
        out[offsets[i] : offsets[i] + size] = source[starts[i] : starts[i] + size]
    return out


class Corpus:
    """A published corpus, opened through its newest manifest (or a given one).

    Cells are numbered 0..num_cells-1 in manifest order; these numbers are what samplers, splits and scans pass around.
    Instances hold no open file when pickled.

    Parameters
    ----------
    uri
        Of the corpus.
    number
        Of the manifest; the newest by default.
    cache
        Where copies of a remote corpus's shards are kept; a local corpus needs none.
    """

    def __init__(self, uri: str | Path, number: int | None = None, cache: ShardCache | None = None) -> None:
        self.store = Store(uri)
        self.manifest = Manifest.read(self.store, number)
        self._cache = None if self.store.is_local else cache
        self._copied = self._cache.choose(self.manifest.units) if self._cache else frozenset()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in {"_footers", "_lock"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_footers": OrderedDict(), "_lock": threading.Lock()}

    @cached_property
    def genes(self) -> GeneTable:
        """The frozen vocabulary."""
        return GeneTable.load(self.store, self.manifest.genes)

    def __len__(self) -> int:
        return self.manifest.num_cells

    @cached_property
    def row_group_offsets(self) -> np.ndarray:
        """int64[row groups + 1]: row group g holds cells `row_group_offsets[g]:row_group_offsets[g + 1]`."""
        sizes = [size for unit in self.manifest.units for size in unit.row_groups]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def _row_group_places(self) -> list[tuple[int, int]]:
        return [(u, group) for u, unit in enumerate(self.manifest.units) for group in range(len(unit.row_groups))]

    def obs(self, columns: Sequence[str]) -> pl.DataFrame:
        """Label columns of all cells, in cell-number order.

        Raises
        ------
        UserError
            If a column is not in the corpus; the message lists those that are.
        """
        numbers = ["n_counts", "n_genes", "mito_fraction", "length"]
        scalars = ["cell_id", "dataset_id", *self.manifest.obs_columns, *numbers]
        for name in columns:
            if name not in scalars:
                raise UserError(f"{self.store.uri}: no column {name!r}; the corpus has {', '.join(scalars)}")
        parts = []
        for unit in self.manifest.units:
            with self.store.open(unit.shard) as stream:
                parts.append(pq.read_table(stream, columns=list(columns)))
        return pl.DataFrame(pa.concat_tables(parts))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64[cells]: tokens of each cell, not truncated."""
        return self.obs(["length"])["length"].to_numpy().astype(np.int64)

    def _source(self, unit: Unit) -> Any:
        path = self.store.local_path(unit.shard)
        if path is not None:
            with told(f"{self.store.uri}/{unit.shard}"):
                return pa.OSFile(str(path))
        if self._cache is not None and unit.sha256 in self._copied:
            return self._cache.open(self.store, unit)
        return self.store.open(unit.shard)

    @contextmanager
    def _open_shard(self, unit: Unit) -> Iterator[pq.ParquetFile]:
        """Open a shard, its footer parsed once; a local one past Python's files, which hold the interpreter's lock."""
        with self._lock:
            footer = self._footers.get(unit.shard)
        with self._source(unit) as source:
            shard = pq.ParquetFile(source, metadata=footer)
            yield shard
        if footer is None:
            with self._lock:
                self._footers[unit.shard] = shard.metadata
                if len(self._footers) > _FOOTERS:
                    self._footers.popitem(last=False)

    def read_row_group(self, group: int, counts: bool = False) -> Cells:
        """Read one row group (about 1,024 cells)."""
        u, local = self._row_group_places[group]
        unit = self.manifest.units[u]
        columns = ["tokens", "counts"] if counts else ["tokens"]
        with self._open_shard(unit) as shard:
            table = shard.read_row_group(local, columns=columns).combine_chunks()
        first, last = self.row_group_offsets[group : group + 2]
        if table.num_rows != last - first:
            raise UserError(f"{self.store.uri}/{unit.shard}: row group {local} does not have the manifest's rows")
        tokens = table["tokens"].chunk(0)
        offsets = tokens.offsets.to_numpy().astype(np.int64)
        return Cells(
            np.arange(first, last),
            offsets - offsets[0],
            tokens.flatten().to_numpy(),
            table["counts"].chunk(0).flatten().to_numpy() if counts else None,
        )

    def iter_cells(self, cells: np.ndarray | None = None, counts: bool = False) -> Iterator[Cells]:
        """Yield the wanted cells (int64, ascending; all by default), at most one row group at a time."""
        wanted = np.arange(len(self)) if cells is None else np.asarray(cells, dtype=np.int64)
        if np.any(np.diff(wanted) <= 0):
            raise ValueError("cells must be unique and ascending")
        for group in np.unique(np.searchsorted(self.row_group_offsets, wanted, side="right") - 1):
            first, last = self.row_group_offsets[group : group + 2]
            rows = wanted[(wanted >= first) & (wanted < last)] - first
            batch = self.read_row_group(int(group), counts)
            yield batch if len(rows) == len(batch) else batch.take(rows)

    def read_cells(self, cells: np.ndarray, counts: bool = False) -> Cells:
        """Read any cells, in the order given, into memory."""
        unique, inverse = np.unique(np.asarray(cells, dtype=np.int64), return_inverse=True)
        return Cells.concatenate(list(self.iter_cells(unique, counts))).take(inverse)
