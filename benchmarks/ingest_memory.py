"""Peak memory of a work unit's process against the size of its file; one JSON line per file size.

    python -m benchmarks.ingest_memory [--cells 4000] [--factors 1 2 5 10]

Every unit has the same number of entries; only the file around it grows. Each stage runs in a process of its own, as a
Ray worker would, on the middle unit of the file; the peak is the kernel's (VmHWM), less what the imports and the name
tables alone take.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generated import builtin_profiles, write_h5ad
from corpus.genes import GeneTable
from corpus.species import load_genes
from corpus.store import Store
from ingest import stages
from ingest.plan import Inspection, WorkUnit, cut, expand, inspect, load_mapper
from ingest.quality import Bounds, Selection
from ingest.settings import IngestSettings, Mapping, Source


def peak_mb() -> float:
    """High-water mark of this process's resident memory."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1024


def in_process(unit: WorkUnit, settings: IngestSettings, out: str, queue: Any) -> None:
    """Extract, count and publish one unit; put the peaks after each."""
    genes = load_genes("mouse")
    mapper = load_mapper(settings.mapping, genes)
    store, peaks = Store(out), {"before": peak_mb()}
    stages.extract(unit, store, genes, mapper, [], settings.quality_control)
    peaks["extract"] = peak_mb()
    selection = Selection(Bounds(counts=None, mito_counts=None), settings.quality_control)
    stages.histogram(unit, selection, store, np.ones(len(genes), bool))
    peaks["count"] = peak_mb()
    ids = genes["ensembl_id"].to_list()[:60_000]
    table = GeneTable.own(ids, ids, ids, np.ones(len(ids)), np.ones(len(ids), np.uint64))
    token_of_row = np.array([table.token_of.get(name, -1) for name in genes["ensembl_id"]], np.int32)
    stages.publish(unit, selection, store, table, token_of_row, stages.obs_names([]))
    peaks["publish"] = peak_mb()
    queue.put(peaks)


def inspected(source: Source, settings: IngestSettings, queue: Any) -> None:
    """Peak of looking at the file: hash, names of all cells, shape."""
    mapper = load_mapper(settings.mapping, load_genes("mouse"))
    before = peak_mb()
    queue.put((inspect(source, mapper, settings.mapping).model_dump(mode="json"), before, peak_mb()))


def fresh(work: Any, *arguments: Any) -> Any:
    """Run `work` in a new process and return what it puts into its queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(*arguments, queue))
    process.start()
    result = queue.get(timeout=600)
    process.join()
    return result


def main() -> None:
    """One line per file size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=4000, help="cells of the smallest file: one unit")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.work))
    names, shares = builtin_profiles()
    try:
        for factor in options.factors:
            path = folder / f"{factor}.h5ad"
            lengths = write_h5ad(path, options.cells * factor, names, shares, level=1)
            per_unit = int(lengths.sum() / factor * 1.01)
            settings = IngestSettings(
                sources=[Source(uri=str(path))],
                entries_per_unit=per_unit,
                mapping=Mapping(min_gene_coverage=0, min_count_coverage=0),
            )
            source = expand(settings.sources)[0]
            facts, idle, looked = fresh(inspected, source, settings)
            units = cut([Inspection.model_validate(facts)], settings, "")
            unit = units[len(units) // 2]
            peaks = fresh(in_process, unit, settings, str(folder / f"corpus{factor}"))
            before = peaks.pop("before")
            line = {
                "benchmark": "ingest_memory",
                "file_factor": factor,
                "file_mb": round(path.stat().st_size / 1e6, 1),
                "units": len(units),
                "cells_of_unit": unit.stop - unit.start,
                "nnz_of_unit": int(lengths[unit.start : unit.stop].sum()),
                "inspect_mb": round(looked - idle, 1),
                **{f"{name}_mb": round(value - before, 1) for name, value in peaks.items()},
                "process_mb": round(peaks["publish"], 1),
            }
            print(json.dumps(line), flush=True)
            path.unlink()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
