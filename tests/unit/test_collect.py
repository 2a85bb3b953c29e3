"""`ingest gc`: removes what no manifest names and is old, and nothing else."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from corpus.errors import UserError
from corpus.manifest import Manifest
from corpus.store import Store
from ingest.collect import collect
from ingest.verify import verify
from tests.factories import write_corpus

DAY = 86_400
LEFT = {
    "shards/" + "a" * 64 + ".parquet": 8,
    "units/" + "a" * 64 + ".json": 8,
    "cells/" + "b" * 64 + ".parquet": 9,
    "genes/0123456789abcdef.parquet": 30,
    "reports/000007-01234567.json": 8,
    "shards/.tmpx1.part": 8,
}
YOUNG = {"shards/" + "c" * 64 + ".parquet": 6, "cells/" + "d" * 64 + ".parquet": 0, "cells/.tmpx2.part": 1}
OTHERS = {"runs/old.json": 400, "manifests/notes.txt": 400, "README.md": 400}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    out = write_corpus(tmp_path / "corpus", num_cells=30)
    for path in out.rglob("*"):
        os.utime(path, (time.time() - 100 * DAY,) * 2)
    for name, days in {**LEFT, **YOUNG, **OTHERS}.items():
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (time.time() - days * DAY - 60,) * 2)
    return out


def files(corpus: Path) -> set[str]:
    return {path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file()}


def test_only_old_files_without_a_manifest_go(corpus: Path) -> None:
    before = files(corpus)
    week = timedelta(days=7)
    assert set(collect(Store(corpus), week, dry_run=True)) == set(LEFT)
    assert files(corpus) == before
    assert set(collect(Store(corpus), week)) == set(LEFT)
    assert files(corpus) == before - set(LEFT)
    assert not list(collect(Store(corpus), week))
    assert not [check for check in verify(str(corpus)) if check.faults]


def test_files_of_an_earlier_manifest_stay(corpus: Path) -> None:
    first = Manifest.read(Store(corpus))
    first.model_copy(update={"number": 2, "units": first.units[:1]}).publish(Store(corpus))
    assert set(collect(Store(corpus), timedelta(0))) == set(LEFT) | set(YOUNG)
    for unit in first.units:
        assert (corpus / unit.shard).exists()
        assert (corpus / unit.record).exists()


def test_without_a_manifest_nothing_goes(corpus: Path) -> None:
    (corpus / "manifests/000001.json").unlink()
    before = files(corpus)
    with pytest.raises(UserError, match="nothing can be told apart from a run in progress"):
        list(collect(Store(corpus), timedelta(0)))
    assert files(corpus) == before


def test_the_command(corpus: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "ingest", "gc", str(corpus), "--older-than", "7d"]
    dry = subprocess.run([*command, "--dry-run"], cwd=repository, capture_output=True, text=True, check=True).stdout
    assert {line.removeprefix("would remove ") for line in dry.splitlines()} == set(LEFT)
    assert set(LEFT) <= files(corpus)
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert {line.removeprefix("removed ") for line in done.splitlines()} == set(LEFT)
    assert not set(LEFT) & files(corpus)
