"""What a run tells: JSON lines, TensorBoard, and a progress line."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corpus.store import Store

LOG = "metrics.jsonl"


class MetricsLog:
    """Records of one run, kept by rank 0.

    On a local output folder the file grows as training goes; on object storage, which cannot append, it is part of each
    checkpoint and is published at the end.

    Parameters
    ----------
    store
        The output folder.
    scratch
        A local folder for what cannot be written in place.
    lines
        What an earlier attempt had logged up to the point of resumption: later lines of it are dropped.
    """

    def __init__(self, store: Store, scratch: Path, lines: bytes = b"", step: int = 0) -> None:
        # TensorBoard takes a second to import, and only one process of a run needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder = store.local_path() or scratch
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG
        self.path.write_bytes(lines)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; its numbers go to TensorBoard under their names."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, record["step"])

    def content(self) -> bytes:
        """All lines so far, flushed to disk."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return self.path.read_bytes()

    def close(self) -> None:
        """Finish TensorBoard's file."""
        self._board.close()


class Rates:
    """Throughput and waiting between two records.

    Parameters
    ----------
    clock
        Seconds; replaced in tests.
    peak
        Operations per second that this process's device could do, where that is known (train/flops.py).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, peak: float | None = None) -> None:
        self._clock = clock
        self._peak = peak
        self._began = clock()
        self._waited = self._flops = 0.0

    def waited(self, seconds: float) -> None:
        """Count time in which the data was not there yet."""
        self._waited += seconds

    def worked(self, flops: float) -> None:
        """Count operations of this process's own batches."""
        self._flops += flops

    def take(self, tokens: float, cells: float) -> dict[str, float]:
        """Close the interval and begin the next one.

        Returns
        -------
        `tokens_per_s`, `cells_per_s` (over all workers) and `data_wait_share` (of rank 0), 0..1; with a known peak and
        counted operations also `mfu` (of rank 0), 0..1: operations per second over the peak.
        """
        now = self._clock()
        elapsed = max(now - self._began, 1e-9)
        rates = {
            "tokens_per_s": round(tokens / elapsed, 1),
            "cells_per_s": round(cells / elapsed, 2),
            "data_wait_share": round(min(self._waited / elapsed, 1.0), 4),
        }
        if self._peak is not None and self._flops:
            rates["mfu"] = round(self._flops / elapsed / self._peak, 5)
        self._began, self._waited, self._flops = now, 0.0, 0.0
        return rates


def progress_line(record: Mapping[str, Any], *, epochs: int, steps: int, seconds_left: float) -> str:
    """Format one line for the terminal.

    Parameters
    ----------
    record
        With `step`, `epoch`, `loss`, `lr` and the rates.
    steps
        Steps of the whole run, as far as known.
    """
    mfu = f"MFU {record['mfu']:.1%} | " if "mfu" in record else ""
    return (
        f"step {record['step']}/{steps} | epoch {record['epoch']:.2f}/{epochs} | loss {record['loss']:.4f} | "
        f"lr {record['lr']:.2e} | {record['tokens_per_s']:,.0f} tokens/s | {record['cells_per_s']:,.1f} cells/s | "
        f"{mfu}data wait {record['data_wait_share']:.1%} | {duration(seconds_left)} left"
    )


def duration(seconds: float) -> str:
    """Write a time span as a person would: 42 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
