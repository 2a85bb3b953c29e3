"""Statistics modes besides the shift towards a state: one scan against another, and a mixture of impact and none.

The names are the published ones (Theodoris et al., Nature 618, 616-624, 2023; Ito et al., PLOS Genetics 21(3):
e1011420, 2025). Where these pool cells as if they were independent, donors are compared here if there are enough.
"""

import numpy as np
import polars as pl
import scipy.stats
from sklearn.mixture import GaussianMixture

from evaluate.perturb_settings import StatsSettings
from evaluate.stats import KEYS, TOO_FEW_CELLS, benjamini_hochberg, column

OVER_DONORS_VS = "donors, Welch's t-test"
OVER_CELLS_VS = "cells pooled (too few donors), rank-sum test"
ONE_COMPONENT = "one component fits as well"


def versus_null(test: pl.DataFrame, null: pl.DataFrame, value: str, settings: StatsSettings) -> pl.DataFrame:
    """Compare the shifts of each gene in one scan with those in another (other start cells, other perturbation).

    Parameters
    ----------
    test, null
        `ensembl_id`, `cell_id`, `donor_id` and the value, one row a cell and gene.

    Returns
    -------
    One row per gene of both scans: `n_cells`, `n_cells_null`, `n_donors`, `n_donors_null`, `mean`, `mean_null`,
    `difference`, two-sided `p_value`, `fdr`, `test`.
    """
    sides = [_side(frame, value, suffix) for frame, suffix in ((test, ""), (null, "_null"))]
    genes = sides[0].join(sides[1], on=KEYS.gene, how="inner", validate="1:1").sort(KEYS.gene)
    over_donors = all(_num_donors(frame) >= settings.min_donors for frame in (test, null))
    used = "donor_means" if over_donors else "cell_values"
    p_values, means, few = [], [], []
    for row in genes.iter_rows(named=True):
        a, b = np.array(row[used]), np.array(row[used + "_null"])
        means.append((a.mean() if len(a) else np.nan, b.mean() if len(b) else np.nan))
        few.append(min(row["n_cells"], row["n_cells_null"]) < settings.min_cells)
        if few[-1] or (over_donors and min(len(a), len(b)) < settings.min_donors):
            p_values.append(np.nan)
        elif over_donors:
            p_values.append(_welch(a, b))
        else:
            p_values.append(float(scipy.stats.mannwhitneyu(a, b).pvalue))
    mean, mean_null = np.array(means, dtype=np.float64).reshape(-1, 2).T
    p_value = np.array(p_values, dtype=np.float64)
    named = OVER_DONORS_VS if over_donors else OVER_CELLS_VS
    tests = np.where(few, TOO_FEW_CELLS, np.where(np.isfinite(p_value), named, "none: gene in too few donors"))
    return genes.select(
        KEYS.gene, "n_cells", "n_cells_null", "n_donors", "n_donors_null",
        column("mean", mean), column("mean_null", mean_null), column("difference", mean - mean_null),
        column("p_value", p_value), column("fdr", benjamini_hochberg(p_value)), pl.Series("test", tests, pl.String),
    )  # fmt: skip


def _side(frame: pl.DataFrame, value: str, suffix: str) -> pl.DataFrame:
    of_donors = frame.drop_nulls(KEYS.donor).group_by(KEYS.gene, KEYS.donor).agg(pl.col(value).cast(pl.Float64).mean())
    of_donors = of_donors.sort(KEYS.gene, KEYS.donor).group_by(KEYS.gene).agg(pl.col(value).alias("donor_means"))
    of_cells = frame.group_by(KEYS.gene).agg(
        pl.col(KEYS.cell).n_unique().alias("n_cells"),
        pl.col(KEYS.donor).drop_nulls().n_unique().alias("n_donors"),
        pl.col(value).cast(pl.Float64).alias("cell_values"),
    )
    joined = of_cells.join(of_donors, on=KEYS.gene, how="left")
    joined = joined.with_columns(pl.col("donor_means").fill_null(pl.lit([], pl.List(pl.Float64))))
    return joined.rename({name: name + suffix for name in joined.columns if name != KEYS.gene})


def _num_donors(frame: pl.DataFrame) -> int:
    return frame[KEYS.donor].drop_nulls().n_unique()


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 and b.std() == 0:
        return 1.0 if a.mean() == b.mean() else 0.0
    return float(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue)


def mixture(frame: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    """Tell genes with an impact from those without, by a mixture of two normals of the mean similarity.

    The component of lower mean similarity is the impact, whichever number the fit gave it.

    Parameters
    ----------
    frame
        `ensembl_id`, `cell_id` and `similarity`, one row a cell and gene.

    Returns
    -------
    One row a gene: `n_cells`, `mean_similarity`, `impact_probability` (of belonging to the impact component), `impact`
    ("impact" below that component's mean, "none" above the other's, else "predicted impact" or "predicted none" by the
    larger probability) and `test`. Where one normal fits no worse (Bayesian information criterion), `impact` is null
    and `test` says so.
    """
    genes = frame.group_by(KEYS.gene).agg(
        pl.col(KEYS.cell).n_unique().alias("n_cells"), pl.col("similarity").mean().alias("mean_similarity")
    )
    genes = genes.sort("mean_similarity", KEYS.gene)
    enough = (genes["n_cells"] >= settings.min_cells).to_numpy()
    # Similarities lie close to 1; in units of their spread the fit does not run into its smallest variance.
    x = genes["mean_similarity"].to_numpy()[:, None]
    probability = np.full(len(genes), np.nan)
    impact: list[str | None] = [None] * len(genes)
    tests = np.where(enough, "mixture of two normals", TOO_FEW_CELLS).astype(object)
    if enough.sum() >= 10 and np.ptp(x[enough]) > 0:
        centre, spread = x[enough].mean(), x[enough].std()
        scaled = (x - centre) / spread
        fits = [GaussianMixture(k, n_init=5, random_state=0).fit(scaled[enough]) for k in (1, 2)]
        if fits[1].bic(scaled[enough]) < fits[0].bic(scaled[enough]):
            low = int(np.argmin(fits[1].means_[:, 0]))
            means = fits[1].means_[:, 0]
            probability[enough] = fits[1].predict_proba(scaled[enough])[:, low]
            for row in np.flatnonzero(enough):
                likely = "predicted impact" if probability[row] >= 0.5 else "predicted none"
                outside = scaled[row, 0] < means[low] or scaled[row, 0] > means[1 - low]
                impact[row] = likely.removeprefix("predicted ") if outside else likely
        else:
            tests[enough] = ONE_COMPONENT
    elif enough.any():
        tests[enough] = "none: too few genes"
    return genes.with_columns(
        column("impact_probability", probability),
        pl.Series("impact", impact, pl.String),
        pl.Series("test", tests.tolist(), pl.String),
    )


def compare_scans(first: pl.DataFrame, second: pl.DataFrame) -> dict[str, float | int | list[str]]:
    """Agreement of two tables of genes for one state, for example of two models.

    Parameters
    ----------
    first, second
        `symbol`, `ensembl_id`, `mean`, as `genes_table` gives them.

    Returns
    -------
    Genes in common, Spearman's rho of their means, overlap of the 100 largest, and the symbols whose sign differs.
    """
    both = first.select(KEYS.gene, "symbol", "mean").join(
        second.select(KEYS.gene, pl.col("mean").alias("other")), on=KEYS.gene, how="inner", validate="1:1"
    )
    both = both.drop_nulls().sort(KEYS.gene)
    top = [set(both.top_k(min(100, len(both)), by=name)[KEYS.gene]) for name in ("mean", "other")]
    flips = both.filter(pl.col("mean").sign() * pl.col("other").sign() < 0)
    rho = scipy.stats.spearmanr(both["mean"], both["other"]).statistic if len(both) > 2 else float("nan")
    return {
        "genes": len(both),
        "spearman": float(rho),
        "top_100_overlap": len(top[0] & top[1]),
        "sign_flips": flips["symbol"].to_list(),
    }
