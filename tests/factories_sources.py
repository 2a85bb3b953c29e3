"""One small count matrix, written in every format that `ingest` reads."""

import gzip
import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from corpus.species import load_genes
from ingest.settings import Source


@dataclass(frozen=True)
class Counts:
    """Cells x genes, with names and labels; the last gene's symbol is that of the one before."""

    values: np.ndarray
    ids: list[str]
    symbols: list[str]
    cells: list[str]
    obs: pd.DataFrame = field(repr=False)


def make_counts(num_cells: int = 23, num_genes: int = 40, seed: int = 0) -> Counts:
    """Real mouse genes, so that names map; some cells and genes without any count."""
    rng = np.random.default_rng(seed)
    genes = load_genes("mouse").filter(biotype="protein_coding").unique("symbol", keep="none", maintain_order=True)
    genes = genes.filter(~genes["symbol"].str.contains("[^A-Za-z0-9-]"))[:: len(genes) // num_genes][:num_genes]
    values = rng.poisson(0.6, (num_cells, num_genes)) * rng.integers(1, 30, (1, num_genes))
    if num_cells > 3 and num_genes > 3:
        values[2] = 0
        values[:, 3] = 0
        values[-1, -1] = 70_000  # more than 16 bits
    cells = [f"{'ACGT'[i % 4] * 3}{i:05d}-1" for i in range(num_cells)]
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["alpha", "beta"], num_cells)),
            "batch": rng.integers(0, 3, num_cells),
            "score": rng.integers(0, 4, num_cells) / 2,
            "donor_id": [f"d{i % 2}" for i in range(num_cells)],
        },
        index=cells,
    )
    if num_cells > 1:
        obs.loc[cells[1], "score"] = np.nan
    return Counts(values, genes["ensembl_id"].to_list(), genes["symbol"].to_list(), cells, obs)


Writer = Callable[[Path, Counts], Source]


def _h5ad(path: Path, counts: Counts, **parts: Any) -> Source:
    var = pd.DataFrame({"gene_ids": counts.ids}, index=pd.Index(counts.symbols, dtype=object))
    data = anndata.AnnData(
        parts.pop("x", counts.values.astype(np.float32)), obs=counts.obs.copy(), var=parts.pop("var", var)
    )
    for name, value in parts.items():
        setattr(data, name, value)
    data.write_h5ad(path)
    return Source(uri=str(path))


def h5ad_csr(folder: Path, counts: Counts) -> Source:
    return _h5ad(folder / "csr.h5ad", counts, x=sp.csr_matrix(counts.values.astype(np.float32)))


def h5ad_csc(folder: Path, counts: Counts) -> Source:
    return _h5ad(folder / "csc.h5ad", counts, x=sp.csc_matrix(counts.values.astype(np.int64)))


def h5ad_dense(folder: Path, counts: Counts) -> Source:
    return _h5ad(folder / "dense.h5ad", counts, x=counts.values.astype(np.float64))


def h5ad_raw(folder: Path, counts: Counts) -> Source:
    """The counts in raw.X; X is logarithms of fewer genes."""
    data = anndata.AnnData(
        sp.csr_matrix(counts.values.astype(np.float32)), obs=counts.obs.copy(), var=pd.DataFrame(index=counts.ids)
    )
    few = data[:, ::3].copy()
    few.X = np.log1p(few.X.toarray())
    few.raw = data
    few.write_h5ad(folder / "raw.h5ad")
    return Source(uri=str(folder / "raw.h5ad"))


def h5ad_layer(folder: Path, counts: Counts) -> Source:
    x = np.log1p(counts.values)
    source = _h5ad(folder / "layer.h5ad", counts, x=x, layers={"umis": sp.csc_matrix(counts.values)})
    return source.model_copy(update={"layer": "umis"})


def h5ad_old(folder: Path, counts: Counts) -> Source:
    """As anndata wrote before 0.7: compound tables, categories behind references, other attributes."""
    path = folder / "old.h5ad"
    matrix = sp.csr_matrix(counts.values.astype(np.float32))
    obs = np.zeros(len(counts.cells), [("index", "S20"), ("cell_type", "S20"), ("batch", "<i4"), ("score", "<f8")])
    obs["index"] = counts.cells
    for name in ("cell_type", "batch", "score"):
        obs[name] = counts.obs[name].to_numpy()
    var = np.array([(name,) for name in counts.ids], [("index", "S20")])
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", matrix.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        file["obs"], file["var"] = obs, var
    return Source(uri=str(path))


def loom(folder: Path, counts: Counts) -> Source:
    path = folder / "x.loom"
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        size = counts.values.T.shape
        chunks = None if 0 in size else (min(7, size[0]), min(5, size[1]))
        file.create_dataset("matrix", data=counts.values.T.astype(np.float32), chunks=chunks)
        file.create_group("layers")
        rows, columns = file.create_group("row_attrs"), file.create_group("col_attrs")
        rows.create_dataset("Gene", data=np.array(counts.symbols, object), dtype=text)
        rows.create_dataset("Accession", data=np.array(counts.ids, object), dtype=text)
        columns.create_dataset("CellID", data=np.array(counts.cells, object), dtype=text)
        for name in ("cell_type", "donor_id"):
            columns.create_dataset(name, data=counts.obs[name].astype(str).to_numpy(object), dtype=text)
        for name in ("batch", "score"):
            columns.create_dataset(name, data=counts.obs[name].to_numpy())
    return Source(uri=str(path))


def _tenx_group(group: h5py.Group, values: np.ndarray, cells: Sequence[str]) -> None:
    matrix = sp.csc_matrix(values.T.astype(np.int32))
    group["barcodes"] = np.array(cells, "S20")
    group["shape"] = np.array(matrix.shape, np.int32)
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(matrix, name).astype(np.int64)


def tenx_v2(folder: Path, counts: Counts) -> Source:
    """Two genomes; the human one has other cells."""
    path = folder / "v2.h5"
    with h5py.File(path, "w") as file:
        for genome, values, cells, ids, symbols in (
            ("hg19", np.full((5, 3), 9), list("vwxyz"), [f"ENSG{i:011d}" for i in range(3)], ["A", "B", "C"]),
            ("mm10", counts.values, counts.cells, counts.ids, counts.symbols),
        ):
            group = file.create_group(genome)
            _tenx_group(group, values, cells)
            group["genes"], group["gene_names"] = np.array(ids, "S30"), np.array(symbols, "S30")
    return Source(uri=str(path))


ANTIBODY = 500


def _with_foreign(counts: Counts) -> tuple[np.ndarray, list[str], list[str], list[str], list[str]]:
    """Counts with an antibody before and a human gene after the genes: (values, ids, names, types, genomes)."""
    extra = np.full((len(counts.cells), 1), ANTIBODY)
    values = np.hstack([extra, counts.values, extra])
    ids = ["CD4_TotalSeqB", *(f"mm10___{name}" for name in counts.ids), "GRCh38_ENSG00000198851"]
    names = ["CD4", *(f"mm10___{name}" for name in counts.symbols), "GRCh38_CD3E"]
    types = ["Antibody Capture", *["Gene Expression"] * (len(counts.ids) + 1)]
    return values, ids, names, types, ["", *["mm10"] * len(counts.ids), "GRCh38"]


def tenx_v3(folder: Path, counts: Counts) -> Source:
    path = folder / "v3.h5"
    values, ids, names, types, genomes = _with_foreign(counts)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        _tenx_group(group, values, counts.cells)
        features = group.create_group("features")
        for name, column in {"id": ids, "name": names, "feature_type": types, "genome": genomes}.items():
            features[name] = np.array(column, "S40")
    return Source(uri=str(path))


def _write_mtx(path: Path, matrix: np.ndarray, *, packed: bool) -> None:
    sink = io.BytesIO()
    scipy.io.mmwrite(sink, sp.coo_matrix(matrix), field="integer", comment="made\n by a test")
    write_maybe_gz(path, sink.getvalue(), packed=packed)


def write_maybe_gz(path: Path, data: bytes, *, packed: bool) -> None:
    path.write_bytes(gzip.compress(data, mtime=0) if packed else data)


def _table(*columns: Sequence[str], separator: str = "\t") -> bytes:
    return "".join(separator.join(row) + "\n" for row in zip(*columns, strict=True)).encode()


def mtx_v3(folder: Path, counts: Counts) -> Source:
    home = folder / "sample" / "filtered_feature_bc_matrix"
    home.mkdir(parents=True)
    values, ids, names, types, _ = _with_foreign(counts)
    _write_mtx(home / "matrix.mtx.gz", values.T, packed=True)
    write_maybe_gz(home / "features.tsv.gz", _table(ids, names, types), packed=True)
    write_maybe_gz(home / "barcodes.tsv.gz", _table(counts.cells), packed=True)
    return Source(uri=str(home))


def mtx_v2(folder: Path, counts: Counts) -> Source:
    home = folder / "old" / "mm10"
    home.mkdir(parents=True)
    _write_mtx(home / "matrix.mtx", counts.values.T, packed=False)
    (home / "genes.tsv").write_bytes(_table(counts.ids, counts.symbols))
    (home / "barcodes.tsv").write_bytes(_table(counts.cells))
    return Source(uri=str(home) + "/")


def mtx_atlas(folder: Path, counts: Counts) -> Source:
    """Single Cell Expression Atlas: ids twice in `.mtx_rows`, and several experiments in one folder."""
    stem = "E-MTAB-1.aggregated_filtered_counts.mtx"
    _write_mtx(folder / stem, counts.values.T, packed=False)
    (folder / f"{stem}_rows").write_bytes(_table(counts.ids, counts.ids))
    (folder / f"{stem}_cols").write_bytes(_table(counts.cells, counts.cells))
    return Source(uri=str(folder / stem))


def mtx_portal(folder: Path, counts: Counts) -> Source:
    """Single Cell Portal: cells x genes under names of the study's own, symbols alone."""
    home = folder / "SCP1"
    home.mkdir()
    _write_mtx(home / "raw_umis.mtx.gz", counts.values, packed=True)
    (home / "gene_list.tsv").write_bytes(_table(counts.symbols))
    (home / "raw_umis_barcodes.tsv").write_bytes(_table(counts.cells))
    return Source(uri=str(home), features="gene_list.tsv")


def text_tsv(folder: Path, counts: Counts) -> Source:
    """genes x cells, gzip."""
    frame = pd.DataFrame(counts.values.T, index=pd.Index(counts.symbols, name="gene"), columns=counts.cells)
    frame.to_csv(folder / "dge.txt.gz", sep="\t")
    return Source(uri=str(folder / "dge.txt.gz"))


def text_r(folder: Path, counts: Counts) -> Source:
    """genes x cells as R's write.table does: quoted, the header one field short."""
    quoted = [" ".join(f'"{name}"' for name in counts.cells)]
    for name, row in zip(counts.symbols, counts.values.T, strict=True):
        quoted.append(" ".join([f'"{name}"', *map(str, row)]))
    (folder / "r.txt").write_text("\n".join(quoted) + "\n")
    return Source(uri=str(folder / "r.txt"))


def text_cells(folder: Path, counts: Counts) -> Source:
    """cells x genes, zipped, Windows line ends, numbers as 3.0, a byte order mark, no last line end."""
    text = pd.DataFrame(counts.values.astype(float), index=counts.cells, columns=counts.ids).to_csv(
        lineterminator="\r\n"
    )
    with zipfile.ZipFile(folder / "cells.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/cells.csv", b"\xef\xbb\xbf" + text.rstrip().encode())
        archive.writestr("__MACOSX/._cells.csv", b"junk")
    return Source(uri=str(folder / "cells.csv.zip"))


def text_semicolon(folder: Path, counts: Counts) -> Source:
    frame = pd.DataFrame(counts.values.T, index=counts.symbols, columns=counts.cells)
    frame.to_csv(folder / "s.csv", sep=";")
    return Source(uri=str(folder / "s.csv"))


def rdata(folder: Path, counts: Counts) -> Source:
    """As PanglaoDB: one dgCMatrix `sm`, named by symbol and versioned id."""
    matrix = sp.csc_matrix(counts.values.T.astype(float))
    names = [f"{symbol}_{name}.7" for symbol, name in zip(counts.symbols, counts.ids, strict=True)]
    (folder / "SRA1_SRS1.sparse.RData").write_bytes(
        gzip.compress(r_workspace("sm", matrix, names, counts.cells), mtime=0)
    )
    return Source(uri=str(folder / "SRA1_SRS1.sparse.RData"))


WRITERS: dict[str, Writer] = {
    writer.__name__: writer
    for writer in (
        h5ad_csr, h5ad_csc, h5ad_dense, h5ad_raw, h5ad_layer, h5ad_old, loom, tenx_v2, tenx_v3, mtx_v3, mtx_v2,
        mtx_atlas, mtx_portal, text_tsv, text_r, text_cells, text_semicolon, rdata,
    )
}  # fmt: skip
LABELLED = ("h5ad_csr", "h5ad_csc", "h5ad_dense", "h5ad_raw", "h5ad_layer", "h5ad_old", "loom")


def r_workspace(name: str, matrix: sp.csc_matrix, rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """What R's `save` writes for a `dgCMatrix`: serialisation version 2, big-endian ("R Internals", section 1.8)."""

    def integers(values: Sequence[int] | np.ndarray) -> bytes:
        return struct.pack(">ii", 13, len(values)) + np.asarray(values, ">i4").tobytes()

    def character(text: str) -> bytes:
        return struct.pack(">ii", 0x00040009, len(text)) + text.encode("ascii")

    def strings(values: Sequence[str]) -> bytes:
        return struct.pack(">ii", 16, len(values)) + b"".join(map(character, values))

    def pairs(items: dict[str, bytes]) -> bytes:
        tagged = (struct.pack(">ii", 2 | 0x400, 1) + character(tag) + value for tag, value in items.items())
        return b"".join(tagged) + struct.pack(">i", 254)

    kind = struct.pack(">iii", 16 | 0x200, 1, 0x00040009) + struct.pack(">i", 9) + b"dgCMatrix"
    kind += pairs({"package": strings(["Matrix"])})
    slots = {
        "i": integers(matrix.indices),
        "p": integers(matrix.indptr),
        "Dim": integers(matrix.shape),
        "Dimnames": struct.pack(">ii", 19, 2) + strings(rows) + strings(columns),
        "x": struct.pack(">ii", 14, matrix.nnz) + matrix.data.astype(">f8").tobytes(),
        "factors": struct.pack(">ii", 19, 0),
        "class": kind,
    }
    # An S4 object: type 25, the object bit, attributes, and the S4 bit among the levels.
    value = struct.pack(">i", 25 | 0x100 | 0x200 | (16 << 12)) + pairs(slots)
    return b"RDX2\nX\n" + struct.pack(">iii", 2, 0x00030600, 0x00020300) + pairs({name: value})
