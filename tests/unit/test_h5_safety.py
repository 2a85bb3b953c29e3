"""Hostile HDF5 files are refused before any data is read, fast and in little memory (R7)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from corpus.errors import UserError
from ingest.limits import Limits
from ingest.readers.h5_safety import check_tree
from tests.factories_ingest import write_toy

REFUSE = """
import sys, time
import h5py
from corpus.errors import UserError
from ingest.readers.h5_safety import check_tree
def peak_kb():  # getrusage would give the parent's peak where that is higher: it outlives fork and exec
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
before = peak_kb()
start = time.perf_counter()
try:
    with open(sys.argv[1], "rb") as stream, h5py.File(stream, "r") as file:
        check_tree(file, sys.argv[1])
except UserError as error:
    print(time.perf_counter() - start, peak_kb(), before, error, sep="|")
"""


def external_link(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "secret.h5", "w") as other:
        other["X"] = np.ones((4, 4))
    file["X"] = h5py.ExternalLink(str(folder / "secret.h5"), "/X")


def deep_external_link(file: h5py.File, folder: Path) -> None:
    file.create_group("uns/a/b/c")["d"] = h5py.ExternalLink("other.h5", "/")


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret.txt").write_text("root:x:0:0:root:/root:/bin/sh\n" * 4)
    file.create_dataset("X", (4, 4), "u1", external=[(str(folder / "secret.txt"), 0, 16)])


def virtual_dataset(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((4, 4), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), "X", (4, 4))
    file.create_virtual_dataset("layers/counts", layout)


def dense_bomb(file: h5py.File, folder: Path) -> None:
    file.create_dataset("X", (4_000_000, 30_000), "f4", chunks=(1_000, 1_000), compression="gzip")


def sparse_bomb(file: h5py.File, folder: Path) -> None:
    for name in ("data", "indices"):
        file.create_dataset(f"X/{name}", (50_000_000_000,), "i4", chunks=(100_000,), compression="gzip")


def huge_bomb(file: h5py.File, folder: Path) -> None:
    file.create_dataset("obs/x", (2**62,), "f8", chunks=(1_000,))


def too_many_cells(file: h5py.File, folder: Path) -> None:
    file.create_dataset("X", (200_000_000, 1), "u1", chunks=(1_000_000, 1))


HOSTILE = {
    external_link: r"/X is a link to another file \('.*secret\.h5'\)",
    deep_external_link: "/uns/a/b/c/d is a link to another file",
    external_storage: "/X keeps its data in another file",
    virtual_dataset: "/layers/counts is a virtual dataset",
    dense_bomb: r"/X declares 480 GB, but the file stores 0 bytes",
    sparse_bomb: r"/X/(data|indices) declares 200 GB, but the file stores 0 bytes",
    huge_bomb: r"/obs/x declares .* GB \(.* float64\); limits\.max_dataset_gb is 500",
    too_many_cells: "has 200,000,000 rows and 1 columns; limits.max_cells",
}


@pytest.fixture(params=HOSTILE, ids=lambda write: write.__name__)
def hostile(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[..., None]]:
    path = tmp_path / "hostile.h5ad"
    with h5py.File(path, "w") as file:
        request.param(file, tmp_path)
    return path, request.param


def test_hostile_files_are_refused_by_name(hostile: tuple[Path, Callable[..., None]]) -> None:
    path, write = hostile
    with h5py.File(path, "r") as file, pytest.raises(UserError, match=HOSTILE[write]) as caught:
        check_tree(file, "s3://bucket/some.h5ad")
    assert str(caught.value).startswith("s3://bucket/some.h5ad: /")


@pytest.mark.parametrize("write", [dense_bomb, external_storage])
def test_refusal_is_fast_and_small(tmp_path: Path, repository: Path, write: Callable[..., None]) -> None:
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        write(file, tmp_path)
    command = [sys.executable, "-c", REFUSE, str(tmp_path / "x.h5ad")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    seconds, peak_kb, before_kb, message = done.stdout.split("|", 3)
    assert "x.h5ad: /X" in message
    assert float(seconds) < 1
    assert int(peak_kb) - int(before_kb) < 50_000
    assert int(peak_kb) < 200_000


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_sound_files_pass(tmp_path: Path, layout: str) -> None:
    toy = write_toy(tmp_path, layout=layout)
    with h5py.File(toy.path, "r") as file:
        check_tree(file, str(toy.path))


def test_links_within_the_file_pass_and_loops_end(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/data"] = np.arange(5)
        file["a/again"] = file["a"]
        file["b"] = h5py.SoftLink("/a/data")
        file["c"] = h5py.SoftLink("/nowhere")
        check_tree(file, "x.h5")


def test_limits_are_settings(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["X"] = np.zeros((30, 20))
        check_tree(file, "x.h5", Limits(max_cells=30, max_features=20))
        with pytest.raises(UserError, match=r"has 30 rows and 20 columns; limits\.max_cells is 29"):
            check_tree(file, "x.h5", Limits(max_cells=29))
        with pytest.raises(UserError, match=r"limits\.max_features is 19"):
            check_tree(file, "x.h5", Limits(max_features=19))
        with pytest.raises(UserError, match=r"limits\.max_dataset_gb"):
            check_tree(file, "x.h5", Limits(max_dataset_gb=4e-6))


def test_the_walk_comes_before_a_hostile_link_can_be_followed(tmp_path: Path) -> None:
    """Nothing of the other file is opened: it may be a device that never answers."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["X"] = h5py.ExternalLink("/dev/zero", "/X")
        with pytest.raises(UserError, match="link to another file"):
            check_tree(file, "x.h5")
