"""Rules that look at other cells: what a worker does for doublets (one sample) and for duplicates (one unit)."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp

from corpus.errors import UserError
from corpus.manifest import Unit
from corpus.store import Store
from ingest.collapse import select
from ingest.doublets import DoubletSearch, find_doublets
from ingest.duplicates import cell_keys
from ingest.plan import WorkUnit
from ingest.quality import Selection
from ingest.settings import Doublets
from ingest.stages import KEYS, MEASURES, kept_blocks, kept_rows, read_cells


def search_doublets(
    units: Sequence[WorkUnit], selections: Sequence[Selection], store: Store, num_genes: int, settings: Doublets
) -> tuple[list[np.ndarray], dict[str, DoubletSearch]]:
    """Search a dataset, sample by sample, in the memory of its largest sample.

    Parameters
    ----------
    units, selections
        The dataset's units in order, and which of their cells the rules so far keep.

    Returns
    -------
    The rows (int64, ascending) of doublets in each unit, and the account of each sample.

    Raises
    ------
    UserError
        If a sample has more cells than one worker is allowed to hold.
    """
    pairs = zip(units, selections, strict=True)
    labels = [_samples(unit, selection, store, settings.batch) for unit, selection in pairs]
    every = pl.concat(labels).drop_nulls()
    sizes = dict(every.value_counts().sort("sample").iter_rows())
    name = units[0].inspection.dataset_id
    for sample, size in sizes.items():
        if size > settings.max_cells:
            what = f"sample {sample!r} of dataset {name}" if settings.batch else f"dataset {name}"
            raise UserError(
                f"{what} has {size:,} cells, more than quality_control.doublets.max_cells = {settings.max_cells:,}; "
                "name the column that tells its samples apart: quality_control.doublets.batch"
            )
    found: list[list[int]] = [[] for _ in units]
    searches = {}
    for sample in sizes:
        rows = [np.flatnonzero((own == sample).fill_null(False).to_numpy()) for own in labels]
        parts = [_counts(unit, store, own, num_genes) for unit, own in zip(units, rows, strict=True) if len(own)]
        doublet, searches[str(sample)] = find_doublets(sp.vstack(parts, format="csr"), settings)
        ends = np.cumsum([len(own) for own in rows])
        for place, own, part in zip(range(len(units)), rows, np.split(doublet, ends[:-1]), strict=True):
            found[place] += own[part].tolist()
    return [np.array(sorted(rows), np.int64) for rows in found], searches


def _samples(unit: WorkUnit, selection: Selection, store: Store, batch: str | None) -> pl.Series:
    """Sample of each cell of a unit; null for a cell that is dropped already."""
    cells = read_cells(unit, store, [*MEASURES, *([batch] if batch else [])])
    frame = pl.DataFrame(cells)
    sample = pl.col(batch).fill_null("") if batch else pl.lit("")
    kept = selection.reasons(frame).is_null()
    return frame.select(pl.when(kept).then(sample).alias("sample"))["sample"]


def _counts(unit: WorkUnit, store: Store, rows: np.ndarray, num_genes: int) -> sp.csr_matrix:
    every = np.arange(num_genes, dtype=np.int32)
    found = [
        select(inside, block.indptr, block.genes, block.counts, every, np.uint32)
        for block, inside in kept_blocks(unit, rows, store)
    ]
    lengths, genes, counts = (np.concatenate(parts) for parts in zip(*found, strict=True))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sp.csr_matrix((counts.astype(np.float32), genes.astype(np.int32), indptr), shape=(len(rows), num_genes))


def unit_keys(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, keys: np.ndarray, min_genes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Content hashes of a unit's kept cells.

    Parameters
    ----------
    wanted
        bool[genes]: genes that can become tokens; the others do not make two cells different.
    keys
        uint64[genes, 2] from `ingest.duplicates.gene_keys`.
    min_genes
        Cells with fewer wanted genes are left out.

    Returns
    -------
    rows int64[n], ascending, and uint64[n, 2].
    """
    if wanted.all():  # then the sums that were taken when the unit was read are those
        cells = pl.DataFrame(read_cells(unit, store, [*MEASURES, *KEYS]))
        kept = selection.reasons(cells).is_null() & (cells["n_genes"] >= min_genes)
        return np.flatnonzero(kept.to_numpy()), cells.filter(kept).select(KEYS).to_numpy()
    rows = kept_rows(unit, selection, store)
    row_of = np.where(wanted, np.arange(len(wanted)), -1).astype(np.int32)
    lengths, found = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)]
    for block, inside in kept_blocks(unit, rows, store):
        own, genes, counts = select(inside, block.indptr, block.genes, block.counts, row_of, np.uint32)
        lengths.append(own)
        found.append(cell_keys(np.concatenate([[0], np.cumsum(own)]), genes, counts, keys))
    enough = np.concatenate(lengths) >= min_genes
    return rows[enough], np.concatenate(found)[enough]


def shard_keys(unit: Unit, store: Store, keys_by_token: np.ndarray, min_genes: int) -> np.ndarray:
    """Content hashes uint64[n, 2] of the cells of a published shard; `keys_by_token` is uint64[vocab_size, 2]."""
    with store.open(unit.shard) as stream:
        table = pq.read_table(stream, columns=["length", "tokens", "counts"])
    table = table.filter(pc.greater_equal(table["length"], min_genes)).combine_chunks()
    if table.num_rows == 0:
        return np.zeros((0, 2), np.uint64)
    tokens, counts = (table[name].combine_chunks() for name in ("tokens", "counts"))
    indptr = np.concatenate([[0], np.cumsum(tokens.value_lengths().to_numpy().astype(np.int64))])
    return cell_keys(indptr, tokens.flatten().to_numpy(), counts.flatten().to_numpy(), keys_by_token)
