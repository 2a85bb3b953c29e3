"""The first-order screen: its slopes against finite differences, its guesses against exact deletions."""

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.stats import spearmanr

from corpus.reader import Corpus
from evaluate.perturb import cell_sets, plan_edits
from evaluate.perturb_settings import PerturbationSettings, ReadoutSettings, StateSettings
from evaluate.scan_compute import Scanner
from evaluate.screen import agreement
from evaluate.screen_compute import guess_deletions
from evaluate.screen_settings import ScreenSettings
from tests.factories import write_corpus
from train.model import MaskedLM
from train.presets import ModelSettings

LIMIT = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(write_corpus(tmp_path_factory.mktemp("corpus"), num_cells=9, num_genes=90, lengths=(40, 70)))


def make_model(corpus, special_tokens, scale):
    torch.manual_seed(0)
    max_length = LIMIT if special_tokens == "none" else LIMIT + 2
    config = ModelSettings(preset="tiny", max_length=max_length).bert_config(corpus.genes.vocab_size)
    config.initializer_range = scale
    return MaskedLM(config).bert.eval(), max_length


def gated_states(encoder, ids, gates, shift):
    """Hidden states of one cell with gated keys and moved positions, written out without any kernel."""
    config, parts = encoder.config, encoder.embeddings
    places = parts.position_embeddings.weight[: len(ids)]
    earlier = torch.cat([places[:1], places[:-1]])
    x = (
        parts.word_embeddings(ids)
        + parts.token_type_embeddings.weight[0]
        + places
        + shift[:, None] * (earlier - places)
    )
    x = parts.LayerNorm(x)
    width = config.hidden_size // config.num_attention_heads
    for layer in encoder.encoder["layer"]:
        attention = layer.attention["self"]
        q, k, v = (
            p(x).unflatten(-1, (-1, width)).transpose(0, 1) for p in (attention.query, attention.key, attention.value)
        )
        weights = torch.exp(q @ k.transpose(1, 2) / width**0.5) * gates
        mixed = (weights / weights.sum(-1, keepdim=True)) @ v
        x1 = layer.attention["output"](mixed.transpose(0, 1).flatten(1), x)
        x = layer.output(layer.activation(layer.intermediate["dense"](x1)), x1)
    return x


def gated(encoder, ids, gates, shift, embedding, centroids):
    x = gated_states(encoder, ids, gates, shift)
    return F.cosine_similarity((x[0] if embedding == "cls" else x[1:-1].mean(0))[None], centroids, dim=1)


def gated_mean(encoder, ids, gates, shift, centroids):
    return F.cosine_similarity(gated_states(encoder, ids, gates, shift).mean(0)[None], centroids, dim=1)


@pytest.mark.parametrize("embedding", ["mean", "cls"])
def test_guesses_are_slopes_of_gates_and_positions(corpus, embedding):
    encoder, _ = make_model(corpus, "cls_eos", 0.3)
    encoder = encoder.double().requires_grad_(False)
    genes = torch.from_numpy(corpus.read_cells(np.array([0])).tokens[:30].astype(np.int64))
    centroids = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 64)))
    found = guess_deletions(encoder, genes, centroids, num_layers=2, special_tokens="cls_eos", embedding=embedding)
    ids = torch.cat([torch.tensor([2]), genes, torch.tensor([3])])
    step = 1e-6
    for gene in (0, 11, 29):
        place = gene + 1
        sides = []
        for size in (step, -step):
            gates, shift = torch.ones(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
            gates[place] -= size
            shift[place + 1 :] += size
            sides.append(gated(encoder, ids, gates, shift, embedding, centroids))
        slope = (sides[0] - sides[1]) / (2 * step)
        np.testing.assert_allclose(found[gene], slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("special_tokens", ["none", "cls_eos"])
def test_guesses_order_genes_like_exact_deletions(corpus, special_tokens):
    """With rough positions, as in this random model, the slope alone is poor, and two more anchors mend it."""
    encoder, max_length = make_model(corpus, special_tokens, 0.1)
    cells = corpus.read_cells(np.arange(5))
    centroids = np.random.default_rng(1).normal(size=(2, 64))
    edits = []
    for first, last in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        tokens = cells.tokens[first:last].astype(np.int64)
        vocabulary = np.ones(corpus.genes.vocab_size)
        sets = cell_sets(PerturbationSettings(), tokens[:LIMIT], vocabulary.astype(bool), None)
        edits.append(plan_edits(tokens, None, sets, PerturbationSettings(), vocabulary, LIMIT)[0])
    scanner = Scanner(encoder, max_length=max_length, special_tokens=special_tokens, num_layers=2)
    exact = scanner.scan(cells, edits, centroids).shifts

    def agreements(anchors):
        guesses = [
            guess_deletions(
                encoder.requires_grad_(False),
                torch.from_numpy(edit.genes[:, 0]),
                torch.from_numpy(centroids),
                num_layers=2,
                special_tokens=special_tokens,
                anchors=anchors,
            ).numpy()
            for edit in edits
        ]
        return [spearmanr(np.concatenate(guesses)[:, state], exact[:, state]).statistic for state in range(2)]

    assert min(agreements(5)) > 0.9
    assert min(agreements(5)) > max(agreements(1)) > 0.3


def test_all_anchors_know_the_whole_effect_of_positions(corpus):
    """With an anchor at every place, and no gates, nothing is guessed: the moves are exact."""
    encoder, _ = make_model(corpus, "none", 0.3)
    genes = torch.from_numpy(corpus.read_cells(np.array([0])).tokens[:12].astype(np.int64))
    centroids = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 64)))
    for layer in encoder.encoder["layer"]:  # keys that nobody reads: deleted genes are missed by position alone
        torch.nn.init.zeros_(layer.attention["output"].dense.weight)
    encoder = encoder.double().requires_grad_(False)
    found = guess_deletions(encoder, genes, centroids, num_layers=2, anchors=12)[:, 0]
    ones = torch.ones(12, dtype=torch.float64)

    def cosine(place):
        shift = (torch.arange(12) > place).double()
        return gated_mean(encoder, genes, ones, shift, centroids)

    expected = [float(cosine(place) - cosine(12)) for place in range(12)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_agreement_is_over_the_verified_genes():
    guess = [9.0, -8.0, 7.0, 1.0, 2.0, 3.0, 0.5, 0.4, 5.0]
    exact = [8.0, 9.0, -1.0, 1.5, 2.5, 3.5, 0.1, 0.2, None]
    table = pl.DataFrame({"ensembl_id": list("abcdefghi"), "guess_x": guess, "exact_x": exact})
    found = agreement(table, "x", {"d", "e", "f"})
    assert found.spearman_controls == pytest.approx(1)
    assert found.spearman == pytest.approx(spearmanr(guess[:8], exact[:8]).statistic)
    assert found.same_sign == 6 / 8
    assert (found.top, found.top_overlap) == (2, 1.0)
    flat = agreement(table.with_columns(pl.lit(1.0).alias("guess_x")), "x", {"d", "e", "f"})
    assert flat.spearman is None


def test_screen_has_no_compatibility_mode():
    states = StateSettings(column="x", start="a", goal="b")
    with pytest.raises(ValidationError, match="compat belongs to exact scans"):
        ScreenSettings(states=states, readout=ReadoutSettings(compat="geneformer"))
