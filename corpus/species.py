"""Gene and ortholog tables: the shipped ones (mouse, human) and the user's own. No network, ever."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from corpus.errors import UserError

RESOURCES = Path(__file__).parent / "resources"
SPECIES = ("human", "mouse")
"""Species whose gene table is shipped; any other is given as the path of a Parquet table."""

GENES_FILE = "genes_{species}.parquet"
ORTHOLOGS_FILE = "orthologs_human_mouse.parquet"

GENES_SCHEMA = pl.Schema(
    {"ensembl_id": pl.String, "symbol": pl.String, "biotype": pl.String, "is_mitochondrial": pl.Boolean}
)
ORTHOLOGS_SCHEMA = pl.Schema(
    {
        "human_ensembl_id": pl.String,
        "human_symbol": pl.String,
        "mouse_ensembl_id": pl.String,
        "mouse_symbol": pl.String,
        "homology_type": pl.String,
        "confidence": pl.Int8,
    }
)
HOMOLOGY_TYPES = ("ortholog_one2one", "ortholog_one2many", "ortholog_many2many")
"""Ensembl Compara's classes; one2many says nothing of which side has the many."""

_VERSIONED = r"^(?i:ENS[A-Z]*G\d{11})\.\d+$"


def load_genes(species: str | Path) -> pl.DataFrame:
    """Load the gene table of a species.

    Parameters
    ----------
    species
        `"mouse"`, `"human"`, or the path of a Parquet table with the columns of `GENES_SCHEMA`
        (further columns are ignored).

    Returns
    -------
    One row per gene in Ensembl id order: `ensembl_id` (without version), `symbol` (the id where a gene has none; not
    unique), `biotype`, `is_mitochondrial` (encoded on the mitochondrial chromosome; nuclear genes of mitochondrial
    proteins are not).

    Raises
    ------
    UserError
        For an unknown species or a table that lacks a column or holds nulls, versioned ids or an id twice.
    """
    if species in SPECIES:
        path = RESOURCES / GENES_FILE.format(species=species)
    elif isinstance(species, Path) or Path(species).suffix:
        path = Path(species)
    else:
        raise UserError(
            f"species {species!r}: there are shipped gene tables for {' and '.join(SPECIES)}; for another species give "
            f"the path of a Parquet table with columns {', '.join(GENES_SCHEMA.names())}"
        )
    return check_genes(_read(path), str(path))


def load_orthologs(path: str | Path | None = None) -> pl.DataFrame:
    """Load the human-mouse orthologs: the shipped table, or the user's own Parquet table of the same columns.

    Returns
    -------
    One row per pair, ordered by human then mouse Ensembl id, with the columns of `ORTHOLOGS_SCHEMA`: `homology_type` is
    one of `HOMOLOGY_TYPES`, `confidence` is Ensembl's (1 high, 0 low).

    Raises
    ------
    UserError
        If the table lacks a column or holds nulls, versioned ids, unknown homology types or a pair twice.
    """
    path = RESOURCES / ORTHOLOGS_FILE if path is None else Path(path)
    return check_orthologs(_read(path), str(path))


def check_genes(table: pl.DataFrame, where: str) -> pl.DataFrame:
    """Check a gene table and put it in order; `where` names it in errors. See `load_genes`."""
    table = _conform(table, GENES_SCHEMA, where)
    _refuse_versions(table, ["ensembl_id"], where)
    _refuse_repeats(table, ["ensembl_id"], where)
    return table.sort("ensembl_id")


def check_orthologs(table: pl.DataFrame, where: str) -> pl.DataFrame:
    """Check an ortholog table and put it in order; `where` names it in errors. See `load_orthologs`."""
    table = _conform(table, ORTHOLOGS_SCHEMA, where)
    pair = ["human_ensembl_id", "mouse_ensembl_id"]
    _refuse_versions(table, pair, where)
    _refuse_repeats(table, pair, where)
    _refuse(table, ~pl.col("homology_type").is_in(HOMOLOGY_TYPES), "homology_type", f"not in {HOMOLOGY_TYPES}", where)
    _refuse(table, ~pl.col("confidence").is_in([0, 1]), "confidence", "not 0 (low) or 1 (high)", where)
    return table.sort(pair)


def _read(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except OSError as error:
        raise UserError(f"{path}: cannot read this table ({error})") from error
    except PolarsError as error:
        raise UserError(f"{path}: not a Parquet table ({error})") from error


def _conform(table: pl.DataFrame, schema: pl.Schema, where: str) -> pl.DataFrame:
    """Select the schema's columns with its types; symbols fall back to ids, any other null is refused."""
    missing = [name for name in schema.names() if name not in table.columns]
    if missing:
        raise UserError(f"{where}: no column {', '.join(missing)}; expected {', '.join(schema.names())}")
    if table.is_empty():
        raise UserError(f"{where}: the table has no rows")
    for name, dtype in schema.items():
        try:
            table = table.with_columns(pl.col(name).cast(dtype))
        except PolarsError as error:
            raise UserError(f"{where}: column {name} is {table.schema[name]}, expected {dtype}") from error
    for name in schema.names():
        if name.endswith("symbol"):
            key = name.removesuffix("symbol") + "ensembl_id"
            table = table.with_columns(pl.col(name).fill_null(pl.col(key)))
    for name in schema.names():
        _refuse(table, pl.col(name).is_null(), name, "empty", where)
    return table.select(schema.names())


def _refuse_versions(table: pl.DataFrame, columns: Sequence[str], where: str) -> None:
    for name in columns:
        _refuse(table, pl.col(name).str.contains(_VERSIONED), name, "a versioned id: strip the suffix", where)


def _refuse_repeats(table: pl.DataFrame, key: Sequence[str], where: str) -> None:
    repeated = table.select(key).is_duplicated()
    if repeated.any():
        first = table.select(key).row(int(repeated.arg_max() or 0))
        raise UserError(f"{where}: {', '.join(key)} must be unique; {', '.join(first)} occurs more than once")


def _refuse(table: pl.DataFrame, bad: pl.Expr, column: str, what: str, where: str) -> None:
    rows = table.select(bad.arg_true()).to_series()
    if len(rows):
        value = table[column][int(rows[0])]
        raise UserError(f"{where}: row {rows[0]}, column {column}: {value!r} is {what} ({len(rows)} such rows)")
