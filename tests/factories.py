"""Small valid inputs, built in code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from corpus.genes import GeneTable
from corpus.manifest import Manifest
from corpus.schema import OBS_COLUMNS
from corpus.shards import ranked_table, write_shard
from corpus.store import Store


def make_genes(num_genes: int, rng: np.random.Generator, imported: bool = False) -> GeneTable:
    """Mouse-like ids in order; medians repeat, so that ties occur. An imported table names no numbers of cells."""
    return GeneTable.own(
        [f"ENSMUSG{number:011d}" for number in range(1, num_genes + 1)],
        [f"Gene{number}" for number in range(1, num_genes + 1)],
        ["protein_coding"] * num_genes,
        rng.choice([0.5, 1.0, 1.5, 2.25], num_genes),
        np.full(num_genes, 0 if imported else 10),
    )


def write_corpus(
    folder: Path,
    *,
    num_cells: int = 60,
    num_genes: int = 80,
    lengths: tuple[int, int] = (5, 40),
    num_shards: int = 3,
    cell_types: Sequence[str] = ("alpha", "beta", "delta"),
    donors: Sequence[str] = ("d1", "d2", "d3"),
    separable: bool = True,
    seed: int = 0,
    report: str = "",
    imported: bool = False,
) -> Path:
    """Write a published corpus of random cells.

    Labels go round: cell i has type `i % len(cell_types)` and donor `i // len(cell_types) % len(donors)`. With
    `separable`, each type has its own block of highly counted genes, so that a classifier can learn the types. The
    manifest names `report`, which the caller writes.
    """
    rng = np.random.default_rng(seed)
    store = Store(folder)
    genes = make_genes(num_genes, rng, imported)
    genes.save(store)
    units = []
    for shard, numbers in enumerate(np.array_split(np.arange(num_cells), num_shards)):
        chosen, counts = [], []
        for number in numbers:
            picked = np.sort(rng.choice(num_genes, rng.integers(lengths[0], lengths[1] + 1), replace=False))
            count = rng.geometric(0.4, len(picked))
            if separable:
                kind = number % len(cell_types)
                count = np.where(picked * len(cell_types) // num_genes == kind, count * 20, count)
            chosen.append(genes.tokens[picked])
            counts.append(count.astype(np.uint32))
        indptr = np.concatenate([[0], np.cumsum([len(picked) for picked in chosen])])
        labels = {
            "cell_type": [cell_types[number % len(cell_types)] for number in numbers],
            "donor_id": [donors[number // len(cell_types) % len(donors)] for number in numbers] if donors else None,
            "organism": ["Mus musculus"] * len(numbers),
        }
        totals = np.add.reduceat(np.concatenate(counts), indptr[:-1])
        cells = pa.table(
            {
                "cell_id": [f"toy:cell{number}" for number in numbers],
                "dataset_id": ["toy"] * len(numbers),
                **{name: pa.array(labels.get(name) or [None] * len(numbers), pa.string()) for name in OBS_COLUMNS},
                "n_counts": pa.array(totals, pa.uint32()),
                "n_genes": pa.array(np.diff(indptr), pa.uint32()),
                "mito_fraction": pa.array(np.zeros(len(numbers)), pa.float32()),
            }
        )
        table = ranked_table(cells, indptr, np.concatenate(chosen), np.concatenate(counts), genes.medians_by_token)
        source = {
            "dataset_id": "toy",
            "source": "toy.h5ad",
            "source_sha256": "0" * 64,
            "start": int(numbers[0]),
            "stop": int(numbers[-1]) + 1,
        }
        units.append(write_shard(store, table, unit_id=f"{shard:064x}", source=source, dropped={}))
    Manifest(
        number=1,
        plan="toy",
        report=report,
        genes=genes.path,
        genes_hash=genes.hash,
        obs_columns=list(OBS_COLUMNS),
        units=units,
    ).publish(store)
    return folder
