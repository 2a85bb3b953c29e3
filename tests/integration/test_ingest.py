"""Ingest end to end on the shared cluster: against a slow reading of the same files, and run after run."""

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.manifest import Manifest
from corpus.reader import Corpus
from corpus.store import Store
from ingest.pipeline import run
from ingest.report import Report
from ingest.verify import verify
from tests.factories_ingest import SlowCorpus, Toy, slow_ingest, toy_settings, write_toy

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Toy]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_toy(folder, "first", num_cells=150, seed=1),
        write_toy(folder, "second", num_cells=90, seed=2, layout="csc", depth=2.0),
        write_toy(folder, "third", num_cells=40, seed=3, layout="dense", depth=0.5),
    ]


@pytest.fixture(scope="module")
def slow(toys: list[Toy]) -> SlowCorpus:
    return slow_ingest(toys)


@pytest.fixture(scope="module")
def done(toys: list[Toy], tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("corpus")
    return out, run(toy_settings(toys, entries_per_unit=1_500), str(out))


def cells_of(out: Path) -> pl.DataFrame:
    """Every cell of a corpus, in manifest order."""
    shards = [out / unit.shard for unit in Manifest.read(Store(out)).units]
    return pl.concat([pl.DataFrame(pq.read_table(shard)) for shard in shards])


def files_of(out: Path) -> dict[str, str]:
    return {unit.unit_id: unit.sha256 for unit in Manifest.read(Store(out)).units}


def test_every_cell_equals_the_slow_reading(done: tuple[Path, Report], slow: SlowCorpus) -> None:
    out, _ = done
    store = Store(out)
    genes = GeneTable.load(store, Manifest.read(store).genes)
    assert genes.ensembl_ids == sorted(slow.medians)
    assert genes.medians_by_token[genes.tokens].tolist() == [slow.medians[gene] for gene in genes.ensembl_ids]
    assert genes.tokens.tolist() == list(range(4, 4 + len(slow.medians)))
    name_of = dict(zip(genes.tokens.tolist(), genes.ensembl_ids, strict=True))
    found = cells_of(out)
    assert set(found["cell_id"]) == set(slow.cells)
    assert len(found) == len(slow.cells) > 200
    for row in found.iter_rows(named=True):
        expected = slow.cells[row["cell_id"]]
        assert [name_of[token] for token in row["tokens"]] == expected["order"]
        assert dict(zip(map(name_of.get, row["tokens"]), row["counts"], strict=True)) == expected["genes"]
        assert (row["n_counts"], row["n_genes"]) == (expected["total"], len(expected["genes"]))
        assert row["mito_fraction"] == pytest.approx(expected["mito"] / expected["total"], rel=1e-6)
        assert row["cell_type"] == expected["type"]
        assert row["length"] == len(expected["order"])


def test_the_account_adds_up(done: tuple[Path, Report], toys: list[Toy], slow: SlowCorpus) -> None:
    out, report = done
    for toy in toys:
        account = report.datasets[toy.dataset_id]
        assert account.dropped == dict(sorted(slow.dropped[toy.dataset_id].items()))
        assert account.cells_read == len(toy.barcodes) == account.cells_kept + sum(account.dropped.values())
        assert account.cells_kept == sum(name.startswith(f"{toy.dataset_id}:") for name in slow.cells)
        assert account.mapping.duplicates_summed == 2
        assert account.mapping.unmapped == 2
        assert account.mapping.steps["spike_in"] == 1
        mapped = sum(account.mapping.steps[step] for step in ("ensembl_id", "symbol"))
        assert mapped == account.mapping.mapped == len(toy.features) - 3
    rules = {rule for of_dataset in slow.dropped.values() for rule in of_dataset}
    assert rules >= {"no_counts", "above_max_counts", "below_min_genes", "mito_counts_outside_sd"}
    assert report.num_cells == len(slow.cells) == len(Corpus(out))
    assert Report.model_validate_json((out / report.path).read_bytes()) == report


def test_nothing_is_left_but_what_the_format_names(done: tuple[Path, Report]) -> None:
    out, _ = done
    manifest = Manifest.read(Store(out))
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    shards = {unit.shard for unit in manifest.units} | {unit.record for unit in manifest.units}
    rest = files - shards - {manifest.path, manifest.genes, manifest.report}
    assert {name.split("/")[0] for name in rest} == {"runs"}


def test_verify_passes(done: tuple[Path, Report]) -> None:
    checks = list(verify(str(done[0])))
    assert len(checks) >= 10
    assert not [check for check in checks if check.faults]


def test_a_second_run_writes_nothing(done: tuple[Path, Report], toys: list[Toy]) -> None:
    out, report = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run(toy_settings(toys, entries_per_unit=1_500), str(out)) == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_the_size_of_units_changes_no_cell(done: tuple[Path, Report], toys: list[Toy], tmp_path: Path) -> None:
    out, report = done
    whole = run(toy_settings(toys), str(tmp_path / "whole"))
    assert len(Manifest.read(Store(tmp_path / "whole")).units) == len(toys)
    assert len(Manifest.read(Store(out)).units) > 2 * len(toys)
    assert cells_of(tmp_path / "whole").equals(cells_of(out))
    assert whole.datasets == report.datasets


def test_one_worker_gives_the_shards_of_four(done: tuple[Path, Report], toys: list[Toy], tmp_path: Path) -> None:
    """R4: the corpus of the fixture was made by as many workers as the cluster has CPUs, in whatever order."""
    out, report = done
    options = ray.data.DataContext.get_current().execution_options
    limits = options.resource_limits
    assert ray.cluster_resources()["CPU"] == 4
    options.resource_limits = ray.data.ExecutionResources(cpu=1)
    try:
        alone = run(toy_settings(toys, entries_per_unit=1_500), str(tmp_path / "alone"))
    finally:
        options.resource_limits = limits
    assert files_of(tmp_path / "alone") == files_of(out)
    assert Manifest.read(Store(tmp_path / "alone")) == Manifest.read(Store(out))
    assert alone == report


def test_moved_sources_give_the_same_shards(done: tuple[Path, Report], toys: list[Toy], tmp_path: Path) -> None:
    out, _ = done
    for toy in toys:
        (tmp_path / toy.path.name).write_bytes(toy.path.read_bytes())
    sources = [{"uri": str(tmp_path / toy.path.name), "obs": {"cell_type": "celltype"}} for toy in toys]
    run(toy_settings([], sources=sources, entries_per_unit=1_500), str(tmp_path / "moved"))
    assert files_of(tmp_path / "moved") == files_of(out)


def test_adding_ranks_with_the_corpus_own_genes(toys: list[Toy], tmp_path: Path, ray_cluster: object) -> None:
    out = tmp_path / "grown"
    run(toy_settings(toys[:1]), str(out))
    first = Manifest.read(Store(out))
    run(toy_settings(toys[1:]), str(out), frozen=first)
    second = Manifest.read(Store(out))
    assert (second.number, second.genes) == (2, first.genes)
    assert second.units[: len(first.units)] == first.units
    assert len(Corpus(out)) == second.num_cells > first.num_cells
    assert not [check for check in verify(str(out)) if check.faults]
    with pytest.raises(UserError, match="dataset 'first' is already in this corpus"):
        run(toy_settings(toys[:1]), str(out), frozen=second)


def test_unusable_sources_are_all_named_and_nothing_is_published(
    toys: list[Toy], tmp_path: Path, ray_cluster: object
) -> None:
    broken = tmp_path / "broken.h5ad"
    broken.write_bytes(toys[0].path.read_bytes()[:3_000])
    sources = [{"uri": str(toys[0].path)}, {"uri": str(broken)}, {"uri": str(tmp_path / "absent.h5ad")}]
    with pytest.raises(UserError, match=r"broken\.h5ad.*absent\.h5ad"):
        run(toy_settings([], sources=sources), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifests").exists()
