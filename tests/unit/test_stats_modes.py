"""The published statistics modes besides the goal-state shift, and the comparison of two scans."""

import numpy as np
import polars as pl
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture

from evaluate.stats import TOO_FEW_CELLS
from evaluate.stats_modes import (
    ONE_COMPONENT,
    OVER_CELLS_VS,
    OVER_DONORS_VS,
    compare_scans,
    mixture,
    pair_scans,
    versus_null,
)
from evaluate.stats_settings import StatsSettings

SETTINGS = StatsSettings(min_cells=5)


def scan(rng, donors, means, num_cells=60, donor_sd=0.0):
    """Every gene in every cell; `donor_sd` is shared by the cells of a donor."""
    cell, gene = np.divmod(np.arange(num_cells * len(means)), len(means))
    shared = rng.normal(size=(donors, len(means)))[cell % donors, gene] * donor_sd
    return pl.DataFrame(
        {
            "ensembl_id": [f"g{number:03d}" for number in gene],
            "cell_id": [f"c{number}" for number in cell],
            "donor_id": [f"d{number % donors}" for number in cell],
            "x": np.asarray(means)[gene] + shared + 0.1 * rng.normal(size=len(cell)),
        }
    )


def compare(test, null):
    """In two blocks each: a block holds whole cells."""
    blocks = [[frame[: len(frame) // 2], frame[len(frame) // 2 :]] for frame in (test, null)]
    return versus_null(pair_scans(*blocks, "x"), SETTINGS)


@pytest.mark.parametrize(("donors", "named"), [(1, OVER_CELLS_VS), (4, OVER_DONORS_VS)])
def test_versus_null_is_calibrated_and_finds_differences(donors, named):
    rng = np.random.default_rng(donors)
    effects = np.zeros(400)
    effects[:3] = 1.0
    spread = 0.1 * (donors > 1)
    scans = (scan(rng, donors, means, donor_sd=spread) for means in (effects, np.zeros(400)))
    result = compare(*scans)
    assert set(result["test"]) == {named}
    assert set(result.filter(pl.col("fdr") < 0.05)["ensembl_id"]) >= {"g000", "g001", "g002"}
    low, high = scipy.stats.binom.interval(0.99, 397, 0.05)
    assert low <= (result["p_value"][3:] < 0.05).sum() <= high
    assert result["difference"][1] == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("permutations", [60, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("donors", [1, 8])
def test_versus_null_is_uniform_under_label_permutations(donors, permutations):
    """Which scan a donor (without donors, a cell) belongs to is drawn anew each time."""
    rng = np.random.default_rng(donors)
    frame = scan(rng, donors, [0.1, 0.3], num_cells=64, donor_sd=0.2 * (donors > 1))
    key = "donor_id" if donors > 1 else "cell_id"
    units = frame[key].unique(maintain_order=True).to_list()
    hits = 0
    for _ in range(permutations):
        chosen = pl.col(key).is_in(rng.permutation(units)[: len(units) // 2].tolist())
        hits += compare(frame.filter(chosen), frame.filter(~chosen))["p_value"][0] < 0.05
    low, high = scipy.stats.binom.interval(0.99, permutations, 0.05)
    # Eight donors make 35 pairs of groups: Welch's test may be conservative on so few.
    assert (0 if donors > 1 else low) <= hits <= high


def test_versus_null_numbers_equal_scipy():
    rng = np.random.default_rng(0)
    test, null = scan(rng, 3, [0.2, 0.0]), scan(rng, 5, [0.0, 0.0], num_cells=40)
    result = compare(test, null)
    a, b = (
        frame.filter(pl.col("ensembl_id") == "g000").group_by("donor_id").agg(pl.col("x").mean())["x"]
        for frame in (test, null)
    )
    assert result["p_value"][0] == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert result.row(0)[1:5] == (60, 40, 3, 5)
    few = compare(test, null[:4])
    assert set(few["test"]) == {TOO_FEW_CELLS}


def similarities(groups, seed=0, cell_sd=0.0):
    rng = np.random.default_rng(seed)
    means = np.concatenate([rng.normal(mean, sd, size) for mean, sd, size in groups])
    gene = np.repeat(np.arange(len(means)), 6)
    return pl.DataFrame(
        {
            "ensembl_id": [f"g{number:04d}" for number in gene],
            "cell_id": [f"c{number}" for number in np.tile(np.arange(6), len(means))],
            "similarity": means[gene] + cell_sd * rng.normal(size=len(gene)),
        }
    )


def mixture_of(frame):
    genes = frame.group_by("ensembl_id").agg(
        pl.len().alias("n_cells"), pl.col("similarity").mean().alias("mean_similarity")
    )
    return mixture(genes, [frame[:50], frame[50:]], SETTINGS)[0]


@pytest.mark.parametrize("reverse", [False, True])
def test_mixture_calls_the_component_of_lower_similarity_the_impact(reverse):
    groups = [(0.9, 0.01, 30), (0.999, 0.0005, 300)]
    result = mixture_of(similarities(groups[::-1] if reverse else groups))
    impact = result.filter(pl.col("impact_probability") > 0.5)
    assert len(impact) == 30
    assert impact["mean_similarity"].max() < 0.95
    assert set(impact["impact"]) == {"impact", "predicted impact"}
    assert set(result.filter(pl.col("impact_probability") <= 0.5)["impact"]) == {"none", "predicted none"}


def test_mixture_of_one_mode_says_so():
    result = mixture_of(similarities([(0.99, 0.001, 300)]))
    assert set(result["test"]) == {ONE_COMPONENT}
    assert result["impact"].null_count() == 300


def test_share_of_cells_with_impact_is_counted_cell_by_cell():
    frame = similarities([(0.9, 0.01, 30), (0.999, 0.0005, 300)], cell_sd=0.03)
    result = mixture_of(frame)
    means = frame.group_by("ensembl_id", maintain_order=True).agg(pl.col("similarity").mean())["similarity"].to_numpy()
    scaled = (means - means.mean()) / means.std()
    fit = GaussianMixture(2, n_init=5, random_state=0).fit(scaled[:, None])
    impact = int(np.argmin(fit.means_[:, 0]))

    def is_impact(similarity):
        x = (similarity - means.mean()) / means.std()
        if x < fit.means_[impact, 0]:
            return True
        return x <= fit.means_[1 - impact, 0] and fit.predict([[x]])[0] == impact

    shares = result["impact_share"].to_numpy()
    assert ((shares > 0) & (shares < 1)).sum() > 20
    for row in result[::20].iter_rows(named=True):
        own = frame.filter(pl.col("ensembl_id") == row["ensembl_id"])["similarity"]
        assert row["impact_share"] == pytest.approx(np.mean([is_impact(x) for x in own]))


def test_comparison_counts_flips():
    first = pl.DataFrame(
        {
            "ensembl_id": ["a", "b", "c", "d", "e"],
            "symbol": ["A", "B", "C", "D", "E"],
            "mean": [1.0, 2, 3, -4, 0.5],
            "significant": [True, False, True, False, False],
        }
    )
    second = first.with_columns(mean=pl.Series([1.0, 2, -3, -4, -0.5]), significant=pl.lit(False))[::-1]
    found, table = compare_scans(first, second)
    assert found["sign_flips"] == ["C", "E"]
    assert found["sign_flips_significant"] == ["C"]
    assert found["genes"] == found["top_100_overlap"] == 5
    expected = scipy.stats.spearmanr([1, 2, 3, -4, 0.5], [1, 2, -3, -4, -0.5]).statistic
    assert found["spearman"] == pytest.approx(expected)
    assert table["mean_other"].to_list() == [1.0, 2, -3, -4, -0.5]
    assert table["significant"].to_list() == first["significant"].to_list()
