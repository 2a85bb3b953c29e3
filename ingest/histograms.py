"""Binned counts of cells for the report: added up over units, exact, with the same edges for every dataset."""

from typing import Self

import numpy as np
import polars as pl

from corpus.manifest import Record

_PER_DECADE = 8


def _log_edges(decades: int) -> list[float]:
    return [0.0, *(round(10 ** (step / _PER_DECADE), 4) for step in range(decades * _PER_DECADE + 1))]


EDGES = {
    "n_counts": _log_edges(6),
    "n_genes": _log_edges(5),
    "mito_fraction": [round(0.02 * step, 2) for step in range(51)],
}
"""Lower edges of the bins, and the last upper edge: bin i holds `edges[i] <= value < edges[i + 1]`; the last bin also
holds its upper edge and whatever lies beyond. Logarithmic for counts and genes, with a bin of its own for 0."""


class Histograms(Record):
    """Cells per bin of each measure in `EDGES`."""

    n_counts: list[int]
    n_genes: list[int]
    mito_fraction: list[int]

    @classmethod
    def of(cls, cells: pl.DataFrame) -> Self:
        """Bin cells; columns `n_counts`, `n_genes` and `mito_fraction`."""
        return cls(**{name: _bin(cells[name].to_numpy(), edges) for name, edges in EDGES.items()})

    @classmethod
    def empty(cls) -> Self:
        """No cells."""
        return cls(**{name: [0] * (len(edges) - 1) for name, edges in EDGES.items()})

    def __add__(self, other: "Histograms") -> "Histograms":
        pairs = {name: zip(getattr(self, name), getattr(other, name), strict=True) for name in EDGES}
        return Histograms(**{name: [a + b for a, b in values] for name, values in pairs.items()})


def _bin(values: np.ndarray, edges: list[float]) -> list[int]:
    # float32 on both sides: a fraction read back from a shard falls into the bin that it had before it was stored.
    limits = np.array(edges, np.float64 if values.dtype.kind in "iu" else np.float32)
    place = np.clip(np.searchsorted(limits, values, side="right") - 1, 0, len(edges) - 2)
    return [int(number) for number in np.bincount(place, minlength=len(edges) - 1)]
