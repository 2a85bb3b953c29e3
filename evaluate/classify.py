"""`evaluate classify`: predictions for every cell, and the figures of the test cells beside a baseline."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from corpus.errors import UserError
from corpus.provenance import record_run
from corpus.reader import Corpus
from corpus.store import Store
from evaluate import plots
from evaluate.baseline import majority_class, run_baseline
from evaluate.commands import ClassifyCommand
from evaluate.encode import EncodeJob, open_inputs, row_group_tasks
from evaluate.metrics import accuracy_by_group, accuracy_difference, classification_metrics
from evaluate.perturb_settings import ReadoutSettings
from evaluate.pipeline import encode_groups
from train import output
from train.finetune import SPLIT
from train.model_folder import LoadedModel
from train.split import TEST, TRAIN, VALIDATION
from train.tasks import corpus_identity

PREDICTIONS, CONFUSION = "predictions.parquet", "confusion.png"
PROBABILITY = "probability_"
"""Prefix of the column of each class."""


@dataclass(frozen=True)
class Truth:
    """What is known of the cells besides their counts.

    Parameters
    ----------
    column
        Label column; None if the corpus does not have it.
    classes
        int64[cells]: class number; -1 for no label, -2 for a label that the classifier does not know.
    labels
        As in the corpus; None entries where unknown.
    unknown
        Labels that the classifier does not know, and their cells.
    parts
        Part of the fine-tuning split of each cell; None where it had none.
    """

    column: str | None
    classes: np.ndarray
    labels: pl.Series
    unknown: dict[str, int]
    parts: pl.Series

    def cells(self, part: str) -> np.ndarray:
        """Cells of a part with a label that the classifier knows; int64, ascending."""
        return np.flatnonzero((self.parts == part).fill_null(False).to_numpy() & (self.classes >= 0))


def classify(settings: ClassifyCommand) -> str:
    """Predict all cells, score the test cells, write predictions.parquet, confusion.png and (last) metrics.json.

    Returns
    -------
    The figures that matter, as text.

    Raises
    ------
    UserError
        If the model is no classifier, does not fit the corpus, or `out` holds results of another run.
    """
    corpus, loaded = open_inputs(settings.corpus, settings.model)
    if loaded.card.label_map is None:
        raise UserError(
            f"{settings.model}: a {loaded.card.kind} has no classes; give a folder made by `train finetune`"
        )
    names = list(loaded.card.label_map)
    truth = read_truth(settings, corpus, loaded)
    store = Store(settings.out)
    identity = {
        "command": "evaluate classify",
        "settings": settings.model_dump(mode="json", exclude={"corpus", "model", "out", "workers"}),
        "corpus": corpus_identity(corpus),
        "model": loaded.checksum,
    }
    done = output.claim(store, identity)
    if done is not None:
        return f"{store.uri}: already finished with these settings; nothing to do\n{_summary(done)}"
    probabilities = class_probabilities(settings, corpus, loaded)
    metrics = score(settings, corpus, truth, probabilities, names)
    metrics |= {"model_checksum": loaded.checksum, "genes_hash": loaded.card.genes_hash}
    scratch = Path(tempfile.mkdtemp(dir=store.local_path(), prefix=".part-"))
    predictions = predictions_table(corpus.obs(["cell_id"])["cell_id"], truth, probabilities, names)
    pq.write_table(predictions.to_arrow(), scratch / PREDICTIONS, compression="zstd")
    if metrics["model"] is not None:
        counts = np.asarray(metrics["model"]["confusion"]["counts"])
        (scratch / CONFUSION).write_bytes(plots.to_png(plots.confusion_matrix(counts, names)))
    record_run(store, "evaluate classify", settings, {"genes": loaded.card.genes_hash, "model": loaded.checksum})
    output.publish(store, scratch, metrics)
    return _summary(metrics)


def read_truth(settings: ClassifyCommand, corpus: Corpus, loaded: LoadedModel) -> Truth:
    """Collect labels and split.

    Raises
    ------
    UserError
        If a label column was asked for that the corpus does not have.
    """
    trained_on = loaded.card.training.get("label")
    column = settings.label or (trained_on if trained_on in corpus.manifest.obs_columns else None)
    ids = corpus.obs(["cell_id"])
    if column is None:
        labels = pl.Series("label", [None] * len(corpus), dtype=pl.String)
    else:
        labels = corpus.obs([str(column)]).to_series().cast(pl.String).rename("label")
    label_map = loaded.card.label_map or {}
    numbers = labels.replace_strict(label_map, default=-2, return_dtype=pl.Int64)
    classes = np.where(labels.is_null().to_numpy(), -1, numbers.to_numpy())
    unknown = labels.filter(pl.Series(classes == -2)).value_counts().sort("count", "label", descending=[True, False])
    parts = pl.Series("split", [None] * len(corpus), dtype=pl.String)
    folder = Store(settings.model)
    if folder.exists(SPLIT):
        with folder.open(SPLIT) as stream:
            split = pl.DataFrame(pq.read_table(stream, columns=["cell_id", "split"]))
        parts = ids.join(split, on="cell_id", how="left", validate="1:1", maintain_order="left")["split"]
    return Truth(None if column is None else str(column), classes, labels, dict(unknown.iter_rows()), parts)


def class_probabilities(settings: ClassifyCommand, corpus: Corpus, loaded: LoadedModel) -> np.ndarray:
    """Softmax of the logits of every cell; float32[cells, classes], in corpus order."""
    job = EncodeJob(
        settings.corpus,
        corpus.manifest.number,
        settings.model,
        "logits",
        ReadoutSettings(precision=settings.precision),
        settings.workers.token_budget,
    )
    out = np.full((len(corpus), len(loaded.card.label_map or {})), np.nan, dtype=np.float32)
    for group, logits in encode_groups(job, row_group_tasks(corpus, None), settings.workers, corpus, loaded):
        first, last = corpus.row_group_offsets[group : group + 2]
        if len(logits) != last - first:
            raise RuntimeError(f"row group {group}: {len(logits)} predictions for {last - first} cells")
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[first:last] = weights / weights.sum(axis=1, keepdims=True)
    if np.isnan(out).any():
        raise RuntimeError("a cell has no prediction")
    return out


def predictions_table(ids: pl.Series, truth: Truth, probabilities: np.ndarray, names: list[str]) -> pl.DataFrame:
    """One row a cell, in corpus order: `cell_id, split, label, predicted, probability`, and a probability per class.

    Of equally probable classes the first in the label map is predicted.
    """
    best = probabilities.argmax(axis=1)
    return pl.DataFrame(
        {
            "cell_id": ids,
            "split": truth.parts,
            "label": truth.labels,
            "predicted": np.asarray(names, dtype=object)[best].astype(str),
            "probability": probabilities[np.arange(len(best)), best],
            **{PROBABILITY + name: probabilities[:, i] for i, name in enumerate(names)},
        }
    )


def score(
    settings: ClassifyCommand, corpus: Corpus, truth: Truth, probabilities: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """Figures of the model, of the baseline and of the majority class on the test cells, for metrics.json."""
    notes: list[str] = []
    train, test = truth.cells(TRAIN), truth.cells(TEST)
    known = np.flatnonzero(truth.classes >= 0)
    in_split = int(truth.parts.is_not_null().sum())
    if not in_split:
        test = known
        if len(known):
            notes.append(
                "no cell of this corpus was in the classifier's split: all cells with a known label are tested"
            )
    elif not len(test) and len(known):
        notes.append("the classifier's split has no test cells in this corpus: nothing is scored")
    if truth.column is None:
        notes.append("the corpus does not have the classifier's label column: predictions only")
    if truth.unknown:
        number = sum(truth.unknown.values())
        notes.append(f"{number:,} cells have labels that the classifier does not know; they are not scored")
    untrained = [name for i, name in enumerate(names) if len(train) and not (truth.classes[train] == i).any()]
    if untrained:
        notes.append(f"no training cells of {', '.join(untrained)}: these classes cannot be predicted well")
    metrics: dict[str, Any] = {
        "label": truth.column,
        "labels": names,
        "model": None,
        "baseline": None,
        "majority": None,
        "difference": None,
        "by_donor": [],
        "cells": {
            "corpus": len(corpus),
            "train": len(train),
            "validation": len(truth.cells(VALIDATION)),
            "test": len(test),
            "labelled": len(known),
            "unlabelled": int((truth.classes == -1).sum()),
            "unknown_label": int((truth.classes == -2).sum()),
        },
        "unknown_labels": truth.unknown,
        "notes": notes,
    }
    if not len(test):
        return metrics
    options = {"draws": settings.bootstrap, "seed": settings.seed}
    answer = truth.classes[test]
    predicted = probabilities.argmax(axis=1)[test]
    metrics["model"] = classification_metrics(answer, predicted, names, **options)
    if "donor_id" in corpus.manifest.obs_columns:
        donors = corpus.obs(["dataset_id", "donor_id"])[test]
        names_of = donors.select(pl.concat_str(["dataset_id", "donor_id"], separator=" / "))
        metrics["by_donor"] = accuracy_by_group(answer, predicted, names_of.to_series().to_list())
    if not len(train):
        notes.append("no baseline: the classifier's training cells are not in this corpus")
        return metrics
    majority = np.full(len(test), majority_class(truth.classes[train]))
    metrics["majority"] = {
        "class": names[int(majority[0])],
        **classification_metrics(answer, majority, names, **options),
    }
    if not settings.baseline.enabled:
        notes.append("no baseline: switched off")
    elif len(np.unique(truth.classes[train])) < 2 or len(train) < 3:
        notes.append("no baseline: it needs training cells of two classes")
    else:
        guesses, facts = run_baseline(
            corpus,
            train,
            truth.classes[train],
            test,
            num_components=settings.baseline.components,
            max_train_cells=settings.baseline.max_train_cells,
            seed=settings.seed,
        )
        metrics["baseline"] = {**facts, **classification_metrics(answer, guesses, names, **options)}
        metrics["difference"] = accuracy_difference(answer, predicted, guesses, **options)
    return metrics


def _summary(metrics: dict[str, Any]) -> str:
    cells = metrics["cells"]
    lines = [f"{cells['corpus']:,} cells classified, {cells['test']:,} of them test cells"]
    for name, title in (("model", "model"), ("baseline", "PCA + logistic"), ("majority", "majority class")):
        block = metrics[name]
        if block is not None:
            low, high = block["accuracy_ci"]
            lines.append(
                f"{title:<15} accuracy {block['accuracy']:.4f} (95 % {low:.4f} to {high:.4f}), "
                f"balanced {block['balanced_accuracy']:.4f}, macro F1 {block['macro_f1']:.4f}"
            )
    return "\n".join([*lines, *(f"note: {note}" for note in metrics["notes"])])


def read_metrics(uri: str) -> dict[str, Any]:
    """Read metrics.json of a finished classification.

    Raises
    ------
    UserError
        If there is none.
    """
    store = Store(uri)
    try:
        found: dict[str, Any] = json.loads(store.read_bytes(output.METRICS))
    except ValueError as error:
        raise UserError(f"{store.uri}/{output.METRICS}: not JSON: {error}") from error
    return found
