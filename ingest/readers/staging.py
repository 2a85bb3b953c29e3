"""A matrix that lies the wrong way round (by gene, or as compressed text), turned once into rows on local disk.

Temporary files have no name, so that a process that is killed leaves nothing behind; memory is bounded by a bucket of
entries, whatever the size of the source. A process keeps the last few staged matrices for its next work units.
"""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

import numpy as np
import scipy.sparse as sp

_BUCKET_ENTRIES = 2_000_000
_BUCKETS = (16, 900)
_KEPT = 2
_ENTRY = np.dtype([("row", "<u4"), ("column", "<u4"), ("value", "<f8")])


@dataclass
class StagedRows:
    """A CSR matrix in two unnamed temporary files; only the row pointers are in memory.

    Parameters
    ----------
    num_columns
        Columns; may be set last, when the source has told them.
    """

    num_columns: int
    _indices: IO[bytes] = field(default_factory=tempfile.TemporaryFile, repr=False)
    _values: IO[bytes] = field(default_factory=tempfile.TemporaryFile, repr=False)
    _pointers: list[np.ndarray] = field(default_factory=lambda: [np.zeros(1, np.int64)], repr=False)

    @property
    def num_rows(self) -> int:
        """Rows appended."""
        return sum(len(part) for part in self._pointers) - 1

    @property
    def num_entries(self) -> int:
        """Entries appended."""
        return int(self._pointers[-1][-1])

    def append(self, lengths: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Append rows: int64[rows] entries of each, then their columns and values, row after row."""
        if len(lengths):
            self._pointers.append(self.num_entries + np.cumsum(lengths, dtype=np.int64))
        columns.astype(np.uint32, copy=False).tofile(self._indices)
        values.astype(np.float64, copy=False).tofile(self._values)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Read the rows `start:stop`; values as float64."""
        if len(self._pointers) > 1:
            self._pointers = [np.concatenate(self._pointers)]
        pointers = self._pointers[0][start : stop + 1]
        first, number = int(pointers[0]), int(pointers[-1] - pointers[0])
        columns = _read(self._indices, np.dtype(np.uint32), first, number)
        values = _read(self._values, np.dtype(np.float64), first, number)
        # 64-bit pointers and indices: scipy then never has to guess, and nothing can wrap.
        return sp.csr_matrix((values, columns.astype(np.int64), pointers - first), (stop - start, self.num_columns))

    def close(self) -> None:
        """Give the disk space back."""
        self._indices.close()
        self._values.close()


def _read(file: IO[bytes], dtype: np.dtype[Any], first: int, number: int) -> np.ndarray:
    file.flush()
    file.seek(first * dtype.itemsize)
    values = np.fromfile(file, dtype, number)
    if len(values) != number:
        raise OSError(f"a temporary file ended early: {len(values)} of {number} entries; is the disk full?")
    return values


class Transposer:
    """Takes entries in any order and gives them back by row.

    Parameters
    ----------
    num_rows, num_columns
        Shape of the result.
    num_entries
        How many entries will come, if known: buckets are made of about two million each.
    """

    def __init__(self, num_rows: int, num_columns: int, num_entries: int | None = None) -> None:
        self.num_rows, self.num_columns = num_rows, num_columns
        wanted = _BUCKETS[0] if num_entries is None else -(-num_entries // _BUCKET_ENTRIES)
        number = max(min(wanted, _BUCKETS[1], num_rows), 1)
        self._edges = np.linspace(0, num_rows, number + 1).astype(np.int64)
        self._buckets = [tempfile.TemporaryFile() for _ in range(number)]  # noqa: SIM115 - closed in finish

    def add(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        """Add entries.

        Raises
        ------
        ValueError
            If an entry lies outside the matrix.
        """
        if len(rows) == 0:
            return
        for axis, indices, size in (("cell", rows, self.num_rows), ("feature", columns, self.num_columns)):
            if indices.min() < 0 or indices.max() >= size:
                raise ValueError(f"an entry belongs to a {axis} outside the {size} that there are")
        entries = np.empty(len(rows), _ENTRY)
        entries["row"], entries["column"], entries["value"] = rows, columns, values
        owners = np.searchsorted(self._edges, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        ends = np.searchsorted(owners[order], np.arange(len(self._buckets) + 1))
        for bucket, file in enumerate(self._buckets):
            entries[order[ends[bucket] : ends[bucket + 1]]].tofile(file)

    def finish(self) -> StagedRows:
        """Sort bucket after bucket; entries of a row keep the order in which they came."""
        staged = StagedRows(self.num_columns)
        for bucket, file in enumerate(self._buckets):
            file.flush()
            file.seek(0)
            entries = np.fromfile(file, _ENTRY)
            file.close()
            entries = entries[np.argsort(entries["row"], kind="stable")]
            low, high = self._edges[bucket : bucket + 2]
            lengths = np.bincount(entries["row"] - np.uint32(low), minlength=int(high - low))
            staged.append(lengths, np.ascontiguousarray(entries["column"]), np.ascontiguousarray(entries["value"]))
        return staged


StagedT = TypeVar("StagedT")
_kept: OrderedDict[Hashable, Any] = OrderedDict()


def staged(key: Hashable, build: Callable[[], StagedT]) -> StagedT:
    """What `build` makes, from memory if this process made it lately.

    Parameters
    ----------
    key
        Names the content (a fingerprint and whatever decides how it is read); a key with None is not kept.
    """
    if isinstance(key, tuple) and None in key:
        return build()
    if key not in _kept:
        _kept[key] = build()
        while len(_kept) > _KEPT:
            _kept.popitem(last=False)  # its files vanish with the last reader that holds them
    _kept.move_to_end(key)
    return _kept[key]  # type: ignore[no-any-return]
