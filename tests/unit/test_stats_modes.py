"""The published statistics modes besides the goal-state shift, and the comparison of two scans."""

import numpy as np
import polars as pl
import pytest
import scipy.stats

from evaluate.perturb_settings import StatsSettings
from evaluate.stats import TOO_FEW_CELLS
from evaluate.stats_modes import ONE_COMPONENT, OVER_CELLS_VS, OVER_DONORS_VS, compare_scans, mixture, versus_null

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


@pytest.mark.parametrize(("donors", "named"), [(1, OVER_CELLS_VS), (4, OVER_DONORS_VS)])
def test_versus_null_is_calibrated_and_finds_differences(donors, named):
    rng = np.random.default_rng(donors)
    effects = np.zeros(400)
    effects[:3] = 1.0
    spread = 0.1 * (donors > 1)
    result = versus_null(
        scan(rng, donors, effects, donor_sd=spread), scan(rng, donors, np.zeros(400), donor_sd=spread), "x", SETTINGS
    )
    assert set(result["test"]) == {named}
    assert set(result.filter(pl.col("fdr") < 0.05)["ensembl_id"]) >= {"g000", "g001", "g002"}
    low, high = scipy.stats.binom.interval(0.99, 397, 0.05)
    assert low <= (result["p_value"][3:] < 0.05).sum() <= high
    assert result["difference"][1] == pytest.approx(1, abs=0.3)


def test_versus_null_numbers_equal_scipy():
    rng = np.random.default_rng(0)
    test, null = scan(rng, 3, [0.2, 0.0]), scan(rng, 5, [0.0, 0.0], num_cells=40)
    result = versus_null(test, null, "x", SETTINGS)
    a, b = (
        frame.filter(pl.col("ensembl_id") == "g000").group_by("donor_id").agg(pl.col("x").mean())["x"]
        for frame in (test, null)
    )
    assert result["p_value"][0] == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue)
    assert result.row(0)[1:5] == (60, 40, 3, 5)
    few = versus_null(test, null[:4], "x", SETTINGS)
    assert set(few["test"]) == {TOO_FEW_CELLS}


def similarities(groups, seed=0):
    rng = np.random.default_rng(seed)
    means = np.concatenate([rng.normal(mean, sd, size) for mean, sd, size in groups])
    gene = np.repeat(np.arange(len(means)), 6)
    return pl.DataFrame(
        {
            "ensembl_id": [f"g{number:04d}" for number in gene],
            "cell_id": [f"c{number}" for number in np.tile(np.arange(6), len(means))],
            "similarity": means[gene],
        }
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_mixture_calls_the_component_of_lower_similarity_the_impact(reverse):
    groups = [(0.9, 0.01, 30), (0.999, 0.0005, 300)]
    result = mixture(similarities(groups[::-1] if reverse else groups), SETTINGS)
    impact = result.filter(pl.col("impact_probability") > 0.5)
    assert len(impact) == 30
    assert impact["mean_similarity"].max() < 0.95
    assert set(impact["impact"]) == {"impact", "predicted impact"}
    assert set(result.filter(pl.col("impact_probability") <= 0.5)["impact"]) == {"none", "predicted none"}


def test_mixture_of_one_mode_says_so():
    result = mixture(similarities([(0.99, 0.001, 300)]), SETTINGS)
    assert set(result["test"]) == {ONE_COMPONENT}
    assert result["impact"].null_count() == 300


def test_comparison_counts_flips():
    first = pl.DataFrame({"ensembl_id": ["a", "b", "c", "d"], "symbol": ["A", "B", "C", "D"], "mean": [1.0, 2, 3, -4]})
    second = first.with_columns(mean=pl.Series([1.0, 2, -3, -4]))[:4]
    found = compare_scans(first, second)
    assert found["sign_flips"] == ["C"]
    assert found["genes"] == 4
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr([1, 2, 3, -4], [1, 2, -3, -4]).statistic)
