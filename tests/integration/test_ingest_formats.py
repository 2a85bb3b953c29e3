"""One corpus from the same matrix in every format: the same cells each time, and sources left as they were."""

import hashlib
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from corpus.manifest import Manifest
from corpus.store import Store
from ingest.pipeline import run
from ingest.settings import IngestSettings, QualityControl
from ingest.verify import verify
from tests.factories_sources import WRITERS, make_counts

pytestmark = pytest.mark.ray

FORMATS = ("h5ad_raw", "h5ad_csc", "loom", "tenx_v2", "tenx_v3", "mtx_v3", "mtx_atlas", "text_tsv", "text_cells")


def checksums(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_every_format_gives_the_same_cells_in_one_corpus(tmp_path: Path, ray_cluster: object) -> None:
    counts = make_counts(num_cells=30)
    rows = ["uri,dataset_id,features,labels.assay"]
    for name in FORMATS:
        home = tmp_path / "sources" / name
        home.mkdir(parents=True)
        source = WRITERS[name](home, counts)
        rows.append(f"{source.uri},{name},{source.features or ''},{name} assay")
    empty = tmp_path / "sources" / "empty"
    empty.mkdir()
    rows.append(f"{WRITERS['mtx_v2'](empty, make_counts(num_cells=0)).uri},empty,,")
    (tmp_path / "sources.csv").write_text("\n".join(rows) + "\n")
    before = checksums(tmp_path / "sources")

    settings = IngestSettings(
        sources_table=str(tmp_path / "sources.csv"),
        entries_per_unit=1_000,
        quality_control=QualityControl(max_counts=None, drop_duplicates=False),
    )
    out = tmp_path / "corpus"
    report = run(settings, str(out))

    assert checksums(tmp_path / "sources") == before
    assert [str(check) for check in verify(str(out)) if check.faults] == []
    assert report.datasets["empty"].cells_read == 0
    shards = [out / unit.shard for unit in Manifest.read(Store(out)).units]
    cells = pl.concat([pl.DataFrame(pq.read_table(shard)) for shard in shards])
    first = cells.filter(dataset_id=FORMATS[0])
    assert len(first) > 20
    for name in FORMATS:
        own = cells.filter(dataset_id=name)
        assert own["cell_id"].to_list() == [text.replace(FORMATS[0], name) for text in first["cell_id"]]
        for column in ("tokens", "counts", "n_counts", "n_genes", "mito_fraction", "length"):
            assert own[column].equals(first[column]), (name, column)
        assert own["assay"].unique().to_list() == [f"{name} assay"]
        assert own["cell_type"].is_null().all() == (not name.startswith(("h5ad", "loom")))
        dataset = report.datasets[name]
        assert dataset.cells_read == 30
        assert dataset.cells_kept + sum(dataset.dropped.values()) == 30
        assert dataset.mapping.mapped == 40
    steps = report.datasets["tenx_v3"].mapping.steps
    assert steps == {"ensembl_id": 40, "not_gene_expression": 1, "other_species": 1}
    assert report.datasets["tenx_v2"].mapping.steps == {"ensembl_id": 40, "other_species": 3}
