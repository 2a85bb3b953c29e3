"""Small h5ad sources with every oddity that an ingest must account for, and a slow reading of what they hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from corpus.species import load_genes
from ingest.settings import IngestSettings


@dataclass(frozen=True)
class Toy:
    """What was written, as plain Python."""

    path: Path
    dataset_id: str
    barcodes: list[str]
    features: list[str]
    matrix: list[list[int]]
    cell_types: list[str | None]


def toy_features() -> list[str]:
    """Current ids, versioned ids, symbols, an id twice under two names, spike-ins, and names that nobody knows."""
    genes = load_genes("mouse")
    coding = genes.filter((genes["biotype"] == "protein_coding") & ~genes["is_mitochondrial"])
    unique = coding.filter(coding["symbol"].is_unique() & (coding["symbol"] != coding["ensembl_id"]))[::400]
    ids, symbols = unique["ensembl_id"].to_list(), unique["symbol"].to_list()
    mito = genes.filter(genes["is_mitochondrial"])["ensembl_id"].to_list()[:3]
    names = [*ids[:15], *(f"{name}.7" for name in ids[15:25]), *symbols[25:40], *mito]
    # The first gene once more by its symbol, and the sixteenth once more without its version.
    return [*names, symbols[0], ids[15], "ERCC-00002", "NotAGene1", "NotAGene2"]


def write_toy(
    folder: Path, name: str = "toy", *, num_cells: int = 150, seed: int = 0, layout: str = "csr", depth: float = 1.0
) -> Toy:
    """Write `folder/name.h5ad`.

    Among the cells: one without counts, one with too few genes, one with too many counts, one that is mostly
    mitochondrial, one with a single far outlier, labels that are missing.
    """
    rng = np.random.default_rng(seed)
    features = toy_features()
    rates = rng.gamma(0.7, 6.0 * depth, len(features))
    counts = rng.poisson(rates * rng.gamma(6.0, 1 / 6.0, (num_cells, 1)))
    counts[3] = 0
    counts[5, 5:] = 0
    counts[8] *= 3_000
    counts[9, features.index(next(name for name in features if name.startswith("ENSMUSG00000064")))] += 4_000
    kinds = [None if i % 11 == 0 else ("alpha", "beta", "delta")[i % 3] for i in range(num_cells)]
    barcodes = [f"{name}-{i:04d}" for i in range(num_cells)]
    matrix = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout](counts.astype(np.float32))
    table = anndata.AnnData(
        X=matrix,
        obs=pd.DataFrame(
            {"celltype": pd.Categorical(kinds), "donor_id": [f"d{i % 2}" for i in range(num_cells)]}, index=barcodes
        ),
        var=pd.DataFrame(index=features),
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.h5ad"
    table.write_h5ad(path, compression="gzip")
    return Toy(path, name, barcodes, features, counts.tolist(), kinds)


def toy_settings(toys: Iterable[Toy], **changes: object) -> IngestSettings:
    """Settings that ingest these sources."""
    sources = [{"uri": str(toy.path), "obs": {"cell_type": "celltype"}} for toy in toys]
    return IngestSettings.model_validate({"sources": sources, **changes})


@dataclass(frozen=True)
class SlowCorpus:
    """What a corpus of toys must hold."""

    cells: dict[str, dict[str, object]]
    dropped: dict[str, dict[str, int]]
    medians: dict[str, float]


def slow_ingest(toys: Iterable[Toy]) -> SlowCorpus:
    """Ingest with the default rules, cell by cell, in plain Python; shares only the gene table with the product."""
    genes = load_genes("mouse")
    ids = set(genes["ensembl_id"])
    mitochondrial = set(genes.filter(genes["is_mitochondrial"])["ensembl_id"])
    by_symbol: dict[str, list[str]] = {}
    for symbol, gene in zip(genes["symbol"], genes["ensembl_id"], strict=True):
        by_symbol.setdefault(symbol, []).append(gene)
    kept: dict[str, dict[str, object]] = {}
    dropped: dict[str, dict[str, int]] = {}
    for toy in toys:
        cells = []
        for barcode, kind, row in zip(toy.barcodes, toy.cell_types, toy.matrix, strict=True):
            total, found = 0, {}
            for name, count in zip(toy.features, row, strict=True):
                if count == 0 or name.startswith("ERCC-"):
                    continue
                total += count
                gene = name.split(".")[0]
                if gene not in ids:
                    gene = by_symbol.get(name, [""])[0]
                if gene:
                    found[gene] = found.get(gene, 0) + count
            mito = sum(count for gene, count in found.items() if gene in mitochondrial)
            cells.append(
                {"id": f"{toy.dataset_id}:{barcode}", "type": kind, "total": total, "mito": mito, "genes": found}
            )
        reasons: dict[str, int] = {}
        window = _window([cell["total"] for cell in cells if cell["total"]])
        mito_window = _window([cell["mito"] for cell in cells if cell["total"]])
        for cell in cells:
            reason = None
            if cell["total"] == 0:
                reason = "no_counts"
            elif cell["total"] > 20_000:
                reason = "above_max_counts"
            elif len(cell["genes"]) < 7:
                reason = "below_min_genes"
            elif not window[0] <= cell["total"] <= window[1]:
                reason = "counts_outside_sd"
            elif not mito_window[0] <= cell["mito"] <= mito_window[1]:
                reason = "mito_counts_outside_sd"
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
            else:
                kept[cell["id"]] = cell
        dropped[toy.dataset_id] = reasons
    values: dict[str, list[float]] = {}
    for cell in kept.values():
        for gene, count in cell["genes"].items():
            values.setdefault(gene, []).append(count / cell["total"] * 10_000)
    medians = {gene: float(np.median(of_gene)) for gene, of_gene in values.items()}
    for cell in kept.values():
        cell["order"] = sorted(cell["genes"], key=lambda gene: (-(cell["genes"][gene] / medians[gene]), gene))
    return SlowCorpus(kept, dropped, medians)


def _window(values: list[int]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    return mean - 3 * deviation, mean + 3 * deviation
