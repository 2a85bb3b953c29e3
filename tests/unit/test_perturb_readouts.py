"""Effects on single genes, the originals' numbers, and the noise floor, each against an independent computation."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from corpus.reader import Corpus
from evaluate.compat import as_published
from evaluate.gene_effects import GeneEffects
from evaluate.noise import in_double, measure_noise
from evaluate.perturb import cell_sets, gene_sets, plan_edits
from evaluate.perturb_settings import PerturbationSettings, ReadoutSettings, ScanSettings
from evaluate.scan_compute import Scanner
from tests.factories import write_corpus
from tests.perturbation_reference import edited, gene_effects, published, stock
from train.model import Classifier, MaskedLM
from train.presets import ModelSettings

LIMIT = 24
CENTROIDS = np.random.default_rng(2).normal(size=(2, 64))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Cells of 21 to 26 genes, so that most are within a gene or two of the model's input."""
    return Corpus(write_corpus(tmp_path_factory.mktemp("corpus"), num_cells=30, lengths=(21, 26)))


@pytest.fixture(scope="module", params=["none", "cls_eos"])
def model(request, corpus):
    torch.manual_seed(0)
    max_length = LIMIT if request.param == "none" else LIMIT + 2
    config = ModelSettings(preset="tiny", max_length=max_length).bert_config(corpus.genes.vocab_size)
    config.initializer_range = 0.3
    return MaskedLM(config), request.param, max_length


def make_scanner(model, **changes):
    net, special_tokens, max_length = model
    settings = {"max_length": max_length, "special_tokens": special_tokens, "num_layers": 2, **changes}
    return Scanner(net.bert, **settings)


def plan(corpus, cells, settings, listed, compat="none"):
    medians = corpus.genes.medians_by_token
    sets = gene_sets(settings, listed, None)
    edits, skipped = [], []
    for first, last in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        tokens, counts = cells.tokens[first:last].astype(np.int64), cells.counts[first:last]
        of_cell = cell_sets(settings, tokens[:LIMIT], np.ones(len(medians), bool), None) if sets is None else sets
        planned, left_out = plan_edits(tokens, counts, of_cell, settings, medians, LIMIT)
        planned, also = as_published(planned, min(len(tokens), LIMIT), LIMIT, settings, compat)
        edits.append(planned)
        skipped.append({**left_out, **also})
    return edits, skipped


def wanted_sets(settings, tokens, listed):
    if listed is None:
        return [(gene,) for gene in tokens[:LIMIT]]
    return [tuple(listed.tolist())] if settings.combine == "joint" else [(gene,) for gene in listed.tolist()]


def listed_genes(corpus):
    return np.array([corpus.genes.find(f"Gene{i}") for i in (3, 30, 66)])


CHANGES = {
    "delete": ({}, False),
    "overexpress": ({"kind": "overexpress"}, False),
    "joint overexpress": ({"kind": "overexpress", "combine": "joint"}, True),
    "overexpress a list": ({"kind": "overexpress"}, True),
    "knockdown by count before": ({"kind": "knockdown", "fold_change": 0.3, "edit": "before_truncation"}, False),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_effects_on_each_gene_equal_stock_transformers(corpus, model, change, named):
    cells = corpus.read_cells(np.arange(5), counts=True)
    listed = listed_genes(corpus) if named else None
    settings = PerturbationSettings(genes=["x"] if named else "all", **change)
    edits, _ = plan(corpus, cells, settings, listed)
    every = np.ones(corpus.genes.vocab_size, bool)
    found = make_scanner(model, affected=every, token_budget=500).scan(cells, edits, CENTROIDS).gene_effects
    run = stock(*model[:2])
    expected, row = [], 0
    for i in range(len(cells)):
        span = slice(cells.offsets[i], cells.offsets[i + 1])
        tokens, counts = cells.tokens[span].tolist(), cells.counts[span].tolist()
        for genes in wanted_sets(settings, tokens, listed):
            perturbed = edited(settings, tokens, counts, corpus.genes.medians_by_token, genes, LIMIT)
            effects = gene_effects(run, tokens[:LIMIT], perturbed, genes) if perturbed else {}
            if not effects:
                continue
            if perturbed != tokens[:LIMIT]:  # nothing changes where nothing is changed, and no row says so
                expected += [(row, gene, effects[gene]) for gene in perturbed if gene in effects]
            row += 1
    rows, tokens, similarity = (np.array(part) for part in zip(*expected, strict=True))
    assert len(rows) > 100
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-5, rtol=0)
    assert similarity.min() < 0.99  # the tolerance is far below what is measured


def test_named_and_most_changed_genes_are_a_selection_of_all(corpus, model):
    cells = corpus.read_cells(np.arange(4), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(), None)
    every = np.ones(corpus.genes.vocab_size, bool)
    some = np.zeros_like(every)
    some[listed_genes(corpus)] = True
    whole, named, most = (
        make_scanner(model, affected=mask, most_changed=number).scan(cells, edits, CENTROIDS).gene_effects
        for mask, number in ((every, None), (some, None), (every, 3))
    )
    is_named = np.isin(whole.tokens, listed_genes(corpus))
    assert 0 < len(named) == is_named.sum()
    np.testing.assert_array_equal(named.tokens, whole.tokens[is_named])
    np.testing.assert_allclose(named.similarity, whole.similarity[is_named], atol=1e-6)
    for row in range(0, 40, 7):
        lowest = np.sort(whole.similarity[whole.rows == row])[:3]
        np.testing.assert_allclose(most.similarity[most.rows == row], lowest, atol=1e-6)


def test_ties_among_most_changed_genes_go_to_the_lowest_token():
    effects = GeneEffects(np.array([0, 0, 0, 1]), np.array([9, 7, 8, 5]), np.array([0.5, 0.5, 0.4, 1.0]))
    kept = effects.most_changed(2)
    assert kept.tokens.tolist() == [8, 7, 5]
    assert kept.rows.tolist() == [0, 0, 1]


@pytest.mark.parametrize("lineage", ["geneformer", "geneformer_v2"])
@pytest.mark.parametrize(
    ("change", "named"), [*list(CHANGES.values())[:4], ({"combine": "joint"}, True)], ids=[*list(CHANGES)[:4], "joint"]
)
def test_the_originals_numbers_are_those_of_their_description(corpus, model, lineage, change, named):
    cells = corpus.read_cells(np.arange(7), counts=True)
    assert {LIMIT - 2, LIMIT - 1} & set(cells.lengths.tolist())
    listed = listed_genes(corpus) if named else None
    if change == {"combine": "joint"}:
        listed = cells.tokens[[2, 5]].astype(np.int64)  # so that one cell at least has them
    settings = PerturbationSettings(genes=["x"] if named else "all", **change)
    edits, skipped = plan(corpus, cells, settings, listed, lineage)
    every = np.ones(corpus.genes.vocab_size, bool)
    measured = make_scanner(model, compat=lineage, affected=every).scan(cells, edits, CENTROIDS)
    ours = make_scanner(model).scan(cells, plan(corpus, cells, settings, listed)[0], CENTROIDS)
    run = stock(*model[:2])
    expected, effects, num_skipped = [], [], 0
    for i in range(len(cells)):
        tokens = cells.tokens[cells.offsets[i] : cells.offsets[i + 1]].tolist()[:LIMIT]
        for genes in wanted_sets(settings, tokens, listed):
            values = published(run, tokens, genes, settings.kind, not named, LIMIT, CENTROIDS, lineage)
            if values is None:
                num_skipped += 1
                continue
            effects += [(len(expected), gene, value) for gene, value in values[1].items()]
            expected.append(values[0])
    found = np.column_stack([measured.similarity, measured.shifts])
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert sum(sum(left_out.values()) for left_out in skipped) == num_skipped
    if settings.kind == "overexpress" and not named:
        assert sum(left_out["top_gene"] for left_out in skipped) == len(cells)
    if len(ours.shifts) == len(found):
        # What this setting is for: the numbers differ from ours by far more than the tolerance.
        assert np.abs(np.column_stack([ours.similarity, ours.shifts]) - found).max() > 1e-4
    if lineage == "geneformer" and settings.kind == "delete":
        rows, names, similarity = (np.array(part) for part in zip(*effects, strict=True))
        np.testing.assert_array_equal(measured.gene_effects.rows, rows)
        np.testing.assert_array_equal(measured.gene_effects.tokens, names)
        np.testing.assert_allclose(measured.gene_effects.similarity, similarity, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "knockdown", "rank_shift": 2},
        {"edit": "before_truncation"},
        {"genes": ["a", "b"], "combine": "joint", "require": "any"},
        {"genes": ["a", "b"], "combine": "pairs"},
        {"kind": "overexpress", "absent": "skip"},
    ],
)
def test_what_the_originals_do_not_have_is_refused(change):
    with pytest.raises(ValidationError, match="the original has only delete and overexpress"):
        ScanSettings(perturbation=PerturbationSettings(**change), readout=ReadoutSettings(compat="geneformer"))
    ScanSettings(perturbation=PerturbationSettings(**change))


def test_layers_have_names_and_numbers_only_for_compatibility():
    with pytest.raises(ValidationError, match="counts from the end"):
        ReadoutSettings(layer="-1")
    named = {"last": 6, "second_to_last": 5, "layer_2": 2}
    assert {name: ReadoutSettings(layer=name).num_layers(6) for name in named} == named
    numbers = {"0": 6, "-1": 5, "-5": 1}
    assert {name: ReadoutSettings(layer=name, compat="geneformer").num_layers(6) for name in numbers} == numbers
    for name in ("layer_7", "-6"):
        with pytest.raises(ValueError, match="the model has 6 layers"):
            ReadoutSettings(layer=name, compat="geneformer").num_layers(6)


def test_noise_bounds_the_error_of_every_other_perturbation(corpus, model):
    """Against double precision on all perturbations, of which the floor saw four a cell; in half precision it grows."""
    cells = corpus.read_cells(np.arange(10), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(), None)
    floors = {}
    for precision in ("float32", "bfloat16"):
        scanner = make_scanner(model, precision=precision)
        floor = floors[precision] = measure_noise(scanner, cells, edits, CENTROIDS)
        assert (floor.cells, floor.perturbations, floor.precision) == (10, 40, precision)
        exact = in_double(scanner).scan(cells, edits, CENTROIDS)
        error = np.abs(scanner.scan(cells, edits, CENTROIDS).shifts - exact.shifts)
        assert error.max() < 5 * floor.shift
        assert floor.shift < 0.05 * np.abs(exact.shifts).max()
    assert floors["float32"].shift < 1e-6 < 1e-4 < floors["bfloat16"].shift


def test_double_precision_is_that_of_stock_transformers(corpus, model):
    cells = corpus.read_cells(np.arange(2))
    run = stock(*model[:2], dtype=torch.float64)
    states = run(cells.tokens[: cells.offsets[1]].tolist()[:LIMIT])[0]
    exact = in_double(make_scanner(model)).embed(cells)[0]
    np.testing.assert_allclose(exact, np.mean(list(states.values()), axis=0), atol=1e-12)
    assert exact.dtype == np.float64


def test_a_collapsed_model_has_no_effect_above_the_noise(corpus):
    """All cells get one embedding: errors cancel to far below single precision, and so do the shifts."""
    torch.manual_seed(0)
    config = ModelSettings(preset="tiny", max_length=LIMIT).bert_config(corpus.genes.vocab_size)
    net = Classifier(config, 2)
    with torch.no_grad():
        net.bert.embeddings.word_embeddings.weight.mul_(1e-5)
        net.bert.embeddings.position_embeddings.weight.mul_(1e-5)
        net.bert.embeddings.token_type_embeddings.weight.normal_()
    scanner = Scanner(net.bert, max_length=LIMIT, special_tokens="none", num_layers=2, classifier=net)
    cells = corpus.read_cells(np.arange(10), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(), None)
    centroids = scanner.embed(cells)[:2]
    floor = measure_noise(scanner, cells, edits, centroids)
    measured = scanner.scan(cells, edits, centroids)
    assert floor.error_shift < 1e-8
    assert np.abs(measured.shifts).max() < floor.shift == floor.resolution
    assert np.abs(1 - measured.similarity).max() < floor.similarity
    assert np.abs(measured.probabilities).max() < floor.probability
