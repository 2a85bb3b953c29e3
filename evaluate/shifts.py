"""The shifts table: its schema, one Parquet file a work unit, and the manifest that says which files count."""

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue, ValidationError

from corpus.errors import RunError, UserError
from corpus.genes import GeneTable
from corpus.manifest import Record
from corpus.store import Store
from evaluate.gene_effects import gene_path, gene_schema
from evaluate.noise import NoiseFloor
from evaluate.perturb import Edits
from evaluate.scan_compute import Measured

MANIFEST = "manifest.json"
NOISE = "noise.json"
"""What rounding makes of some perturbations, as the first run into the folder measured it; see `NoiseFloor`."""
SHIFT = "shift_"
PROBABILITY = "prob_"


class UnitRecord(Record):
    """A committed work unit; `gene_rows` and `gene_sha256` are those of its gene shifts, where there are any."""

    unit_id: str
    rows: int
    skipped: dict[str, int]
    sha256: str
    gene_rows: int | None = None
    gene_sha256: str | None = None

    @property
    def path(self) -> str:
        """Its file, relative to the scan's folder."""
        return unit_path(self.unit_id)


class ScanManifest(Record):
    """What a scan did; written last, so a folder that has it is complete.

    Parameters
    ----------
    scan_id
        Hash of the model, the corpus, the cells and every setting that affects the result.
    model_checksum, genes_hash, corpus_sha256
        Of the inputs.
    settings
        The settings that affect the result, resolved.
    perturbation
        Kind of perturbation, as in the table.
    joint
        Whether `ensembl_id`, `symbol` and `rank` are lists.
    states
        Modelled states in the order start, goal, alternates; `shift_<state>` are their columns.
    state_cells
        Cells of each state's centroid.
    labels
        Classes whose change of probability is in `prob_<label>`; empty where it was not asked for.
    columns
        Label columns of the table besides `donor_id`.
    num_cells
        Cells scanned.
    noise
        Effects below these are rounding; None in scans of versions that did not record it.
    gene_shifts
        Whether the table gene_shifts/ was written.
    units
        Every unit, in order.
    """

    format_version: int = 1
    scan_id: str
    model_checksum: str
    genes_hash: str
    corpus_sha256: str
    settings: dict[str, JsonValue]
    perturbation: str
    joint: bool
    states: list[str]
    state_cells: dict[str, int]
    labels: list[str] = []
    columns: list[str]
    num_cells: int
    rows: int
    skipped: dict[str, int]
    noise: NoiseFloor | None = None
    gene_shifts: bool = False
    units: list[UnitRecord]

    @classmethod
    def read(cls, store: Store) -> "ScanManifest":
        """Read the manifest of a scan's folder.

        Raises
        ------
        UserError
            If there is none: the scan did not finish.
        """
        if not store.exists(MANIFEST):
            raise UserError(f"{store.uri}: no {MANIFEST}: no scan here, or one that has not finished (run it again)")
        try:
            return cls.model_validate_json(store.read_bytes(MANIFEST))
        except ValidationError as error:
            raise UserError(f"{store.uri}/{MANIFEST}: not a scan's manifest: {error.errors()[0]['msg']}") from error

    def publish(self, store: Store) -> None:
        """Write the manifest.

        Raises
        ------
        RunError
            If another scan has published its own here in the meantime.
        """
        if not store.create(MANIFEST, self.to_json()) and store.read_bytes(MANIFEST) != self.to_json():
            raise RunError(f"{store.uri}: another scan has finished here; choose another --out")


def unit_path(unit_id: str) -> str:
    """File of a unit, relative to the scan's folder."""
    return f"shifts/{unit_id}.parquet"


def shifts_schema(columns: list[str], states: list[str], labels: list[str], joint: bool) -> pa.Schema:
    """Arrow schema of the table.

    Parameters
    ----------
    columns
        Label columns besides `donor_id`.
    states
        Modelled states.
    labels
        Classes whose probabilities are read out.
    joint
        Whether a row can perturb several genes; `ensembl_id`, `symbol` and `rank` are then lists.

    Returns
    -------
    `rank` is the place of the gene in the model's input before, 0 the top, -1 if it was not in it; `similarity` the
    cosine between the perturbed and the original embedding; `shift_<state>` the cosine to that state's centroid, after
    minus before; `prob_<label>` the classifier's probability, after minus before; `no_op` marks rows whose perturbed
    input is the original one.
    """

    def one_or_list(kind: pa.DataType) -> pa.DataType:
        return pa.list_(kind) if joint else kind

    return pa.schema(
        [
            pa.field("cell_id", pa.string(), nullable=False),
            pa.field("donor_id", pa.string()),
            *(pa.field(name, pa.string()) for name in columns),
            pa.field("perturbation", pa.string(), nullable=False),
            pa.field("ensembl_id", one_or_list(pa.string()), nullable=False),
            pa.field("symbol", one_or_list(pa.string()), nullable=False),
            pa.field("rank", one_or_list(pa.int32()), nullable=False),
            pa.field("similarity", pa.float64(), nullable=False),
            *(pa.field(SHIFT + state, pa.float32(), nullable=False) for state in states),
            *(pa.field(PROBABILITY + label, pa.float32(), nullable=False) for label in labels),
            pa.field("no_op", pa.bool_(), nullable=False),
        ]
    )


def shifts_table(
    obs: pl.DataFrame, edits: list[Edits], measured: Measured, genes: GeneTable, perturbation: str, schema: pa.Schema
) -> pa.Table:
    """Lay out the rows of some cells.

    Parameters
    ----------
    obs
        `cell_id`, `donor_id` and the label columns, one row a cell.
    edits
        One entry a cell.
    measured
        Rows in the order of cells and edits.
    """
    joined = Edits.concatenate(edits)
    labels = obs[np.repeat(np.arange(len(edits)), [len(edit) for edit in edits])]
    real = joined.genes >= 0
    row_of_token = np.zeros(genes.vocab_size, dtype=np.int64)
    row_of_token[genes.tokens] = np.arange(len(genes.tokens))
    gene_rows = pa.array(row_of_token[joined.genes[real]])
    offsets = pa.array(np.concatenate([[0], np.cumsum(real.sum(axis=1))]), pa.int32())
    per_gene = {
        "ensembl_id": pa.array(genes.ensembl_ids).take(gene_rows),
        "symbol": pa.array(genes.symbols).take(gene_rows),
        "rank": pa.array(joined.ranks[real], pa.int32()),
    }
    columns: dict[str, Any] = {
        **{name: pa.array(labels[name].cast(pl.String).to_list(), pa.string()) for name in labels.columns},
        "perturbation": pa.array([perturbation] * len(joined), pa.string()),
        "similarity": pa.array(measured.similarity),
        "no_op": pa.array(joined.no_op),
    }
    for name, values in per_gene.items():
        columns[name] = (
            pa.ListArray.from_arrays(offsets, values) if pa.types.is_list(schema.field(name).type) else values
        )
    # What is left are shifts, then probabilities, in the order in which they were measured.
    left = [name for name in schema.names if name not in columns]
    for name, values in zip(left, [*measured.shifts.T, *measured.probabilities.T], strict=True):
        columns[name] = pa.array(values.astype(np.float32))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def commit_unit(
    store: Store, unit_id: str, table: pa.Table, skipped: dict[str, int], gene_shifts: pa.Table | None = None
) -> UnitRecord:
    """Write a unit's file unless it is there already; the record is that of the file that is there.

    The gene shifts come first: a unit counts as done once its shifts are there.
    """
    if gene_shifts is not None:
        store.create(gene_path(unit_id), _parquet(gene_shifts))
    data = _parquet(table.replace_schema_metadata({"skipped": json.dumps(skipped, sort_keys=True)}))
    store.create(unit_path(unit_id), data)
    return read_unit_record(store, unit_id, gene_shifts is not None)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_unit_record(store: Store, unit_id: str, gene_shifts: bool = False) -> UnitRecord:
    """Describe a committed unit from its files."""
    data = store.read_bytes(unit_path(unit_id))
    found = pq.ParquetFile(io.BytesIO(data))
    skipped = json.loads((found.schema_arrow.metadata or {}).get(b"skipped", b"{}"))
    sha256 = hashlib.sha256(data).hexdigest()
    record = UnitRecord(unit_id=unit_id, rows=found.metadata.num_rows, skipped=skipped, sha256=sha256)
    if not gene_shifts:
        return record
    data = store.read_bytes(gene_path(unit_id))
    rows = pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
    return record.model_copy(update={"gene_rows": rows, "gene_sha256": hashlib.sha256(data).hexdigest()})


def read_shifts(uri: str) -> tuple[ScanManifest, pl.DataFrame]:
    """Read a finished scan: the files that its manifest names, and no others, each with its hash checked.

    Raises
    ------
    UserError
        If there is no manifest, or if a file is missing or was changed.
    """
    store = Store(uri)
    manifest = ScanManifest.read(store)
    schema = shifts_schema(manifest.columns, manifest.states, manifest.labels, manifest.joint)
    tables = [_read_part(store, unit.path, unit.sha256, schema) for unit in manifest.units]
    frame = pl.from_arrow(pa.concat_tables([schema.empty_table(), *tables]))
    assert isinstance(frame, pl.DataFrame)
    return manifest, frame


def iter_gene_shifts(uri: str) -> Iterator[pl.DataFrame]:
    """Yield the gene shifts of a finished scan, one work unit at a time, each file with its hash checked.

    Raises
    ------
    UserError
        If the scan has none, or if a file is missing or was changed.
    """
    store = Store(uri)
    manifest = ScanManifest.read(store)
    if not manifest.gene_shifts:
        raise UserError(f"{store.uri}: this scan wrote no gene_shifts; its config needs the table [gene_shifts]")
    for unit in manifest.units:
        table = _read_part(store, gene_path(unit.unit_id), unit.gene_sha256, gene_schema(manifest.joint))
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        yield frame


def _read_part(store: Store, path: str, sha256: str | None, schema: pa.Schema) -> pa.Table:
    data = store.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{store.uri}/{path}: not the file that the manifest names (SHA-256 differs)")
    return pq.read_table(io.BytesIO(data), schema=schema)
