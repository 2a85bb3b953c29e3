"""Doublets: droplets that caught two cells, found by comparing each cell with simulated pairs of cells.

Source: Wolock, Lopez, Klein, Cell Systems 8, 281-291 (2019), as implemented in `scanpy.pp.scrublet`. Run for one sample
at a time, since only cells of one sample can share a droplet.
"""

import importlib.util
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp

from corpus.errors import UserError
from corpus.manifest import Record
from ingest.settings import Doublets

_MIN_GENES = 100
_GENE_MIN_CELLS = 3


class DoubletSearch(Record):
    """What was done with one sample.

    Parameters
    ----------
    num_cells
        Cells that the other rules left.
    found
        Cells above the threshold.
    threshold
        The one given or found; None where no valley divides the simulated scores, and nothing is dropped.
    skipped
        Why the sample was not searched.
    """

    num_cells: int
    found: int = 0
    threshold: float | None = None
    skipped: str | None = None


def require_library(settings: Doublets) -> None:
    """Refuse settings that this machine's libraries cannot serve.

    Raises
    ------
    UserError
        If the optional libraries are missing.
    """
    if settings.method == "scrublet":
        for name in ("scanpy", "skimage"):
            if importlib.util.find_spec(name) is None:
                raise UserError('quality_control.doublets needs the optional extra: pip install "scanpy[scrublet]"')


def find_doublets(counts: sp.csr_matrix, settings: Doublets) -> tuple[np.ndarray, DoubletSearch]:
    """Search one sample.

    Parameters
    ----------
    counts
        Raw counts [cells, genes]; genes in any fixed order.

    Returns
    -------
    bool[cells], True for a doublet, and the account.
    """
    none = np.zeros(counts.shape[0], bool)
    if counts.shape[0] < settings.min_cells:
        reason = f"fewer cells than {settings.min_cells}"
        return none, DoubletSearch(num_cells=len(none), skipped=reason)
    detected = np.flatnonzero(counts.getnnz(axis=0) >= _GENE_MIN_CELLS)
    if len(detected) < _MIN_GENES:
        reason = f"fewer than {_MIN_GENES} genes seen in {_GENE_MIN_CELLS} cells"
        return none, DoubletSearch(num_cells=len(none), skipped=reason)
    scores, threshold = _scrublet(counts[:, detected], settings)
    if threshold is None:
        return none, DoubletSearch(num_cells=len(none))
    doublet = scores > threshold
    return doublet, DoubletSearch(num_cells=len(none), found=int(doublet.sum()), threshold=round(threshold, 6))


def _scrublet(counts: sp.csr_matrix, settings: Doublets) -> tuple[np.ndarray, float | None]:
    """Scores float64[cells], and the threshold given or found."""
    import anndata
    import scanpy  # type: ignore[import-not-found, import-untyped, unused-ignore]

    data = anndata.AnnData(sp.csr_matrix(counts, dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own deprecations
        scanpy.pp.scrublet(
            data,
            expected_doublet_rate=settings.expected_rate,
            n_prin_comps=min(30, counts.shape[0] - 1, counts.shape[1] - 1),
            use_approx_neighbors=False,  # exact neighbours: the same on every machine
            threshold=settings.threshold,
            random_state=settings.seed,
            verbose=False,
        )
    found: dict[str, Any] = data.uns["scrublet"]
    threshold = found.get("threshold")
    return data.obs["doublet_score"].to_numpy(), None if threshold is None else float(threshold)
