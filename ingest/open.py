"""The adapter of each format."""

from collections.abc import Callable
from typing import Any, get_args

from ingest.formats import CountMatrix
from ingest.readers.census import Census
from ingest.readers.detect import guess_format
from ingest.readers.files import SourceFiles
from ingest.readers.h5ad import H5ad
from ingest.readers.loom import Loom
from ingest.readers.mtx import mtx_files, open_mtx
from ingest.readers.rdata import open_rdata
from ingest.readers.tenx_h5 import TenxH5
from ingest.readers.text import GeneShare, open_text
from ingest.settings import Source, SourceFormat

_ADAPTERS: dict[SourceFormat, Callable[..., Any]] = {
    "h5ad": H5ad,
    "loom": Loom,
    "10x_h5": TenxH5,
    "mtx": open_mtx,
    "text": open_text,
    "rdata": open_rdata,
    "census": Census,
}
assert set(_ADAPTERS) == set(get_args(SourceFormat))


def source_files(source: Source) -> SourceFiles:
    """Files that make a source; not for the Census, which has none."""
    return mtx_files(source) if guess_format(source) == "mtx" else SourceFiles.single(source.uri)


def fingerprint(source: Source) -> tuple[str, int]:
    """(name of the source's content, its size in bytes as far as it is known).

    The SHA-256 of the file; of several files, a hash of their sorted names and SHA-256s; of a Census query, a hash of
    the release, the query and the cells that it finds.

    Raises
    ------
    UserError
        If a file is missing.
    """
    if guess_format(source) == "census":
        return Census(None, source).fingerprint(), 0
    files = source_files(source)
    return files.fingerprint(), files.size_bytes()


def version(source: Source) -> str:
    """What changes when a file of the source is touched: sizes and times, or the object storage's own tags."""
    return "" if guess_format(source) == "census" else source_files(source).version()


def open_source(source: Source, content: str | None = None, gene_share: GeneShare | None = None) -> CountMatrix:
    """Open a source for reading.

    Parameters
    ----------
    content
        Fingerprint of the source, under which a staged matrix is kept for the next call in this process; without it,
        nothing is kept.
    gene_share
        Share of some names that are genes, to tell which way a text matrix lies; not needed where the source says it.

    Raises
    ------
    UserError
        If a file is missing, broken or not of its format.
    """
    kind = guess_format(source)
    files = None if kind == "census" else source_files(source)
    more = {"gene_share": gene_share} if kind == "text" else {}
    matrix: CountMatrix = _ADAPTERS[kind](files, source, content, **more)
    return matrix
