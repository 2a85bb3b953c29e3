"""Exact non-zero medians of every gene over any number of cells, in two mergeable passes.

Pass 1 counts values in bins cut from their float bits; pass 2 keeps only the values that share a bin with the median.
Counts add up in any order, so the result does not depend on the order of cells or on the number of workers.
"""

import numba
import numpy as np

from corpus.schema import COUNTS_PER_CELL

# A bin is a float32's exponent and its six highest mantissa bits; the first and the last bin take all that lies
# beyond. Pass 2 keeps whatever falls into the median's bin, so the width of bins costs time, never exactness.
_SHIFT = 17
_FIRST = int(np.float32(2.0**-4).view(np.uint32)) >> _SHIFT
NUM_BINS = 18 << 6


def normalise(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Counts per 10,000 of the cell: float64, `counts / totals * 10,000` in this order of operations."""
    return counts.astype(np.float64) / totals.astype(np.float64) * COUNTS_PER_CELL


@numba.njit(cache=True, nogil=True)
def _count(genes, values, bins):  # type: ignore[no-untyped-def]
    single = np.empty(1, np.float32)
    bits = single.view(np.uint32)
    for i in range(len(values)):
        single[0] = values[i]
        column = np.int64(bits[0] >> _SHIFT) - _FIRST
        bins[genes[i], min(max(column, 0), NUM_BINS - 1)] += 1


@numba.njit(cache=True, nogil=True)
def _keep(genes, values, low, high):  # type: ignore[no-untyped-def]
    single = np.empty(1, np.float32)
    bits = single.view(np.uint32)
    kept = np.empty(len(values), np.bool_)
    for i in range(len(values)):
        single[0] = values[i]
        column = min(max(np.int64(bits[0] >> _SHIFT) - _FIRST, 0), NUM_BINS - 1)
        kept[i] = column == low[genes[i]] or column == high[genes[i]]
    return kept


class Histogram:
    """Values per gene and bin.

    Parameters
    ----------
    num_genes
        Rows. The dense table takes 4.6 kB a gene of address space, and memory only where values fall.
    """

    def __init__(self, num_genes: int) -> None:
        self.bins = np.zeros((num_genes, NUM_BINS), dtype=np.uint64)

    def add(self, genes: np.ndarray, values: np.ndarray) -> None:
        """Count values: `genes` uint16[n] row numbers, `values` float64[n], positive."""
        _count(genes, values, self.bins)

    def to_sparse(self) -> tuple[np.ndarray, np.ndarray]:
        """Filled bins as (flat position int64[n], number uint64[n]): what a worker sends."""
        flat = self.bins.reshape(-1)
        filled = np.flatnonzero(flat)
        return filled, flat[filled]

    def add_sparse(self, position: np.ndarray, number: np.ndarray) -> None:
        """Merge what another worker sent; positions are unique within one message."""
        self.bins.reshape(-1)[position] += number

    @property
    def n_cells(self) -> np.ndarray:
        """uint64[genes]: cells in which the gene has a count."""
        return self.bins.sum(axis=1)

    def median_bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Bins of the two middle values of each gene (equal where the number is odd); -1 for a gene without values."""
        cumulative, n = np.cumsum(self.bins, axis=1), self.n_cells.astype(np.int64)
        low = (cumulative <= ((n - 1) // 2).clip(0)[:, None].astype(np.uint64)).sum(axis=1)
        high = (cumulative <= (n // 2)[:, None].astype(np.uint64)).sum(axis=1)
        empty = n == 0
        return np.where(empty, -1, low), np.where(empty, -1, high)


def survivors(
    genes: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pass 2: the values that share a bin with a middle value of their gene."""
    kept = _keep(genes, values, low, high)
    return genes[kept], values[kept]


def exact_medians(histogram: Histogram, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Medians from the survivors of all units.

    Returns
    -------
    float64[genes]: equal to `numpy.median` of the gene's values, NaN for a gene without values.

    Raises
    ------
    ValueError
        If the survivors are not those of this histogram (a unit is missing or counted twice).
    """
    n = histogram.n_cells.astype(np.int64)
    low, high = histogram.median_bins()
    columns = np.arange(NUM_BINS)
    wanted = (columns == low[:, None]) | (columns == high[:, None])
    expected = np.where(wanted, histogram.bins, 0).sum(axis=1).astype(np.int64)
    found = np.bincount(genes, minlength=len(n))
    if not np.array_equal(found, expected):
        raise ValueError("the values of the second pass do not add up to the histogram of the first")
    below = np.where(columns < low[:, None], histogram.bins, 0).sum(axis=1).astype(np.int64)
    order = np.lexsort((values, genes))
    values, start = values[order], np.concatenate([[0], np.cumsum(found)])[:-1]
    medians = np.full(len(n), np.nan)
    has = n > 0
    # Survivors of a gene are its bins `low` and `high` alone: bins between the two middle values are empty.
    first, second = (n - 1) // 2 - below, n // 2 - below
    medians[has] = (values[(start + first)[has]] + values[(start + second)[has]]) / 2
    return medians
