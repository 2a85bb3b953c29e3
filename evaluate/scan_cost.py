"""What a scan will cost, before it is run: counted from the cells, and timed on a small part of them."""

import time

import numpy as np
import torch

from evaluate.scan_plan import WorkUnit, encoder_flops
from evaluate.scan_setup import Scan
from evaluate.scan_worker import ScanWorker
from train.packing import gene_limit

_TIMED_SECONDS = 2.0


def print_plan(scan: Scan) -> None:
    """Print cells, passes, tokens, FLOPs and the estimated time of a scan; nothing is written.

    The time is that of one worker on this machine's device, from perturbations of the cell of median length.
    """
    worker = ScanWorker(scan.job)
    config = worker.scanner.encoder.config
    specials = worker.scanner.max_length - gene_limit(worker.scanner.max_length, worker.scanner.special_tokens)
    lengths = scan.input_lengths + specials
    tokens = int((scan.num_sets * lengths).sum())
    flops = encoder_flops(
        scan.num_sets, lengths, worker.scanner.num_layers, config.hidden_size, config.intermediate_size
    )
    rate = measured_flops(scan, worker)
    seconds = flops / rate / max(scan.settings.engine.workers, 1)
    rows = {
        "cells": f"{len(scan.selection.cells):,}",
        "cells of the centroids": ", ".join(f"{s} {len(c):,}" for s, c in scan.selection.state_cells.items()) or "none",
        "genes per cell": f"median {np.median(scan.input_lengths):,.0f}, longest {scan.input_lengths.max():,}",
        "work units": f"{len(scan.units):,}",
        "passes, at most": f"{scan.num_sets.sum():,}",
        "tokens": f"{tokens:,}",
        "encoder": f"{flops / 1e12:,.2f} TFLOP",
        "speed of one worker": f"{rate / 1e9:,.1f} GFLOP/s, measured on this machine ({worker.scanner.device})",
        "estimate": f"{seconds:,.0f} s ({seconds / 3600:,.2f} h) with {max(scan.settings.engine.workers, 1)} worker(s)",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def measured_flops(scan: Scan, worker: ScanWorker) -> float:
    """FLOP per second of this machine at perturbations of the cell of median length; about two seconds."""
    median = np.argsort(scan.input_lengths, kind="stable")[len(scan.input_lengths) // 2]
    cells = scan.corpus.read_cells(scan.selection.cells[[median]], counts=True)
    edits, _ = worker.edits(cells, WorkUnit("", cells.index))
    config, scanner = worker.scanner.encoder.config, worker.scanner
    rows = np.arange(len(edits[0]))[: max(scanner.token_budget // int(scan.input_lengths[median]), 1)]
    centroids = np.ones((max(len(scan.job.states), 1), config.hidden_size))
    part = [edits[0].take(rows)]
    scanner.scan(cells, part, centroids)  # the first call pays for kernels and caches
    passes, started = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - started < _TIMED_SECONDS:
        scanner.scan(cells, part, centroids)
        passes += max(len(rows), 1)
        if scanner.device.type == "cuda":
            torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    one = encoder_flops(
        np.ones(1), scan.input_lengths[[median]], scanner.num_layers, config.hidden_size, config.intermediate_size
    )
    return passes * one / elapsed
