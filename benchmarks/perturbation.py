"""Perturbation scan against the original's per-cell procedure, in one run; prints one JSON line for each precision.

    python -m benchmarks.perturbation --preset tiny --cells 4 --length 400
    python -m benchmarks.perturbation --model MODEL --corpus CORPUS --cells 4
    python -m benchmarks.perturbation --preset mouse-6l --vocab 56084 --cells 20 --lengths LENGTHS.npy --device cuda

The baseline is written anew from the description of the published procedure: one copy of the cell per gene, edited as
Python lists, padded, run in batches through the whole model with the language-model head and all hidden states kept, in
float32, then pooled. The original also writes each cell's copies to disk as an Arrow data set, twice, and maps over
them; that is left out here, so the ratio is a lower bound. Both sides delete genes of the same cells, at even distances
if not all of them. What the baseline found is compared with ours for each precision: largest absolute difference of the
shifts, rank correlation, and how many of the 100 largest shifts (in either direction) are among our 100 largest.

Without --model the model is random; rank agreement in half precision then says little. Needs no Ray.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import BertForMaskedLM

from corpus.reader import Cells, Corpus
from evaluate.perturb import Edits, plan_edits
from evaluate.perturb_settings import PerturbationSettings
from evaluate.scan_compute import Scanner
from evaluate.scan_plan import encoder_flops
from train.model import MaskedLM
from train.model_folder import load_model
from train.packing import SpecialTokens, gene_limit
from train.presets import ModelSettings

CLS, EOS = 2, 3


def original_cell(
    model: BertForMaskedLM, tokens: list[int], centroid: torch.Tensor, batch: int, places: list[int], specials: bool
) -> torch.Tensor:
    """Shift of one cell towards a centroid for the deletion of some genes, as the published code computes it."""
    device = centroid.device

    def around(genes: list[int]) -> list[int]:
        return [CLS, *genes, EOS] if specials else genes

    first, last = (1, -1) if specials else (0, None)
    out = model(torch.tensor([around(tokens)], device=device), output_hidden_states=True)
    before = out.hidden_states[-1][0][first:last]
    copies = [around(tokens[:place] + tokens[place + 1 :]) for place in places]
    shifts = []
    for start in range(0, len(copies), batch):
        part = copies[start : start + batch]
        longest = max(map(len, part))
        ids = torch.tensor([copy + [0] * (longest - len(copy)) for copy in part], device=device)
        mask = torch.tensor([[1] * len(copy) + [0] * (longest - len(copy)) for copy in part], device=device)
        after = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        for row in range(len(part)):
            place = places[start + row]
            kept = torch.cat([before[:place], before[place + 1 :]])
            x, y = after[row][: len(part[row])][first:last].mean(0), kept.mean(0)
            shifts.append(torch.cosine_similarity(x, centroid, 0) - torch.cosine_similarity(y, centroid, 0))
    return torch.stack(shifts)


@dataclass
class Case:
    """One model, its stock twin, and the cells that both read."""

    net: MaskedLM
    stock: BertForMaskedLM
    special_tokens: SpecialTokens
    max_length: int
    cells: Cells
    centroid: np.ndarray
    device: str

    @property
    def max_genes(self) -> int:
        """Genes of an input."""
        return gene_limit(self.max_length, self.special_tokens)

    def scanner(self, precision: str, token_budget: int | None) -> Scanner:
        """Our side."""
        return Scanner(
            self.net.bert,
            max_length=self.max_length,
            special_tokens=self.special_tokens,
            num_layers=self.net.bert.num_layers,
            precision=precision,
            token_budget=token_budget,
            device=self.device,
        )

    def tokens(self, cell: int) -> np.ndarray:
        """int64[genes] of one cell's input."""
        first = self.cells.offsets[cell]
        return self.cells.tokens[first : self.cells.offsets[cell + 1]][: self.max_genes].astype(np.int64)

    def deletions(self, cell: int, places: np.ndarray) -> Edits:
        """Delete the genes at some places of a cell, one at a time."""
        tokens = self.tokens(cell)
        sets = tokens[places][:, None]
        medians = np.ones(self.net.config.vocab_size)
        return plan_edits(tokens, None, sets, PerturbationSettings(), medians, self.max_genes)[0]

    def places(self, number: int) -> list[np.ndarray]:
        """Places at even distances in each cell."""
        sizes = [len(self.tokens(cell)) for cell in range(len(self.cells))]
        return [np.unique(np.linspace(0, size - 1, min(number, size)).astype(int)) for size in sizes]


def random_case(options: argparse.Namespace) -> Case:
    """A random model on random genes, in cells of given lengths."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    settings = ModelSettings(preset=options.preset)
    config = settings.bert_config(options.vocab)
    config.initializer_range = options.weights
    net, stock = MaskedLM(config), BertForMaskedLM(config)
    stock.load_state_dict(net.state_dict(), strict=False)
    sizes = settings.resolved()
    lengths = np.full(options.cells, options.length)
    if options.lengths:
        lengths = rng.permutation(np.load(options.lengths))[: options.cells].astype(np.int64)
    tokens = np.concatenate([rng.permutation(options.vocab - 4)[:n] + 4 for n in lengths])
    cells = Cells(np.arange(len(lengths)), np.concatenate([[0], np.cumsum(lengths)]), tokens.astype(np.uint16))
    centroid = rng.normal(size=(1, config.hidden_size))
    return Case(net, stock, sizes.special_tokens, sizes.max_length, cells, centroid, options.device)


def real_case(options: argparse.Namespace) -> Case:
    """A pretrained model on real cells; the state is the mean of other cells."""
    loaded, corpus = load_model(options.model), Corpus(options.corpus)
    assert isinstance(loaded.model, MaskedLM), "--model: the baseline needs a masked-language model"
    stock = BertForMaskedLM.from_pretrained(options.model)
    numbers = np.unique(np.linspace(0, len(corpus) - 1, options.cells).astype(int))
    others = np.unique(np.linspace(0, len(corpus) - 1, 60).astype(int))
    card = loaded.card
    cells = corpus.read_cells(numbers)
    case = Case(loaded.model, stock, card.special_tokens, card.max_length, cells, np.zeros((1, 1)), options.device)
    case.centroid = case.scanner("float32", None).embed(corpus.read_cells(others)).mean(axis=0, keepdims=True)
    return case


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """Result and seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def exactness(found: np.ndarray, expected: np.ndarray) -> dict[str, float | int]:
    """How our shifts agree with the baseline's."""
    top = min(100, len(expected) // 4)
    largest = [set(np.argsort(-np.abs(values), kind="stable")[:top].tolist()) for values in (found, expected)]
    return {
        "compared": len(expected),
        "max_abs_difference": float(np.abs(found - expected).max()),
        "largest_shift": float(np.abs(expected).max()),
        "spearman": round(float(spearmanr(found, expected).statistic), 6),
        "top": top,
        "top_overlap": len(largest[0] & largest[1]),
    }


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab", type=int, default=20_000)
    parser.add_argument("--weights", type=float, default=0.1, help="standard deviation of random weights")
    parser.add_argument("--length", type=int, default=400, help="genes of each random cell")
    parser.add_argument("--lengths", help="NumPy file of genes per cell, to draw random cells' lengths from")
    parser.add_argument("--model", help="folder of a pretrained model, instead of a random one")
    parser.add_argument("--corpus", help="corpus of real cells, with --model")
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--original-passes", type=int, default=100, help="genes of each cell that the baseline does")
    parser.add_argument(
        "--passes", type=int, default=None, help="genes of each cell that our side does; by default all"
    )
    parser.add_argument("--batch", type=int, default=50, help="batch of the baseline, as published")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--token-budget", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=2, help="both sides in turn; the best of each counts")
    parser.add_argument("--profile", action="store_true", help="print which kernels take the time, after the lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if (options.model is None) != (options.corpus is None):
        parser.error("--model and --corpus belong together")

    case = real_case(options) if options.model else random_case(options)
    case.stock = case.stock.to(options.device).eval()
    goal = torch.tensor(case.centroid[0], dtype=torch.float32, device=options.device)
    numbers = range(len(case.cells))
    places = case.places(options.original_passes)

    def baseline(few: int | None = None) -> np.ndarray:
        with torch.no_grad():
            parts = [
                original_cell(
                    case.stock,
                    case.tokens(cell).tolist(),
                    goal,
                    options.batch,
                    places[cell][:few].tolist(),
                    case.special_tokens == "cls_eos",
                )
                for cell in numbers
            ]
        return torch.cat(parts).double().cpu().numpy()

    ours_places = case.places(options.passes or case.max_genes)
    whole = [case.deletions(cell, ours_places[cell]) for cell in numbers]
    some = [case.deletions(cell, places[cell]) for cell in numbers]
    scanners = {precision: case.scanner(precision, options.token_budget) for precision in options.precision}
    baseline(2)
    for scanner in scanners.values():
        scanner.scan(case.cells.take(np.arange(1)), some[:1], case.centroid)
    theirs_s, ours_s = [], {precision: [] for precision in options.precision}
    for _ in range(options.rounds):
        theirs, elapsed = timed(baseline, options.device)
        theirs_s.append(elapsed)
        for precision, scanner in scanners.items():
            _, elapsed = timed(lambda scanner=scanner: scanner.scan(case.cells, whole, case.centroid), options.device)
            ours_s[precision].append(elapsed)
    lengths = np.array([len(case.tokens(cell)) for cell in numbers])
    num_passes = np.array([len(edits) for edits in whole])
    passes = int(num_passes.sum())
    config = case.net.config
    flops = encoder_flops(
        num_passes, lengths - 1, config.num_hidden_layers, config.hidden_size, config.intermediate_size
    )
    theirs_rate = len(theirs) / min(theirs_s)
    for precision, scanner in scanners.items():
        found = scanner.scan(case.cells, some, case.centroid).shifts[:, 0]
        rate = passes / min(ours_s[precision])
        line = {
            "benchmark": "perturbation",
            "model": "given" if options.model else f"random {options.preset}",
            "vocab": config.vocab_size,
            "cells": len(case.cells),
            "genes_per_cell": {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())},
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": precision,
            "passes": passes,
            "passes_per_s": round(rate, 1),
            "encoder_gflop_per_s": round(flops / min(ours_s[precision]) / 1e9, 1),
            "original_passes": len(theirs),
            "original_passes_per_s": round(theirs_rate, 1),
            "ratio": round(rate / theirs_rate, 2),
            **exactness(found, theirs),
        }
        print(json.dumps(line), flush=True)
    if options.profile:
        with torch.profiler.profile() as profile:
            scanners[options.precision[0]].scan(case.cells.take(np.arange(1)), whole[:1], case.centroid)
        kind = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=kind, row_limit=15))


if __name__ == "__main__":
    main()
