"""Which cells are kept, against slow references; the report adds up."""

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ingest.doublets import find_doublets, require_library
from ingest.duplicates import cell_keys, gene_keys, later_copies
from ingest.histograms import EDGES, Histograms
from ingest.quality import NEIGHBOUR_RULES, RULES, Bounds, Selection, Sums, reasons, source_rules
from ingest.settings import Doublets, QualityControl

CELL = st.tuples(
    st.integers(0, 30_000),
    st.integers(0, 40),
    st.floats(0, 1),
    st.sampled_from([None, None, None, "obs_filter", "not_primary_data"]),
)


def frame(cells: list[tuple[int, int, float, str | None]]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "n_counts": pl.Series([cell[0] for cell in cells], dtype=pl.UInt32),
            "n_genes": pl.Series([min(cell[1], cell[0]) for cell in cells], dtype=pl.UInt32),
            "mito_counts": pl.Series([int(cell[0] * cell[2]) for cell in cells], dtype=pl.UInt32),
            "source_rule": pl.Series([cell[3] for cell in cells], dtype=pl.String),
        }
    )


def slow_reasons(cells: pl.DataFrame, rules: QualityControl) -> list[str | None]:
    """One cell at a time, windows by numpy over all cells of the dataset."""
    rows = cells.to_dicts()
    taken = [row for row in rows if row["n_counts"] > 0 and row["source_rule"] is None]

    def window(name: str, width: float | None) -> tuple[float, float]:
        if width is None or not taken:
            return -np.inf, np.inf
        values = np.array([row[name] for row in taken], np.float64)
        return values.mean() - width * values.std(), values.mean() + width * values.std()

    low, high = window("n_counts", rules.counts_sd)
    mito_low, mito_high = window("mito_counts", rules.mito_counts_sd)
    found: list[str | None] = []
    for row in rows:
        n, mito = row["n_counts"], row["mito_counts"]
        if row["source_rule"] is not None:
            found.append(row["source_rule"])
        elif n == 0:
            found.append("no_counts")
        elif rules.max_counts is not None and n > rules.max_counts:
            found.append("above_max_counts")
        elif row["n_genes"] < rules.min_genes:
            found.append("below_min_genes")
        elif rules.max_mito_fraction is not None and mito / n > rules.max_mito_fraction:
            found.append("above_mito_fraction")
        elif not low - 1e-6 <= n <= high + 1e-6:
            found.append("counts_outside_sd")
        elif not mito_low - 1e-6 <= mito <= mito_high + 1e-6:
            found.append("mito_counts_outside_sd")
        else:
            found.append(None)
    return found


RULE_SETS = [
    QualityControl(),
    QualityControl(preset="common", min_genes=20),
    QualityControl(counts_sd=0.5, mito_counts_sd=0.7, max_mito_fraction=0.6),
]


@pytest.mark.parametrize("rules", RULE_SETS)
@settings(deadline=None, max_examples=60)
@given(cells=st.lists(CELL, max_size=40))
def test_every_cell_has_the_first_rule_that_drops_it(
    rules: QualityControl, cells: list[tuple[int, int, float, str | None]]
) -> None:
    table = frame(cells)
    found = reasons(table, Bounds.of(Sums.of(table), rules), rules)
    assert found.to_list() == slow_reasons(table, rules)
    assert set(found.drop_nulls()) <= set(RULES)


@settings(deadline=None, max_examples=60)
@given(cells=st.lists(CELL, max_size=40), cut=st.integers(0, 40), order=st.randoms(use_true_random=False))
def test_windows_do_not_depend_on_units_or_order(
    cells: list[tuple[int, int, float, str | None]], cut: int, order: object
) -> None:
    whole = Sums.of(frame(cells))
    shuffled = list(cells)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    parts = [Sums.of(frame(part)) for part in (shuffled[:cut], shuffled[cut:])]
    assert parts[1] + parts[0] == whole
    assert Bounds.of(parts[0] + parts[1], RULE_SETS[0]) == Bounds.of(whole, RULE_SETS[0])


def test_sums_of_squares_do_not_overflow() -> None:
    big = pl.DataFrame(
        {
            "n_counts": pl.Series([2**32 - 1] * 3, dtype=pl.UInt32),
            "mito_counts": pl.Series([2**32 - 2] * 3, dtype=pl.UInt32),
            "source_rule": pl.Series([None] * 3, dtype=pl.String),
        }
    )
    assert Sums.of(big).counts_squared == 3 * (2**32 - 1) ** 2
    assert Sums.of(big).mito_squared == 3 * (2**32 - 2) ** 2


def test_presets_are_defaults_and_every_threshold_can_be_set() -> None:
    assert QualityControl().thresholds() == QualityControl(preset="published").thresholds()
    common = QualityControl(preset="common")
    assert (common.min_genes, common.max_mito_fraction, common.max_counts) == (200, 0.2, None)
    assert (common.counts_sd, common.mito_counts_sd) == (None, None)
    mixed = QualityControl.model_validate(
        {"preset": "common", "min_genes": 500, "counts_sd": 4, "max_mito_fraction": "none"}
    )
    assert (mixed.min_genes, mixed.counts_sd, mixed.max_mito_fraction) == (500, 4.0, None)
    with pytest.raises(ValidationError, match="published"):
        QualityControl.model_validate({"preset": "strict"})


def test_source_rules_ask_labels_as_text() -> None:
    labels = {"filter_pass": ["1", "0", None, "True"], "assay": ["10x", "10x", "10x", "smart"]}
    filters = {"filter_pass": ["1", "True"], "assay": ["10x"]}
    found = source_rules(labels, filters, None, 4)
    assert found == [None, "obs_filter", "obs_filter", "obs_filter"]
    primary = ["True", "False", "false", None]
    assert source_rules({}, {}, primary, 4) == [None, "not_primary_data", "not_primary_data", None]
    assert source_rules({"a": ["x", "y"]}, {"a": ["y"]}, ["False", "False"], 2) == ["obs_filter", "not_primary_data"]


def test_neighbour_rules_come_after_the_others_and_name_the_decision() -> None:
    rules = QualityControl(counts_sd=None, mito_counts_sd=None)
    cells = frame([(100, 20, 0.1, None), (100, 3, 0.1, None), (100, 20, 0.1, None), (100, 20, 0.1, None)])
    bounds = Bounds(counts=None, mito_counts=None)
    drops = {"doublet": np.array([1, 2]), "duplicate_of_another_cell": np.array([2, 3])}
    selection = Selection(bounds, rules, drops)
    assert selection.reasons(cells).to_list() == [None, "below_min_genes", "doublet", "duplicate_of_another_cell"]
    assert tuple(drops) == NEIGHBOUR_RULES
    plain = Selection(bounds, rules)
    assert plain.digest == Selection(bounds, rules, {"doublet": np.zeros(0, np.int64)}).digest != selection.digest
    assert Selection(bounds, QualityControl(preset="common")).digest != plain.digest


CONTENT = st.dictionaries(st.integers(0, 5), st.integers(1, 3), max_size=4)


@settings(deadline=None, max_examples=80)
@given(st.lists(CONTENT, max_size=30))
def test_copies_are_the_later_ones_of_equal_cells(cells: list[dict[int, int]]) -> None:
    keys = gene_keys([f"ENSMUSG{number:011d}" for number in range(6)])
    # Genes in the order in which the dictionary has them: the key must not depend on it.
    genes = np.array([gene for cell in cells for gene in cell], np.uint32)
    counts = np.array([count for cell in cells for count in cell.values()], np.uint32)
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])]).astype(np.int64)
    found = later_copies(cell_keys(indptr, genes, counts, keys))
    assert found.tolist() == [i for i, cell in enumerate(cells) if cell in cells[:i]]


def test_keys_tell_a_gene_from_its_count_and_come_from_the_id_alone() -> None:
    keys = gene_keys(["ENSMUSG00000000001", "ENSMUSG00000000003"])
    assert (gene_keys(["ENSMUSG00000000003"])[0] == keys[1]).all()
    indptr = np.array([0, 2, 4, 5], np.int64)
    genes, counts = np.array([0, 1, 0, 1, 0], np.uint16), np.array([1, 2, 2, 1, 3], np.uint8)
    found = cell_keys(indptr, genes, counts, keys)
    assert len(np.unique(found, axis=0)) == 3
    wide = cell_keys(indptr, genes.astype(np.int32), counts.astype(np.uint32), keys)
    assert (wide == found).all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2_000_000), st.integers(0, 200_000), st.floats(0, 1, width=32)), max_size=50))
def test_histograms_hold_every_cell_once_and_add_up(cells: list[tuple[int, int, float]]) -> None:
    def table(part: list[tuple[int, int, float]]) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "n_counts": pl.Series([cell[0] for cell in part], dtype=pl.UInt32),
                "n_genes": pl.Series([cell[1] for cell in part], dtype=pl.UInt32),
                "mito_fraction": pl.Series([cell[2] for cell in part], dtype=pl.Float32),
            }
        )

    whole = Histograms.of(table(cells))
    assert Histograms.of(table(cells[:7])) + Histograms.of(table(cells[7:])) + Histograms.empty() == whole
    for column, name in enumerate(EDGES):
        edges = [float(np.float32(edge)) if name == "mito_fraction" else edge for edge in EDGES[name]]
        slow = [0] * (len(edges) - 1)
        for cell in cells:
            slow[min(max(sum(cell[column] >= edge for edge in edges) - 1, 0), len(slow) - 1)] += 1
        assert getattr(whole, name) == slow


def simulated_sample(num_cells: int = 600, num_doublets: int = 40, seed: int = 0) -> sp.csr_matrix:
    """Six kinds of cells, each with genes of its own; the last cells are sums of two of different kinds."""
    rng = np.random.default_rng(seed)
    profiles = np.tile(rng.gamma(0.5, 0.4, 600), (6, 1))
    for kind in range(6):
        profiles[kind, kind * 100 : kind * 100 + 100] += rng.gamma(1.0, 2.0, 100)
    kinds = rng.integers(0, 6, num_cells - num_doublets)
    single = rng.poisson(profiles[kinds] * rng.gamma(8.0, 1 / 8, (len(kinds), 1)))
    first, step = rng.integers(0, 6, num_doublets), rng.integers(1, 6, num_doublets)
    double = rng.poisson(profiles[first] + profiles[(first + step) % 6])
    return sp.csr_matrix(np.vstack([single, double]))


def test_scrublet_finds_simulated_doublets_the_same_each_time() -> None:
    pytest.importorskip("scanpy")
    pytest.importorskip("skimage")
    counts = simulated_sample()
    rules = Doublets(method="scrublet", expected_rate=0.07)
    require_library(rules)
    found, search = find_doublets(counts, rules)
    again, _ = find_doublets(counts, rules)
    assert (found == again).all()
    assert search.threshold is not None
    assert search.found == found.sum()
    assert found[-40:].mean() > 0.9
    assert found[:-40].mean() < 0.02


def test_a_sample_too_small_for_doublets_is_left_alone_and_told() -> None:
    counts = sp.csr_matrix(np.ones((20, 300), np.int32))
    found, search = find_doublets(counts, Doublets(method="scrublet"))
    assert not found.any()
    assert search.skipped == "fewer cells than 100"
    found, search = find_doublets(sp.csr_matrix(np.ones((200, 30), np.int32)), Doublets(method="scrublet"))
    assert not found.any()
    assert search.skipped == "fewer than 100 genes seen in 3 cells"
