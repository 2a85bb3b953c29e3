"""One Ray Data map over a list of tasks: the only place of this package that imports Ray."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from corpus.cluster import ray_options
from corpus.errors import RunError, UserError
from ingest.sandbox import SourceDiedError


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster, or start one and stop it at the end; a cluster that is joined already stays as it is."""
    started = not ray.is_initialized()
    if started:
        ray.init(**ray_options())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a line every few seconds serves logs of jobs as well as terminals
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that bars are off
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def map_tasks(
    tasks: Sequence[Any], work: Callable[[Any], tuple[dict[str, Any], dict[str, np.ndarray]]]
) -> Iterator[tuple[int, dict[str, Any] | UserError | SourceDiedError, dict[str, np.ndarray]]]:
    """Do `work` for every task on the cluster, and yield results as they come, in any order.

    Ray may do a task twice (a node was lost): `work` must give the same result and leave the same files.

    Parameters
    ----------
    work
        Takes a task; returns (facts that JSON can hold, named arrays).

    Yields
    ------
    position, facts or the `UserError` or `SourceDiedError` that the task raised, arrays

    Raises
    ------
    RunError
        The first one that a task raised: no fault of its source, so nothing is gained by going on.
    """
    if not tasks:
        return
    held = ray.put(list(tasks))

    def do(batch: pa.Table) -> pa.Table:
        positions, results = batch["position"].to_pylist(), []
        for position in positions:
            try:
                facts, arrays = work(ray.get(held)[position])
            except UserError as error:
                facts, arrays = {"user_error": str(error), "notes": getattr(error, "__notes__", [])}, {}
            except SourceDiedError as error:
                facts, arrays = {"source_died": str(error)}, {}
            except RunError as error:
                facts, arrays = {"run_error": str(error)}, {}
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)
            results.append((json.dumps(facts), buffer.getvalue()))
        return pa.table(
            {
                "position": pa.array(positions, pa.int64()),
                "facts": pa.array([facts for facts, _ in results], pa.large_string()),
                "arrays": pa.array([arrays for _, arrays in results], pa.large_binary()),
            }
        )

    items = [{"position": position} for position in range(len(tasks))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        do, batch_size=None, batch_format="pyarrow"
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in pa.table(batch).to_pylist():
            facts = json.loads(row["facts"])
            if "run_error" in facts:
                raise RunError(facts["run_error"])
            with np.load(io.BytesIO(row["arrays"]), allow_pickle=False) as arrays:
                yield row["position"], _outcome(facts), dict(arrays)


def _outcome(facts: dict[str, Any]) -> dict[str, Any] | UserError | SourceDiedError:
    if "source_died" in facts:
        return SourceDiedError(facts["source_died"])
    if "user_error" not in facts:
        return facts
    error = UserError(facts["user_error"])
    for note in facts["notes"]:
        error.add_note(note)
    return error
