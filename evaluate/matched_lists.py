"""Random lists of genes that resemble a given one: the null of a joint perturbation.

A list of abundant, top-ranked genes moves embeddings far whatever the genes do. Each gene of a list is therefore
replaced by a random one of like detection and like rank; no gene of the list itself is ever drawn.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from corpus.reader import Cells

NEIGHBOURS = 50
"""Genes nearest in detection and rank that a listed gene is replaced from."""
_MISSES = 200
"""Lists drawn before in a row, after which there are taken to be no others."""


@dataclass(frozen=True)
class GenePlaces:
    """Where the genes of a vocabulary lie in some cells.

    Parameters
    ----------
    detections
        int64[vocab_size]: cells that have the gene in their input.
    mean_ranks
        float64[vocab_size]: mean place in these, 0 the top; NaN for a gene in none.
    """

    detections: np.ndarray
    mean_ranks: np.ndarray


def find_places(cells: Iterable[Cells], vocab_size: int, max_genes: int) -> GenePlaces:
    """Count detections and average ranks, a batch of cells at a time.

    Parameters
    ----------
    cells
        Batches; not truncated.
    max_genes
        Genes that fit into an input.
    """
    detections, ranks = np.zeros(vocab_size, dtype=np.int64), np.zeros(vocab_size)
    for batch in cells:
        batch = batch.truncate(max_genes)
        tokens = batch.tokens.astype(np.int64)
        places = np.arange(len(tokens)) - np.repeat(batch.offsets[:-1], batch.lengths)
        detections += np.bincount(tokens, minlength=vocab_size)
        ranks += np.bincount(tokens, places, minlength=vocab_size)
    mean_ranks = np.divide(ranks, detections, out=np.full(vocab_size, np.nan), where=detections > 0)
    return GenePlaces(detections, mean_ranks)


def draw_lists(
    listed: np.ndarray, genes: np.ndarray, places: GenePlaces, number: int, seed: int, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Draw lists matched in size, detection and rank.

    Parameters
    ----------
    listed
        int64[k]: tokens of the list, none twice.
    genes
        int64: tokens of all genes of the vocabulary.
    number
        Lists to draw; different ones.

    Returns
    -------
    int64[number, k]: the gene in column i stands for `listed[i]`; no gene is in a list twice, and none is a listed one.
    The same arguments give the same lists.

    Raises
    ------
    ValueError
        If there are not so many different lists of other genes.
    """
    others = np.setdiff1d(genes, listed)
    if len(others) < len(listed):
        raise ValueError(f"only {len(others)} genes besides the {len(listed)} listed ones")
    candidates = [_nearest(gene, others, places, max(neighbours, len(listed))) for gene in listed.tolist()]
    rng = np.random.default_rng([seed, 5])
    found: list[np.ndarray] = []
    known: set[tuple[int, ...]] = set()
    misses = 0
    while len(found) < number and misses < _MISSES:
        row = np.full(len(listed), -1)
        # In a random order: the first column to choose has the most to choose from.
        for column in rng.permutation(len(listed)).tolist():
            row[column] = rng.choice(candidates[column][~np.isin(candidates[column], row)])
        key = tuple(sorted(row.tolist()))
        misses = misses + 1 if key in known else 0
        if not misses:
            known.add(key)
            found.append(row)
    if len(found) < number:
        raise ValueError(f"only {len(found)} different lists found, {number} asked for")
    return np.array(found, dtype=np.int64).reshape(number, len(listed))


def _nearest(gene: int, others: np.ndarray, places: GenePlaces, number: int) -> np.ndarray:
    """Genes nearest in log detections and mean rank, each in units of its spread; of equal ones the lowest tokens."""
    detections = np.log2(places.detections + 1.0)
    ranks = places.mean_ranks
    seen = others[places.detections[others] > 0]
    distance = np.abs(detections[others] - detections[gene]) / (_spread(detections[seen]))
    if places.detections[gene]:
        apart = np.abs(ranks[others] - ranks[gene]) / _spread(ranks[seen])
        # A gene in no cell has no rank: it is farther than any that has one.
        distance = np.hypot(distance, np.where(np.isfinite(apart), apart, np.inf))
    order = np.lexsort((others, distance))
    return others[order[: min(number, len(others))]]


def _spread(values: np.ndarray) -> float:
    return float(values.std()) or 1.0 if len(values) else 1.0
