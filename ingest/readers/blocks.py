"""Dense matrices, read in blocks and kept as sparse rows."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

_BLOCK_BYTES = 64_000_000
_SAMPLE_BLOCKS, _SAMPLE_CELLS = 8, 32


def sparse_rows(
    read: Callable[[int, int], np.ndarray], start: int, stop: int, num_columns: int, itemsize: int
) -> sp.csr_matrix:
    """Rows `start:stop` of a dense matrix, never holding more than about 64 MB of it.

    Parameters
    ----------
    read
        Gives the rows of a range, cells x features.
    """
    step = max(_BLOCK_BYTES // max(num_columns * itemsize, 1), 1)
    blocks = [sp.csr_matrix(read(first, min(first + step, stop))) for first in range(start, stop, step)]
    if not blocks:
        return sp.csr_matrix((stop - start, num_columns))
    return sp.vstack(blocks, format="csr") if len(blocks) > 1 else blocks[0]


def estimated_entries(read: Callable[[int, int], np.ndarray], num_cells: int) -> int:
    """Non-zero entries of a dense matrix, extrapolated from evenly spaced blocks of cells.

    Only the cut into work units depends on it; the blocks are fixed, so the cut is the same every time.
    """
    starts = np.unique(np.linspace(0, max(num_cells - _SAMPLE_CELLS, 0), _SAMPLE_BLOCKS).astype(int))
    seen, entries = 0, 0
    for start in starts:
        block = read(int(start), min(int(start) + _SAMPLE_CELLS, num_cells))
        seen, entries = seen + len(block), entries + int(np.count_nonzero(block))
    return round(entries / seen * num_cells) if seen else 0
