"""What the three HDF5 formats share: opening, text, and rows of compressed matrices."""

from typing import BinaryIO

import h5py
import numpy as np
import scipy.sparse as sp

from ingest.readers.h5_chunks import LastChunks, read_range
from ingest.readers.h5_safety import check_tree


def open_hdf5(stream: BinaryIO, uri: str) -> h5py.File:
    """Open a file and check its structure before anything is read.

    Raises
    ------
    OSError
        If it is no HDF5 file.
    """
    file = h5py.File(stream, "r")
    check_tree(file, uri)
    return file


def read_text(dataset: h5py.Dataset, start: int = 0, stop: int | None = None) -> list[str]:
    """Text of a one-dimensional dataset of fixed or variable length strings, or of numbers."""
    values = dataset[start:stop]
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]


def read_compressed(
    group: h5py.Group, stream: BinaryIO, start: int, stop: int, num_columns: int, last: LastChunks | None = None
) -> sp.csr_matrix:
    """Major rows `start:stop` of a compressed matrix (`data`, `indices`, `indptr`), touching nothing else of the file.

    Parameters
    ----------
    last
        As for `ingest.readers.h5_chunks.read_range`.

    Raises
    ------
    ValueError
        If the index pointers run backwards or beyond the entries, or an index lies outside the columns.
    """
    pointers = group["indptr"][start : stop + 1].astype(np.int64)
    data, indices = group["data"], group["indices"]
    inside = len(pointers) == stop - start + 1 and pointers[0] >= 0
    if not inside or pointers[-1] > min(len(data), len(indices)) or (np.diff(pointers) < 0).any():
        raise ValueError(f"{group.name}: broken index pointers")
    first, end = int(pointers[0]), int(pointers[-1])
    columns = read_range(indices, stream, first, end, last)
    if len(columns) and (columns.min() < 0 or columns.max() >= num_columns):
        raise ValueError(f"{group.name}: an entry lies outside the {num_columns} columns")
    parts = (read_range(data, stream, first, end, last), columns, pointers - first)
    return sp.csr_matrix(parts, shape=(stop - start, num_columns))
