"""Copies of shards: verified, made once, bounded. A local folder stands for a remote one: a `Store` is a `Store`."""

import threading
from pathlib import Path

import numpy as np
import pytest

from corpus.cache import ShardCache
from corpus.errors import RunError
from corpus.reader import Corpus
from corpus.store import Store
from tests.factories import write_corpus


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    return Corpus(write_corpus(tmp_path / "corpus", num_cells=60))


def copies(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.parquet")}


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.part"))


def test_a_copy_holds_the_bytes_and_has_their_hash_for_a_name(corpus, tmp_path):
    cache, unit = ShardCache(tmp_path / "cache", 10**9), corpus.manifest.units[0]
    with cache.open(corpus.store, unit) as copy:
        assert copy.read() == corpus.store.read_bytes(unit.shard)
    assert copies(cache.folder) == {unit.sha256}
    corpus.store.remove(unit.shard)
    with cache.open(corpus.store, unit) as copy:
        assert copy.size() == unit.size_bytes


def test_a_damaged_shard_is_named_and_leaves_nothing_behind(corpus, tmp_path):
    cache, unit = ShardCache(tmp_path / "cache", 10**9), corpus.manifest.units[1]
    path = corpus.store.local_path(unit.shard)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=f"{unit.shard}: damaged or changed"):
        cache.open(corpus.store, unit)
    assert not copies(cache.folder)
    assert not leftovers(cache.folder)


def test_many_readers_make_one_copy(corpus, tmp_path, monkeypatch):
    unit, opened, found = corpus.manifest.units[0], [], []
    original = Store.open
    monkeypatch.setattr(Store, "open", lambda self, path: opened.append(path) or original(self, path))

    def read() -> None:
        with ShardCache(tmp_path / "cache", 10**9).open(corpus.store, unit) as copy:
            found.append(len(copy.read()))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [unit.size_bytes] * 8
    assert opened == [unit.shard]


def test_what_was_read_longest_ago_makes_room_and_stays_readable_where_it_is_open(corpus, tmp_path):
    first, second, third = corpus.manifest.units
    cache = ShardCache(tmp_path / "cache", first.size_bytes + second.size_bytes + third.size_bytes - 1)
    with cache.open(corpus.store, first) as reading:
        cache.open(corpus.store, second).close()
        cache.open(corpus.store, first).close()
        cache.open(corpus.store, third).close()
        assert copies(cache.folder) == {first.sha256, third.sha256}
        cache.open(corpus.store, second).close()
        assert copies(cache.folder) == {third.sha256, second.sha256}
        assert len(reading.read()) == first.size_bytes


def test_of_a_corpus_that_does_not_fit_the_first_shards_are_copied(corpus, tmp_path):
    units = corpus.manifest.units
    room = units[0].size_bytes + units[1].size_bytes
    assert ShardCache(tmp_path, room).choose(units) == {units[0].sha256, units[1].sha256}
    assert ShardCache(tmp_path, room - 1).choose(units) == {units[0].sha256}


def test_a_local_corpus_is_not_copied(corpus, tmp_path):
    cached = Corpus(corpus.store.uri, cache=ShardCache(tmp_path / "cache", 10**9))
    assert len(cached.read_cells(np.arange(60))) == 60
    assert not (tmp_path / "cache").exists()
