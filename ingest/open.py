"""The adapter of each format."""

from corpus.store import split_uri
from ingest.formats import CountMatrix, guess_format
from ingest.h5ad import H5ad
from ingest.settings import Source

_ADAPTERS = {"h5ad": H5ad}


def open_source(source: Source) -> CountMatrix:
    """Open a source for reading.

    Raises
    ------
    UserError
        If the file is missing, broken or not of its format.
    """
    store, name = split_uri(source.uri)
    return _ADAPTERS[guess_format(source)](store.open(name), source)
