"""Perturbation scan against the original's per-cell procedure, in one run; prints one JSON line.

    python -m benchmarks.perturbation --preset tiny --cells 2 --length 400
    python -m benchmarks.perturbation --preset mouse-6l --device cuda --precision bfloat16 --cells 20 --length 1250

The baseline is written anew from the description of the published procedure: one copy of the cell per gene, edited as
Python lists, padded, run in batches through the whole model with the language-model head and all hidden states kept,
then pooled. The original also writes each cell's copies to disk as an Arrow data set, twice; that is left out here, so
the ratio is a lower bound. Both sides delete the same genes of the same cells of a random model.
"""

import argparse
import json
import platform
import time

import numpy as np
import torch
from transformers import BertForMaskedLM

from corpus.reader import Cells
from evaluate.perturb import Edits, plan_edits
from evaluate.perturb_settings import PerturbationSettings
from evaluate.scan_compute import Scanner
from train.model import MaskedLM
from train.presets import ModelSettings


def original_cell(
    model: BertForMaskedLM, tokens: list[int], centroid: torch.Tensor, batch: int, passes: int
) -> torch.Tensor:
    """Shift of one cell towards a centroid for the deletion of its first genes, as the published code computes it."""
    device = centroid.device
    before = model(torch.tensor([tokens], device=device), output_hidden_states=True).hidden_states[-1][0]
    copies = [tokens[:place] + tokens[place + 1 :] for place in range(min(len(tokens), passes))]
    shifts = []
    for first in range(0, len(copies), batch):
        part = copies[first : first + batch]
        longest = max(map(len, part))
        ids = torch.tensor([copy + [0] * (longest - len(copy)) for copy in part], device=device)
        mask = torch.tensor([[1] * len(copy) + [0] * (longest - len(copy)) for copy in part], device=device)
        after = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        for row in range(len(part)):
            kept = torch.cat([before[: first + row], before[first + row + 1 :]])
            x, y = after[row].mean(0), kept.mean(0)
            shifts.append(torch.cosine_similarity(x, centroid, 0) - torch.cosine_similarity(y, centroid, 0))
    return torch.stack(shifts)


def seconds(run, device: str):
    """Time a call; returns its result too."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab", type=int, default=20_000)
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--original-passes", type=int, default=200, help="genes of each cell that the baseline does")
    parser.add_argument("--batch", type=int, default=50, help="batch of the baseline, as published")
    parser.add_argument(
        "--precision", default="float32", help="of our side; the baseline runs in float32, as published"
    )
    parser.add_argument("--token-budget", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    settings = ModelSettings(preset=options.preset)
    config = settings.bert_config(options.vocab)
    ours = MaskedLM(config)
    stock = BertForMaskedLM(config)
    stock.load_state_dict(ours.state_dict(), strict=False)
    stock = stock.to(options.device).eval()
    lengths = np.full(options.cells, options.length)
    tokens = np.concatenate([rng.permutation(options.vocab - 4)[:n] + 4 for n in lengths])
    cells = Cells(np.arange(len(lengths)), np.concatenate([[0], np.cumsum(lengths)]), tokens.astype(np.uint16))
    centroid = rng.normal(size=(1, config.hidden_size))
    max_length = settings.resolved().max_length
    scanner = Scanner(
        ours.bert,
        max_length=max_length,
        special_tokens=settings.resolved().special_tokens,
        num_layers=config.num_hidden_layers,
        precision=options.precision,
        token_budget=options.token_budget,
        device=options.device,
    )

    def scan(part: Cells) -> np.ndarray:
        edits: list[Edits] = []
        for first, last in zip(part.offsets[:-1], part.offsets[1:], strict=True):
            own = part.tokens[first:last].astype(np.int64)
            planned, _ = plan_edits(
                own, None, own[:max_length, None], PerturbationSettings(), np.ones(options.vocab), max_length
            )
            edits.append(planned)
        return scanner.scan(part, edits, centroid).shifts[:, 0]

    few = options.original_passes
    with torch.no_grad():
        goal = torch.tensor(centroid[0], dtype=torch.float32, device=options.device)

        def baseline() -> torch.Tensor:
            return torch.cat(
                [original_cell(stock, cells.tokens[a:b].tolist(), goal, options.batch, few) for a, b in spans]
            )

        spans = list(zip(cells.offsets[:-1].tolist(), cells.offsets[1:].tolist(), strict=True))
        original_cell(stock, cells.tokens[: options.length].tolist(), goal, options.batch, options.batch)
        theirs, theirs_s = seconds(baseline, options.device)
    scan(cells.take(np.arange(1)))
    found, ours_s = seconds(lambda: scan(cells), options.device)
    found = found.reshape(options.cells, -1)[:, :few].ravel()
    ours_rate = options.cells * min(options.length, max_length) / ours_s
    theirs_rate = len(theirs) / theirs_s
    print(
        json.dumps(
            {
                "benchmark": "perturbation",
                "preset": options.preset,
                "vocab": options.vocab,
                "genes_per_cell": options.length,
                "cells": options.cells,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
                "threads": torch.get_num_threads(),
                "precision": options.precision,
                "passes_per_s": round(ours_rate, 1),
                "original_passes_per_s": round(theirs_rate, 1),
                "ratio": round(ours_rate / theirs_rate, 2),
                "max_abs_difference": float(np.abs(found - theirs.double().cpu().numpy()).max()),
                "largest_shift": float(theirs.abs().max()),
            }
        )
    )


if __name__ == "__main__":
    main()
