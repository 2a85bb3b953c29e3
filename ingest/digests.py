"""Approximate medians by t-digest, as the published median dictionaries were made.

Source: Dunning and Ertl, "Computing extremely accurate quantiles using t-digests" (arXiv:1902.04023), by the library
`crick`, one digest per gene and unit, merged in the order of the plan. Exact medians are the default: they are faster
and do not depend on how the cells were cut into units.
"""

import importlib.util

import numpy as np

from corpus.errors import UserError


def require_library() -> None:
    """Refuse the t-digest mode where its library is missing.

    Raises
    ------
    UserError
        If so.
    """
    if importlib.util.find_spec("crick") is None:
        raise UserError('vocabulary.medians = "tdigest" needs the optional extra: pip install crick')


def unit_digests(genes: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Digest each gene's values (uint32[n], float64[n], in the order of the cells).

    Returns
    -------
    `genes` uint32[m], `mean` and `weight` float64[m]: the centroids, by gene.
    """
    from crick import TDigest  # type: ignore[import-not-found, import-untyped, unused-ignore]

    order = np.argsort(genes, kind="stable")
    genes, values = genes[order], values[order]
    edges = np.flatnonzero(np.diff(genes)) + 1
    owners, means, weights = [], [], []
    for part in np.split(np.arange(len(genes)), edges) if len(genes) else []:
        digest = TDigest()
        digest.update(values[part])
        centroids = digest.centroids()
        owners.append(np.full(len(centroids), genes[part[0]], np.uint32))
        means.append(centroids["mean"])
        weights.append(centroids["weight"])
    if not owners:
        return {"genes": np.zeros(0, np.uint32), "mean": np.zeros(0), "weight": np.zeros(0)}
    return {"genes": np.concatenate(owners), "mean": np.concatenate(means), "weight": np.concatenate(weights)}


class DigestMerger:
    """Merges units' centroids in the order of the plan, whatever the order in which they arrive."""

    def __init__(self, num_genes: int) -> None:
        self._digests: dict[int, object] = {}
        self._n_cells = np.zeros(num_genes, np.uint64)
        self._waiting: dict[int, dict[str, np.ndarray]] = {}
        self._next = 0

    def add(self, position: int, centroids: dict[str, np.ndarray]) -> None:
        """Take a unit's centroids; they wait until all units before it are merged."""
        self._waiting[position] = centroids
        while self._next in self._waiting:
            self._merge(self._waiting.pop(self._next))
            self._next += 1

    def _merge(self, centroids: dict[str, np.ndarray]) -> None:
        from crick import TDigest  # type: ignore[import-not-found, import-untyped, unused-ignore]

        genes = centroids["genes"]
        edges = np.flatnonzero(np.diff(genes)) + 1
        for part in np.split(np.arange(len(genes)), edges) if len(genes) else []:
            gene, weight = int(genes[part[0]]), centroids["weight"][part]
            self._digests.setdefault(gene, TDigest()).update(centroids["mean"][part], weight)  # type: ignore[attr-defined]
            self._n_cells[gene] += np.uint64(round(weight.sum()))

    def medians(self, num_units: int) -> tuple[np.ndarray, np.ndarray]:
        """Medians float64[genes] (NaN for a gene without values) and uint64[genes] cells.

        Raises
        ------
        ValueError
            If a unit is missing.
        """
        if self._next != num_units:
            raise ValueError(f"centroids of {num_units - self._next} units are missing")
        medians = np.full(len(self._n_cells), np.nan)
        for gene, digest in self._digests.items():
            medians[gene] = digest.quantile(0.5)  # type: ignore[attr-defined]
        return medians, self._n_cells
