"""The cells file gives back what was put in, and its kernels do what plain numpy does."""

import io

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from corpus.medians import Histogram, count_cells, keep_cells, normalise, survivors
from ingest.cells import decode_cells, encode_cells
from ingest.collapse import GeneCounts, cell_sums, collapse, select

NUM_GENES = 70_000


def cells_of(num_genes: int) -> st.SearchStrategy[list[dict[int, int]]]:
    numbers = st.integers(1, 40) | st.integers(1, 90_000)
    return st.lists(st.dictionaries(st.integers(0, num_genes - 1), numbers), max_size=8)


counts_of_cells = cells_of(300) | cells_of(NUM_GENES)


def as_counts(cells: list[dict[int, int]]) -> GeneCounts:
    ordered = [sorted(cell.items()) for cell in cells]
    return GeneCounts(
        np.concatenate([[0], np.cumsum([len(cell) for cell in ordered])]).astype(np.int64),
        np.array([gene for cell in ordered for gene, _ in cell], np.uint32),
        np.array([count for cell in ordered for _, count in cell], np.uint32),
        np.array([sum(cell.values()) + 3 for cell in cells], np.uint64),
    )


@given(counts_of_cells)
def test_cells_come_back(cells: list[dict[int, int]]) -> None:
    counts = as_counts(cells)
    columns = {
        "cell_id": pa.array([str(i) for i in range(len(cells))]),
        "tissue": pa.array([None] * len(cells), pa.string()),
    }
    data = encode_cells(columns, counts)
    table = decode_cells(io.BytesIO(data))
    assert table.column_names == ["cell_id", "tissue", "genes", "counts"]
    assert [
        dict(zip(*row, strict=True))
        for row in zip(table["genes"].to_pylist(), table["counts"].to_pylist(), strict=True)
    ] == cells
    assert decode_cells(io.BytesIO(data), ["counts"])["counts"].to_pylist() == table["counts"].to_pylist()
    assert encode_cells(columns, counts) == data


def test_a_changed_byte_is_noticed() -> None:
    counts = as_counts([{gene: 1 + gene % 7 for gene in range(0, 3000, 3)} for _ in range(20)])
    data = bytearray(encode_cells({"cell_id": pa.array([str(i) for i in range(20)])}, counts))
    data[len(data) // 2] ^= 1
    with pytest.raises((OSError, pa.ArrowException)):
        decode_cells(io.BytesIO(bytes(data)))


@given(cells_of(50), st.integers(0, 2**32 - 1))
def test_passes_over_cells_equal_passes_over_values(cells: list[dict[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = as_counts(cells)
    kept, wanted = np.flatnonzero(rng.random(len(cells)) < 0.8), rng.random(50) < 0.7
    cell_of = np.repeat(np.arange(len(cells)), np.diff(counts.indptr))
    taken = np.isin(cell_of, kept) & wanted[counts.genes]
    values = normalise(counts.counts, counts.totals[cell_of])
    plain, by_cell = Histogram(50), Histogram(50)
    plain.add(counts.genes[taken], values[taken])
    parts = (kept, counts.indptr, counts.genes, counts.counts, counts.totals)
    by_cell.add_sparse(*count_cells(*parts, wanted))
    np.testing.assert_array_equal(by_cell.bins, plain.bins)
    middles = plain.median_bins()
    expected = survivors(counts.genes[taken], values[taken], *middles)
    for one, other in zip(keep_cells(*parts, *middles), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@given(counts_of_cells, st.integers(0, 2**32 - 1))
def test_sums_and_selection(cells: list[dict[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = as_counts(cells)
    wanted = rng.random(NUM_GENES) < 0.5
    expected = [sum(count for gene, count in cell.items() if wanted[gene]) for cell in cells]
    assert cell_sums(counts.indptr, counts.genes, counts.counts, wanted).tolist() == expected
    kept = np.flatnonzero(rng.random(len(cells)) < 0.8)
    token_of_row = np.where(wanted, np.cumsum(wanted), -1).astype(np.int32)
    lengths, tokens, numbers = select(kept, counts.indptr, counts.genes, counts.counts, token_of_row)
    pairs = [[(int(token_of_row[g]), n) for g, n in sorted(cells[i].items()) if wanted[g]] for i in kept]
    assert lengths.tolist() == [len(cell) for cell in pairs]
    assert list(zip(tokens.tolist(), numbers.tolist(), strict=True)) == [pair for cell in pairs for pair in cell]


def test_collapse_sums_repeated_and_unordered_columns() -> None:
    rng = np.random.default_rng(0)
    rows = np.array([5, -1, 2, 5, -2, 0, 2], np.int32)  # two features without a gene, -2 not a gene at all
    indices = [rng.integers(0, 7, rng.integers(0, 12)) for _ in range(30)]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in indices])])
    data = rng.integers(0, 5, indptr[-1]).astype(np.float32)
    matrix = sp.csr_matrix((data, np.concatenate(indices), indptr), shape=(30, 7))
    found = collapse(matrix, rows, 8)
    for cell, row in enumerate(indices):
        dense, total = np.zeros(8, int), 0
        for column, value in zip(row, data[indptr[cell] : indptr[cell + 1]], strict=True):
            total += int(value) if rows[column] != -2 else 0
            if rows[column] >= 0:
                dense[rows[column]] += int(value)
        part = slice(found.indptr[cell], found.indptr[cell + 1])
        assert found.genes[part].tolist() == np.flatnonzero(dense).tolist()
        assert found.counts[part].tolist() == dense[dense > 0].tolist()
        assert found.totals[cell] == total


def test_collapse_refuses_an_index_outside_the_features() -> None:
    matrix = sp.csr_matrix((np.ones(2, np.float32), np.array([0, 9]), np.array([0, 2])), shape=(1, 3))
    with pytest.raises(ValueError, match="outside the 3 features"):
        collapse(matrix, np.arange(3, dtype=np.int32), 3)
