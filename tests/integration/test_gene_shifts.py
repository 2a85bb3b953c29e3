"""The table of effects on single genes: rows, bounds, resumption; the originals' numbers through a whole scan."""

import numpy as np
import polars as pl
import pytest
from transformers import BertForMaskedLM

from corpus.errors import UserError
from corpus.reader import Corpus
from evaluate.scan import run_scan
from evaluate.shifts import iter_gene_shifts, read_shifts
from tests.factories_scan import LIMIT, make_scan, write_scan_inputs
from tests.perturbation_reference import gene_effects, published, stock

CELLS = {"max_per_group": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_scan_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    run_scan(make_scan(inputs, out, gene_shifts={}, cells=CELLS))
    return out


@pytest.fixture(scope="module")
def run(inputs):
    return stock(BertForMaskedLM.from_pretrained(inputs[1]), "none")


def table(out):
    return pl.concat(list(iter_gene_shifts(str(out))))


def test_rows_are_those_of_stock_transformers(inputs, finished, run):
    corpus, found = Corpus(inputs[0]), table(finished)
    assert found.columns == [
        "cell_id", "donor_id", "perturbation", "ensembl_id", "affected_ensembl_id", "similarity",
    ]  # fmt: skip
    obs = corpus.obs(["cell_id", "donor_id"]).with_row_index()
    ids = dict(zip(corpus.genes.tokens.tolist(), corpus.genes.ensembl_ids, strict=True))
    values = {tuple(row[:3]): row[3] for row in found.select(pl.exclude("donor_id", "perturbation")).iter_rows()}
    seen = 0
    for cell in found["cell_id"].unique(maintain_order=True):
        index, _, donor = obs.row(by_predicate=pl.col("cell_id") == cell)
        assert set(found.filter(cell_id=cell)["donor_id"]) == {donor}
        tokens = corpus.read_cells(np.array([index])).tokens.tolist()[:LIMIT]
        for gene in tokens:
            rest = [other for other in tokens if other != gene]
            for other, expected in gene_effects(run, tokens, rest, (gene,)).items():
                assert values[cell, ids[gene], ids[other]] == pytest.approx(expected, abs=1e-5)
                seen += 1
    assert seen == len(found) == sum(unit.gene_rows for unit in read_shifts(str(finished))[0].units)


def test_interrupted_scan_goes_on_and_a_changed_file_is_refused(inputs, finished, tmp_path):
    """Both files of one unit, only the gene file of another, nothing of the rest: the result is the same."""
    ready = make_scan(inputs, tmp_path, gene_shifts={}, cells=CELLS)
    first, second, *rest = ready.units
    assert rest
    for unit, folders in ((first, ("shifts", "gene_shifts")), (second, ("gene_shifts",))):
        for folder in folders:
            (tmp_path / folder).mkdir(exist_ok=True)
            name = f"{folder}/{unit.unit_id}.parquet"
            (tmp_path / name).write_bytes((finished / name).read_bytes())
    run_scan(ready)
    assert table(tmp_path).equals(table(finished))
    assert (tmp_path / "manifest.json").read_bytes() == (finished / "manifest.json").read_bytes()
    path = tmp_path / "gene_shifts" / f"{first.unit_id}.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=path.name):
        table(tmp_path)


def test_named_and_most_changed_genes(inputs, finished, tmp_path):
    whole = table(finished)
    run_scan(make_scan(inputs, tmp_path / "named", gene_shifts={"affected": ["Gene3", "gene7"]}, cells=CELLS))
    named = table(tmp_path / "named")
    ids = ["ENSMUSG00000000003", "ENSMUSG00000000007"]
    assert len(named) == whole["affected_ensembl_id"].is_in(ids).sum() > 0
    run_scan(make_scan(inputs, tmp_path / "most", gene_shifts={"most_changed": 2}, cells=CELLS))
    keys = ["cell_id", "ensembl_id"]
    kept = table(tmp_path / "most").group_by(keys).agg(pl.col("similarity").sort()).sort(keys)
    lowest = whole.group_by(keys).agg(pl.col("similarity").sort().head(2)).sort(keys)
    assert kept.select(keys).equals(lowest.select(keys))
    np.testing.assert_allclose(kept["similarity"].to_list(), lowest["similarity"].to_list(), atol=1e-6)


def test_joint_perturbations_are_lists(inputs, tmp_path):
    change = {"genes": ["Gene3", "Gene7"], "combine": "joint", "require": "any"}
    run_scan(make_scan(inputs, tmp_path, perturbation=change, gene_shifts={}, states=None))
    found = table(tmp_path)
    assert found["ensembl_id"].to_list() == [["ENSMUSG00000000003", "ENSMUSG00000000007"]] * len(found)
    assert not set(found["affected_ensembl_id"]) & {"ENSMUSG00000000003", "ENSMUSG00000000007"}


def test_size_is_bounded_before_anything_runs(inputs, finished, tmp_path):
    rows = len(table(finished))
    with pytest.raises(UserError, match=r"up to [\d,]+ rows, max_rows is 100"):
        make_scan(inputs, tmp_path, gene_shifts={"max_rows": 100}, cells=CELLS)
    assert not list(tmp_path.iterdir())
    assert make_scan(inputs, tmp_path, gene_shifts={}, cells=CELLS).gene_rows >= rows
    with pytest.raises(UserError, match="gene 'Nope'"):
        make_scan(inputs, tmp_path, gene_shifts={"affected": ["Nope"]})


def test_a_scan_without_the_table_says_so(inputs, tmp_path):
    run_scan(make_scan(inputs, tmp_path, states=None, cells={"max_per_group": 1}))
    with pytest.raises(UserError, match="wrote no gene_shifts"):
        table(tmp_path)


@pytest.mark.parametrize("lineage", ["geneformer", "geneformer_v2"])
def test_whole_scan_with_the_originals_numbers(inputs, tmp_path, run, lineage):
    corpus = Corpus(inputs[0])
    readout = {"compat": lineage, "layer": "0"}
    manifest = run_scan(make_scan(inputs, tmp_path, perturbation={"kind": "overexpress"}, readout=readout))
    assert manifest.settings["readout"]["compat"] == lineage
    frame = read_shifts(str(tmp_path))[1]
    assert manifest.skipped["top_gene"] == frame["cell_id"].n_unique() == 20
    assert frame["rank"].min() == 1
    draw = np.random.default_rng(0).random(len(corpus))
    obs = corpus.obs(["cell_id", "cell_type"]).with_row_index()
    members = sorted(obs.filter(cell_type="beta")["index"].to_list(), key=lambda cell: draw[cell])[:8]
    states = [run(corpus.read_cells(np.array([cell])).tokens.tolist()[:LIMIT])[0] for cell in members]
    goal = np.mean([np.mean(list(state.values()), axis=0) for state in states], axis=0)
    for row in frame[::40].iter_rows(named=True):
        index = obs.row(by_predicate=pl.col("cell_id") == row["cell_id"])[0]
        tokens = corpus.read_cells(np.array([index])).tokens.tolist()[:LIMIT]
        genes = (tokens[row["rank"]],)
        (similarity, shift), _ = published(run, tokens, genes, "overexpress", True, LIMIT, [goal], lineage)
        assert row["similarity"] == pytest.approx(similarity, abs=1e-5)
        assert row["shift_beta"] == pytest.approx(shift, abs=1e-5)
