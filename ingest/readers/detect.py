"""Which format a source has, and what its dataset is called, from names alone."""

from pathlib import PurePosixPath
from typing import get_args

from corpus.errors import UserError
from corpus.store import Store
from ingest.settings import Source, SourceFormat

_SUFFIXES: dict[str, SourceFormat] = {
    ".h5ad": "h5ad",
    ".loom": "loom",
    ".h5": "10x_h5",
    ".hdf5": "10x_h5",
    ".mtx": "mtx",
    ".rdata": "rdata",
    ".rda": "rdata",
    ".rds": "rdata",
    ".csv": "text",
    ".tsv": "text",
    ".txt": "text",
    ".tab": "text",
    ".zip": "text",
}
_PACKED = (".gz", ".zip")
# What pipelines call every sample's output: the folder above it says which sample it is.
_GENERIC = {
    *(f"{kind}_{what}" for kind in ("filtered", "raw") for what in ("feature_bc_matrix", "gene_bc_matrices")),
    *("matrix", "outs", "counts", "mm10", "mm39", "GRCm39", "GRCh38", "hg19", "filtered", "raw", "Gene", "GeneFull"),
}


def guess_format(source: Source) -> SourceFormat:
    """Format of a source, from its settings, its name, or (a folder) the names in it.

    Raises
    ------
    UserError
        If the names say nothing.
    """
    if source.format is not None:
        return source.format
    if source.uri.startswith("census://"):
        return "census"
    name = PurePosixPath(source.uri.lower())
    suffix = name.suffix if name.suffix not in _PACKED else PurePosixPath(name.stem).suffix or name.suffix
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if any(found.endswith((".mtx", ".mtx.gz")) for found in Store(source.uri).names()):
        return "mtx"
    raise UserError(
        f"{source.uri}: unknown format: neither a known suffix ({', '.join(_SUFFIXES)}; each also with .gz where it is "
        f"text) nor a folder with a .mtx file; set `format` to one of {', '.join(get_args(SourceFormat))}"
    )


def dataset_name(source: Source) -> str:
    """Name of a dataset from that of its file or folder, without suffixes.

    The folder's part stays out, since a corpus must not depend on where its sources lay; only a name that pipelines
    give to every sample (`filtered_feature_bc_matrix`, `matrix.mtx.gz`) is replaced by the folder's.
    """
    if source.uri.startswith("census://"):
        return "census-" + source.uri.removeprefix("census://").partition("?")[0]
    path = PurePosixPath(source.uri)
    names = [_stem(path.name), *(parent.name for parent in path.parents if parent.name)]
    return next((name for name in names if name not in _GENERIC), names[0])


def _stem(name: str) -> str:
    for suffix in (*_PACKED, *_SUFFIXES):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name
