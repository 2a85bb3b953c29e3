"""The report page: every part, escaped, self-contained, and honest about what is missing."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest

from corpus.errors import UserError
from corpus.reader import Corpus
from corpus.store import Store
from evaluate import plots
from evaluate.commands import ReportCommand
from evaluate.metrics import classification_metrics
from evaluate.page import format_cell
from evaluate.report import build_sections, write_report
from evaluate.report_inputs import read_json_lines, series
from evaluate.section_embedding import likeness
from tests.factories import write_corpus

EVIL = "<script>alert('x')</script> $\\alpha_ & \"q\""


class Page(HTMLParser):
    """Collects what a browser would fetch or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.text = ""
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [value for name in ("src", "href", "data", "action") if (value := found.get(name))]
        self.scripts += tag == "script"
        self._hidden = tag in ("script", "style")
        if found.get("id"):
            self.ids.append(str(found["id"]))
        assert not [name for name in found if name.startswith("on")], "an inline handler"
        if tag == "img":
            assert found.get("alt")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += " " + data.strip()


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """One output of each command, with hostile labels in all of them."""
    corpus = write_corpus(
        tmp_path / "corpus", cell_types=("alpha", EVIL), donors=("d1", "d2"), report="reports/000001.json"
    )
    write_ingest_report(corpus)
    write_training(tmp_path / "model", {"heldout_loss": 3.5, "unigram_loss": 4.25, "heldout_accuracy": 0.1, "steps": 3})
    write_training(
        tmp_path / "classifier",
        {
            "label": "cell_type",
            "classes": 2,
            "test_accuracy": 0.5,
            "left_out": {f"fewer than 10 cells of {EVIL}": 4},
            "split": {
                "by": "donor",
                "cells": {"test": 4},
                "groups": {"test": [EVIL]},
                "notes": ["warning: two donors"],
            },
        },
    )
    write_classification(tmp_path / "classify")
    write_search(tmp_path / "tune")
    write_embedding(tmp_path / "e.h5ad")
    write_scan(tmp_path / "perturb", tmp_path / "stats")
    return {
        "corpus": str(corpus),
        "pretrain": str(tmp_path / "model"),
        "classifier": str(tmp_path / "classifier"),
        "classify": str(tmp_path / "classify"),
        "tune": str(tmp_path / "tune"),
        "embedding": str(tmp_path / "e.h5ad"),
        "perturb": str(tmp_path / "perturb"),
        "stats": str(tmp_path / "stats"),
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_ingest_report(corpus: Path) -> None:
    dataset = {
        "cells_read": 71,
        "cells_kept": 60,
        "layer": "X",
        "dropped": {"below_min_genes": 11},
        "qc_bounds": {"counts": [3.0, 4321.0], "mito_counts": [0.0, 9.0]},
        "mapping": {
            "features": 100,
            "mapped": 80,
            "unmapped": 19,
            "ambiguous": 1,
            "duplicates_summed": 2,
            "umi_share_mapped": 0.987,
            "unmapped_examples": [EVIL],
        },
    }
    write_json(corpus / "reports/000001.json", {"number": 1, "datasets": {"toy": dataset}, "quarantined": {"b": EVIL}})


def write_training(folder: Path, metrics: dict[str, Any]) -> None:
    card = {"max_length": 30, "special_tokens": "cls_eos", "preset": "tiny", "genes_hash": "abc", "pooling": "mean"}
    write_json(folder / "card.json", card)
    write_json(folder / "metrics.json", metrics)
    records = [{"step": step, "loss": 5.0 - step / 10} for step in range(1, 4)]
    records.append({"step": 3, "heldout_loss": 3.5, "unigram_loss": 4.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = {
        "command": "train x",
        "started": "2026-01-01",
        "git_commit": "f" * 40 + "-dirty",
        "python": "3.11.7",
        "versions": {"ray": "2.60.0", "torch": "2.13.0"},
        "settings": {"title": EVIL},
    }
    write_json(folder / "runs/1.json", run)


def write_classification(folder: Path) -> None:
    labels = ["alpha", EVIL, "lone"]
    truth, predicted, guess = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1])
    majority = {"class": EVIL, **classification_metrics(truth, np.ones(4, np.int64), labels)}
    metrics = {
        "model": classification_metrics(truth, predicted, labels),
        "baseline": classification_metrics(truth, guess, labels),
        "majority": majority,
        "difference": {"accuracy": -0.25, "accuracy_ci": [-0.75, -0.125]},
        "by_donor": [
            {"group": EVIL, "num_cells": 2, "accuracy": 0.5},
            {"group": None, "num_cells": 2, "accuracy": 1.0},
        ],
        "unknown_labels": {EVIL: 7},
        "notes": [EVIL],
    }
    write_json(folder / "metrics.json", metrics)


def write_search(folder: Path) -> None:
    folder.mkdir()
    trials = {
        "trial": ["a", "b"],
        "state": ["completed", "stopped"],
        "best_validation_macro_f1": [0.625, None],
        "optimizer.learning_rate": [1e-3, 1e-4],
        "error": [None, EVIL],
    }
    pl.DataFrame(trials).write_parquet(folder / "trials.parquet")
    best = {"validation_macro_f1": 0.625, "test_macro_f1": 0.375}
    summary = {"score": "best_validation_macro_f1", "trials": {"completed": 1, "stopped": 1}, "best_metrics": best}
    write_json(folder / "summary.json", summary)


def write_embedding(path: Path, umap: bool = True, embedding: np.ndarray | None = None) -> None:
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(["alpha", EVIL, None]), "donor_id": pd.Categorical(["d1", "d1", "d2"])},
        index=["c1", "c2", "c3"],
    )
    obsm = {"X_geneformer": (np.eye(3, 4) if embedding is None else embedding).astype(np.float32)}
    if umap:
        obsm["X_umap"] = np.arange(6, dtype=np.float32).reshape(3, 2)
    anndata.AnnData(obs=obs, obsm=obsm, uns={"geneformer": {"layer": "last", "model": EVIL}}).write_h5ad(path)


def write_scan(perturb: Path, stats: Path) -> None:
    manifest = {
        "perturbation": "delete",
        "num_cells": 12,
        "rows": 40,
        "states": ["alpha", EVIL],
        "state_cells": {"alpha": 12, EVIL: 9},
        "skipped": {"absent": 3},
        "scan_id": "s",
        "settings": {},
    }
    write_json(perturb / "manifest.json", manifest)
    stats.mkdir()
    genes = pl.DataFrame(
        {
            "state": ["beta"] * 4,
            "ensembl_id": [f"ENSMUSG{i}" for i in range(4)],
            "symbol": ["Arx", "Pdx1", EVIL, "Rare"],
            "n_cells": [12, 12, 11, 1],
            "n_donors": [2, 2, 2, 1],
            "mean": [0.01, 0.03, -0.02, 0.5],
            "ci_low": [0.0, 0.02, -0.03, None],
            "ci_high": [0.02, 0.04, -0.01, None],
            "p_value": [0.2, 0.001, 0.002, None],
            "fdr": [0.2, 0.003, 0.003, None],
            "excess": [0.01, 0.03, -0.02, None],
            "test": ["cells pooled (too few donors)"] * 3 + ["none: too few cells"],
        }
    )
    genes.write_parquet(stats / "genes.parquet")
    write_json(stats / "summary.json", {"goal": EVIL, "settings": {"fdr": 0.05}, "model_checksum": "m"})


def report(tmp_path: Path, **settings: Any) -> tuple[str, Page]:
    out = tmp_path / "out" / "report.html"
    ReportCommand(out=str(out), **settings).run()
    text = out.read_text()
    return text, Page(text)


def test_every_section_is_there_with_its_numbers(inputs: dict[str, str], tmp_path: Path) -> None:
    text, page = report(tmp_path, **inputs, named_genes=["arx", "Rare", "Nkx6-1"])
    keys = ["corpus", "pretraining", "classification", "tuning", "embedding", "perturbation", "caveats", "appendix"]
    assert page.ids == keys
    assert "Not run" not in page.text
    assert text.count("<img") == 3 + 1 + 3 + 1 + 2 + 2
    for expected in (
        "4,321",  # a quality-control bound
        "98.7 %",  # mapped UMIs
        "0.750 nats per masked gene below",  # 4.25 - 3.5
        "75.0 %",  # test accuracy
        "The baseline beats the network by 25.0 points (95 % from 12.5 to 75.0)",
        "0.375",  # tuned test macro F1
        "2.60.0",
        "ffffffffffff-dirty",
    ):
        assert expected in page.text, expected


def test_named_genes_are_ranked_whatever_the_answer(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = ReportCommand(out=str(tmp_path / "r.html"), **inputs, named_genes=["arx", "Rare", "Nkx6-1"])
    (section,) = [section for section in build_sections(settings) if section.key == "perturbation"]
    (table,) = [block for block in section.blocks if getattr(block, "caption", "").startswith("Named genes")]
    # gene, rank among tested, tested, rank among all, all
    assert [list(row[:5]) for row in table.rows] == [  # type: ignore[union-attr]
        ["Arx", 2, 3, 3, 4],
        ["Rare", None, 3, 1, 4],
        ["Nkx6-1", None, None, None, None],
    ]
    assert [tile[1] for tile in section.tiles] == ["3", "2", "1", "–"]


def test_maps_are_shown_as_they_were_drawn(inputs: dict[str, str], tmp_path: Path) -> None:
    drawing = plots.to_png(plots.accuracy_bars([("a", 0.5, None)], "accuracy"))
    (tmp_path / "map").mkdir()
    (tmp_path / "map/map.png").write_bytes(drawing)
    _, page = report(tmp_path, stats=inputs["stats"], maps=[str(tmp_path / "map")])
    (shown,) = [address for address in page.fetched if address.startswith("data:image/png;base64,")]
    assert base64.b64decode(shown.removeprefix("data:image/png;base64,")) == drawing
    with pytest.raises(UserError, match=r"nowhere/map\.png: no such file"):
        report(tmp_path, stats=inputs["stats"], maps=[str(tmp_path / "nowhere")])


def test_effects_below_the_noise_are_not_called(inputs: dict[str, str], tmp_path: Path) -> None:
    path = Path(inputs["stats"]) / "genes.parquet"
    genes = pl.read_parquet(path)
    below = pl.Series("below_noise", [False, False, True, True])
    genes.with_columns(below, ((genes["fdr"] < 0.05) & ~below).fill_null(False).alias("significant")).write_parquet(
        path
    )
    settings = ReportCommand(out=str(tmp_path / "r.html"), stats=inputs["stats"])
    (section,) = [section for section in build_sections(settings) if section.key == "perturbation"]
    facts = dict(section.blocks[1].rows)  # type: ignore[union-attr]
    assert facts["significant (FDR below 0.05, above rounding)"] == 1
    assert facts["tested genes whose effect is no larger than rounding"] == 1


def test_labels_are_escaped_everywhere(inputs: dict[str, str], tmp_path: Path) -> None:
    text, page = report(tmp_path, **inputs, title=EVIL, named_genes=[EVIL])
    assert page.scripts == 1  # ours alone
    assert "<script>alert" not in text
    assert page.text.count("<script>alert('x')</script>") >= 10  # shown as text, in each part


def test_the_page_needs_nothing_from_outside(inputs: dict[str, str], tmp_path: Path) -> None:
    text, page = report(tmp_path, **inputs)
    assert page.fetched
    for address in page.fetched:
        assert address.startswith(("data:image/svg+xml;base64,", "#"))
    assert not re.search(r"@import|url\(", text)


@pytest.mark.parametrize("given", ["corpus", "pretrain", "classify", "tune", "embedding", "stats"])
def test_what_was_not_run_is_said(inputs: dict[str, str], tmp_path: Path, given: str) -> None:
    _, page = report(tmp_path, **{given: inputs[given]})
    assert page.text.count("Not run:") == 7  # of eight
    assert len(page.ids) == 8


def test_a_corpus_without_an_ingest_report_says_so(tmp_path: Path) -> None:
    _, page = report(tmp_path, corpus=str(write_corpus(tmp_path / "corpus", donors=())))
    assert "names no ingest report" in page.text
    assert "no donor_id labels" in page.text
    assert "No mitochondrial counts at all" in page.text


def test_stored_histograms_show_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", report="reports/000001.json")
    bins = {"before": {"n_genes": [0, 7, 60]}, "after": {"n_genes": [0, 0, 60]}}
    dataset = {"cells_read": 67, "cells_kept": 60, "histograms": bins}
    write_json(
        corpus / "reports/000001.json",
        {"datasets": {"toy": dataset}, "histogram_edges": {"n_genes": [0.0, 1.0, 10.0, 100.0]}},
    )
    seen = {}
    original = plots.histogram

    def spy(edges: Any, kept: Any, label: str, **options: Any) -> Any:
        seen[label] = options.get("before")
        return original(edges, kept, label, **options)

    monkeypatch.setattr(plots, "histogram", spy)
    report(tmp_path, corpus=str(corpus))
    assert seen["genes per cell"].tolist() == [0, 7, 60]
    assert seen["UMIs per cell"] is None


def test_an_embedding_without_umap_says_so(tmp_path: Path) -> None:
    write_embedding(tmp_path / "e.h5ad", umap=False)
    _, page = report(tmp_path, embedding=str(tmp_path / "e.h5ad"))
    assert "No UMAP in this file" in page.text


def test_broken_inputs_are_named(inputs: dict[str, str], tmp_path: Path) -> None:
    def fails(match: str, **settings: str) -> None:
        with pytest.raises(UserError, match=match):
            write_report(ReportCommand(out=str(tmp_path / "r.html"), **settings))

    fails("nothing to report on")
    fails(r"nowhere/card\.json: no such file", pretrain=str(tmp_path / "nowhere"))
    fails("no such file", embedding=str(tmp_path / "none.h5ad"))
    (tmp_path / "text.h5ad").write_text("no HDF5")
    fails(r"text\.h5ad: not a file written by", embedding=str(tmp_path / "text.h5ad"))
    (Path(inputs["pretrain"]) / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    fails(r"metrics\.jsonl: line 2 is not JSON", pretrain=inputs["pretrain"])
    (Path(inputs["classify"]) / "metrics.json").write_text("[1]")
    fails(r"metrics\.json: expected a JSON object, found list", classify=inputs["classify"])
    (Path(inputs["stats"]) / "genes.parquet").write_bytes(b"PAR1 no")
    fails(r"genes\.parquet: not a Parquet table", stats=inputs["stats"])
    pl.DataFrame({"trial": [1]}).write_parquet(Path(inputs["tune"]) / "trials.parquet")
    fails(r"trials\.parquet: no column state", tune=inputs["tune"])
    with pytest.raises(UserError, match=r"must end in \.html"):
        write_report(ReportCommand(out=str(tmp_path / "r.pdf"), **inputs))
    assert not (tmp_path / "r.html").exists()


def test_an_unfinished_last_line_of_a_log_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    steps, losses = series(read_json_lines(Store(tmp_path), "metrics.jsonl"), "loss")
    assert (steps.tolist(), losses.tolist()) == ([1.0], [2.0])


def test_statistics_of_another_mode_are_shown_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()
    genes = pl.DataFrame({"ensembl_id": ["E1"], "symbol": ["Arx"], "impact": [True]})
    genes.write_parquet(tmp_path / "stats/genes.parquet")
    write_json(tmp_path / "stats/summary.json", {"settings": {"mode": "mixture_model"}})
    _, page = report(tmp_path, stats=str(tmp_path / "stats"))
    assert "mixture_model" in page.text
    assert "impact" in page.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234, "1,234"),
        (0.01234567, "0.0123"),
        (1.23e-7, "1.23e-07"),
        (True, "yes"),
        (12.3456, "12.35"),
        (123456.7, "123,457"),
        ([1, "a"], "1, a"),
        (0.0, "0"),
    ],
)
def test_numbers_are_readable(value: Any, expected: str) -> None:
    assert format_cell(value) == expected


def test_pictures_are_reproducible_and_survive_odd_data() -> None:
    nothing = np.array([])
    drawings = [
        lambda: plots.histogram(*plots.binned(np.array([5.0, 5.0]), log=True), "x", thresholds={"a": 0.0}, log=True),
        lambda: plots.histogram(*plots.binned(np.array([np.nan])), "x"),
        lambda: plots.loss_curves((nothing, nothing), (nothing, nothing), None, "nats"),
        lambda: plots.confusion_matrix(np.array([[0, 0], [1, 3]]), ["$a_b$", "x" * 60]),
        lambda: plots.embedding_scatter(np.array([[0.0, 1.0], [np.nan, 1.0]]), ["a", "b"], "t"),
        lambda: plots.volcano(np.array([0.1, -0.1]), np.array([0.0, np.nan]), ["A", "B"], effect_label="e"),
        lambda: plots.gene_bars(np.array([0.1]), np.array([np.nan]), np.array([np.nan]), ["A"], effect_label="e"),
        lambda: plots.trials_scatter(
            np.array([1e-3]), np.array([np.nan]), np.array([True]), setting_label="s", score_label="y", log=True
        ),
    ]
    for draw in drawings:
        first = plots.to_svg(draw())
        assert first.startswith(b"<?xml")
        assert first == plots.to_svg(draw())


def test_the_volcano_puts_genes_where_they_belong() -> None:
    effect, fdr = np.array([0.2, -0.1, 0.3]), np.array([0.001, 0.01, 0.5])
    axes = plots.volcano(effect, fdr, ["Up", "Down", "Not"], effect_label="e", highlight=["Not"]).axes[0]
    grey, up, down, ring = (points.get_offsets() for points in axes.collections)
    np.testing.assert_allclose(up, [[0.2, 3]])
    np.testing.assert_allclose(down, [[-0.1, 2]])
    np.testing.assert_allclose(grey, [[0.3, -np.log10(0.5)]])
    np.testing.assert_allclose(ring, grey)
    assert {text.get_text() for text in axes.texts} >= {"Up", "Down", "Not"}


def test_the_confusion_picture_shows_shares_of_the_true_class() -> None:
    axes = plots.confusion_matrix(np.array([[3, 1], [0, 2]]), ["a", "b"]).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (4)", "b (2)"]


def test_the_corpus_section_counts_every_cell(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus")
    settings = ReportCommand(out=str(tmp_path / "r.html"), corpus=str(folder))
    section = build_sections(settings)[0]
    assert section.tiles[0] == ("cells", f"{len(Corpus(folder)):,}", "0 of 60 dropped")


def test_a_model_that_has_learned_nothing_is_called_so(inputs: dict[str, str], tmp_path: Path) -> None:
    """One class for all cells, one embedding for all cells, shifts below single precision."""
    metrics_file = Path(inputs["classify"]) / "metrics.json"
    metrics = json.loads(metrics_file.read_text())
    metrics["model"] = classification_metrics(np.array([0, 0, 1]), np.zeros(3, np.int64), ["alpha", "beta"])
    metrics_file.write_text(json.dumps(metrics))
    write_embedding(tmp_path / "e.h5ad", embedding=np.ones((3, 4)) + 1e-6 * np.eye(3, 4))
    genes_file = Path(inputs["stats"]) / "genes.parquet"
    pl.read_parquet(genes_file).with_columns(pl.col("mean") * 1e-9).write_parquet(genes_file)
    _, page = report(tmp_path, **inputs)
    assert "calls every test cell alpha" in page.text
    assert "All cells have nearly the same embedding" in page.text
    assert "No gene shifts the cells by more than 3.0e-11" in page.text


def test_a_model_that_has_learned_something_is_not(inputs: dict[str, str], tmp_path: Path) -> None:
    _, page = report(tmp_path, **inputs)
    for phrase in ("calls every test cell", "nearly the same embedding", "No gene shifts the cells"):
        assert phrase not in page.text


def test_likeness_is_the_mean_over_pairs() -> None:
    embedding = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(7, 1)]
    assert likeness(embedding) == pytest.approx(cosines.mean(), abs=1e-6)
