"""Report sections on pretraining, fine-tuning with classification, and tuning."""

from typing import Any

import numpy as np
import polars as pl

from corpus.store import Store
from evaluate import plots
from evaluate.page import Block, Facts, Note, Picture, Pictures, Section, Table, Text, format_cell, percent
from evaluate.report_inputs import read_json, read_json_lines, read_table, series

_COUNTED = (
    "steps",
    "epochs",
    "train_cells",
    "parameters",
    "workers",
    "zero_stage",
    "precision",
    "device",
    "train_seconds",
)


def pretrain_section(uri: str) -> Section:
    """Loss curves and final figures of a pretrained model."""
    store = Store(uri)
    metrics, card = read_json(store, "metrics.json"), read_json(store, "card.json")
    records = read_json_lines(store, "metrics.jsonl")
    train, heldout = series(records, "loss"), series(records, "heldout_loss")
    unigram = _last(records, "unigram_loss")
    drawing = plots.loss_curves(train, heldout, unigram, "nats per masked gene")
    facts = [
        ("model", uri),
        *_facts(metrics),
        ("preset", card.get("preset")),
        ("longest input (tokens)", card.get("max_length")),
        ("special tokens", card.get("special_tokens")),
        ("gene table", card.get("genes_hash")),
        ("held-out loss", metrics.get("heldout_loss")),
        ("held-out accuracy", percent(metrics.get("heldout_accuracy"))),
        ("held-out loss of gene frequencies alone", metrics.get("unigram_loss")),
    ]
    blocks: list[Block] = [Facts(facts)]
    tiles: list[tuple[str, str, str]] = []
    loss = metrics.get("heldout_loss")
    if loss is not None and unigram is not None:
        gain = unigram - loss
        verdict = (
            f"On held-out cells the model's loss is {abs(gain):.3f} nats per masked gene "
            f"{'below' if gain > 0 else 'above'} that of gene frequencies alone"
        )
        more = "." if gain > 0 else ": it has learned nothing beyond how often genes occur."
        blocks.append(Text(verdict + more) if gain > 0 else Note(verdict + more))
        tiles.append(("held-out loss", f"{loss:.3f}", f"gene frequencies alone: {unigram:.3f}"))
    blocks.append(Pictures([Picture(drawing, "Training and held-out loss by step")]))
    blocks += _split_notes(metrics)
    return Section("pretraining", "Pretraining", blocks, tiles)


def classification_section(classifier: str | None, classify: str | None) -> Section:
    """Fine-tuned classifier: its training, its test figures, and what a simple baseline reaches on the same cells."""
    blocks: list[Block] = []
    tiles: list[tuple[str, str, str]] = []
    if classifier is None:
        blocks.append(Note("Not run: `train finetune` was not part of this report."))
    else:
        blocks += _finetune_blocks(Store(classifier))
    if classify is None:
        blocks.append(
            Note("Not run: `evaluate classify` was not part of this report; there is no baseline to compare with.")
        )
    else:
        metrics = read_json(Store(classify), "metrics.json")
        blocks += _score_blocks(metrics)
        model, baseline = metrics.get("model"), metrics.get("baseline")
        if model is not None:
            against = f"baseline: {percent(baseline['accuracy'])}" if baseline else "no baseline"
            tiles.append(("test accuracy", percent(model["accuracy"]), against))
    return Section("classification", "Fine-tuning and classification", blocks, tiles)


def _finetune_blocks(store: Store) -> list[Block]:
    metrics, card = read_json(store, "metrics.json"), read_json(store, "card.json")
    records = read_json_lines(store, "metrics.jsonl") if store.exists("metrics.jsonl") else []
    facts = [
        ("classifier", store.uri),
        *_facts(metrics),
        ("label", metrics.get("label")),
        ("classes", metrics.get("classes")),
        ("pooling", card.get("pooling")),
    ]
    rows = [
        [
            part,
            metrics.get("split", {}).get("cells", {}).get(part),
            metrics.get(f"{part}_accuracy"),
            metrics.get(f"{part}_macro_f1"),
        ]
        for part in ("train", "validation", "test")
    ]
    blocks: list[Block] = [
        Facts(facts),
        Table(["part", "cells", "accuracy", "macro F1"], rows, "As measured by `train finetune`."),
    ]
    train, heldout = series(records, "loss"), series(records, "heldout_loss")
    if len(train[0]):
        drawing = plots.loss_curves(train, heldout, None, "nats per cell")
        blocks.append(Pictures([Picture(drawing, "Fine-tuning loss by step")]))
    left_out = metrics.get("left_out") or {}
    if left_out:
        blocks.append(
            Table(
                ["reason", "cells"],
                [[why, number] for why, number in left_out.items()],
                "Cells left out of fine-tuning.",
            )
        )
    return blocks + _split_notes(metrics)


def _score_blocks(metrics: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = [Note(f"Note: {note}.") for note in metrics.get("notes", [])]
    model = metrics.get("model")
    if model is None:
        return [*blocks, Note("No cell could be scored, so there are no test figures.")]
    methods = [("fine-tuned network", model)]
    if metrics.get("baseline") is not None:
        methods.append(("PCA + logistic regression", metrics["baseline"]))
    if metrics.get("majority") is not None:
        methods.append((f"always {metrics['majority']['class']}", metrics["majority"]))
    rows = [
        [
            name,
            block["accuracy"],
            *block["accuracy_ci"],
            block["balanced_accuracy"],
            block["macro_f1"],
            block["num_cells"],
        ]
        for name, block in methods
    ]
    columns = ["method", "accuracy", "95 % from", "to", "balanced accuracy", "macro F1", "test cells"]
    blocks.append(
        Table(
            columns, rows, "On the test cells. All methods are trained on the same cells and tested on the same others."
        )
    )
    called = [row["label"] for row in model["per_class"] if row["predicted"]]
    if len(called) == 1:
        blocks.append(
            Note(f"The network calls every test cell {called[0]}: it has not learned to tell the classes apart.")
        )
    blocks += _verdict(metrics)
    bars = [(plots.shorten(name), block["accuracy"], tuple(block["accuracy_ci"])) for name, block in methods]
    blocks.append(
        Pictures([Picture(plots.accuracy_bars(bars, "accuracy on the test cells"), "Accuracy of each method")])
    )
    confusion = plots.confusion_matrix(np.asarray(model["confusion"]["counts"]), model["confusion"]["labels"])
    caption = "Of the cells of each true type (row), the percentage that was given each label; below 0.5 % not written."
    blocks.append(Pictures([Picture(confusion, "Confusion matrix of the test cells", caption)]))
    baseline = {row["label"]: row for row in (metrics.get("baseline") or {}).get("per_class", [])}
    per_class = [
        [
            row["label"],
            row["support"],
            row["precision"],
            row["recall"],
            row["f1"],
            baseline.get(row["label"], {}).get("f1"),
        ]
        for row in model["per_class"]
    ]
    blocks.append(
        Table(["class", "test cells", "precision", "recall", "F1", "F1 of the baseline"], per_class, "Per class.")
    )
    if len(metrics.get("by_donor", [])) > 1:
        donors = [[row["group"], row["num_cells"], row["accuracy"]] for row in metrics["by_donor"]]
        blocks.append(Table(["donor", "test cells", "accuracy"], donors, "Per donor."))
    unknown = metrics.get("unknown_labels") or {}
    if unknown:
        blocks.append(
            Table(["label", "cells"], [[k, v] for k, v in unknown.items()], "Labels that the classifier does not know.")
        )
    return blocks


def _verdict(metrics: dict[str, Any]) -> list[Block]:
    difference = metrics.get("difference")
    if difference is None:
        return []
    low, high = difference["accuracy_ci"]
    size = 100 * difference["accuracy"]
    if low > 0:
        return [Text(f"The network beats the baseline by {_points(size, 100 * low, 100 * high)} of accuracy.")]
    if high < 0:
        return [Note(f"The baseline beats the network by {_points(-size, -100 * high, -100 * low)} of accuracy.")]
    return [
        Text(
            "The network and the baseline cannot be told apart: network minus baseline is "
            f"{_points(size, 100 * low, 100 * high)} of accuracy."
        )
    ]


def _points(size: float, low: float, high: float) -> str:
    return f"{size:.1f} points (95 % from {low:.1f} to {high:.1f})".replace("-", "−")


def tune_section(uri: str, max_rows: int = 50) -> Section:
    """Trials of a hyperparameter search, and the settings that won."""
    store = Store(uri)
    trials = read_table(store, "trials.parquet", ["trial", "state"])
    summary = read_json(store, "summary.json")
    score = str(summary.get("score", ""))
    if score not in trials.columns:  # the table holds the best value that a trial reached
        score = f"best_{score}" if f"best_{score}" in trials.columns else ""
    facts = [
        ("search", uri),
        ("trials", ", ".join(f"{count} {state}" for state, count in summary.get("trials", {}).items())),
        ("chosen by", score),
        ("best trial", summary.get("best_trial")),
        *((str(key), value) for key, value in summary.get("best_point", {}).items()),
        ("seconds", summary.get("seconds")),
    ]
    blocks: list[Block] = [Facts(facts)]
    best = summary.get("best_metrics", {})
    rows = [
        [part, best.get(f"{part}_accuracy"), best.get(f"{part}_macro_f1")] for part in ("train", "validation", "test")
    ]
    blocks.append(
        Table(
            ["part", "accuracy", "macro F1"],
            rows,
            "The best trial's model. Only it saw the test cells, once, after it was chosen.",
        )
    )
    setting = next((name for name in trials.columns if name.endswith("learning_rate")), None)
    if setting and score:
        drawing = plots.trials_scatter(
            trials[setting].cast(pl.Float64).to_numpy(),
            trials[score].cast(pl.Float64).fill_null(np.nan).to_numpy(),
            (trials["state"] != "completed").to_numpy(),
            setting_label="learning rate",
            score_label=score.replace("_", " "),
            log=True,
        )
        blocks.append(Pictures([Picture(drawing, "Score of each trial by its learning rate")]))
    shown = [name for name in trials.columns if trials[name].null_count() < len(trials)]
    rows = [list(row) for row in trials.select(shown).head(max_rows).iter_rows()]
    blocks.append(
        Table(
            [name.removeprefix("optimizer.") for name in shown],
            rows,
            f"Trials ({min(max_rows, len(trials))} of {len(trials)}).",
        )
    )
    tiles = []
    if best.get("test_macro_f1") is not None:
        tiles.append(("tuned, test macro F1", f"{best['test_macro_f1']:.3f}", f"{len(trials)} trials"))
    return Section("tuning", "Tuning", blocks, tiles)


def _facts(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name.replace("_", " "), metrics[name]) for name in _COUNTED if name in metrics]


def _split_notes(metrics: dict[str, Any]) -> list[Block]:
    split = metrics.get("split") or {}
    blocks: list[Block] = []
    if split.get("by"):
        groups = "; ".join(f"{part}: {format_cell(names)}" for part, names in (split.get("groups") or {}).items())
        blocks.append(Text(f"Split by {split['by']}. {groups}".strip()))
    return blocks + [
        (Note if note.startswith("warning") else Text)(note[:1].upper() + note[1:] + ".")
        for note in split.get("notes", [])
    ]


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    values = series(records, name)[1]
    return float(values[-1]) if len(values) else None
