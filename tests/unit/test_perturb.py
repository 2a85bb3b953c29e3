"""Perturbation scans against a slow, independent computation with stock transformers, one sequence at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import BertForSequenceClassification

from corpus.errors import RunError
from corpus.reader import Cells, Corpus
from evaluate.perturb import NONE, cell_sets, gene_sets, plan_edits
from evaluate.perturb_settings import PerturbationSettings, StateSettings
from evaluate.scan_compute import Scanner
from tests.factories import write_corpus
from tests.perturbation_reference import CLS, EOS, edited, reference, stock
from train.model import Classifier, MaskedLM
from train.presets import ModelSettings

LIMIT = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Cells of 2 to 40 genes: shorter, as long as, and longer than the model's input."""
    return Corpus(write_corpus(tmp_path_factory.mktemp("corpus"), num_cells=40, lengths=(2, 40)))


@pytest.fixture(scope="module", params=["none", "cls_eos"])
def model(request, corpus):
    """A random model with large weights, so that a perturbation moves its output well above rounding."""
    torch.manual_seed(0)
    max_length = LIMIT if request.param == "none" else LIMIT + 2
    config = ModelSettings(preset="tiny", max_length=max_length).bert_config(corpus.genes.vocab_size)
    config.initializer_range = 0.3
    return MaskedLM(config), request.param, max_length


def make_scanner(model, **changes):
    net, special_tokens, max_length = model
    settings = {"max_length": max_length, "special_tokens": special_tokens, "num_layers": 2, **changes}
    return Scanner(net.bert, **settings)


def plan(corpus, cells, settings, listed, limit, anchor=None):
    """Edits of each cell as the scan plans them."""
    medians = corpus.genes.medians_by_token
    allowed = np.ones(len(medians), bool)
    sets = gene_sets(settings, listed, anchor)
    edits, skipped = [], []
    for i in range(len(cells)):
        span = slice(cells.offsets[i], cells.offsets[i + 1])
        tokens, counts = cells.tokens[span].astype(np.int64), cells.counts[span]
        of_cell = cell_sets(settings, tokens[:limit], allowed, anchor) if sets is None else sets
        planned, left_out = plan_edits(tokens, counts, of_cell, settings, medians, limit)
        edits.append(planned)
        skipped.append(left_out)
    return edits, skipped


KINDS = {
    "delete": {},
    "delete before truncation": {"edit": "before_truncation"},
    "overexpress": {"kind": "overexpress"},
    "knockdown by rank": {"kind": "knockdown", "rank_shift": 5},
    "knockdown by rank before": {"kind": "knockdown", "rank_shift": 5, "edit": "before_truncation"},
    "activate by rank": {"kind": "activate", "rank_shift": 3},
    "knockdown by count": {"kind": "knockdown", "fold_change": 0.3},
    "knockdown by count before": {"kind": "knockdown", "fold_change": 0.3, "edit": "before_truncation"},
    "activate by count": {"kind": "activate", "fold_change": 4.0},
}
LISTS = {
    "overexpress, absent too": {"kind": "overexpress"},
    "overexpress before": {"kind": "overexpress", "edit": "before_truncation"},
    "overexpress, present only": {"kind": "overexpress", "absent": "skip"},
    "joint delete, any": {"combine": "joint", "require": "any"},
    "joint delete, any, before": {"combine": "joint", "require": "any", "edit": "before_truncation"},
    "joint overexpress": {"kind": "overexpress", "combine": "joint"},
    "pairs": {"combine": "pairs"},
    "pairs by count": {"kind": "knockdown", "fold_change": 0.5, "combine": "pairs"},
    "anchor": {"kind": "overexpress", "combine": "anchor", "anchor": "Gene7"},
    "knock-in": {"kind": "knock_in", "rank": 6},
    "joint knock-in": {"kind": "knock_in", "rank": 4, "combine": "joint"},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [*((change, False) for change in KINDS.values()), *((change, True) for change in LISTS.values())],
    ids=[*KINDS, *LISTS],
)
def test_shifts_equal_stock_transformers(corpus, model, change, named):
    numbers = np.random.default_rng(1).choice(len(corpus), 20, replace=False)
    cells = corpus.read_cells(numbers, counts=True)
    assert cells.lengths.max() > LIMIT > cells.lengths.min()
    listed = np.array([corpus.genes.find(f"Gene{i}") for i in (3, 7, 30, 41, 66)]) if named else None
    settings = PerturbationSettings(genes=["Gene3"] if named else "all", **change)
    anchor = corpus.genes.find("Gene7") if settings.anchor else None
    edits, skipped = plan(corpus, cells, settings, listed, LIMIT, anchor)
    centroids = np.random.default_rng(2).normal(size=(3, 64))
    measured = make_scanner(model, token_budget=500).scan(cells, edits, centroids)

    run = stock(*model[:2])
    expected, found_genes, num_skipped = [], [], 0
    for i in range(len(cells)):
        span = slice(cells.offsets[i], cells.offsets[i + 1])
        tokens, counts = cells.tokens[span].tolist(), cells.counts[span].tolist()
        if not named:
            wanted = [(gene,) for gene in tokens[:LIMIT]]
        elif settings.combine == "joint":
            wanted = [tuple(listed.tolist())]
        elif settings.combine == "pairs":
            single = [(gene,) for gene in listed.tolist()]
            wanted = single + [(a[0], b[0]) for n, a in enumerate(single) for b in single[n + 1 :]]
        elif settings.combine == "anchor":
            others = [gene for gene in listed.tolist() if gene != anchor]
            wanted = [(anchor,)] + [(gene,) for gene in others] + [(anchor, gene) for gene in others]
        else:
            wanted = [(gene,) for gene in listed.tolist()]
        for genes in wanted:
            perturbed = edited(settings, tokens, counts, corpus.genes.medians_by_token, genes, LIMIT)
            values = perturbed and reference(run, tokens[:LIMIT], perturbed, genes, centroids)
            if values:
                expected.append(values)
                found_genes.append(genes)
            else:
                num_skipped += 1
    planned = np.concatenate([edit.genes for edit in edits])
    assert [tuple(gene for gene in row if gene >= 0) for row in planned.tolist()] == found_genes
    assert sum(sum(left_out.values()) for left_out in skipped) == num_skipped
    found = np.column_stack([measured.similarity, measured.shifts])
    assert len(found) >= 15
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert np.abs(np.array(expected)[:, 1:]).max() > 0.01  # the tolerance is far below what is measured


def test_top_ranked_gene_overexpressed_is_exactly_no_change(corpus, model):
    cells = corpus.read_cells(np.arange(10), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(kind="overexpress"), None, LIMIT)
    measured = make_scanner(model).scan(cells, edits, np.ones((2, 64)))
    no_op = np.concatenate([edit.no_op for edit in edits])
    ranks = np.concatenate([edit.ranks[:, 0] for edit in edits])
    assert no_op.tolist() == (ranks == 0).tolist()
    assert (measured.similarity[no_op] == 1).all()
    assert (measured.shifts[no_op] == 0).all()
    assert (measured.similarity[~no_op] < 1).all()


@pytest.mark.parametrize("length", [LIMIT - 2, LIMIT - 1, LIMIT, LIMIT + 1])
def test_both_sides_pool_the_same_genes_near_the_limit(corpus, length):
    """Two absent genes are put in front of a nearly full cell: overflow = max(0, length + added - limit)."""
    tokens = np.arange(4, 4 + length)
    settings = PerturbationSettings(kind="overexpress", genes=["x", "y"], combine="joint")
    edits, _ = plan_edits(tokens, None, np.array([[70, 71]]), settings, corpus.genes.medians_by_token, LIMIT)
    in_input = min(length, LIMIT)
    assert edits.pooled_end[0] == in_input - max(0, in_input + 2 - LIMIT)
    assert edits.lengths[0] == min(in_input + 2, LIMIT)


def test_cls_embedding_and_earlier_layer(corpus, model):
    if model[1] == "none":
        pytest.skip("the model has no <cls>")
    cells = corpus.read_cells(np.arange(6), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(), None, LIMIT)
    centroids = np.random.default_rng(2).normal(size=(2, 64))
    measured = make_scanner(model, embedding="cls", num_layers=1).scan(cells, edits, centroids)
    run = stock(*model[:2], layer=1)
    expected = []
    for i in range(len(cells)):
        original = cells.tokens[cells.offsets[i] : cells.offsets[i + 1]].tolist()[:LIMIT]
        for gene in original:
            rest = [other for other in original if other != gene]
            expected.append(reference(run, original, rest, (gene,), centroids, "cls"))
    np.testing.assert_allclose(np.column_stack([measured.similarity, measured.shifts]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("special_tokens", ["none", "cls_eos"])
@pytest.mark.parametrize("kind", ["delete", "overexpress"])
def test_probabilities_equal_the_classifier_on_each_sequence(corpus, pooling, special_tokens, kind):
    """The whole perturbed cell is classified, perturbed genes included, by stock transformers for pooling "first"."""
    torch.manual_seed(3)
    max_length = LIMIT if special_tokens == "none" else LIMIT + 2
    config = ModelSettings(preset="tiny", max_length=max_length).bert_config(corpus.genes.vocab_size)
    config.initializer_range = 0.3
    net = Classifier(config, 3, pooling).eval()
    cells = corpus.read_cells(np.arange(8), counts=True)
    settings = PerturbationSettings(kind=kind)
    edits, _ = plan(corpus, cells, settings, None, LIMIT)
    scanner = Scanner(net.bert, max_length=max_length, special_tokens=special_tokens, num_layers=2, classifier=net)
    measured = scanner.scan(cells, edits, np.ones((1, 64)))
    reference_net = BertForSequenceClassification(net.config).eval()
    reference_net.load_state_dict(net.state_dict())

    def classify(genes):
        ids = torch.tensor([[CLS, *genes, EOS] if special_tokens == "cls_eos" else genes])
        with torch.no_grad():
            if pooling == "first":
                logits = reference_net(ids).logits
            else:
                hidden = reference_net.bert(ids).last_hidden_state[0]
                mean = (hidden[1:-1] if special_tokens == "cls_eos" else hidden).mean(0)
                logits = net.classifier(torch.tanh(net.bert.pooler["dense"](mean)))[None]
        return torch.softmax(logits[0].double(), 0).numpy()

    expected = []
    for i in range(len(cells)):
        tokens = cells.tokens[cells.offsets[i] : cells.offsets[i + 1]].tolist()
        for gene in tokens[:LIMIT]:
            perturbed = edited(settings, tokens, [1] * len(tokens), None, (gene,), LIMIT)
            expected.append(classify(perturbed) - classify(tokens[:LIMIT]))
    assert measured.probabilities.shape[1] == 3
    np.testing.assert_allclose(measured.probabilities, expected, atol=1e-5, rtol=0)
    assert np.abs(measured.probabilities).max() > 0.01


def test_result_does_not_depend_on_batching(corpus, model):
    cells = corpus.read_cells(np.arange(12), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(), None, LIMIT)
    centroids = np.random.default_rng(2).normal(size=(2, 64))
    whole, small = (make_scanner(model, token_budget=n).scan(cells, edits, centroids) for n in (100_000, 30))
    np.testing.assert_allclose(small.similarity, whole.similarity, atol=1e-6, rtol=0)
    np.testing.assert_allclose(small.shifts, whole.shifts, atol=1e-6, rtol=0)


def test_embed_equals_each_cell_alone(corpus, model):
    cells = corpus.read_cells(np.arange(12))
    together = make_scanner(model).embed(cells)
    run = stock(*model[:2])
    for i in range(len(cells)):
        states, _ = run(cells.tokens[cells.offsets[i] : cells.offsets[i + 1]].tolist()[:LIMIT])
        np.testing.assert_allclose(together[i], np.mean(list(states.values()), axis=0), atol=1e-5, rtol=0)


def test_backs_off_when_memory_runs_out(corpus, model, monkeypatch):
    cells = corpus.read_cells(np.arange(8), counts=True)
    edits, _ = plan(corpus, cells, PerturbationSettings(), None, LIMIT)
    centroids = np.ones((1, 64))
    expected = make_scanner(model).scan(cells, edits, centroids)
    scanner = make_scanner(model, token_budget=4000)
    forward = scanner._run

    def small_device(packed, room=300):
        if len(packed.tokens) > room:
            raise torch.OutOfMemoryError("no room")
        return forward(packed)

    monkeypatch.setattr(scanner, "_run", small_device)
    found = scanner.scan(cells, edits, centroids)
    np.testing.assert_allclose(found.similarity, expected.similarity, atol=1e-6, rtol=0)
    assert scanner.token_budget <= 300
    monkeypatch.setattr(scanner, "_run", lambda packed: small_device(packed, room=1))
    with pytest.raises(RunError, match="does not fit into memory"):
        scanner.scan(cells, edits, centroids)


@given(
    length=st.integers(1, 30),
    limit=st.integers(2, 30),
    size=st.integers(1, 4),
    kind=st.sampled_from(["delete", "overexpress", "knock_in"]),
    before=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_planned_numbers_describe_the_sequences(length, limit, size, kind, before, seed):
    """`pooled_end` and `removed` name exactly the genes that original and perturbed input share."""
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(40)[:length] + 4
    genes = rng.permutation(40)[:size] + 4
    rank = {"rank": int(rng.integers(0, 35))} if kind == "knock_in" else {}
    settings = PerturbationSettings(
        kind=kind,
        genes=["x"],
        combine="joint",
        require="any",
        edit="before_truncation" if before else "after_truncation",
        **rank,
    )
    edits, skipped = plan_edits(tokens, None, genes[None, :], settings, np.ones(50), limit)
    perturbed = edited(settings, tokens.tolist(), [1] * length, None, genes.tolist(), limit)
    original = tokens[:limit].tolist()
    shared = [gene for gene in original if gene in (perturbed or []) and gene not in genes]
    assert len(edits) == bool(shared)
    assert sum(skipped.values()) == 1 - len(edits)
    if shared:
        removed = set(edits.removed[0][edits.removed[0] < NONE].tolist())
        assert [original[i] for i in range(edits.pooled_end[0]) if i not in removed] == shared
        assert edits.lengths[0] == len(perturbed)
        assert edits.no_op[0] == (perturbed == original)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "knockdown"}, "exactly one of rank_shift and fold_change"),
        ({"kind": "delete", "rank_shift": 1}, "belong to knockdown and activate"),
        ({"kind": "activate", "fold_change": 0.5}, "above 1 for activate"),
        ({"kind": "knock_in", "genes": ["a"]}, "rank is needed"),
        ({"combine": "joint"}, "needs a list of genes"),
        ({"combine": "anchor"}, "anchor is needed"),
        ({"genes": []}, "the list is empty"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PerturbationSettings(**settings)


def test_states_must_differ():
    with pytest.raises(ValidationError, match="must be different states"):
        StateSettings(column="cell_type", start="a", goal="a")


def test_cells_without_any_perturbation_are_no_rows(corpus, model):
    cells = Cells(np.arange(1), np.array([0, 1]), np.array([5], np.uint16), np.array([1], np.uint32))
    edits, skipped = plan(corpus, cells, PerturbationSettings(), None, LIMIT)
    assert skipped == [{"absent": 0, "nothing_left": 1}]
    assert len(make_scanner(model).scan(cells, edits, np.ones((1, 64))).similarity) == 0
