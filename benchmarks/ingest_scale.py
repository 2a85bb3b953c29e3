"""A million generated cells through the whole ingest; one JSON line with the projected time and cost of 21 million.

    python -m benchmarks.ingest_scale [--cells 1000000] [--files 8] [--umis 800] [--work FOLDER]

Files are written to disk one by one, in bounded memory (about 2.5 bytes per non-zero count), and removed at the end.
The projection assumes that time grows with the number of non-zero counts (the mouse corpus: 21,332,982 cells of 576 in
the mean, estimated from the sizes of its published files), that stages keep all cores busy, and the price given.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.generated import histogram, write_h5ad
from benchmarks.ingest import ensembl_profiles, machine, timed_run
from corpus.manifest import Manifest
from corpus.store import Store
from ingest.distribute import cluster
from ingest.settings import IngestSettings, Mapping, Source

CORPUS_CELLS, CORPUS_NNZ_PER_CELL = 21_332_982, 576


class Peaks(threading.Thread):
    """Watches resident memory, less what is shared, of this process and of each of its descendants."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.driver_mb = self.worker_mb = 0.0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Look twice a second."""
        me = psutil.Process()
        while not self._stop_asked.wait(0.5):
            self.driver_mb = max(self.driver_mb, _own_mb(me))
            for process in me.children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        self.worker_mb = max(self.worker_mb, _own_mb(process))
                except psutil.Error:
                    continue

    def stop(self) -> None:
        """Look no more."""
        self._stop_asked.set()
        self.join()


def _own_mb(process: psutil.Process) -> float:
    memory = process.memory_info()
    return (memory.rss - memory.shared) / 1e6


def main() -> None:
    """Generate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--umis", type=float, default=800.0, help="median UMIs of a cell")
    parser.add_argument("--level", type=int, default=4, help="gzip level")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--entries-per-unit", type=int, default=32_000_000)
    parser.add_argument("--usd-per-core-hour", type=float, default=0.05)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.work))
    try:
        print(json.dumps(measure(options, folder)))
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one run."""
    names, shares = ensembl_profiles(options.profile)
    parts, start = [], time.perf_counter()
    for i in range(options.files):
        path = folder / f"part{i}.h5ad"
        cells = options.cells // options.files
        parts.append(write_h5ad(path, cells, names, shares, umis=options.umis, seed=i, level=options.level))
    lengths, generated = np.concatenate(parts), time.perf_counter() - start
    source_bytes = sum(path.stat().st_size for path in folder.glob("*.h5ad"))
    settings = IngestSettings(
        sources=[Source(uri=str(folder / "part*.h5ad"))],
        mapping=Mapping(min_count_coverage=0),
        entries_per_unit=options.entries_per_unit,
    )
    with cluster():
        peaks = Peaks()
        peaks.start()
        found = timed_run(settings, folder / "corpus")
        peaks.stop()
    manifest = Manifest.read(Store(folder / "corpus"))
    nnz, facts = int(lengths.sum()), machine()
    core_hours = CORPUS_CELLS * CORPUS_NNZ_PER_CELL / nnz * found["cpu_seconds"] / 3600
    return {
        "benchmark": "ingest_scale",
        "cells": len(lengths),
        "cells_kept": manifest.num_cells,
        "nnz": nnz,
        "nnz_per_cell": round(nnz / len(lengths)),
        "nnz_histogram": histogram(lengths),
        "files": options.files,
        "units": len(manifest.units),
        "source_gb": round(source_bytes / 1e9, 2),
        "shards_gb": round(sum(unit.size_bytes for unit in manifest.units) / 1e9, 2),
        "seconds_generating": round(generated),
        "seconds": round(found["seconds"], 1),
        "cpu_seconds": round(found["cpu_seconds"], 1),
        "cells_per_s": round(len(lengths) / found["seconds"]),
        "million_nnz_per_s": round(nnz / found["seconds"] / 1e6, 2),
        "cpu_ns_per_nnz": round(found["cpu_seconds"] / nnz * 1e9, 1),
        "stages": found["stages"],
        "peak_worker_mb": round(peaks.worker_mb),
        "peak_driver_mb": round(peaks.driver_mb),
        "projected_core_hours_21_million": round(core_hours, 2),
        "projected_hours_on_16_cores": round(core_hours / 16, 2),
        "projected_usd": round(core_hours * options.usd_per_core_hour, 2),
        "usd_per_core_hour": options.usd_per_core_hour,
        **facts,
    }


if __name__ == "__main__":
    main()
