"""Reading 10x Genomics h5 of Cell Ranger 2 (one group per genome) and later (one `matrix` with feature types)."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import h5py
import scipy.sparse as sp

from corpus.errors import UserError
from ingest.formats import GENE_EXPRESSION, OTHER_SPECIES, Features
from ingest.readers.files import SourceFiles, source_errors
from ingest.readers.h5_chunks import LastChunks
from ingest.readers.hdf5 import open_hdf5, read_compressed, read_text
from ingest.readers.names import choose_features, species_of_assembly
from ingest.settings import Source


class TenxH5:
    """An open 10x h5 file (see `ingest.formats.CountMatrix`).

    A version 2 file with several genomes holds one matrix each; the one of the declared species is read, and the
    features of the others are kept as names alone, so that the account shows them.

    Raises
    ------
    UserError
        If the file is no 10x h5, or it cannot be told which genome is meant.
    """

    def __init__(self, files: SourceFiles, source: Source, fingerprint: str | None = None) -> None:
        self._source = source
        self._last: LastChunks = {}
        self._stream: BinaryIO = files.store.open(files.names[0])
        with self._errors():
            self._file = open_hdf5(self._stream, source.uri)
            if "matrix" in self._file:
                self.layer, self.detected = "matrix", {"version": "3"}
                self._group = self._file["matrix"]
                self.features = self._modern_features(self._group["features"])
            else:
                self.layer = self._choose_genome()
                self.detected = {"version": "2", "genome": self.layer}
                self._group = self._file[self.layer]
                self.features = self._old_features()
            self._width, self.num_cells = (int(size) for size in self._group["shape"][:])
            num_barcodes = len(self._group["barcodes"])
        if num_barcodes != self.num_cells or self._width > len(self.features.names):
            raise UserError(
                f"{source.uri}: {self.layer} is {self._width} features x {self.num_cells} cells, but there are "
                f"{len(self.features.names)} feature names and {num_barcodes} barcodes"
            )

    def _errors(self) -> Any:
        return source_errors(self._source.uri, "a readable 10x h5 file")

    def _choose_genome(self) -> str:
        genomes = [name for name, node in self._file.items() if isinstance(node, h5py.Group) and "indptr" in node]
        if self._source.layer is not None:
            if self._source.layer not in genomes:
                raise UserError(f"{self._source.uri}: no genome {self._source.layer!r}; there are {', '.join(genomes)}")
            return self._source.layer
        if not genomes:
            raise UserError(f"{self._source.uri}: no matrix in the layout of Cell Ranger 2 or later")
        declared = self._source.species or "mouse"
        known = {name: species_of_assembly(name, self._source) for name in genomes}
        unknown = len(genomes) == 1 and known[genomes[0]] is None  # then mapping will tell
        own = genomes if unknown else [name for name in genomes if known[name] == declared]
        if len(own) != 1:
            raise UserError(
                f"{self._source.uri}: which genome is {declared}? There are {', '.join(genomes)}; name one with `layer`"
            )
        return own[0]

    def _modern_features(self, group: h5py.Group) -> Features:
        kinds = read_text(group["feature_type"])
        genomes = read_text(group["genome"]) if "genome" in group else None
        if genomes is not None:  # antibodies have no genome, or an empty one
            genomes = [genome if kind == GENE_EXPRESSION else "" for genome, kind in zip(genomes, kinds, strict=True)]
        # Names before ids: where no column has Ensembl ids, the symbols are more likely to be understood.
        columns = {name: read_text(group[name]) for name in ("name", "id")}
        return choose_features(columns, self._source, kinds=kinds, genomes=genomes)

    def _old_features(self) -> Features:
        columns = {"name": read_text(self._group["gene_names"]), "id": read_text(self._group["genes"])}
        own = choose_features(columns, self._source)
        others: list[str] = []
        for name, node in self._file.items():
            if name != self.layer and isinstance(node, h5py.Group) and "genes" in node:
                others += read_text(node["genes"])
        if not others:
            return own
        kinds = own.kinds or [GENE_EXPRESSION] * len(own.names)
        return Features(own.names + others, kinds + [OTHER_SPECIES] * len(others))

    @property
    def num_entries(self) -> int:
        """Number of stored entries."""
        return int(self._group["data"].shape[0])

    def barcodes(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start:stop`, by default of all."""
        with self._errors():
            return read_text(self._group["barcodes"], start, stop)

    def obs_columns(self) -> list[str]:
        """No labels in this format."""
        return []

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """No labels in this format."""
        raise KeyError(column)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""
        with source_errors(self._source.uri, f"a readable 10x h5 file ({self.layer}, cells {start} to {stop})"):
            block = read_compressed(self._group, self._stream, start, stop, self._width, self._last)
        block.resize((stop - start, len(self.features.names)))
        return block

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        self._stream.close()
