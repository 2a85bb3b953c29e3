"""Create-if-absent on a local folder: one winner, whole files, nothing overwritten (R3)."""

import copy
import errno
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus.errors import RunError, UserError
from corpus.manifest import Manifest
from corpus.store import Store, match_uris, split_uri

RACERS = 16


def manifest(writer: int) -> Manifest:
    """One that differs between writers."""
    return Manifest(number=1, plan=f"{writer:064x}", genes="genes/x.parquet", genes_hash="x", obs_columns=[], units=[])


def race(worker: Callable[[int], None], starter: type) -> None:
    racers = [starter(target=worker, args=(number,)) for number in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()


def test_of_sixteen_racing_threads_one_creates(tmp_path: Path) -> None:
    store, barrier, won = Store(tmp_path), threading.Barrier(RACERS), []

    def create(number: int) -> None:
        barrier.wait()
        if store.create("a/b", f"writer {number}".encode() * 1_000):
            won.append(number)

    race(create, threading.Thread)
    assert len(won) == 1
    assert (tmp_path / "a/b").read_bytes() == f"writer {won[0]}".encode() * 1_000
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def publish(number: int, folder: Path, barrier: "multiprocessing.synchronize.Barrier") -> None:
    barrier.wait()
    try:
        manifest(number).publish(Store(folder))
        outcome = "won"
    except RunError:
        outcome = "lost"
    (folder / f"{outcome}-{number}").touch()


def test_of_sixteen_racing_processes_one_publishes_and_the_others_are_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(RACERS)
    racers = [context.Process(target=publish, args=(number, tmp_path, barrier)) for number in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    won = [path.name.removeprefix("won-") for path in tmp_path.glob("won-*")]
    assert len(won) == 1
    assert len(list(tmp_path.glob("lost-*"))) == RACERS - 1
    assert Manifest.read(Store(tmp_path)) == manifest(int(won[0]))


def test_publishing_the_same_twice_is_no_conflict(tmp_path: Path) -> None:
    manifest(3).publish(Store(tmp_path))
    manifest(3).publish(Store(tmp_path))
    with pytest.raises(RunError, match="another run has published this number first"):
        manifest(4).publish(Store(tmp_path))


def test_a_taken_name_keeps_its_content(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.create("x", b"first")
    assert not store.create("x", b"second")
    assert not store.create_same("x", b"first")
    for other in (b"second", b"First", b""):
        with pytest.raises(RunError, match=r"x: is already there with another content"):
            store.create_same("x", other)
    assert store.read_bytes("x") == b"first"
    source = tmp_path / "source"
    source.write_bytes(b"third")
    assert not store.create_from_file("x", source)
    assert store.create_from_file("y", source)
    assert store.read_bytes("y") == b"third"
    assert sorted(store.walk()) == ["source", "x", "y"]


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, RunError, "No space left"),
        (errno.EACCES, UserError, "access refused"),
        (errno.EPERM, UserError, "no hard links"),
        (errno.EOPNOTSUPP, UserError, "no hard links"),
    ],
)
def test_a_disk_that_fails_leaves_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(kind, match=message) as caught:
        Store(tmp_path / "c").create("x", b"data")
    assert str(tmp_path / "c/x") in str(caught.value)
    assert not list((tmp_path / "c").iterdir())


def test_names_and_walk_leave_out_what_killed_writers_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create("a/x", b"1")
    (tmp_path / "a/.tmp123.part").write_bytes(b"half")
    assert store.names("a") == ["x"]
    assert store.names("nowhere") == []
    assert list(store.walk()) == ["a/x"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for ask in (store.read_bytes, store.size, store.sha256, store.open, store.remove, store.modified):
        with pytest.raises(UserError, match=r"nothing\.json: no such file"):
            ask("nothing.json")
    assert not store.exists("nothing.json")
    assert not store.holds("nothing.json", 0, "")


def test_uris() -> None:
    assert split_uri("s3://bucket/a/b.h5ad")[0].uri == "s3://bucket/a"
    assert split_uri("s3://bucket/b.h5ad")[1] == "b.h5ad"
    assert split_uri("/b.h5ad")[0].uri == "/"
    assert match_uris("s3://bucket/plain.h5ad") == ["s3://bucket/plain.h5ad"]
    store = Store("s3://bucket/x")
    assert "_fs_root" not in copy.copy(store).__dict__
    assert copy.copy(store).uri == "s3://bucket/x"


def test_patterns_stand_for_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.h5ad", "a.h5ad", "c.txt"):
        (tmp_path / name).touch()
    assert match_uris(f"{tmp_path}/*.h5ad") == [f"{tmp_path}/a.h5ad", f"{tmp_path}/b.h5ad"]
    assert match_uris(f"{tmp_path}/*.loom") == []
    monkeypatch.chdir(tmp_path)
    assert match_uris("a.h5ad") == [f"{tmp_path}/a.h5ad"]
    assert match_uris("a*.h5ad") == [f"{tmp_path}/a.h5ad"]
