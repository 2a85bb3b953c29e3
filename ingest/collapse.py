"""From columns of a source to genes of the species: values checked, duplicates summed, genes ascending."""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import scipy.sparse as sp
from numba import types
from numba.extending import intrinsic

_MAX_COUNT = np.iinfo(np.uint32).max
_OUTSIDE, _NO_COUNT, _TOO_WIDE = 1, 2, 3


@dataclass(frozen=True)
class GeneCounts:
    """Counts of some cells by gene.

    Parameters
    ----------
    indptr
        int64[cells + 1].
    genes
        uint16[entries] (uint32 where the gene table has more than 65,536 rows): rows of it, ascending within a cell.
    counts
        uint16[entries], or uint32 where one of them needs it; all positive.
    totals
        uint64[cells]: counts over all gene-expression features, mapped or not.
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    totals: np.ndarray


class NotACountError(ValueError):
    """A stored value is no whole number from 0 to 2^32 - 1."""


def collapse(matrix: sp.csr_matrix, rows: np.ndarray, num_genes: int) -> GeneCounts:
    """Sum a count matrix by gene.

    Parameters
    ----------
    matrix
        Cells x features, as read. Indices in any order, also repeated.
    rows
        int32[features] as in `GeneMap.rows`.
    num_genes
        Rows of the gene table.

    Raises
    ------
    ValueError
        If an index is outside the features.
    NotACountError
        If a value is not a count (`ingest.formats.require_counts` says which).
    """
    indptr, data = matrix.indptr.astype(np.int64), _native(matrix.data)
    dtype = np.uint16 if num_genes <= 1 << 16 else np.uint32
    for width in (np.uint16, np.uint32):  # nearly no count needs more than two bytes
        genes, counts = np.empty(len(data), dtype), np.empty(len(data), width)
        ends, totals = np.zeros(len(indptr), np.int64), np.zeros(len(indptr) - 1, np.uint64)
        fault = _collapse(indptr, matrix.indices, data, rows, num_genes, genes, counts, ends, totals)
        if fault != _TOO_WIDE:
            break
    if fault == _OUTSIDE:
        raise ValueError(f"a column index is outside the {len(rows)} features")
    if fault:
        raise NotACountError("a value is no count")
    return GeneCounts(ends, genes[: ends[-1]], counts[: ends[-1]], totals)


def _native(values: np.ndarray) -> np.ndarray:
    """Values of a type and byte order that compiled code reads."""
    if values.dtype.kind not in "uif" or values.dtype == np.float16:
        return values.astype(np.float64)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


@intrinsic
def _lowest_bit(context: Any, word: Any) -> Any:
    """Position of the lowest set bit of a uint64 that is not zero: one machine instruction."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], target.get_constant(types.boolean, True))

    return types.int64(types.uint64), generate


@numba.njit(cache=True, nogil=True)
def _collapse(indptr, indices, data, rows, num_genes, genes, counts, ends, totals):  # type: ignore[no-untyped-def]
    """Add each cell into a dense row, with one bit per gene touched; reading the bits in order gives sorted genes."""
    dense = np.zeros(num_genes, np.uint32)
    touched = np.zeros((num_genes + 63) // 64, np.uint64)
    widest = np.uint64(1) << np.uint64(8 * counts.itemsize)
    out = 0
    for cell in range(len(indptr) - 1):
        total = np.uint64(0)
        for i in range(indptr[cell], indptr[cell + 1]):
            column, value = indices[i], data[i]
            if column < 0 or column >= len(rows):
                return _OUTSIDE
            if not (value >= 0 and value <= _MAX_COUNT and value == np.floor(value)):
                return _NO_COUNT
            gene, count = rows[column], np.uint32(value)
            if gene == -2 or count == 0:
                continue
            total += np.uint64(count)
            if gene >= 0:
                dense[gene] += count
                touched[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)
        if total > _MAX_COUNT:  # then the sum of a gene may have wrapped round
            return _NO_COUNT
        for word in range(len(touched)):
            bits = touched[word]
            touched[word] = 0
            while bits != 0:
                gene = (word << 6) + _lowest_bit(bits)  # type: ignore[call-arg]
                if dense[gene] >= widest:
                    return _TOO_WIDE
                genes[out], counts[out] = gene, dense[gene]
                dense[gene] = 0
                out += 1
                bits &= bits - np.uint64(1)
        ends[cell + 1] = out
        totals[cell] = total
    return 0


def cell_facts(counts: GeneCounts, mitochondrial: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, ...]:
    """What quality control and the search for duplicates ask of each cell.

    Parameters
    ----------
    mitochondrial
        bool[genes].
    keys
        uint64[genes, 2] from `ingest.duplicates.gene_keys`.

    Returns
    -------
    uint64[cells] counts on mapped genes, uint64[cells] on mitochondrial ones, uint64[cells, 2] as by
    `ingest.duplicates.cell_keys`.
    """
    cells = len(counts.totals)
    mapped, mito, sums = (np.zeros(shape, np.uint64) for shape in (cells, cells, (cells, 2)))
    _facts(counts.indptr, counts.genes, counts.counts, mitochondrial, keys, mapped, mito, sums)
    return mapped, mito, sums


@numba.njit(cache=True, nogil=True)
def _facts(indptr, genes, counts, mitochondrial, keys, mapped, mito, sums):  # type: ignore[no-untyped-def]
    for cell in range(len(mapped)):
        all_counts, on_mito, first, second = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
        for i in range(indptr[cell], indptr[cell + 1]):
            gene, count = genes[i], np.uint64(counts[i])
            all_counts += count
            if mitochondrial[gene]:
                on_mito += count
            first += keys[gene, 0] * count
            second += keys[gene, 1] * count
        mapped[cell], mito[cell] = all_counts, on_mito
        sums[cell, 0], sums[cell, 1] = first, second


def cell_sums(indptr: np.ndarray, genes: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Sum of each cell's counts over the wanted genes (bool[genes]): int64[cells]."""
    sums = np.zeros(len(indptr) - 1, np.int64)
    _cell_sums(indptr, genes, counts, wanted, sums)
    return sums


@numba.njit(cache=True, nogil=True)
def _cell_sums(indptr, genes, counts, wanted, sums):  # type: ignore[no-untyped-def]
    for cell in range(len(sums)):
        total = np.int64(0)
        for i in range(indptr[cell], indptr[cell + 1]):
            if wanted[genes[i]]:
                total += np.int64(counts[i])
        sums[cell] = total


def select(
    cells: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    token_of_row: np.ndarray,
    dtype: type[np.unsignedinteger] = np.uint16,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take some cells' entries that have a token.

    Parameters
    ----------
    cells
        int64[n]: which cells, ascending.
    indptr, genes, counts
        As in `GeneCounts`.
    token_of_row
        int32[genes]: token of each row of the gene table, -1 for none.
    dtype
        Type of the tokens returned.

    Returns
    -------
    int64[n] number of entries of each cell, then their tokens and counts (uint32), end to end.
    """
    lengths = np.zeros(len(cells), np.int64)
    room = int((indptr[cells + 1] - indptr[cells]).sum())
    tokens, numbers = np.empty(room, dtype), np.empty(room, np.uint32)
    end = _select(cells, indptr, genes, counts, token_of_row, lengths, tokens, numbers)
    return lengths, tokens[:end], numbers[:end]


@numba.njit(cache=True, nogil=True)
def _select(cells, indptr, genes, counts, token_of_row, lengths, tokens, numbers):  # type: ignore[no-untyped-def]
    end = 0
    for place in range(len(cells)):
        first = end
        for i in range(indptr[cells[place]], indptr[cells[place] + 1]):
            token = token_of_row[genes[i]]
            if token >= 0:
                tokens[end], numbers[end] = token, counts[i]
                end += 1
        lengths[place] = end - first
    return end
