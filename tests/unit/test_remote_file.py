"""A connection that breaks while a source is read is a failure of the storage, whatever library reads the source."""

import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import h5py
import numpy as np
import pytest

from corpus.errors import RunError, UserError
from corpus.remote_file import RemoteFile, forget_failures, noted_failure
from ingest.readers.files import source_errors
from ingest.sandbox_worker import answer

URI = "s3://bucket/source.h5ad"


class Breaking(io.BytesIO):
    """Gives so many bytes, and then the connection is gone."""

    def __init__(self, data: bytes, allowed: int) -> None:
        super().__init__(data)
        self.allowed = allowed

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.allowed -= len(data)
        if self.allowed < 0:
            raise ConnectionResetError("reset by peer")
        return data


@pytest.fixture
def source(tmp_path: Path) -> bytes:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=np.arange(50_000))
    return (tmp_path / "x.h5").read_bytes()


def read(data: bytes, allowed: int) -> dict[str, Any]:
    stream = cast("BinaryIO", RemoteFile(Breaking(data, allowed), URI))
    with source_errors(URI, "a readable h5ad file"), h5py.File(stream, "r") as file:
        return {"sum": int(file["x"][:].sum())}


def test_a_whole_file_is_read_through_it(source: bytes) -> None:
    assert answer(URI, read, (source, 10**9)) == {"done": {"sum": sum(range(50_000))}}
    with RemoteFile(io.BytesIO(b"abcdef"), URI) as file:
        assert (file.readable(), file.seekable(), file.seek(2), file.read(2), file.tell()) == (True, True, 2, b"cd", 4)
        assert (file.readinto(bytearray(9)), file.read(), file.seek(0), file.readall()) == (2, b"", 0, b"abcdef")
    assert file.closed


@pytest.mark.parametrize("allowed", [0, 1_000, 100_000])
def test_a_broken_connection_is_not_a_broken_file(source: bytes, allowed: int) -> None:
    found = answer(URI, read, (source, allowed))
    assert set(found) == {"run_error"}
    assert found["run_error"].startswith(f"{URI}: ConnectionResetError; run the same command again")


def test_a_broken_file_is_not_a_broken_connection(source: bytes) -> None:
    assert set(answer(URI, read, (source[:5_000], 10**9))) == {"user_error"}
    with pytest.raises(UserError):
        read(source[:5_000], 10**9)
    assert noted_failure() is None


def test_failures_are_forgotten_before_the_next_task(source: bytes) -> None:
    with pytest.raises((UserError, RunError)):
        read(source, 0)
    assert noted_failure() is not None
    forget_failures()
    assert noted_failure() is None
