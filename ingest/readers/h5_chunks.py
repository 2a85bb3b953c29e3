"""Reading ranges of gzip HDF5 datasets without HDF5's own inflate: two thirds of the time, the same values.

HDF5 gives the place of each chunk in the file; the bytes are then read and inflated here, by ISA-L, up to the Adler-32
checksum that ends a zlib stream: a chunk that was damaged is an error and not another count. Whatever is stored in
another way (no chunks, another filter, a chunk never written) goes through h5py.
"""

from typing import BinaryIO

import h5py
import numpy as np
from isal import isal_zlib

_DEFLATE, _SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


LastChunks = dict[str, tuple[int, np.ndarray]]
"""The last chunk of each dataset, by name: its first entry, and its values. Ranges that follow each other share one."""


def read_range(
    dataset: h5py.Dataset, stream: BinaryIO, start: int, stop: int, last: LastChunks | None = None
) -> np.ndarray:
    """Read `dataset[start:stop]` of a one-dimensional dataset.

    Parameters
    ----------
    stream
        The file that the dataset lies in, with seek. Its position is moved.
    last
        Chunks kept from the call before, of this file alone; the last one is put in.

    Raises
    ------
    OSError, ValueError
        If a chunk does not inflate to the size of a chunk, its checksum is wrong, or HDF5 cannot read the file.
    """
    filters = _filters(dataset)
    if filters is None or stop <= start:
        return dataset[start:stop]
    size, name = dataset.chunks[0], dataset.name
    out = np.empty(stop - start, dataset.dtype)
    last = {} if last is None else last
    for first in range(start // size * size, stop, size):
        if last.get(name, (-1,))[0] != first:
            last[name] = first, _read_chunk(dataset, stream, first, filters)
        low, high = max(start, first), min(stop, first + size)
        out[low - start : high - start] = last[name][1][low - first : high - first]
    return out


def _read_chunk(dataset: h5py.Dataset, stream: BinaryIO, first: int, filters: list[int]) -> np.ndarray:
    chunk, size = dataset.id.get_chunk_info_by_coord((first,)), dataset.chunks[0]
    if chunk.byte_offset is None:  # never written: the fill value, which HDF5 knows
        return dataset[first : min(first + size, len(dataset))]  # type: ignore[no-any-return]
    stream.seek(chunk.byte_offset)
    return _decode(stream.read(chunk.size), filters, chunk.filter_mask, dataset, size)


def _filters(dataset: h5py.Dataset) -> list[int] | None:
    """Filters in the order in which they were applied, if this module knows them all."""
    plist = dataset.id.get_create_plist()
    if dataset.ndim != 1 or dataset.chunks is None or dataset.dtype.kind not in "iuf":
        return None
    found = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    return found if found and set(found) <= {_DEFLATE, _SHUFFLE} else None


def _decode(data: bytes, filters: list[int], skipped: int, dataset: h5py.Dataset, size: int) -> np.ndarray:
    wanted = size * dataset.dtype.itemsize
    for position, code in reversed(list(enumerate(filters))):
        if skipped >> position & 1:
            continue
        if code == _DEFLATE:
            try:
                inflate = isal_zlib.decompressobj()
                # Bounded: a bomb stops at the size of a chunk. One byte more, or the end is not reached: the checksum
                # is compared only there.
                data = inflate.decompress(data, wanted + 1)
            except isal_zlib.error as error:  # type: ignore[misc, unused-ignore]
                raise ValueError(f"{dataset.name}: a chunk does not inflate: {error}") from error
            if not inflate.eof:
                raise ValueError(f"{dataset.name}: a chunk ends early or is too long: its checksum cannot be reached")
        else:
            data = np.frombuffer(data, np.uint8).reshape(dataset.dtype.itemsize, -1).T.tobytes()
    if len(data) != wanted:
        raise ValueError(f"{dataset.name}: a chunk has {len(data)} bytes, expected {wanted}")
    return np.frombuffer(data, dataset.dtype)
