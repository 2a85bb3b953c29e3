"""From shifts to genes: effect, interval and p-value of each perturbed gene, against other genes of the same cells.

A deletion moves every embedding a little, more so for genes of high rank, so shifts of genes without any role are not
centred on zero. Each shift is therefore compared with those of the other genes of its own cell that are alike in rank
and in detection (`add_null`). What is left, the excess, is tested over donors where there are enough of them: cells of
one animal are no replicates. With fewer donors cells are all there is; such p-values say nothing about variation
between animals, and the column `test` says that they were made this way. They are made of ranks: in a cell between two
states every edit may move far, and tests of means would call whichever genes that cell happens to have.

A scan may be larger than memory: `sum_block` reduces a block of whole cells to sums per gene and donor, `merge` adds
them up, `genes_from_sums` tests. The formulas are in docs/statistics.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.stats

from evaluate.moderation import moderate
from evaluate.stats_settings import StatsSettings

NULL_SIZE = 20
"""Other genes that a cell must offer as a null."""
_MAX_BINS = 8

OVER_DONORS = "donors, against matched genes"
OVER_DONORS_ZERO = "donors, against no shift"
OVER_CELLS = "cells pooled (too few donors), against matched genes"
OVER_CELLS_ZERO = "cells pooled (too few donors), against no shift"
TOO_FEW_CELLS = "none: too few cells"
TOO_FEW_DONORS = "none: gene in too few donors"


@dataclass(frozen=True)
class Keys:
    """Columns of a table of values: what was perturbed, in which cell, of which donor."""

    gene: str = "ensembl_id"
    cell: str = "cell_id"
    donor: str = "donor_id"
    rank: str = "rank"


KEYS = Keys()
_BIN = [KEYS.cell, "_rank_bin", "_bin"]


@dataclass(frozen=True)
class Sums:
    """What the tests need of some cells, for one measure.

    Parameters
    ----------
    genes
        One row a gene: `n`, `n_cells`, `mean` and `m2` (squares about the mean) of the value; `n_null`, `null_mean`,
        `null_size`, `excess`, `place` and `place_var` (its variance without effect), all sums over its cells.
    donors
        One row a gene and donor: `n` and `value`, `n_null` and `excess`, sums over its cells.
    """

    genes: pl.DataFrame
    donors: pl.DataFrame


def count_detections(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of each gene, as `detected`; of several blocks, add them up."""
    return frame.group_by(KEYS.gene).agg(pl.len().alias("detected"))


def assign_bins(frame: pl.DataFrame, detections: pl.DataFrame) -> pl.DataFrame:
    """Cut each cell's rows into bins of equal size by rank, and each of these by detection.

    A bin holds at least `NULL_SIZE` rows besides the one looked at, if the cell has as many.

    Parameters
    ----------
    frame
        Whole cells: `ensembl_id`, `cell_id`, `rank`, one row a cell and gene.
    detections
        `ensembl_id`, `detected` over all cells of the scan.
    """
    frame = frame.join(detections, on=KEYS.gene, how="left", validate="m:1", maintain_order="left")
    of_cell = pl.len().over(KEYS.cell)
    bins = ((of_cell - 1) / NULL_SIZE).sqrt().floor().clip(1, _MAX_BINS)
    frame = frame.with_columns(bins.cast(pl.Int32).alias("_bins"), of_cell.cast(pl.Int32).alias("_rows"))
    by_rank = pl.col(KEYS.rank).rank("ordinal").over(KEYS.cell) - 1
    frame = frame.with_columns((by_rank * pl.col("_bins") // pl.col("_rows")).alias("_rank_bin"))
    group = _BIN[:2]
    by_detection = pl.col("detected").rank("ordinal").over(group) - 1
    frame = frame.with_columns((by_detection * pl.col("_bins") // pl.len().over(group)).alias("_bin"))
    return frame.drop("detected", "_bins", "_rows")


def _compare_in_bins(frame: pl.DataFrame, value: str) -> pl.DataFrame:
    """See `add_null`; the bins are there already."""
    x, size = pl.col(value).cast(pl.Float64), pl.len().over(_BIN).cast(pl.Int64) - 1
    place = (x.rank("average").over(_BIN) - 0.5) / (size + 1)
    # Variances from sums need centred numbers: shifts of a bin differ little compared with their size.
    frame = frame.with_columns((x - x.mean().over(_BIN)).alias("_centred"), x.mean().over(_BIN).alias("_bin_mean"))
    y = pl.col("_centred")
    others = y.sum().over(_BIN) - y
    squares = (y**2).sum().over(_BIN) - y**2
    mean = others / size
    variance = (squares - size * mean**2) / (size - 1)
    enough = size >= NULL_SIZE - 1
    return frame.with_columns(
        pl.when(enough).then(pl.col("_bin_mean") + mean).alias("null_mean"),
        pl.when(enough).then(variance.clip(0)).alias("null_var"),
        pl.when(enough).then(size).alias("null_size"),
        pl.when(enough).then(y - mean).alias("excess"),
        pl.when(enough).then(place).alias("place"),
    )


def add_null(frame: pl.DataFrame, value: str) -> pl.DataFrame:
    """Add to each row what the other genes of its cell and bin say.

    Parameters
    ----------
    frame
        All cells: `ensembl_id`, `cell_id`, `rank` and the value, one row a cell and gene.
    value
        Name of the column tested.

    Returns
    -------
    The frame with `null_mean` and `null_var` (mean and variance of the others), `null_size` (how many), `excess` (value
    minus `null_mean`) and `place` (rank in the bin, from 0 to 1); null where the cell has too few other genes.
    """
    frame = _compare_in_bins(assign_bins(frame, count_detections(frame)), value)
    return frame.drop(name for name in frame.columns if name.startswith("_"))


def sum_block(binned: pl.DataFrame, value: str) -> Sums:
    """Reduce a block of whole cells, with their bins, to what the tests need."""
    frame = _compare_in_bins(binned, value).with_columns(pl.col(value).cast(pl.Float64).alias("_x"))
    x = pl.col("_x")
    # Of a place drawn from the k + 1 equally likely ones.
    place_var = (1 - 1 / (pl.col("null_size") + 1) ** 2) / 12
    genes = frame.group_by(KEYS.gene).agg(
        pl.len().cast(pl.Int64).alias("n"),
        pl.col(KEYS.cell).n_unique().cast(pl.Int64).alias("n_cells"),
        x.mean().alias("mean"),
        ((x - x.mean()) ** 2).sum().alias("m2"),
        pl.col("excess").count().cast(pl.Int64).alias("n_null"),
        pl.col("null_mean").sum(),
        pl.col("null_size").sum().cast(pl.Int64),
        pl.col("excess").sum(),
        pl.col("place").sum(),
        place_var.sum().alias("place_var"),
    )
    donors = frame.drop_nulls(KEYS.donor).group_by(KEYS.gene, KEYS.donor)
    return Sums(
        genes,
        donors.agg(
            pl.len().cast(pl.Int64).alias("n"),
            x.sum().alias("value"),
            pl.col("excess").count().cast(pl.Int64).alias("n_null"),
            pl.col("excess").sum(),
        ),
    )


def merge(parts: Iterable[Sums]) -> Sums:
    """Add up the sums of several blocks; each cell in one block alone."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    genes = pl.concat([part.genes for part in parts]).with_columns(
        ((pl.col("mean") * pl.col("n")).sum() / pl.col("n").sum()).over(KEYS.gene).alias("_mean")
    )
    between = pl.col("n") * (pl.col("mean") - pl.col("_mean")) ** 2
    sums = ["n", "n_cells", "n_null", "null_mean", "null_size", "excess", "place", "place_var"]
    genes = genes.group_by(KEYS.gene, maintain_order=True).agg(
        pl.col("_mean").first().alias("mean"), (pl.col("m2") + between).sum().alias("m2"), pl.col(sums).sum()
    )
    donors = pl.concat([part.donors for part in parts]).group_by(KEYS.gene, KEYS.donor, maintain_order=True)
    return Sums(genes.select(parts[0].genes.columns), donors.agg(pl.col("n", "value", "n_null", "excess").sum()))


def gene_statistics(frame: pl.DataFrame, value: str, settings: StatsSettings) -> pl.DataFrame:
    """Test every gene of a scan that fits into memory; see `genes_from_sums`.

    Parameters
    ----------
    frame
        `ensembl_id`, `cell_id`, `donor_id` (may be null), `rank` and the value, one row a cell and gene.
    value
        Name of the column tested.
    """
    return genes_from_sums(sum_block(assign_bins(frame, count_detections(frame)), value), settings)


def genes_from_sums(sums: Sums, settings: StatsSettings) -> pl.DataFrame:
    """Test every gene.

    Parameters
    ----------
    sums
        Over all cells of a scan.

    Returns
    -------
    One row a gene: `n_cells`, `n_donors`; `mean` (over donors where donors are tested, else over cells) with its
    interval `ci_low`, `ci_high`; `null_mean`, `null_size` (matched genes' values behind it) and `excess`, the mean of
    value minus null; `place`, its mean rank among matched genes (0 the lowest, 1 the highest, 0.5 without effect);
    `p_value`, two-sided: over donors of the excess, over cells of the place (a stratified rank-sum test: van Elteren,
    Bull. Int. Stat. Inst. 37, 351-361, 1960), and of the mean where there is no null; `fdr` over the tested
    genes (Benjamini and Hochberg 1995); `p_genes`, the share of the `null_genes` = M other genes nearest in detection
    whose excess is as extreme, (1 + hits) / (M + 1) on the nearer side, doubled; `test`, which test was done.
    """
    genes = _cell_level(sums)
    has_null = genes["null_size"].fill_null(0) > 0
    if sums.donors[KEYS.donor].n_unique() >= settings.min_donors:
        genes = _donor_level(sums, genes, settings)
        named = pl.when(has_null).then(pl.lit(OVER_DONORS)).otherwise(pl.lit(OVER_DONORS_ZERO))
    else:
        genes = _pooled(genes, settings)
        named = pl.when(has_null).then(pl.lit(OVER_CELLS)).otherwise(pl.lit(OVER_CELLS_ZERO))
    few_cells = pl.col("n_cells") < settings.min_cells
    genes = genes.with_columns(
        pl.when(few_cells).then(pl.lit(TOO_FEW_CELLS))
        .when(pl.col("p_value").is_null()).then(pl.lit(TOO_FEW_DONORS))
        .otherwise(named).alias("test"),
        pl.when(~few_cells).then(pl.col("p_value")).alias("p_value"),
    )  # fmt: skip
    genes = genes.with_columns(column("fdr", benjamini_hochberg(genes["p_value"].fill_null(np.nan).to_numpy())))
    return _among_genes(genes, settings).drop("place_error", "value_error")


def _cell_level(sums: Sums) -> pl.DataFrame:
    """Per gene: counts, means over cells, and the standard errors of value and excess if cells were independent."""
    n, n_null = pl.col("n"), pl.when(pl.col("n_null") > 0).then(pl.col("n_null"))
    donors = sums.donors.group_by(KEYS.gene).agg(pl.len().alias("n_donors"))
    return (
        sums.genes.join(donors, on=KEYS.gene, how="left", validate="1:1")
        .select(
            KEYS.gene,
            pl.col("n_cells").cast(pl.UInt32),
            pl.col("n_donors").fill_null(0).cast(pl.UInt32),
            pl.col("mean"),
            pl.when(n > 1).then((pl.col("m2") / (n - 1) / n).sqrt()).alias("value_error"),
            pl.col("null_mean") / n_null,
            pl.col("null_size"),
            pl.col("excess") / n_null,
            pl.col("place") / n_null,
            (pl.col("place_var").sqrt() / n_null).alias("place_error"),
        )
        .sort(KEYS.gene)
    )


def _pooled(genes: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    has_null = genes["excess"].is_not_null().to_numpy()
    n = genes["n_cells"].to_numpy()
    mean, error = genes["mean"].to_numpy(), genes["value_error"].fill_null(np.nan).to_numpy()
    half = scipy.stats.t.ppf((1 + settings.confidence) / 2, np.maximum(n - 1, 1)) * error
    off_middle = genes["place"].fill_null(np.nan).to_numpy() - 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        against_null = 2 * scipy.stats.norm.sf(np.abs(off_middle / genes["place_error"].fill_null(np.nan).to_numpy()))
        against_zero = 2 * scipy.stats.t.sf(np.abs(mean / error), np.maximum(n - 1, 1))
    p_value = np.where(has_null, against_null, against_zero)
    return genes.with_columns(column("ci_low", mean - half), column("ci_high", mean + half), column("p_value", p_value))


def _donor_level(sums: Sums, genes: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    per_donor = sums.donors.filter(pl.col("n") >= settings.min_cells_per_donor).sort(KEYS.gene, KEYS.donor)
    per_donor = per_donor.with_columns(
        pl.col("value") / pl.col("n"),
        pl.when(pl.col("n_null") > 0).then(pl.col("excess") / pl.col("n_null")).alias("excess"),
    )
    rows = np.searchsorted(genes[KEYS.gene].to_numpy(), per_donor[KEYS.gene].to_numpy())
    donors, columns = np.unique(per_donor[KEYS.donor].to_numpy(), return_inverse=True)
    values, excess = np.full((2, len(genes), len(donors)), np.nan)
    values[rows, columns] = per_donor["value"].to_numpy()
    excess[rows, columns] = per_donor["excess"].fill_null(np.nan).to_numpy()
    tested = np.isfinite(values).sum(axis=1) >= settings.min_donors
    # Genes of like detection have like errors; the prior of the variance is theirs.
    of_mean = moderate(np.where(tested[:, None], values, np.nan), genes["n_cells"].to_numpy())
    of_excess = moderate(np.where(tested[:, None], excess, np.nan), genes["n_cells"].to_numpy())
    used = of_mean.where(~np.isfinite(of_excess.mean), of_excess)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = 2 * scipy.stats.t.sf(np.abs(used.mean / used.error), used.df)
    p_value = np.where((used.mean == 0) & (used.error == 0), 1.0, p_value)
    half = scipy.stats.t.ppf((1 + settings.confidence) / 2, of_mean.df) * of_mean.error
    return genes.with_columns(
        pl.Series("n_donors", np.isfinite(values).sum(axis=1).astype(np.uint32)),
        pl.coalesce(column("mean", of_mean.mean), "mean").alias("mean"),
        pl.coalesce(column("excess", of_excess.mean), "excess").alias("excess"),
        column("ci_low", of_mean.mean - half),
        column("ci_high", of_mean.mean + half),
        column("p_value", p_value),
    )


def _among_genes(genes: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    """Add `p_genes`: where a gene's excess lies among those of the `null_genes` other genes nearest in detection."""
    measure = pl.coalesce("excess", "mean")
    table = genes.with_row_index("row").filter(pl.col("p_value").is_not_null()).with_columns(measure.alias("x"))
    table = table.sort("n_cells", "row")
    p = np.full(len(genes), np.nan)
    size = len(table)
    others = min(settings.null_genes, size - 1)
    if others >= NULL_SIZE:
        x = table["x"].to_numpy()
        first = np.clip(np.arange(size) - others // 2, 0, size - others - 1)
        for place, row in enumerate(table["row"].to_numpy()):
            window = x[first[place] : first[place] + others + 1]
            # The window holds the gene itself, which is the 1 of (1 + hits).
            p[row] = min(1.0, 2 * min((window >= x[place]).sum(), (window <= x[place]).sum()) / (others + 1))
    return genes.with_columns(
        column("p_genes", p), pl.when(np.isfinite(p)).then(others).cast(pl.Int32).alias("null_genes")
    )


def benjamini_hochberg(p_value: np.ndarray) -> np.ndarray:
    """False discovery rates (Benjamini and Hochberg 1995) of the p-values that there are; NaN elsewhere."""
    fdr = np.full(len(p_value), np.nan)
    known = np.isfinite(p_value)
    if known.any():
        fdr[known] = scipy.stats.false_discovery_control(p_value[known], method="bh")
    return fdr


def column(name: str, values: np.ndarray) -> pl.Series:
    """Float column in which "not known" is null, as Parquet and CSV readers expect."""
    return pl.Series(name, values).fill_nan(None)
