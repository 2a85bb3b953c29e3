"""From columns of a source to genes of the species: duplicates summed, genes ascending."""

from dataclasses import dataclass

import numba
import numpy as np
import scipy.sparse as sp

# De Bruijn sequence: position of the lowest set bit of a 64-bit word from one multiplication.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF = np.empty(64, np.int64)
for _bit in range(64):
    _BIT_OF[((0x03F79D71B4CB0A89 << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


@dataclass(frozen=True)
class GeneCounts:
    """Counts of some cells by gene.

    Parameters
    ----------
    indptr
        int64[cells + 1].
    genes
        uint32[entries]: rows of the gene table, ascending within a cell.
    counts
        uint32[entries], all positive.
    totals
        uint64[cells]: counts over all gene-expression features, mapped or not.
    """

    indptr: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    totals: np.ndarray


def collapse(matrix: sp.csr_matrix, rows: np.ndarray, num_genes: int) -> GeneCounts:
    """Sum a count matrix by gene.

    Parameters
    ----------
    matrix
        Cells x features; values already checked to be counts. Indices in any order, also repeated.
    rows
        int32[features] as in `GeneMap.rows`.
    num_genes
        Rows of the gene table.

    Raises
    ------
    ValueError
        If an index is outside the features.
    """
    indptr = matrix.indptr.astype(np.int64)
    genes, counts = np.empty(len(matrix.data), np.uint32), np.empty(len(matrix.data), np.uint32)
    ends, totals = np.zeros(len(indptr), np.int64), np.zeros(len(indptr) - 1, np.uint64)
    if _collapse(indptr, matrix.indices, matrix.data, rows, num_genes, genes, counts, ends, totals) < 0:
        raise ValueError(f"a column index is outside the {len(rows)} features")
    return GeneCounts(ends, genes[: ends[-1]], counts[: ends[-1]], totals)


@numba.njit(cache=True, nogil=True)
def _collapse(indptr, indices, data, rows, num_genes, genes, counts, ends, totals):  # type: ignore[no-untyped-def]
    """Add each cell into a dense row, with one bit per gene touched; reading the bits in order gives sorted genes."""
    dense = np.zeros(num_genes, np.uint32)
    touched = np.zeros((num_genes + 63) // 64, np.uint64)
    out = 0
    for cell in range(len(indptr) - 1):
        total = np.uint64(0)
        for i in range(indptr[cell], indptr[cell + 1]):
            column = indices[i]
            if column < 0 or column >= len(rows):
                return -1
            gene = rows[column]
            count = np.uint32(data[i])
            if gene == -2 or count == 0:
                continue
            total += np.uint64(count)
            if gene >= 0:
                dense[gene] += count
                touched[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)
        for word in range(len(touched)):
            bits = touched[word]
            while bits != 0:
                lowest = bits & (~bits + np.uint64(1))
                gene = (word << 6) + _BIT_OF[(lowest * _DE_BRUIJN) >> np.uint64(58)]
                genes[out], counts[out] = gene, dense[gene]
                dense[gene] = 0
                out += 1
                bits ^= lowest
            touched[word] = 0
        ends[cell + 1] = out
        totals[cell] = total
    return 0


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
