"""Quality control of cells: which rule drops which cell. All is pure.

Three kinds of rules, in this order: those of the source (its own labels), those of a dataset (thresholds and windows),
and those that look at other cells (doublets, duplicates), which come as lists of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
import polars as pl

from corpus.hashing import digest_json
from corpus.manifest import Record
from ingest.settings import QualityControl

SOURCE_RULES = ("obs_filter", "not_primary_data")
DATASET_RULES = (
    "no_counts",
    "above_max_counts",
    "below_min_genes",
    "above_mito_fraction",
    "counts_outside_sd",
    "mito_counts_outside_sd",
)
NEIGHBOUR_RULES = ("doublet", "duplicate_of_another_cell")
RULES = (*SOURCE_RULES, *DATASET_RULES, *NEIGHBOUR_RULES, "no_vocabulary_genes")
"""Every reason for which a cell is dropped, in the order of asking: a cell is counted under the first that holds."""

_FALSE = {"false", "0", "0.0", "no"}


def source_rules(
    labels: Mapping[str, Sequence[str | None]],
    filters: Mapping[str, Sequence[str]],
    primary: Sequence[str | None] | None,
    size: int,
) -> list[str | None]:
    """Name the source rule that drops each cell; None for a cell that goes on.

    Parameters
    ----------
    labels
        Values, as text, of every column that a filter names.
    filters
        Column to the values that are kept; a missing value is not kept.
    primary
        Values of `is_primary_data`, or None where the source has no such column or the rule is off. Only a plain
        "false" drops a cell.
    size
        Number of cells.
    """
    reasons: list[str | None] = [None] * size
    if primary is not None:
        reasons = ["not_primary_data" if (value or "").lower() in _FALSE else None for value in primary]
    for column, wanted in filters.items():
        accepted = set(wanted)
        for row, value in enumerate(labels[column]):
            if value not in accepted:
                reasons[row] = "obs_filter"
    return reasons


class Sums(Record):
    """Sums over the cells of a dataset, in whole numbers: they add up exactly, in any order."""

    num_cells: int = 0
    counts: int = 0
    counts_squared: int = 0
    mito: int = 0
    mito_squared: int = 0

    @classmethod
    def of(cls, cells: pl.DataFrame) -> Self:
        """Sum over the cells that have counts and that no source rule drops.

        Parameters
        ----------
        cells
            Columns `n_counts`, `mito_counts`, `source_rule`.
        """
        cells = cells.filter((pl.col("n_counts") > 0) & pl.col("source_rule").is_null())
        # Python's integers: the squares of a big dataset may pass 2^63.
        counts, mito = (cells[name].to_numpy().astype(np.int64) for name in ("n_counts", "mito_counts"))
        return cls(
            num_cells=len(cells),
            counts=int(counts.sum()),
            counts_squared=_sum_of_squares(counts),
            mito=int(mito.sum()),
            mito_squared=_sum_of_squares(mito),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


def _sum_of_squares(values: np.ndarray) -> int:
    """Exact: (2^16 high + low)^2 in three sums that cannot pass 2^63 below 2^31 cells."""
    high, low = values >> 16, values & 0xFFFF
    return (int((high**2).sum()) << 32) + (int((high * low).sum()) << 17) + int((low**2).sum())


@dataclass(frozen=True)
class CountShares:
    """Shares of a dataset's counts (UMIs) that fall on mapped genes, and on genes that can become tokens."""

    mapped: float
    in_vocabulary: float

    @classmethod
    def of(cls, counts: int, mapped: int, inside: int) -> Self:
        """Divide; 0 where there are no counts."""
        return cls(mapped / counts, inside / counts) if counts else cls(0.0, 0.0)


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
    """Name the source or dataset rule that drops each cell; null for a cell that goes on.

    Parameters
    ----------
    cells
        Columns `n_counts`, `n_genes`, `mito_counts` (whole numbers), `source_rule` (see `source_rules`).
    """
    counts, mito = pl.col("n_counts"), pl.col("mito_counts")
    tests = {"no_counts": counts == 0}
    if settings.max_counts is not None:
        tests["above_max_counts"] = counts > settings.max_counts
    tests["below_min_genes"] = pl.col("n_genes") < settings.min_genes
    if settings.max_mito_fraction is not None:
        tests["above_mito_fraction"] = mito / counts > settings.max_mito_fraction
    if bounds.counts is not None:
        tests["counts_outside_sd"] = ~counts.is_between(*bounds.counts)
    if bounds.mito_counts is not None:
        tests["mito_counts_outside_sd"] = ~mito.is_between(*bounds.mito_counts)
    dropped = (pl.when(test).then(pl.lit(rule)) for rule, test in tests.items())
    return cells.select(pl.coalesce(pl.col("source_rule"), *dropped).alias("reason"))["reason"]


@dataclass(frozen=True)
class Selection:
    """All that decides which cells of one unit are kept.

    Parameters
    ----------
    bounds
        Windows of the unit's dataset.
    rules
        Thresholds.
    drops
        Neighbour rule to the unit's rows (int64, ascending) that it drops.
    """

    bounds: Bounds
    rules: QualityControl
    drops: Mapping[str, np.ndarray] = field(default_factory=dict)

    def reasons(self, cells: pl.DataFrame) -> pl.Series:
        """Name the rule that drops each cell of the unit (columns as for `reasons`); null for a cell that is kept."""
        found = reasons(cells, self.bounds, self.rules)
        for rule in NEIGHBOUR_RULES:
            rows = self.drops.get(rule)
            if rows is not None and len(rows):
                mask = np.zeros(len(cells), bool)
                mask[rows] = True
                found = pl.select(
                    pl.when(found.is_null() & pl.Series(mask)).then(pl.lit(rule)).otherwise(found).alias("reason")
                )["reason"]
        return found

    @cached_property
    def digest(self) -> str:
        """Names the decision: equal for equal thresholds, windows and dropped rows."""
        drops = {rule: rows.tolist() for rule, rows in self.drops.items() if len(rows)}
        return digest_json([self.bounds.model_dump(), self.rules.thresholds(), drops])
