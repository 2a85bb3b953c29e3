"""Generated h5ad files whose sparsity is real: every cell is a multinomial draw from an expression profile.

The profile decides how many genes a cell of a given depth shows. `mca_profiles` takes profiles of cell types from a
table of summed counts (genes x types, such as the Mouse Cell Atlas sums that scRef carries); `builtin_profiles` needs
no file: 60 types whose gene levels are lognormal (sigma 2.6 around a shared level of sigma 2.2), which gives cells of
2,000 UMIs about 1,000 genes.
"""

import zipfile
from itertools import pairwise
from pathlib import Path

import h5py
import numba
import numpy as np
import pandas as pd
from anndata.io import write_elem

from corpus.species import load_genes

_BLOCK_CELLS = 8192


def builtin_profiles(num_types: int = 60, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ensembl ids of 35,000 mouse genes, and float64[types, genes] shares that sum to 1 per type."""
    rng = np.random.default_rng(seed)
    names = sorted(rng.choice(load_genes("mouse")["ensembl_id"].to_numpy(), 35_000, replace=False).tolist())
    shared = rng.normal(0.0, 2.2, len(names))
    levels = np.exp(shared + rng.normal(0.0, 1.4, (num_types, len(names))))
    return names, levels / levels.sum(axis=1, keepdims=True)


def mca_profiles(table: Path) -> tuple[list[str], np.ndarray]:
    """Symbols and shares from a table of summed counts, genes x types (tab separated, may be zipped)."""
    if table.suffix == ".zip":
        with zipfile.ZipFile(table) as archive, archive.open(archive.namelist()[0]) as stream:
            sums = pd.read_csv(stream, sep="\t", index_col=0)
    else:
        sums = pd.read_csv(table, sep="\t", index_col=0)
    sums = sums[~sums.index.duplicated()].fillna(0)
    sums = sums.loc[:, sums.sum() > 0]
    return sums.index.astype(str).tolist(), (sums / sums.sum()).to_numpy().T


def draw_umis(rng: np.random.Generator, cells: int, median: float, sigma: float) -> np.ndarray:
    """UMIs of each cell: lognormal, at least 30, at most 19,000; int64[cells]."""
    return np.clip(rng.lognormal(np.log(median), sigma, cells), 30, 19_000).astype(np.int64)


@numba.njit(cache=True)
def _draw(accept, other, types, umis, seed, indptr, indices, data):  # type: ignore[no-untyped-def]
    """Draw each UMI's gene by the alias method of Walker (1977) and Vose (1991); write sorted sparse rows."""
    np.random.seed(seed)  # noqa: NPY002 - numba's own generator
    num_genes = accept.shape[1]
    dense = np.zeros(num_genes, np.int32)
    end = 0
    for cell in range(len(types)):
        kind = types[cell]
        seen = np.empty(umis[cell], np.int32)
        number = 0
        for _ in range(umis[cell]):
            place = np.random.random() * num_genes  # noqa: NPY002
            gene = np.int64(place)
            if place - gene >= accept[kind, gene]:
                gene = other[kind, gene]
            if dense[gene] == 0:
                seen[number] = gene
                number += 1
            dense[gene] += 1
        found = np.sort(seen[:number])
        for gene in found:
            indices[end], data[end] = gene, dense[gene]
            dense[gene] = 0
            end += 1
        indptr[cell + 1] = end


def _alias_table(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = shares * len(shares)
    accept, other = np.ones(len(shares)), np.arange(len(shares), dtype=np.int32)
    small, large = list(np.flatnonzero(scaled < 1)), list(np.flatnonzero(scaled >= 1))
    while small and large:
        low, high = small.pop(), large[-1]
        accept[low], other[low] = scaled[low], high
        scaled[high] -= 1 - scaled[low]
        if scaled[high] < 1:
            small.append(large.pop())
    return accept, other


def draw_cells(
    shares: np.ndarray, num_cells: int, *, umis: float = 1500.0, sigma: float = 0.7, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sparse rows in memory: indptr int64[cells + 1], genes int32 (ascending within a cell), counts float32."""
    rng = np.random.default_rng(seed)
    tables = [_alias_table(row) for row in shares]
    depth = draw_umis(rng, num_cells, umis, sigma)
    indptr = np.zeros(num_cells + 1, np.int64)
    genes, counts = np.empty(depth.sum(), np.int32), np.empty(depth.sum(), np.float32)
    types = rng.integers(0, len(shares), num_cells)
    accept, other = np.stack([t[0] for t in tables]), np.stack([t[1] for t in tables])
    _draw(accept, other, types, depth, seed, indptr, genes, counts)
    return indptr, genes[: indptr[-1]].copy(), counts[: indptr[-1]].copy()


def write_h5ad(
    path: Path,
    num_cells: int,
    names: list[str],
    shares: np.ndarray,
    *,
    umis: float = 1500.0,
    sigma: float = 0.7,
    seed: int = 0,
    level: int = 4,
) -> np.ndarray:
    """Write a gzip h5ad as anndata does (float32 values, int32 indices, h5py's own chunk size), in bounded memory.

    Parameters
    ----------
    names, shares
        Genes, and float64[types, genes].
    umis, sigma
        Median and log standard deviation of the UMIs per cell.
    level
        Gzip level; 4 is what `AnnData.write_h5ad(compression="gzip")` gives.

    Returns
    -------
    int64[cells]: non-zero counts of each cell.
    """
    rng = np.random.default_rng(seed)
    tables = [_alias_table(row) for row in shares]
    accept, other = np.stack([t[0] for t in tables]), np.stack([t[1] for t in tables])
    types = rng.integers(0, len(shares), num_cells)
    depth = draw_umis(rng, num_cells, umis, sigma)
    lengths, total = np.zeros(num_cells, np.int64), 0
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        index = pd.Index([f"cell{seed}-{i}" for i in range(num_cells)])
        kinds = pd.Categorical.from_codes(types, [f"type {i}" for i in range(len(shares))])
        write_elem(file, "obs", pd.DataFrame({"cell_type": kinds}, index=index))
        write_elem(file, "var", pd.DataFrame(index=pd.Index(names)))
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array([num_cells, len(names)])
        options = {"compression": "gzip", "compression_opts": level, "maxshape": (None,), "chunks": True}
        guess = (max(int(depth.sum() * 0.5), 1),)  # only its magnitude matters: h5py derives the chunk size from it
        values = group.create_dataset("data", shape=guess, dtype=np.float32, **options)
        columns = group.create_dataset("indices", shape=guess, dtype=np.int32, **options)
        for start in range(0, num_cells, _BLOCK_CELLS):
            block = slice(start, min(start + _BLOCK_CELLS, num_cells))
            room = int(depth[block].sum())
            indptr = np.zeros(block.stop - start + 1, np.int64)
            indices, data = np.empty(room, np.int32), np.empty(room, np.float32)
            _draw(accept, other, types[block], depth[block], seed * 100_003 + start, indptr, indices, data)
            end = total + int(indptr[-1])
            for dataset, part in ((values, data), (columns, indices)):
                if end > dataset.shape[0]:
                    dataset.resize((end,))
                dataset[total:end] = part[: indptr[-1]]
            lengths[block], total = np.diff(indptr), end
        values.resize((total,))
        columns.resize((total,))
        group.create_dataset("indptr", data=np.concatenate([[0], np.cumsum(lengths)]))
    return lengths


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Cells per range of non-zero counts, for the record beside a speed."""
    edges = [0, 128, 256, 512, 1024, 2048, 4096, 1 << 62]
    found = np.histogram(lengths, edges)[0]
    names = [f"<{high}" if low == 0 else f">={low}" if high == 1 << 62 else f"{low}-{high - 1}"
             for low, high in pairwise(edges)]  # fmt: skip
    return {name: int(number) for name, number in zip(names, found, strict=True)}
