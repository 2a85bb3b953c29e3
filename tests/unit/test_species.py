"""Gene and ortholog tables: what is shipped, what is refused, and that the build script makes them."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from corpus.errors import UserError
from corpus.resources import build
from corpus.species import GENES_SCHEMA, ORTHOLOGS_SCHEMA, RESOURCES, SPECIES, load_genes, load_orthologs

KNOWN = {
    "mouse": {
        "Gcg": "ENSMUSG00000000394",
        "Nkx2-1": "ENSMUSG00000001496",
        "Arx": "ENSMUSG00000035277",
        "Ins1": "ENSMUSG00000035804",
        "Ins2": "ENSMUSG00000000215",
        "mt-Co1": "ENSMUSG00000064351",
    },
    "human": {
        "GCG": "ENSG00000115263",
        "NKX2-1": "ENSG00000136352",
        "ARX": "ENSG00000004848",
        "INS": "ENSG00000254647",
        "MT-CO1": "ENSG00000198804",
    },
}
COUNTS = {"mouse": (78_317, 21_807), "human": (78_894, 20_120)}
ID_FORM = {"mouse": r"^ENSMUSG\d{11}$", "human": r"^ENSG\d{11}$"}


@pytest.mark.parametrize("species", SPECIES)
def test_shipped_genes(species: str) -> None:
    genes = load_genes(species)
    assert genes.schema == GENES_SCHEMA
    assert (genes.height, (genes["biotype"] == "protein_coding").sum()) == COUNTS[species]
    assert genes["ensembl_id"].is_unique().all()
    assert genes["ensembl_id"].to_list() == sorted(genes["ensembl_id"].to_list())
    assert genes["ensembl_id"].str.contains(ID_FORM[species]).all()
    assert sum(genes.null_count().row(0)) == 0
    named = dict(genes.select("symbol", "ensembl_id").iter_rows())
    assert {symbol: named[symbol] for symbol in KNOWN[species]} == KNOWN[species]


@pytest.mark.parametrize("species", SPECIES)
def test_mitochondrial_genes(species: str) -> None:
    genes = load_genes(species)
    mitochondrial = genes.filter("is_mitochondrial")
    kinds = dict(mitochondrial["biotype"].value_counts().iter_rows())
    assert kinds == {"protein_coding": 13, "Mt_tRNA": 22, "Mt_rRNA": 2}
    by_name = genes.filter(pl.col("symbol").str.contains("^(mt|MT)-"))
    assert by_name["ensembl_id"].to_list() == mitochondrial["ensembl_id"].to_list()


def test_shipped_orthologs() -> None:
    pairs = load_orthologs()
    assert pairs.schema == ORTHOLOGS_SCHEMA
    assert dict(pairs["homology_type"].value_counts().iter_rows()) == {
        "ortholog_one2one": 17_122,
        "ortholog_one2many": 2_941,
        "ortholog_many2many": 6_297,
    }
    assert not pairs.select("human_ensembl_id", "mouse_ensembl_id").is_duplicated().any()
    one = pairs.filter(homology_type="ortholog_one2one")
    assert one["human_ensembl_id"].is_unique().all()
    assert one["mouse_ensembl_id"].is_unique().all()
    many = pairs.with_columns(
        per_human=pl.len().over("human_ensembl_id"), per_mouse=pl.len().over("mouse_ensembl_id")
    ).filter(homology_type="ortholog_one2many")
    assert many.filter((pl.col("per_human") > 1) & (pl.col("per_mouse") > 1)).is_empty()
    assert many.filter(per_human=1, per_mouse=1)["human_symbol"].to_list() == ["MUC1"]
    found = pairs.filter(pl.col("human_symbol").is_in(["ARX", "INS"])).select("mouse_symbol", "homology_type")
    assert sorted(found.iter_rows()) == [
        ("Arx", "ortholog_one2one"),
        ("Ins1", "ortholog_one2many"),
        ("Ins2", "ortholog_one2many"),
    ]


@pytest.mark.parametrize("species", SPECIES)
def test_ortholog_symbols_are_those_of_the_gene_tables(species: str) -> None:
    genes = load_genes(species).select(pl.col("ensembl_id").alias(f"{species}_ensembl_id"), "symbol")
    joined = load_orthologs().join(genes, on=f"{species}_ensembl_id", how="left")
    known = joined.drop_nulls("symbol")
    assert joined.height - known.height <= 5  # ids retired since the export
    assert (known["symbol"] == known[f"{species}_symbol"]).all()


def _own_table(folder: Path, **changes: list[object]) -> Path:
    columns: dict[str, list[object]] = {
        "ensembl_id": ["ENSDARG00000000002", "ENSDARG00000000001"],
        "symbol": ["ccdc80", None],
        "biotype": ["protein_coding", "lncRNA"],
        "is_mitochondrial": [False, True],
        "note": ["x", "y"],
    } | changes
    path = folder / "own.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return path


@pytest.mark.parametrize("kind", [Path, str])
def test_own_species(tmp_path: Path, kind: Callable[[Path], str | Path]) -> None:
    genes = load_genes(kind(_own_table(tmp_path)))
    assert genes.rows() == [
        ("ENSDARG00000000001", "ENSDARG00000000001", "lncRNA", True),
        ("ENSDARG00000000002", "ccdc80", "protein_coding", False),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensembl_id": ["ENSDARG00000000001"] * 2}, "ensembl_id must be unique; ENSDARG00000000001 occurs"),
        ({"ensembl_id": ["ENSDARG00000000002", None]}, "row 1, column ensembl_id: None is empty"),
        (
            {"ensembl_id": ["ENSDARG00000000002", "ENSDARG00000000001.3"]},
            "row 1, .*ENSDARG00000000001.3' is a versioned id",
        ),
        ({"is_mitochondrial": [None, True]}, "row 0, column is_mitochondrial"),
        ({"is_mitochondrial": ["no", "yes"]}, "column is_mitochondrial is String, expected Boolean"),
    ],
)
def test_bad_gene_table_is_refused(tmp_path: Path, changes: dict[str, list[object]], message: str) -> None:
    path = _own_table(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_genes(path)
    assert str(path) in str(caught.value)


def test_missing_columns_and_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    pl.DataFrame({"ensembl_id": ["A"], "symbol": ["a"]}).write_parquet(path)
    with pytest.raises(UserError, match="no column biotype, is_mitochondrial"):
        load_genes(path)
    pl.DataFrame(schema=GENES_SCHEMA).write_parquet(path)
    with pytest.raises(UserError, match="has no rows"):
        load_genes(path)


def test_unknown_species_and_unreadable_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'zebrafish'.*human and mouse"):
        load_genes("zebrafish")
    with pytest.raises(UserError, match=r"absent\.parquet"):
        load_genes(tmp_path / "absent.parquet")
    text = tmp_path / "text.parquet"
    text.write_text("ensembl_id,symbol\n")
    with pytest.raises(UserError, match="not a Parquet table"):
        load_genes(text)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("homology_type", "one2one", "'one2one' is not in"),
        ("confidence", 7, "7 is not 0"),
        ("mouse_ensembl_id", "ENSMUSG00000035277.4", "versioned"),
        ("human_ensembl_id", None, "is empty"),
    ],
)
def test_bad_ortholog_table_is_refused(tmp_path: Path, column: str, value: object, message: str) -> None:
    path = tmp_path / "pairs.parquet"
    pairs = load_orthologs().head(3)
    pairs.write_parquet(path)
    assert load_orthologs(path).equals(pairs)
    changed = pl.Series(column, [value], dtype=ORTHOLOGS_SCHEMA[column])
    pairs.with_columns(pl.concat([changed, pairs[column].tail(2)]).alias(column)).write_parquet(path)
    with pytest.raises(UserError, match=message):
        load_orthologs(path)
    pl.concat([pairs, pairs.head(1)]).write_parquet(path)
    with pytest.raises(UserError, match="must be unique"):
        load_orthologs(path)


@pytest.mark.network
def test_build_makes_the_shipped_tables(tmp_path: Path) -> None:
    assert build.main(["--out", str(tmp_path / "first")]) == 0
    first = {path.name: path for path in (tmp_path / "first").iterdir()}
    assert set(first) == {path.name for path in RESOURCES.glob("*.parquet")}
    for name, path in first.items():
        assert pl.read_parquet(path).equals(pl.read_parquet(RESOURCES / name)), name
    assert build.main(["--out", str(tmp_path / "second")]) == 0
    for name, path in first.items():
        assert path.read_bytes() == (tmp_path / "second" / name).read_bytes(), name
