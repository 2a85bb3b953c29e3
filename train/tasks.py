"""What pretraining and fine-tuning have in common: a micro-batch, and what the loop asks of a task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from corpus.cache import ShardCache
from corpus.reader import Cells, Corpus
from corpus.schema import MASK
from train.batches import BatchReader, plan_epoch
from train.packing import Packed, SpecialTokens, gene_limit, pack
from train.settings import TrainingOptions, WorkerSettings
from train.world import World


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Cells of one rank, ready for the model.

    Parameters
    ----------
    index
        int64[B] on the host: numbers of the cells; empty for a filler.
    packed
        The cells.
    labels
        int64: what is to be predicted.
    rows
        int64, as `labels`: rows of the packed batch that it is to be predicted at; None if it is the whole cell.
    weight
        Sum of the weights that the summed loss has to be divided by; 0 for a filler.
    flops
        Operations of its forward and backward pass (train/flops.py); 0 where a task does not count them.
    """

    index: np.ndarray
    packed: Packed
    labels: Tensor
    rows: Tensor | None
    weight: float
    flops: float = 0.0

    @property
    def num_cells(self) -> int:
        """Real cells."""
        return len(self.index)

    @property
    def num_tokens(self) -> int:
        """Tokens of real cells."""
        return int(self.packed.lengths.sum()) if len(self.index) else 0

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device."""
        rows = None if self.rows is None else self.rows.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return replace(self, packed=self.packed.to(device), labels=labels, rows=rows)


def filler_cells() -> Cells:
    """One cell of one token, for a rank that has no cells in a step but must take part in its collectives."""
    return Cells(np.array([0]), np.array([0, 1]), np.array([MASK], dtype=np.uint16))


class Task(Protocol):
    """What the loop trains."""

    corpus: Corpus
    notes: list[str]
    """What the user should know before it begins."""
    train_cells: np.ndarray
    """int64, ascending."""
    max_length: int
    special_tokens: SpecialTokens

    @property
    def command(self) -> str:
        """Command that runs this task."""

    @property
    def settings(self) -> TrainingOptions:
        """Settings of the run."""

    @property
    def score(self) -> str | None:
        """Evaluation figure whose highest value marks the weights to keep; None keeps the last weights."""

    def identity(self) -> dict[str, Any]:
        """All that the result depends on, inputs by their content hashes."""

    def build_model(self) -> nn.Module:
        """Make the model as it is before the first step; the same on every rank."""

    def prepare(self, cells: Cells, epoch: int) -> MicroBatch:
        """Turn cells into a micro-batch; a pure function."""

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Summed loss (float32 scalar) and number of right predictions (int64 scalar)."""

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Measure during training; every rank calls this and gets the same figures."""

    def final_metrics(self, model: nn.Module, world: World, last: dict[str, float]) -> dict[str, Any]:
        """Measure the model that is about to be saved; `last` is the last evaluation of the weights kept."""

    def save(self, folder: Path, state: dict[str, Tensor], metrics: dict[str, Any]) -> None:
        """Write the model folder's files, without metrics.json."""


def token_lengths(corpus: Corpus, max_length: int, special_tokens: SpecialTokens) -> np.ndarray:
    """int64[cells]: tokens of each cell as the model sees it."""
    extra = max_length - gene_limit(max_length, special_tokens)
    return np.minimum(corpus.lengths, max_length - extra) + extra


def pack_or_fill(cells: Cells, task: Task) -> Packed:
    """Pack cells, or the filler if there are none."""
    return pack(cells if len(cells) else filler_cells(), task.max_length, task.special_tokens)


def loss_scale(world_size: int, weight: Tensor) -> Tensor:
    """Factor that turns summed losses into the mean over all ranks and micro-batches of a step (P8).

    DeepSpeed adds up the gradients of a rank's micro-batches and averages over ranks, so each summed loss is
    multiplied by the world size and divided by the weight of the whole step.

    Parameters
    ----------
    weight
        float64 scalar: masked tokens (or weights of cells) of the step, over all ranks.
    """
    return torch.where(weight > 0, world_size / weight, 0.0)


def batches_of(
    task: Task, cells: np.ndarray, world: World, prepare: Callable[[Cells], MicroBatch]
) -> Iterator[MicroBatch]:
    """Go through some cells once, each rank its share; every rank gets as many batches, some of them maybe fillers."""
    options = task.settings.batches
    plan = plan_epoch(
        token_lengths(task.corpus, task.max_length, task.special_tokens),
        task.corpus.row_group_offsets,
        cells,
        seed=0,
        epoch=0,
        world_size=world.size,
        token_budget=options.token_budget,
        window_row_groups=options.window_row_groups,
        shuffle=False,
    )
    limit = gene_limit(task.max_length, task.special_tokens)
    for micro_batches in BatchReader(task.corpus, plan, prepare, rank=world.rank, max_length=limit):
        world.moved("an evaluation")
        yield from (batch.to(world.device) for batch in micro_batches)


def open_corpus(uri: str, workers: WorkerSettings) -> Corpus:
    """Open a corpus with the cache of the settings."""
    cache = None if workers.cache is None else ShardCache(Path(workers.cache), int(workers.cache_gb * 1e9))
    return Corpus(uri, cache=cache)


def corpus_identity(corpus: Corpus) -> dict[str, Any]:
    """Content of a corpus, wherever it lies."""
    manifest = corpus.manifest
    return {"genes": manifest.genes_hash, "shards": [unit.content_sha256 for unit in manifest.units]}
