"""CELLxGENE Census through its own client: `census://mus_musculus?tissue=lung&version=2025-01-30`.

The client is an optional extra. Cells are read by ranges of their join ids, in the Census's own order.
"""

import hashlib
import importlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pandas as pd
import scipy.sparse as sp

from corpus.errors import UserError
from corpus.hashing import digest_json
from ingest.formats import Features
from ingest.readers.files import SourceFiles
from ingest.readers.labels import as_labels
from ingest.settings import Source

_SCHEME = "census://"
_JOIN = "soma_joinid"
_OPTIONS = ("version", "uri", "filter")
_CELLS_AT_ONCE = 5_000
# By default the client sets a gigabyte aside for each column that it reads.
_BUFFER, _BUFFER_BYTES = "soma.init_buffer_bytes", 32 * 1024**2


class Census:
    """Cells of one organism that answer to a query (see `ingest.formats.CountMatrix`).

    The query is `column=value` pairs, joined by `&`: an obs column must be equal to the value, or to one of several
    (`tissue=lung&tissue=heart`). `true` and `false` are truth values. Duplicates are left out unless the query says
    something else about `is_primary_data`. `version` names a release (`stable` by default), `uri` a copy of the Census,
    and `filter` is any further condition in SOMA's own language.

    Raises
    ------
    UserError
        If the client is missing, the Census cannot be reached, or the query is wrong.
    """

    def __init__(self, files: SourceFiles | None, source: Source, fingerprint: str | None = None) -> None:
        self._source = source
        self.organism, self._condition, self._options = parse_query(source.uri)
        client = _client(source.uri)
        self.layer = source.layer or "raw"
        try:
            version = self._options.get("version", "stable")
            if "uri" not in self._options:  # `stable` moves on; the build that it means today does not
                version = str(client.get_census_version_description(version)["release_build"])
            self._census = client.open_soma(
                census_version=version, uri=self._options.get("uri"), tiledb_config={_BUFFER: _BUFFER_BYTES}
            )
            self._experiment = self._census["census_data"][self.organism]
            obs = self._experiment.obs
            self._columns = [name for name in obs.schema.names if not name.startswith("soma_")]
            read = obs.read(value_filter=self._condition or None, column_names=[_JOIN]).concat()
            self._cells = np.sort(read[_JOIN].to_numpy())
            # The gene axis by join id: these are the matrix's columns.
            self._var = self._experiment.ms["RNA"].var.read().concat().to_pandas().sort_values(_JOIN)
        except UserError:
            raise
        except Exception as error:  # TileDB's own errors, which cannot be named without importing it
            raise UserError(f"{source.uri}: the Census cannot answer: {str(error).splitlines()[0]}") from error
        self.num_cells = len(self._cells)
        self.features = self._features()
        self.detected = {"release": self._options.get("uri", version), "condition": self._condition or "none"}

    def _features(self) -> Features:
        column = self._source.gene_column or "feature_id"
        if column not in self._var:
            raise UserError(f"{self._source.uri}: no gene column {column!r}; there are {', '.join(self._var.columns)}")
        return Features(self._var[column].astype(str).tolist())

    def fingerprint(self) -> str:
        """Hash of the release, the organism, the layer and the join ids found: a release is never changed."""
        cells = hashlib.sha256(self._cells.tobytes()).hexdigest()
        return digest_json([self.detected["release"], self.organism, self.layer, cells])

    @property
    def num_entries(self) -> int:
        """Number of stored entries, from the column `nnz` where the Census has it, else 2,000 a cell."""
        if "nnz" not in self._columns:
            return 2_000 * self.num_cells
        return int(self._obs(["nnz"], 0, self.num_cells)["nnz"].sum())

    def _obs(self, columns: Sequence[str], start: int, stop: int) -> pd.DataFrame:
        """Columns of some cells, in the order of their join ids."""
        names = list(dict.fromkeys([_JOIN, *columns]))
        if start == stop:
            return pd.DataFrame({name: [] for name in names})
        table = self._experiment.obs.read(coords=(self._cells[start:stop],), column_names=names).concat()
        return table.to_pandas().sort_values(_JOIN)  # type: ignore[no-any-return]

    def barcodes(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Join ids of the cells `start:stop`, unique within a release."""
        return [str(number) for number in self._cells[start:stop]]

    def obs_columns(self) -> list[str]:
        """Names of the label columns."""
        return self._columns

    def labels(self, column: str, start: int, stop: int) -> Sequence[str | None]:
        """Labels of the cells `start:stop`; None where missing."""
        return as_labels(self._obs([column], start, stop)[column])

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Counts of the cells `start:stop`, as stored (not checked)."""
        genes = self._var[_JOIN].to_numpy()
        blocks = [sp.csr_matrix((0, len(genes)))]
        for first in range(start, stop, _CELLS_AT_ONCE):
            cells = self._cells[first : min(first + _CELLS_AT_ONCE, stop)]
            matrix = self._experiment.ms["RNA"].X[self.layer]
            tables = list(matrix.read((cells, slice(None))).tables())
            rows, columns, values = (
                np.concatenate([np.zeros(0, np.int64), *(table[name].to_numpy() for table in tables)])
                for name in ("soma_dim_0", "soma_dim_1", "soma_data")
            )
            where = (np.searchsorted(cells, rows.astype(np.int64)), np.searchsorted(genes, columns.astype(np.int64)))
            blocks.append(sp.coo_matrix((values, where), shape=(len(cells), len(genes))).tocsr())
        return sp.vstack(blocks, format="csr")

    def close(self) -> None:
        """Let go of the Census."""
        self._census.close()


def parse_query(uri: str) -> tuple[str, str, dict[str, str]]:
    """Split a Census URI into organism, SOMA condition and options.

    Raises
    ------
    UserError
        If it is not of the form `census://organism?column=value&...`.
    """
    organism, _, query = uri.removeprefix(_SCHEME).partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
    except ValueError as error:
        raise UserError(f"{uri}: expected census://organism?column=value&...: {error}") from error
    if not organism.isidentifier() or not uri.startswith(_SCHEME):
        raise UserError(
            f"{uri}: expected census://organism?column=value&..., such as census://mus_musculus?tissue=lung"
        )
    options = {name: value for name, value in pairs if name in _OPTIONS}
    wanted: dict[str, list[str]] = {}
    for name, value in pairs:
        if not name.isidentifier():
            raise UserError(f"{uri}: {name!r} is no column name")
        if name not in _OPTIONS:
            wanted.setdefault(name, []).append(_literal(value, uri))
    wanted.setdefault("is_primary_data", ["True"])
    terms = []
    for name, values in wanted.items():
        if len(values) == 1:
            terms.append(f"{name} == {values[0]}")
        elif set(values) != {"True", "False"}:
            terms.append(f"{name} in [{', '.join(values)}]")
    if "filter" in options:
        terms.append(f"({options['filter']})")
    return organism, " and ".join(terms), options


def _literal(value: str, uri: str) -> str:
    if value.lower() in {"true", "false"}:
        return value.capitalize()
    if '"' in value or "\\" in value:
        raise UserError(f"{uri}: {value!r}: quotes and backslashes have no place in a value; use `filter`")
    return f'"{value}"'


def _client(uri: str) -> Any:
    try:
        return importlib.import_module("cellxgene_census")
    except ImportError as error:
        raise UserError(
            f"{uri}: reading the Census needs its client (pip install cellxgene-census); or download the datasets "
            f"as h5ad and name those"
        ) from error
