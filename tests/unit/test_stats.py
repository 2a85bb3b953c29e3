"""Statistics of shifts: calibrated without effects, right with known ones, and equal to plain definitions."""

import numpy as np
import polars as pl
import pytest
import scipy.stats

from evaluate import stats
from evaluate.moderation import moderate
from evaluate.stats import add_null, gene_statistics
from evaluate.stats_settings import StatsSettings

SETTINGS = StatsSettings()


def simulate(
    rng,
    *,
    num_cells=60,
    num_genes=120,
    donors=1,
    detection=(0.4, 1.0),
    donor_sd=0.0,
    effects=None,
    dispersion=0.0,
):
    """Shifts of genes without effect: off zero, dependent on rank and cell, with heavy tails.

    `donor_sd` is the spread of a gene's mean between donors, which all cells of the donor share; `dispersion` makes
    that spread differ between genes; `effects` adds to chosen genes.
    """
    present = rng.random((num_cells, num_genes)) < np.linspace(*detection, num_genes)
    cell, gene = np.nonzero(present)
    drawn = pl.DataFrame({"c": cell, "r": rng.random(len(cell))})
    rank = drawn.select(pl.col("r").rank("ordinal").over("c").cast(pl.Int32) - 1)["r"].to_numpy()
    scale = np.exp(-rank / 40)
    donor = cell % donors
    spread = donor_sd * np.exp(dispersion * rng.normal(size=num_genes))
    shared = (rng.normal(size=(donors, num_genes)) * spread)[donor, gene]
    of_cell = rng.normal(size=num_cells)[cell] * 0.3
    value = 0.5 * scale + of_cell + shared + 0.2 * scale * rng.standard_t(4, len(cell))
    if effects is not None:
        value += effects[gene]
    return pl.DataFrame(
        {
            "ensembl_id": [f"g{number:04d}" for number in gene],
            "cell_id": [f"c{number}" for number in cell],
            "donor_id": [f"d{number}" for number in donor],
            "rank": rank,
            "x": value,
        }
    )


def binomial_interval(number, probability=0.05, level=0.99):
    return scipy.stats.binom.interval(level, number, probability)


@pytest.mark.parametrize("permutations", [40, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("donors", [1, 4])
def test_p_values_are_uniform_under_label_permutations(donors, permutations):
    """Gene labels are permuted within each cell; one gene a permutation, so that the draws are independent."""
    rng = np.random.default_rng(donors)
    frame = simulate(rng, donors=donors, effects=np.where(np.arange(120) % 10 == 0, 0.4, 0.0))
    hits = {"p_value": 0, "p_genes": 0}
    everything = []
    for trial in range(permutations):
        draw = pl.Series("draw", rng.random(len(frame)))
        dealt = frame.with_columns(draw).with_columns(pl.col("x").sort_by("draw").over("cell_id"))
        result = gene_statistics(dealt, "x", SETTINGS)
        for name in hits:
            hits[name] += result[name][trial % len(result)] < 0.05
        everything.append(result["p_value"].to_numpy())
    low, high = binomial_interval(permutations)
    for name, number in hits.items():
        assert low <= number <= high, name
    assert 0.03 < (np.concatenate(everything) < 0.05).mean() < 0.07
    # The far tail, which false discovery rates live on.
    assert (np.concatenate(everything) < 0.001).mean() < 0.003


def test_three_donors_of_correlated_cells_without_effect():
    """1,000 cells a donor that share their donor's deviation: tested over donors 5 %, over cells nearly everything."""
    rng = np.random.default_rng(0)
    frame = simulate(rng, num_cells=3000, num_genes=100, donors=3, donor_sd=0.05, dispersion=0.5)
    over_donors = gene_statistics(frame, "x", SETTINGS)
    assert set(over_donors["test"]) == {stats.OVER_DONORS}
    assert (over_donors["p_value"] < 0.05).sum() <= binomial_interval(100)[1]
    over_cells = gene_statistics(frame.with_columns(donor_id=pl.lit("one")), "x", SETTINGS)
    assert set(over_cells["test"]) == {stats.OVER_CELLS}
    assert (over_cells["p_value"] < 0.05).mean() > 0.5  # why donors are the unit of replication


@pytest.mark.parametrize("dispersion", [0.0, 0.7])
@pytest.mark.parametrize("donors", [3, 6])
def test_donor_p_values_are_uniform_without_effect(donors, dispersion):
    rng = np.random.default_rng(donors)
    p = np.concatenate(
        [
            gene_statistics(
                simulate(rng, num_cells=30 * donors, donors=donors, donor_sd=0.1, dispersion=dispersion), "x", SETTINGS
            )["p_value"].to_numpy()
            for _ in range(20)
        ]
    )
    assert 0.035 < (p < 0.05).mean() < 0.065
    assert (p < 0.001).mean() < 0.005


@pytest.mark.parametrize("donors", [1, 3])
def test_real_effects_are_found_with_their_sign(donors):
    effects = np.zeros(120)
    effects[[5, 50]], effects[[20, 110]] = 0.5, -0.5
    frame = simulate(
        np.random.default_rng(0), num_cells=90, donors=donors, donor_sd=0.05 * (donors > 1), effects=effects
    )
    result = gene_statistics(frame, "x", SETTINGS)
    found = result.filter(pl.col("fdr") < 0.05)
    excess = dict(found.select("ensembl_id", "excess").iter_rows())
    assert {"g0005", "g0020", "g0050", "g0110"} <= set(excess)
    assert len(excess) <= 8
    assert min(excess["g0005"], excess["g0050"]) > 0.3
    assert max(excess["g0020"], excess["g0110"]) < -0.3


def test_numbers_equal_their_definitions():
    frame = simulate(np.random.default_rng(1), num_cells=40, donors=2)
    result = gene_statistics(frame, "x", SETTINGS)
    for row in result[::17].iter_rows(named=True):
        own = frame.filter(pl.col("ensembl_id") == row["ensembl_id"])
        x = own["x"].to_numpy()
        assert row["n_cells"] == own["cell_id"].n_unique()
        assert row["n_donors"] == own["donor_id"].n_unique()
        assert row["mean"] == pytest.approx(x.mean())
        interval = scipy.stats.t.interval(0.95, len(x) - 1, x.mean(), scipy.stats.sem(x))
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(interval)
        assert row["excess"] == pytest.approx(row["mean"] - row["null_mean"])
    p = result["p_value"].to_numpy()
    order = np.argsort(p)
    by_hand = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    np.testing.assert_allclose(result["fdr"].to_numpy()[order], np.minimum(by_hand, 1))


def test_null_is_other_genes_of_the_same_cell_near_in_rank():
    frame = simulate(np.random.default_rng(2), num_cells=5, num_genes=400, detection=(0.9, 1.0))
    nulled = add_null(frame, "x").filter(pl.col("cell_id") == "c3").sort("rank")
    n = len(nulled)
    bins = 4
    rank_bin = np.arange(n) * bins // n
    detected = dict(frame["ensembl_id"].value_counts().iter_rows())
    values, genes = nulled["x"].to_numpy(), nulled["ensembl_id"].to_list()
    position = {gene: i for i, gene in enumerate(frame.filter(pl.col("cell_id") == "c3")["ensembl_id"])}
    for i in range(0, n, 23):
        mates = [j for j in range(n) if rank_bin[j] == rank_bin[i]]
        mates.sort(key=lambda j: (detected[genes[j]], position[genes[j]]))
        part = [mates.index(j) * bins // len(mates) for j in mates]
        others = [j for j, k in zip(mates, part, strict=True) if k == part[mates.index(i)] and j != i]
        assert nulled["null_size"][i] == len(others) >= 19
        assert nulled["null_mean"][i] == pytest.approx(values[others].mean())
        assert nulled["null_var"][i] == pytest.approx(values[others].var(ddof=1))
        below = (values[others] < values[i]).sum()
        assert nulled["place"][i] == pytest.approx((below + 0.5) / (len(others) + 1))


def test_pooled_cells_are_tested_by_the_ranks_in_their_bins():
    """Against the normal approximation written out, and a permutation of each cell's places."""
    frame = simulate(np.random.default_rng(12), num_cells=25)
    nulled, rng = add_null(frame, "x"), np.random.default_rng(0)
    result = gene_statistics(frame, "x", SETTINGS)
    for row in result[::30].iter_rows(named=True):
        own = nulled.filter(pl.col("ensembl_id") == row["ensembl_id"])
        sizes = own["null_size"].to_numpy() + 1
        assert row["place"] == pytest.approx(own["place"].mean())
        error = np.sqrt(np.mean((sizes**2 - 1) / (12 * sizes**2)) / len(own))
        assert row["p_value"] == pytest.approx(2 * scipy.stats.norm.sf(abs(row["place"] - 0.5) / error))
        drawn = (rng.integers(0, sizes, (20_000, len(own))) + 0.5) / sizes
        permuted = np.mean(np.abs(drawn.mean(axis=1) - 0.5) >= abs(row["place"] - 0.5) - 1e-12)
        assert row["p_value"] == pytest.approx(permuted, abs=0.02)


@pytest.mark.parametrize("donors", [1, 4])
def test_cells_between_states_call_no_genes(donors):
    """In two of 60 cells some edits, of any genes, move very far: whichever genes those are must not come out.

    A z-test of the mean excess calls 54 genes here.
    """
    rng = np.random.default_rng(donors)
    called = tested = extreme = 0
    for _ in range(12):
        frame = simulate(rng, donors=donors, donor_sd=0.05 * (donors > 1))
        far = pl.Series("far", 100 * np.exp(3 * rng.normal(size=len(frame))))
        edge = pl.when(pl.col("cell_id").is_in(["c7", "c30"])).then(far).otherwise(1.0)
        result = gene_statistics(frame.with_columns(pl.col("x") * edge), "x", SETTINGS)
        called += (result["fdr"] < 0.05).sum()
        extreme += (result["p_value"] < 0.001).sum()
        tested += len(result)
    assert called <= 2
    assert extreme / tested < 0.004


def test_tested_gene_is_not_in_its_null():
    """However large a gene's shifts are, its null does not move."""
    frame = simulate(np.random.default_rng(3))
    moved = frame.with_columns(pl.when(pl.col("ensembl_id") == "g0100").then(1e3).otherwise("x").alias("x"))
    before, after = (
        gene_statistics(each, "x", SETTINGS).filter(pl.col("ensembl_id") == "g0100") for each in (frame, moved)
    )
    assert after["null_mean"].item() == pytest.approx(before["null_mean"].item())


def test_p_among_genes_is_counted_and_has_a_floor():
    effects = np.zeros(120)
    effects[7] = 9
    result = gene_statistics(simulate(np.random.default_rng(4), effects=effects), "x", StatsSettings(null_genes=60))
    best = result.filter(pl.col("ensembl_id") == "g0007")
    assert best["p_genes"].item() == pytest.approx(2 / 61)
    assert result["p_genes"].min() >= 2 / 61
    assert set(result["null_genes"]) == {60}


def test_too_little_data_is_said_and_not_tested():
    frame = simulate(np.random.default_rng(5), num_cells=30, num_genes=60, donors=3, detection=(1, 1))
    rare = frame.with_row_index().filter((pl.col("ensembl_id") != "g0030") | (pl.col("cell_id").is_in(["c0", "c3"])))
    one_donor = rare.filter((pl.col("ensembl_id") != "g0031") | (pl.col("donor_id") == "d0")).drop("index")
    result = gene_statistics(one_donor, "x", StatsSettings(min_cells=3))
    by_gene = {row["ensembl_id"]: row for row in result.iter_rows(named=True)}
    assert by_gene["g0030"]["test"] == stats.TOO_FEW_CELLS
    assert by_gene["g0031"]["test"] == stats.TOO_FEW_DONORS
    assert by_gene["g0030"]["p_value"] is by_gene["g0031"]["p_value"] is by_gene["g0031"]["fdr"] is None


@pytest.mark.parametrize(("donors", "test"), [(1, stats.OVER_CELLS_ZERO), (4, stats.OVER_DONORS_ZERO)])
def test_short_gene_lists_are_tested_against_no_shift(donors, test):
    frame = simulate(np.random.default_rng(6), num_genes=5, donors=donors, detection=(1, 1))
    result = gene_statistics(frame, "x", SETTINGS)
    assert set(result["test"]) == {test}
    assert result["excess"].null_count() == result["p_genes"].null_count() == 5
    if donors == 1:
        x = frame.filter(pl.col("ensembl_id") == "g0002")["x"].to_numpy()
        assert result["p_value"][2] == pytest.approx(scipy.stats.ttest_1samp(x, 0).pvalue)


def test_missing_donors_count_as_none():
    frame = simulate(np.random.default_rng(7)).with_columns(donor_id=pl.lit(None, pl.String))
    result = gene_statistics(frame, "x", SETTINGS)
    assert set(result["test"]) == {stats.OVER_CELLS}
    assert set(result["n_donors"]) == {0}


def test_moderation_finds_the_prior_it_was_simulated_with():
    rng = np.random.default_rng(8)
    genes, donors, df = 20_000, 4, 8.0
    variance = 0.3 * df / rng.chisquare(df, genes)
    found = moderate(rng.normal(size=(genes, donors)) * np.sqrt(variance)[:, None], np.ones(genes))
    assert found.df[0] - 3 == pytest.approx(df, rel=0.1)
    p = 2 * scipy.stats.t.sf(np.abs(found.mean / found.error), found.df)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_moderation_follows_a_covariate():
    rng = np.random.default_rng(9)
    cells = rng.integers(10, 1000, 5000)
    found = moderate(rng.normal(size=(5000, 3)) / np.sqrt(cells)[:, None], cells)
    p = 2 * scipy.stats.t.sf(np.abs(found.mean / found.error), found.df)
    for part in (cells < 100, cells > 500):
        assert 0.03 < (p[part] < 0.05).mean() < 0.07


def test_moderation_with_equal_variances_uses_them_all():
    rng = np.random.default_rng(10)
    found = moderate(rng.normal(size=(2000, 3)), np.arange(2000))
    assert found.df[0] > 30
    alone = moderate(rng.normal(size=(1, 3)), np.ones(1))
    assert alone.df[0] == 2
