"""A perturbation scan over a pool of Ray actors, resumable unit by unit."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np

from corpus.cluster import ray_options
from corpus.errors import UserError
from corpus.provenance import record_run
from evaluate.noise import NOISE_CELLS, NoiseFloor
from evaluate.scan_plan import WorkUnit
from evaluate.scan_setup import Scan
from evaluate.scan_worker import Job, ScanWorker
from evaluate.shifts import MANIFEST, NOISE, ScanManifest, UnitRecord
from evaluate.states import load_centroids, save_centroids, states_id


class Pool(Protocol):
    """Workers that run a method of `ScanWorker` on many arguments."""

    def run(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield (place of the task, result) in the order of completion."""
        ...


class LocalPool:
    """One worker, in this process."""

    def __init__(self, job: Job, kind: type[ScanWorker] = ScanWorker) -> None:
        self.worker = kind(job)

    def run(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Pool`."""
        for place, task in enumerate(tasks):
            yield place, getattr(self.worker, method)(*task)


class RayPool:
    """Actors; each has at most two tasks, so that it never waits and little is repeated when one is lost."""

    def __init__(self, job: Job, kind: type[ScanWorker] = ScanWorker) -> None:
        import ray

        engine = job.engine
        self.mine = not ray.is_initialized()
        if self.mine:
            ray.init(log_to_driver=False, **ray_options())
        gpus = engine.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        actor = ray.remote(kind).options(
            num_cpus=engine.cpus_per_worker, num_gpus=gpus, max_restarts=4, max_task_retries=4
        )
        self.actors = [actor.remote(job) for _ in range(engine.workers)]

    def run(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """See `Pool`."""
        import ray

        running: dict[Any, tuple[int, Any]] = {}
        waiting = enumerate(tasks)
        for actor in self.actors * 2:
            self._start(actor, method, waiting, running)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            place, actor = running.pop(ready)
            result = ray.get(ready)
            self._start(actor, method, waiting, running)
            yield place, result

    @staticmethod
    def _start(
        actor: Any, method: str, waiting: Iterator[tuple[int, tuple[Any, ...]]], running: dict[Any, tuple[int, Any]]
    ) -> None:
        for place, task in islice(waiting, 1):
            running[getattr(actor, method).remote(*task)] = place, actor

    def close(self) -> None:
        """Give the actors' resources back."""
        import ray

        for actor in self.actors:
            ray.kill(cast("ray.actor.ActorHandle[ScanWorker]", actor))
        if self.mine:
            ray.shutdown()


@contextmanager
def worker_pool(job: Job, kind: type[ScanWorker] = ScanWorker) -> Iterator[Pool]:
    """Open the workers that the settings ask for."""
    if job.engine.workers == 0:
        yield LocalPool(job, kind)
        return
    pool = RayPool(job, kind)
    try:
        yield pool
    finally:
        pool.close()


class Progress:
    """Lines of progress: units, passes a second, time left."""

    def __init__(self, units: list[WorkUnit], committed: set[str], every_s: float) -> None:
        self.total, self.committed, self.every_s = len(units), committed, every_s
        self.tokens_left = sum(unit.tokens for unit in units if unit.unit_id not in committed)
        self.tokens_done = self.passes = self.finished = 0
        self.started = self.last = time.monotonic()

    def done(self, unit: WorkUnit, record: UnitRecord) -> None:
        """Count a unit; a resumed one counts as done, but not for the speed."""
        self.finished += 1
        if unit.unit_id not in self.committed:
            self.tokens_done += unit.tokens
            self.tokens_left -= unit.tokens
            self.passes += record.rows
        now = time.monotonic()
        if now - self.last >= self.every_s or self.finished == self.total:
            self.last = now
            print(self.line(now - self.started), file=sys.stderr, flush=True)

    def line(self, elapsed_s: float) -> str:
        """One line, after so many seconds."""
        left_s = self.tokens_left * elapsed_s / self.tokens_done if self.tokens_done else 0.0
        clock = f"{int(left_s) // 3600}:{int(left_s) // 60 % 60:02d}:{int(left_s) % 60:02d}"
        rate = self.passes / max(elapsed_s, 1e-9)
        return f"perturb: {self.finished}/{self.total} units, {rate:,.0f} passes/s, {clock} left"


def run_scan(scan: Scan) -> ScanManifest:
    """Run what is not there yet, then publish the manifest.

    Raises
    ------
    UserError
        If the folder holds another finished scan.
    """
    if scan.out.exists(MANIFEST):
        found = ScanManifest.read(scan.out)
        if found.scan_id != scan.scan_id:
            raise UserError(
                f"{scan.out.uri}: holds another scan (model, corpus or settings differ): choose another --out"
            )
        return found
    record_run(
        scan.out,
        "evaluate perturb",
        scan.settings,
        {"model": scan.model.checksum, "corpus": scan.corpus_sha256, "genes": scan.corpus.genes.hash},
    )
    with worker_pool(scan.job) as pool:
        centroids = state_centroids(scan, pool)
        noise = _noise(scan, pool, centroids)
        records = _run_units(scan, pool, centroids)
    manifest = _manifest(scan, records, noise)
    manifest.publish(scan.out)
    return manifest


def state_centroids(scan: Scan, pool: Pool) -> np.ndarray:
    """float64[states, d], from the cache or from the workers, one state a task."""
    cells = scan.selection.state_cells
    if not cells:
        return np.zeros((0, scan.model.model.bert.config.hidden_size))
    name = states_id(scan.readout_id, cells)
    found = load_centroids(scan.out, name)
    if found is None:
        print(f"perturb: centroids of {len(cells)} states", file=sys.stderr, flush=True)
        states = list(cells)
        means = dict(pool.run("centroid", [(cells[state],) for state in states]))
        found = {state: means[place] for place, state in enumerate(states)}
        save_centroids(scan.out, name, found, {state: len(members) for state, members in cells.items()})
    return np.stack([found[state] for state in cells])


def _noise(scan: Scan, pool: Pool, centroids: np.ndarray) -> NoiseFloor:
    """What rounding alone gives on the device that this scan was begun on."""
    if not scan.out.exists(NOISE):
        cells = scan.selection.cells
        chosen = cells[np.unique(np.linspace(0, len(cells) - 1, NOISE_CELLS).astype(int))]
        ((_, noise),) = pool.run("noise", [(chosen, centroids)])
        scan.out.create(NOISE, noise.to_json())
    return NoiseFloor.model_validate_json(scan.out.read_bytes(NOISE))


def _run_units(scan: Scan, pool: Pool, centroids: np.ndarray) -> list[UnitRecord]:
    committed = {name.removesuffix(".parquet") for name in scan.out.names("shifts")}
    tasks = ((unit, scan.obs_of(unit.cells), centroids) for unit in scan.units)
    progress = Progress(scan.units, committed, scan.settings.engine.report_every_s)
    records: dict[int, UnitRecord] = {}
    for place, record in pool.run("run", tasks):
        records[place] = record
        progress.done(scan.units[place], record)
    return [records[place] for place in range(len(scan.units))]


def _manifest(scan: Scan, records: list[UnitRecord], noise: NoiseFloor) -> ScanManifest:
    reasons = sorted({reason for record in records for reason in record.skipped})
    return ScanManifest(
        scan_id=scan.scan_id,
        model_checksum=scan.model.checksum,
        genes_hash=scan.corpus.genes.hash,
        corpus_sha256=scan.corpus_sha256,
        settings=scan.described,
        perturbation=scan.settings.perturbation.kind,
        joint=scan.job.joint,
        states=scan.job.states,
        state_cells={state: len(cells) for state, cells in scan.selection.state_cells.items()},
        labels=scan.job.labels,
        columns=scan.job.columns,
        num_cells=len(scan.selection.cells),
        rows=sum(record.rows for record in records),
        skipped={reason: sum(record.skipped.get(reason, 0) for record in records) for reason in reasons},
        noise=noise,
        gene_shifts=scan.job.affected is not None,
        units=records,
    )
