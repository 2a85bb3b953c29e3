"""From a scan's folder to a folder with the table of genes, a summary and pictures."""

import io
import json
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from corpus.errors import UserError
from corpus.provenance import record_run
from corpus.store import Store
from evaluate import plots
from evaluate.perturb_settings import StatsSettings
from evaluate.shifts import MANIFEST, NOISE, PROBABILITY, SHIFT, ScanManifest, read_shifts
from evaluate.stats import KEYS, gene_statistics
from evaluate.stats_modes import compare_scans, mixture, versus_null

SIMILARITY = "similarity"
MITOCHONDRIAL = r"(?i)^mt-"
# Rps6ka1 and its like are kinases; pseudogenes (Rps10-ps1) keep the flag, as their reads are those of the gene.
RIBOSOMAL = r"(?i)^rp(?:sa|lp[0-2]|[sl]\d+(?:a|x|y\d|al|l\d?)?)(?:-ps\d*)?$"


def write_stats(shifts_uri: str, out_uri: str, settings: StatsSettings) -> pl.DataFrame:
    """Read a scan, test its genes, and write genes.parquet, genes.csv, summary.json, volcano.png and ranking.png.

    Raises
    ------
    UserError
        If there is no finished scan, if it has no rows, or if `out` holds other results.
    """
    manifest, frame = read_shifts(shifts_uri)
    if frame.is_empty():
        raise UserError(f"{shifts_uri}: the scan has no rows: no perturbation applied to any cell")
    genes, summary, pictures = _run_mode(manifest, frame, settings)
    noise = json.loads(Store(shifts_uri).read_bytes(NOISE))
    summary = {**_about_scan(manifest), "noise": noise, "settings": settings.model_dump(mode="json"), **summary}
    parquet = io.BytesIO()
    genes.write_parquet(parquet)
    out = Store(out_uri)
    files = {
        "genes.parquet": parquet.getvalue(),
        "genes.csv": genes.write_csv().encode(),
        "summary.json": json.dumps(summary, indent=1).encode() + b"\n",
        **{name: plots.to_png(figure) for name, figure in pictures.items()},
    }
    # Pictures follow from the table, and may differ in bytes between versions of matplotlib.
    for name, data in files.items():
        if not out.create(name, data) and not name.endswith(".png") and out.read_bytes(name) != data:
            raise UserError(f"{out.uri}/{name}: holds other results; choose another --out")
    scan = Store(shifts_uri)
    record_run(out, "evaluate stats", settings, {"scan": manifest.scan_id, "manifest": scan.sha256(MANIFEST)})
    return genes


def genes_table(manifest: ScanManifest, frame: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    """Test every gene (or set of genes) towards every state.

    The goal state comes first; within a state the order is as published: significant genes first, then by mean,
    descending, then by false discovery rate; genes without a test come last.

    A scan without states has one block of rows with `state` = "similarity", whose `mean` is the mean cosine between
    perturbed and original cells. Changes of class probabilities follow as `state` = "prob_<label>".

    Parameters
    ----------
    frame
        The shifts.

    Returns
    -------
    `state, ensembl_id, symbol`; the columns of `gene_statistics`; `significant`; `mean_similarity`; `mean_rank`
    (place in the cells that have the gene, 0 the top); `detection` (share of the scanned cells that were perturbed);
    `n_no_op` (cells in which nothing changed); `is_mitochondrial` and `is_ribosomal`, by symbol.
    """
    frame = _flat(frame, manifest.joint)
    measures = {state: SHIFT + state for state in _ordered(manifest.states)} or {SIMILARITY: SIMILARITY}
    measures |= {PROBABILITY + label: PROBABILITY + label for label in manifest.labels}
    about = _about_genes(frame, manifest.num_cells)
    parts = []
    for state, column in measures.items():
        tested = gene_statistics(frame.select(*vars(KEYS).values(), column), column, settings)
        tested = tested.join(about, on=KEYS.gene, how="left", validate="1:1")
        significant = (pl.col("fdr") < settings.fdr).fill_null(False)
        tested = tested.with_columns(pl.lit(state).alias("state"), significant.alias("significant"))
        order = [pl.col("p_value").is_null(), pl.col("significant").not_(), -pl.col("mean"), "fdr", KEYS.gene]
        parts.append(tested.sort(order, nulls_last=True))
    genes = pl.concat(parts)
    first = ["state", KEYS.gene, "symbol", "n_cells", "n_donors", "mean", "ci_low", "ci_high", "p_value", "fdr"]
    return genes.select(*first, pl.exclude(first))


def _flat(frame: pl.DataFrame, joint: bool) -> pl.DataFrame:
    """One key a row: the genes of a set are joined by "+", and its rank is the mean of the genes that were there."""
    if not joint:
        return frame
    there = pl.col("rank").list.eval(pl.element().filter(pl.element() >= 0)).list.mean()
    return frame.with_columns(
        pl.col("ensembl_id").list.join("+"), pl.col("symbol").list.join("+"), there.fill_null(-1).alias("rank")
    )


def _about_genes(frame: pl.DataFrame, num_cells: int) -> pl.DataFrame:
    symbol = pl.col("symbol").first()
    return frame.group_by(KEYS.gene).agg(
        symbol,
        pl.col("similarity").mean().alias("mean_similarity"),
        pl.col("rank").filter(pl.col("rank") >= 0).mean().alias("mean_rank"),
        (pl.col(KEYS.cell).n_unique() / num_cells).alias("detection"),
        pl.col("no_op").sum().alias("n_no_op"),
        symbol.str.contains(MITOCHONDRIAL).alias("is_mitochondrial"),
        symbol.str.contains(RIBOSOMAL).alias("is_ribosomal"),
    )


def _run_mode(
    manifest: ScanManifest, frame: pl.DataFrame, settings: StatsSettings
) -> tuple[pl.DataFrame, dict[str, Any], dict[str, Figure]]:
    """Table, entries of the summary, and pictures of the chosen mode."""
    if settings.mode == "mixture_model":
        flat = _flat(frame, manifest.joint)
        about = _about_genes(flat, manifest.num_cells).drop("mean_similarity")
        genes = mixture(flat, settings).join(about, on=KEYS.gene, how="left", validate="1:1", maintain_order="left")
        counts = dict(genes["impact"].drop_nulls().value_counts().sort("impact").iter_rows())
        return genes, {"genes": len(genes), "impact": counts}, {}
    if settings.mode == "vs_null":
        genes = _versus_null_table(manifest, frame, settings)
        goal = genes.filter(pl.col("state") == genes["state"][0])
        pictures = {"volcano.png": _volcano(goal, "difference", "difference from the null scan", settings)}
        tested = genes.filter(pl.col("p_value").is_not_null())
        significant = tested.filter(pl.col("fdr") < settings.fdr)
        return genes, {"genes": len(genes), "tested": len(tested), "significant": len(significant)}, pictures
    genes = genes_table(manifest, frame, settings)
    summary = {"states": _summarise_states(genes, settings)}
    if settings.compare is not None:
        other_manifest, other = read_shifts(settings.compare)
        others = genes_table(other_manifest, other, settings)
        summary["comparison"] = {"scan_id": other_manifest.scan_id, "model_checksum": other_manifest.model_checksum} | {
            state: compare_scans(genes.filter(pl.col("state") == state), others.filter(pl.col("state") == state))
            for state in genes["state"].unique(maintain_order=True)
            if state in others["state"]
        }
    return genes, summary, _pictures(manifest, genes, settings)


def _versus_null_table(manifest: ScanManifest, frame: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    null_manifest, null = read_shifts(str(settings.null_shifts))
    if null_manifest.model_checksum != manifest.model_checksum:
        raise UserError(f"{settings.null_shifts}: scan of another model: shifts of different models are not comparable")
    frame, null = _flat(frame, manifest.joint), _flat(null, null_manifest.joint)
    common = [state for state in _ordered(manifest.states) if state in null_manifest.states]
    measures = {state: SHIFT + state for state in common} or {SIMILARITY: SIMILARITY}
    symbols = frame.group_by(KEYS.gene).agg(pl.col("symbol").first())
    parts = []
    for state, name in measures.items():
        tested = versus_null(frame, null, name, settings).join(symbols, on=KEYS.gene, how="left", validate="1:1")
        tested = tested.select(pl.lit(state).alias("state"), KEYS.gene, "symbol", pl.exclude(KEYS.gene, "symbol"))
        parts.append(tested.sort(pl.col("p_value").is_null(), -pl.col("difference"), KEYS.gene))
    return pl.concat(parts)


def _ordered(states: list[str]) -> list[str]:
    """The goal state first, then start and alternates."""
    return [*states[1:2], *states[:1], *states[2:]]


def _summarise_states(genes: pl.DataFrame, settings: StatsSettings) -> dict[str, Any]:
    """What was tested, how, and what came out, for each state."""
    blocks = {}
    for (state,), block in genes.group_by("state", maintain_order=True):
        called = block.filter("significant")
        blocks[str(state)] = {
            "genes": len(block),
            "tested": len(block) - block["p_value"].null_count(),
            "tests": dict(block["test"].value_counts().sort("test").iter_rows()),
            "significant": len(called),
            "median_absolute_mean": block["mean"].abs().median(),
            "significant_positive": int((called["excess"].fill_null(called["mean"]) > 0).sum()),
            "top": block.head(settings.top).select("symbol", "mean", "excess", "p_value", "fdr", "p_genes").to_dicts(),
        }
    return blocks


def _about_scan(manifest: ScanManifest) -> dict[str, Any]:
    return {
        "scan_id": manifest.scan_id,
        "model_checksum": manifest.model_checksum,
        "perturbation": manifest.perturbation,
        "num_cells": manifest.num_cells,
        "state_cells": manifest.state_cells,
        "goal": manifest.states[1] if manifest.states else None,
    }


def _volcano(block: pl.DataFrame, effect: str, label: str, settings: StatsSettings) -> Figure:
    return plots.volcano(
        block[effect].fill_null(np.nan).to_numpy(),
        block["fdr"].fill_null(np.nan).to_numpy(),
        block["symbol"].to_list(),
        effect_label=label,
        threshold=settings.fdr,
        num_labels=min(settings.top, 12),
    )


def _pictures(manifest: ScanManifest, genes: pl.DataFrame, settings: StatsSettings) -> dict[str, Figure]:
    """Volcano and ranking of the goal state (of the similarity, without states)."""
    block = genes.filter(pl.col("state") == genes["state"][0])
    goal = manifest.states[1] if manifest.states else None
    what = f"shift towards {goal}" if goal else "similarity to the unperturbed cell"
    has_null = block["excess"].null_count() < len(block)
    label = f"{what}, minus that of matched genes" if has_null else what
    block = block.with_columns(pl.col("excess").fill_null(pl.col("mean")).alias("effect"))
    tested = block.filter(pl.col("p_value").is_not_null())
    ranking = plots.gene_bars(
        tested["mean"].to_numpy(),
        tested["ci_low"].fill_null(np.nan).to_numpy(),
        tested["ci_high"].fill_null(np.nan).to_numpy(),
        tested["symbol"].to_list(),
        effect_label=f"mean {what}",
        num_each=settings.top // 2,
    )
    return {"volcano.png": _volcano(block, "effect", label, settings), "ranking.png": ranking}
