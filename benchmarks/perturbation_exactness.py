"""Every perturbation and read-out on real cells against stock transformers, one sequence at a time; JSON lines.

    python -m benchmarks.perturbation_exactness --corpus CORPUS
    python -m benchmarks.perturbation_exactness --corpus CORPUS --preset mouse-6l --cells 10 --per-cell 2

The model is random, with weights so large that a perturbation moves its output far above rounding: what is compared is
arithmetic. Cells are drawn evenly from the corpus; of each a few genes from top to bottom are perturbed, with lists
also a gene that the cell does not express. Each line says how many comparisons it is of, the largest absolute
difference of similarities and shifts, and the largest shift.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BertForSequenceClassification

from corpus.reader import Cells, Corpus
from evaluate.compat import as_published
from evaluate.perturb import Edits, gene_sets, plan_edits
from evaluate.perturb_settings import PerturbationSettings
from evaluate.scan_compute import Scanner
from tests import perturbation_reference as slow
from train.model import Classifier
from train.packing import gene_limit
from train.presets import ModelSettings

KINDS: dict[str, dict[str, Any]] = {
    "delete": {},
    "delete before truncation": {"edit": "before_truncation"},
    "overexpress": {"kind": "overexpress"},
    "overexpress before truncation": {"kind": "overexpress", "edit": "before_truncation"},
    "knockdown by rank": {"kind": "knockdown", "rank_shift": 50},
    "knockdown by count": {"kind": "knockdown", "fold_change": 0.3},
    "knockdown by count before truncation": {"kind": "knockdown", "fold_change": 0.3, "edit": "before_truncation"},
    "activate by rank": {"kind": "activate", "rank_shift": 50},
    "activate by count": {"kind": "activate", "fold_change": 4.0},
    "knock-in": {"kind": "knock_in", "rank": 20, "genes": ["listed"]},
    "overexpress a list one by one": {"kind": "overexpress", "genes": ["listed"]},
    "joint delete": {"combine": "joint", "require": "any", "genes": ["listed"]},
    "joint overexpress": {"kind": "overexpress", "combine": "joint", "genes": ["listed"]},
    "joint knock-in": {"kind": "knock_in", "rank": 20, "combine": "joint", "genes": ["listed"]},
    "pairs": {"combine": "pairs", "genes": ["listed"]},
    "pairs by count": {"kind": "knockdown", "fold_change": 0.5, "combine": "pairs", "genes": ["listed"]},
    "anchor": {"kind": "overexpress", "combine": "anchor", "anchor": "first", "genes": ["listed"]},
}
PUBLISHED = ("delete", "overexpress", "overexpress a list one by one", "joint overexpress")


@dataclass(frozen=True)
class Case:
    """A random model and the cells that it reads."""

    net: Classifier
    special_tokens: Any
    max_length: int
    genes: int
    corpus: Corpus
    cells: Cells
    per_cell: int

    def scanner(self, **changes: Any) -> Scanner:
        """Our side."""
        settings = {"num_layers": self.net.bert.num_layers, **changes}
        return Scanner(self.net.bert, max_length=self.max_length, special_tokens=self.special_tokens, **settings)

    def each(self, settings: PerturbationSettings) -> Iterator[tuple[list[int], list[int], np.ndarray, int | None]]:
        """Tokens, counts, gene sets and anchor of each cell."""
        for first, last in zip(self.cells.offsets[:-1], self.cells.offsets[1:], strict=True):
            tokens = self.cells.tokens[first:last].astype(np.int64)
            seen = tokens[: self.genes]
            chosen = seen[np.unique(np.linspace(0, len(seen) - 1, self.per_cell).astype(int))]
            if settings.genes == "all":
                sets, anchor = chosen[:, None], None
            else:
                absent = np.setdiff1d(self.corpus.genes.tokens, tokens)[:1]
                listed = np.concatenate([chosen[1:3], absent])
                anchor = int(listed[0]) if settings.anchor else None
                sets = gene_sets(settings, listed, anchor)
                assert sets is not None
            yield tokens.tolist(), self.cells.counts[first:last].tolist(), sets, anchor  # type: ignore[index]


def compare(case: Case, name: str, centroids: np.ndarray, embedding: str = "mean", layers: int | None = None) -> None:
    """One kind of perturbation, with the effects on single genes beside it."""
    settings = PerturbationSettings(**KINDS[name])
    medians = case.corpus.genes.medians_by_token
    depth = case.net.bert.num_layers if layers is None else layers
    run = slow.stock(case.net, case.special_tokens, layer=depth)
    edits, expected, effects = [], [], []
    for tokens, counts, sets, _ in case.each(settings):
        planned, _ = plan_edits(np.array(tokens), np.array(counts), sets, settings, medians, case.genes)
        edits.append(planned)
        for row in sets.tolist():
            genes = tuple(gene for gene in row if gene >= 0)
            perturbed = slow.edited(settings, tokens, counts, medians, genes, case.genes)
            original = tokens[: case.genes]
            values = perturbed and slow.reference(run, original, perturbed, genes, centroids, embedding)
            if values:
                if perturbed != original:
                    effects += list(slow.gene_effects(run, original, perturbed, genes).items())
                expected.append(values)
    every = np.ones(case.corpus.genes.vocab_size, dtype=bool)
    measured = case.scanner(embedding=embedding, num_layers=depth, affected=every).scan(case.cells, edits, centroids)
    found = np.column_stack([measured.similarity, measured.shifts])
    # Genes of one perturbation come in its order on our side, and in the original's on the other.
    ours = np.stack([measured.gene_effects.rows, measured.gene_effects.tokens])
    order = np.lexsort(ours[::-1])
    rows = np.repeat(np.arange(len(expected)), np.bincount(measured.gene_effects.rows, minlength=len(expected)))
    theirs = np.lexsort((np.array([gene for gene, _ in effects]), rows))
    own = np.array([value for _, value in effects])[theirs] - measured.gene_effects.similarity[order]
    report(case, name, f"{embedding}, layer {depth}", found, np.array(expected), own)


def compare_published(case: Case, name: str, lineage: Any, centroids: np.ndarray) -> None:
    """The originals' numbers."""
    settings = PerturbationSettings(**KINDS[name])
    medians = case.corpus.genes.medians_by_token
    run = slow.stock(case.net, case.special_tokens)
    edits, expected = [], []
    for tokens, counts, sets, _ in case.each(settings):
        original = tokens[: case.genes]
        planned, _ = plan_edits(np.array(tokens), np.array(counts), sets, settings, medians, case.genes)
        edits.append(as_published(planned, len(original), case.genes, settings, lineage)[0])
        for row in sets.tolist():
            whole = settings.genes == "all"
            values = slow.published(run, original, tuple(row), settings.kind, whole, case.genes, centroids, lineage)
            if values is not None:
                expected.append(values[0])
    measured = case.scanner(compat=lineage).scan(case.cells, edits, centroids)
    found = np.column_stack([measured.similarity, measured.shifts])
    report(case, name, f'compat "{lineage}"', found, np.array(expected))


def compare_probabilities(case: Case, centroids: np.ndarray) -> None:
    """The change of a classifier's probabilities, by stock transformers."""
    net = BertForSequenceClassification(case.net.config).eval()
    net.load_state_dict(case.net.state_dict())

    def classify(genes: list[int]) -> np.ndarray:
        ids = [slow.CLS, *genes, slow.EOS] if case.special_tokens == "cls_eos" else genes
        with torch.no_grad():
            return torch.softmax(net(torch.tensor([ids])).logits[0].double(), 0).numpy()

    settings, expected = PerturbationSettings(), []
    edits: list[Edits] = []
    medians = case.corpus.genes.medians_by_token
    for tokens, counts, sets, _ in case.each(settings):
        planned, _ = plan_edits(np.array(tokens), np.array(counts), sets, settings, medians, case.genes)
        edits.append(planned)
        original = tokens[: case.genes]
        before = classify(original)
        for (gene,) in sets.tolist():
            expected.append(classify([other for other in original if other != gene]) - before)
    found = case.scanner(classifier=case.net).scan(case.cells, edits, centroids).probabilities
    report(case, "delete", "probabilities", found, np.array(expected))


def report(
    case: Case, name: str, readout: str, found: np.ndarray, expected: np.ndarray, own: np.ndarray | None = None
) -> None:
    """Print one line."""
    line = {
        "benchmark": "perturbation_exactness",
        "perturbation": name,
        "readout": readout,
        "special_tokens": case.special_tokens,
        "cells": len(case.cells),
        "comparisons": len(expected),
        "max_abs_difference": float(np.abs(found - expected).max()),
        "largest_effect": float(np.abs(expected[:, 1:]).max()),
    }
    if own is not None and len(own):
        line |= {"genes_compared": len(own), "max_abs_difference_of_genes": float(np.abs(own).max())}
    print(json.dumps(line), flush=True)


def main() -> None:
    """Compare everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--cells", type=int, default=50)
    parser.add_argument("--per-cell", type=int, default=4)
    parser.add_argument("--max-genes", type=int, default=None, help="by default the preset's")
    parser.add_argument("--weights", type=float, default=0.3, help="standard deviation of the random weights")
    options = parser.parse_args()
    corpus = Corpus(options.corpus)
    numbers = np.unique(np.linspace(0, len(corpus) - 1, options.cells).astype(int))
    cells = corpus.read_cells(numbers, counts=True)
    settings = ModelSettings(preset=options.preset, max_length=options.max_genes)
    for special_tokens in ("none", "cls_eos"):
        torch.manual_seed(0)
        config = settings.bert_config(corpus.genes.vocab_size)
        config.initializer_range = options.weights
        net = Classifier(config, 3, "first").eval()
        length = settings.resolved().max_length
        case = Case(net, special_tokens, length, gene_limit(length, special_tokens), corpus, cells, options.per_cell)
        centroids = np.random.default_rng(1).normal(size=(2, config.hidden_size))
        for name in KINDS if special_tokens == "none" else ("delete", "joint overexpress"):
            compare(case, name, centroids)
        compare(case, "delete", centroids, layers=1)
        if special_tokens == "cls_eos":
            compare(case, "delete", centroids, embedding="cls")
        for name in PUBLISHED:
            for lineage in ("geneformer", "geneformer_v2"):
                compare_published(case, name, lineage, centroids)
        compare_probabilities(case, centroids)


if __name__ == "__main__":
    main()
