"""Readers that crash, hang, eat memory or raise: the caller gets an error that says so, and the next task works."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.errors import RunError, UserError
from ingest.limits import Limits, active_limits
from ingest.sandbox import Reader, ReaderDiedError, SourceDiedError, read_safely

LIMITS = Limits(reader_memory_gb=0.5, reader_minutes=1.0, max_cells=1_234)


def double(value: int) -> dict[str, Any]:
    return {"value": 2 * value, "process": os.getpid(), "max_cells": active_limits().max_cells}


def crash(number: int) -> dict[str, Any]:
    os.kill(os.getpid(), number)
    time.sleep(60)
    return {}


def leave(status: int) -> dict[str, Any]:
    os._exit(status)


def hang(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {}


def allocate(num_bytes: int) -> dict[str, Any]:
    return {"sum": int(np.ones(num_bytes, np.uint8).sum())}


def fail(kind: str) -> dict[str, Any]:
    raise {"user": UserError("no such layer"), "run": RunError("disk full"), "other": IndexError("7 of 3")}[kind]


def crash_once(marker: Path) -> dict[str, Any]:
    if marker.exists():
        return {"second": True}
    marker.touch()
    return crash(signal.SIGSEGV)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader(LIMITS)
    yield reader
    reader.stop()


def test_one_process_does_all_tasks_with_its_limits(reader: Reader) -> None:
    first, second = reader.call("a", double, 4), reader.call("a", double, 5)
    assert (first["value"], second["value"]) == (8, 10)
    assert first["process"] == second["process"] != os.getpid()
    assert first["max_cells"] == 1_234


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, "^no such layer$"),
        ("run", RunError, "^disk full$"),
        ("other", UserError, r"^x\.h5ad: cannot be read: IndexError: 7 of 3"),
    ],
)
def test_errors_arrive_as_they_are(reader: Reader, kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        reader.call("x.h5ad", fail, kind)
    traces = getattr(caught.value, "__notes__", [])
    assert [("in fail" in trace) for trace in traces] == ([True] if kind == "other" else [])
    assert reader.call("a", double, 1)["value"] == 2


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        (crash, signal.SIGSEGV, "killed by SIGSEGV"),
        (crash, signal.SIGKILL, "killed by SIGKILL"),
        (leave, 3, "ended with status 3"),
        (allocate, 8_000_000_000, r"more than its memory \(limits.reader_memory_gb\)"),
    ],
)
def test_a_death_is_told_and_the_next_reader_works(reader: Reader, function: Any, argument: int, reason: str) -> None:
    with pytest.raises(ReaderDiedError, match=reason):
        reader.call("x.h5ad", function, int(argument))
    assert reader.call("a", double, 1)["value"] == 2


def test_memory_within_the_limit_is_given(reader: Reader) -> None:
    assert reader.call("a", allocate, 300_000_000)["sum"] == 300_000_000


def test_a_reader_that_hangs_is_ended() -> None:
    reader = Reader(Limits(reader_minutes=5 / 60))
    reader.call("a", double, 1)
    start = time.monotonic()
    with pytest.raises(ReaderDiedError, match=r"no answer within .* \(limits.reader_minutes\)"):
        reader.call("x.h5ad", hang, 60)
    assert time.monotonic() - start < 30


def test_a_second_attempt_is_made_and_no_third(tmp_path: Path) -> None:
    assert read_safely(LIMITS, "x.h5ad", crash_once, tmp_path / "marker") == {"second": True}
    with pytest.raises(SourceDiedError, match=r"^x\.h5ad: its reader died 2 times \(killed by SIGABRT\)$"):
        read_safely(LIMITS, "x.h5ad", crash, int(signal.SIGABRT))


def test_a_reader_ends_with_its_worker(repository: Path) -> None:
    code = (
        "import os, signal\n"
        "from ingest.limits import Limits\n"
        "from ingest.sandbox import Reader\n"
        "from tests.unit.test_sandbox import double\n"
        "print(Reader(Limits()).call('a', double, 1)['process'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 15
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{int(done.stdout)}").exists()
