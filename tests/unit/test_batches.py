"""The plan of an epoch and its reader (P5, P6, P7, R11)."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.reader import Cells, Corpus
from tests.factories import write_corpus
from train.batches import BatchReader, EpochPlan, next_fit, plan_epoch


def make_plan(num_cells=500, group=32, *, seed=3, epoch=0, cells=None, **changes) -> tuple[EpochPlan, np.ndarray]:
    lengths = np.random.default_rng(seed).integers(1, 200, num_cells)
    offsets = np.append(np.arange(0, num_cells, group), num_cells)
    chosen = np.arange(num_cells) if cells is None else cells
    options = {"world_size": 1, "token_budget": 700, "window_row_groups": 4, **changes}
    return plan_epoch(lengths, offsets, chosen, seed=seed, epoch=epoch, **options), lengths


def all_cells(plan: EpochPlan) -> list[np.ndarray]:
    return [
        plan.cells(step, rank, micro)
        for step in range(plan.num_steps)
        for micro in range(plan.accumulation)
        for rank in range(plan.world_size)
    ]


@given(
    num_cells=st.integers(1, 120),
    group=st.integers(1, 40),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    token_budget=st.integers(1, 900),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_cell_once_and_budget_kept(num_cells, group, world_size, accumulation, token_budget, window, epoch):
    chosen = np.sort(np.random.default_rng(num_cells).choice(num_cells, (num_cells + 1) // 2, replace=False))
    plan, lengths = make_plan(
        num_cells,
        group,
        cells=chosen,
        epoch=epoch,
        world_size=world_size,
        accumulation=accumulation,
        token_budget=token_budget,
        window_row_groups=window,
    )
    batches = all_cells(plan)
    assert sorted(np.concatenate(batches)) == chosen.tolist()
    for cells in batches:
        assert len(cells) <= 1 or lengths[cells].sum() <= token_budget


def test_last_step_is_shared_out():
    # One micro-batch for eight ranks: every rank gets some of its cells.
    plan, _ = make_plan(40, world_size=4, accumulation=2, token_budget=10**6)
    assert plan.num_steps == 1
    assert min(len(cells) for cells in all_cells(plan)) >= 1


def test_fewer_cells_than_ranks_leaves_some_ranks_empty():
    plan, _ = make_plan(3, world_size=4, accumulation=2)
    sizes = [len(cells) for cells in all_cells(plan)]
    assert plan.num_steps == 1
    assert sorted(sizes) == [0] * 5 + [1] * 3


def test_order_depends_on_seed_and_epoch_only():
    first, _ = make_plan()
    again, _ = make_plan(world_size=4, accumulation=2)
    other_epoch, _ = make_plan(epoch=1)
    assert first.order.tolist() == again.order.tolist()
    assert first.order.tolist() != other_epoch.order.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_a_step_holds_the_same_cells_whatever_the_world_size(world_size):
    # A run that began with four ranks goes on with any number of them, also one that does not divide the step (R11).
    began, lengths = make_plan(world_size=4)
    going_on, _ = make_plan(world_size=world_size, per_step=4)
    assert going_on.num_steps == began.num_steps > 3
    for step in range(began.num_steps):
        steps = [
            np.concatenate(
                [plan.cells(step, rank, micro) for micro in range(plan.accumulation) for rank in range(plan.world_size)]
            )
            for plan in (began, going_on)
        ]
        assert steps[0].tolist() == steps[1].tolist()
        for rank in range(world_size):
            for micro in range(going_on.accumulation):
                cells = going_on.cells(step, rank, micro)
                assert len(cells) <= 1 or lengths[cells].sum() <= 700


def test_batch_length_is_uncorrelated_with_step():
    # Rows come sorted by length, as in a file sorted longest first: the worst case for P7.
    lengths = np.sort(np.random.default_rng(0).integers(50, 2048, 40_000))[::-1].copy()
    offsets = np.arange(0, 40_001, 1000)
    correlations = []
    for epoch in range(8):
        plan = plan_epoch(
            lengths,
            offsets,
            np.arange(40_000),
            seed=1,
            epoch=epoch,
            world_size=1,
            token_budget=16_384,
            window_row_groups=40,
        )
        mean = np.array([lengths[cells].mean() for cells in all_cells(plan)[:-1]])
        correlations.append(np.corrcoef(np.arange(len(mean)), mean)[0, 1])
    assert abs(np.mean(correlations)) < 0.05


def test_next_fit_gives_a_long_cell_its_own_batch():
    assert next_fit(np.array([3, 3, 9, 3, 2]), 6).tolist() == [0, 2, 3, 5]
    assert next_fit(np.zeros(0, np.int64), 6).tolist() == [0]


def test_unsorted_cells_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        make_plan(cells=np.array([3, 1]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus(write_corpus(tmp_path_factory.mktemp("batches") / "corpus", num_cells=60))


def corpus_plan(corpus: Corpus, **changes) -> EpochPlan:
    options = {"seed": 0, "epoch": 0, "world_size": 2, "accumulation": 2, "token_budget": 60, "window_row_groups": 2}
    return plan_epoch(
        np.minimum(corpus.lengths, 30), corpus.row_group_offsets, np.arange(len(corpus)), **{**options, **changes}
    )


def test_reader_gives_the_planned_cells_truncated(corpus):
    plan = corpus_plan(corpus)
    whole = corpus.read_cells(np.arange(len(corpus))).truncate(30)
    for rank in range(2):
        reader = BatchReader(corpus, plan, lambda cells: cells, rank=rank, max_length=30)
        steps = list(reader)
        assert len(steps) == plan.num_steps
        for step, batches in enumerate(steps):
            for micro, cells in enumerate(batches):
                expected = whole.take(plan.cells(step, rank, micro))
                assert cells.index.tolist() == expected.index.tolist()
                assert cells.tokens.tolist() == expected.tokens.tolist()


class Jittery(Corpus):
    """Row groups that come late, and not in the order in which they were asked for."""

    def read_row_group(self, group: int, counts: bool = False) -> Cells:
        time.sleep(float(np.random.default_rng(group).random()) * 0.03)
        return super().read_row_group(group, counts)


def test_batches_do_not_depend_on_the_number_of_threads(tmp_path):
    # Windows of two or three cells, so that batches cross their borders.
    corpus = Corpus(write_corpus(tmp_path / "corpus", num_cells=60, num_shards=12))
    plan = plan_epoch(
        np.minimum(corpus.lengths, 30),
        corpus.row_group_offsets,
        np.arange(1, len(corpus), 2),
        seed=5,
        epoch=1,
        world_size=1,
        accumulation=2,
        token_budget=150,
        window_row_groups=1,
    )

    def seen(threads: int, first_step: int = 0) -> list[list[tuple[list[int], list[int]]]]:
        reader = BatchReader(
            Jittery(corpus.store.uri),
            plan,
            lambda cells: (cells.index.tolist(), cells.tokens.tolist()),
            rank=0,
            first_step=first_step,
            max_length=30,
            threads=threads,
        )
        return list(reader)

    alone = seen(1)
    assert [cells for step in alone for batch in step for cells in batch[0]] == plan.order.tolist()
    assert max(len(plan.windows(*plan.span(step, 0, 0))) for step in range(plan.num_steps)) > 1
    assert seen(4) == alone
    assert seen(3, first_step=2) == alone[2:]


def test_reader_resumes_at_a_step(corpus):
    plan = corpus_plan(corpus)

    def tokens(first_step: int) -> list[list[int]]:
        reader = BatchReader(
            corpus, plan, lambda cells: cells.tokens.tolist(), rank=1, first_step=first_step, max_length=30
        )
        return list(reader)

    assert plan.num_steps > 3
    assert tokens(2) == tokens(0)[2:]


def test_reader_raises_what_went_wrong_in_its_thread(corpus):
    def fail(cells: Cells) -> Cells:
        raise RuntimeError("cannot prepare")

    with pytest.raises(RuntimeError, match="cannot prepare"):
        list(BatchReader(corpus, corpus_plan(corpus), fail, rank=0, max_length=30))


def test_reader_thread_ends_when_the_loop_is_left(corpus):
    before = threading.active_count()
    for _ in BatchReader(corpus, corpus_plan(corpus), lambda cells: cells, rank=0, max_length=30, ahead=1):
        break
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
