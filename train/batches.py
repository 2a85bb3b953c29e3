"""Which cells a rank sees in which step: a pure plan of an epoch, and a reader that follows it.

The order of an epoch is a block shuffle: row groups are permuted, a window of several row groups is read at a time, and
the cells of a window are permuted. The order is then cut into micro-batches that hold at most a budget of tokens (next
fit), and a step is a fixed number of micro-batches, dealt out to the ranks. Everything follows from the seed, the
epoch, the size of a step and the lengths, so a position in the data is one number: the step.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np

from corpus.reader import Cells, Corpus

Batch = TypeVar("Batch")

_ORDER_STREAM = 0x6F72646572  # "order": keeps these draws apart from the other uses of the same seed


@dataclass(frozen=True)
class EpochPlan:
    """The cells of an epoch in the order of their use, cut into micro-batches.

    Parameters
    ----------
    order
        int64[cells]: every chosen cell once.
    window_offsets
        int64[windows + 1]: window w is `order[window_offsets[w]:window_offsets[w + 1]]`, read together.
    bounds
        int64[micro-batches + 1]: micro-batch b is `order[bounds[b]:bounds[b + 1]]`.
    world_size
        Ranks that share each step.
    per_step
        Micro-batches of one step, over all ranks.
    """

    order: np.ndarray
    window_offsets: np.ndarray
    bounds: np.ndarray
    world_size: int
    per_step: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step; some are empty if the step does not divide among the ranks."""
        return -(-self.per_step // self.world_size)

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the same for every rank."""
        return -(-(len(self.bounds) - 1) // self.per_step)

    def span(self, step: int, rank: int, micro: int) -> tuple[int, int]:
        """First and last-plus-one position in `order` of a micro-batch; an empty span where there is none left."""
        place = micro * self.world_size + rank
        number = step * self.per_step + place
        if place >= self.per_step or number >= len(self.bounds) - 1:
            return len(self.order), len(self.order)
        return int(self.bounds[number]), int(self.bounds[number + 1])

    def cells(self, step: int, rank: int, micro: int) -> np.ndarray:
        """Cell numbers of a micro-batch, int64, maybe empty."""
        first, last = self.span(step, rank, micro)
        return self.order[first:last]


def plan_epoch(
    lengths: np.ndarray,
    row_group_offsets: np.ndarray,
    cells: np.ndarray,
    *,
    seed: int,
    epoch: int,
    world_size: int,
    accumulation: int = 1,
    per_step: int | None = None,
    token_budget: int,
    window_row_groups: int = 16,
    shuffle: bool = True,
) -> EpochPlan:
    """Lay out an epoch.

    Parameters
    ----------
    lengths
        int64[cells of the corpus]: tokens that the model sees of each cell (truncated, special tokens included).
    row_group_offsets
        int64[row groups + 1], as `Corpus.row_group_offsets`.
    cells
        int64[n]: the cells that take part, ascending and unique.
    accumulation
        Micro-batches of one rank in one step.
    per_step
        Micro-batches of one step over all ranks, instead of `world_size * accumulation`. Steps of the same size hold
        the same cells whatever the world size, so a run can go on with another number of workers.
    token_budget
        Most tokens in one micro-batch of one rank; a single longer cell is a micro-batch of its own.
    window_row_groups
        Row groups that are read and mixed together.
    shuffle
        False keeps the corpus order (evaluation).

    Notes
    -----
    The last step of an epoch rarely has enough micro-batches for all ranks. Its largest ones are then halved until
    every rank has some cells or every micro-batch is one cell, so that no rank idles while others work.
    """
    if np.any(np.diff(cells) <= 0):
        raise ValueError("cells must be unique and ascending")
    order, window_offsets = _order(row_group_offsets, cells, seed, epoch, window_row_groups, shuffle)
    bounds = next_fit(lengths[order], token_budget)
    per_step = per_step or world_size * accumulation
    bounds = _fill_last_step(bounds, lengths[order], per_step)
    return EpochPlan(order, window_offsets, bounds, world_size, per_step)


def next_fit(lengths: np.ndarray, token_budget: int) -> np.ndarray:
    """Cut a sequence of cells where the next one would not fit any more.

    Parameters
    ----------
    lengths
        int64[cells], in the order of their use.

    Returns
    -------
    int64[parts + 1]: bounds of the parts; each part but a single long cell holds at most `token_budget` tokens.
    """
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        first = bounds[-1]
        used = ends[first - 1] if first else 0
        bounds.append(max(first + 1, int(np.searchsorted(ends, used + token_budget, side="right"))))
    return np.asarray(bounds, dtype=np.int64)


def _order(
    row_group_offsets: np.ndarray, cells: np.ndarray, seed: int, epoch: int, window_row_groups: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    # Cells of row group g are cells[starts[g]:starts[g + 1]].
    starts = np.searchsorted(cells, row_group_offsets)
    groups = np.flatnonzero(np.diff(starts))
    rng = np.random.default_rng([_ORDER_STREAM, seed, epoch])
    if shuffle:
        groups = rng.permutation(groups)
    parts, sizes = [], [0]
    for first in range(0, len(groups), window_row_groups):
        window = groups[first : first + window_row_groups]
        members = np.concatenate([cells[starts[group] : starts[group + 1]] for group in window])
        parts.append(rng.permutation(members) if shuffle else members)
        sizes.append(len(members))
    order = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return order.astype(np.int64), np.cumsum(sizes).astype(np.int64)


def _fill_last_step(bounds: np.ndarray, lengths: np.ndarray, slots: int) -> np.ndarray:
    full = (len(bounds) - 1) // slots * slots
    tail = [int(bound) for bound in bounds[full:]]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    while 1 < len(tail) <= slots:
        sizes = [(int(ends[b] - ends[a]), i) for i, (a, b) in enumerate(pairwise(tail)) if b - a > 1]
        if not sizes:
            break
        _, i = max(sizes, key=lambda item: (item[0], -item[1]))
        a, b = tail[i], tail[i + 1]
        middle = int(np.searchsorted(ends, (ends[a] + ends[b]) // 2))
        tail.insert(i + 1, min(max(middle, a + 1), b - 1))
    return np.concatenate([bounds[:full], np.asarray(tail, dtype=np.int64)])


class BatchReader(Generic[Batch]):
    """Reads the micro-batches of one rank, a few steps ahead of their use, in a thread.

    Parameters
    ----------
    plan
        The epoch.
    prepare
        Turns the cells of a micro-batch into what the model takes; called in the thread, must be a pure function.
    rank
        Whose micro-batches.
    first_step
        Where to begin: everything before is skipped without being read.
    max_length
        Longer cells are cut when they are read.
    ahead
        Steps that may wait in memory.

    Notes
    -----
    The thread only decides when a batch is made, never what is in it. An exception in it is raised where the batch
    would have been returned.
    """

    def __init__(
        self,
        corpus: Corpus,
        plan: EpochPlan,
        prepare: Callable[[Cells], Batch],
        *,
        rank: int,
        first_step: int = 0,
        max_length: int,
        ahead: int = 4,
    ) -> None:
        self._corpus = corpus
        self._plan = plan
        self._prepare = prepare
        self._rank = rank
        self._steps = range(first_step, plan.num_steps)
        self._max_length = max_length
        self._queue: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(ahead)
        self._stopped = threading.Event()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield, for each step, the micro-batches of this rank."""
        thread = threading.Thread(target=self._fill, name="batch-reader", daemon=True)
        thread.start()
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stopped.set()
            thread.join()

    def _fill(self) -> None:
        try:
            windows = _Windows(self._corpus, self._plan, self._max_length)
            for step in self._steps:
                spans = [self._plan.span(step, self._rank, micro) for micro in range(self._plan.accumulation)]
                if not self._put([self._prepare(windows.read(first, last)) for first, last in spans]):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - handed over to the training thread, which raises it
            self._put(error)

    def _put(self, item: list[Batch] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


class _Windows:
    """The cells of the windows that are in use: one, or two where a micro-batch spans a border."""

    def __init__(self, corpus: Corpus, plan: EpochPlan, max_length: int) -> None:
        self._corpus = corpus
        self._plan = plan
        self._max_length = max_length
        self._loaded: dict[int, Cells] = {}

    def read(self, first: int, last: int) -> Cells:
        """Cells `order[first:last]`, in that order."""
        if first == last:
            return Cells.concatenate([])
        offsets = self._plan.window_offsets
        low, high = np.searchsorted(offsets, [first, last - 1], side="right") - 1
        for window in [number for number in self._loaded if number < low]:
            del self._loaded[window]
        parts = []
        for window in range(int(low), int(high) + 1):
            wanted = self._plan.order[max(first, offsets[window]) : min(last, offsets[window + 1])]
            cells = self._window(window)
            parts.append(cells.take(np.searchsorted(cells.index, wanted)))
        return parts[0] if len(parts) == 1 else Cells.concatenate(parts)

    def _window(self, window: int) -> Cells:
        if window not in self._loaded:
            first, last = self._plan.window_offsets[window : window + 2]
            wanted = np.sort(self._plan.order[first:last])
            parts: Sequence[Cells] = [part.truncate(self._max_length) for part in self._corpus.iter_cells(wanted)]
            self._loaded[window] = Cells.concatenate(parts)
        return self._loaded[window]
