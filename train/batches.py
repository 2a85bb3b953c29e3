"""Which cells a rank sees in which step: a pure plan of an epoch, and a reader that follows it.

The order of an epoch is a block shuffle: row groups are permuted, a window of several row groups is read at a time, and
the cells of a window are permuted. The order is then cut into micro-batches that hold at most a budget of tokens (next
fit), and a step is a fixed number of micro-batches, dealt out to the ranks. Everything follows from the seed, the
epoch, the size of a step and the lengths, so a position in the data is one number: the step.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

    def windows(self, first: int, last: int) -> range:
        """Windows that hold `order[first:last]`: one, or more where a span crosses a border; none if it is empty."""
        if first == last:
            return range(0)
        low, high = np.searchsorted(self.window_offsets, [first, last - 1], side="right") - 1
        return range(int(low), int(high) + 1)

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
    """Reads the micro-batches of one rank, a few steps ahead of their use, in threads.

    Parameters
    ----------
    plan
        The epoch.
    prepare
        Turns the cells of a micro-batch into what the model takes; called in the threads, must be a pure function.
    rank
        Whose micro-batches.
    first_step
        Where to begin: everything before is skipped without being read.
    max_length
        Longer cells are cut when they are read.
    ahead
        Steps that may wait in memory; at least as many as threads are in the making.
    threads
        Steps prepared, and row groups read, at a time.

    Notes
    -----
    Threads only decide when a batch is made, never what is in it. An exception in one is raised where the batch would
    have been returned.
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
        threads: int = 2,
    ) -> None:
        self._corpus = corpus
        self._plan = plan
        self._prepare = prepare
        self._rank = rank
        self._steps = range(first_step, plan.num_steps)
        self._max_length = max_length
        self._ahead = max(ahead, threads)
        self._threads = threads

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield, for each step, the micro-batches of this rank."""
        # Two pools: steps wait for row groups, and must not keep the threads that read them.
        reading = ThreadPoolExecutor(self._threads, thread_name_prefix="row-groups")
        making = ThreadPoolExecutor(self._threads, thread_name_prefix="batches")
        windows = _Windows(self._corpus, self._plan, reading)
        waiting: deque[Future[list[Batch]]] = deque()
        try:
            for step in self._steps:
                waiting.append(making.submit(self._make, windows.of_step(step, self._rank), step))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for pool in (making, reading):
                pool.shutdown(cancel_futures=True)

    def _make(self, loaded: "dict[int, _Window]", step: int) -> list[Batch]:
        spans = [self._plan.span(step, self._rank, micro) for micro in range(self._plan.accumulation)]
        return [self._prepare(self._cells(loaded, first, last)) for first, last in spans]

    def _cells(self, loaded: "dict[int, _Window]", first: int, last: int) -> Cells:
        """Cells `order[first:last]`, in that order."""
        offsets = self._plan.window_offsets
        parts = []
        for number in self._plan.windows(first, last):
            wanted = self._plan.order[max(first, offsets[number]) : min(last, offsets[number + 1])]
            cells = loaded[number].cells()
            parts.append(cells.take(np.searchsorted(cells.index, wanted), self._max_length))
        return parts[0] if len(parts) == 1 else Cells.concatenate(parts)


class _Window:
    """The cells of one window, which threads are reading; joined by the first one that needs them."""

    def __init__(self, parts: "list[Future[Cells]]") -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._cells: Cells | None = None

    def cells(self) -> Cells:
        with self._lock:
            if self._cells is None:
                self._cells = Cells.concatenate([part.result() for part in self._parts])
                self._parts = []
            return self._cells


class _Windows:
    """The windows in use, and the next one, which is read while they are."""

    def __init__(self, corpus: Corpus, plan: EpochPlan, pool: ThreadPoolExecutor) -> None:
        self._corpus = corpus
        self._plan = plan
        self._pool = pool
        self._loaded: dict[int, _Window] = {}

    def of_step(self, step: int, rank: int) -> dict[int, _Window]:
        """Windows that a step of a rank takes cells from; those of earlier steps are let go."""
        needed: set[int] = set()
        for micro in range(self._plan.accumulation):
            needed |= set(self._plan.windows(*self._plan.span(step, rank, micro)))
        if needed:
            for number in [number for number in self._loaded if number < min(needed)]:
                del self._loaded[number]
            for number in range(min(needed), min(max(needed) + 2, len(self._plan.window_offsets) - 1)):
                if number not in self._loaded:
                    self._loaded[number] = self._read(number)
        return {number: self._loaded[number] for number in needed}

    def _read(self, number: int) -> _Window:
        first, last = self._plan.window_offsets[number : number + 2]
        wanted = np.sort(self._plan.order[first:last])
        groups = np.searchsorted(self._corpus.row_group_offsets, wanted, side="right") - 1
        parts = np.split(wanted, np.flatnonzero(np.diff(groups)) + 1)
        return _Window([self._pool.submit(self._read_part, part) for part in parts])

    def _read_part(self, wanted: np.ndarray) -> Cells:
        """Read the wanted cells of one row group."""
        (cells,) = self._corpus.iter_cells(wanted)
        return cells
