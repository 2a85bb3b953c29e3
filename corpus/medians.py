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
# All entries of a cell with the same count have the same value: those of small counts are worked out once a cell.
_SMALL = 32


def normalise(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Counts per 10,000 of the cell: float64, `counts / totals * 10,000` in this order of operations."""
    return counts.astype(np.float64) / totals.astype(np.float64) * COUNTS_PER_CELL


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _bins(values, out):  # type: ignore[no-untyped-def]
    single = np.empty(1, np.float32)
    bits = single.view(np.uint32)
    for i in range(len(values)):
        single[0] = values[i]
        out[i] = min(max(np.int64(bits[0] >> _SHIFT) - _FIRST, 0), NUM_BINS - 1)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _count(genes, columns, bins):  # type: ignore[no-untyped-def]
    for i in range(len(columns)):
        bins[columns[i], genes[i]] += 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _count_cells(cells, indptr, genes, counts, totals, row_of, table):  # type: ignore[no-untyped-def]
    """Count into `table` (bins x rows): a cell's entries of one count walk along one row, genes ascending."""
    values, columns = np.empty(_SMALL, np.float64), np.empty(_SMALL, np.int64)
    one, its_bin = np.empty(1, np.float64), np.empty(1, np.int64)
    for cell in cells:
        total = np.float64(totals[cell])
        for count in range(_SMALL):
            values[count] = np.float64(count) / total * COUNTS_PER_CELL
        _bins(values, columns)
        for i in range(indptr[cell], indptr[cell + 1]):
            row = row_of[genes[i]]
            if row < 0:
                continue
            count = counts[i]
            if count < _SMALL:
                table[columns[count], row] += 1
            else:
                one[0] = np.float64(count) / total * COUNTS_PER_CELL
                _bins(one, its_bin)
                table[its_bin[0], row] += 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _keep_cells(cells, indptr, genes, counts, totals, low, high, out_genes, out_values):  # type: ignore[no-untyped-def]
    values, columns = np.empty(_SMALL, np.float64), np.empty(_SMALL, np.int64)
    one, its_bin = np.empty(1, np.float64), np.empty(1, np.int64)
    found = 0
    for cell in cells:
        total = np.float64(totals[cell])
        for count in range(_SMALL):
            values[count] = np.float64(count) / total * COUNTS_PER_CELL
        _bins(values, columns)
        for i in range(indptr[cell], indptr[cell + 1]):
            gene, count = genes[i], counts[i]
            if count < _SMALL:
                value, column = values[count], columns[count]
            else:
                one[0] = np.float64(count) / total * COUNTS_PER_CELL
                _bins(one, its_bin)
                value, column = one[0], its_bin[0]
            if column == low[gene] or column == high[gene]:
                if found < len(out_genes):
                    out_genes[found], out_values[found] = gene, value
                found += 1
    return found


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _mark(cells, indptr, genes, seen):  # type: ignore[no-untyped-def]
    for cell in cells:
        for i in range(indptr[cell], indptr[cell + 1]):
            seen[genes[i]] = True


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _filled(table, rows, num_genes, position, number):  # type: ignore[no-untyped-def]
    found = 0
    for column in range(table.shape[0]):
        for place in range(table.shape[1]):
            if table[column, place]:
                position[found], number[found] = column * num_genes + rows[place], table[column, place]
                found += 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add(bins, position, number):  # type: ignore[no-untyped-def]
    for i in range(len(position)):
        bins[position[i]] += np.uint64(number[i])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _middle(bins, used, low, high, below, n):  # type: ignore[no-untyped-def]
    """Per gene: bins of its two middle values (-1 without values), number of values in lower bins, and of all."""
    for column in range(NUM_BINS):
        if used[column]:
            for gene in range(bins.shape[1]):
                n[gene] += np.int64(bins[column, gene])
    passed = np.zeros(bins.shape[1], np.int64)
    for column in range(NUM_BINS):
        if used[column]:
            for gene in range(bins.shape[1]):
                number = np.int64(bins[column, gene])
                if number == 0:
                    continue
                if low[gene] < 0 and passed[gene] + number > (n[gene] - 1) // 2:
                    low[gene], below[gene] = column, passed[gene]
                passed[gene] += number
                if high[gene] < 0 and passed[gene] > n[gene] // 2:
                    high[gene] = column


class Histogram:
    """Values per bin and gene.

    Parameters
    ----------
    num_genes
        Columns. The dense table takes 9.2 kB a gene of address space, and memory only where values fall.
    """

    def __init__(self, num_genes: int) -> None:
        # Bins first, so that what a worker sends is added from front to back.
        self.bins = np.zeros((NUM_BINS, num_genes), dtype=np.uint64)
        self._used = np.zeros(NUM_BINS, bool)  # bins never written are never read, so they take no memory

    def add(self, genes: np.ndarray, values: np.ndarray) -> None:
        """Count values: `genes` unsigned[n] row numbers, `values` float64[n], positive."""
        columns = _columns(values)
        _count(genes, columns, self.bins)
        self._used[columns] = True

    def to_sparse(self) -> tuple[np.ndarray, np.ndarray]:
        """Filled bins as (flat position int64[n], number uint64[n])."""
        flat = self.bins.reshape(-1)
        filled = np.flatnonzero(flat)
        return filled, flat[filled]

    def add_sparse(self, position: np.ndarray, number: np.ndarray) -> None:
        """Merge what another worker sent; fastest with positions in ascending order."""
        _add(self.bins.reshape(-1), position, number)
        self._used[position // self.bins.shape[1]] = True

    def middles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each gene: bins of its two middle values (-1 without values), number of values below them, and of all."""
        genes = self.bins.shape[1]
        low, high = (np.full(genes, -1) for _ in range(2))
        below, n = (np.zeros(genes, np.int64) for _ in range(2))
        _middle(self.bins, self._used, low, high, below, n)
        return low, high, below, n

    @property
    def n_cells(self) -> np.ndarray:
        """uint64[genes]: cells in which the gene has a count."""
        return self.middles()[3].astype(np.uint64)

    def median_bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Bins of the two middle values of each gene (equal where the number is odd); -1 for a gene without values."""
        low, high, _, _ = self.middles()
        return low, high


def _columns(values: np.ndarray) -> np.ndarray:
    columns = np.empty(len(values), np.int64)
    _bins(values, columns)
    return columns


def count_cells(
    cells: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    totals: np.ndarray,
    wanted: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Pass 1 over some cells: what a worker sends.

    Parameters
    ----------
    cells
        int64[n]: which cells count.
    indptr, genes, counts
        int64[cells + 1] and unsigned[entries], in cell order.
    totals
        Counts of each cell over all genes.
    wanted
        bool[genes]: the genes to count.

    Returns
    -------
    position, number
        For `Histogram.add_sparse`: int64, unique and ascending, and uint32.
    """
    seen = np.zeros(len(wanted), bool)
    _mark(cells, indptr, genes, seen)
    rows = np.flatnonzero(seen & wanted)
    row_of = np.full(len(wanted), -1, np.int32)
    row_of[rows] = np.arange(len(rows))
    table = np.zeros((NUM_BINS, len(rows)), np.uint32)
    # Cells of like totals fall into the same bins: in this order the rows in use stay in the cache.
    cells = cells[np.argsort(totals[cells], kind="stable")]
    _count_cells(cells, indptr, genes, counts, totals, row_of, table)
    filled = int(np.count_nonzero(table))
    position, number = np.empty(filled, np.int64), np.empty(filled, np.uint32)
    _filled(table, rows, len(wanted), position, number)
    return position, number


def keep_cells(
    cells: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    totals: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Pass 2 over some cells: (genes, values) that share a bin with a middle value of their gene.

    Parameters
    ----------
    cells, indptr, genes, counts, totals
        As in `count_cells`.
    low, high
        From `Histogram.median_bins` of all cells.
    """
    room = len(genes) // 32
    while True:
        out_genes, out_values = np.empty(room, genes.dtype), np.empty(room, np.float64)
        found = _keep_cells(cells, indptr, genes, counts, totals, low, high, out_genes, out_values)
        if found <= room:
            return out_genes[:found].copy(), out_values[:found].copy()
        room = found


def survivors(
    genes: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pass 2: the values that share a bin with a middle value of their gene."""
    columns = _columns(values)
    kept = (columns == low[genes]) | (columns == high[genes])
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
    low, high, below, n = histogram.middles()
    rows = np.arange(len(n))
    expected = histogram.bins[low, rows] + np.where(high != low, histogram.bins[high, rows], 0)
    found = np.bincount(genes, minlength=len(n))
    if not np.array_equal(found, np.where(n > 0, expected, 0)):
        raise ValueError("the values of the second pass do not add up to the histogram of the first")
    order = np.lexsort((values, genes))
    values, start = values[order], np.concatenate([[0], np.cumsum(found)])[:-1]
    medians = np.full(len(n), np.nan)
    has = n > 0
    # Survivors of a gene are its bins `low` and `high` alone: bins between the two middle values are empty.
    first, second = (n - 1) // 2 - below, n // 2 - below
    medians[has] = (values[(start + first)[has]] + values[(start + second)[has]]) / 2
    return medians
