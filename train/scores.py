"""Figures of merit that fine-tuning, searches and evaluation must define alike."""

import numpy as np


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """int64[classes, classes]: row = true class, column = predicted class.

    Parameters
    ----------
    truth, predicted
        int64[cells]: class ids in 0..num_classes - 1.
    """
    flat = np.bincount(truth * num_classes + predicted, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


def f1_of_classes(confusion: np.ndarray) -> np.ndarray:
    """float64[classes]: F1 of each class; NaN for a class that is neither the truth nor the prediction of any cell."""
    involved = confusion.sum(axis=0) + confusion.sum(axis=1)
    return np.divide(2.0 * np.diag(confusion), involved, out=np.full(len(confusion), np.nan), where=involved > 0)


def macro_f1(confusion: np.ndarray) -> float:
    """Mean F1 over the classes that occur, as truth or as prediction: scikit-learn's `average="macro"`.

    A class that was predicted although no cell has it counts with 0, so cells cannot be hidden in it.

    Parameters
    ----------
    confusion
        int64[classes, classes] of at least one cell.
    """
    return float(np.nanmean(f1_of_classes(confusion)))
