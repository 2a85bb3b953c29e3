"""What a worker does with one unit: four pure-in, pure-out steps around files that are created if absent.

extract -> cells/<id>.parquet (genes in id order)  |  histogram, survivors -> medians  |  publish -> shards/<id>.parquet
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.errors import RunError, UserError
from corpus.genes import GeneTable
from corpus.hashing import digest_json
from corpus.manifest import Unit, unit_record
from corpus.medians import Histogram, normalise, survivors
from corpus.schema import FORMAT_VERSION, obs_names
from corpus.shards import ranked_table, write_shard
from corpus.store import Store
from ingest.collapse import GeneCounts, collapse
from ingest.formats import CountMatrix, require_counts
from ingest.mapping import GeneMapper
from ingest.open import open_source
from ingest.plan import WorkUnit
from ingest.quality import Bounds, Sums, reasons
from ingest.settings import QualityControl


def extract(unit: WorkUnit, store: Store, genes: pl.DataFrame, mapper: GeneMapper, extra_obs: Sequence[str]) -> None:
    """Read a unit's rows from its source and create its cells file, unless it is there.

    Raises
    ------
    UserError
        If a value is not a count, or the source changed since it was inspected.
    """
    if store.exists(unit.cells):
        return
    source = unit.inspection.source
    matrix = open_source(source)
    try:
        block = matrix.rows(unit.start, unit.stop)
        barcodes = matrix.barcodes()

        def describe(entry: int) -> str:
            cell = int(np.searchsorted(block.indptr, entry, side="right")) - 1
            return f"{source.uri}: cell {barcodes[unit.start + cell]!r} (row {unit.start + cell})"

        require_counts(block.data, describe, matrix.layer)
        counts = collapse(block, mapper.map(matrix.features).rows, len(genes))
        labels = _labels(matrix, unit, extra_obs)
    finally:
        matrix.close()
    store.create(unit.cells, _cells_file(unit, barcodes[unit.start : unit.stop], labels, counts, genes))


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


def _cells_file(
    unit: WorkUnit,
    barcodes: list[str],
    labels: dict[str, Sequence[str | None]],
    counts: GeneCounts,
    genes: pl.DataFrame,
) -> bytes:
    mitochondrial = genes["is_mitochondrial"].to_numpy()
    mito = np.add.reduceat(np.append(np.where(mitochondrial[counts.genes], counts.counts, 0), 0), counts.indptr[:-1])
    lengths = np.diff(counts.indptr)
    offsets = pa.array(counts.indptr, pa.int32())
    table = pa.table(
        {
            "cell_id": pa.array([f"{unit.inspection.dataset_id}:{barcode}" for barcode in barcodes], pa.string()),
            "dataset_id": pa.array([unit.inspection.dataset_id] * len(barcodes), pa.string()),
            **{name: pa.array(values, pa.string()) for name, values in labels.items()},
            "n_counts": pa.array(counts.totals, pa.uint32()),
            "n_genes": pa.array(lengths, pa.uint32()),
            # reduceat gives the next cell's first entry for a cell without entries
            "mito_counts": pa.array(np.where(lengths > 0, mito, 0), pa.uint32()),
            "genes": pa.ListArray.from_arrays(offsets, pa.array(counts.genes)),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(counts.counts)),
        }
    )
    sink = pa.BufferOutputStream()
    # Read three times on local disk and then removed: cheap to decode matters more than small.
    dictionary = ["dataset_id", *labels, "counts.list.element"]
    # Checksums, because nothing else would notice a changed count between the stages.
    pq.write_table(table, sink, compression="lz4", use_dictionary=dictionary, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def read_cells(unit: WorkUnit, store: Store, columns: Sequence[str] | None = None) -> pa.Table:
    """Read (some columns of) a unit's cells file."""
    with store.open(unit.cells) as stream:
        wanted = None if columns is None else list(columns)
        try:
            return pq.read_table(stream, columns=wanted, page_checksum_verification=True).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{store.uri}/{unit.cells}: {error}; move it away and run again") from error


def survey(unit: WorkUnit, store: Store) -> tuple[Sums, int, int]:
    """Sums for the dataset's quality-control window, all counts, and the counts that fall on mapped genes."""
    cells = read_cells(unit, store, ["n_counts", "mito_counts", "counts"])
    mapped = int(cells["counts"].combine_chunks().flatten().to_numpy().sum(dtype=np.int64))
    frame = pl.DataFrame(cells.select(["n_counts", "mito_counts"]))
    return Sums.of(frame), int(frame["n_counts"].cast(pl.Int64).sum()), mapped


def _kept(cells: pa.Table, bounds: Bounds, rules: QualityControl) -> tuple[pa.Table, dict[str, int]]:
    frame = pl.DataFrame(cells.select(["n_counts", "n_genes", "mito_counts"]))
    reason = reasons(frame, bounds, rules)
    dropped = {str(rule): int(number) for rule, number in reason.drop_nulls().value_counts().iter_rows()}
    return cells.filter(pa.array(reason.is_null().to_numpy())), dropped


def _entries(cells: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indptr, genes, counts) of a cells table."""
    if cells.num_rows == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    lists = cells["genes"].combine_chunks()
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    counts = cells["counts"].combine_chunks().flatten().to_numpy()
    return np.concatenate([[0], np.cumsum(lengths)]), lists.flatten().to_numpy(), counts


def _normalised(
    unit: WorkUnit, store: Store, bounds: Bounds, rules: QualityControl, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(gene, counts per 10,000) of all entries of kept cells that fall on wanted genes (bool[genes])."""
    cells, _ = _kept(read_cells(unit, store, ["n_counts", "n_genes", "mito_counts", "genes", "counts"]), bounds, rules)
    indptr, genes, counts = _entries(cells)
    totals = np.repeat(cells["n_counts"].to_numpy(), np.diff(indptr))
    inside = wanted[genes]
    return genes[inside], normalise(counts[inside], totals[inside])


def histogram(
    unit: WorkUnit, store: Store, bounds: Bounds, rules: QualityControl, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First pass of the medians, as a sparse histogram."""
    counted = Histogram(len(wanted))
    counted.add(*_normalised(unit, store, bounds, rules, wanted))
    return counted.to_sparse()


def middle_values(
    unit: WorkUnit,
    store: Store,
    bounds: Bounds,
    rules: QualityControl,
    wanted: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Second pass of the medians: the values that share a bin with a gene's middle values."""
    return survivors(*_normalised(unit, store, bounds, rules, wanted), low, high)


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
    store: Store,
    bounds: Bounds,
    rules: QualityControl,
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
    unit_id = digest_json([FORMAT_VERSION, unit.cells_id, bounds.model_dump(), rules.model_dump(), vocabulary.hash])
    done = _finished(unit_id, store)
    if done is not None:
        return done
    cells, dropped = _kept(read_cells(unit, store), bounds, rules)
    indptr, genes, counts = _entries(cells)
    tokens = token_of_row[genes]
    inside = tokens >= 0
    lengths = np.bincount(np.repeat(np.arange(cells.num_rows), np.diff(indptr))[inside], minlength=cells.num_rows)
    if not lengths.all():
        # Only where the vocabulary is narrower than the gene table (biotypes, a frozen or an imported vocabulary).
        dropped["no_vocabulary_genes"] = int((lengths == 0).sum())
        cells = cells.filter(pa.array(lengths > 0))
        lengths = lengths[lengths > 0]
    fraction = cells["mito_counts"].to_numpy() / cells["n_counts"].to_numpy()
    labelled = cells.select(["cell_id", "dataset_id", *obs_columns, "n_counts", "n_genes"])
    table = ranked_table(
        labelled.append_column("mito_fraction", pa.array(fraction, pa.float32())),
        np.concatenate([[0], np.cumsum(lengths)]),
        tokens[inside].astype(np.uint16),
        counts[inside],
        vocabulary.medians_by_token,
    )
    source: dict[str, str | int] = {
        "dataset_id": found.dataset_id,
        "source": found.source.uri,
        "source_sha256": found.sha256,
        "start": unit.start,
        "stop": unit.stop,
    }
    return write_shard(store, table, unit_id=unit_id, source=source, dropped=dropped)
