"""Does a pair of genes do more than its two genes alone? Interactions of scans over pairs.

Published as Combo_minus_sum_shift (Theodoris et al., Nature 618, 616-624, 2023), from means over all cells that have
either; here it is taken within each cell that has all three perturbations, so that cells do not differ between terms.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl
import scipy.stats

from evaluate.stats import KEYS, TOO_FEW_CELLS, benjamini_hochberg, column
from evaluate.stats_settings import StatsSettings

OVER_DONORS_PAIRS = "donors, t-test against no interaction"
OVER_CELLS_PAIRS = "cells pooled (too few donors), t-test against no interaction"
_SINGLES = ("first", "second")


def interactions(blocks: Iterable[pl.DataFrame], value: str, base: float, settings: StatsSettings) -> pl.DataFrame:
    """Test each pair for an effect beyond the sum of its genes' own.

    Parameters
    ----------
    blocks
        Whole cells: `ensembl_id` (of a pair, both joined by "+"), `cell_id`, `donor_id` and the value.
    value
        Column to test.
    base
        The value without an effect: 0 for shifts, 1 for similarities.

    Returns
    -------
    One row a pair: `ensembl_id`, `n_cells`, `n_donors`; over cells the means `first`, `second`, `pair` and `sum` =
    first + second - base; `interaction` = pair - sum (over donors, where these are tested) with its interval `ci_low`,
    `ci_high`; `p_value` (t-test over donors or cells, see `test`) and `fdr`.
    """
    parts = []
    for block in blocks:
        rows = block.select(KEYS.gene, KEYS.cell, KEYS.donor, pl.col(value).cast(pl.Float64).alias("pair"))
        single = ~pl.col(KEYS.gene).str.contains("+", literal=True)
        alone = rows.filter(single).select(KEYS.cell, pl.col(KEYS.gene).alias("gene"), pl.col("pair").alias("x"))
        both = rows.filter(~single).with_columns(
            pl.col(KEYS.gene).str.split_exact("+", 1).struct.rename_fields(["gene_1", "gene_2"]).alias("genes")
        ).unnest("genes")  # fmt: skip
        for name, gene in zip(_SINGLES, ("gene_1", "gene_2"), strict=True):
            named = alone.rename({"gene": gene, "x": name})
            both = both.join(named, on=[KEYS.cell, gene], how="inner", validate="m:1", maintain_order="left")
        parts.append(both.drop("gene_1", "gene_2"))
    cells = pl.concat(parts).with_columns((pl.col("first") + pl.col("second") - base).alias("sum"))
    cells = cells.with_columns((pl.col("pair") - pl.col("sum")).alias("interaction"))
    over_donors = cells[KEYS.donor].drop_nulls().n_unique() >= settings.min_donors
    units = cells.select(KEYS.gene, "interaction")
    if over_donors:
        donors = cells.drop_nulls(KEYS.donor).group_by(KEYS.gene, KEYS.donor)
        units = donors.agg(pl.col("interaction").mean()).drop(KEYS.donor)
    x = pl.col("interaction")
    tested = units.group_by(KEYS.gene).agg(pl.len().alias("n"), x.mean(), x.std().alias("sd"))
    about = cells.group_by(KEYS.gene).agg(
        pl.col(KEYS.cell).n_unique().alias("n_cells"),
        pl.col(KEYS.donor).drop_nulls().n_unique().alias("n_donors"),
        pl.col("first", "second", "pair", "sum").mean(),
    )
    table = about.join(tested, on=KEYS.gene, how="left", validate="1:1").sort(KEYS.gene)
    n, mean = table["n"].fill_null(0).to_numpy(), table["interaction"].fill_null(np.nan).to_numpy()
    df = np.maximum(n - 1.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = table["sd"].fill_null(np.nan).to_numpy() / np.sqrt(n)
        p_value = 2 * scipy.stats.t.sf(np.abs(mean / error), df)
    enough = (table["n_cells"].to_numpy() >= settings.min_cells) & (n >= (settings.min_donors if over_donors else 2))
    p_value = np.where(enough, p_value, np.nan)
    half = scipy.stats.t.ppf((1 + settings.confidence) / 2, df) * error
    tests = np.where(enough, OVER_DONORS_PAIRS if over_donors else OVER_CELLS_PAIRS, TOO_FEW_CELLS)
    return table.drop("n", "sd").with_columns(
        column("ci_low", mean - half), column("ci_high", mean + half), column("p_value", p_value),
        column("fdr", benjamini_hochberg(p_value)), pl.Series("test", tests.tolist(), pl.String),
    )  # fmt: skip
