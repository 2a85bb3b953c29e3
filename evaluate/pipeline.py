"""Encoding over workers: in this process, or Ray actors that each hold the model."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from corpus.cluster import ray_options
from corpus.reader import Corpus
from evaluate.encode import EncodeJob, EncodeWorker
from evaluate.settings import WorkerSettings
from train.model_folder import LoadedModel

Task = tuple[int, np.ndarray | None]


def encode_groups(
    job: EncodeJob, tasks: Iterable[Task], workers: WorkerSettings, corpus: Corpus, model: LoadedModel
) -> Iterator[tuple[int, np.ndarray]]:
    """Encode row groups.

    Parameters
    ----------
    tasks
        (row group, rows in it or None for all), each row group once.
    corpus, model
        As opened by the caller; used by a single worker in this process.

    Yields
    ------
    (row group, float32[rows, width]); with several workers in the order in which they finish.
    """
    if workers.count > 1:
        yield from _encode_on_cluster(job, tasks, workers)
        return
    worker = EncodeWorker(job, corpus, model)
    for group, rows in tasks:
        yield group, worker.run(group, rows)


def _encode_on_cluster(
    job: EncodeJob, tasks: Iterable[Task], workers: WorkerSettings
) -> Iterator[tuple[int, np.ndarray]]:
    """Give each actor two row groups at a time: it never waits, and little is in memory or repeated after a loss."""
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(**ray_options())
    actors: list[Any] = []
    try:
        gpus = workers.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        actor = ray.remote(EncodeWorker).options(
            num_cpus=workers.cpus, num_gpus=gpus, max_restarts=4, max_task_retries=4
        )
        actors = [actor.remote(job) for _ in range(workers.count)]
        pending, running = iter(tasks), {}
        for worker in [*actors, *actors]:
            for group, rows in islice(pending, 1):
                running[worker.run.remote(group, rows)] = group, worker
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            group, worker = running.pop(done)
            for next_group, rows in islice(pending, 1):
                running[worker.run.remote(next_group, rows)] = next_group, worker
            yield group, ray.get(done)
    finally:
        for worker in actors:
            ray.kill(worker)
        if mine:
            ray.shutdown()
