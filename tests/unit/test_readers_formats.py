"""Every format gives the counts, names and labels of the same matrix as h5ad, for any row range."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.rank import rank_cells
from corpus.species import load_genes
from ingest.collapse import collapse
from ingest.formats import CountMatrix, Features
from ingest.mapping import GeneMapper
from ingest.open import fingerprint, open_source
from ingest.plan import expand, inspect
from ingest.settings import Mapping, Source
from tests.factories_sources import LABELLED, WRITERS, Counts, make_counts

GENES = load_genes("mouse")


@pytest.fixture(scope="module")
def mapper() -> GeneMapper:
    return GeneMapper(GENES, species="mouse")


@pytest.fixture(scope="module")
def counts() -> Counts:
    return make_counts()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, counts: Counts) -> dict[str, Source]:
    return {name: write(tmp_path_factory.mktemp(name), counts) for name, write in WRITERS.items()}


def opened(name: str, sources: dict[str, Source], mapper: GeneMapper, *, keep: bool = True) -> CountMatrix:
    if name == "rdata":
        pytest.importorskip("rdata")
    source = sources[name]

    def share(names: object) -> float:
        return mapper.map(Features(list(names))).coverage

    return open_source(source, fingerprint(source)[0] if keep else None, share)


def by_gene(matrix: CountMatrix, start: int, stop: int, mapper: GeneMapper) -> tuple[np.ndarray, np.ndarray]:
    """(cells x genes of the species, totals) as the pipeline makes them."""
    found = collapse(matrix.rows(start, stop), mapper.map(matrix.features).rows, len(GENES))
    dense = np.zeros((stop - start, len(GENES)), np.int64)
    dense[np.repeat(np.arange(stop - start), np.diff(found.indptr)), found.genes] = found.counts
    return dense, found.totals


def expected(counts: Counts) -> np.ndarray:
    dense = np.zeros((len(counts.cells), len(GENES)), np.int64)
    row_of = {name: row for row, name in enumerate(GENES["ensembl_id"])}
    for column, name in enumerate(counts.ids):
        dense[:, row_of[name]] += counts.values[:, column]
    return dense


@pytest.mark.parametrize("name", WRITERS)
def test_all_cells_equal_the_matrix(name: str, sources: dict[str, Source], counts: Counts, mapper: GeneMapper) -> None:
    matrix = opened(name, sources, mapper)
    assert (matrix.num_cells, matrix.barcodes()) == (len(counts.cells), counts.cells)
    found, totals = by_gene(matrix, 0, matrix.num_cells, mapper)
    np.testing.assert_array_equal(found, expected(counts))
    # Antibodies and the other species enter no total.
    np.testing.assert_array_equal(totals, counts.values.sum(axis=1))
    assert mapper.map(matrix.features).steps.get("unmapped", 0) == 0
    matrix.close()


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_row_range_equals_that_part_of_all_rows(
    name: str, sources: dict[str, Source], counts: Counts, mapper: GeneMapper, data: st.DataObject
) -> None:
    matrix = opened(name, sources, mapper)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, matrix.num_cells)] * 2)))
    part = matrix.rows(start, stop)
    assert part.shape == (stop - start, len(matrix.features.names))
    np.testing.assert_array_equal(part.toarray(), matrix.rows(0, matrix.num_cells)[start:stop].toarray())
    assert matrix.barcodes(start, stop) == counts.cells[start:stop]
    matrix.close()


@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_every_type_are_the_same_text(
    name: str, sources: dict[str, Source], counts: Counts, mapper: GeneMapper
) -> None:
    matrix = opened(name, sources, mapper)
    assert matrix.labels("cell_type", 3, 9) == counts.obs["cell_type"].astype(str).tolist()[3:9]
    assert matrix.labels("batch", 0, 23) == [str(value) for value in counts.obs["batch"]]
    assert matrix.labels("score", 1, 3) == [None, str(counts.obs["score"].iloc[2])]
    assert {"cell_type", "batch", "score"} <= set(matrix.obs_columns())
    matrix.close()


@pytest.mark.parametrize("name", sorted(set(WRITERS) - set(LABELLED)))
def test_formats_without_labels_say_so(name: str, sources: dict[str, Source], mapper: GeneMapper) -> None:
    assert opened(name, sources, mapper).obs_columns() == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_source_is_never_modified(
    name: str, sources: dict[str, Source], mapper: GeneMapper, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(sources[name].uri).parent
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def state() -> list[tuple[str, int]]:
        return [(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files]

    before = state()
    matrix = opened(name, sources, mapper, keep=False)
    matrix.rows(0, matrix.num_cells)
    matrix.close()
    assert state() == before
    assert [path for path in sorted(folder.rglob("*")) if path.is_file()] == files


@pytest.mark.parametrize("name", ["h5ad_csr", "h5ad_csc", "loom", "tenx_v3", "mtx_v3", "text_tsv", "text_cells"])
def test_permuted_columns_give_the_same_tokens(
    name: str, tmp_path: Path, sources: dict[str, Source], counts: Counts, mapper: GeneMapper
) -> None:
    order = np.random.default_rng(1).permutation(len(counts.ids))
    permuted = Counts(
        counts.values[:, order],
        [counts.ids[i] for i in order],
        [counts.symbols[i] for i in order],
        counts.cells,
        counts.obs,
    )
    other = {name: WRITERS[name](tmp_path, permuted)}
    # Equal medians, so that equal counts tie.
    medians = np.ones(len(GENES))
    ranked = []
    for these in (sources, other):
        matrix = opened(name, these, mapper)
        found = collapse(matrix.rows(0, matrix.num_cells), mapper.map(matrix.features).rows, len(GENES))
        ranked.append(rank_cells(found.indptr, found.genes.astype(np.uint16), found.counts, medians))
        matrix.close()
    for first, second in zip(*ranked, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"rdata"}))
def test_inspection_finds_out_once_what_extraction_needs(
    name: str, sources: dict[str, Source], counts: Counts, mapper: GeneMapper
) -> None:
    (source,) = expand([sources[name]])
    found = inspect(source, mapper, Mapping())
    assert (found.num_cells, found.source.species) == (len(counts.cells), "mouse")
    assert found.num_entries > 0
    matrix = open_source(found.source, found.sha256)  # without a way to tell genes from cells
    np.testing.assert_array_equal(by_gene(matrix, 0, found.num_cells, mapper)[0], expected(counts))
    matrix.close()
    with pytest.raises(Exception, match="expected 0000"):
        inspect(source.model_copy(update={"sha256": "0" * 64}), mapper, Mapping())


def test_raw_counts_are_preferred_and_the_layer_recorded(sources: dict[str, Source], mapper: GeneMapper) -> None:
    assert opened("h5ad_raw", sources, mapper).layer == "raw.X"
    assert opened("h5ad_csr", sources, mapper).layer == "X"
    assert opened("h5ad_layer", sources, mapper).layer == "umis"
    assert opened("tenx_v2", sources, mapper).layer == "mm10"
    assert opened("text_tsv", sources, mapper).layer == "genes x cells"
    assert opened("text_cells", sources, mapper).detected == {"orientation": "cells_x_genes", "separator": "comma"}


def test_ensembl_ids_are_preferred_where_both_are_there(sources: dict[str, Source], mapper: GeneMapper) -> None:
    for name in ("h5ad_csr", "loom", "tenx_v2", "tenx_v3", "mtx_v3", "mtx_v2"):
        steps = mapper.map(opened(name, sources, mapper).features).steps
        assert steps.get("ensembl_id", 0) == 40, name
        assert "symbol" not in steps, name
