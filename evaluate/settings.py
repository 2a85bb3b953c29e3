"""Settings of embedding and classification."""

from typing import Literal

from pydantic import Field

from corpus.settings import Settings
from evaluate.perturb_settings import ReadoutSettings

ReadoutPrecision = Literal["float32", "bfloat16", "float16"]


class EncoderSettings(ReadoutSettings):
    """What is read from the model."""

    embedding: Literal["mean", "cls"] = "mean"
    """mean: over the cell's genes, <cls> and <eos> left out; cls: the <cls> token, where the model has it."""


class WorkerSettings(Settings):
    """Who runs the model; nothing here changes the result, beyond rounding."""

    count: int = Field(1, ge=1)
    """1 runs in this process; more are Ray actors."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of each actor; by default 1 if the cluster has any."""
    cpus: float = Field(1.0, gt=0)
    """CPUs of each actor."""
    token_budget: int | None = Field(None, ge=1)
    """Most tokens in one batch, halved when memory runs out. By default 262,144 on a GPU and 16,384 on a CPU."""


class UmapSettings(Settings):
    """Two-dimensional picture of the embedding (McInnes et al., arXiv:1802.03426)."""

    enabled: bool = True
    """Compute it."""
    neighbors: int = Field(15, ge=2)
    """Size of a cell's neighbourhood."""
    min_dist: float = Field(0.3, ge=0)
    """How close cells may lie."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Distance between embeddings."""
    max_fit_cells: int = Field(100_000, ge=10)
    """Above this number the layout is made from a random sample, into which the other cells are then placed."""


class BaselineSettings(Settings):
    """Logistic regression on principal components of log-normalised counts."""

    enabled: bool = True
    """Compute it; without it a classifier's figures mean little."""
    components: int = Field(50, ge=2)
    """Principal components."""
    max_train_cells: int = Field(200_000, ge=10)
    """Above this number it is trained on a random sample, and the metrics say so: PCA needs the matrix in memory."""
