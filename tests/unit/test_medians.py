"""Exact medians: equal to numpy's, and independent of how cells are cut into units and in which order they come."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.medians import NUM_BINS, Histogram, exact_medians, normalise, survivors

NUM_GENES = 7


def medians_of(units: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    histogram = Histogram(NUM_GENES)
    for genes, values in units:
        part = Histogram(NUM_GENES)
        part.add(genes, values)
        histogram.add_sparse(*part.to_sparse())
    kept = [survivors(genes, values, *histogram.median_bins()) for genes, values in units]
    return exact_medians(
        histogram, np.concatenate([genes for genes, _ in kept]), np.concatenate([values for _, values in kept])
    )


def numpy_medians(genes: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.array(
        [np.median(values[genes == gene]) if (genes == gene).any() else np.nan for gene in range(NUM_GENES)]
    )


entries = st.lists(
    st.tuples(
        st.integers(0, NUM_GENES - 1),
        # within a bin, across bins, and beyond the first and the last one
        st.floats(1.0, 1.02) | st.floats(1e-9, 1e9) | st.sampled_from([0.5, 1.0, 1.0000000001, 2.0]),
    ),
    min_size=1,
    max_size=80,
)


@given(entries, st.integers(1, 5), st.randoms())
def test_equal_to_numpy_for_any_cut_and_order(drawn: list[tuple[int, float]], parts: int, random: object) -> None:
    genes = np.array([gene for gene, _ in drawn], np.uint32)
    values = np.array([value for _, value in drawn])
    expected = numpy_medians(genes, values)
    order = np.argsort(np.random.default_rng(len(drawn)).random(len(drawn)))
    cuts = np.array_split(order, parts)
    np.testing.assert_array_equal(medians_of([(genes[cut], values[cut]) for cut in cuts]), expected)
    np.testing.assert_array_equal(medians_of([(genes[cut], values[cut]) for cut in reversed(cuts)]), expected)


def test_only_a_small_share_survives_the_first_pass() -> None:
    rng = np.random.default_rng(0)
    genes = rng.integers(0, NUM_GENES, 200_000).astype(np.uint32)
    values = rng.lognormal(1.0, 1.2, 200_000)
    histogram = Histogram(NUM_GENES)
    histogram.add(genes, values)
    kept, _ = survivors(genes, values, *histogram.median_bins())
    assert len(kept) < 0.03 * len(genes)
    assert histogram.n_cells.tolist() == np.bincount(genes, minlength=NUM_GENES).tolist()
    assert histogram.bins.shape == (NUM_BINS, NUM_GENES)


def test_a_missing_or_doubled_unit_is_noticed() -> None:
    genes, values = np.array([0, 0, 1], np.uint32), np.array([1.0, 1.001, 5.0])
    histogram = Histogram(NUM_GENES)
    histogram.add(genes, values)
    kept = survivors(genes, values, *histogram.median_bins())
    with pytest.raises(ValueError, match="do not add up"):
        exact_medians(histogram, kept[0][:-1], kept[1][:-1])
    with pytest.raises(ValueError, match="do not add up"):
        exact_medians(histogram, np.tile(kept[0], 2), np.tile(kept[1], 2))


def test_normalised_counts_are_per_ten_thousand() -> None:
    values = normalise(np.array([1, 3], np.uint32), np.array([10_000, 6], np.uint64))
    assert values.tolist() == [1.0, 5_000.0]
