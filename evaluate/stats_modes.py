"""Two of the published modes, one scan against another and a mixture of impact and none; and comparing two scans.

The names are the published ones (Theodoris et al., Nature 618, 616-624, 2023; Ito et al., PLOS Genetics 21(3):
e1011420, 2025). Where these pool cells as if they were independent, donors are compared here if there are enough.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
import scipy.stats
from sklearn.mixture import GaussianMixture

from evaluate.stats import KEYS, TOO_FEW_CELLS, benjamini_hochberg, column
from evaluate.stats_settings import StatsSettings

OVER_DONORS_VS = "donors, Welch's t-test"
OVER_CELLS_VS = "cells pooled (too few donors), rank-sum test"
ONE_COMPONENT = "one component fits as well"
_MIN_GENES = 10


@dataclass(frozen=True)
class Paired:
    """Two scans side by side.

    Parameters
    ----------
    genes
        One row per gene of both: `ensembl_id`; of the first scan `n_cells`, `n_donors` and the lists `cell_values` and
        `donor_means`; of the second the same with `_null`.
    num_donors
        Donors of either scan.
    """

    genes: pl.DataFrame
    num_donors: tuple[int, int]


def pair_scans(test: Iterable[pl.DataFrame], null: Iterable[pl.DataFrame], value: str) -> Paired:
    """Collect the values of each gene; memory holds one number a row of either scan.

    Parameters
    ----------
    test, null
        Blocks of whole cells: `ensembl_id`, `cell_id`, `donor_id` and the value, one row a cell and gene.
    """
    (first, num_donors), (second, num_donors_null) = (_collect(blocks, value) for blocks in (test, null))
    second = second.rename({name: f"{name}_null" for name in second.columns if name != KEYS.gene})
    genes = first.join(second, on=KEYS.gene, how="inner", validate="1:1").sort(KEYS.gene)
    return Paired(genes, (num_donors, num_donors_null))


def versus_null(paired: Paired, settings: StatsSettings) -> pl.DataFrame:
    """Compare the shifts of each gene in one scan with those in another (other start cells, other perturbation).

    Returns
    -------
    One row a gene: `n_cells`, `n_cells_null`, `n_donors`, `n_donors_null`, `mean`, `mean_null`, `difference`, two-sided
    `p_value`, `fdr`, `test`.
    """
    genes = paired.genes
    over_donors = min(paired.num_donors) >= settings.min_donors
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


def _collect(blocks: Iterable[pl.DataFrame], value: str) -> tuple[pl.DataFrame, int]:
    of_cells, of_donors = [], []
    for block in blocks:
        frame = block.with_columns(pl.col(value).cast(pl.Float64).alias("x"))
        of_cells.append(
            frame.group_by(KEYS.gene).agg(
                pl.col(KEYS.cell).n_unique().alias("n_cells"), pl.col("x").alias("cell_values")
            )
        )
        donors = frame.drop_nulls(KEYS.donor).group_by(KEYS.gene, KEYS.donor)
        of_donors.append(donors.agg(pl.len().alias("n"), pl.col("x").sum()))
    per_donor = pl.concat(of_donors).group_by(KEYS.gene, KEYS.donor).agg(pl.col("x").sum() / pl.col("n").sum())
    means = per_donor.sort(KEYS.gene, KEYS.donor).group_by(KEYS.gene)
    genes = (
        pl.concat(of_cells)
        .group_by(KEYS.gene, maintain_order=True)
        .agg(pl.col("n_cells").sum(), pl.col("cell_values").explode())
        .join(means.agg(pl.len().alias("n_donors"), pl.col("x").alias("donor_means")), on=KEYS.gene, how="left")
        .with_columns(pl.col("n_donors").fill_null(0), pl.col("donor_means").fill_null(pl.lit([], pl.List(pl.Float64))))
        .select(KEYS.gene, "n_cells", "n_donors", "cell_values", "donor_means")
    )
    return genes, per_donor[KEYS.donor].n_unique()


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 and b.std() == 0:
        return 1.0 if a.mean() == b.mean() else 0.0
    return float(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue)


@dataclass(frozen=True)
class Components:
    """Two normals of the mean similarity, in units of `spread` from `centre`; the impact is that of lower mean."""

    fit: GaussianMixture
    centre: float
    spread: float

    @property
    def impact(self) -> int:
        """Number of the impact component, whichever the fit gave it."""
        return int(np.argmin(self.fit.means_[:, 0]))

    def probability(self, similarity: np.ndarray) -> np.ndarray:
        """float64: probability of belonging to the impact component."""
        scaled = (np.asarray(similarity, dtype=np.float64)[:, None] - self.centre) / self.spread
        found: np.ndarray = self.fit.predict_proba(scaled)[:, self.impact]
        return found

    def is_impact(self, similarity: np.ndarray) -> np.ndarray:
        """bool: below the impact component's mean, or below the other's and more probably impact than not."""
        scaled = (np.asarray(similarity, dtype=np.float64) - self.centre) / self.spread
        low, high = np.sort(self.fit.means_[:, 0])
        return (scaled < low) | ((scaled <= high) & (self.probability(similarity) >= 0.5))

    def call(self, similarity: np.ndarray) -> list[str]:
        """Name each similarity, see `mixture`."""
        scaled = (similarity - self.centre) / self.spread
        low, high = np.sort(self.fit.means_[:, 0])
        names = np.where(self.is_impact(similarity), "impact", "none")
        between = (scaled >= low) & (scaled <= high)
        return [f"predicted {name}" if open_ else str(name) for name, open_ in zip(names, between, strict=True)]


def fit_components(similarity: np.ndarray) -> Components | None:
    """Fit two normals to mean similarities; None if they are all equal or one normal fits no worse (by BIC)."""
    if np.ptp(similarity) == 0:
        return None
    # Similarities lie close to 1; in units of their spread the fit does not run into its smallest variance.
    centre, spread = float(similarity.mean()), float(similarity.std())
    scaled = (similarity[:, None] - centre) / spread
    one, two = (GaussianMixture(k, n_init=5, random_state=0).fit(scaled) for k in (1, 2))
    return Components(two, centre, spread) if two.bic(scaled) < one.bic(scaled) else None


def mixture(
    genes: pl.DataFrame, blocks: Iterable[pl.DataFrame], settings: StatsSettings
) -> tuple[pl.DataFrame, Components | None]:
    """Tell genes with an impact from those without, by a mixture of two normals of the mean similarity.

    Parameters
    ----------
    genes
        `ensembl_id`, `n_cells` and `mean_similarity`, one row a gene.
    blocks
        `ensembl_id` and `similarity`, one row a cell and gene; read only if there are two components.

    Returns
    -------
    genes
        With `impact_probability` (of belonging to the component of lower mean, the impact), `impact` ("impact" below
        that component's mean, "none" above the other's, else "predicted impact" or "predicted none" by the larger
        probability), `impact_share` (of the gene's cells, each judged in the same way) and `test`. Where one normal
        fits no worse (Bayesian information criterion), these are null and `test` says so. Lowest similarity first.
    components
        What was fitted.
    """
    genes = genes.sort("mean_similarity", KEYS.gene)
    enough = (genes["n_cells"] >= settings.min_cells).to_numpy()
    means = genes["mean_similarity"].to_numpy()
    probability = np.full(len(genes), np.nan)
    impact: list[str | None] = [None] * len(genes)
    tests = np.where(enough, "mixture of two normals", TOO_FEW_CELLS).astype(object)
    components = fit_components(means[enough]) if enough.sum() >= _MIN_GENES else None
    share = pl.DataFrame(schema={KEYS.gene: pl.String, "impact_share": pl.Float64})
    if components is not None:
        probability[enough] = components.probability(means[enough])
        for row, called in zip(np.flatnonzero(enough), components.call(means[enough]), strict=True):
            impact[row] = called
        share = impact_share(blocks, components)
    elif enough.any():
        tests[enough] = ONE_COMPONENT if enough.sum() >= _MIN_GENES else "none: too few genes"
    table = genes.with_columns(
        column("impact_probability", probability),
        pl.Series("impact", impact, pl.String),
        pl.Series("test", tests.tolist(), pl.String),
    )
    return table.join(share, on=KEYS.gene, how="left", validate="1:1", maintain_order="left"), components


def impact_share(blocks: Iterable[pl.DataFrame], components: Components) -> pl.DataFrame:
    """Share of each gene's cells whose similarity is called an impact: `ensembl_id`, `impact_share`."""
    parts = []
    for block in blocks:
        called = pl.Series("called", components.is_impact(block["similarity"].to_numpy()))
        counts = block.select(KEYS.gene).with_columns(called).group_by(KEYS.gene)
        parts.append(counts.agg(pl.len().alias("n"), pl.col("called").sum()))
    return pl.concat(parts).group_by(KEYS.gene).agg((pl.col("called").sum() / pl.col("n").sum()).alias("impact_share"))


def compare_scans(first: pl.DataFrame, second: pl.DataFrame) -> tuple[dict[str, float | int | list[str]], pl.DataFrame]:
    """Agreement of two tables of genes for one state, for example of two models.

    Parameters
    ----------
    first, second
        `symbol`, `ensembl_id`, `mean`, `significant`, as `genes_table` gives them.

    Returns
    -------
    summary
        Genes in common, Spearman's rho of their means, overlap of the 100 largest means; `sign_flips`, the symbols of
        opposite sign, and `sign_flips_significant`, those of them that are significant in either scan.
    genes
        `ensembl_id, symbol, mean, mean_other, significant, significant_other, sign_flip`; nothing is averaged.
    """
    other = second.select(
        KEYS.gene, pl.col("mean").alias("mean_other"), pl.col("significant").alias("significant_other")
    )
    both = first.select(KEYS.gene, "symbol", "mean", "significant").join(
        other, on=KEYS.gene, how="inner", validate="1:1"
    )
    both = both.drop_nulls(["mean", "mean_other"]).sort(KEYS.gene)
    both = both.select(
        KEYS.gene, "symbol", "mean", "mean_other", "significant", "significant_other",
        (pl.col("mean").sign() * pl.col("mean_other").sign() < 0).alias("sign_flip"),
    )  # fmt: skip
    top = [set(both.top_k(min(100, len(both)), by=name)[KEYS.gene]) for name in ("mean", "mean_other")]
    flips = both.filter("sign_flip")
    varies = len(both) > 2 and both["mean"].n_unique() > 1 and both["mean_other"].n_unique() > 1
    rho = scipy.stats.spearmanr(both["mean"], both["mean_other"]).statistic if varies else float("nan")
    summary: dict[str, float | int | list[str]] = {
        "genes": len(both),
        "spearman": float(rho),
        "top_100_overlap": len(top[0] & top[1]),
        "sign_flips": flips["symbol"].to_list(),
        "sign_flips_significant": flips.filter(pl.col("significant") | pl.col("significant_other"))["symbol"].to_list(),
    }
    return summary, both
