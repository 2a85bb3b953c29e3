"""Reading loom (genes x cells, HDF5) by ranges of cells; layout as in the loom file specification 3.0."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import h5py
import numpy as np
import scipy.sparse as sp

from corpus.errors import UserError
from ingest.formats import Features
from ingest.readers.blocks import estimated_entries, sparse_rows
from ingest.readers.files import SourceFiles, source_errors
from ingest.readers.hdf5 import open_hdf5, read_text
from ingest.readers.labels import as_labels
from ingest.readers.names import choose_features
from ingest.settings import Source

_CELL_NAMES = ("CellID", "cellid", "cell_id", "cell_names", "obs_names", "barcode", "barcodes", "Barcode")
_GENE_NAMES = ("Gene", "gene", "gene_names", "var_names", "GeneName", "Accession", "accession", "gene_ids", "GeneID")
_KINDS = ("feature_types", "feature_type", "FeatureType")


class Loom:
    """An open loom file (see `ingest.formats.CountMatrix`).

    Raises
    ------
    UserError
        If the file is no loom, has no gene names, or lacks the layer that the settings name.
    """

    def __init__(self, files: SourceFiles, source: Source, fingerprint: str | None = None) -> None:
        self._source = source
        self._stream: BinaryIO = files.store.open(files.names[0])
        with self._errors():
            self._file = open_hdf5(self._stream, source.uri)
            self.layer = source.layer or "matrix"
            layers = [*self._file["layers"]] if "layers" in self._file else []
            if self.layer not in {"matrix", *layers}:
                raise UserError(f"{source.uri}: no layer {self.layer!r}; there are {', '.join(['matrix', *layers])}")
            self._matrix = self._file["matrix" if self.layer == "matrix" else f"layers/{self.layer}"]
            num_genes, self.num_cells = (int(size) for size in self._matrix.shape)
            self._cells = _vectors(self._file["col_attrs"], self.num_cells)
            genes = _vectors(self._file["row_attrs"], num_genes)
            self._cell_name = next((name for name in _CELL_NAMES if name in self._cells), None)
            self.features = self._features(genes)
        self.detected = {} if self._cell_name is not None else {"cell names": "none in the file: numbered"}

    def _errors(self) -> Any:
        return source_errors(self._source.uri, "a readable loom file")

    def _features(self, genes: dict[str, h5py.Dataset]) -> Features:
        wanted = (self._source.gene_column,) if self._source.gene_column else _GENE_NAMES
        names = {name: read_text(genes[name]) for name in wanted if name in genes}
        if not names:
            there = ", ".join(genes) or "none"
            raise UserError(f"{self._source.uri}: no gene names among the row attributes; there are {there}")
        kind = next((read_text(genes[name]) for name in _KINDS if name in genes), None)
        return choose_features(names, self._source, kinds=kind)

    @property
    def num_entries(self) -> int:
        """Estimated number of non-zero entries: loom matrices are dense."""
        with self._errors():
            return estimated_entries(self._read, self.num_cells)

    def barcodes(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start:stop`, by default of all; `cell<number>` where the file has none."""
        if self._cell_name is None:
            return [f"cell{i}" for i in range(start, self.num_cells if stop is None else stop)]
        with self._errors():
            return read_text(self._cells[self._cell_name], start, stop)

    def obs_columns(self) -> list[str]:
        """Names of the label columns."""
        return [*self._cells]

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """Labels of the cells `start:stop`; None where missing."""
        with self._errors():
            return as_labels(self._cells[column][start:stop])

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._matrix[:, start:stop].T  # type: ignore[no-any-return]

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""
        width, itemsize = self._matrix.shape[0], self._matrix.dtype.itemsize
        with source_errors(self._source.uri, f"a readable loom file ({self.layer}, cells {start} to {stop})"):
            return sparse_rows(self._read, start, stop, width, itemsize)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._stream.close()


def _vectors(group: h5py.Group, length: int) -> dict[str, h5py.Dataset]:
    """Attributes with one value per row or column; loom also has tables and graphs among them."""
    found = {str(name): node for name, node in group.items() if isinstance(node, h5py.Dataset) and node.ndim == 1}
    for name, node in found.items():
        if len(node) != length:
            raise ValueError(f"{node.name} has {len(node)} values, expected {length} ({name})")
    return found
