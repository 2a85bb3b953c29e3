"""The cells file gives back what was put in, and its kernels do what plain numpy does."""

import io

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from corpus.medians import Histogram, count_cells, keep_cells, normalise, survivors
from ingest.cells import CellsWriter, read_blocks, read_columns
from ingest.collapse import GeneCounts, NotACountError, cell_facts, cell_sums, collapse, select
from ingest.duplicates import cell_keys, gene_keys

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


def encode(parts: list[list[dict[int, int]]]) -> bytes:
    writer = CellsWriter()
    for part in parts:
        columns = {
            "cell_id": pa.array([str(sorted(cell.items())) for cell in part], pa.string()),
            "tissue": pa.array([None] * len(part), pa.string()),
        }
        writer.add(columns, as_counts(part))
    return writer.finish()


@given(st.lists(counts_of_cells, min_size=1, max_size=3))
def test_cells_come_back(parts: list[list[dict[int, int]]]) -> None:
    data = encode(parts)
    cells = [cell for part in parts for cell in part]
    columns = read_columns(io.BytesIO(data))
    assert columns.column_names == ["cell_id", "tissue"]
    assert columns["cell_id"].to_pylist() == [str(sorted(cell.items())) for cell in cells]
    assert read_columns(io.BytesIO(data), ["tissue"])["tissue"].null_count == len(cells)
    found = {}
    for block in read_blocks(io.BytesIO(data)):
        for row in range(block.start, block.stop):
            part = slice(*block.indptr[row - block.start : row - block.start + 2])
            found[row] = dict(zip(block.genes[part].tolist(), block.counts[part].tolist(), strict=True))
    assert [found[row] for row in range(len(cells))] == cells
    assert encode(parts) == data


def test_a_changed_byte_is_noticed() -> None:
    data = bytearray(encode([[{gene: 1 + gene % 7 for gene in range(0, 3000, 3)} for _ in range(20)]]))
    genes = np.arange(0, 3000, 3, dtype="<u4").tobytes()
    for place, read in ((data.index(genes) + 500, read_blocks), (data.index(b"(2700, 6)"), read_columns)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises((OSError, pa.ArrowException)):
            list(read(io.BytesIO(bytes(damaged))))


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
    ids = [f"gene {gene}" for gene in range(400)]
    if counts.genes.max(initial=0) < len(ids):
        keys = gene_keys(ids)
        mapped, mito, sums = cell_facts(counts, wanted[: len(ids)], keys)
        assert (mapped.tolist(), mito.tolist()) == ([sum(cell.values()) for cell in cells], expected)
        np.testing.assert_array_equal(sums, cell_keys(counts.indptr, counts.genes, counts.counts, keys))
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


@pytest.mark.parametrize("kind", [np.float64, np.float16, ">f4", ">i8", np.int16, np.uint64, np.float32])
def test_collapse_reads_every_type_and_needs_four_bytes_for_large_counts(kind: str) -> None:
    counts = [3, 0, 1, 30_000] if kind in (np.int16, np.float16) else [3, 0, 1, 70_000]
    data = np.array(counts).astype(kind)
    last = int(data[3])
    matrix = sp.csr_matrix((np.zeros(4), np.array([0, 1, 2, 3]), np.array([0, 2, 4])))
    matrix.data = data
    found = collapse(matrix, np.arange(4, dtype=np.int32), 4)
    assert found.genes.tolist() == [0, 2, 3]
    assert found.counts.tolist() == [3, 1, last]
    assert found.counts.dtype == (np.uint16 if last < 65_536 else np.uint32)


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf, 2.0**32])
def test_collapse_refuses_what_is_no_count(value: float) -> None:
    matrix = sp.csr_matrix((np.array([1.0, value]), np.array([0, 1]), np.array([0, 2])), shape=(1, 3))
    with pytest.raises(NotACountError):
        collapse(matrix, np.arange(3, dtype=np.int32), 3)


def test_collapse_refuses_a_cell_whose_counts_overflow() -> None:
    matrix = sp.csr_matrix((np.array([2**32 - 1, 1]), np.array([0, 1]), np.array([0, 2])), shape=(1, 2))
    with pytest.raises(NotACountError):
        collapse(matrix, np.zeros(2, np.int32), 1)
