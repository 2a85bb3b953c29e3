"""Matrix Market folders: 10x Genomics, Single Cell Expression Atlas, Single Cell Portal, and whoever names likewise."""

import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv

from corpus.errors import UserError
from corpus.store import Store, split_uri
from ingest.formats import Features
from ingest.readers.files import SourceFiles, open_unpacked, source_errors
from ingest.readers.named_rows import NamedRows
from ingest.readers.names import choose_features
from ingest.readers.staging import StagedRows, Transposer, staged
from ingest.settings import Source

_MATRIX = (".mtx", ".mtx.gz")
_BLOCK_BYTES = 4_000_000
_FEATURES, _BARCODES = ("features", "genes"), ("barcodes", "cells")
_ENDS = (".tsv", ".txt", ".csv", ".tsv.gz", ".txt.gz", ".csv.gz")


def mtx_files(source: Source) -> SourceFiles:
    """Matrix, features and barcodes of a source that names a folder or the .mtx file itself.

    Raises
    ------
    UserError
        If the folder has no matrix, or several, or a file beside it is missing.
    """
    if source.uri.lower().endswith(_MATRIX):
        store, matrix = split_uri(source.uri)
    else:
        store = Store(source.uri)
        found = [name for name in store.names() if name.lower().endswith(_MATRIX)]
        if len(found) != 1:
            listed = ", ".join(found) or "none"
            raise UserError(f"{source.uri}: expected one .mtx file in this folder, found {len(found)} ({listed})")
        matrix = found[0]
    there = set(store.names())
    if matrix not in there:
        raise UserError(f"{source.uri}: no such file")
    features = _beside(store, matrix, there, source.features, _FEATURES, ".mtx_rows")
    barcodes = _beside(store, matrix, there, source.barcodes, _BARCODES, ".mtx_cols")
    return SourceFiles(store, (matrix, features, barcodes))


def _beside(store: Store, matrix: str, there: set[str], given: str | None, words: Sequence[str], atlas: str) -> str:
    """Name of a file of names: `<stem>.mtx_rows`, `<prefix>features.tsv.gz` or, last, `features.tsv.gz`."""
    stem = matrix[: matrix.lower().rindex(".mtx")]
    prefix = stem.removesuffix("matrix")
    candidates = [stem + atlas, stem + atlas + ".gz"]
    candidates += [
        before + word + end for before in (prefix, f"{stem}.", f"{stem}_", "") for word in words for end in _ENDS
    ]
    for name in candidates if given is None else [given]:
        if name in there:
            return name
    raise UserError(
        f"{store.uri}/{matrix}: no {given or ' or '.join(words)} file beside it "
        f"(such as {candidates[2]} or {candidates[0]}); name it with `{words[0]}`"
    )


def open_mtx(files: SourceFiles, source: Source, fingerprint: str | None = None) -> NamedRows:
    """Read a folder; the matrix is turned into rows on local disk, once in a process.

    Raises
    ------
    UserError
        If a file is broken, or the matrix has another size than its names.
    """
    matrix, feature_file, barcode_file = files.names
    with source_errors(f"{files.store.uri}/{feature_file}", "a readable table of features"):
        table = _lines(files.store, feature_file)
    with source_errors(f"{files.store.uri}/{barcode_file}", "a readable list of cells"):
        cells = [fields[0] for fields in _lines(files.store, barcode_file)]
    features = _features(table, source, f"{files.store.uri}/{feature_file}")
    uri = f"{files.store.uri}/{matrix}"

    def build() -> tuple[StagedRows, str]:
        with source_errors(uri, "a readable Matrix Market file"), open_unpacked(files.store, matrix) as stream:
            return _stage(stream, uri, len(features.names), len(cells))

    rows, orientation = staged((fingerprint, "mtx"), build)
    return NamedRows("matrix", features, cells, rows, {"orientation": orientation, "files": ", ".join(files.names)})


def _lines(store: Store, name: str) -> list[list[str]]:
    separator = "," if ".csv" in name.lower() else "\t"
    with open_unpacked(store, name) as stream:
        text = stream.read().decode("utf-8")
    return [[field.strip().strip('"') for field in line.split(separator)] for line in text.splitlines() if line.strip()]


def _features(table: list[list[str]], source: Source, where: str) -> Features:
    """Columns are id, name and type; older folders lack the type, portals the name."""
    widths = {len(fields) for fields in table}
    if len(widths) > 1:
        raise UserError(f"{where}: rows have {min(widths)} to {max(widths)} columns")
    width = widths.pop() if widths else 1
    columns = {name: [fields[i] for fields in table] for i, name in ((1, "name"), (0, "id")) if i < width}
    kinds = [fields[2] for fields in table] if width >= 3 else None
    return choose_features(columns, source, kinds=kinds)


def _stage(stream: BinaryIO, uri: str, num_features: int, num_cells: int) -> tuple[StagedRows, str]:
    kind = stream.readline(1000).decode("ascii", "replace").lower().split()
    if len(kind) != 5 or kind[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
        raise UserError(f"{uri}: not a sparse Matrix Market file: its first line is {' '.join(kind)[:80]!r}")
    if kind[3] not in {"integer", "real"} or kind[4] != "general":
        raise UserError(f"{uri}: a {kind[3]} {kind[4]} matrix holds no counts; expected integer or real, general")
    line = stream.readline(1_000_000)
    while line.startswith(b"%") or (line and not line.strip()):
        line = stream.readline(1_000_000)
    num_rows, num_columns, num_entries = (int(size) for size in line.split())
    if (num_rows, num_columns) == (num_features, num_cells):
        orientation = "genes_x_cells"
    elif (num_rows, num_columns) == (num_cells, num_features):
        orientation = "cells_x_genes"
    else:
        raise UserError(
            f"{uri}: the matrix is {num_rows} x {num_columns}, but there are {num_features} features and {num_cells} "
            f"cells"
        )
    turned = Transposer(num_cells, num_features, num_entries)
    seen = 0
    for first, second, values in _entries(stream, num_entries):
        genes, cells = (first, second) if orientation == "genes_x_cells" else (second, first)
        turned.add(cells - 1, genes - 1, values)
        seen += len(values)
    if seen != num_entries:
        raise UserError(f"{uri}: {seen} entries, but the header says {num_entries}: the file is cut off or was changed")
    return turned.finish(), orientation


def _entries(stream: BinaryIO, num_entries: int) -> Iterator[list[np.ndarray]]:
    """Yield rows, columns and values of a block of lines."""
    if num_entries == 0:
        return
    lines = io.BufferedReader(cast("io.RawIOBase", stream))
    separator = "\t" if b"\t" in lines.peek(100).partition(b"\n")[0] else " "
    types = {"row": pa.int64(), "column": pa.int64(), "value": pa.float64()}
    with pa.csv.open_csv(
        pa.PythonFile(lines, mode="r"),
        read_options=pa.csv.ReadOptions(column_names=list(types), block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pa.csv.ParseOptions(delimiter=separator, quote_char=False),
        convert_options=pa.csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
    ) as blocks:
        for block in blocks:
            yield [column.to_numpy() for column in block.columns]
