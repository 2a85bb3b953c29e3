"""One trial: the training loop of `train`, reporting each epoch to Ray Tune."""

import os
import tempfile
from pathlib import Path
from typing import Any

import ray.tune
import ray.tune.integration.ray_train
import safetensors.torch
import torch

from corpus.store import Store
from train import loop, output
from train.finetune import FinetuneTask
from train.launch import fit, quiet
from train.settings import FinetuneOptions, FinetuneSettings, settings_hash
from train.split import TEST, TRAIN, VALIDATION
from train.world import single_process
from tune.settings import TuneSettings
from tune.space import apply_point

SCORE = f"best_{FinetuneTask.score}"
_WEIGHTS = "model.safetensors"


def trial_settings(settings: TuneSettings, options: FinetuneOptions, name: str) -> FinetuneSettings:
    """Settings of one trial's fine-tuning."""
    places = {"corpus": settings.corpus, "model": settings.model, "out": f"{settings.out}/trials/{name}"}
    return FinetuneSettings.model_validate({**options.model_dump(), **places})


def run_trial(point: dict[str, Any], settings: TuneSettings) -> None:
    """Fine-tune at one point of the space; resumes from its own checkpoints if it ran before.

    The test cells are not looked at. One worker trains in this very process, which saves the start of another; several
    get a worker group of Ray Train.
    """
    quiet()
    options = apply_point(settings.finetune, point)
    finetune = trial_settings(settings, options, ray.tune.get_context().get_trial_id())
    task = FinetuneTask(finetune, measured=(VALIDATION,))
    identity = task.identity()
    store = Store(finetune.out)
    output.claim(store, identity)
    workers = finetune.workers
    if workers.count == 1:
        use_threads(settings.concurrent)
        world = single_process(trial_device(workers.device))
        metrics = loop.run(task, finetune.out, world, emit=print, report=_ReportEarly(finetune.epochs))
    else:
        metrics = fit(
            "finetune",
            finetune.model_dump(mode="json"),
            workers,
            store,
            settings_hash(identity),
            callbacks=[_ReportEarlyFromWorkers(finetune.epochs)],
            measured=(VALIDATION,),
        )
    score = metrics[FinetuneTask.score]
    ray.tune.report({"epoch": float(finetune.epochs), FinetuneTask.score: score, SCORE: score})


class _ReportEarly:
    """Passes on all epochs but the last: that one is reported when the model is written.

    ASHA ends a trial as soon as it hears of the last epoch.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __call__(self, record: dict[str, Any]) -> None:
        if record["epoch"] < self.epochs:
            ray.tune.report(record)


class _ReportEarlyFromWorkers(ray.tune.integration.ray_train.TuneReportCallback):
    """The same for a worker group of Ray Train."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Hear what the workers have reported."""
        if metrics[0]["epoch"] < self.epochs:
            super().after_report(run_context, metrics, checkpoint)


def finish_best(settings: TuneSettings, options: FinetuneOptions, trial: str) -> dict[str, Any]:
    """Measure the winner on all parts, now also on the test cells, and write it to `best/`.

    Returns
    -------
    The content of its metrics.json.
    """
    quiet()
    source = Store(trial_settings(settings, options, trial).out)
    store = Store(settings.out) / "best"
    chosen = output.finished(source)
    if chosen is None:
        raise RuntimeError(f"{source.uri}: the best trial has no finished model")
    if (done := output.finished(store)) is not None:
        return done
    task = FinetuneTask(trial_settings(settings, options, trial), measured=(TRAIN, VALIDATION, TEST))
    weights = safetensors.torch.load(source.read_bytes(_WEIGHTS))
    world = single_process(trial_device(options.workers.device))
    with tempfile.TemporaryDirectory() as scratch:
        model = task.build_model().to(world.device)
        model.load_state_dict(weights)
        measured = task.final_metrics(model.eval(), world, {})
        metrics = {**chosen, **measured, "trial": trial}
        folder = Path(scratch) / "best"
        task.save(folder, weights, metrics)
        (folder / "metrics.jsonl").write_bytes(source.read_bytes("metrics.jsonl"))
        output.publish(store, folder, metrics)
    return metrics


def trial_device(wanted: str) -> torch.device:
    """The GPU that Ray gave to this process, if any and if wanted."""
    return torch.device("cuda", 0) if wanted != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def use_threads(processes: int) -> None:
    """Share this machine's cores among some processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // processes))
