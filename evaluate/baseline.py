"""What a classifier must beat: logistic regression on principal components of log-normalised counts, and the majority.

The baseline is the usual first analysis of single-cell counts: scale each cell to 10,000 counts, log1p, PCA, a linear
classifier. It sees the training cells that the network saw and no others; PCA is fitted on them alone.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from corpus.reader import Cells, Corpus
from corpus.schema import COUNTS_PER_CELL

_MAX_ITERATIONS = 2000


def log_normalised(cells: Cells, n_counts: np.ndarray, vocab_size: int) -> sp.csr_matrix:
    """log1p of counts per 10,000.

    Parameters
    ----------
    cells
        With counts.
    n_counts
        UMIs of each cell over all genes, those outside the vocabulary included, one entry a cell.
    vocab_size
        Number of columns; column t is token t.

    Returns
    -------
    float32 CSR [cells, vocab_size], columns ascending within a row.
    """
    if cells.counts is None:
        raise ValueError("cells were read without counts")
    totals = np.repeat(np.asarray(n_counts, dtype=np.float64), cells.lengths)
    values = np.log1p(cells.counts / totals * COUNTS_PER_CELL).astype(np.float32)
    matrix = sp.csr_matrix((values, cells.tokens.astype(np.int32), cells.offsets), shape=(len(cells), vocab_size))
    matrix.sort_indices()
    return matrix


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline.

    Parameters
    ----------
    columns
        int64[genes]: tokens that vary over the training cells.
    pca
        Fitted on the training cells.
    classifier
        Logistic regression over the components; its classes are class ids.
    converged
        False if the solver stopped at its limit of iterations.
    """

    columns: np.ndarray
    pca: PCA
    classifier: LogisticRegression
    converged: bool

    def predict(self, matrix: sp.csr_matrix) -> np.ndarray:
        """Class ids, int64[cells], of rows made by `log_normalised`."""
        if not matrix.shape[0]:
            return np.zeros(0, np.int64)
        return np.asarray(self.classifier.predict(self.pca.transform(matrix[:, self.columns])), dtype=np.int64)

    def describe(self) -> dict[str, object]:
        """What was fitted, for a metrics file."""
        return {
            "method": "PCA of log1p counts per 10,000 and logistic regression",
            "components": int(self.pca.n_components_),
            "genes": len(self.columns),
            "explained_variance": float(self.pca.explained_variance_ratio_.sum()),
            "converged": self.converged,
        }


def fit_baseline(matrix: sp.csr_matrix, classes: np.ndarray, num_components: int, seed: int) -> Baseline:
    """Fit PCA and logistic regression (L2, C = 1) on the training cells.

    Parameters
    ----------
    matrix
        As made by `log_normalised`, one row a training cell.
    classes
        int64[cells]: class ids; at least two different ones.
    num_components
        Reduced if there are fewer cells or genes.

    Raises
    ------
    ValueError
        If there are fewer than two classes or fewer than three cells.
    """
    if len(np.unique(classes)) < 2 or matrix.shape[0] < 3:
        raise ValueError("a baseline needs at least three training cells of at least two classes")
    mean = np.asarray(matrix.mean(axis=0)).ravel()
    square = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel()
    columns = np.flatnonzero(square - mean**2 > 0)
    varying = matrix[:, columns]
    components = min(num_components, min(varying.shape) - 1)
    pca = PCA(n_components=components, svd_solver="arpack", random_state=seed)
    scores = pca.fit_transform(varying)
    classifier = LogisticRegression(max_iter=_MAX_ITERATIONS, random_state=seed)
    with warnings.catch_warnings():
        # Told through `converged` instead, which reaches the metrics file.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(scores, classes)
    return Baseline(columns, pca, classifier, converged=int(classifier.n_iter_.max()) < _MAX_ITERATIONS)


def run_baseline(
    corpus: Corpus,
    train: np.ndarray,
    train_classes: np.ndarray,
    test: np.ndarray,
    *,
    num_components: int = 50,
    max_train_cells: int = 200_000,
    seed: int = 0,
) -> tuple[np.ndarray, dict[str, object]]:
    """Fit on some cells of a corpus and predict others, reading one row group at a time.

    Parameters
    ----------
    train, test
        int64: cell numbers, unique and ascending.
    train_classes
        int64: class id of each training cell.
    max_train_cells
        Above this number a seeded random sample is trained on, and the description says so: PCA needs the training
        matrix in memory.

    Returns
    -------
    Class ids of the test cells (int64), and a description for the metrics file.
    """
    chosen = np.arange(len(train))
    if len(train) > max_train_cells:
        chosen = np.sort(np.random.default_rng(seed).choice(len(train), max_train_cells, replace=False))
    n_counts = corpus.obs(["n_counts"])["n_counts"].to_numpy()
    width = corpus.genes.vocab_size
    rows = [
        log_normalised(cells, n_counts[cells.index], width) for cells in corpus.iter_cells(train[chosen], counts=True)
    ]
    baseline = fit_baseline(sp.vstack(rows, format="csr"), train_classes[chosen], num_components, seed)
    del rows
    parts = [
        baseline.predict(log_normalised(cells, n_counts[cells.index], width))
        for cells in corpus.iter_cells(test, counts=True)
    ]
    facts = {**baseline.describe(), "train_cells": len(chosen), "train_cells_available": len(train)}
    return np.concatenate(parts) if parts else np.zeros(0, np.int64), facts


def majority_class(train_classes: np.ndarray) -> int:
    """Most frequent class id; the lowest of equals."""
    if not len(train_classes):
        raise ValueError("no training cells")
    return int(np.argmax(np.bincount(train_classes)))
