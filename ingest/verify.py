"""The invariants of a published corpus, checked from its files alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.hashing import digest_stream, digest_table
from corpus.manifest import Manifest, Unit
from corpus.rank import rank_violation
from corpus.schema import OBS_COLUMNS, shard_schema
from corpus.store import Store


@dataclass(frozen=True)
class Check:
    """One invariant: its name, and what breaks it (empty if it holds)."""

    name: str
    faults: list[str]

    def __str__(self) -> str:
        if not self.faults:
            return f"ok      {self.name}"
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"FAILED  {self.name}: {self.faults[0]}{more}"


_SHARD_CHECKS = {
    "hash": "every shard is there, with the size and SHA-256 of the manifest",
    "record": "every unit's record is there and says what the manifest says",
    "schema": "every shard has the columns and types of the format",
    "content": "the decoded columns have the content hash of the manifest",
    "rows": "rows, row groups and tokens add up to the manifest, and kept and dropped cells to the rows read",
    "lengths": "lengths agree with tokens and counts",
    "rank": "tokens are unique genes of the vocabulary, in rank order for the stored counts and medians",
}


def verify(uri: str) -> Iterator[Check]:
    """Check the newest manifest of a corpus.

    Yields
    ------
    One check per invariant, after all shards were read one at a time.

    Raises
    ------
    UserError
        If there is no manifest, or its gene table is broken.
    """
    store = Store(uri)
    manifest = Manifest.read(store)
    genes = GeneTable.load(store, manifest.genes)
    yield Check("the gene table has the hash of the manifest", _differ(genes.hash, manifest.genes_hash))
    faults: dict[str, list[str]] = {name: [] for name in _SHARD_CHECKS}
    ids: list[pl.Series] = []
    for unit in manifest.units:
        for name, text in _check_shard(store, unit, manifest, genes, ids):
            faults[name].append(f"{unit.shard}: {text}")
    for name, text in _SHARD_CHECKS.items():
        yield Check(text, faults[name])
    every = pl.concat(ids) if ids else pl.Series([], dtype=pl.String)
    repeated = every.filter(every.is_duplicated()).unique().sort().to_list()
    yield Check("cell ids are unique in the corpus", repeated)
    name = f"the corpus holds the {manifest.num_cells:,} cells of the manifest"
    yield Check(name, _differ(len(every), manifest.num_cells))


def _differ(found: object, expected: object) -> list[str]:
    return [] if found == expected else [f"found {found}, expected {expected}"]


def _check_shard(
    store: Store, unit: Unit, manifest: Manifest, genes: GeneTable, ids: list[pl.Series]
) -> Iterator[tuple[str, str]]:
    """Yield (check, fault) of one shard; add its cell ids to `ids`."""
    try:
        recorded = Unit.model_validate_json(store.read_bytes(unit.record))
        if recorded.model_dump(exclude={"source"}) != unit.model_dump(exclude={"source"}):
            yield "record", f"{unit.record} differs from the manifest"
    except (UserError, ValueError) as error:
        yield "record", str(error)
    try:
        size = store.size(unit.shard)
        with store.open(unit.shard) as stream:
            sha256 = digest_stream(stream)
            if (size, sha256) != (unit.size_bytes, unit.sha256):
                yield "hash", f"{size} bytes with SHA-256 {sha256}, expected {unit.size_bytes} with {unit.sha256}"
            stream.seek(0)
            file = pq.ParquetFile(stream)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            groups = [rows for rows in groups if rows]  # pyarrow gives a shard without cells one empty row group
            table = file.read().combine_chunks()
    except (OSError, UserError, pa.ArrowException) as error:
        yield "hash", str(error)
        return
    extra = [name for name in manifest.obs_columns if name not in OBS_COLUMNS]
    if not table.schema.equals(shard_schema(extra)):
        yield "schema", f"columns are {', '.join(f'{field.name} {field.type}' for field in table.schema)}"
        return
    ids.append(pl.Series(table["cell_id"]))
    if digest_table(table) != unit.content_sha256:
        yield "content", "the content differs"
    if unit.rows + sum(unit.dropped.values()) != unit.stop - unit.start:
        yield "rows", f"{unit.rows} kept and {sum(unit.dropped.values())} dropped of {unit.stop - unit.start} read"
    found = (table.num_rows, groups)
    if found != (unit.rows, unit.row_groups):
        yield "rows", f"rows and row groups are {found}, expected {(unit.rows, unit.row_groups)}"
    if table.num_rows:
        yield from _check_cells(table, unit, genes)


def _check_cells(table: pa.Table, unit: Unit, genes: GeneTable) -> Iterator[tuple[str, str]]:
    tokens, counts = table["tokens"].chunk(0), table["counts"].chunk(0)
    lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
    if not np.array_equal(lengths, table["length"].to_numpy()) or not np.array_equal(
        lengths, counts.value_lengths().to_numpy(zero_copy_only=False)
    ):
        yield "lengths", "length, tokens and counts disagree"
        return
    if int(lengths.sum()) != unit.num_tokens:
        yield "rows", f"{int(lengths.sum())} tokens, expected {unit.num_tokens}"
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    flat_tokens, flat_counts = tokens.flatten().to_numpy(), counts.flatten().to_numpy()
    violation = rank_violation(indptr, flat_tokens, flat_counts, genes.medians_by_token)
    if violation is not None:
        cell, reason = violation
        yield "rank", f"cell {table['cell_id'][cell].as_py()!r}: {reason}"
    below = np.add.reduceat(flat_counts.astype(np.int64), indptr[:-1]) > table["n_counts"].to_numpy()
    if (lengths == 0).any() or below.any():
        yield "lengths", "a cell has no tokens, or fewer counts in all (n_counts) than on its tokens"
