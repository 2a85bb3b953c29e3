"""Ingest end to end, from gzip h5ad to a published corpus, against the reference algorithm, in one run; one JSON line.

    python -m benchmarks.ingest [--cells 100000] [--profile mca_combined_umi_sums.txt.zip] [--work FOLDER]

Ours is everything that `python -m ingest run` does: hashing the source, reading, mapping, quality control, exact
medians, ranking, shards, manifest; with Ray already up, since a cluster stays up for many files. Verification comes
after the clock has stopped. The reference (Theodoris et al. 2023; the mouse model is the same) is written here from its
description: chunks of 512 cells made dense, normalised by total and median, each cell sorted on its own, Python lists,
one Arrow table. It is given our medians, does no quality control, works on the first cells of the same file with one
process as published, and the ratio is of its cells/s to ours.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from anndata.io import sparse_dataset

from benchmarks.generated import builtin_profiles, histogram, mca_profiles, write_h5ad
from corpus.reader import Corpus
from corpus.species import load_genes
from ingest.distribute import cluster
from ingest.pipeline import run
from ingest.settings import IngestSettings, Mapping, Source
from ingest.verify import verify

CHUNK_CELLS, MAX_LENGTH, TARGET = 512, 2048, 10_000


def reference(
    path: Path, median_of: dict[str, float], token_of: dict[str, int], cells: int, out: Path
) -> dict[str, Any]:
    """Tokenise the first cells of an h5ad file with Ensembl ids; return wall and CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    with h5py.File(path) as file:
        names = [name.decode() for name in file["var"][file["var"].attrs["_index"]][:]]
        matrix = sparse_dataset(file["X"])
        columns = np.array([i for i, name in enumerate(names) if name in median_of])
        medians = np.array([median_of[names[i]] for i in columns])
        tokens = np.array([token_of[names[i]] for i in columns])
        token_lists: list[list[int]] = []
        for first in range(0, cells, CHUNK_CELLS):
            block = matrix[first : min(first + CHUNK_CELLS, cells)].toarray()[:, columns]
            normalised = block / block.sum(axis=1, keepdims=True) * TARGET / medians
            for cell in normalised:
                present = np.flatnonzero(cell)
                order = np.argsort(-cell[present])
                token_lists.append(tokens[present[order]][:MAX_LENGTH].tolist())
        table = pa.table({"input_ids": token_lists, "length": [len(row) for row in token_lists]})
        pq.write_table(table, out)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def agreement(corpus: Corpus, path: Path, cells: int) -> dict[str, float]:
    """Compare the reference's tokens with ours, where both have the cell.

    It sorts float32 ratios by an unstable sort, so genes of (nearly) equal value may be swapped.

    Returns
    -------
    Shares of cells with the same genes, with the same order, and with an order along which our float64 keys never rise
    by more than 1e-5 of their size.
    """
    rows = pq.read_table(path)["input_ids"].to_pylist()
    names = corpus.obs(["cell_id"])["cell_id"].to_list()
    place = {int(name.rpartition("-")[2]): i for i, name in enumerate(names)}
    both = [i for i in range(cells) if i in place]
    ours = corpus.read_cells(np.array([place[i] for i in both]), counts=True)
    medians, found = corpus.genes.medians_by_token, np.zeros(3)
    for k, i in enumerate(both):
        part = slice(ours.offsets[k], ours.offsets[k + 1])
        count_of = dict(zip(ours.tokens[part].tolist(), ours.counts[part].tolist(), strict=True))
        theirs = np.array(rows[i])
        if set(count_of) >= set(rows[i]) and len(theirs) == min(len(count_of), MAX_LENGTH):
            keys = np.array([count_of[token] for token in rows[i]]) / medians[theirs]
            same = (ours.tokens[part][:MAX_LENGTH] == theirs).all()
            found += [1, same, (keys[1:] <= keys[:-1] * (1 + 1e-5)).all()]
    shares = (found / max(len(both), 1)).round(4).tolist()
    return dict(zip(("same_genes", "same_order", "same_order_but_for_ties"), shares, strict=True))


def cpu_seconds() -> float:
    """CPU time of this process and of all its descendants that still live (Ray's workers among them)."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def timed_run(settings: IngestSettings, out: Path) -> dict[str, Any]:
    """One ingest run: wall seconds, CPU seconds, and seconds by stage as its progress lines give them."""
    lines = io.StringIO()
    start, cpu = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stderr(lines):
        run(settings, str(out))
    seconds, used = time.perf_counter() - start, cpu_seconds() - cpu
    stages = dict(re.findall(r"^(\w+) .*, ([\d.]+) s$", lines.getvalue(), re.MULTILINE))
    stages = {name: float(value) for name, value in stages.items()}
    stages["other"] = round(seconds - sum(stages.values()), 1)
    return {"seconds": seconds, "cpu_seconds": used, "stages": stages}


def best_of(rounds: int, work: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The round with the fewest seconds."""
    return min((work(i) for i in range(rounds)), key=lambda facts: facts["seconds"])


def ensembl_profiles(profile: Path | None) -> tuple[list[str], np.ndarray]:
    """Profiles over unique Ensembl ids."""
    names, shares = builtin_profiles() if profile is None else mca_profiles(profile)
    if profile is None:
        return names, shares
    genes = load_genes("mouse")
    id_of = dict(zip(genes["symbol"], genes["ensembl_id"], strict=True))
    known = [i for i, name in enumerate(names) if name in id_of]
    ids = [id_of[names[i]] for i in known]
    shares = shares[:, known]
    return ids, shares / shares.sum(axis=1, keepdims=True)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("ray", "numpy", "numba", "pyarrow", "polars", "h5py")
    try:
        isal = version("isal")
    except ImportError:
        isal = None
    return {
        "cores": multiprocessing.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "isal": isal,
    }


def main() -> None:
    """Generate, run both, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--reference-cells", type=int, default=8_192)
    parser.add_argument("--umis", type=float, default=1500.0, help="median UMIs of a cell")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--entries-per-unit", type=int, default=16_000_000)
    parser.add_argument("--work", type=Path, help="folder for the files; a temporary one by default")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.work))
    try:
        print(json.dumps(measure(options, folder)))
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one run."""
    names, shares = ensembl_profiles(options.profile)
    path = folder / "cells.h5ad"
    lengths = write_h5ad(path, options.cells, names, shares, umis=options.umis)
    write_h5ad(folder / "warm.h5ad", 600, names, shares, umis=options.umis, seed=1)
    mapping = Mapping(min_count_coverage=0)
    settings = IngestSettings(
        sources=[Source(uri=str(path))], mapping=mapping, entries_per_unit=options.entries_per_unit
    )
    warm = settings.model_copy(update={"sources": [Source(uri=str(folder / "warm.h5ad"))], "entries_per_unit": 200_000})
    with cluster():
        run(warm, str(folder / "warm"))  # workers started, kernels compiled or loaded from their cache

        def one(i: int) -> dict[str, Any]:
            shutil.rmtree(folder / "corpus", ignore_errors=True)
            return timed_run(settings, folder / "corpus")

        ours = best_of(options.rounds, one)
    corpus = Corpus(folder / "corpus")
    genes = corpus.genes
    ids = list(genes.ensembl_ids)
    median_of = {name: float(genes.medians_by_token[genes.token_of[name]]) for name in ids}
    token_of = {name: genes.token_of[name] for name in ids}
    cells = min(options.reference_cells, options.cells)
    theirs = best_of(
        options.rounds,
        lambda _: reference(path, median_of, token_of, cells, folder / "reference.parquet"),
    )
    faults = [str(check) for check in verify(str(folder / "corpus")) if check.faults]
    nnz = int(lengths.sum())
    ours_rate, their_rate = options.cells / ours["seconds"], cells / theirs["seconds"]
    return {
        "benchmark": "ingest",
        "cells": options.cells,
        "cells_kept": len(corpus),
        "nnz": nnz,
        "nnz_histogram": histogram(lengths),
        "profile": "builtin" if options.profile is None else options.profile.name,
        "source_bytes_per_nnz": round(path.stat().st_size / nnz, 2),
        "seconds": round(ours["seconds"], 2),
        "million_nnz_per_s": round(nnz / ours["seconds"] / 1e6, 2),
        "cells_per_s": round(ours_rate),
        "cpu_ns_per_nnz": round(ours["cpu_seconds"] / nnz * 1e9, 1),
        "stages": ours["stages"],
        "reference_cells": cells,
        "reference_cells_per_s": round(their_rate),
        "reference_million_nnz_per_s": round(float(lengths[:cells].sum()) / theirs["seconds"] / 1e6, 2),
        "ratio": round(ours_rate / their_rate, 2),
        # On a machine that others use as well: CPU seconds per cell, the reference's over ours.
        "cpu_ratio": round(theirs["cpu_seconds"] / cells / (ours["cpu_seconds"] / options.cells), 2),
        "reference_agreement": agreement(corpus, folder / "reference.parquet", cells),
        "verify_faults": faults,
        "rounds": options.rounds,
        **machine(),
    }


if __name__ == "__main__":
    main()
