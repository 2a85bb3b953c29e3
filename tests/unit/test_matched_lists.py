"""Random lists that resemble a given one in detection and rank."""

import numpy as np
import pytest

from corpus.reader import Corpus
from evaluate.matched_lists import GenePlaces, draw_lists, find_places
from tests.factories import write_corpus


@pytest.fixture
def places():
    rng = np.random.default_rng(0)
    detections = rng.integers(0, 500, 1004)
    detections[4:204] = 0
    ranks = np.where(detections > 0, rng.uniform(0, 300, 1004), np.nan)
    return GenePlaces(detections, ranks)


GENES = np.arange(4, 1004)


def test_lists_are_matched_gene_by_gene(places):
    listed = np.array([300, 700, 1000])
    lists = draw_lists(listed, GENES, places, 200, seed=1)
    assert lists.shape == (200, 3)
    assert not np.isin(lists, listed).any()
    assert all(len(set(row)) == 3 for row in lists.tolist())
    assert len({tuple(sorted(row)) for row in lists.tolist()}) == 200
    others = np.setdiff1d(np.flatnonzero(places.detections), listed)
    for column, gene in enumerate(listed):
        for values in (np.log2(places.detections + 1), places.mean_ranks):
            near = np.abs(values[lists[:, column]] - values[gene]).mean()
            assert near < 0.35 * np.abs(values[others] - values[gene]).mean()
        assert len(np.unique(lists[:, column])) > 30  # not always the same


def test_draws_depend_on_the_seed_alone(places):
    listed = np.array([300, 700])
    first = draw_lists(listed, GENES, places, 20, seed=3)
    np.testing.assert_array_equal(first, draw_lists(listed, GENES, places, 20, seed=3))
    assert not np.array_equal(first, draw_lists(listed, GENES, places, 20, seed=4))


def test_a_gene_in_no_cell_is_replaced_by_such_genes(places):
    lists = draw_lists(np.array([10, 700]), GENES, places, 40, seed=0)
    assert (places.detections[lists[:, 0]] == 0).all()
    assert (places.detections[lists[:, 1]] > 0).all()


def test_too_few_other_genes_are_refused(places):
    with pytest.raises(ValueError, match="only 1 genes besides"):
        draw_lists(np.array([4, 5]), np.array([4, 5, 6]), places, 1, seed=0)
    with pytest.raises(ValueError, match="different lists"):
        draw_lists(np.array([4, 5]), np.array([4, 5, 6, 7]), places, 2, seed=0)


def test_places_are_counted_over_the_inputs_of_cells(tmp_path):
    corpus = Corpus(str(write_corpus(tmp_path, num_cells=30)))
    found = find_places(corpus.iter_cells(np.arange(3, 25)), corpus.genes.vocab_size, 12)
    ranks = [[] for _ in range(corpus.genes.vocab_size)]
    for cell in range(3, 25):
        for rank, token in enumerate(corpus.read_cells(np.array([cell])).tokens.tolist()[:12]):
            ranks[token].append(rank)
    assert found.detections.tolist() == [len(each) for each in ranks]
    np.testing.assert_allclose(found.mean_ranks, [np.mean(each) if each else np.nan for each in ranks])
