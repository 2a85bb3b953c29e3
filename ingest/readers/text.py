"""Delimited text, genes x cells or cells x genes, packed or not: parsed once, into rows on local disk."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from corpus.errors import UserError
from ingest.readers.files import SourceFiles, open_unpacked, source_errors
from ingest.readers.named_rows import NamedRows
from ingest.readers.names import choose_features
from ingest.readers.numbers import parse_lines
from ingest.readers.staging import StagedRows, Transposer, staged
from ingest.settings import Source

GeneShare = Callable[[Sequence[str]], float]
"""Which share of some names are genes."""

_SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", " ": "space"}
_MAX_LINE_BYTES = 256_000_000
_SAMPLE_LINES, _SAMPLE_BYTES = 2_000, 64_000_000
_KIND = "a readable table of counts"


@dataclass(frozen=True)
class Layout:
    """How a table is laid out.

    Parameters
    ----------
    separator
        One character.
    columns
        Names above the columns of numbers.
    row_names
        The first names at the left.
    """

    separator: str
    columns: list[str]
    row_names: list[str]


def open_text(
    files: SourceFiles, source: Source, fingerprint: str | None = None, gene_share: GeneShare | None = None
) -> NamedRows:
    """Read a table.

    Parameters
    ----------
    gene_share
        Tells genes from cells; not needed where the source gives the orientation.

    Raises
    ------
    UserError
        If it is not a table of numbers, or neither its rows nor its columns are genes.
    """
    store, name = files.store, files.names[0]
    with source_errors(source.uri, _KIND), open_unpacked(store, name) as stream:
        layout = sniff(stream)
    orientation = source.orientation or _orientation(layout, source.uri, gene_share)
    by_gene = orientation == "genes_x_cells"

    def build() -> tuple[StagedRows, list[str]]:
        with source_errors(source.uri, _KIND), open_unpacked(store, name) as stream:
            stream.readline(_MAX_LINE_BYTES)
            return _turn(stream, layout) if by_gene else _append(stream, layout)

    rows, row_names = staged((fingerprint, orientation), build)
    genes, cells = (row_names, layout.columns) if by_gene else (layout.columns, row_names)
    detected = {"orientation": orientation, "separator": _SEPARATORS[layout.separator]}
    features = choose_features({"names": genes}, source.model_copy(update={"gene_column": None}))
    return NamedRows(orientation.replace("_", " "), features, cells, rows, detected)


def sniff(stream: BinaryIO) -> Layout:
    """Find out the layout from the first lines.

    The header may lack the name of the first column, as R writes it.

    Raises
    ------
    ValueError
        If no separator makes the header fit the first row.
    """
    header, first = (_line(stream) for _ in range(2))
    if not header.strip():
        raise ValueError("the first line is empty")
    for separator in sorted(_SEPARATORS, key=lambda sign: -header.count(sign)):
        names = _fields(header, separator)
        if not first:
            names = names[1:]
        elif len(_fields(first, separator)) != len(names) + 1:  # else R's header, one field short
            if len(_fields(first, separator)) != len(names):
                continue
            names = names[1:]
        if names or len(header) == len(first) == 0:
            break
    else:
        raise ValueError("no separator (tab, comma, semicolon, space) fits the first two lines")
    row_names: list[str] = []
    seen, line = 0, first
    while line and len(row_names) < _SAMPLE_LINES and seen < _SAMPLE_BYTES:
        row_names.append(next(iter(_fields(line[:10_000], separator))))
        seen += len(line)
        line = _line(stream)
    return Layout(separator, names, row_names)


def _line(stream: BinaryIO) -> str:
    line = stream.readline(_MAX_LINE_BYTES)
    if len(line) == _MAX_LINE_BYTES:
        raise ValueError(f"a line is longer than {_MAX_LINE_BYTES:,} bytes")
    return line.decode("utf-8-sig").rstrip("\r\n")


def _fields(line: str, separator: str) -> list[str]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    return next(csv.reader([line], delimiter=separator), [])


def _orientation(layout: Layout, uri: str, gene_share: GeneShare | None) -> str:
    if gene_share is None:
        raise ValueError("a text matrix needs `orientation` or a way to tell genes from cells")
    rows, columns = gene_share(layout.row_names), gene_share(layout.columns)
    if rows == columns:
        raise UserError(
            f"{uri}: which way does it lie? {rows:.1%} of the names at the left and of those above are known genes "
            f"(for example {', '.join([*layout.row_names[:2], *layout.columns[:2]])}); check mapping.species, or set "
            f"`orientation`"
        )
    return "genes_x_cells" if rows > columns else "cells_x_genes"


def _turn(stream: BinaryIO, layout: Layout) -> tuple[StagedRows, list[str]]:
    """Read genes x cells."""
    # Genes are not counted yet: any number goes until the end.
    turned = Transposer(len(layout.columns), np.iinfo(np.uint32).max)
    names: list[str] = []
    for lines in parse_lines(stream, layout.separator, len(layout.columns), _MAX_LINE_BYTES):
        turned.add(lines.columns, lines.rows + len(names), lines.values)
        names += lines.names
    rows = turned.finish()
    rows.num_columns = len(names)
    return rows, names


def _append(stream: BinaryIO, layout: Layout) -> tuple[StagedRows, list[str]]:
    """Read cells x genes."""
    rows = StagedRows(len(layout.columns))
    names: list[str] = []
    for lines in parse_lines(stream, layout.separator, len(layout.columns), _MAX_LINE_BYTES):
        rows.append(np.bincount(lines.rows, minlength=len(lines.names)), lines.columns, lines.values)
        names += lines.names
    return rows, names
