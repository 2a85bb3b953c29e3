"""Masking: shares, what may be drawn, and that a cell's draws depend on nothing but itself."""

import numpy as np
import pytest
from scipy import stats

from corpus.reader import Cells
from corpus.schema import CLS, EOS, MASK, SPECIAL_TOKENS
from train.masking import _draw, mask_tokens
from train.packing import pack

FIRST_GENE, NUM_GENES = len(SPECIAL_TOKENS), 500
GENES = np.arange(FIRST_GENE, FIRST_GENE + NUM_GENES, dtype=np.uint16)


def many_cells(num_cells, length, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.choice(GENES, num_cells * length)
    return Cells(np.arange(num_cells), np.arange(num_cells + 1) * length, tokens)


def binomial_p(hits, trials, probability):
    return stats.binomtest(int(hits), int(trials), probability).pvalue


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_shares_over_a_million_draws(probability):
    cells = many_cells(5_000, 200)
    result = mask_tokens(cells, GENES, seed=1, epoch=0, probability=probability)
    before, after = cells.tokens[result.entries], result.cells.tokens[result.entries]
    selected = len(result.entries)
    masked, kept = (after == MASK).sum(), (after == before).sum()
    assert binomial_p(selected, 1_000_000, probability) > 1e-4
    assert binomial_p(masked, selected, 0.8) > 1e-4
    # A random gene is the gene that was there once in NUM_GENES.
    assert binomial_p(kept, selected, 0.1 + 0.1 / NUM_GENES) > 1e-4
    assert binomial_p(selected - masked - kept, selected, 0.1 - 0.1 / NUM_GENES) > 1e-4
    assert result.labels.tolist() == before.tolist()
    untouched = np.ones(len(cells.tokens), bool)
    untouched[result.entries] = False
    assert (result.cells.tokens[untouched] == cells.tokens[untouched]).all()


def test_random_genes_are_uniform_over_all_genes_first_and_last_included():
    cells = many_cells(5_000, 200)
    result = mask_tokens(cells, GENES, seed=2, epoch=0, probability=1, mask_share=0, random_share=1)
    assert len(result.entries) == 1_000_000
    counts = np.bincount(result.cells.tokens, minlength=FIRST_GENE + NUM_GENES)
    assert counts[:FIRST_GENE].sum() == 0
    assert counts[GENES[0]] > 0
    assert counts[GENES[-1]] > 0
    assert stats.chisquare(counts[FIRST_GENE:]).pvalue > 1e-4


def test_positions_and_cells_are_selected_evenly_and_independently():
    num_cells, length = 5_000, 200
    result = mask_tokens(many_cells(num_cells, length), GENES, seed=3, epoch=0)
    selected = np.zeros(num_cells * length)
    selected[result.entries] = 1
    by_position = selected.reshape(num_cells, length).sum(axis=0)
    # Counts are binomial, not Poisson: their chi-square statistic is smaller by the factor 1 - probability.
    assert stats.chisquare(by_position).statistic / (1 - 0.15) < stats.chi2.isf(1e-4, length - 1)
    neighbours = np.corrcoef(selected[:-1], selected[1:])[0, 1]
    below = np.corrcoef(selected[:-length], selected[length:])[0, 1]
    assert max(abs(neighbours), abs(below)) < 4 / np.sqrt(len(selected))


def test_special_tokens_are_never_selected_labelled_or_drawn():
    cells = many_cells(5_000, 200)
    result = mask_tokens(cells, GENES, seed=4, epoch=0, probability=0.5, mask_share=0.1, random_share=0.8)
    packed = pack(result.cells, 202, "cls_eos")
    rows = packed.rows_of(result.entries)
    assert packed.gene_rows[rows].all()
    assert packed.tokens[rows].tolist() == result.cells.tokens[result.entries].tolist()
    assert result.labels.min() >= FIRST_GENE
    changed = packed.tokens[rows]
    assert not ((changed == CLS) | (changed == EOS) | (changed == 0)).any()
    first, last = packed.offsets[:-1], packed.offsets[1:] - 1
    assert (packed.tokens[first] == CLS).all()
    assert (packed.tokens[last] == EOS).all()


def test_a_cell_is_masked_alike_alone_and_in_any_batch():
    cells = many_cells(50, 40)
    order = np.random.default_rng(0).permutation(50)
    batch = mask_tokens(cells.take(order), GENES, seed=5, epoch=3)
    for place, number in enumerate(order):
        alone = mask_tokens(cells.take(np.array([number])), GENES, seed=5, epoch=3)
        span = slice(*batch.cells.offsets[place : place + 2])
        assert batch.cells.tokens[span].tolist() == alone.cells.tokens.tolist()


def test_seed_epoch_and_cell_number_each_change_the_mask():
    cells = many_cells(20, 100)
    entries = [
        mask_tokens(cells, GENES, seed=seed, epoch=epoch).entries.tolist() for seed, epoch in [(0, 0), (1, 0), (0, 1)]
    ]
    assert entries[0] != entries[1]
    assert entries[0] != entries[2]
    assert entries[1] != entries[2]
    renumbered = Cells(cells.index + 1, cells.offsets, cells.tokens)
    assert mask_tokens(renumbered, GENES, seed=0, epoch=0).entries.tolist() != entries[0]


def test_truncating_a_cell_leaves_the_draws_of_what_remains():
    cells = many_cells(30, 60)
    whole = mask_tokens(cells, GENES, seed=6, epoch=0)
    cut = mask_tokens(cells.truncate(25), GENES, seed=6, epoch=0)
    assert cut.cells.tokens.tolist() == whole.cells.truncate(25).tokens.tolist()


def test_draws_are_those_of_splitmix64():
    """First outputs for seed 1234567 as Sebastiano Vigna's reference implementation gives them."""
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    drawn = [int(_draw(np.uint64(1234567), output // 3, np.uint64(output % 3 + 1))) for output in range(4)]
    assert drawn == reference


@pytest.mark.parametrize("shares", [{"probability": 1.5}, {"mask_share": 0.8, "random_share": 0.3}])
def test_shares_out_of_range_are_refused(shares):
    with pytest.raises(ValueError, match="out of range"):
        mask_tokens(many_cells(1, 5), GENES, seed=0, epoch=0, **shares)


def test_the_mask_of_a_cell_is_pinned():
    """A model's training, and the resumption of one, must not change with a release."""
    result = mask_tokens(many_cells(2, 40), GENES, seed=7, epoch=2)
    assert result.entries.tolist() == [17, 21, 25, 34, 45, 63, 64, 66, 69, 75]
    assert result.cells.tokens[result.entries].tolist() == [275, 1, 1, 1, 339, 1, 1, 100, 1, 199]


def test_probability_zero_and_one():
    cells = many_cells(3, 50)
    assert len(mask_tokens(cells, GENES, seed=0, epoch=0, probability=0).entries) == 0
    assert len(mask_tokens(cells, GENES, seed=0, epoch=0, probability=1).entries) == 150
