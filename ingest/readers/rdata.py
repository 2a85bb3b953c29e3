"""Sparse matrices in R files (`.RData`, `.rda`, `.rds`), as PanglaoDB publishes them: genes x cells, `dgCMatrix`."""

import importlib
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp

from corpus.errors import UserError
from ingest.formats import Features
from ingest.readers.files import SourceFiles, source_errors
from ingest.readers.named_rows import NamedRows
from ingest.readers.names import choose_features
from ingest.readers.staging import staged
from ingest.settings import Source

_SLOTS = ("i", "p", "x", "Dim", "Dimnames")


class _Loaded:
    """A matrix in memory: an R file is one compressed stream that cannot be read in part."""

    def __init__(self, matrix: sp.csr_matrix, genes: list[str], cells: list[str], name: str) -> None:
        self.matrix, self.genes, self.cells, self.name = matrix, genes, cells, name
        self.num_entries = int(matrix.nnz)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        return self.matrix[start:stop]


def open_rdata(files: SourceFiles, source: Source, fingerprint: str | None = None) -> NamedRows:
    """Read the sparse matrix of an R file; `source.layer` names the object where there are several.

    Raises
    ------
    UserError
        If the optional extra is missing, the file is broken, or it holds no sparse matrix or several.
    """

    def build() -> _Loaded:
        with files.store.open(files.names[0]) as stream:
            data = stream.read()
        with source_errors(source.uri, "a readable R file"):
            return _load(data, source)

    loaded = staged((fingerprint, source.layer or "rdata"), build)
    features: Features = choose_features({"names": loaded.genes}, source.model_copy(update={"gene_column": None}))
    return NamedRows(loaded.name, features, loaded.cells, loaded, {"object": loaded.name})


def _load(data: bytes, source: Source) -> _Loaded:
    try:
        rdata: Any = importlib.import_module("rdata")
    except ImportError as error:
        raise UserError(
            f"{source.uri}: reading R files needs the package `rdata` (pip install rdata); or save the matrix in R "
            f"with Matrix::writeMM and its dimnames as features.tsv and barcodes.tsv (docs/sources.md)"
        ) from error
    with warnings.catch_warnings():
        # Its warnings are about classes without a constructor of their own, which is what we want: plain slots.
        warnings.simplefilter("ignore")
        found = rdata.conversion.convert(rdata.parser.parse_data(data))
    objects = found if isinstance(found, dict) else {"matrix": found}
    matrices = {name: value for name, value in objects.items() if all(hasattr(value, slot) for slot in _SLOTS)}
    wanted = source.layer or next(iter(matrices), "")
    if wanted not in matrices or (source.layer is None and len(matrices) > 1):
        there = ", ".join(f"{name} ({type(value).__name__})" for name, value in objects.items()) or "none"
        raise UserError(
            f"{source.uri}: expected one sparse matrix (dgCMatrix), found {len(matrices)}; objects: {there}; "
            f"name one with `layer`"
        )
    slots = matrices[wanted]
    num_genes, num_cells = (int(size) for size in slots.Dim)
    values = np.asarray(slots.x)
    if values.dtype.kind not in "iuf":
        raise UserError(f"{source.uri}: {wanted} holds truth values, no counts")
    genes, cells = ([str(name) for name in names] if names is not None else [] for names in slots.Dimnames)
    if (len(genes), len(cells)) != (num_genes, num_cells):
        raise UserError(
            f"{source.uri}: {wanted} is {num_genes} x {num_cells}, but has {len(genes)} row names and {len(cells)} "
            f"column names"
        )
    # Columns of genes x cells are rows of cells x genes.
    arrays = (values, np.asarray(slots.i, np.int64), np.asarray(slots.p, np.int64))
    matrix = sp.csr_matrix(arrays, shape=(num_cells, num_genes))
    matrix.check_format(full_check=True)
    return _Loaded(matrix, genes, cells, wanted)
