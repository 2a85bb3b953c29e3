"""Ray Train: a run from the driver's side, and what a worker does before the loop."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from corpus.cluster import ray_options
from corpus.errors import RunError, UserError
from corpus.provenance import record_run
from corpus.store import Store
from train import loop, output
from train.desk import SaveOnSigterm, attended, held_up_by, node_name, open_desk, reporting
from train.finetune import FinetuneTask
from train.pretrain import PretrainTask
from train.settings import FinetuneSettings, PretrainSettings, WorkerSettings, settings_hash
from train.tasks import Task
from train.world import World

_KINDS: dict[str, type[PretrainSettings] | type[FinetuneSettings]] = {
    "pretrain": PretrainSettings,
    "finetune": FinetuneSettings,
}


def make_task(kind: str, values: dict[str, Any], **options: Any) -> Task:
    """Build a task from its settings as plain values."""
    settings = _KINDS[kind].model_validate(values)
    if isinstance(settings, PretrainSettings):
        return PretrainTask(settings)
    return FinetuneTask(settings, **options)


def train(settings: PretrainSettings | FinetuneSettings) -> dict[str, Any]:
    """Run a training to its end, or say that it has been done.

    Returns
    -------
    The content of metrics.json.

    Raises
    ------
    UserError, RunError
        Also those that arose in a worker.
    """
    kind = "pretrain" if isinstance(settings, PretrainSettings) else "finetune"
    values = settings.model_dump(mode="json")
    task = make_task(kind, values)
    identity = task.identity()
    store = Store(settings.out)
    done = output.claim(store, identity)
    if done is not None:
        print(f"{store.uri}: already finished with these settings; nothing to do", flush=True)
        return done
    for note in task.notes:
        print(note, flush=True)
    record_run(store, task.command, settings, {"corpus": task.corpus.manifest.genes_hash})
    with cluster(settings.workers):
        metrics = fit(kind, values, settings.workers, store, settings_hash(identity))
    print(f"{store.uri}: finished", flush=True)
    return metrics


def fit(
    kind: str,
    values: dict[str, Any],
    workers: WorkerSettings,
    store: Store,
    name: str,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> dict[str, Any]:
    """Run a worker group until the model folder is there, starting again from checkpoints as often as allowed.

    Parameters
    ----------
    kind, values
        "pretrain" or "finetune", and its settings.
    workers
        Whom to start.
    store
        The output folder, claimed for this run.
    name
        Of the run: its settings hash.
    callbacks
        Told of each report.
    options
        Passed to the task.

    Ray restarts workers and hears the figures of each evaluation; checkpoints are ours alone (train/checkpoint.py), for
    Ray would hand back the newest one whether it is whole or not.
    """
    use_gpu = _use_gpu(workers)
    desk = open_desk(workers.timeout_s)
    trainer = ray.train.torch.TorchTrainer(
        _work,  # type: ignore[arg-type]  # Ray's type forgets that a worker may return something
        train_loop_config={"kind": kind, "settings": values, "options": options, "desk": desk},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count, use_gpu=use_gpu, resources_per_worker={"CPU": workers.cpus} | _gpu(use_gpu)
        ),
        torch_config=ray.train.torch.TorchConfig(
            # Later than the watch, which knows whom to name.
            backend="nccl" if use_gpu else "gloo",
            timeout_s=int(workers.timeout_s) + 60,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=f"{store.uri}/ray",
            callbacks=[SaveOnSigterm(), *callbacks],  # type: ignore[list-item]  # Ray takes its inner kind as well
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
        ),
    )
    with attended(desk):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise RunError(
                f"training failed for good: {held_up_by(desk) or _last_line(error)}; the same command goes on from "
                f"the newest checkpoint in {store.uri}"
            ) from error
    outcome: dict[str, Any] = json.loads(result.return_value)  # type: ignore[attr-defined]
    match outcome:
        case {"user_error": message}:
            raise UserError(message)
        case {"run_error": message}:
            raise RunError(message)
    return outcome


@contextlib.contextmanager
def cluster(workers: WorkerSettings) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or one that is already joined, or start one on this machine."""
    # Silence of one rank must end a run: by default Ray waits for ever (DESIGN: finite timeouts).
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(workers.timeout_s))
    # By then the watch has named a worker that no longer answers; a single one has nobody else to end its attempt.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(workers.timeout_s + 30))
    if ray.is_initialized():
        yield
        return
    options = ray_options()
    if options["address"] == "local":
        # On a laptop with fewer cores than workers, the workers share the cores.
        needed = int(workers.count * workers.cpus + 1)
        options["num_cpus"] = max(os.cpu_count() or 1, needed)
    ray.init(**options, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _work(config: dict[str, Any]) -> str:
    """Run the loop in a worker; errors that another attempt cannot mend are returned, not raised."""
    quiet()
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // context.get_local_world_size()))
    world = World(context.get_world_rank(), context.get_world_size(), device, node_name())
    desk, settings = config["desk"], config["settings"]
    try:
        task = make_task(config["kind"], settings, **config["options"])
        with reporting(desk, world, settings["workers"]["timeout_s"]) as (world, signals):
            metrics = loop.run(
                task,
                settings["out"],
                world,
                emit=lambda line: desk.put.remote(line),
                report=ray.train.report,
                signals=signals,
            )
    except UserError as error:
        return json.dumps({"user_error": str(error)})
    except RunError as error:
        return json.dumps({"run_error": str(error)})
    return json.dumps(metrics)


def quiet() -> None:
    """Keep third parties' chatter out of the logs."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def _use_gpu(workers: WorkerSettings) -> bool:
    gpus = ray.cluster_resources().get("GPU", 0)
    if workers.device == "cuda" and gpus < workers.count:
        raise UserError(f"workers.device = cuda: {workers.count} worker(s), but the cluster has {gpus:g} GPU(s)")
    return workers.device == "cuda" or (workers.device == "auto" and gpus >= workers.count)


def _gpu(use_gpu: bool) -> dict[str, float]:
    return {"GPU": 1} if use_gpu else {}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
