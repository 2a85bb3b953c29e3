"""A small text matrix and the corpus that it has always given: medians, tokens in rank order, contents (T9)."""

import json
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from corpus.genes import GeneTable
from corpus.manifest import Manifest
from corpus.store import Store
from ingest.pipeline import run
from tests.factories_ingest import toy_settings

pytestmark = pytest.mark.ray

# Of the decoded columns, whatever wrote the Parquet file: a corpus of today must read as one of yesterday.
CONTENT = "439eff687712cd9277c71e1a067ff5343de507d4124ffe0882bf0d6b3a755909"


def test_the_corpus_is_the_golden_one(repository: Path, tmp_path: Path, ray_cluster: object) -> None:
    golden = repository / "tests" / "golden"
    expected = json.loads((golden / "expected.json").read_text())
    run(toy_settings([], sources=[{"uri": str(golden / "counts.csv"), "dataset_id": "golden"}]), str(tmp_path / "out"))
    store = Store(tmp_path / "out")
    manifest = Manifest.read(store)
    genes = GeneTable.load(store, manifest.genes)
    assert (
        dict(zip(genes.ensembl_ids, genes.medians_by_token[genes.tokens].tolist(), strict=True)) == expected["medians"]
    )
    token_of = dict(zip(genes.ensembl_ids, genes.tokens.tolist(), strict=True))
    assert token_of == {gene: 4 + i for i, gene in enumerate(sorted(expected["medians"]))}
    (unit,) = manifest.units
    found = pl.DataFrame(pq.read_table(tmp_path / "out" / unit.shard, columns=["cell_id", "tokens"]))
    assert dict(found.iter_rows()) == {
        cell: [token_of[gene] for gene in order] for cell, order in expected["cells"].items()
    }
    assert unit.content_sha256 == CONTENT
