"""The two published modes that only add up: `aggregate_data` and `aggregate_gene_shifts`.

They test nothing: a single perturbation has no other genes to be compared with, and that an edit changes other genes'
embeddings is certain. Means come with their spread, over donors as well where there are any.
"""

from collections.abc import Iterable

import polars as pl

from evaluate.stats import KEYS

AFFECTED = "affected_ensembl_id"


def aggregate_cells(blocks: Iterable[pl.DataFrame], values: list[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Shifts of given sets of genes, cell by cell and in the mean.

    Parameters
    ----------
    blocks
        Whole cells: `ensembl_id`, `symbol`, `cell_id`, `donor_id` and the values, one row a cell and set.
    values
        Columns to average.

    Returns
    -------
    sets
        One row a set and value: `ensembl_id`, `symbol`, `value`, `n_cells`, `n_donors`, and over cells `mean`, `sd`,
        `median`, `minimum`, `maximum`; `mean_of_donors`, in which each donor counts once.
    cells
        The rows, by set.
    """
    cells = pl.concat(list(blocks)).sort(KEYS.gene, maintain_order=True)
    parts = []
    for value in values:
        x = pl.col(value).cast(pl.Float64)
        of_cells = cells.group_by(KEYS.gene).agg(
            pl.col("symbol").first(),
            pl.lit(value).first().alias("value"),
            pl.col(KEYS.cell).n_unique().alias("n_cells"),
            pl.col(KEYS.donor).drop_nulls().n_unique().alias("n_donors"),
            x.mean().alias("mean"),
            x.std().alias("sd"),
            x.median().alias("median"),
            x.min().alias("minimum"),
            x.max().alias("maximum"),
        )
        donors = cells.drop_nulls(KEYS.donor).group_by(KEYS.gene, KEYS.donor).agg(x.mean().alias("mean_of_donors"))
        donors = donors.group_by(KEYS.gene).agg(pl.col("mean_of_donors").mean())
        parts.append(of_cells.join(donors, on=KEYS.gene, how="left", validate="1:1").sort(KEYS.gene))
    return pl.concat(parts), cells


def aggregate_effects(blocks: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Mean effect of each perturbation on each other gene's embedding, in one pass.

    Parameters
    ----------
    blocks
        `ensembl_id` (of a set, its genes joined by "+"), `affected_ensembl_id`, `donor_id`, `similarity`: one row a
        cell, perturbation and affected gene.

    Returns
    -------
    One row a perturbation and affected gene, the most affected first: `ensembl_id`, `affected_ensembl_id`, `n_cells`,
    `n_donors`, `mean_similarity` and `sd` over cells (null for one cell), `mean_of_donors`, in which each donor counts
    once.
    """
    pair = [KEYS.gene, AFFECTED]
    merged: list[pl.DataFrame] = []
    for block in blocks:
        # Similarities lie close to 1: sums of squares of the small loss, not of the similarity.
        loss = 1 - pl.col("similarity").cast(pl.Float64)
        merged.append(
            block.group_by([*pair, KEYS.donor]).agg(
                pl.len().cast(pl.Int64).alias("n"), loss.sum().alias("loss"), (loss**2).sum().alias("squares")
            )
        )
        if len(merged) == 16:
            merged = [_add(merged, pair)]
    donors = _add(merged, pair)
    known = pl.col(KEYS.donor).is_not_null()
    n, mean = pl.col("n").sum(), pl.col("loss").sum() / pl.col("n").sum()
    variance = (pl.col("squares").sum() - n * mean**2).clip(0) / (n - 1)
    return (
        donors.group_by(pair)
        .agg(
            n.alias("n_cells"),
            known.sum().alias("n_donors"),
            (1 - mean).alias("mean_similarity"),
            pl.when(n > 1).then(variance.sqrt()).alias("sd"),
            (1 - (pl.col("loss") / pl.col("n")).filter(known).mean()).alias("mean_of_donors"),
        )
        .sort(KEYS.gene, "mean_similarity", AFFECTED)
    )


def _add(parts: list[pl.DataFrame], pair: list[str]) -> pl.DataFrame:
    return pl.concat(parts).group_by([*pair, KEYS.donor]).agg(pl.col("n", "loss", "squares").sum())
