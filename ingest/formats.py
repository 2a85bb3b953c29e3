"""One small interface for every source format: names once, then any row range without loading the file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse as sp

from corpus.errors import UserError

GENE_EXPRESSION = "Gene Expression"
OTHER_SPECIES = "other species"
"""Kind of a feature that the reader knows, from a genome prefix or a genome column, to be of another species."""


@dataclass(frozen=True)
class Features:
    """Columns of a count matrix.

    Parameters
    ----------
    names
        Gene ids or symbols as the source gives them, without genome prefixes (`mm10___Gcg` is `Gcg`).
    kinds
        Feature type of each column (`Gene Expression`, `Antibody Capture`, ..., `OTHER_SPECIES`), or None where all are
        genes of the declared species.
    """

    names: list[str]
    kinds: list[str] | None = None


class CountMatrix(Protocol):
    """An open source file."""

    @property
    def num_cells(self) -> int:
        """Number of rows."""

    @property
    def num_entries(self) -> int:
        """Number of stored entries (a dense matrix: an estimate of its non-zero ones)."""

    @property
    def layer(self) -> str:
        """Which matrix of the file is read, in the format's own words: `X`, `raw.X`, a layer's or a genome's name."""

    @property
    def features(self) -> Features:
        """Columns."""

    @property
    def detected(self) -> dict[str, str]:
        """What the reader found out by itself and what it left out, for the account; empty if nothing."""

    def barcodes(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start:stop`, by default of all."""

    def obs_columns(self) -> list[str]:
        """Names of the label columns."""

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """Labels of the cells `start:stop`; None where missing."""

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""

    def close(self) -> None:
        """Let go of the file."""


class DescribeEntry(Protocol):
    """Says where an entry of a sparse matrix comes from."""

    def __call__(self, entry: int) -> str:
        """File and cell of an entry."""


def require_counts(values: np.ndarray, describe: DescribeEntry, layer: str) -> None:
    """Refuse values that are not raw counts.

    Parameters
    ----------
    values
        Stored entries, any real dtype.
    describe
        Gives the file and the cell of an entry, for the message.

    Raises
    ------
    UserError
        On a NaN, infinite, negative or fractional value.
    """
    if values.size == 0:
        return
    if values.dtype.kind in "iu":
        bad, what = (values < 0) | (values > np.iinfo(np.uint32).max), "not a count (0 to 2^32 - 1)"
    else:
        whole = (values >= 0) & (values == np.floor(values)) & (values <= np.iinfo(np.uint32).max)
        bad, what = ~whole, "not a count (a whole number from 0 to 2^32 - 1)"
    if bad.any():
        first = int(np.argmax(bad))
        raise UserError(
            f"{describe(first)}: value {values[first]} in {layer} is {what}: this looks like normalised data. "
            f"Raw counts are needed: name the matrix that holds them with `layer` (X, raw.X or a layer)"
        )
