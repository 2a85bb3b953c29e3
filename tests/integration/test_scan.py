"""Whole scans: committed units, resumption, Ray workers, and the manifest as the only door to the result."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch
from transformers import BertForMaskedLM

from corpus.errors import UserError
from corpus.reader import Corpus
from evaluate import stats
from evaluate.perturb_settings import ScanSettings
from evaluate.scan import run_scan
from evaluate.scan_setup import Scan
from evaluate.shifts import read_shifts
from evaluate.stats_lists import OVER_LISTS
from evaluate.stats_report import write_stats
from evaluate.stats_settings import StatsSettings
from evaluate.stats_tables import MITOCHONDRIAL, RIBOSOMAL
from tests.factories import write_corpus
from train.model import Classifier, MaskedLM
from train.model_folder import ModelCard, save_model
from train.presets import ModelSettings

LIMIT = 24
STATES = {"column": "cell_type", "start": "alpha", "goal": "beta", "alternates": ["delta"], "cells_per_state": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    corpus = write_corpus(folder / "corpus", num_cells=60, lengths=(4, 40))
    genes = Corpus(corpus).genes
    torch.manual_seed(0)
    config = ModelSettings(preset="tiny", max_length=LIMIT).bert_config(genes.vocab_size)
    config.initializer_range = 0.3
    card = ModelCard(kind="masked_lm", genes_hash=genes.hash, special_tokens="none", max_length=LIMIT)
    save_model(folder / "model", MaskedLM(config), card, genes)
    return str(corpus), str(folder / "model")


def scan(inputs, out, **changes):
    settings = {"states": STATES, "engine": {"workers": 0, "unit_tokens": 900}, **changes}
    return Scan(ScanSettings.model_validate(settings), *inputs, str(out))


def table(out):
    return read_shifts(str(out))[1]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    run_scan(scan(inputs, out))
    return out


def test_table_equals_stock_masked_lm_from_the_saved_folder(inputs, finished):
    """20 cells end to end, from files to files, against stock transformers on one sequence at a time."""
    corpus = Corpus(inputs[0])
    obs = corpus.obs(["cell_id", "cell_type", "donor_id"])
    net = BertForMaskedLM.from_pretrained(inputs[1]).eval()

    def hidden(tokens):
        with torch.no_grad():
            return net(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].double().numpy()

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    found = {(row["cell_id"], row["ensembl_id"]): row for row in table(finished).iter_rows(named=True)}
    manifest = read_shifts(str(finished))[0]
    cells_of = {state: obs.with_row_index().filter(pl.col("cell_type") == state)["index"] for state in manifest.states}
    assert manifest.state_cells == {"alpha": 8, "beta": 8, "delta": 8}
    draw = np.random.default_rng(0).random(len(corpus))
    centroids = {}
    for state, members in cells_of.items():
        chosen = sorted(members.to_list(), key=lambda cell: draw[cell])[:8]
        inputs_of = [corpus.read_cells(np.array([cell])).tokens.tolist()[:LIMIT] for cell in chosen]
        centroids[state] = np.mean([hidden(tokens).mean(axis=0) for tokens in inputs_of], axis=0)
    assert len(cells_of["alpha"]) == 20
    seen = 0
    for cell in cells_of["alpha"].to_list():
        tokens = corpus.read_cells(np.array([cell])).tokens.tolist()[:LIMIT]
        before = hidden(tokens)
        for rank, token in enumerate(tokens):
            row = found[obs["cell_id"][cell], corpus.genes.ensembl_ids[token - 4]]
            after = hidden(tokens[:rank] + tokens[rank + 1 :]).mean(axis=0)
            mean = np.delete(before, rank, axis=0).mean(axis=0)
            assert row["rank"] == rank
            assert row["donor_id"] == obs["donor_id"][cell]
            assert row["symbol"] == corpus.genes.symbols[token - 4]
            assert row["similarity"] == pytest.approx(cosine(after, mean), abs=1e-5)
            for state, centroid in centroids.items():
                expected = cosine(after, centroid) - cosine(mean, centroid)
                assert row[f"shift_{state}"] == pytest.approx(expected, abs=1e-5)
            seen += 1
    assert seen == len(found) == manifest.rows


def test_columns_are_those_of_the_design(finished):
    assert table(finished).columns == [
        "cell_id", "donor_id", "cell_type", "perturbation", "ensembl_id", "symbol", "rank", "similarity",
        "shift_alpha", "shift_beta", "shift_delta", "no_op",
    ]  # fmt: skip


def test_interrupted_scan_goes_on(inputs, finished, tmp_path):
    """Files of half the units, and a foreign one: the rest is run, the result is the same, the foreign one ignored."""
    ready = scan(inputs, tmp_path)
    assert len(ready.units) >= 6
    done = tmp_path / "shifts"
    done.mkdir()
    for unit in ready.units[::2]:
        data = (finished / "shifts" / f"{unit.unit_id}.parquet").read_bytes()
        (done / f"{unit.unit_id}.parquet").write_bytes(data)
    (done / "foreign.parquet").write_bytes(data)
    before = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    run_scan(ready)
    assert {path.name: path.stat().st_mtime_ns for path in done.iterdir() if path.name in before} == before
    assert table(tmp_path).equals(table(finished))
    assert (tmp_path / "manifest.json").read_bytes() == (finished / "manifest.json").read_bytes()


def test_finished_scan_is_not_run_again_and_not_mixed_with_another(inputs, finished):
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "shifts").iterdir()}
    run_scan(scan(inputs, finished))
    assert {path: path.stat().st_mtime_ns for path in (finished / "shifts").iterdir()} == stamps
    with pytest.raises(UserError, match="holds another scan"):
        run_scan(scan(inputs, finished, perturbation={"kind": "overexpress"}))


def test_changed_file_is_refused(inputs, tmp_path):
    run_scan(scan(inputs, tmp_path, cells={"max_per_group": 2}))
    path = next((tmp_path / "shifts").iterdir())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=path.name):
        read_shifts(str(tmp_path))


def test_unit_size_changes_files_but_no_value(inputs, finished, tmp_path):
    """A cell cut into blocks of genes gives the same rows as a cell in one unit."""
    ready = scan(inputs, tmp_path, engine={"workers": 0, "unit_tokens": 100})
    assert any(unit.last_set is not None for unit in ready.units)
    run_scan(ready)
    keys = ["cell_id", "ensembl_id"]
    ours, theirs = table(tmp_path).sort(keys), table(finished).sort(keys)
    assert ours.select(*keys, "rank", "no_op").equals(theirs.select(*keys, "rank", "no_op"))
    for name in ("similarity", "shift_alpha", "shift_beta", "shift_delta"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, rtol=0)


@pytest.mark.ray
def test_number_of_workers_does_not_matter(inputs, finished, tmp_path, ray_cluster):
    for workers in (1, 4):
        run_scan(scan(inputs, tmp_path / str(workers), engine={"workers": workers, "unit_tokens": 900}))
        assert table(tmp_path / str(workers)).equals(table(finished))


@pytest.mark.chaos
def test_killed_scan_run_again_equals_an_undisturbed_one(inputs, finished, tmp_path, repository):
    config = tmp_path / "scan.toml"
    config.write_text(
        '[states]\ncolumn = "cell_type"\nstart = "alpha"\ngoal = "beta"\nalternates = ["delta"]\ncells_per_state = 8\n'
        "[engine]\nworkers = 0\nunit_tokens = 900\ntoken_budget = 30\n"
    )
    code = (
        "import sys; from corpus.settings import main; from evaluate.perturb_commands import PerturbCommand; "
        "sys.exit(main('evaluate', {'perturb': PerturbCommand}))"
    )
    corpus, model = inputs
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, "perturb", "--config", str(config), "--corpus", corpus, "--model", model]
    command += ["--out", str(out)]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("shifts/*.parquet")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    committed = list(out.glob("shifts/*.parquet"))
    assert committed
    assert not (out / "manifest.json").exists(), "killed too late to show anything"
    subprocess.run(command, cwd=repository, check=True)
    frame = table(out)
    assert frame.select("cell_id", "ensembl_id").is_duplicated().sum() == 0
    keys = ["cell_id", "ensembl_id"]
    ours, theirs = frame.sort(keys), table(finished).sort(keys)
    assert ours.select(keys).equals(theirs.select(keys))
    np.testing.assert_allclose(ours["shift_beta"], theirs["shift_beta"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("alternates", [[], ["delta"]])
def test_alternates_are_optional(inputs, tmp_path, alternates):
    changed = {**STATES, "alternates": alternates}
    manifest = run_scan(scan(inputs, tmp_path, states=changed, cells={"max_per_group": 2}))
    assert manifest.states == ["alpha", "beta", *alternates]


def test_probabilities_of_a_classifier_have_their_columns(inputs, tmp_path):
    genes = Corpus(inputs[0]).genes
    config = ModelSettings(preset="tiny", max_length=LIMIT).bert_config(genes.vocab_size)
    card = ModelCard(
        kind="classifier",
        genes_hash=genes.hash,
        special_tokens="none",
        max_length=LIMIT,
        pooling="mean",
        label_map={"alpha": 0, "beta": 1},
    )
    save_model(tmp_path / "model", Classifier(config, 2), card, genes)
    settings = {"readout": {"probabilities": True}, "cells": {"max_per_group": 6}}
    run_scan(scan((inputs[0], str(tmp_path / "model")), tmp_path / "out", **settings))
    frame = table(tmp_path / "out")
    assert [name for name in frame.columns if name.startswith("prob_")] == ["prob_alpha", "prob_beta"]
    np.testing.assert_allclose(frame["prob_alpha"] + frame["prob_beta"], 0, atol=1e-6)
    assert frame["prob_alpha"].abs().max() > 1e-5
    tested = write_stats(str(tmp_path / "out"), str(tmp_path / "stats"), StatsSettings(min_cells=2))
    assert {"prob_alpha", "prob_beta"} < set(tested["state"])


def test_without_states_only_similarity(inputs, tmp_path):
    manifest = run_scan(scan(inputs, tmp_path, states=None, cells={"max_per_group": 3, "group_by": ["donor_id"]}))
    assert manifest.num_cells == 9
    assert [name for name in table(tmp_path).columns if name.startswith("shift")] == []


def test_joint_lists_are_list_columns_and_skips_are_counted(inputs, tmp_path):
    change = {"genes": ["Gene3", "ENSMUSG00000000007", "gene30"], "combine": "joint", "require": "any"}
    manifest = run_scan(scan(inputs, tmp_path, perturbation=change))
    frame = table(tmp_path)
    assert frame["symbol"].to_list() == [["Gene3", "Gene7", "Gene30"]] * len(frame)
    assert len(frame) + manifest.skipped["absent"] + manifest.skipped["nothing_left"] == 20
    assert manifest.skipped["absent"] > 0
    assert all(max(ranks) >= 0 for ranks in frame["rank"].to_list())


def test_a_joint_list_brings_its_random_lists(inputs, tmp_path):
    change = {"genes": ["Gene3", "Gene7"], "combine": "joint", "require": "any", "null_lists": 25}
    ready = scan(inputs, tmp_path / "a", perturbation=change)
    run_scan(ready)
    sets = table(tmp_path / "a")["symbol"].unique(maintain_order=True).to_list()
    assert ["Gene3", "Gene7"] in sets
    assert len(sets) == 26
    assert all(
        len(set(each)) == 2 and not {"Gene3", "Gene7"} & set(each) for each in sets if each != ["Gene3", "Gene7"]
    )
    assert scan(inputs, tmp_path / "a", perturbation=change).scan_id == ready.scan_id
    genes = write_stats(str(tmp_path / "a"), str(tmp_path / "b"), StatsSettings(min_cells=2))
    assert set(genes["symbol"]) == {"Gene3+Gene7"}
    assert set(genes["test"]) == {OVER_LISTS}
    assert genes["p_value"].min() >= 2 / 26
    most = [f"Gene{number}" for number in range(1, 80)]
    with pytest.raises(UserError, match="null_lists: only 1 genes besides the 79 listed ones"):
        scan(inputs, tmp_path / "c", perturbation={**change, "genes": most})


def test_rare_genes_are_left_out(inputs, finished, tmp_path):
    run_scan(scan(inputs, tmp_path, perturbation={"min_cells": 8}))
    counts = table(finished)["ensembl_id"].value_counts()
    expected = set(counts.filter(pl.col("count") >= 8)["ensembl_id"])
    assert 0 < len(expected) < len(counts)
    assert set(table(tmp_path)["ensembl_id"]) == expected


def test_filters_hold_for_cells_and_centroids(inputs, tmp_path):
    manifest = run_scan(scan(inputs, tmp_path, cells={"filters": {"donor_id": ["d1"]}}))
    assert set(table(tmp_path)["donor_id"]) == {"d1"}
    assert manifest.state_cells["beta"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": {**STATES, "goal": "gamma"}}, r"state 'gamma'.*alpha \(20\)"),
        ({"states": {**STATES, "column": "nothing"}}, "no column 'nothing'"),
        ({"perturbation": {"genes": ["Nope"]}}, "gene 'Nope'"),
        ({"readout": {"layer": "layer_3"}}, "layer_3: the model has 2 layers"),
        ({"readout": {"probabilities": True}}, "the model is no classifier"),
        ({"readout": {"embedding": "cls"}}, "no <cls> token"),
        ({"cells": {"filters": {"donor_id": ["d9"]}}}, r"filters.donor_id: no cell is left"),
    ],
)
def test_bad_requests_stop_before_any_work(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        scan(inputs, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_noise_of_rounding_is_measured_and_far_below_effects(finished):
    noise = json.loads((finished / "noise.json").read_bytes())
    assert 0 <= noise["similarity"] < 1e-6
    assert 0 < noise["shift"] < 1e-6
    assert table(finished)["shift_beta"].abs().median() > 1000 * noise["shift"]


def test_statistics_of_a_scan(finished, tmp_path):
    (finished / "shifts" / "stale.parquet").write_bytes(b"not of this run")  # must not be looked at
    genes = write_stats(str(finished), str(tmp_path), StatsSettings(min_cells=5))
    assert {path.name for path in tmp_path.iterdir()} == {
        "genes.parquet", "genes.csv", "summary.json", "volcano.png", "ranking.png", "distributions.png", "runs",
    }  # fmt: skip
    assert pl.read_parquet(tmp_path / "genes.parquet").equals(genes)
    assert (
        pl.read_csv(tmp_path / "genes.csv")
        .select("symbol", "n_cells")
        .equals(genes.select("symbol", "n_cells").cast({"n_cells": pl.Int64}))
    )
    assert genes.columns[:10] == [
        "state", "ensembl_id", "symbol", "n_cells", "n_donors", "mean", "ci_low", "ci_high", "p_value", "fdr",
    ]  # fmt: skip
    assert genes["state"].unique(maintain_order=True).to_list() == ["beta", "alpha", "delta"]
    shifts = table(finished)
    assert set(genes["test"]) <= {stats.OVER_DONORS, stats.TOO_FEW_CELLS, stats.TOO_FEW_DONORS}
    for row in genes.filter(pl.col("state") == "delta")[::15].iter_rows(named=True):
        own = shifts.filter(pl.col("ensembl_id") == row["ensembl_id"])
        assert row["n_cells"] == own["cell_id"].n_unique() == round(row["detection"] * 20)
        assert row["mean_rank"] == pytest.approx(own["rank"].mean())
        if row["p_value"] is not None:
            assert row["mean"] == pytest.approx(
                own.group_by("donor_id").agg(pl.col("shift_delta").mean())["shift_delta"].mean()
            )
    summary = json.loads((tmp_path / "summary.json").read_bytes())
    assert summary["noise"]["cells"] == 16
    assert summary["states"]["beta"]["tested"] == genes.filter(pl.col("state") == "beta")["p_value"].is_not_null().sum()
    write_stats(str(finished), str(tmp_path), StatsSettings(min_cells=5))
    with pytest.raises(UserError, match="holds other results"):
        write_stats(str(finished), str(tmp_path), StatsSettings(min_cells=6))
    (finished / "shifts" / "stale.parquet").unlink()


def test_statistics_of_joint_lists_and_of_similarity(inputs, tmp_path):
    run_scan(scan(inputs, tmp_path / "a", perturbation={"genes": ["Gene3", "Gene7"], "combine": "pairs"}))
    genes = write_stats(str(tmp_path / "a"), str(tmp_path / "b"), StatsSettings(min_cells=2, min_donors=2))
    assert set(genes["symbol"]) == {"Gene3", "Gene7", "Gene3+Gene7"}
    run_scan(scan(inputs, tmp_path / "c", states=None))
    genes = write_stats(str(tmp_path / "c"), str(tmp_path / "d"), StatsSettings(min_cells=5))
    assert set(genes["state"]) == {"similarity"}
    np.testing.assert_allclose(
        genes.filter(pl.col("test") == stats.TOO_FEW_CELLS)["mean"],
        genes.filter(pl.col("test") == stats.TOO_FEW_CELLS)["mean_similarity"],
        rtol=1e-3,
    )


def test_other_modes_of_statistics(inputs, finished, tmp_path):
    backwards = {**STATES, "start": "beta", "goal": "alpha"}
    run_scan(scan(inputs, tmp_path / "null", states=backwards))
    genes = write_stats(
        str(finished),
        str(tmp_path / "a"),
        StatsSettings(mode="vs_null", null_shifts=str(tmp_path / "null"), min_cells=5),
    )
    assert genes["state"].unique(maintain_order=True).to_list() == ["beta", "alpha", "delta"]
    row = next(genes.filter(pl.col("state") == "beta", pl.col("p_value").is_not_null()).iter_rows(named=True))
    both = [table(out).filter(pl.col("ensembl_id") == row["ensembl_id"]) for out in (finished, tmp_path / "null")]
    means = [frame.group_by("donor_id").agg(pl.col("shift_beta").mean())["shift_beta"].mean() for frame in both]
    assert (row["mean"], row["mean_null"]) == pytest.approx(means)
    assert (tmp_path / "a" / "volcano.png").stat().st_size > 5000
    genes = write_stats(str(finished), str(tmp_path / "b"), StatsSettings(mode="mixture_model", min_cells=5))
    assert {"symbol", "mean_similarity", "impact_probability", "impact"} <= set(genes.columns)
    write_stats(str(finished), str(tmp_path / "c"), StatsSettings(compare=str(finished)))
    found = json.loads((tmp_path / "c" / "summary.json").read_bytes())["comparison"]["beta"]
    assert found["spearman"] == pytest.approx(1)
    assert found["sign_flips"] == []


def test_statistics_need_a_finished_scan(tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json"):
        write_stats(str(tmp_path), str(tmp_path / "out"), StatsSettings())


@pytest.mark.parametrize(
    ("symbol", "mitochondrial", "ribosomal"),
    [
        ("mt-Co1", True, False), ("MT-ND4L", True, False), ("Mt1", False, False), ("Rps6", False, True),
        ("Rpl36al", False, True), ("Rplp0", False, True), ("Rpsa", False, True), ("Rps6ka1", False, False),
        ("RPL22L1", False, True), ("Rps4x", False, True), ("RPS4Y1", False, True), ("Rps10-ps1", False, True),
        ("Rps19bp1", False, False), ("Rpl3l", False, True), ("Rps6kb2", False, False),
    ],
)  # fmt: skip
def test_flags_of_symbols(symbol, mitochondrial, ribosomal):
    symbols = pl.Series([symbol])
    assert symbols.str.contains(MITOCHONDRIAL).item() == mitochondrial
    assert symbols.str.contains(RIBOSOMAL).item() == ribosomal


def test_run_is_recorded(finished):
    (path,) = (finished / "runs").iterdir()
    facts = json.loads(path.read_bytes())
    assert facts["settings"]["states"]["goal"] == "beta"
    assert set(facts["inputs"]) == {"model", "corpus", "genes"}
