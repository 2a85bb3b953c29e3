"""A search from the driver's side: trials, their table, the best settings and the best model."""

import functools
import io
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import ray
import ray.tune
import ray.tune.schedulers
import ray.tune.search.basic_variant

from corpus.errors import RunError, UserError
from corpus.provenance import record_run
from corpus.store import Store
from train import output
from train.finetune import FinetuneTask
from train.launch import cluster
from train.settings import FinetuneOptions, WorkerSettings
from tune.settings import TuneSettings
from tune.space import apply_point, param_space, rounded, to_toml
from tune.trial import SCORE, finish_best, run_trial, trial_settings

SUMMARY = "summary.json"
_NAME = "search"


def tune(settings: TuneSettings) -> dict[str, Any]:
    """Search, or say that it has been done.

    Returns
    -------
    The content of summary.json.
    """
    task = FinetuneTask(trial_settings(settings, settings.finetune, "check"))
    num_layers = int(task.pretrained.config.num_hidden_layers)
    if max(settings.space.freeze_layers) > num_layers:
        raise UserError(
            f"space.freeze_layers: {max(settings.space.freeze_layers)}, but the model has {num_layers} layers"
        )
    store = Store(settings.out)
    identity = {**task.identity(), "command": "tune run", "settings": settings.identity()}
    output.claim(store, identity, done=SUMMARY, traces="trials")
    if store.exists(SUMMARY):
        print(f"{store.uri}: already finished with these settings; nothing to do", flush=True)
        return dict(json.loads(store.read_bytes(SUMMARY)))
    for note in task.notes:
        print(note, flush=True)
    record_run(
        store, "tune run", settings, {"corpus": task.corpus.manifest.genes_hash, "model": task.pretrained.checksum}
    )
    began = time.monotonic()
    workers = settings.finetune.workers
    everyone = workers.model_copy(update={"count": settings.concurrent * workers.count})
    with cluster(everyone):
        rows = _search(settings)
        _check_some_finished(rows, store)
        best = next(row for row in rows if row["state"] == "completed")
        options = apply_point(settings.finetune, best["point"])
        metrics = ray.get(_remote(finish_best, workers).remote(settings, options, best["trial"]))
    summary = {
        "score": SCORE,
        "trials": dict(Counter(row["state"] for row in rows)),
        "best_trial": best["trial"],
        "best_point": best["point"],
        "best_metrics": metrics,
        "seconds": round(time.monotonic() - began, 1),
    }
    _write(store, rows, options, summary)
    return summary


def _search(settings: TuneSettings) -> list[dict[str, Any]]:
    """Run the trials that are not done yet; one row for each trial, the best first and of equals the earliest."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Our own files hold what these loggers would write, and each costs an import.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    storage = f"{settings.out}/ray" if "://" in settings.out else str(Path(settings.out).absolute() / "ray")
    trainable = ray.tune.with_resources(
        functools.partial(run_trial, settings=settings), _resources(settings.finetune.workers)
    )
    if ray.tune.Tuner.can_restore(f"{storage}/{_NAME}"):
        print(f"going on with the search in {storage}/{_NAME}", flush=True)
        # The state of a search is pickled by Ray: it lies in the user's own output folder, and nowhere else.
        tuner = ray.tune.Tuner.restore(
            f"{storage}/{_NAME}", trainable=trainable, resume_unfinished=True, resume_errored=True
        )
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=param_space(settings.space),
            tune_config=ray.tune.TuneConfig(
                num_samples=settings.trials,
                max_concurrent_trials=settings.concurrent,
                trial_dirname_creator=_trial_folder,
                search_alg=ray.tune.search.basic_variant.BasicVariantGenerator(random_state=settings.seed),
                scheduler=ray.tune.schedulers.ASHAScheduler(
                    time_attr="epoch",
                    metric=FinetuneTask.score,
                    mode="max",
                    max_t=settings.finetune.epochs,
                    grace_period=min(settings.grace_epochs, settings.finetune.epochs),
                    reduction_factor=settings.reduction,
                ),
            ),
            run_config=ray.tune.RunConfig(
                name=_NAME,
                storage_path=storage,
                verbose=0,
                callbacks=[_Lines()],
                failure_config=ray.tune.FailureConfig(max_failures=settings.finetune.workers.max_failures),
            ),
        )
    results = tuner.fit()
    rows = [_row(settings, results[i]) for i in range(len(results))]
    return sorted(rows, key=lambda row: (row[SCORE] is None, -(row[SCORE] or 0), row["trial"]))


def _trial_folder(trial: Any) -> str:
    return str(trial.trial_id)


def _row(settings: TuneSettings, result: Any) -> dict[str, Any]:
    found = result.metrics or {}
    trial = Path(result.path).name
    done = output.finished(Store(f"{settings.out}/trials/{trial}")) is not None
    return {
        "trial": trial,
        "state": "failed" if result.error else "completed" if done else "stopped",
        "epochs": found.get("epoch"),
        "point": rounded(result.config),
        SCORE: found.get(SCORE),
        "seconds": found.get("time_total_s"),
        "error": str(result.error).strip().splitlines()[-1] if result.error else None,
    }


def _check_some_finished(rows: list[dict[str, Any]], store: Store) -> None:
    if not any(row["state"] == "completed" for row in rows):
        errors = [row["error"] for row in rows if row["error"]]
        raise RunError(f"{store.uri}: no trial finished" + (f"; the first error: {errors[0]}" if errors else ""))


def _write(store: Store, rows: list[dict[str, Any]], options: FinetuneOptions, summary: dict[str, Any]) -> None:
    """Write the results; summary.json last, for it marks a finished search."""
    flat = [{**{k: v for k, v in row.items() if k != "point"}, **row["point"]} for row in rows]
    table = pl.DataFrame(flat)
    parquet = io.BytesIO()
    table.write_parquet(parquet)
    files = {
        "trials.parquet": parquet.getvalue(),
        "trials.csv": table.write_csv().encode(),
        "best.toml": to_toml(options.model_dump(mode="json")).encode(),
        SUMMARY: json.dumps(summary, indent=1, sort_keys=True).encode() + b"\n",
    }
    for name in reversed(files):
        if store.exists(name):
            store.remove(name)
    for name, data in files.items():
        store.create(name, data)


def _resources(workers: WorkerSettings) -> Any:
    """What a trial reserves: its worker, or next to nothing where Ray Train reserves the workers."""
    if workers.count > 1:
        return {"CPU": 0.01}
    gpus = ray.cluster_resources().get("GPU", 0)
    return {"CPU": workers.cpus, "GPU": int(workers.device != "cpu" and gpus >= 1)}


def _remote(function: Any, workers: WorkerSettings) -> Any:
    reserved = _resources(workers.model_copy(update={"count": 1}))
    return ray.remote(num_cpus=reserved["CPU"], num_gpus=reserved["GPU"])(function)


class _Lines(ray.tune.Callback):
    """Tells the user what each trial reports."""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print one line."""
        point = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in rounded(trial.config).items())
        print(
            f"trial {trial.trial_id} | epoch {result['epoch']:g} | validation macro F1 "
            f"{result['validation_macro_f1']:.4f} (best {result[SCORE]:.4f}) | {point}",
            flush=True,
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print one line."""
        print(f"trial {trial.trial_id} ended", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print one line."""
        print(f"trial {trial.trial_id} failed; see {trial.local_path}", flush=True)
