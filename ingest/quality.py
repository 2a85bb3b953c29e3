"""Quality control of cells, dataset by dataset."""

from typing import Self

import numpy as np
import polars as pl

from corpus.manifest import Record
from ingest.settings import QualityControl

RULES = (
    "no_counts",
    "above_max_counts",
    "below_min_genes",
    "above_mito_fraction",
    "counts_outside_sd",
    "mito_counts_outside_sd",
    "no_vocabulary_genes",
)
"""Every reason for which a cell is dropped; the last one applies after the vocabulary is known."""


class Sums(Record):
    """Sums over the cells of a dataset, in whole numbers: they add up exactly, in any order."""

    num_cells: int = 0
    counts: int = 0
    counts_squared: int = 0
    mito: int = 0
    mito_squared: int = 0

    @classmethod
    def of(cls, cells: pl.DataFrame) -> Self:
        """Sum over the cells that have counts at all; columns `n_counts`, `mito_counts`."""
        cells = cells.filter(pl.col("n_counts") > 0)
        counts, mito = (cells[name].to_numpy().astype(np.int64) for name in ("n_counts", "mito_counts"))
        return cls(
            num_cells=len(cells),
            counts=int(counts.sum()),
            counts_squared=int((counts**2).sum()),
            mito=int(mito.sum()),
            mito_squared=int((mito**2).sum()),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


class Bounds(Record):
    """Window of a dataset, both ends included; None where the rule is off."""

    counts: tuple[float, float] | None
    mito_counts: tuple[float, float] | None

    @classmethod
    def of(cls, sums: Sums, settings: QualityControl) -> Self:
        """Mean plus and minus the set number of (population) standard deviations, not below 0."""
        return cls(
            counts=_window(sums.num_cells, sums.counts, sums.counts_squared, settings.counts_sd),
            mito_counts=_window(sums.num_cells, sums.mito, sums.mito_squared, settings.mito_counts_sd),
        )


def _window(n: int, total: int, squares: int, width: float | None) -> tuple[float, float] | None:
    if width is None or n == 0:
        return None
    mean = total / n
    # In whole numbers up to the root: no cancellation, whatever the order in which the sums arrived.
    deviation = ((n * squares - total * total) / (n * n)) ** 0.5
    return max(mean - width * deviation, 0.0), mean + width * deviation


def reasons(cells: pl.DataFrame, bounds: Bounds, settings: QualityControl) -> pl.Series:
    """Name the rule that drops each cell; null for a cell that is kept.

    Parameters
    ----------
    cells
        Columns `n_counts`, `n_genes`, `mito_counts` (whole numbers).
    """
    counts, mito = pl.col("n_counts"), pl.col("mito_counts")
    tests = {
        "no_counts": counts == 0,
        "above_max_counts": counts > settings.max_counts,
        "below_min_genes": pl.col("n_genes") < settings.min_genes,
    }
    if settings.max_mito_fraction is not None:
        tests["above_mito_fraction"] = mito / counts > settings.max_mito_fraction
    if bounds.counts is not None:
        tests["counts_outside_sd"] = ~counts.is_between(*bounds.counts)
    if bounds.mito_counts is not None:
        tests["mito_counts_outside_sd"] = ~mito.is_between(*bounds.mito_counts)
    first = pl.coalesce(pl.when(test).then(pl.lit(rule)) for rule, test in tests.items())
    return cells.select(first.alias("reason"))["reason"]
