"""Reading h5ad by row ranges, with h5py for matrices and labels and anndata's own element reader for the rest."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from corpus.errors import UserError
from ingest.formats import Features
from ingest.readers.blocks import estimated_entries, sparse_rows
from ingest.readers.files import SourceFiles, source_errors
from ingest.readers.h5_chunks import LastChunks
from ingest.readers.hdf5 import open_hdf5, read_compressed, read_text
from ingest.readers.labels import as_labels
from ingest.readers.names import choose_features
from ingest.readers.staging import StagedRows, Transposer, staged
from ingest.settings import Source

_KIND_COLUMNS = ("feature_types", "feature_type")
_INDEX = "index"
_COLUMNS_ENTRIES = 4_000_000


class H5ad:
    """An open h5ad file (see `ingest.formats.CountMatrix`).

    Rows of CSR and dense matrices are read where they lie. A CSC matrix is turned into rows once, on local disk.

    Raises
    ------
    UserError
        If the file is no h5ad, or lacks the layer or the gene column that the settings name.
    """

    def __init__(self, files: SourceFiles, source: Source, fingerprint: str | None = None) -> None:
        self._source, self._fingerprint = source, fingerprint
        self._last: LastChunks = {}
        self._stream: BinaryIO = files.store.open(files.names[0])
        with self._errors():
            self._file = open_hdf5(self._stream, source.uri)
            self.layer = self._choose_layer()
            self._node = self._file[self._path(self.layer)]
            self._obs = _Table(self._file["obs"])
            self._encoding, shape = _encoding(self._node)
            self.features = self._features()
        self.num_cells = len(self._obs)
        if shape != (self.num_cells, len(self.features.names)):
            expected = (self.num_cells, len(self.features.names))
            raise UserError(f"{source.uri}: {self.layer} has shape {shape}, but obs and var say {expected}")
        self.detected = {"matrix": self._encoding}

    def _errors(self) -> Any:
        return source_errors(self._source.uri, "a readable h5ad file")

    def _choose_layer(self) -> str:
        found = [name for name in ("raw.X", "X") if self._path(name) in self._file]
        found += [*self._file["layers"]] if "layers" in self._file else []
        wanted = self._source.layer or (found[0] if found else "X")
        if wanted not in found:
            raise UserError(f"{self._source.uri}: no matrix {wanted!r}; the file has {', '.join(found) or 'none'}")
        return wanted

    def _path(self, layer: str) -> str:
        raw = "raw.X" if "raw.X" in self._file else "raw/X"  # the former until anndata 0.7
        return {"X": "X", "raw.X": raw}.get(layer, f"layers/{layer}")

    def _features(self) -> Features:
        path = "var" if self.layer != "raw.X" else "raw.var" if "raw.var" in self._file else "raw/var"
        var = _Table(self._file[path])
        names = {_INDEX: var.index()}
        for name in var.columns:
            values = var.read(name)
            if isinstance(values.dtype, pd.CategoricalDtype | pd.StringDtype) or values.dtype == object:
                names[name] = values.astype(str).tolist()
        wanted = self._source.gene_column
        if wanted is not None and wanted in var.columns and wanted not in names:  # ids that are numbers
            names[wanted] = var.read(wanted).astype(str).tolist()
        kind = next((name for name in _KIND_COLUMNS if name in var.columns), None)
        return choose_features(
            {name: values for name, values in names.items() if name not in {*_KIND_COLUMNS, "genome"}},
            self._source,
            kinds=None if kind is None else names[kind],
            genomes=names.get("genome"),
        )

    @property
    def num_entries(self) -> int:
        """Number of stored entries (a dense matrix: an estimate of its non-zero ones)."""
        with self._errors():
            if self._encoding != "dense":
                return int(self._node["data"].shape[0])
            return estimated_entries(lambda start, stop: self._node[start:stop], self.num_cells)

    def barcodes(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start:stop`, by default of all."""
        with self._errors():
            return self._obs.index(start, stop)

    def obs_columns(self) -> list[str]:
        """Names of the label columns."""
        return self._obs.columns

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """Labels of the cells `start:stop`; None where missing."""
        with self._errors():
            return as_labels(self._obs.read(column, start, stop))

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""
        width = len(self.features.names)
        with source_errors(self._source.uri, f"a readable h5ad file ({self.layer}, rows {start} to {stop})"):
            if self._encoding == "csr":
                return read_compressed(self._node, self._stream, start, stop, width, self._last)
            if self._encoding == "csc":
                return staged((self._fingerprint, self.layer), self._turn).rows(start, stop)
            return sparse_rows(lambda a, b: self._node[a:b], start, stop, width, self._node.dtype.itemsize)

    def _turn(self) -> StagedRows:
        """Read a CSC matrix once, some columns at a time."""
        pointers = self._node["indptr"][:].astype(np.int64)
        width = len(pointers) - 1
        turned = Transposer(self.num_cells, width, int(pointers[-1]))
        start = 0
        while start < width:
            stop = int(np.searchsorted(pointers, pointers[start] + _COLUMNS_ENTRIES, side="right")) - 1
            stop = max(min(stop, width), start + 1)
            block = read_compressed(self._node, self._stream, start, stop, self.num_cells, self._last)
            columns = np.repeat(np.arange(start, stop), np.diff(block.indptr))
            turned.add(block.indices, columns, block.data)
            start = stop
        return turned.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._stream.close()


def _encoding(node: Any) -> tuple[str, tuple[int, ...]]:
    """(`csr`, `csc` or `dense`; shape) of a matrix, also as anndata stored it before version 0.7."""
    if isinstance(node, h5py.Dataset):
        return "dense", tuple(node.shape)
    name = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    encoding = name.removesuffix("_matrix")
    if encoding not in {"csr", "csc"} or shape is None:
        raise ValueError(f"{node.name} is stored as {name or 'something unnamed'}: neither a dense, CSR nor CSC matrix")
    return encoding, tuple(int(size) for size in shape)


class _Table:
    """obs or var, read column by column and by row range: an atlas's obs alone may take gigabytes."""

    def __init__(self, node: Any) -> None:
        self._node = node
        if isinstance(node, h5py.Dataset):  # a compound array, until anndata 0.7
            names = list(node.dtype.names or ())
            self._index = next((name for name in ("index", "_index") if name in names), names[0])
            self.columns = [name for name in names if name != self._index]
            self._length = len(node)
        else:
            self._index = str(node.attrs["_index"])
            self.columns = [str(name) for name in node.attrs["column-order"]]
            self._length = len(node[self._index])

    def __len__(self) -> int:
        return self._length

    def index(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Row names."""
        if isinstance(self._node, h5py.Dataset):
            return [str(label) for label in as_labels(self._node[self._index][start:stop])]
        return read_text(self._node[self._index], start, stop)

    def read(self, column: str, start: int = 0, stop: int | None = None) -> pd.Series:
        """Part of a column."""
        node = self._node[column]
        if isinstance(node, np.ndarray):
            return pd.Series(as_labels(node[start:stop]) if node.dtype.kind in "SO" else node[start:stop])
        if isinstance(node, h5py.Group):
            if node.attrs.get("encoding-type") == "categorical":
                codes, names = node["codes"][start:stop], read_elem(node["categories"])
                return pd.Series(pd.Categorical.from_codes(codes, pd.Index(names)))
            return pd.Series(read_elem(node)[start:stop])  # nullable types: small, and rare
        if "categories" in node.attrs:  # a reference to them, in anndata 0.7
            names = self._node.file[node.attrs["categories"]][:]
            names = as_labels(names) if names.dtype.kind in "SO" else names
            return pd.Series(pd.Categorical.from_codes(node[start:stop], pd.Index(names)))
        if h5py.check_string_dtype(node.dtype) is not None or node.dtype.kind == "S":
            return pd.Series(read_text(node, start, stop), dtype=object)
        return pd.Series(node[start:stop])
