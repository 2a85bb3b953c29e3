"""Memory of reading a unit does not grow with its source (R15)."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from corpus.species import load_genes
from corpus.store import Store
from ingest.limits import Limits
from ingest.pipeline import prepare
from ingest.plan import Inspection, cut
from ingest.sandbox import Reader
from ingest.settings import IngestSettings
from ingest.tasks import extract_unit, inspect_source

GENES, PER_CELL, UNIT_CELLS = 8_000, 1_000, 500


def peak() -> dict[str, Any]:
    """Highest resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"peak": int(line.split()[1]) * 1024}


def write_source(path: Path, num_cells: int) -> None:
    """Uncompressed, so that a page that is read is memory that is used."""
    rng = np.random.default_rng(0)
    pattern = np.sort(rng.permuted(np.tile(np.arange(GENES), (50, 1)), axis=1)[:, :PER_CELL], axis=1)
    indices = pattern[rng.integers(0, 50, num_cells)].astype(np.int32)
    counts = rng.geometric(0.5, indices.size).astype(np.float32)
    matrix = sp.csr_matrix((counts, indices.reshape(-1), np.arange(num_cells + 1) * PER_CELL), (num_cells, GENES))
    names = load_genes("mouse")["ensembl_id"].to_list()[:GENES]
    obs = pd.DataFrame(index=[f"c{i}" for i in range(num_cells)])
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(path)


def memory_of_a_unit(path: Path, out: Path) -> int:
    settings = IngestSettings.model_validate(
        {"sources": [{"uri": str(path), "dataset_id": "x"}], "entries_per_unit": UNIT_CELLS * PER_CELL}
    )
    names, _ = prepare(settings)
    reader = Reader(Limits())
    try:
        found = reader.call("x", inspect_source, settings.sources[0], names)
        units = cut([Inspection.model_validate(found)], settings, names.hash)
        for unit in (units[0], units[len(units) // 2], units[-1]):
            reader.call("x", extract_unit, unit, Store(out), names, [], settings.quality_control)
        return int(reader.call("x", peak)["peak"])
    finally:
        reader.stop()


@pytest.mark.parametrize("larger", [10, pytest.param(40, marks=pytest.mark.nightly)])
def test_memory_stays_flat_while_the_source_grows(tmp_path: Path, larger: int) -> None:
    write_source(tmp_path / "small.h5ad", 2_500)
    write_source(tmp_path / "large.h5ad", 2_500 * larger)
    small = memory_of_a_unit(tmp_path / "small.h5ad", tmp_path / "small")
    large = memory_of_a_unit(tmp_path / "large.h5ad", tmp_path / "large")
    grown = (tmp_path / "large.h5ad").stat().st_size - (tmp_path / "small.h5ad").stat().st_size
    print(f"{small / 1e6:.0f} MB, {large / 1e6:.0f} MB while the file grew by {grown / 1e6:.0f} MB")
    assert grown > 0.3 * small  # a reader that loads the file would fail what follows
    assert large < 1.1 * small
