"""From a published corpus to masked, packed batches: tokens per second of the training loader; one JSON line.

    python -m benchmarks.loader [--cells 65536] [--threads 2] [--corpus URI]

Everything between the manifest and the model's inputs counts: planning the epoch, reading row groups (Parquet, zstd),
shuffling, cutting, masking, packing into int64 tensors. Nothing trains. Without `--corpus` one is generated: real
sparsity (`benchmarks.generated`), ranked and written as ingest does, in shards of 8,192 cells. `--epochs` passes are
timed one after the other; the first one is reported on its own, the median is over the others.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.generated import builtin_profiles, draw_cells, histogram
from corpus.genes import GeneTable
from corpus.manifest import Manifest
from corpus.reader import Cells, Corpus
from corpus.schema import OBS_COLUMNS
from corpus.shards import ranked_table, write_shard
from corpus.store import Store
from train.batches import BatchReader, plan_epoch
from train.masking import mask_tokens
from train.packing import pack

SHARD_CELLS = 8_192


def write_corpus(folder: Path, num_cells: int, umis: float) -> None:
    """Publish a corpus of generated cells."""
    store, rng = Store(folder), np.random.default_rng(0)
    names, shares = builtin_profiles()
    medians = rng.choice([0.5, 1.0, 1.5, 2.25], len(names))
    genes = GeneTable.own(names, names, ["protein_coding"] * len(names), medians, np.full(len(names), 10))
    genes.save(store)
    units = []
    for number, first in enumerate(range(0, num_cells, SHARD_CELLS)):
        size = min(SHARD_CELLS, num_cells - first)
        indptr, columns, counts = draw_cells(shares, size, umis=umis, seed=number)
        cells = pa.table(
            {
                "cell_id": [f"generated:{first + cell}" for cell in range(size)],
                "dataset_id": ["generated"] * size,
                **{name: pa.nulls(size, pa.string()) for name in OBS_COLUMNS},
                "n_counts": pa.array(np.add.reduceat(counts, indptr[:-1]).astype(np.uint32)),
                "n_genes": pa.array(np.diff(indptr).astype(np.uint32)),
                "mito_fraction": pa.array(np.zeros(size, np.float32)),
            }
        )
        counts_u4 = counts.astype(np.uint32)
        table = ranked_table(cells, indptr, genes.tokens[columns], counts_u4, genes.medians_by_token)
        source = {"dataset_id": "generated", "source": "generated", "source_sha256": "0" * 64}
        source |= {"start": first, "stop": first + size}
        units.append(write_shard(store, table, unit_id=f"{number:064x}", source=source, dropped={}))
    Manifest(
        number=1,
        plan="generated",
        genes=genes.path,
        genes_hash=genes.hash,
        obs_columns=list(OBS_COLUMNS),
        units=units,
    ).publish(store)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a published corpus; by default one is generated")
    parser.add_argument("--cells", type=int, default=65_536, help="of the generated corpus")
    parser.add_argument("--umis", type=float, default=2_000, help="median UMIs of a generated cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--token-budget", type=int, default=16_384)
    parser.add_argument("--max-length", type=int, default=2_048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        if options.corpus is None:
            write_corpus(Path(scratch) / "corpus", options.cells, options.umis)
        print(json.dumps(measure(Corpus(options.corpus or Path(scratch) / "corpus"), options)))


def measure(corpus: Corpus, options: argparse.Namespace) -> dict[str, object]:
    """Time whole epochs."""
    lengths = np.minimum(corpus.lengths, options.max_length)
    cells = np.flatnonzero(lengths)
    total = int(lengths.sum())
    genes = corpus.genes.tokens
    walls, cpus, masked = [], [], 0
    for epoch in range(options.epochs):

        def prepare(batch: Cells, epoch: int = epoch) -> tuple[int, int]:
            found = mask_tokens(batch, genes, seed=0, epoch=epoch)
            packed = pack(found.cells, options.max_length)
            rows = packed.rows_of(found.entries)
            return len(packed.tokens), len(rows)

        began, cpu = time.perf_counter(), time.process_time()
        plan = plan_epoch(
            lengths,
            corpus.row_group_offsets,
            cells,
            seed=0,
            epoch=epoch,
            world_size=1,
            token_budget=options.token_budget,
        )
        reader = BatchReader(
            corpus, plan, prepare, rank=0, max_length=options.max_length, ahead=8, threads=options.threads
        )
        sizes = np.array([step[0] for step in reader])
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - cpu)
        if sizes[:, 0].sum() != total:
            raise AssertionError(f"{sizes[:, 0].sum()} tokens came, {total} are in the corpus")
        masked += int(sizes[:, 1].sum())
    later = slice(1, None) if options.epochs > 1 else slice(None)
    return {
        "benchmark": "loader",
        "corpus": options.corpus or "generated",
        "cells": len(cells),
        "tokens_per_epoch": total,
        "length_histogram": histogram(lengths),
        "shards": len(corpus.manifest.units),
        "threads": options.threads,
        "token_budget": options.token_budget,
        "masked_share": round(masked / total / options.epochs, 4),
        "mtokens_per_s": round(total / statistics.median(walls[later]) / 1e6, 2),
        "first_epoch_mtokens_per_s": round(total / walls[0] / 1e6, 2),
        "best_mtokens_per_s": round(total / min(walls) / 1e6, 2),
        "cells_per_s": round(len(cells) / statistics.median(walls[later])),
        "cpu_ns_per_token": round(statistics.median(cpus[later]) / total * 1e9, 2),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("numpy", "numba", "pyarrow", "torch")},
    }


if __name__ == "__main__":
    main()
