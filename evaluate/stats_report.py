"""From a scan's folder to a folder with the table of genes, a summary and pictures."""

import io
import json
from typing import Any

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.provenance import record_run
from corpus.store import Store
from evaluate import plots
from evaluate.perturb_settings import StatsSettings
from evaluate.shifts import MANIFEST, SHIFT, ScanManifest, read_shifts
from evaluate.stats import KEYS, gene_statistics

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
    genes = genes_table(manifest, frame, settings)
    out = Store(out_uri)
    parquet = io.BytesIO()
    genes.write_parquet(parquet)
    files = {
        "genes.parquet": parquet.getvalue(),
        "genes.csv": genes.write_csv().encode(),
        "summary.json": json.dumps(summarise(manifest, genes, settings), indent=1).encode() + b"\n",
        **_pictures(manifest, genes, settings),
    }
    # The table first: if it is the same, so is the rest.
    for name, data in files.items():
        if not out.create(name, data) and name.startswith("genes") and out.read_bytes(name) != data:
            raise UserError(f"{out.uri}/{name}: holds other results; choose another --out")
    scan = Store(shifts_uri)
    record_run(out, "evaluate stats", settings, {"scan": manifest.scan_id, "manifest": scan.sha256(MANIFEST)})
    return genes


def genes_table(manifest: ScanManifest, frame: pl.DataFrame, settings: StatsSettings) -> pl.DataFrame:
    """Test every gene (or set of genes) towards every state.

    The goal state comes first; within a state the order is as published: significant genes first, then by mean,
    descending, then by false discovery rate; genes without a test come last.

    A scan without states has one block of rows with `state` = "similarity", whose `mean` is the mean cosine between
    perturbed and original cells.

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
    states = manifest.states
    measures = {state: SHIFT + state for state in [*states[1:2], *states[:1], *states[2:]]} or {SIMILARITY: SIMILARITY}
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


def summarise(manifest: ScanManifest, genes: pl.DataFrame, settings: StatsSettings) -> dict[str, Any]:
    """What was tested, how, and what came out, for summary.json."""
    blocks = {}
    for (state,), block in genes.group_by("state", maintain_order=True):
        called = block.filter("significant")
        blocks[str(state)] = {
            "genes": len(block),
            "tested": len(block) - block["p_value"].null_count(),
            "tests": dict(block["test"].value_counts().sort("test").iter_rows()),
            "significant": len(called),
            "significant_positive": int((called["excess"].fill_null(called["mean"]) > 0).sum()),
            "top": block.head(settings.top).select("symbol", "mean", "excess", "p_value", "fdr", "p_genes").to_dicts(),
        }
    return {
        "scan_id": manifest.scan_id,
        "model_checksum": manifest.model_checksum,
        "perturbation": manifest.perturbation,
        "num_cells": manifest.num_cells,
        "state_cells": manifest.state_cells,
        "goal": manifest.states[1] if manifest.states else None,
        "settings": settings.model_dump(mode="json"),
        "states": blocks,
    }


def _pictures(manifest: ScanManifest, genes: pl.DataFrame, settings: StatsSettings) -> dict[str, bytes]:
    """Volcano and ranking of the goal state (of the similarity, without states)."""
    block = genes.filter(pl.col("state") == genes["state"][0])
    goal = manifest.states[1] if manifest.states else None
    what = f"shift towards {goal}" if goal else "similarity to the unperturbed cell"
    effect = block["excess"].fill_null(block["mean"]).to_numpy()
    has_null = block["excess"].null_count() < len(block)
    volcano = plots.volcano(
        effect,
        block["fdr"].fill_null(np.nan).to_numpy(),
        block["symbol"].to_list(),
        effect_label=f"{what}, minus that of matched genes" if has_null else what,
        threshold=settings.fdr,
        num_labels=min(settings.top, 12),
    )
    tested = block.filter(pl.col("p_value").is_not_null())
    ranking = plots.gene_bars(
        tested["mean"].to_numpy(),
        tested["ci_low"].fill_null(np.nan).to_numpy(),
        tested["ci_high"].fill_null(np.nan).to_numpy(),
        tested["symbol"].to_list(),
        effect_label=f"mean {what}",
        num_each=settings.top // 2,
    )
    return {"volcano.png": plots.to_png(volcano), "ranking.png": plots.to_png(ranking)}
