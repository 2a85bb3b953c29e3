"""Means over few donors with variances moderated over genes.

With three donors a gene's own variance has two degrees of freedom and says next to nothing. Smyth (Statistical
Applications in Genetics and Molecular Biology 3(1), 2004) estimates from all genes how variances are spread, and takes
for each gene the compromise between its own and that of the others; the t-statistic gains the prior's degrees of
freedom and keeps its distribution. The prior's scale is here a running mean of log variances over genes ordered by a
covariate, as variances of donor means depend on how many cells they are taken over.
"""

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from scipy.special import digamma, polygamma

_SMOOTHED_GENES = 201


@dataclass(frozen=True)
class Estimate:
    """Means with standard errors and degrees of freedom, float64[genes] each; NaN where not known."""

    mean: np.ndarray
    error: np.ndarray
    df: np.ndarray

    def where(self, chosen: np.ndarray, other: "Estimate") -> "Estimate":
        """Take this estimate where `chosen`, the other one elsewhere."""
        return Estimate(*(np.where(chosen, getattr(self, n), getattr(other, n)) for n in ("mean", "error", "df")))


def moderate(values: np.ndarray, covariate: np.ndarray) -> Estimate:
    """Mean of each gene over donors.

    Parameters
    ----------
    values
        float64[genes, donors], NaN where a donor lacks the gene.
    covariate
        [genes]: what the size of variances may depend on.

    Returns
    -------
    Genes with fewer than two donors have no estimate.
    """
    number = np.isfinite(values).sum(axis=1)
    known = number >= 2
    mean, variance = np.full((2, len(values)), np.nan)
    mean[known] = np.nanmean(values[known], axis=1)
    variance[known] = np.nanvar(values[known], axis=1, ddof=1)
    df = np.where(known, number - 1.0, np.nan)
    usable = known & (variance > 0)
    if usable.sum() < 3:
        return Estimate(mean, np.sqrt(variance / number), df)
    prior, prior_df = _prior(variance[usable], df[usable], covariate[usable])
    scale = np.interp(covariate, *_monotone(covariate[usable], prior))
    if np.isinf(prior_df):
        posterior = scale
    else:
        posterior = (prior_df * scale + df * variance) / (prior_df + df)
    return Estimate(mean, np.sqrt(np.where(known, posterior, np.nan) / number), df + prior_df)


def _prior(variance: np.ndarray, df: np.ndarray, covariate: np.ndarray) -> tuple[np.ndarray, float]:
    """Scale of each gene's variance, and the degrees of freedom of its spread (moments of log variances)."""
    logs = np.log(variance) - digamma(df / 2) + np.log(df / 2)
    order = np.argsort(covariate, kind="stable")
    width = min(_SMOOTHED_GENES, len(logs))
    trend = np.empty_like(logs)
    trend[order] = scipy.ndimage.uniform_filter1d(logs[order], width, mode="nearest")
    # A running mean follows its own points a little: their residuals are short of 1 / width of the variance.
    spread = np.mean((logs - trend) ** 2) / (1 - 1 / width)
    excess = spread - np.mean(polygamma(1, df / 2))
    prior_df = np.inf if excess <= 0 else 2 * _trigamma_inverse(float(excess))
    correction = 0.0 if np.isinf(prior_df) else digamma(prior_df / 2) - np.log(prior_df / 2)
    return np.exp(trend + correction), float(prior_df)


def _trigamma_inverse(y: float) -> float:
    """Solve trigamma(x) = y by Newton's method on 1 / trigamma, which is convex and nearly linear."""
    x = 0.5 + 1 / y
    for _ in range(50):
        trigamma = float(polygamma(1, x))
        step = trigamma * (1 - trigamma / y) / float(polygamma(2, x))
        x += step
        if abs(step) < 1e-10 * x:
            break
    return x


def _monotone(covariate: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort for interpolation, one point a covariate."""
    points, inverse = np.unique(covariate, return_inverse=True)
    return points, np.bincount(inverse, scale) / np.bincount(inverse)
