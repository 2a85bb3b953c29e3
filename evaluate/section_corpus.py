"""Report section on a corpus: which cells and genes are in it, and which are not, and why."""

from collections import Counter
from typing import Any

import numpy as np

from corpus.reader import Corpus
from evaluate import plots
from evaluate.page import Block, Facts, Note, Picture, Pictures, Section, Table, Text, percent
from evaluate.report_inputs import read_json

RULES = {
    "obs_filter": "labels that the settings leave out",
    "not_primary_data": "copies of cells of another dataset",
    "no_counts": "no counts",
    "above_max_counts": "more counts than the highest total allowed",
    "below_min_genes": "too few genes detected",
    "above_mito_fraction": "too large a mitochondrial share",
    "counts_outside_sd": "total counts outside the bounds around the dataset's mean",
    "mito_counts_outside_sd": "mitochondrial counts outside the bounds around the dataset's mean",
    "doublet": "called a doublet",
    "duplicate_of_another_cell": "same counts as another cell",
    "no_vocabulary_genes": "no gene of the vocabulary",
}
"""What the rules of quality control mean; a rule that is not listed here is shown by its name alone."""
_MAX_LINES = 3


def corpus_section(uri: str, max_length: int | None) -> Section:
    """Describe a corpus.

    Parameters
    ----------
    max_length
        Genes that the model takes in, marked in the picture of lengths.

    Raises
    ------
    UserError
        If there is no corpus, or its report is broken.
    """
    corpus = Corpus(uri)
    report = _ingest_report(corpus)
    names = ["dataset_id", *corpus.manifest.obs_columns]
    obs = corpus.obs([*names, "n_counts", "n_genes", "mito_fraction", "length"])
    dropped: Counter[str] = Counter()
    for unit in corpus.manifest.units:
        dropped.update(unit.dropped)
    read = len(corpus) + dropped.total()
    facts = [
        ("corpus", uri),
        ("cells", len(corpus)),
        ("cells read from the sources", read),
        ("genes in the vocabulary", len(corpus.genes.tokens)),
        ("gene table", corpus.manifest.genes_hash),
        ("datasets", obs["dataset_id"].n_unique()),
        ("manifest", corpus.manifest.number),
        ("median UMIs per cell", float(obs["n_counts"].median() or 0)),  # type: ignore[arg-type]
        ("median genes per cell", float(obs["n_genes"].median() or 0)),  # type: ignore[arg-type]
    ]
    blocks: list[Block] = [Facts(facts), _dropped_table(read, len(corpus), dropped)]
    datasets: dict[str, Any] = report.get("datasets", {}) if report else {}
    if report is None:
        blocks.append(
            Note(
                "The manifest of this corpus names no ingest report: thresholds, gene mapping and the cells before "
                "quality control cannot be shown."
            )
        )
    else:
        blocks += _dataset_tables(datasets)
        blocks += [Note(f"Not in the corpus: {name}: {why}") for name, why in report.get("quarantined", {}).items()]
    blocks.append(Pictures(_pictures(obs, report, datasets, max_length)))
    if not (obs["mito_fraction"].to_numpy() > 0).any():
        blocks.append(
            Note(
                "No mitochondrial counts at all: the sources seem to have been stripped of mitochondrial genes, so the "
                "mitochondrial rule could not remove damaged cells."
            )
        )
    for column in ("cell_type", "donor_id"):
        blocks += _label_table(obs, column)
    remark = f"{dropped.total():,} of {read:,} dropped"
    tiles = [("cells", f"{len(corpus):,}", remark), ("genes", f"{len(corpus.genes.tokens):,}", "in the vocabulary")]
    return Section("corpus", "Corpus", blocks, tiles)


def _ingest_report(corpus: Corpus) -> dict[str, Any] | None:
    return read_json(corpus.store, corpus.manifest.report) if corpus.manifest.report else None


def _dropped_table(read: int, kept: int, dropped: Counter[str]) -> Table:
    rows = [
        [rule, RULES.get(rule, ""), number, percent(number / read)]
        for rule, number in sorted(dropped.items())
        if number
    ]
    rows.append(["kept", "", kept, percent(kept / read)])
    return Table(
        ["rule", "meaning", "cells", "share"],
        rows,
        "Cells dropped, each counted under the rule that dropped it, and kept.",
    )


def _dataset_tables(datasets: dict[str, Any]) -> list[Block]:
    cells, mapping = [], []
    blocks: list[Block] = []
    for name, dataset in datasets.items():
        bounds = dataset.get("qc_bounds", {})
        cells.append(
            [
                name,
                dataset.get("cells_read"),
                dataset.get("cells_kept"),
                dataset.get("layer"),
                *_pair(bounds, "counts"),
                *_pair(bounds, "mito_counts"),
            ]
        )
        found = dataset.get("mapping", {})
        mapping.append(
            [
                name,
                *(found.get(key) for key in ("features", "mapped", "unmapped", "ambiguous", "duplicates_summed")),
                percent(found.get("umi_share_mapped")),
            ]
        )
        examples = found.get("unmapped_examples", [])
        if examples:
            blocks.append(
                Text(f"Features of {name} without a gene, for example: {', '.join(map(str, examples[:12]))}.")
            )
    columns = ["dataset", "read", "kept", "layer", "counts from", "counts to", "mito counts from", "mito counts to"]
    return [
        Table(columns, cells, "Datasets and their quality-control bounds (UMIs per cell)."),
        Table(
            ["dataset", "features", "mapped", "unmapped", "ambiguous", "duplicates summed", "UMIs in mapped genes"],
            mapping,
            "From the sources' feature names to Ensembl genes.",
        ),
        *blocks,
    ]


def _pair(bounds: dict[str, Any], key: str) -> list[Any]:
    found = bounds.get(key, bounds.get(f"n_{key}"))
    return list(found) if isinstance(found, list) and len(found) == 2 else [None, None]


def _pictures(
    obs: Any, report: dict[str, Any] | None, datasets: dict[str, Any], max_length: int | None
) -> list[Picture]:
    """Histograms; from the ingest report, which knows the dropped cells too, where it has them."""
    lines = {key: _lines(datasets, key) for key in ("counts", "mito_counts")}
    mito = obs["mito_fraction"].to_numpy()
    pictures = []
    for name, label, log, thresholds in (
        ("n_counts", "UMIs per cell", True, lines["counts"]),
        ("n_genes", "genes per cell", True, {}),
        ("mito_fraction", "mitochondrial share of the UMIs", False, {}),
        ("mito_counts", "mitochondrial UMIs per cell", False, lines["mito_counts"]),
        ("length", "vocabulary genes per cell", False, {"model input": float(max_length)} if max_length else {}),
    ):
        stored = _stored(report, datasets, name)
        if name in ("mito_fraction", "mito_counts") and not (mito > 0).any():
            continue
        if stored is not None:
            edges, kept, before = stored
            drawing = plots.histogram(edges, kept, label, before=before, thresholds=thresholds, log=log)
        else:
            values = mito * obs["n_counts"].to_numpy() if name == "mito_counts" else obs[name].to_numpy()
            edges, kept = plots.binned(values.astype(np.float64), log)
            drawing = plots.histogram(edges, kept, label, thresholds=thresholds, log=log)
        pictures.append(Picture(drawing, f"Histogram: {label}"))
    return pictures


def _lines(datasets: dict[str, Any], key: str) -> dict[str, float]:
    """Thresholds to draw, unless there are too many datasets to tell them apart."""
    if len(datasets) > _MAX_LINES:
        return {}
    lines = {}
    for name, dataset in datasets.items():
        suffix = f" ({name})" if len(datasets) > 1 else ""
        low, high = _pair(dataset.get("qc_bounds", {}), key)
        if low is not None and low > 0:
            lines[f"lowest kept{suffix}"] = float(low)
        if high is not None and high > 0:
            lines[f"highest kept{suffix}"] = float(high)
    return lines


def _stored(
    report: dict[str, Any] | None, datasets: dict[str, Any], name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Edges, cells kept and cells read, summed over datasets; None unless every dataset has them."""
    edges = (report or {}).get("histogram_edges", {}).get(name)
    found = [dataset.get("histograms", {}) for dataset in datasets.values()]
    if not edges or not found or not all(name in one.get(when, {}) for one in found for when in ("before", "after")):
        return None
    kept, before = (np.sum([one[when][name] for one in found], axis=0) for when in ("after", "before"))
    if len(kept) != len(edges) - 1:
        return None
    return np.asarray(edges, dtype=np.float64), kept, before


def _label_table(obs: Any, column: str) -> list[Block]:
    if column not in obs.columns or obs[column].null_count() == len(obs):
        return [Note(f"The corpus has no {column} labels.")]
    counts = obs[column].value_counts().sort(["count", column], descending=[True, False])
    rows = [[name, count, percent(count / len(obs))] for name, count in counts.head(40).iter_rows()]
    more = f" The {40} largest of {len(counts)}." if len(counts) > 40 else ""
    return [Table([column, "cells", "share"], rows, f"Cells per {column}.{more}")]
