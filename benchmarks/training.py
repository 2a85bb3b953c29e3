"""Training tokens per second, from a plain Hugging Face loop to ours, rung by rung, in one run; one JSON line.

    python -m benchmarks.training --preset tiny --lengths lengths.npy
    python -m benchmarks.training --preset mouse-6l --lengths lengths.npy --device cuda --cells 2304

The plain loop is what the published training does, written anew: stock `BertForMaskedLM`, batches of 12 cells in length
groups padded to their longest, logits of every position over the whole vocabulary, float32, AdamW, gradients clipped
at 1. Each further rung changes one thing. All rungs train on the same cells with the same masks, the same sizes and
optimiser; a rate counts real tokens. Batches are made before the clock starts (`benchmarks.loader` times that), and
rungs take turns over several rounds, so that a change in the machine's load hits all of them; the median counts. On a
machine that others use, too, take `--threads 1` and compare tokens per CPU second.

`--lengths` takes an int array of tokens per cell (.npy); without it lengths are lognormal (median 1,200, sigma 0.4).
Needs neither Ray nor DeepSpeed; where DeepSpeed is installed a last rung runs the step as users run it.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from benchmarks.generated import histogram
from corpus.reader import Cells
from corpus.schema import SPECIAL_TOKENS
from train.batches import next_fit
from train.cross_entropy import linear_cross_entropy
from train.flops import peak_flops, training_flops
from train.masking import mask_tokens
from train.model import MaskedLM
from train.packing import Packed, pack
from train.presets import ModelSettings
from train.settings import BatchSettings, EngineSettings, OptimizerSettings

PLAIN_CELLS = 12
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
Batch = tuple[Any, ...]
Loss = Callable[[Any, Batch], tuple[Tensor, int]]


def draw_cells(lengths: np.ndarray, vocab: int, max_length: int, rng: np.random.Generator) -> Cells:
    """Cells of these lengths with random distinct genes, truncated."""
    sizes = np.clip(lengths, 1, max_length)
    first = len(SPECIAL_TOKENS)
    tokens = [rng.choice(vocab - first, size, replace=False) + first for size in sizes]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Cells(np.arange(len(sizes)), offsets, np.concatenate(tokens).astype(np.uint16))


def masked(cells: Cells, vocab: int) -> tuple[Packed, Tensor, Tensor]:
    """Batch as our model takes it, rows to predict, labels."""
    genes = np.arange(len(SPECIAL_TOKENS), vocab, dtype=np.uint16)
    found = mask_tokens(cells, genes, seed=0, epoch=0)
    packed = pack(found.cells, int(cells.lengths.max()))
    return packed, packed.rows_of(found.entries), torch.from_numpy(found.labels)


def padded(packed: Packed, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same batch as stock transformers takes it: input ids, attention mask, labels with -100."""
    shape = (len(packed), packed.max_length)
    where = (packed.cell_of_row, packed.positions)
    flat_labels = torch.full_like(packed.tokens, -100)
    flat_labels[rows] = labels
    ids, mask, wanted = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.full(shape, -100),
    )
    ids[where], mask[where], wanted[where] = packed.tokens, 1, flat_labels
    return ids, mask, wanted


def grouped(cells: Cells, rng: np.random.Generator) -> Iterator[Cells]:
    """Batches of 12 cells of similar length, in random order."""
    order = np.argsort(-cells.lengths, kind="stable")
    groups = [order[first : first + PLAIN_CELLS] for first in range(0, len(order), PLAIN_CELLS)]
    for number in rng.permutation(len(groups)):
        yield cells.take(groups[number])


def budgeted(cells: Cells, token_budget: int, rng: np.random.Generator) -> Iterator[Cells]:
    """Batches of random cells that fill a budget of tokens."""
    order = rng.permutation(len(cells))
    bounds = next_fit(cells.lengths[order], token_budget)
    for first, last in pairwise(bounds):
        yield cells.take(order[first:last])


class Rung:
    """A model, an optimiser and prepared batches."""

    def __init__(
        self, name: str, model: nn.Module, loss: Loss, batches: list[Batch], bf16: bool, fused: bool = True
    ) -> None:
        self.name, self.model, self.loss, self.batches, self.bf16 = name, model, loss, batches, bf16
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=fused)
        self.initial_loss = self._initial_loss()

    def _initial_loss(self) -> float:
        """Mean over all scored tokens without dropout: the same number on every rung, whatever its batches."""
        self.model.eval()
        total, number = 0.0, 0
        with torch.no_grad():
            for batch in self.batches:
                loss, scored = self._loss(self._move(batch))
                total, number = total + loss.item() * scored, number + scored
        self.model.train()
        return total / number

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.loss(self.model, batch)

    def _move(self, batch: Batch) -> Batch:
        return tuple(part.to(self.device) for part in batch)

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        loss, _ = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, batches: list[Batch]) -> tuple[float, float]:
        """Train on some batches; return wall and CPU seconds."""
        self._wait()
        began, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            self.step(self._move(batch))
        self._wait()
        return time.perf_counter() - began, time.process_time() - cpu

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class EngineRung(Rung):
    """The step as `python -m train pretrain` takes it, through DeepSpeed."""

    def __init__(self, name: str, model: MaskedLM, batches: list[Batch], bf16: bool) -> None:
        from train.engine import start_engine
        from train.world import single_process

        super().__init__(name, model, own_model, batches, bf16)
        optimizer, precision = OptimizerSettings(learning_rate=1e-4), "bf16" if bf16 else "fp32"
        world = single_process(self.device)
        self.engine = start_engine(model, optimizer, EngineSettings(), BatchSettings(), precision, world)
        self.engine.train()

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        loss, _ = own_model(self.engine, batch)
        self.engine.backward(loss, scale_wrt_gas=False)
        self.engine.step()


def full_head(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, int]:
    """Stock loss: logits of every position."""
    ids, mask, labels = batch
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss, int((labels != -100).sum())


def masked_rows(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, int]:
    """Stock encoder; logits of the masked positions alone, held at once."""
    hidden, labels = _scored(model, batch)
    return F.cross_entropy(model.cls(hidden).float(), labels), len(labels)


def chunked(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, int]:
    """Stock encoder; our cross-entropy."""
    hidden, labels = _scored(model, batch)
    head, weight = model.cls.predictions, model.bert.embeddings.word_embeddings.weight
    loss, _ = linear_cross_entropy(head.transform(hidden), weight, head.bias, labels)
    return loss / len(labels), len(labels)


def own_model(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Our model."""
    packed, rows, labels = batch
    loss, _ = model(packed, rows, labels)
    return loss / len(labels), len(labels)


def _scored(model: BertForMaskedLM, batch: Batch) -> tuple[Tensor, Tensor]:
    ids, mask, labels = batch
    hidden = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    scored = labels != -100
    return hidden[scored], labels[scored]


def ladder(options: argparse.Namespace, cells: Cells, config: BertConfig) -> Iterator[Rung]:
    """The rungs up to `no_attention_dropout` change one thing each; those after it are variants of that one."""
    device, bf16 = torch.device(options.device), options.precision == "bf16"
    torch.manual_seed(0)
    weights = MaskedLM(config).state_dict()

    def stock() -> BertForMaskedLM:
        model = BertForMaskedLM(config)
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
        return model.to(device)

    def ours(attention_dropout: float = config.attention_probs_dropout_prob) -> MaskedLM:
        model = MaskedLM(BertConfig.from_dict(config.to_dict() | {"attention_probs_dropout_prob": attention_dropout}))
        model.load_state_dict(weights)
        return model.to(device)

    rng = np.random.default_rng(1)
    groups = [masked(part, config.vocab_size) for part in grouped(cells, rng)]
    rectangles = [padded(*batch) for batch in groups]
    packs = [masked(part, config.vocab_size) for part in budgeted(cells, options.token_budget, rng)]
    yield Rung("plain", stock(), full_head, rectangles, False)
    if bf16:
        yield Rung("bf16", stock(), full_head, rectangles, True)
    yield Rung("masked_head", stock(), masked_rows, rectangles, bf16)
    yield Rung("chunked_head", stock(), chunked, rectangles, bf16)
    yield Rung("no_padding", ours(), own_model, groups, bf16)
    yield Rung("packing", ours(), own_model, packs, bf16)
    yield Rung("no_attention_dropout", ours(0.0), own_model, packs, bf16)
    yield Rung("unfused_adamw", ours(0.0), own_model, packs, bf16, fused=False)
    if importlib.util.find_spec("deepspeed"):
        yield EngineRung("deepspeed", ours(0.0), packs, bf16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--vocab", type=int, default=56_084)
    parser.add_argument("--lengths", help="tokens per cell, int array (.npy)")
    parser.add_argument("--max-length", type=int, help="cells are cut to this; by default the preset's")
    parser.add_argument("--cells", type=int, default=48, help="cells of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--token-budget", type=int, help="tokens in a packed batch; by default 16,384, on CUDA 65,536")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="above the plain loop; by default bf16 on CUDA")
    parser.add_argument("--rungs", nargs="+", help="only these, besides plain")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU, where it is not known by name")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    on_gpu = options.device.startswith("cuda")
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    options.token_budget = options.token_budget or (65_536 if on_gpu else 16_384)

    rng = np.random.default_rng(0)
    settings = ModelSettings.model_validate({"preset": options.preset, "max_length": options.max_length})
    config = settings.bert_config(options.vocab)
    drawn = np.load(options.lengths) if options.lengths else rng.lognormal(np.log(1_200), 0.4, 10_000).astype(np.int64)
    lengths = rng.choice(drawn, options.cells, replace=options.cells > len(drawn))
    cells = draw_cells(lengths, options.vocab, settings.resolved().max_length, rng)
    tokens = int(cells.lengths.sum())
    rungs = [
        rung
        for rung in ladder(options, cells, config)
        if options.rungs is None or rung.name in {"plain", *options.rungs}
    ]
    seconds: dict[str, list[tuple[float, float]]] = {rung.name: [] for rung in rungs}
    for rung in rungs:
        rung.run(rung.batches[:2])
    for _ in range(options.rounds):
        for rung in rungs:
            seconds[rung.name].append(rung.run(rung.batches))
    wall, cpu = (
        {name: tokens / statistics.median(run[clock] for run in found) for name, found in seconds.items()}
        for clock in range(2)
    )
    flops = training_flops(config, cells.lengths, round(0.15 * tokens)) / tokens
    peak = peak_flops(torch.device(options.device), options.precision, options.peak_tflops)
    print(
        json.dumps(
            {
                "benchmark": "training",
                "preset": options.preset,
                "sizes": {key: getattr(config, key) for key in _SIZES},
                "cells": options.cells,
                "rounds": options.rounds,
                "lengths": Path(options.lengths).name if options.lengths else "lognormal(1200, 0.4)",
                "length_histogram": histogram(cells.lengths),
                "mean_length": round(tokens / len(cells), 1),
                "token_weighted_length": round(float(np.square(cells.lengths).sum()) / tokens, 1),
                "plain_padding_share": round(1 - tokens / sum(ids.numel() for ids, _, _ in rungs[0].batches), 4),
                "token_budget": options.token_budget,
                "precision": options.precision,
                "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
                "threads": torch.get_num_threads(),
                "load_average": os.getloadavg()[0],
                "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
                "mflop_per_token": round(flops / 1e6, 2),
                "tokens_per_s": {name: round(rate) for name, rate in wall.items()},
                "ratio_to_plain": {name: round(rate / wall["plain"], 2) for name, rate in wall.items()},
                "tokens_per_cpu_s": None if on_gpu else {name: round(rate) for name, rate in cpu.items()},
                "cpu_ratio_to_plain": None
                if on_gpu
                else {name: round(rate / cpu["plain"], 2) for name, rate in cpu.items()},
                "initial_loss": {rung.name: round(rung.initial_loss, 5) for rung in rungs},
                "mfu": {name: round(rate * flops / peak, 4) for name, rate in wall.items()} if peak else None,
            }
        )
    )


if __name__ == "__main__":
    main()
