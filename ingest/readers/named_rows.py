"""What formats without cell labels have in common once their matrix is in rows."""

from collections.abc import Sequence
from typing import Protocol

import scipy.sparse as sp

from ingest.formats import Features


class Rows(Protocol):
    """A matrix of which row ranges can be read."""

    @property
    def num_entries(self) -> int:
        """Stored entries."""

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start:stop`."""


class NamedRows:
    """Names around a matrix that lies in rows (see `ingest.formats.CountMatrix`).

    Parameters
    ----------
    layer, features, detected
        As in `CountMatrix`.
    names
        Names of the cells.
    matrix
        Cells x features.
    """

    def __init__(
        self, layer: str, features: Features, names: Sequence[str], matrix: Rows, detected: dict[str, str]
    ) -> None:
        self.layer, self.features, self.detected = layer, features, detected
        self.num_cells = len(names)
        self._names, self._matrix = names, matrix

    @property
    def num_entries(self) -> int:
        """Number of stored entries."""
        return self._matrix.num_entries

    def barcodes(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start:stop`, by default of all."""
        return list(self._names[start:stop])

    def obs_columns(self) -> list[str]:
        """No labels in this format."""
        return []

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """No labels in this format."""
        raise KeyError(column)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""
        return self._matrix.rows(start, stop)

    def close(self) -> None:
        """Nothing is held open but the staged matrix, which the process may need again."""
