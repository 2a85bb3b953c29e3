"""Chunks inflated by us equal what h5py reads, for every way of storing them; damaged chunks are refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from ingest.readers.h5_chunks import read_range

RANGES = [(0, 1000), (0, 1), (999, 1000), (99, 101), (100, 200), (350, 351), (7, 993), (500, 500)]
LAYOUTS: dict[str, dict[str, object]] = {
    "gzip": {"chunks": (100,), "compression": "gzip"},
    "gzip, chunks beyond the end": {"chunks": (333,), "compression": "gzip", "compression_opts": 9},
    "shuffle and gzip": {"chunks": (100,), "compression": "gzip", "shuffle": True},
    "checksums too": {"chunks": (100,), "compression": "gzip", "fletcher32": True},
    "lzf": {"chunks": (100,), "compression": "lzf"},
    "chunks alone": {"chunks": (100,)},
    "contiguous": {},
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8, ">f4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_h5py(layout: str, dtype: object, tmp_path: Path) -> None:
    values = np.random.default_rng(0).geometric(0.3, 1000).clip(max=200).astype(dtype)
    path = tmp_path / "file.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("x", data=values, **LAYOUTS[layout])
    with path.open("rb") as stream, h5py.File(stream, "r") as file:
        for start, stop in RANGES:
            found = read_range(file["x"], stream, start, stop)
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values[start:stop])


def test_chunks_never_written_hold_the_fill_value(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        made = file.create_dataset("x", (1000,), np.int32, chunks=(100,), compression="gzip", fillvalue=7)
        made[150:250] = 1
        expected = made[:]
    with path.open("rb") as stream, h5py.File(stream, "r") as file:
        np.testing.assert_array_equal(read_range(file["x"], stream, 0, 1000), expected)


def test_a_chunk_stored_without_its_filter_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file.h5"
    values = np.arange(100, dtype=np.int32)
    with h5py.File(path, "w") as file:
        made = file.create_dataset("x", (100,), np.int32, chunks=(100,), compression="gzip")
        made.id.write_direct_chunk((0,), values.tobytes(), filter_mask=1)
    with path.open("rb") as stream, h5py.File(stream, "r") as file:
        np.testing.assert_array_equal(read_range(file["x"], stream, 20, 80), values[20:80])


def test_damaged_chunks_are_refused(tmp_path: Path) -> None:
    import zlib

    def read(chunk: bytes) -> np.ndarray:
        path = tmp_path / f"{len(chunk)}.h5"
        with h5py.File(path, "w") as file:
            made = file.create_dataset("x", (100,), np.int32, chunks=(100,), compression="gzip")
            made.id.write_direct_chunk((0,), chunk)
        with path.open("rb") as stream, h5py.File(stream, "r") as file:
            return read_range(file["x"], stream, 0, 100)

    whole = zlib.compress(np.random.default_rng(0).integers(0, 99, 100, dtype=np.int32).tobytes())
    assert read(whole).max() < 99
    with pytest.raises(ValueError, match="ends early"):
        read(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="ends early"):
        read(whole[:-1])
    with pytest.raises(ValueError, match="checksum"):
        read(whole[:-4] + bytes(4))
    with pytest.raises(ValueError, match="401 bytes, expected 400"):
        read(zlib.compress(b"\0" * 401))
    with pytest.raises(ValueError, match="bytes, expected 400"):
        read(zlib.compress(b"\0" * 399))
    with pytest.raises(ValueError, match="inflate"):
        read(b"no zlib stream")
