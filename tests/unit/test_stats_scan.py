"""Statistics of scans that lie in files: block by block, every mode, with the published columns beside ours."""

import json

import numpy as np
import polars as pl
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture

from corpus.errors import UserError
from corpus.settings import main
from evaluate.shift_blocks import ShiftBlocks
from evaluate.shifts import unit_path
from evaluate.stats import KEYS, gene_statistics
from evaluate.stats_commands import StatsCommand
from evaluate.stats_compat import draw_pool
from evaluate.stats_lists import OVER_LISTS, TOO_FEW_LISTS
from evaluate.stats_report import write_stats
from evaluate.stats_settings import StatsSettings
from evaluate.stats_tables import NO_NULL, about_genes, genes_table
from tests.factories_stats import STATES, make_rows, write_scan

SETTINGS = StatsSettings(min_cells=5)
PUBLISHED = StatsSettings(min_cells=5, compat="geneformer")


@pytest.mark.parametrize("donors", [1, 4])
def test_blocks_give_what_the_whole_table_gives(tmp_path, donors):
    """Files of 301 rows end within cells; a block of 700 rows holds some 8 of the 45 cells."""
    frame = make_rows(donors=donors)
    scan = ShiftBlocks(write_scan(tmp_path, frame), block_rows=700)
    blocks = list(scan.blocks(["shift_beta"]))
    assert len(blocks) > 4
    assert pl.concat(blocks).equals(frame.select(blocks[0].columns))
    assert sum(block["cell_id"].n_unique() for block in blocks) == 45  # no cell in two
    found = genes_table(scan, SETTINGS).filter(pl.col("state") == "delta").sort(KEYS.gene)
    expected = gene_statistics(frame, "shift_delta", SETTINGS)
    assert found["test"].to_list() == expected["test"].to_list()
    for name in ("n_cells", "n_donors", "null_size", "null_genes"):
        assert found[name].to_list() == expected[name].to_list(), name
    for name in ("mean", "ci_low", "ci_high", "p_value", "fdr", "null_mean", "excess", "p_genes"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, err_msg=name)


def test_what_is_known_of_genes_is_counted(tmp_path):
    frame = make_rows()
    about = about_genes(ShiftBlocks(write_scan(tmp_path, frame), block_rows=700))
    for row in about[::13].iter_rows(named=True):
        own = frame.filter(pl.col("ensembl_id") == row["ensembl_id"])
        assert row["n_rows"] == len(own) == round(row["detection"] * 45)
        assert row["mean_similarity"] == pytest.approx(own["similarity"].mean(), rel=1e-12)
        assert row["sd_similarity"] == pytest.approx(own["similarity"].std(), rel=1e-6)
        assert row["mean_rank"] == pytest.approx(own["rank"].mean())
        assert row["n_no_op"] == own["no_op"].sum()


def test_a_changed_file_is_refused(tmp_path):
    uri = write_scan(tmp_path, make_rows())
    path = tmp_path / unit_path(f"{1:032x}")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=path.name):
        list(ShiftBlocks(uri).blocks([]))


def test_effects_below_the_noise_are_not_significant(tmp_path):
    """A gene with a tiny but perfectly regular shift: a small p-value, an effect that rounding could make."""
    frame = make_rows(donors=1)
    steady = pl.col("ensembl_id") == "g1100"
    others = 1e-7 * pl.col("shift_beta").sign()
    regular = frame.with_columns(pl.when(steady).then(2e-5).otherwise(others).cast(pl.Float32).alias("shift_beta"))
    for number, (noise, called) in enumerate([(1e-6, True), (1e-4, False)]):
        genes = genes_table(ShiftBlocks(write_scan(tmp_path / str(number), regular, noise=noise)), SETTINGS)
        row = genes.filter(pl.col("state") == "beta", steady).row(0, named=True)
        assert row["p_value"] < 1e-6
        assert row["fdr"] < 0.05
        assert row["significant"] == called
        assert row["below_noise"] != called
    assert not genes.filter(pl.col("state") == "beta")["significant"].any()


def test_similarity_of_a_short_list_is_not_tested_against_one(tmp_path):
    frame = make_rows(num_genes=3, states=()).filter(pl.col("ensembl_id") != "g1000")
    genes = genes_table(ShiftBlocks(write_scan(tmp_path, frame, states=(), genes=["g1001", "g1002"])), SETTINGS)
    assert set(genes["test"]) == {NO_NULL}
    assert genes["p_value"].null_count() == 2
    assert not genes["significant"].any()


def test_named_genes_are_ranked_wherever_they_come(tmp_path, capsys):
    frame = make_rows(donors=1)
    rare = frame.filter((pl.col("ensembl_id") != "g1060") | (pl.col("cell_id").is_in(["c1", "c2", "c3"])))
    uri = write_scan(tmp_path / "scan", rare)
    arguments = ["--shifts", uri, "--out", str(tmp_path / "out"), "--stats.named-genes", '["gene1033","g1060","Nope"]']
    assert main("evaluate", {"stats": StatsCommand}, ["stats", *arguments]) == 0
    goal = pl.read_parquet(tmp_path / "out" / "genes.parquet").filter(pl.col("state") == "beta")
    tested = goal.filter(pl.col("p_value").is_not_null()).sort("mean", descending=True)
    named = json.loads((tmp_path / "out" / "summary.json").read_bytes())["states"]["beta"]["named"]
    by_symbol = {row["symbol"]: row for row in named}
    assert set(by_symbol) == {"Gene1033", "Gene1060"}
    rank = tested["symbol"].to_list().index("Gene1033") + 1
    assert (by_symbol["Gene1033"]["rank_tested"], by_symbol["Gene1033"]["tested"]) == (rank, len(tested))
    assert by_symbol["Gene1060"]["rank_tested"] is None
    order = goal.sort("mean", descending=True)["symbol"].to_list()
    assert by_symbol["Gene1060"]["rank_all"] == order.index("Gene1060") + 1
    printed = capsys.readouterr().out
    assert f"Gene1033: rank {rank} of {len(tested)} tested" in printed
    assert f"Gene1060: rank untested, {order.index('Gene1060') + 1} of 120" in printed


def test_goal_state_shift_as_published(tmp_path):
    frame = make_rows()
    write_stats(write_scan(tmp_path / "scan", frame), str(tmp_path / "out"), PUBLISHED)
    table = pl.read_csv(tmp_path / "out" / "geneformer.csv")
    assert table.columns == [
        "Gene", "Gene_name", "Ensembl_ID", "Shift_to_goal_end", "Shift_to_alt_end", "Goal_end_vs_random_pval",
        "Alt_end_vs_random_pval", "Goal_end_FDR", "Alt_end_FDR", "N_Detections", "Sig",
    ]  # fmt: skip
    assert len(table) == frame["ensembl_id"].n_unique()
    for row in table[::17].iter_rows(named=True):
        own = frame.filter(pl.col("ensembl_id") == row["Ensembl_ID"])
        for end, state in (("goal", "beta"), ("alt", "delta")):
            values = own[f"shift_{state}"].cast(pl.Float64)
            expected = scipy.stats.ranksums(values, frame[f"shift_{state}"].cast(pl.Float64)).pvalue
            assert row[f"Shift_to_{end}_end"] == pytest.approx(values.mean())
            assert row[f"{end.title()}_end_vs_random_pval"] == pytest.approx(expected, rel=1e-6)
        assert row["N_Detections"] == len(own)
        assert row["Sig"] == (row["Goal_end_FDR"] < 0.05)
    fdr = scipy.stats.false_discovery_control(table["Goal_end_vs_random_pval"])
    np.testing.assert_allclose(table["Goal_end_FDR"], fdr)
    order = table.sort(["Sig", "Shift_to_goal_end"], descending=True)
    assert table["Ensembl_ID"].to_list() == order["Ensembl_ID"].to_list()


def test_a_drawn_pool_is_a_sample_of_the_scan_by_its_seed(tmp_path):
    frame = make_rows()
    scan = ShiftBlocks(write_scan(tmp_path, frame), block_rows=700)

    def draw(size, seed):
        return draw_pool(scan.blocks(["shift_beta"]), "shift_beta", len(frame), size, seed)

    everything = np.sort(frame["shift_beta"].to_numpy().astype(np.float64))
    np.testing.assert_array_equal(draw(None, 0), everything)
    np.testing.assert_array_equal(draw(10**6, 0), everything)
    pool = draw(500, 0)
    assert len(pool) == len(np.unique(pool)) == 500
    assert np.isin(pool, everything).all()
    np.testing.assert_array_equal(draw(500, 0), pool)
    assert not np.array_equal(draw(500, 1), pool)
    assert scipy.stats.kstest(pool, everything).pvalue > 0.01


def test_versus_null_as_published(tmp_path):
    test, null = make_rows(1), make_rows(2, num_genes=100)
    uri, other = write_scan(tmp_path / "a", test), write_scan(tmp_path / "b", null)
    settings = StatsSettings(mode="vs_null", null_shifts=other, min_cells=5, compat="geneformer")
    genes = write_stats(uri, str(tmp_path / "out"), settings)
    assert len(genes) == 3 * 100
    table = pl.read_csv(tmp_path / "out" / "geneformer.csv")
    assert table.columns == [
        "Gene", "Gene_name", "Ensembl_ID", "Test_avg_shift", "Null_avg_shift", "Test_vs_null_avg_shift",
        "Test_vs_null_pval", "Test_vs_null_FDR", "N_Detections_test", "N_Detections_null", "Sig",
    ]  # fmt: skip
    for row in table[::19].iter_rows(named=True):
        a, b = (
            frame.filter(pl.col("ensembl_id") == row["Ensembl_ID"])["shift_beta"].cast(pl.Float64)
            for frame in (test, null)
        )
        assert (row["Test_avg_shift"], row["Null_avg_shift"]) == pytest.approx((a.mean(), b.mean()))
        assert row["Test_vs_null_pval"] == pytest.approx(scipy.stats.ranksums(a, b).pvalue)
        assert (row["N_Detections_test"], row["N_Detections_null"]) == (len(a), len(b))


def test_scans_of_different_models_are_compared_but_never_merged(tmp_path):
    frame = make_rows()
    uri, other = write_scan(tmp_path / "a", frame), write_scan(tmp_path / "b", frame, model="other")
    with pytest.raises(UserError, match="another model"):
        write_stats(uri, str(tmp_path / "x"), StatsSettings(mode="vs_null", null_shifts=other))
    write_stats(uri, str(tmp_path / "y"), StatsSettings(compare=other))
    found = json.loads((tmp_path / "y" / "summary.json").read_bytes())["comparison"]
    assert found["model_checksum"] == "other"
    assert found["beta"]["spearman"] == pytest.approx(1)
    table = pl.read_csv(tmp_path / "y" / "comparison.csv")
    assert table["state"].unique(maintain_order=True).to_list() == ["beta", "alpha", "delta"]
    assert not table["sign_flip"].any()
    assert (tmp_path / "y" / "comparison.png").stat().st_size > 5000


def test_mixture_as_published(tmp_path):
    rng = np.random.default_rng(0)
    frame = make_rows()
    loss = np.where(frame["ensembl_id"].str.slice(1).cast(pl.Int64) % 4 == 0, 0.2, 0.01)
    frame = frame.with_columns(pl.Series("similarity", 1 - loss * rng.uniform(0.2, 1.8, len(frame))))
    settings = StatsSettings(mode="mixture_model", min_cells=5, compat="geneformer")
    genes = write_stats(write_scan(tmp_path / "scan", frame), str(tmp_path / "out"), settings)
    impact = {f"g{1000 + 4 * k}" for k in range(30)}
    assert set(genes.filter(pl.col("impact_probability") > 0.5)["ensembl_id"]) == impact
    table = pl.read_csv(tmp_path / "out" / "geneformer.csv")
    assert table.columns == [
        "Gene", "Gene_name", "Ensembl_ID", "Test_avg_shift", "Impact_component", "Impact_component_percent",
        "N_Detections",
    ]  # fmt: skip
    assert table["Impact_component"].sum() == 30
    assert set(table[:30]["Impact_component"]) == {1}
    means = frame.group_by("ensembl_id").agg(pl.col("similarity").mean()).sort("ensembl_id")["similarity"].to_numpy()
    fit = GaussianMixture(2, random_state=0).fit(means[:, None])
    low, high = np.sort(fit.means_[:, 0])
    impact = int(np.argmin(fit.means_[:, 0]))
    for row in table[::10].iter_rows(named=True):
        own = frame.filter(pl.col("ensembl_id") == row["Ensembl_ID"])["similarity"]
        called = [x < low or (x <= high and fit.predict([[x]])[0] == impact) for x in own]
        assert row["Test_avg_shift"] == pytest.approx(own.mean())
        assert row["Impact_component_percent"] == pytest.approx(100 * np.mean(called))
        assert row["N_Detections"] == len(own)


def test_aggregate_data_of_a_joint_list(tmp_path):
    frame = make_rows(num_genes=2).filter(pl.col("ensembl_id") == "g1001")
    both = frame.with_columns(
        pl.concat_list(pl.lit("g1"), pl.lit("g2")).alias("ensembl_id"),
        pl.concat_list(pl.lit("Apoe"), pl.lit("Lrp1")).alias("symbol"),
        pl.concat_list("rank", pl.lit(-1, pl.Int32)).alias("rank"),
    )
    uri = write_scan(tmp_path / "scan", both, joint=True, genes=["g1", "g2"], rows_per_unit=10)
    settings = StatsSettings(mode="aggregate_data", compat="geneformer")
    genes = write_stats(uri, str(tmp_path / "out"), settings)
    assert genes["value"].to_list() == ["shift_beta", "shift_alpha", "shift_delta", "similarity"]
    assert set(genes["symbol"]) == {"Apoe+Lrp1"}
    values = frame["shift_beta"].cast(pl.Float64)
    row = genes.row(0, named=True)
    assert (row["n_cells"], row["n_donors"]) == (len(frame), 4)
    assert (row["mean"], row["sd"], row["median"]) == pytest.approx((values.mean(), values.std(), values.median()))
    of_donors = frame.group_by("donor_id").agg(pl.col("shift_beta").cast(pl.Float64).mean())["shift_beta"]
    assert row["mean_of_donors"] == pytest.approx(of_donors.mean())
    cells = pl.read_csv(tmp_path / "out" / "cells.csv")
    assert cells["cell_id"].to_list() == frame["cell_id"].to_list()
    published = pl.read_csv(tmp_path / "out" / "geneformer.csv")
    np.testing.assert_allclose(published["Cosine_shift"], values, rtol=1e-6)
    with pytest.raises(UserError, match="perturbed every gene"):
        write_stats(write_scan(tmp_path / "all", make_rows()), str(tmp_path / "x"), settings)


def make_lists(effect, num_lists=40, num_cells=30, seed=0):
    """A joint list, two genes long, and random ones, every one in most cells; `effect` is the list's alone."""
    rng = np.random.default_rng(seed)
    number, cell = np.divmod(np.arange((num_lists + 1) * num_cells), num_cells)
    keep = rng.random(len(cell)) < 0.8
    number, cell = number[keep], cell[keep]
    of_list = rng.normal(size=num_lists + 1) * 0.01
    of_list[0] = effect
    shifts = {f"shift_{state}": of_list[number] + 0.001 * rng.normal(size=len(cell)) for state in STATES}
    return pl.DataFrame(
        {
            "cell_id": [f"c{each}" for each in cell],
            "donor_id": [f"d{each % 3}" for each in cell],
            "perturbation": "delete",
            "ensembl_id": [[f"g{each}", f"h{each}"] for each in number],
            "symbol": [[f"G{each}", f"H{each}"] for each in number],
            "rank": pl.Series([[each % 7, -1] for each in cell], dtype=pl.List(pl.Int32)),
            "similarity": 1 - 0.01 * rng.random(len(cell)),
            **shifts,
            "no_op": False,
        }
    ).sort("cell_id", maintain_order=True)


@pytest.mark.parametrize(("effect", "hits"), [(0.1, 0), (-0.1, 0), (0.0, None)])
def test_a_joint_list_is_tested_against_random_lists(tmp_path, effect, hits):
    frame = make_lists(effect)
    uri = write_scan(tmp_path / "scan", frame, joint=True, genes=["g0", "h0"], null_lists=40)
    genes = write_stats(uri, str(tmp_path / "out"), SETTINGS)
    assert genes["symbol"].to_list() == ["G0+H0"] * 3
    row = genes.row(0, named=True)
    assert (row["state"], row["test"], row["null_size"]) == ("beta", OVER_LISTS, 40)
    of_donors = frame.group_by(pl.col("ensembl_id").list.first(), "donor_id").agg(pl.col("shift_beta").mean())
    means = dict(of_donors.group_by("ensembl_id").agg(pl.col("shift_beta").mean()).iter_rows())
    own = means.pop("g0")
    others = np.array(list(means.values()))
    assert row["mean"] == pytest.approx(own, rel=1e-5)
    assert row["excess"] == pytest.approx(own - others.mean(), rel=1e-5)
    if hits is None:
        hits = min((others >= own).sum(), (others <= own).sum())
    assert row["p_value"] == row["fdr"] == pytest.approx(min(1, 2 * (1 + hits) / 41))
    null = pl.read_csv(tmp_path / "out" / "null_lists.csv").filter(pl.col("state") == "beta")
    np.testing.assert_allclose(null.sort("ensembl_id")["mean"], [means[k[0]] for k in sorted(means.items())], rtol=1e-5)


def test_too_few_random_lists_make_no_test(tmp_path):
    uri = write_scan(tmp_path / "scan", make_lists(0.1, 5), joint=True, genes=["g0", "h0"], null_lists=5)
    genes = genes_table(ShiftBlocks(uri), SETTINGS)
    assert set(genes["test"]) == {TOO_FEW_LISTS}
    assert genes["p_value"].null_count() == 3


@pytest.mark.parametrize("donors", [1, 4])
def test_pairs_are_tested_for_more_than_the_sum_of_their_genes(tmp_path, donors):
    """Genes a, b, c, d and their pairs; a+b does more than a and b; not every cell has d."""
    rng = np.random.default_rng(donors)
    rows = []
    for cell in range(60):
        genes = "abcd" if cell % 2 else "abc"
        alone = {gene: 0.01 * (1 + rng.normal()) for gene in genes}
        sets = [*([gene] for gene in genes), *([x, y] for x in genes for y in genes if x < y)]
        for each in sets:
            value = sum(alone[gene] for gene in each) + 0.002 * rng.normal() + 0.02 * (each == ["a", "b"])
            rows.append((f"c{cell}", f"d{cell % donors}", each, value, 1 - 0.1 * len(each)))
    cells, owners, sets, values, similarity = zip(*rows, strict=True)
    frame = pl.DataFrame(
        {
            "cell_id": cells,
            "donor_id": owners,
            "perturbation": "delete",
            "ensembl_id": sets,
            "symbol": [[gene.upper() for gene in each] for each in sets],
            "rank": pl.Series([list(range(len(each))) for each in sets], dtype=pl.List(pl.Int32)),
            "similarity": similarity,
            **{f"shift_{state}": pl.Series(values, dtype=pl.Float32) for state in STATES},
            "no_op": False,
        }
    )
    uri = write_scan(tmp_path / "scan", frame, joint=True, genes=list("abcd"), combine="pairs")
    write_stats(uri, str(tmp_path / "out"), SETTINGS)
    table = pl.read_csv(tmp_path / "out" / "interactions.csv")
    assert table["measure"].unique(maintain_order=True).to_list() == ["beta", "alpha", "delta", "similarity"]
    goal = table.filter(pl.col("measure") == "beta")
    assert goal["symbol"].to_list() == ["A+B", "A+C", "A+D", "B+C", "B+D", "C+D"]
    assert goal["n_cells"].to_list() == [60, 60, 30, 60, 30, 30]
    assert goal.filter(pl.col("fdr") < 0.01)["symbol"].to_list() == ["A+B"]
    value = {(cell, "".join(each)): x for cell, each, x in zip(cells, sets, frame["shift_beta"], strict=True)}
    own = {f"c{cell}": value[f"c{cell}", "ac"] - value[f"c{cell}", "a"] - value[f"c{cell}", "c"] for cell in range(60)}
    units = np.array(list(own.values()))
    if donors > 1:
        units = np.array([np.mean([own[f"c{cell}"] for cell in range(k, 60, donors)]) for k in range(donors)])
    row = goal.row(1, named=True)
    expected = scipy.stats.ttest_1samp(units, 0)
    assert row["p_value"] == pytest.approx(expected.pvalue, rel=1e-5)
    assert row["interaction"] == pytest.approx(units.mean(), rel=1e-5)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(expected.confidence_interval(), rel=1e-5)
    # Losses of similarity of 0.1 each, and of 0.2 for a pair: no interaction.
    assert table.filter(pl.col("measure") == "similarity")["interaction"].abs().max() < 1e-12


def make_effects(frame, seed=0):
    """Of every row, the effect on some of the genes of its cell."""
    rng = np.random.default_rng(seed)
    rows = frame.with_row_index("row").select("row", "cell_id", "donor_id", "perturbation", "ensembl_id")
    cells = frame.select("cell_id", pl.col("ensembl_id").alias("affected_ensembl_id"))
    pairs = rows.join(cells, on="cell_id").filter(pl.col("ensembl_id") != pl.col("affected_ensembl_id"))
    return pairs.with_columns(pl.Series("similarity", 1 - 0.1 * rng.random(len(pairs)), pl.Float32)).sort("row")


def test_aggregate_gene_shifts(tmp_path):
    frame = make_rows(num_cells=9, num_genes=12)
    effects = make_effects(frame)
    uri = write_scan(tmp_path / "scan", frame, effects=effects, rows_per_unit=20)
    settings = StatsSettings(mode="aggregate_gene_shifts", compat="geneformer")
    genes = write_stats(uri, str(tmp_path / "out"), settings)
    assert len(genes) == effects.select("ensembl_id", "affected_ensembl_id").n_unique()
    for row in genes[::11].iter_rows(named=True):
        own = effects.filter(
            pl.col("ensembl_id") == row["ensembl_id"], pl.col("affected_ensembl_id") == row["affected_ensembl_id"]
        )
        x = own["similarity"].cast(pl.Float64)
        assert row["n_cells"] == len(own)
        assert row["n_donors"] == own["donor_id"].n_unique()
        assert row["mean_similarity"] == pytest.approx(x.mean(), rel=1e-12)
        assert row["sd"] == (None if len(own) == 1 else pytest.approx(x.std(), rel=1e-6))
        of_donors = own.group_by("donor_id").agg(pl.col("similarity").cast(pl.Float64).mean())["similarity"]
        assert row["mean_of_donors"] == pytest.approx(of_donors.mean(), rel=1e-12)
        assert row["affected_symbol"] == "Gene" + row["affected_ensembl_id"][1:]
    table = pl.read_csv(tmp_path / "out" / "geneformer.csv")
    assert table.columns == [
        "Perturbed", "Gene_name", "Ensembl_ID", "Affected", "Affected_gene_name", "Affected_Ensembl_ID",
        "Cosine_sim_mean", "Cosine_sim_stdev", "N_Detections",
    ]  # fmt: skip
    perturbed = frame["ensembl_id"].n_unique()
    assert table["Affected"].to_list()[:perturbed] == ["cell_emb"] * perturbed
    assert table["Cosine_sim_mean"][perturbed:].is_sorted()
    with pytest.raises(UserError, match="gene_shifts"):
        write_stats(write_scan(tmp_path / "b", frame), str(tmp_path / "x"), settings)
