"""What a worker does with one unit: four pure-in, pure-out steps around files that are created if absent.

extract -> cells/<id>.parquet (genes in id order)  |  histogram, survivors -> medians  |  publish -> shards/<id>.parquet
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from corpus.errors import RunError, UserError
from corpus.genes import GeneTable
from corpus.hashing import digest_json
from corpus.manifest import Unit, unit_record
from corpus.medians import count_cells, keep_cells, normalise
from corpus.rank import rank_cells
from corpus.schema import FORMAT_VERSION, obs_names
from corpus.shards import shard_table, write_shard
from corpus.store import Store
from ingest.cells import BLOCK_ENTRIES, Block, CellsWriter, read_blocks, read_columns
from ingest.collapse import GeneCounts, NotACountError, cell_facts, cell_sums, collapse, select
from ingest.digests import unit_digests
from ingest.duplicates import gene_keys
from ingest.formats import CountMatrix, require_counts
from ingest.histograms import EDGES, Histograms
from ingest.mapping import GeneMapper
from ingest.open import fingerprint, open_source, version
from ingest.plan import WorkUnit
from ingest.quality import Selection, Sums, source_rules
from ingest.settings import QualityControl

KEYS = ("key_0", "key_1")
"""Columns of a cells file by which equal cells are found (`ingest.duplicates`), over all mapped genes."""

MEASURES = ["n_counts", "n_genes", "mito_counts", "source_rule"]
"""Columns of a cells file by which quality control decides."""


def extract(
    unit: WorkUnit,
    store: Store,
    genes: pl.DataFrame,
    mapper: GeneMapper,
    extra_obs: Sequence[str],
    rules: QualityControl,
) -> None:
    """Read a unit's rows from its source and create its cells file, unless it is there.

    Raises
    ------
    UserError
        If a value is not a count, or the source changed since it was inspected.
    """
    if store.exists(unit.cells):
        return
    source = unit.inspection.source
    _require_unchanged(unit)
    matrix = open_source(source, unit.inspection.sha256)
    writer = CellsWriter()
    try:
        rows, keys = mapper.map(matrix.features).rows, gene_keys(genes["ensembl_id"].to_list())
        mitochondrial = genes["is_mitochondrial"].to_numpy()
        columns = _columns(matrix, unit, extra_obs, rules)
        for start, stop in _blocks(unit):
            counts = _read_counts(matrix, unit, start, stop, rows, len(genes))
            mapped, mito, sums = cell_facts(counts, mitochondrial, keys)
            facts = {
                "n_counts": pa.array(counts.totals, pa.uint32()),
                "n_genes": pa.array(np.diff(counts.indptr), pa.uint32()),
                "mapped_counts": pa.array(mapped, pa.uint32()),
                "mito_counts": pa.array(mito, pa.uint32()),
                **{name: pa.array(sums[:, lane], pa.uint64()) for lane, name in enumerate(KEYS)},
            }
            part = {name: values.slice(start - unit.start, stop - start) for name, values in columns.items()}
            writer.add({**part, **facts}, counts)
    finally:
        matrix.close()
    _require_unchanged(unit)
    store.create(unit.cells, writer.finish())


def _blocks(unit: WorkUnit) -> list[tuple[int, int]]:
    """Row ranges of a source of about `BLOCK_ENTRIES` non-zero counts each, at least one."""
    found = unit.inspection
    per_cell = max(found.num_entries / max(found.num_cells, 1), 1.0)
    number = max(round((unit.stop - unit.start) * per_cell / BLOCK_ENTRIES), 1)
    edges = np.linspace(unit.start, unit.stop, number + 1).round().astype(int).tolist()
    return [(start, stop) for start, stop in pairwise(edges) if stop > start] or [(unit.start, unit.stop)]


def _read_counts(
    matrix: CountMatrix, unit: WorkUnit, start: int, stop: int, rows: np.ndarray, num_genes: int
) -> GeneCounts:
    """Counts by gene of the cells `start:stop` of a source.

    Raises
    ------
    UserError
        If a value is not a count, or the matrix is broken.
    """
    uri = unit.inspection.source.uri
    block = matrix.rows(start, stop)
    _require_sound(block, uri, start, stop, len(rows))

    def describe(entry: int) -> str:
        row = start + int(np.searchsorted(block.indptr, entry, side="right")) - 1
        return f"{uri}: cell {matrix.barcodes(row, row + 1)[0]!r} (row {row})"

    try:
        return collapse(block, rows, num_genes)
    except NotACountError as error:
        require_counts(block.data, describe, matrix.layer)
        raise UserError(f"{uri}: the counts of a cell in rows {start} to {stop} add up to 2^32 or more") from error


def _require_unchanged(unit: WorkUnit) -> None:
    """Refuse a source that is no longer what was inspected; it is hashed again only if it looks touched."""
    found = unit.inspection
    if version(found.source) != found.version and fingerprint(found.source)[0] != found.sha256:
        raise UserError(f"{found.source.uri}: was changed while it was ingested; run again once it is complete")


def _require_sound(block: sp.csr_matrix, uri: str, start: int, stop: int, num_features: int) -> None:
    """Refuse index pointers that lead out of the block: what follows runs without bounds checks."""
    pointers, entries = block.indptr, len(block.data)
    where = f"{uri}: rows {start} to {stop}"
    if block.shape != (stop - start, num_features) or len(pointers) != block.shape[0] + 1:
        raise UserError(f"{where}: expected {stop - start} x {num_features} values, found {block.shape}")
    if pointers[0] != 0 or pointers[-1] != entries or len(block.indices) != entries or (np.diff(pointers) < 0).any():
        raise UserError(f"{where}: broken index pointers")


def _columns(
    matrix: CountMatrix, unit: WorkUnit, extra_obs: Sequence[str], rules: QualityControl
) -> dict[str, pa.Array]:
    """Columns of a cells file that the source says itself."""
    barcodes, name = matrix.barcodes(unit.start, unit.stop), unit.inspection.dataset_id
    if len(barcodes) != unit.stop - unit.start:
        raise UserError(f"{unit.inspection.source.uri}: {len(barcodes)} cell names for {unit.stop - unit.start} rows")
    texts = {
        "cell_id": [f"{name}:{barcode}" for barcode in barcodes],
        "dataset_id": [name] * len(barcodes),
        **_labels(matrix, unit, extra_obs),
        "source_rule": _source_rules(matrix, unit, rules),
    }
    return {column: pa.array(values, pa.string()) for column, values in texts.items()}


def _labels(matrix: CountMatrix, unit: WorkUnit, extra_obs: Sequence[str]) -> dict[str, Sequence[str | None]]:
    """Label columns of the unit: fixed label first, then the named column, then the column of the same name."""
    source, size = unit.inspection.source, unit.stop - unit.start
    there = matrix.obs_columns()
    for name, column in source.obs.items():
        if column not in there:
            raise UserError(f"{source.uri}: obs.{name}: no column {column!r}; there are {', '.join(there) or 'none'}")
    columns: dict[str, Sequence[str | None]] = {}
    for name in obs_names(extra_obs):
        column = source.obs.get(name, name)
        if name in source.labels:
            columns[name] = [source.labels[name]] * size
        elif column in there:
            columns[name] = matrix.labels(column, unit.start, unit.stop)
        else:
            columns[name] = [None] * size
    return columns


def _source_rules(matrix: CountMatrix, unit: WorkUnit, rules: QualityControl) -> list[str | None]:
    """Rule of the source that drops each cell of the unit."""
    source, there = unit.inspection.source, matrix.obs_columns()
    for name in source.obs_filters:
        if name not in there:
            known = ", ".join(there) or "none"
            raise UserError(f"{source.uri}: obs_filters.{name}: no column {name!r}; there are {known}")
    everywhere = {name: values for name, values in rules.obs_filters.items() if name in there}
    filters = {**everywhere, **source.obs_filters}
    labels = {name: matrix.labels(name, unit.start, unit.stop) for name in filters}
    column = source.obs.get("is_primary_data", "is_primary_data")
    asked = rules.primary_data_only and column in there
    primary = matrix.labels(column, unit.start, unit.stop) if asked else None
    return source_rules(labels, filters, primary, unit.stop - unit.start)


@contextlib.contextmanager
def _open_cells(unit: WorkUnit, store: Store) -> Iterator[BinaryIO]:
    """A unit's cells file, mapped into memory where it lies on this machine.

    Raises
    ------
    RunError
        If it turns out to be damaged.
    """
    local = store.local_path(unit.cells)
    with store.open(unit.cells) if local is None else pa.memory_map(str(local)) as stream:
        try:
            yield stream
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{store.uri}/{unit.cells}: {error}; move it away and run again") from error


def read_cells(unit: WorkUnit, store: Store, columns: Sequence[str] | None = None) -> pa.Table:
    """Read (some of) the short columns of a unit's cells file."""
    with _open_cells(unit, store) as stream:
        return read_columns(stream, columns)


def cell_blocks(unit: WorkUnit, store: Store) -> Iterator[Block]:
    """Read the counts of a unit's cells file, block by block."""
    with _open_cells(unit, store) as stream:
        yield from read_blocks(stream)


def survey(unit: WorkUnit, store: Store, wanted: np.ndarray) -> tuple[Sums, int, int, int]:
    """Sums for the dataset's window; all counts, those on mapped genes, and those on wanted genes (bool[genes])."""
    columns = ["n_counts", "mapped_counts", "mito_counts", "source_rule"]
    frame = pl.DataFrame(read_cells(unit, store, columns))
    every, mapped = (int(frame[name].cast(pl.Int64).sum()) for name in ("n_counts", "mapped_counts"))
    inside = mapped
    if not wanted.all():  # the counts themselves are nearly all of the file: read only where they are needed
        blocks = cell_blocks(unit, store)
        inside = sum(int(cell_sums(block.indptr, block.genes, block.counts, wanted).sum()) for block in blocks)
    return Sums.of(frame), every, mapped, inside


def kept_rows(unit: WorkUnit, selection: Selection, store: Store) -> np.ndarray:
    """Rows int64[n] of a unit that are kept, ascending."""
    cells = pl.DataFrame(read_cells(unit, store, MEASURES))
    return np.flatnonzero(selection.reasons(cells).is_null().to_numpy())


def kept_blocks(unit: WorkUnit, kept: np.ndarray, store: Store) -> Iterator[tuple[Block, np.ndarray]]:
    """The blocks of a unit, and which of their cells (int64, from 0 in each block) are among the rows `kept`."""
    for block in cell_blocks(unit, store):
        first, last = np.searchsorted(kept, [block.start, block.stop])
        yield block, kept[first:last] - block.start


def _kept_entries(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, inside_only: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(numbers of the kept cells, indptr, genes, counts, totals) of each block of a unit.

    With `inside_only`, a cell's total is that of its wanted genes (bool[genes]), not of all genes.
    """
    every = read_cells(unit, store, ["n_counts"])["n_counts"].to_numpy().astype(np.int64)
    for block, kept in kept_blocks(unit, kept_rows(unit, selection, store), store):
        parts = (block.indptr, block.genes, block.counts)
        yield kept, *parts, cell_sums(*parts, wanted) if inside_only else every[block.start : block.stop]


def histogram(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, inside_only: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """First pass of the medians, as a sparse histogram."""
    # The unit as a whole: the fewer bins are in use per cell, the better they stay in the cache.
    blocks = list(_kept_entries(unit, selection, store, wanted, inside_only))
    if not blocks:  # a source without cells
        return np.zeros(0, np.int64), np.zeros(0, np.uint32)
    cells, entries = (np.cumsum([0, *(len(block[i]) for block in blocks)]) for i in (4, 2))
    kept = np.concatenate([block[0] + first for block, first in zip(blocks, cells, strict=False)])
    indptr = np.concatenate([[0], *(block[1][1:] + first for block, first in zip(blocks, entries, strict=False))])
    genes, counts, totals = (np.concatenate([block[i] for block in blocks]) for i in (2, 3, 4))
    return count_cells(kept, indptr, genes, counts, totals, wanted)


def middle_values(
    unit: WorkUnit,
    selection: Selection,
    store: Store,
    wanted: np.ndarray,
    inside_only: bool,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Second pass of the medians: the values that share a bin with a gene's middle values."""
    blocks = _kept_entries(unit, selection, store, wanted, inside_only)
    found = [keep_cells(*parts, low, high) for parts in blocks]
    none = (np.zeros(0, np.uint16), np.zeros(0))
    genes, values = zip(none, *found, strict=True)
    return np.concatenate(genes), np.concatenate(values)


def digests(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, inside_only: bool
) -> dict[str, np.ndarray]:
    """Approximate alternative to the two passes: centroids of every gene's values."""
    taken_genes, taken_values = [np.zeros(0, np.uint32)], [np.zeros(0)]
    for kept, indptr, genes, counts, totals in _kept_entries(unit, selection, store, wanted, inside_only):
        cell_of = np.repeat(np.arange(len(totals)), np.diff(indptr))
        taken = wanted[genes] & np.isin(cell_of, kept)
        taken_genes.append(genes[taken].astype(np.uint32))
        taken_values.append(normalise(counts[taken], totals[cell_of[taken]]))
    return unit_digests(np.concatenate(taken_genes), np.concatenate(taken_values))


def histograms(unit: WorkUnit, made: Unit, store: Store) -> tuple[Histograms, Histograms]:
    """Cells of a unit by counts, genes and mitochondrial share: all that were read, and those in its shard."""
    read = pl.DataFrame(read_cells(unit, store, MEASURES))
    with store.open(made.shard) as stream:
        kept = pl.DataFrame(pq.read_table(stream, columns=list(EDGES)))
    share = (pl.col("mito_counts") / pl.col("n_counts")).fill_nan(0.0).cast(pl.Float32)
    return Histograms.of(read.with_columns(mito_fraction=share)), Histograms.of(kept)


def _finished(unit_id: str, store: Store) -> Unit | None:
    """Record of a unit that an earlier run has finished, once its shard is found to be what the record says.

    Raises
    ------
    RunError
        If the shard was changed. A shard that is missing is made again.
    """
    if not store.exists(unit_record(unit_id)):
        return None
    unit = Unit.model_validate_json(store.read_bytes(unit_record(unit_id)))
    if not store.exists(unit.shard):
        return None
    if not store.holds(unit.shard, unit.size_bytes, unit.sha256):
        raise RunError(f"{store.uri}/{unit.shard}: was changed since it was written; move it away and run again")
    return unit


def publish(
    unit: WorkUnit,
    selection: Selection,
    store: Store,
    vocabulary: GeneTable,
    token_of_row: np.ndarray,
    obs_columns: Sequence[str],
) -> Unit:
    """Rank a unit's kept cells and create its shard and record.

    Parameters
    ----------
    token_of_row
        int32[genes]: token of each row of the species' gene table, -1 for a gene outside the vocabulary.
    """
    found = unit.inspection
    unit_id = digest_json([FORMAT_VERSION, unit.cells_id, selection.digest, vocabulary.hash])
    done = _finished(unit_id, store)
    if done is not None:
        return done
    cells = read_cells(unit, store)
    reason = selection.reasons(pl.DataFrame(cells.select(MEASURES)))
    dropped = {str(rule): int(number) for rule, number in reason.drop_nulls().value_counts().iter_rows()}
    kept = np.flatnonzero(reason.is_null().to_numpy())
    lengths, tokens, counts = _ranked(unit, kept, store, token_of_row, vocabulary, cells)
    if not lengths.all():
        # Only where the vocabulary is narrower than the gene table (biotypes, a frozen or an imported vocabulary).
        dropped["no_vocabulary_genes"] = int((lengths == 0).sum())
    cells = cells.take(pa.array(kept[lengths > 0]))
    lengths = lengths[lengths > 0]
    fraction = cells["mito_counts"].to_numpy() / cells["n_counts"].to_numpy()
    labelled = cells.select(["cell_id", "dataset_id", *obs_columns, "n_counts", "n_genes"])
    labelled = labelled.append_column("mito_fraction", pa.array(fraction, pa.float32()))
    table = shard_table(labelled, np.concatenate([[0], np.cumsum(lengths)]), tokens, counts)
    source: dict[str, str | int] = {
        "dataset_id": found.dataset_id,
        "source": found.source.uri,
        "source_sha256": found.sha256,
        "start": unit.start,
        "stop": unit.stop,
    }
    return write_shard(store, table, unit_id=unit_id, source=source, dropped=dropped)


def _ranked(
    unit: WorkUnit,
    kept: np.ndarray,
    store: Store,
    token_of_row: np.ndarray,
    vocabulary: GeneTable,
    cells: pa.Table,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths int64[kept], and the tokens uint16 and counts uint32 of the kept cells in rank order, end to end."""
    room = int(cells["n_genes"].to_numpy()[kept].sum())
    tokens, counts = np.empty(room, np.uint16), np.empty(room, np.uint32)
    lengths, end = [np.zeros(0, np.int64)], 0
    for block, inside in kept_blocks(unit, kept, store):
        own, genes, numbers = select(inside, block.indptr, block.genes, block.counts, token_of_row)
        part = slice(end, end + int(own.sum()))
        indptr = np.concatenate([[0], np.cumsum(own)])
        tokens[part], counts[part] = rank_cells(indptr, genes, numbers, vocabulary.medians_by_token)
        lengths.append(own)
        end = part.stop
    return np.concatenate(lengths), tokens[:end], counts[:end]
