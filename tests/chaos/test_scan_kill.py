"""Workers of a scan that die: the scan goes on with new ones, and the table is the same."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from evaluate.scan import run_scan
from evaluate.shifts import iter_gene_shifts, read_shifts
from tests.factories_scan import make_scan, write_scan_inputs

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The scan's actors among the processes of this test's cluster."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "ScanWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_a_worker(out: Path, killed: list[int], stop: threading.Event) -> None:
    """Kill one worker as soon as the first unit is committed, and another a few units later."""
    for number in (1, 6):
        while len(list(out.glob("shifts/*.parquet"))) < number and not stop.is_set():
            time.sleep(0.005)
        workers = workers_of(psutil.Process())
        if workers and not stop.is_set():
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)


def test_killed_workers_are_replaced(tmp_path, ray_cluster):
    inputs = write_scan_inputs(tmp_path)
    changes = {"gene_shifts": {"most_changed": 3}}
    run_scan(make_scan(inputs, tmp_path / "alone", **changes, engine={"workers": 0, "unit_tokens": 400}))
    out, killed, stop = tmp_path / "out", [], threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(out, killed, stop))
    killer.start()
    try:
        manifest = run_scan(make_scan(inputs, out, **changes, engine={"workers": 2, "unit_tokens": 400}))
    finally:
        stop.set()
        killer.join()
    assert len(manifest.units) > 15
    assert killed, "the scan was over before a worker could be killed"
    assert read_shifts(str(out))[1].equals(read_shifts(str(tmp_path / "alone"))[1])
    ours, theirs = (list(iter_gene_shifts(str(folder))) for folder in (out, tmp_path / "alone"))
    assert all(a.equals(b) for a, b in zip(ours, theirs, strict=True))
