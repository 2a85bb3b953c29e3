"""Rank value encoding against a slow reference that shares nothing with it (R18; traps T7, T8, T9, T15)."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.rank import rank_cells, rank_violation

VOCAB = 400


def reference(tokens: list[int], counts: list[int], medians: np.ndarray) -> list[int]:
    """The definition in exact arithmetic up to the float64 division, with Python's own sort."""
    return sorted(tokens, key=lambda token: (-(counts[tokens.index(token)] / float(medians[token])), token))


def random_medians(values: list[float], seed: int) -> np.ndarray:
    medians = np.random.default_rng(seed).choice(values, VOCAB)
    medians[:4] = np.nan
    return medians


cells = st.lists(
    st.dictionaries(st.integers(4, VOCAB - 1), st.integers(1, 3) | st.integers(1, 2**32 - 1), max_size=60), max_size=6
)
# Neighbouring floats make keys that float32 cannot tell apart; equal ones make ties.
median_values = st.lists(
    st.sampled_from([0.5, 1.0, 1.5, np.nextafter(1.5, 2), 3.0, 2.9999999999999996, 7.25, 1e-3]), min_size=1
)


@given(cells, median_values, st.integers(0, 2**32 - 1))
def test_order_is_that_of_the_slow_reference(drawn: list[dict[int, int]], values: list[float], seed: int) -> None:
    medians = random_medians(values, seed)
    ordered = [sorted(cell.items()) for cell in drawn]
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in ordered])]).astype(np.int64)
    tokens = np.array([token for cell in ordered for token, _ in cell], np.uint16)
    counts = np.array([count for cell in ordered for _, count in cell], np.uint32)
    ranked_tokens, ranked_counts = rank_cells(indptr, tokens, counts, medians)
    for i, cell in enumerate(ordered):
        names, numbers = [token for token, _ in cell], [count for _, count in cell]
        found = ranked_tokens[indptr[i] : indptr[i + 1]].tolist()
        assert found == reference(names, numbers, medians)
        assert ranked_counts[indptr[i] : indptr[i + 1]].tolist() == [dict(cell)[token] for token in found]
    assert rank_violation(indptr, ranked_tokens, ranked_counts, medians) is None


def test_the_median_divides_and_ties_go_by_token() -> None:
    medians = np.full(20, np.nan)
    medians[[4, 5, 6, 7, 8]] = [1.0, 4.0, 2.0, 2.0, 0.5]
    # keys: 8, 2, 2, 2, 2
    tokens, counts = rank_cells(np.array([0, 5]), np.array([4, 5, 6, 7, 8]), np.array([8, 8, 4, 4, 1]), medians)
    assert tokens.tolist() == [4, 5, 6, 7, 8]
    assert counts.tolist() == [8, 8, 4, 4, 1]
    tokens, _ = rank_cells(np.array([0, 5]), np.array([4, 5, 6, 7, 8]), np.array([1, 8, 4, 4, 9]), medians)
    assert tokens.tolist() == [8, 5, 6, 7, 4]


def test_keys_closer_than_float32_are_told_apart() -> None:
    medians = np.full(8, np.nan)
    medians[4:8] = [1.0 + 3e-12, 1.0 + 1e-12, 1.0, 1.0 + 2e-12]
    tokens, _ = rank_cells(np.array([0, 4]), np.arange(4, 8), np.full(4, 7), medians)
    assert tokens.tolist() == [6, 5, 7, 4]
    # 2^32 - 1 and 2^32 - 2 have one float32
    medians[4:6] = 1.0
    tokens, _ = rank_cells(np.array([0, 2]), np.array([4, 5]), np.array([2**32 - 2, 2**32 - 1]), medians)
    assert tokens.tolist() == [5, 4]


@pytest.mark.parametrize("size", [33, 3_000])
def test_thousands_of_keys_nearly_equal_are_ordered_exactly(size: int) -> None:
    """Bits that the radix passes drop decide everything: the merge sort behind them, and ties that it must keep."""
    rng = np.random.default_rng(size)
    medians = np.full(size + 4, np.nan)
    medians[4:] = 1.0 + rng.permutation(size) // 2 * 1e-9  # every key occurs twice
    tokens, counts = np.arange(4, size + 4, dtype=np.uint16), np.full(size, 7, np.uint32)
    ranked, _ = rank_cells(np.array([0, size]), tokens, counts, medians)
    assert ranked.tolist() == tokens[np.lexsort((tokens, -(counts / medians[4:])))].tolist()
    # One such cell must not disturb its neighbours.
    twice, _ = rank_cells(np.array([0, size, 2 * size]), np.tile(tokens, 2), np.tile(counts, 2), medians)
    assert twice.tolist() == ranked.tolist() * 2


def test_scaling_to_ten_thousand_gives_the_same_order() -> None:
    """The formula as published divides by the cell's total; in exact arithmetic that is the same order."""
    rng = np.random.default_rng(3)
    medians = random_medians([0.5, 1.25, 2.0, 5.5], 3)  # exact in binary: only true ties are ties
    tokens = np.sort(rng.choice(np.arange(4, VOCAB), 120, replace=False))
    counts = rng.geometric(0.3, 120)
    total = Fraction(int(counts.sum()) + 17)

    def exact(i: int) -> Fraction:
        return Fraction(int(counts[i])) / total * 10_000 / Fraction(float(medians[tokens[i]]))

    expected = sorted(range(120), key=lambda i: (-exact(i), tokens[i]))
    ranked, _ = rank_cells(np.array([0, 120]), tokens, counts, medians)
    assert ranked.tolist() == tokens[expected].tolist()


def test_empty_cells_stay_empty() -> None:
    medians = np.full(8, 1.0)
    tokens, counts = rank_cells(np.array([0, 0, 1, 1]), np.array([5]), np.array([2]), medians)
    assert (tokens.tolist(), counts.tolist()) == ([5], [2])
    tokens, _ = rank_cells(np.array([0]), np.zeros(0), np.zeros(0), medians)
    assert len(tokens) == 0


@pytest.mark.parametrize(
    ("tokens", "counts", "why"),
    [
        ([5, 5], [1, 1], "repeated"),
        ([6, 5], [1, 1], "descending"),
        ([5, 6], [1, 0], "zero count"),
        ([2, 5], [1, 1], "no median"),
        ([5, 900], [1, 1], "outside the vocabulary"),
    ],
)
def test_faulty_cells_are_refused(tokens: list[int], counts: list[int], why: str) -> None:
    medians = np.full(8, 1.0)
    medians[:4] = np.nan
    with pytest.raises(ValueError, match="cell 1"):
        rank_cells(np.array([0, 1, 3]), np.array([4, *tokens]), np.array([1, *counts]), medians)


@pytest.mark.parametrize(
    ("tokens", "counts", "reason"),
    [
        ([5, 6, 7], [3, 2, 2], None),
        ([6, 5, 7], [3, 2, 2], None),
        ([5, 7, 6], [3, 2, 2], "rank order"),
        ([6, 5, 7], [2, 3, 2], "rank order"),
        ([5, 6, 5], [3, 2, 1], "twice"),
        ([5, 6, 2], [3, 2, 1], "outside"),
        ([5, 6, 60], [3, 2, 1], "outside"),
        ([5, 6, 7], [3, 2, 0], "zero"),
    ],
)
def test_violations_are_found_and_named(tokens: list[int], counts: list[int], reason: str | None) -> None:
    medians = np.full(8, 1.0)
    medians[:4] = np.nan
    indptr = np.array([0, 2, 5])
    found = rank_violation(indptr, np.array([4, 5, *tokens], np.uint16), np.array([9, 1, *counts]), medians)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == 1
        assert reason in found[1]
