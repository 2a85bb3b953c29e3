"""What the published programs would report of a scan: their columns, their tests, their order of rows.

Facts from the description of Geneformer's statistics (Theodoris et al., Nature 618, 616-624, 2023, and its programs'
documentation). Cells count as replicates and the pool holds the tested gene, so these p-values are far too small; they
are here for comparison with older results. What cannot be reproduced is the draw of the pool, where a scan has more
shifts than it holds: it is by `seed`, with NumPy's generator.
"""

from collections.abc import Callable, Iterable

import numpy as np
import polars as pl
import scipy.stats
from sklearn.mixture import GaussianMixture

from corpus.errors import UserError
from evaluate.stats import KEYS, benjamini_hochberg, column
from evaluate.stats_aggregate import AFFECTED
from evaluate.stats_modes import Components, Paired, impact_share
from evaluate.stats_settings import StatsSettings

Blocks = Callable[[], Iterable[pl.DataFrame]]

# The published column Gene is a token, which a scan does not hold.
_NAMES = (
    pl.col(KEYS.gene).alias("Gene"),
    pl.col("symbol").alias("Gene_name"),
    pl.col(KEYS.gene).alias("Ensembl_ID"),
)


def draw_pool(blocks: Iterable[pl.DataFrame], value: str, num_rows: int, size: int | None, seed: int) -> np.ndarray:
    """Draw values of a scan without replacement, in one pass; float64, sorted.

    Parameters
    ----------
    num_rows
        Of all blocks together.
    size
        Values to draw; None for all.
    """
    if size is None or size >= num_rows:
        chosen = None
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(num_rows, size, replace=False))
    parts, start = [], 0
    for block in blocks:
        x = block[value].to_numpy().astype(np.float64)
        if chosen is not None:
            first, last = np.searchsorted(chosen, [start, start + len(x)])
            x, start = x[chosen[first:last] - start], start + len(x)
        parts.append(x)
    return np.sort(np.concatenate(parts))


def rank_sum_against_pool(blocks: Iterable[pl.DataFrame], value: str, pool: np.ndarray) -> pl.DataFrame:
    """Compare each gene's values with a pool by the Wilcoxon rank-sum test, in one pass.

    As `scipy.stats.ranksums`: normal approximation, average ranks for ties, no correction of the variance for them.

    Parameters
    ----------
    pool
        float64, sorted.

    Returns
    -------
    `ensembl_id`, `mean`, `n_cells`, `n` and `p_value`, by gene.
    """
    parts = []
    for block in blocks:
        x = block[value].to_numpy().astype(np.float64)
        below = (np.searchsorted(pool, x, side="left") + np.searchsorted(pool, x, side="right")) / 2
        rows = block.select(KEYS.gene, KEYS.cell).with_columns(pl.Series("x", x), pl.Series("below", below))
        parts.append(
            rows.group_by(KEYS.gene).agg(
                pl.len().cast(pl.Int64).alias("n"),
                pl.col(KEYS.cell).n_unique().alias("n_cells"),
                pl.col("x", "below").sum(),
            )
        )
    genes = pl.concat(parts).group_by(KEYS.gene).agg(pl.all().sum()).sort(KEYS.gene)
    n, m = genes["n"].to_numpy().astype(np.float64), float(len(pool))
    # The ranks of a sample in the union: those among itself add up to n (n + 1) / 2, whatever the ties.
    rank_sum = genes["below"].to_numpy() + n * (n + 1) / 2
    z = (rank_sum - n * (n + m + 1) / 2) / np.sqrt(n * m * (n + m + 1) / 12)
    return genes.select(
        KEYS.gene, (pl.col("x") / pl.col("n")).alias("mean"), "n_cells", "n",
        column("p_value", 2 * scipy.stats.norm.sf(np.abs(z))),
    )  # fmt: skip


def goal_state_shift(
    blocks: Blocks, about: pl.DataFrame, goal: str, alternate: str | None, settings: StatsSettings
) -> pl.DataFrame:
    """Table of the mode goal_state_shift.

    Parameters
    ----------
    blocks
        Gives the rows of the scan anew each time: `KEYS` and the shift columns.
    about
        `ensembl_id`, `symbol` and `n_rows` of every gene.
    goal, alternate
        Columns of the shifts to the goal state and to the first alternate one, if there is any.
    """
    num_rows = int(about["n_rows"].sum())
    table = about.select(*_NAMES)
    for name, value in (("goal", goal), ("alt", alternate)):
        if value is None:
            continue
        pool = draw_pool(blocks(), value, num_rows, settings.pool_size, settings.seed)
        tested = rank_sum_against_pool(blocks(), value, pool)
        found = tested.select(
            pl.col(KEYS.gene).alias("Ensembl_ID"),
            pl.col("mean").alias(f"Shift_to_{name}_end"),
            pl.col("p_value").alias(f"{name.title()}_end_vs_random_pval"),
            column(f"{name.title()}_end_FDR", benjamini_hochberg(tested["p_value"].to_numpy())),
            *([pl.col("n_cells").alias("N_Detections")] if name == "goal" else []),
        )
        table = table.join(found, on="Ensembl_ID", how="inner", validate="1:1")
    table = table.with_columns(_significant("Goal_end_FDR", settings))
    wanted = ["Gene", "Gene_name", "Ensembl_ID", "Shift_to_goal_end", "Shift_to_alt_end", "Goal_end_vs_random_pval",
              "Alt_end_vs_random_pval", "Goal_end_FDR", "Alt_end_FDR", "N_Detections", "Sig"]  # fmt: skip
    table = table.select(name for name in wanted if name in table.columns)
    order = ["Sig", "Shift_to_goal_end", "Goal_end_FDR", "Ensembl_ID"]
    return table.sort(order, descending=[True, True, False, False])


def versus_null(about: pl.DataFrame, paired: Paired, settings: StatsSettings) -> pl.DataFrame:
    """Table of the mode vs_null: rank-sum tests over cells, whatever donors there are.

    Parameters
    ----------
    about
        `ensembl_id`, `symbol`.
    """
    rows = []
    for row in paired.genes.iter_rows(named=True):
        test, null = np.array(row["cell_values"]), np.array(row["cell_values_null"])
        p_value = float(scipy.stats.ranksums(test, null).pvalue)
        means = float(test.mean()), float(null.mean())
        rows.append((row[KEYS.gene], *means, means[0] - means[1], p_value, len(test), len(null)))
    names = ["Ensembl_ID", "Test_avg_shift", "Null_avg_shift", "Test_vs_null_avg_shift", "Test_vs_null_pval",
             "N_Detections_test", "N_Detections_null"]  # fmt: skip
    table = pl.DataFrame(rows, schema=names, orient="row")
    rates = column("Test_vs_null_FDR", benjamini_hochberg(table["Test_vs_null_pval"].to_numpy()))
    table = table.with_columns(rates).with_columns(_significant("Test_vs_null_FDR", settings))
    table = about.select(*_NAMES).join(table, on="Ensembl_ID", how="inner", validate="1:1")
    table = table.select("Gene", "Gene_name", *names[:5], "Test_vs_null_FDR", *names[5:], "Sig")
    order = ["Sig", "Test_vs_null_avg_shift", "Test_vs_null_FDR", "Ensembl_ID"]
    return table.sort(order, descending=[True, True, False, False])


def mixture_model(about: pl.DataFrame, blocks: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Table of the mode mixture_model: two components are always fitted, to all genes, in the units of the similarity.

    The impact component is that of lower mean, where the original took the first one.

    Parameters
    ----------
    about
        `ensembl_id`, `symbol`, `mean_similarity`, `n_rows`.
    blocks
        `ensembl_id`, `similarity`.
    """
    means = about["mean_similarity"].to_numpy()
    if len(means) < 2:
        raise UserError("compat: a mixture of two components needs two genes or more")
    components = Components(GaussianMixture(n_components=2, random_state=0).fit(means[:, None]), 0.0, 1.0)
    called = pl.Series("Impact_component", components.is_impact(means).astype(np.int8))
    table = about.join(
        impact_share(blocks, components), on=KEYS.gene, how="left", validate="1:1", maintain_order="left"
    )
    table = table.select(
        *_NAMES,
        pl.col("mean_similarity").alias("Test_avg_shift"),
        called,
        (100 * pl.col("impact_share")).alias("Impact_component_percent"),
        pl.col("n_rows").alias("N_Detections"),
    )
    return table.sort(["Impact_component", "Test_avg_shift", "Ensembl_ID"], descending=[True, False, False])


def aggregate_data(cells: pl.DataFrame, value: str) -> pl.DataFrame:
    """Table of the mode aggregate_data: the shifts of the cells, one below the other."""
    return cells.select(pl.col(value).cast(pl.Float64).alias("Cosine_shift"))


def aggregate_gene_shifts(effects: pl.DataFrame, about: pl.DataFrame, symbols: dict[str, str]) -> pl.DataFrame:
    """Table of the mode aggregate_gene_shifts: cells first, then genes, the most affected first.

    Parameters
    ----------
    effects
        As `evaluate.stats_aggregate.aggregate_effects` gives it.
    about
        `ensembl_id`, `symbol`, `mean_similarity`, `sd_similarity`, `n_rows` of the perturbed genes, for the rows of
        the cells' own embedding ("cell_emb").
    symbols
        Of affected genes.
    """
    names = [pl.col(KEYS.gene).alias("Perturbed"), pl.col("symbol").alias("Gene_name"),
             pl.col(KEYS.gene).alias("Ensembl_ID")]  # fmt: skip
    affected = pl.col(AFFECTED)
    of_genes = effects.join(about.select(KEYS.gene, "symbol"), on=KEYS.gene, how="left", validate="m:1").select(
        *names, affected.alias("Affected"), affected.replace_strict(symbols, default=None).alias("Affected_gene_name"),
        affected.alias("Affected_Ensembl_ID"), pl.col("mean_similarity").alias("Cosine_sim_mean"),
        pl.col("sd").alias("Cosine_sim_stdev"), pl.col("n_cells").cast(pl.Int64).alias("N_Detections"),
    )  # fmt: skip
    nothing = pl.lit(None, pl.String)
    of_cells = about.select(
        *names, pl.lit("cell_emb").alias("Affected"), nothing.alias("Affected_gene_name"),
        nothing.alias("Affected_Ensembl_ID"), pl.col("mean_similarity").alias("Cosine_sim_mean"),
        pl.col("sd_similarity").alias("Cosine_sim_stdev"), pl.col("n_rows").alias("N_Detections"),
    )  # fmt: skip
    order = ["Cosine_sim_mean", "Ensembl_ID", "Affected"]
    return pl.concat([of_cells.sort(order), of_genes.sort(order)])


def _significant(rate: str, settings: StatsSettings) -> pl.Expr:
    return (pl.col(rate) < settings.fdr).fill_null(False).cast(pl.Int8).alias("Sig")
