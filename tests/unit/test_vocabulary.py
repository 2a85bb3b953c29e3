"""Given vocabularies and own ones, in whole runs without a cluster, against slow references."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import ingest.pipeline
from corpus.errors import UserError
from corpus.manifest import Manifest
from corpus.reader import Corpus
from corpus.store import Store
from ingest.digests import DigestMerger, unit_digests
from ingest.report import Report
from ingest.settings import IngestSettings, Vocabulary
from ingest.verify import verify
from tests.factories_vocabulary import HUMAN_CODING, IDS, RETIRED, dictionary, save


def test_settings_that_contradict_each_other_are_refused() -> None:
    for bad in (
        {"dictionary": "a.parquet", "corpus": "b"},
        {"dictionary": "a.parquet", "biotypes": ["miRNA"]},
        {"corpus": "b", "medians": "tdigest"},
        {"dictionary_medians": "m.pkl"},
    ):
        with pytest.raises(ValueError, match=r"exclude|no place|needs"):
            Vocabulary.model_validate(bad)


def here(tasks: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[tuple[int, Any, dict[str, np.ndarray]]]:
    """Do the tasks in this process, last first: no result may depend on the order."""
    for position in reversed(range(len(tasks))):
        try:
            facts, arrays = work(tasks[position])
        except UserError as error:
            facts, arrays = error, {}
        yield position, facts if isinstance(facts, UserError) else json.loads(json.dumps(facts)), arrays


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    monkeypatch.setattr(ingest.pipeline, "map_tasks", here)
    monkeypatch.setattr(ingest.pipeline, "cluster", contextlib.nullcontext)
    return lambda settings, out, **rest: ingest.pipeline.run(IngestSettings.model_validate(settings), str(out), **rest)


def write_source(
    path: Path, counts: np.ndarray, features: Sequence[str] = IDS, obs: dict[str, Any] | None = None
) -> str:
    names = [f"c{i}" for i in range(len(counts))]
    anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(obs or {}, index=names),
        var=pd.DataFrame(index=list(features)),
    ).write_h5ad(path)
    return str(path)


def draw(seed: int, num_cells: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.5, (num_cells, len(IDS)))


def settings_of(*uris: str, **changes: Any) -> dict[str, Any]:
    rules = {"counts_sd": "none", "mito_counts_sd": "none", "duplicate_min_genes": 10}
    return {
        "sources": [{"uri": uri} for uri in uris],
        "mapping": {"species": "human"},
        "quality_control": rules | changes.pop("quality_control", {}),
        "entries_per_unit": 1_000,
        **changes,
    }


def cells_of(out: Path) -> dict[str, list[str]]:
    """Cell id to its genes, highest rank first."""
    corpus = Corpus(out)
    name_of = dict(zip(corpus.genes.tokens.tolist(), corpus.genes.ensembl_ids, strict=True))
    ids, found = corpus.obs(["cell_id"])["cell_id"].to_list(), {}
    for cells in corpus.iter_cells():
        for row, number in enumerate(cells.index):
            tokens = cells.tokens[cells.offsets[row] : cells.offsets[row + 1]]
            found[ids[number]] = [name_of[token] for token in tokens.tolist()]
    return found


def test_a_corpus_is_ranked_by_an_imported_dictionary(run: Callable[..., Report], tmp_path: Path) -> None:
    features, counts = [*IDS, f"{RETIRED}.2"], np.hstack([draw(1), draw(2)[:, :1] + 1])
    counts[7, :30] = counts[7, -1] = 0
    uri = write_source(tmp_path / "a.h5ad", counts, features)
    path = save(dictionary(), tmp_path / "d.parquet")
    rules = {"min_genes": 1}
    report = run(settings_of(uri, vocabulary={"dictionary": str(path)}, quality_control=rules), tmp_path / "out")
    assert [str(check) for check in verify(str(tmp_path / "out")) if check.faults] == []
    tokens, medians = dictionary().tokens, dictionary().medians
    names = [*IDS, RETIRED]
    expected = {}
    for i, row in enumerate(counts.tolist()):
        held = [
            (-(count / medians[name]), tokens[name], name)
            for name, count in zip(names, row, strict=True)
            if count and name in medians
        ]
        if held:
            expected[f"a:c{i}"] = [name for _, _, name in sorted(held)]
    assert cells_of(tmp_path / "out") == expected
    account = report.datasets["a"]
    assert account.dropped == {"no_vocabulary_genes": 1}
    inside = counts[:, [name in medians for name in names]].sum() / counts.sum()
    assert account.mapping.umi_share_in_vocabulary == pytest.approx(inside, abs=1e-6)
    assert account.mapping.umi_share_mapped == 1.0
    assert report.vocabulary is not None
    assert report.vocabulary.special_tokens == {"<pad>": 0, "<mask>": 1}


def test_an_evaluation_set_takes_the_medians_of_another_corpus(run: Callable[..., Report], tmp_path: Path) -> None:
    first, second = write_source(tmp_path / "a.h5ad", draw(1)), write_source(tmp_path / "b.h5ad", draw(2) * 7)
    run(settings_of(first), tmp_path / "one")
    run(settings_of(second, vocabulary={"corpus": str(tmp_path / "one")}), tmp_path / "two")
    assert Manifest.read(Store(tmp_path / "two")).genes_hash == Manifest.read(Store(tmp_path / "one")).genes_hash
    run(settings_of(second), tmp_path / "own")
    assert Manifest.read(Store(tmp_path / "own")).genes_hash != Manifest.read(Store(tmp_path / "one")).genes_hash
    assert [str(check) for check in verify(str(tmp_path / "two")) if check.faults] == []


@pytest.mark.parametrize("total", ["all_genes", "vocabulary"])
def test_medians_are_those_of_numpy_over_all_kept_cells(run: Callable[..., Report], tmp_path: Path, total: str) -> None:
    counts = [draw(3), draw(4)]
    uris = [write_source(tmp_path / f"{i}.h5ad", part, [*IDS[:-1], "Unknown"]) for i, part in enumerate(counts)]
    biotypes = ["protein_coding"]
    run(settings_of(*uris, vocabulary={"biotypes": biotypes, "total": total}), tmp_path / "out")
    genes = Corpus(tmp_path / "out").genes
    every = np.vstack(counts).astype(np.float64)
    mapped = every[:, :-1]
    sums = (every if total == "all_genes" else mapped).sum(axis=1, keepdims=True)
    for gene, median in zip(genes.ensembl_ids, genes.table["median"].to_pylist(), strict=True):
        column = mapped[:, IDS.index(gene)]
        assert median == np.median((column / sums[:, 0] * 10_000)[column > 0])
    # The switch changes medians, never what is counted.
    assert Corpus(tmp_path / "out").obs(["n_counts"])["n_counts"].to_list() == every.sum(axis=1).tolist()


def test_identical_cells_are_dropped_in_plan_order(run: Callable[..., Report], tmp_path: Path) -> None:
    first, second = draw(5), draw(6)
    second[[3, 50]] = first[[11, 2]]
    second[8] = second[20]
    first[0, 1:] = second[0, 1:] = 0
    first[0, 0] = second[0, 0] = 9  # two cells of one gene, equal by chance
    uris = [write_source(tmp_path / f"{name}.h5ad", part) for name, part in (("a", first), ("b", second))]
    rules = {"min_genes": 1}
    report = run(settings_of(*uris, quality_control=rules), tmp_path / "out")
    assert report.datasets["a"].dropped == {}
    assert report.datasets["b"].dropped == {"duplicate_of_another_cell": 3}
    kept = cells_of(tmp_path / "out")
    assert {f"b:c{i}" for i in range(60)} - set(kept) == {"b:c3", "b:c50", "b:c20"}
    # The other order of sources keeps the other copies; the size of units changes nothing.
    turned = settings_of(*reversed(uris), quality_control=rules) | {"entries_per_unit": 100_000}
    run(turned, tmp_path / "turned")
    assert {"a:c11", "a:c2", "b:c20"}.isdisjoint(cells_of(tmp_path / "turned"))
    off = run(settings_of(*uris, quality_control=rules | {"drop_duplicates": False}), tmp_path / "off")
    assert off.num_cells == 120


def test_added_sources_are_compared_with_the_cells_that_are_there(run: Callable[..., Report], tmp_path: Path) -> None:
    first, second = draw(5), draw(6)
    second[[3, 50]] = first[[11, 2]]
    uris = [write_source(tmp_path / f"{name}.h5ad", part) for name, part in (("a", first), ("b", second))]
    run(settings_of(uris[0]), tmp_path / "out")
    report = run(settings_of(uris[1]), tmp_path / "out", frozen=Manifest.read(Store(tmp_path / "out")))
    assert report.datasets["b"].dropped == {"duplicate_of_another_cell": 2}
    assert len(cells_of(tmp_path / "out")) == 118
    assert [str(check) for check in verify(str(tmp_path / "out")) if check.faults] == []


def test_a_copy_is_kept_if_the_first_one_fails_its_own_rules(run: Callable[..., Report], tmp_path: Path) -> None:
    first, second = draw(5), draw(6)
    second[4] = first[4]
    uris = [
        write_source(tmp_path / "a.h5ad", first, obs={"is_primary_data": [i != 4 for i in range(60)]}),
        write_source(tmp_path / "b.h5ad", second),
    ]
    report = run(settings_of(*uris), tmp_path / "out")
    assert report.datasets["a"].dropped == {"not_primary_data": 1}
    assert report.datasets["b"].dropped == {}
    assert "b:c4" in cells_of(tmp_path / "out")


def test_filters_and_the_account_of_every_cell(run: Callable[..., Report], tmp_path: Path) -> None:
    counts = draw(7)
    counts[1] = 0
    passes = [1 if i % 4 else 0 for i in range(60)]
    uris = [
        write_source(tmp_path / "a.h5ad", counts, obs={"filter_pass": passes}),
        write_source(tmp_path / "b.h5ad", draw(8)),
    ]
    rules = {"obs_filters": {"filter_pass": ["1"]}}
    report = run(settings_of(*uris, quality_control=rules), tmp_path / "out")
    assert report.datasets["a"].dropped == {"no_counts": 1, "obs_filter": 15}
    assert report.datasets["a"].obs_filters == {"filter_pass": ["1"]}
    assert report.datasets["b"].obs_filters == {}
    for account in report.datasets.values():
        assert account.cells_kept + sum(account.dropped.values()) == account.cells_read
        for name in ("n_counts", "n_genes", "mito_fraction"):
            assert sum(getattr(account.histograms["before"], name)) == account.cells_read
            assert sum(getattr(account.histograms["after"], name)) == account.cells_kept
    assert "dropped, obs_filter: 15" in "\n".join(report.lines())
    bad = settings_of(*uris)
    bad["sources"][1]["obs_filters"] = {"filter_pass": ["1"]}
    with pytest.raises(UserError, match=r"b\.h5ad: obs_filters\.filter_pass: no column"):
        run(bad, tmp_path / "bad")


def test_repeated_genes_are_summed_or_refused(run: Callable[..., Report], tmp_path: Path) -> None:
    counts = draw(9)
    split = np.hstack([counts, counts[:, :1]])
    split[:, 0] = 0
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    once = write_source(tmp_path / "x" / "a.h5ad", counts)
    twice = write_source(tmp_path / "y" / "a.h5ad", split, [*IDS, f"{IDS[0]}.3"])
    run(settings_of(once), tmp_path / "one")
    run(settings_of(once) | {"mapping": {"species": "human", "on_duplicates": "refuse"}}, tmp_path / "same")
    run(settings_of(twice), tmp_path / "two")
    assert cells_of(tmp_path / "one") == cells_of(tmp_path / "two") == cells_of(tmp_path / "same")
    with pytest.raises(UserError, match=rf"{IDS[0]}: {IDS[0]}, {IDS[0]}\.3"):
        run(settings_of(twice) | {"mapping": {"species": "human", "on_duplicates": "refuse"}}, tmp_path / "no")


def test_doublets_are_sought_sample_by_sample_across_units(run: Callable[..., Report], tmp_path: Path) -> None:
    pytest.importorskip("scanpy")
    pytest.importorskip("skimage")
    rng = np.random.default_rng(0)
    genes = HUMAN_CODING["ensembl_id"].to_list()
    profiles = np.tile(rng.gamma(0.5, 0.4, 300), (3, 1))
    for kind in range(3):
        profiles[kind, kind * 100 : kind * 100 + 100] += rng.gamma(1.0, 3.0, 100)
    first = rng.integers(0, 3, 330)
    # Of every eleven cells the last is a doublet; samples take turns; the third sample is too small to search.
    rates = np.where((np.arange(330) % 11 == 10)[:, None], profiles[first] + profiles[(first + 1) % 3], profiles[first])
    samples = ["tiny" if i < 20 else f"s{i % 2}" for i in range(330)]
    uri = write_source(tmp_path / "a.h5ad", rng.poisson(rates), genes, {"donor_id": samples})
    rules = {"doublets": {"method": "scrublet", "batch": "donor_id", "expected_rate": 0.09}}
    runs = [
        run(settings_of(uri, quality_control=rules) | {"entries_per_unit": size}, tmp_path / str(size))
        for size in (4_000, 1_000_000)
    ]
    account = runs[0].datasets["a"]
    assert set(account.doublets) == {"s0", "s1", "tiny"}
    assert account.doublets["tiny"].skipped == "fewer cells than 100"
    assert account.dropped["doublet"] == account.doublets["s0"].found + account.doublets["s1"].found > 10
    assert account == runs[1].datasets["a"]
    assert cells_of(tmp_path / "4000") == cells_of(tmp_path / "1000000")
    small = {"doublets": {"method": "scrublet", "max_cells": 100}}
    with pytest.raises(UserError, match=r"dataset a has 330 cells, more than .*max_cells = 100"):
        run(settings_of(uri, quality_control=small), tmp_path / "no")


def test_counts_outside_the_vocabulary_change_totals_and_never_the_order(
    run: Callable[..., Report], tmp_path: Path
) -> None:
    counts = draw(10)
    path = save(dictionary(), tmp_path / "d.parquet")
    (tmp_path / "more").mkdir()
    plain = write_source(tmp_path / "a.h5ad", counts)
    # Counts of an unmapped gene, and of a mapped one that the dictionary lacks.
    more = np.hstack([counts, draw(11)[:, :1] * 20])
    more[:, 35] += 100
    wide = write_source(tmp_path / "more" / "a.h5ad", more, [*IDS, "NotAGene"])
    rules: dict[str, Any] = {"vocabulary": {"dictionary": str(path)}}
    loose = {"mapping": {"species": "human", "min_count_coverage": 0.1}}
    run(settings_of(plain, **rules) | loose, tmp_path / "one")
    report = run(settings_of(wide, **rules) | loose, tmp_path / "two")
    assert cells_of(tmp_path / "one") == cells_of(tmp_path / "two")
    assert Corpus(tmp_path / "two").obs(["n_counts"])["n_counts"].to_list() == more.sum(axis=1).tolist()
    assert report.datasets["a"].mapping.umi_share_mapped == pytest.approx(more[:, :-1].sum() / more.sum(), abs=1e-6)
    with pytest.raises(UserError, match=r"of its counts fall on mapped genes"):
        run(settings_of(wide, **rules) | {"mapping": {"species": "human", "min_count_coverage": 0.99}}, tmp_path / "no")


def test_a_dataset_without_any_kept_cell_is_published_empty(run: Callable[..., Report], tmp_path: Path) -> None:
    same, full = write_source(tmp_path / "a.h5ad", draw(1) * 0 + 1), write_source(tmp_path / "b.h5ad", draw(2))
    rules = {"min_genes": 40}
    report = run(settings_of(same, full, quality_control=rules), tmp_path / "out")
    assert report.datasets["b"].cells_kept == 0
    assert report.datasets["b"].dropped == {"below_min_genes": 60}
    assert report.datasets["a"].cells_kept == 1
    assert report.datasets["a"].dropped == {"duplicate_of_another_cell": 59}
    assert [str(check) for check in verify(str(tmp_path / "out")) if check.faults] == []
    with pytest.raises(UserError, match="no cell passed quality control"):
        run(settings_of(full, quality_control=rules), tmp_path / "nothing")


# --- t-digest


def test_digests_come_near_the_medians_and_merge_in_plan_order() -> None:
    pytest.importorskip("crick")
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 5, 4_000).astype(np.uint32), rng.lognormal(1, 1, 4_000)) for _ in range(3)]
    sent = [unit_digests(*part) for part in parts]
    merged = []
    for order in ((0, 1, 2), (2, 0, 1)):
        merger = DigestMerger(6)
        for position in order:
            merger.add(position, sent[position])
        merged.append(merger.medians(3))
    assert np.array_equal(merged[0][0], merged[1][0], equal_nan=True)
    genes, values = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    for gene in range(5):
        assert merged[0][0][gene] == pytest.approx(np.median(values[genes == gene]), rel=0.02)
    assert merged[0][1].tolist() == np.bincount(genes, minlength=6).tolist()
    assert np.isnan(merged[0][0][5])
    merger = DigestMerger(6)
    merger.add(0, sent[0])
    with pytest.raises(ValueError, match="2 units are missing"):
        merger.medians(3)


def test_the_tdigest_mode_runs_and_is_recorded(run: Callable[..., Report], tmp_path: Path) -> None:
    pytest.importorskip("crick")
    uri = write_source(tmp_path / "a.h5ad", draw(1, 200))
    report = run(settings_of(uri, vocabulary={"medians": "tdigest"}), tmp_path / "digest")
    run(settings_of(uri), tmp_path / "exact")
    near, exact = (Corpus(tmp_path / name).genes for name in ("digest", "exact"))
    assert near.ensembl_ids == exact.ensembl_ids
    assert near.table["n_cells"].equals(exact.table["n_cells"])
    np.testing.assert_allclose(near.table["median"].to_numpy(), exact.table["median"].to_numpy(), rtol=0.1)
    assert report.vocabulary is not None
    assert report.vocabulary.medians == "tdigest"
