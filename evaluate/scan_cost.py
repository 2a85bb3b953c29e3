"""What a scan will cost, before it is run: counted from the cells, and timed on a small part of them."""

import time

import numpy as np

from evaluate.perturb import null_edits
from evaluate.scan_plan import encoder_flops
from evaluate.scan_setup import Scan
from evaluate.scan_worker import ScanWorker
from train.packing import gene_limit

_TIMED_SECONDS = 2.0


def print_plan(scan: Scan) -> None:
    """Print cells, passes, tokens, FLOPs and the estimated time of a scan; nothing is written.

    The time follows from the speed of one worker on this machine's device at the cell of median length.
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
        **({"rows of gene_shifts, at most": f"{scan.gene_rows:,}"} if scan.settings.gene_shifts else {}),
        "encoder": f"{flops / 1e12:,.2f} TFLOP",
        "speed of one worker": f"{rate / 1e9:,.1f} GFLOP/s, measured on this machine ({worker.scanner.device})",
        "estimate": f"{seconds:,.0f} s ({seconds / 3600:,.2f} h) with {max(scan.settings.engine.workers, 1)} worker(s)",
    }
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def measured_flops(scan: Scan, worker: ScanWorker) -> float:
    """FLOP per second of this machine at full batches of the cell of median length; about two seconds.

    The cell is run unchanged, so that there is something to time whether or not the perturbation applies to it.
    """
    median = np.argsort(scan.input_lengths, kind="stable")[len(scan.input_lengths) // 2]
    cells = scan.corpus.read_cells(scan.selection.cells[[median]])
    config, scanner = worker.scanner.encoder.config, worker.scanner
    length = int(scan.input_lengths[median])
    rows = np.zeros(max(scanner.token_budget // length, 1), dtype=np.int64)
    centroids = np.ones((max(len(scan.job.states), 1), config.hidden_size))
    part = [null_edits(np.array([length]))[0].take(rows)]
    scanner.scan(cells, part, centroids)  # the first call pays for kernels and caches
    passes, started = 0, time.perf_counter()
    while passes == 0 or time.perf_counter() - started < _TIMED_SECONDS:
        scanner.scan(cells, part, centroids)  # waits for the device: its result is on the host
        passes += len(rows)
    elapsed = time.perf_counter() - started
    one = encoder_flops(
        np.ones(1), np.array([length]), scanner.num_layers, config.hidden_size, config.intermediate_size
    )
    return passes * one / elapsed
