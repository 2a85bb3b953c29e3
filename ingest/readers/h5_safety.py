"""What an HDF5 file must pass before anything in it is read: a walk over its structure, which touches no data.

HDF5 follows links out of a file without asking: `X` of an h5ad may be the matrix of another file, or the bytes of any
file that the reader may open. A few kilobytes may also declare a matrix of terabytes.
"""

import math
from collections.abc import Iterator

import h5py

from corpus.errors import UserError
from ingest.limits import GB, Limits, active_limits

_MAX_OBJECTS = 1_000_000


def check_tree(file: h5py.File, uri: str, limits: Limits | None = None) -> None:
    """Refuse a file whose structure is not to be trusted.

    Parameters
    ----------
    uri
        Names the file in the error.
    limits
        By default those of this process (`ingest.limits.active_limits`).

    Raises
    ------
    UserError
        On a link to another file, data kept outside the file, a virtual dataset, a shape or a size beyond the limits,
        or a structure that HDF5 itself cannot read.
    """
    limits = limits or active_limits()
    try:
        for path, dataset in _datasets(file, uri):
            _check_dataset(dataset, f"{uri}: {path}", limits)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{uri}: not a sound HDF5 file: {error}") from error


def _datasets(file: h5py.File, uri: str) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset of the file, once, whatever its names; links are looked at before they are followed."""
    pending, seen = [("", file["/"])], {_address(file["/"])}
    while pending:
        path, group = pending.pop()
        for name in group:
            inner = f"{path}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise UserError(f"{uri}: {inner} is a link to another file ({link.filename!r}); it is not followed")
            if isinstance(link, h5py.SoftLink):
                continue  # a name for something in this file, which has another name or is not there
            if not isinstance(link, h5py.HardLink):
                raise UserError(f"{uri}: {inner} is a link of a kind that is not known")
            node = group[name]
            address = _address(node)
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > _MAX_OBJECTS:
                raise UserError(f"{uri}: more than {_MAX_OBJECTS:,} groups and arrays")
            if isinstance(node, h5py.Group):
                pending.append((inner, node))
            elif isinstance(node, h5py.Dataset):
                yield inner, node


def _address(node: h5py.HLObject) -> tuple[int, bytes]:
    info = h5py.h5o.get_info(node.id)
    return info.fileno, bytes(str(info.addr), "ascii")


def _check_dataset(dataset: h5py.Dataset, where: str, limits: Limits) -> None:
    created = dataset.id.get_create_plist()
    if created.get_external_count():
        raise UserError(f"{where} keeps its data in another file ({created.get_external(0)[0]!r}); it is not read")
    if created.get_layout() == h5py.h5d.VIRTUAL:
        raise UserError(f"{where} is a virtual dataset, put together from other files; it is not read")
    shape: tuple[int, ...] = dataset.shape or ()
    declared = math.prod(shape) * dataset.dtype.itemsize
    if declared > limits.max_dataset_gb * GB:
        raise UserError(
            f"{where} declares {declared / GB:,.0f} GB ({' x '.join(map(str, shape))} {dataset.dtype}); "
            f"limits.max_dataset_gb is {limits.max_dataset_gb:,.0f}"
        )
    stored = dataset.id.get_storage_size()
    if declared > GB and declared > stored * limits.max_expansion:
        raise UserError(
            f"{where} declares {declared / GB:,.0f} GB, but the file stores {stored:,} bytes for it; "
            f"limits.max_expansion is {limits.max_expansion:,.0f}"
        )
    most = (limits.max_cells, limits.max_features)
    if len(shape) == 2 and any(size > limit for size, limit in zip(shape, most, strict=True)):
        raise UserError(
            f"{where} has {shape[0]:,} rows and {shape[1]:,} columns; limits.max_cells is {limits.max_cells:,}, "
            f"limits.max_features is {limits.max_features:,}"
        )
