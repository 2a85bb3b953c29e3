"""What a worker does with one unit: four pure-in, pure-out steps around files that are created if absent.

extract -> cells/<id>.parquet (genes in id order)  |  histogram, survivors -> medians  |  publish -> shards/<id>.parquet
"""

from collections.abc import Sequence

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
from corpus.schema import FORMAT_VERSION, obs_names
from corpus.shards import ranked_table, write_shard
from corpus.store import Store
from ingest.cells import decode_cells, encode_cells
from ingest.collapse import GeneCounts, cell_sums, collapse, select
from ingest.digests import unit_digests
from ingest.formats import CountMatrix, require_counts
from ingest.histograms import EDGES, Histograms
from ingest.mapping import GeneMapper
from ingest.open import fingerprint, open_source, version
from ingest.plan import WorkUnit
from ingest.quality import Selection, Sums, source_rules
from ingest.settings import QualityControl

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
    try:
        block = matrix.rows(unit.start, unit.stop)
        _require_sound(block, unit, len(matrix.features.names))
        barcodes = matrix.barcodes(unit.start, unit.stop)

        def describe(entry: int) -> str:
            cell = int(np.searchsorted(block.indptr, entry, side="right")) - 1
            return f"{source.uri}: cell {barcodes[cell]!r} (row {unit.start + cell})"

        require_counts(block.data, describe, matrix.layer)
        counts = collapse(block, mapper.map(matrix.features).rows, len(genes))
        labels = _labels(matrix, unit, extra_obs)
        dropped = _source_rules(matrix, unit, rules)
    finally:
        matrix.close()
    _require_unchanged(unit)
    store.create(unit.cells, _cells_file(unit, barcodes, labels, dropped, counts, genes))


def _require_unchanged(unit: WorkUnit) -> None:
    """Refuse a source that is no longer what was inspected; it is hashed again only if it looks touched."""
    found = unit.inspection
    if version(found.source) != found.version and fingerprint(found.source)[0] != found.sha256:
        raise UserError(f"{found.source.uri}: was changed while it was ingested; run again once it is complete")


def _require_sound(block: sp.csr_matrix, unit: WorkUnit, num_features: int) -> None:
    """Refuse index pointers and indices that lead out of the block: what follows runs without bounds checks."""
    pointers, entries = block.indptr, len(block.data)
    where = f"{unit.inspection.source.uri}: rows {unit.start} to {unit.stop}"
    if block.shape != (unit.stop - unit.start, num_features) or len(pointers) != block.shape[0] + 1:
        raise UserError(f"{where}: expected {unit.stop - unit.start} x {num_features} values, found {block.shape}")
    if pointers[0] != 0 or pointers[-1] != entries or len(block.indices) != entries or (np.diff(pointers) < 0).any():
        raise UserError(f"{where}: broken index pointers")
    if entries and (block.indices.min() < 0 or block.indices.max() >= num_features):
        raise UserError(f"{where}: an entry lies outside the {num_features} columns")


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


def _cells_file(
    unit: WorkUnit,
    barcodes: list[str],
    labels: dict[str, Sequence[str | None]],
    dropped: list[str | None],
    counts: GeneCounts,
    genes: pl.DataFrame,
) -> bytes:
    mapped, mito = (
        cell_sums(counts.indptr, counts.genes, counts.counts, which)
        for which in (np.ones(len(genes), bool), genes["is_mitochondrial"].to_numpy())
    )
    return encode_cells(
        {
            "cell_id": pa.array([f"{unit.inspection.dataset_id}:{barcode}" for barcode in barcodes], pa.string()),
            "dataset_id": pa.array([unit.inspection.dataset_id] * len(barcodes), pa.string()),
            **{name: pa.array(values, pa.string()) for name, values in labels.items()},
            "n_counts": pa.array(counts.totals, pa.uint32()),
            "n_genes": pa.array(np.diff(counts.indptr), pa.uint32()),
            "mapped_counts": pa.array(mapped, pa.uint32()),
            "mito_counts": pa.array(mito, pa.uint32()),
            "source_rule": pa.array(dropped, pa.string()),
        },
        counts,
    )


def read_cells(unit: WorkUnit, store: Store, columns: Sequence[str] | None = None) -> pa.Table:
    """Read (some columns of) a unit's cells file."""
    local = store.local_path(unit.cells)
    with store.open(unit.cells) if local is None else pa.memory_map(str(local)) as stream:
        try:
            return decode_cells(stream, columns)
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{store.uri}/{unit.cells}: {error}; move it away and run again") from error


def survey(unit: WorkUnit, store: Store, wanted: np.ndarray) -> tuple[Sums, int, int, int]:
    """Sums for the dataset's window; all counts, those on mapped genes, and those on wanted genes (bool[genes])."""
    columns = ["n_counts", "mapped_counts", "mito_counts", "source_rule"]
    frame = pl.DataFrame(read_cells(unit, store, columns))
    every, mapped = (int(frame[name].cast(pl.Int64).sum()) for name in ("n_counts", "mapped_counts"))
    inside = mapped
    if not wanted.all():  # the entries themselves are five sixths of the file: read only where they are needed
        inside = int(cell_sums(*entries(read_cells(unit, store, ["genes", "counts"])), wanted).sum())
    return Sums.of(frame), every, mapped, inside


def entries(cells: pa.Table, column: str = "genes") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indptr, genes, counts) of a cells table; of a shard, if the column is `tokens`."""
    if cells.num_rows == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    lists = cells[column].combine_chunks()
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    counts = cells["counts"].combine_chunks().flatten().to_numpy()
    return np.concatenate([[0], np.cumsum(lengths)]), lists.flatten().to_numpy(), counts


def _kept_entries(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, inside_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(numbers of the kept cells, indptr, genes, counts, totals) of a unit.

    With `inside_only`, a cell's total is that of its wanted genes (bool[genes]), not of all genes.
    """
    cells = read_cells(unit, store, [*MEASURES, "genes", "counts"])
    kept = np.flatnonzero(selection.reasons(pl.DataFrame(cells.select(MEASURES))).is_null().to_numpy())
    indptr, genes, counts = entries(cells)
    totals = cell_sums(indptr, genes, counts, wanted) if inside_only else cells["n_counts"].to_numpy().astype(np.int64)
    return kept, indptr, genes, counts, totals


def histogram(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, inside_only: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """First pass of the medians, as a sparse histogram."""
    return count_cells(*_kept_entries(unit, selection, store, wanted, inside_only), wanted)


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
    return keep_cells(*_kept_entries(unit, selection, store, wanted, inside_only), low, high)


def digests(
    unit: WorkUnit, selection: Selection, store: Store, wanted: np.ndarray, inside_only: bool
) -> dict[str, np.ndarray]:
    """Approximate alternative to the two passes: centroids of every gene's values."""
    kept, indptr, genes, counts, totals = _kept_entries(unit, selection, store, wanted, inside_only)
    cell_of = np.repeat(np.arange(len(totals)), np.diff(indptr))
    taken = wanted[genes] & np.isin(cell_of, kept)
    return unit_digests(genes[taken], normalise(counts[taken], totals[cell_of[taken]]))


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
    lengths, tokens, counts = select(kept, *entries(cells), token_of_row)
    if not lengths.all():
        # Only where the vocabulary is narrower than the gene table (biotypes, a frozen or an imported vocabulary).
        dropped["no_vocabulary_genes"] = int((lengths == 0).sum())
    cells = cells.drop_columns(["genes", "counts"]).take(pa.array(kept[lengths > 0]))
    lengths = lengths[lengths > 0]
    fraction = cells["mito_counts"].to_numpy() / cells["n_counts"].to_numpy()
    labelled = cells.select(["cell_id", "dataset_id", *obs_columns, "n_counts", "n_genes"])
    table = ranked_table(
        labelled.append_column("mito_fraction", pa.array(fraction, pa.float32())),
        np.concatenate([[0], np.cumsum(lengths)]),
        tokens,
        counts,
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
