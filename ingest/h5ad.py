"""Reading h5ad by row ranges, with h5py for the matrix and anndata's own element reader for the tables."""

from collections.abc import Sequence
from typing import BinaryIO

import h5py
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, sparse_dataset

from corpus.errors import UserError
from ingest.formats import Features
from ingest.h5_chunks import read_csr
from ingest.mapping import ensembl_share
from ingest.settings import Source

_KIND_COLUMNS = ("feature_types", "feature_type")


class H5ad:
    """An open h5ad file (see `ingest.formats.CountMatrix`).

    Raises
    ------
    UserError
        If the file is no h5ad, or lacks the layer or the gene column that the settings name.
    """

    def __init__(self, stream: BinaryIO, source: Source) -> None:
        self._source, self._stream = source, stream
        try:
            self._file = h5py.File(stream, "r")
            self.layer = self._choose_layer()
            self._node = self._file[self._path(self.layer)]
            self._matrix = self._node if isinstance(self._node, h5py.Dataset) else sparse_dataset(self._node)
            self._obs = read_elem(self._file["obs"])
            self.features = self._features()
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{source.uri}: not a readable h5ad file: {error}") from error
        shape = tuple(self._matrix.shape)
        if shape != (len(self._obs), len(self.features.names)):
            expected = (len(self._obs), len(self.features.names))
            raise UserError(f"{source.uri}: {self.layer} has shape {shape}, but obs and var say {expected}")

    def _choose_layer(self) -> str:
        found = [name for name in ("raw.X", "X") if self._path(name) in self._file]
        found += [*self._file["layers"]] if "layers" in self._file else []
        wanted = self._source.layer or (found[0] if found else "X")
        if wanted not in found:
            raise UserError(f"{self._source.uri}: no matrix {wanted!r}; the file has {', '.join(found) or 'none'}")
        return wanted

    @staticmethod
    def _path(layer: str) -> str:
        return {"X": "X", "raw.X": "raw/X"}.get(layer, f"layers/{layer}")

    def _features(self) -> Features:
        var: pd.DataFrame = read_elem(self._file["raw/var" if self.layer == "raw.X" else "var"])
        column = self._source.gene_column
        if column is not None and column not in var.columns:
            there = ", ".join(var.columns) or "none"
            raise UserError(f"{self._source.uri}: no var column {column!r}; there are {there}")
        candidates = {"": var.index.astype(str).tolist()}
        for name in [column] if column is not None else var.columns:
            if isinstance(var[name].dtype, pd.CategoricalDtype | pd.StringDtype) or var[name].dtype == object:
                candidates[name] = var[name].astype(str).tolist()
        best = column if column is not None else max(candidates, key=lambda name: ensembl_share(candidates[name]))
        kind = next((name for name in _KIND_COLUMNS if name in var.columns), None)
        return Features(candidates[best], None if kind is None else var[kind].astype(str).tolist())

    @property
    def num_cells(self) -> int:
        """Number of rows."""
        return len(self._obs)

    @property
    def num_entries(self) -> int:
        """Number of stored entries (all entries of a dense matrix)."""
        return int(self._node["data"].shape[0]) if isinstance(self._node, h5py.Group) else int(self._node.size)

    def barcodes(self) -> list[str]:
        """Name of every cell."""
        return self._obs.index.astype(str).tolist()

    def obs_columns(self) -> list[str]:
        """Names of the label columns."""
        return [str(name) for name in self._obs.columns]

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """Labels of the cells `start:stop`; None where missing."""
        values = self._obs[column].iloc[start:stop]
        return [None if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)]

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""
        try:
            if getattr(self._matrix, "format", None) == "csr":
                return read_csr(self._node, self._stream, start, stop)
            block = self._matrix[start:stop]
        except (OSError, ValueError) as error:
            raise UserError(f"{self._source.uri}: {self.layer}, rows {start} to {stop}: {error}") from error
        return sp.csr_matrix(block)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._stream.close()
