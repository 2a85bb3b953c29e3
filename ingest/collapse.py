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
    """
    indptr = matrix.indptr.astype(np.int64)
    genes, counts = np.empty(len(matrix.data), np.uint32), np.empty(len(matrix.data), np.uint32)
    ends, totals = np.zeros(len(indptr), np.int64), np.zeros(len(indptr) - 1, np.uint64)
    _collapse(indptr, matrix.indices, matrix.data, rows, num_genes, genes, counts, ends, totals)
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
            gene = rows[indices[i]]
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
