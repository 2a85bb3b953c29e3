"""Figures of merit of a classification, per class and overall, with bootstrap intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.scores import confusion_counts, f1_of_classes, macro_f1


def classification_metrics(
    truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compute accuracy, balanced accuracy, macro F1 and the per-class figures.

    Balanced accuracy is the mean over the classes that occur among the true labels, macro F1 over those that occur as
    truth or as prediction. A class that was never predicted has precision 0 and F1 0; a class without test cells has
    support 0 and null figures.

    Parameters
    ----------
    truth, predicted
        int64[cells]: class ids, positions in `labels`; at least one cell.
    draws
        Bootstrap resamples for the 95 % interval of the accuracy (percentile method, cells drawn independently).

    Raises
    ------
    ValueError
        If there are no cells.
    """
    if not len(truth):
        raise ValueError("no test cells")
    confusion = confusion_counts(truth, predicted, len(labels))
    hits = np.diag(confusion).astype(np.float64)
    support, called = confusion.sum(axis=1), confusion.sum(axis=0)
    present = support > 0
    recall = np.divide(hits, support, out=np.zeros_like(hits), where=present)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    f1 = f1_of_classes(confusion)
    accuracy = float(hits.sum() / len(truth))
    # Resampling n cells with replacement makes the number of hits exactly binomial.
    resampled = np.random.default_rng(seed).binomial(len(truth), accuracy, draws) / len(truth)
    per_class = [
        {
            "label": label,
            "precision": float(precision[i]) if present[i] else None,
            "recall": float(recall[i]) if present[i] else None,
            "f1": float(f1[i]) if present[i] else None,
            "support": int(support[i]),
            "predicted": int(called[i]),
        }
        for i, label in enumerate(labels)
    ]
    return {
        "num_cells": len(truth),
        "accuracy": accuracy,
        "accuracy_ci": _interval(resampled),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": macro_f1(confusion),
        "per_class": per_class,
        "confusion": {"labels": list(labels), "counts": confusion.tolist()},
    }


def accuracy_difference(
    truth: np.ndarray, first: np.ndarray, second: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of `first` minus accuracy of `second` on the same cells, with a paired bootstrap interval.

    Cells are resampled in pairs, so what both get right or wrong cancels; the three outcomes of a pair (first alone
    right, second alone right, equal) are then multinomial.
    """
    only_first = int(((first == truth) & (second != truth)).sum())
    only_second = int(((second == truth) & (first != truth)).sum())
    n = len(truth)
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    sampled = np.random.default_rng(seed).multinomial(n, shares, draws)
    return {
        "accuracy": (only_first - only_second) / n,
        "accuracy_ci": _interval((sampled[:, 0] - sampled[:, 1]) / n),
        "only_first_right": only_first,
        "only_second_right": only_second,
    }


def accuracy_by_group(truth: np.ndarray, predicted: np.ndarray, groups: Sequence[str | None]) -> list[dict[str, Any]]:
    """Accuracy within each group (for example donor), in group order; cells without a group come last."""
    names = np.array(["" if group is None else str(group) for group in groups], dtype=object)
    rows = []
    for name in sorted(set(names), key=lambda name: (name == "", name)):
        mask = names == name
        right = truth[mask] == predicted[mask]
        rows.append({"group": name or None, "num_cells": int(mask.sum()), "accuracy": float(right.mean())})
    return rows


def _interval(samples: np.ndarray) -> list[float]:
    low, high = np.quantile(samples, [0.025, 0.975])
    return [float(low), float(high)]
