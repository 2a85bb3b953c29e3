"""From a scan's folder to a folder with the table of genes, a summary and pictures."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from matplotlib.figure import Figure

from corpus.errors import UserError
from corpus.provenance import record_run
from corpus.species import load_genes
from corpus.store import Store
from evaluate import plots, stats_compat
from evaluate.enrichment import enrich, read_gene_sets
from evaluate.shift_blocks import ShiftBlocks, gene_shift_blocks
from evaluate.shifts import MANIFEST, ScanManifest
from evaluate.stats import KEYS, OVER_CELLS
from evaluate.stats_aggregate import AFFECTED, aggregate_cells, aggregate_effects
from evaluate.stats_modes import compare_scans, mixture, pair_scans, versus_null
from evaluate.stats_pairs import interactions
from evaluate.stats_pictures import comparison_pictures, goal_pictures, named_rows, volcano_of
from evaluate.stats_settings import StatsSettings
from evaluate.stats_tables import SIMILARITY, Measure, about_genes, genes_and_lists, genes_table, measures

# What the p-value is about: over cells the place among matched genes, over donors the excess, without a null the mean.
_PLACE = pl.when(pl.col("test") == OVER_CELLS).then(pl.col("place") - 0.5)
_DIRECTION = pl.coalesce(_PLACE, "excess", "mean")


@dataclass
class Results:
    """What a mode gives.

    Parameters
    ----------
    genes
        The table genes.parquet.
    summary
        Entries of summary.json.
    tables
        Further tables, by name of the file without its suffix; written as CSV.
    pictures
        By name of the file.
    """

    genes: pl.DataFrame
    summary: dict[str, Any]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    pictures: dict[str, Figure] = field(default_factory=dict)


def write_stats(shifts_uri: str, out_uri: str, settings: StatsSettings) -> pl.DataFrame:
    """Read a scan, test its genes, and write genes.parquet, genes.csv, summary.json, further tables and pictures.

    Returns
    -------
    The table of genes.

    Raises
    ------
    UserError
        If there is no finished scan, if it has no rows, if the mode does not fit it, or if `out` holds other results.
    """
    scan = ShiftBlocks(shifts_uri)
    results = _MODES[settings.mode](scan, settings)
    summary = {**_about_scan(scan.manifest), "settings": settings.model_dump(mode="json"), **results.summary}
    parquet = io.BytesIO()
    results.genes.write_parquet(parquet)
    files = {
        "genes.parquet": parquet.getvalue(),
        "genes.csv": results.genes.write_csv().encode(),
        **{f"{name}.csv": table.write_csv().encode() for name, table in results.tables.items()},
        "summary.json": json.dumps(summary, indent=1).encode() + b"\n",
        **{name: plots.to_png(figure) for name, figure in results.pictures.items()},
    }
    out = Store(out_uri)
    # Pictures follow from the table, and may differ in bytes between versions of matplotlib.
    for name, data in files.items():
        if not out.create(name, data) and not name.endswith(".png") and out.read_bytes(name) != data:
            raise UserError(f"{out.uri}/{name}: holds other results; choose another --out")
    inputs = {"scan": scan.manifest.scan_id, "manifest": scan.store.sha256(MANIFEST)}
    record_run(out, "evaluate stats", settings, inputs)
    return results.genes


def _about_scan(manifest: ScanManifest) -> dict[str, Any]:
    return {
        "scan_id": manifest.scan_id,
        "model_checksum": manifest.model_checksum,
        "perturbation": manifest.perturbation,
        "num_cells": manifest.num_cells,
        "state_cells": manifest.state_cells,
        "goal": manifest.states[1] if manifest.states else None,
        "noise": manifest.noise.model_dump(mode="json") if manifest.noise else None,
    }


def _goal_state_shift(scan: ShiftBlocks, settings: StatsSettings) -> Results:
    genes, null_lists = genes_and_lists(scan, settings)
    results = Results(genes, {"states": _summarise_states(genes, settings)})
    if null_lists is not None:
        results.tables["null_lists"] = null_lists
    results.pictures = goal_pictures(scan, genes, settings)
    if (pairs := _interactions(scan, settings)) is not None:
        results.tables["interactions"] = pairs
    if settings.compare is not None:
        _compare(results, ShiftBlocks(settings.compare), settings)
    if settings.gene_sets is not None:
        goal = genes.filter(pl.col("state") == genes["state"][0])
        results.tables["enrichment"] = enrich(goal, read_gene_sets(settings.gene_sets), settings.seed)
    if settings.compat == "geneformer" and scan.manifest.states:
        asked = measures(scan.manifest)
        alternate = asked[2].column if len(scan.manifest.states) > 2 else None
        columns = [asked[0].column, *([alternate] if alternate else [])]
        results.tables["geneformer"] = stats_compat.goal_state_shift(
            lambda: scan.blocks(columns), about_genes(scan), columns[0], alternate, settings
        )
    return results


def _interactions(scan: ShiftBlocks, settings: StatsSettings) -> pl.DataFrame | None:
    """Every pair of a scan over pairs, towards every state and in similarity; None for other scans."""
    change = scan.manifest.settings.get("perturbation")
    if not isinstance(change, dict) or change.get("combine") not in ("pairs", "anchor"):
        return None
    asked = {measure.column: measure for measure in [*measures(scan.manifest), Measure(SIMILARITY, SIMILARITY)]}
    symbols = about_genes(scan).select(KEYS.gene, "symbol")
    parts = []
    for column, measure in asked.items():
        table = interactions(scan.blocks([column]), column, 1.0 if column == SIMILARITY else 0.0, settings)
        table = table.join(symbols, on=KEYS.gene, how="left", validate="1:1", maintain_order="left")
        below_noise = (pl.col("interaction").abs() <= measure.noise).alias("below_noise")
        parts.append(
            table.select(pl.lit(measure.name).alias("measure"), "symbol", pl.all().exclude("symbol"), below_noise)
        )
    return pl.concat(parts)


def _compare(results: Results, other: ShiftBlocks, settings: StatsSettings) -> None:
    """Add the agreement with another scan; nothing of the two is averaged, as models may differ."""
    others = genes_table(other, settings)
    compared: dict[str, Any] = {
        "scan_id": other.manifest.scan_id,
        "model_checksum": other.manifest.model_checksum,
        "perturbation": other.manifest.perturbation,
    }
    tables = []
    for state in results.genes["state"].unique(maintain_order=True):
        if state in others["state"]:
            sides = (table.filter(pl.col("state") == state) for table in (results.genes, others))
            compared[state], table = compare_scans(*sides)
            tables.append(table.select(pl.lit(state).alias("state"), pl.all()))
    if not tables:
        raise UserError(f"{other.store.uri}: scan of other states; there is nothing to compare")
    results.summary["comparison"] = compared
    results.tables["comparison"] = pl.concat(tables)
    results.pictures |= comparison_pictures(tables[0], compared)


def _versus_null(scan: ShiftBlocks, settings: StatsSettings) -> Results:
    null = ShiftBlocks(str(settings.null_shifts))
    if null.manifest.model_checksum != scan.manifest.model_checksum:
        raise UserError(f"{null.store.uri}: scan of another model: shifts of different models are not comparable")
    about = about_genes(scan)
    floors = {measure.name: measure.noise for measure in measures(null.manifest)}
    asked = [measure for measure in measures(scan.manifest) if measure.name in floors]
    if not asked:
        raise UserError(f"{null.store.uri}: scan of other states; there is nothing to compare")
    parts: list[pl.DataFrame] = []
    published: dict[str, pl.DataFrame] = {}
    for measure in asked:
        paired = pair_scans(scan.blocks([measure.column]), null.blocks([measure.column]), measure.column)
        tested = versus_null(paired, settings)
        tested = tested.join(about.select(KEYS.gene, "symbol"), on=KEYS.gene, how="left", validate="1:1")
        below_noise = pl.col("difference").abs() <= max(measure.noise, floors[measure.name])
        tested = tested.select(
            pl.lit(measure.name).alias("state"), KEYS.gene, "symbol", pl.exclude(KEYS.gene, "symbol"),
            below_noise.alias("below_noise"),
            ((pl.col("fdr") < settings.fdr).fill_null(False) & ~below_noise).alias("significant"),
        )  # fmt: skip
        parts.append(tested.sort(pl.col("p_value").is_null(), -pl.col("difference"), KEYS.gene))
        if settings.compat == "geneformer" and not published:
            published["geneformer"] = stats_compat.versus_null(about, paired, settings)
    genes = pl.concat(parts)
    goal = parts[0]
    summary = {
        "genes": len(genes),
        "tested": len(genes) - genes["p_value"].null_count(),
        "significant": int(genes["significant"].sum()),
    }
    pictures = {"volcano.png": volcano_of(goal, "difference", "difference from the null scan", settings)}
    return Results(genes, summary, published, pictures)


def _mixture(scan: ShiftBlocks, settings: StatsSettings) -> Results:
    about = about_genes(scan)
    genes = about.drop("sd_similarity").rename({"n_rows": "n_cells"})
    genes, _ = mixture(genes, scan.blocks([SIMILARITY]), settings)
    first = [KEYS.gene, "symbol", "n_cells", "mean_similarity", "impact_probability", "impact", "impact_share", "test"]
    counts = dict(genes["impact"].drop_nulls().value_counts().sort("impact").iter_rows())
    results = Results(genes.select(*first, pl.exclude(first)), {"genes": len(genes), "impact": counts})
    if settings.compat == "geneformer":
        results.tables["geneformer"] = stats_compat.mixture_model(about, scan.blocks([SIMILARITY]))
    return results


def _aggregate_data(scan: ShiftBlocks, settings: StatsSettings) -> Results:
    change = scan.manifest.settings.get("perturbation")
    if isinstance(change, dict) and change.get("genes") == "all":
        raise UserError(
            f'{scan.store.uri}: mode "aggregate_data" is for the shifts of a given set of genes, cell by cell; this '
            'scan perturbed every gene: use "goal_state_shift"'
        )
    asked = list({measure.column: measure for measure in [*measures(scan.manifest), Measure("", SIMILARITY)]})
    sets, cells = aggregate_cells(scan.blocks(["symbol", *asked]), asked)
    if cells.is_empty():
        raise UserError(f"{scan.store.uri}: the scan has no rows: no perturbation applied to any cell")
    results = Results(sets, {"sets": sets[KEYS.gene].n_unique(), "cells": cells[KEYS.cell].n_unique()})
    results.tables["cells"] = cells.drop(KEYS.rank)
    if settings.compat == "geneformer":
        results.tables["geneformer"] = stats_compat.aggregate_data(cells, asked[0])
    return results


def _aggregate_gene_shifts(scan: ShiftBlocks, settings: StatsSettings) -> Results:
    effects = aggregate_effects(gene_shift_blocks(scan))
    about = about_genes(scan)
    symbols = dict(about.select(KEYS.gene, "symbol").iter_rows())
    for species in ("mouse", "human"):
        found = load_genes(species).filter(pl.col("ensembl_id").is_in(effects[AFFECTED].unique().implode()))
        symbols = dict(found.select("ensembl_id", "symbol").iter_rows()) | symbols
    genes = effects.join(about.select(KEYS.gene, "symbol"), on=KEYS.gene, how="left", validate="m:1").select(
        KEYS.gene, "symbol", AFFECTED, pl.col(AFFECTED).replace_strict(symbols, default=None).alias("affected_symbol"),
        pl.exclude(KEYS.gene, "symbol", AFFECTED),
    )  # fmt: skip
    results = Results(genes, {"perturbations": genes[KEYS.gene].n_unique(), "pairs": len(genes)})
    if settings.compat == "geneformer":
        results.tables["geneformer"] = stats_compat.aggregate_gene_shifts(effects, about, symbols)
    return results


_MODES: dict[str, Callable[[ShiftBlocks, StatsSettings], Results]] = {
    "goal_state_shift": _goal_state_shift,
    "vs_null": _versus_null,
    "mixture_model": _mixture,
    "aggregate_data": _aggregate_data,
    "aggregate_gene_shifts": _aggregate_gene_shifts,
}


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
            "below_noise": int(block["below_noise"].sum()),
            "median_absolute_mean": block["mean"].abs().median(),
            "significant_positive": int(called.select(_DIRECTION > 0).to_series().sum()),
            "named": named_ranks(block, settings.named_genes),
            "top": block.head(settings.top).select("symbol", "mean", "excess", "p_value", "fdr", "p_genes").to_dicts(),
        }
    return blocks


def named_ranks(block: pl.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    """Where named genes rank by mean shift towards one state, 1 the highest, among tested and among all genes."""
    tested = block.filter(pl.col("p_value").is_not_null())
    rows = []
    for row in named_rows(block, names).iter_rows(named=True):
        ranks = {
            "rank_tested": int((tested["mean"] > row["mean"]).sum()) + 1 if row["p_value"] is not None else None,
            "tested": len(tested),
            "rank_all": int((block["mean"] > row["mean"]).sum()) + 1,
            "genes": len(block),
        }
        kept = [
            "mean", "ci_low", "ci_high", "null_mean", "excess", "place", "p_value", "fdr", "p_genes", "n_cells",
            "n_donors", "below_noise", "test",
        ]  # fmt: skip
        rows.append({"symbol": row["symbol"], **ranks, **{name: row[name] for name in kept}})
    return rows


def describe(genes: pl.DataFrame, settings: StatsSettings) -> str:
    """What came out, for the terminal."""
    if "significant" not in genes.columns:
        return f"stats: {len(genes):,} rows of the mode {settings.mode}"
    lines = []
    for (state,), block in genes.group_by("state", maintain_order=True):
        tested, called = len(block) - block["p_value"].null_count(), int(block["significant"].sum())
        lines.append(
            f"stats: {state}: {len(block):,} genes, {tested:,} tested, {called:,} significant, "
            f"{int(block['below_noise'].sum()):,} no larger than rounding"
        )
        if settings.mode != "goal_state_shift":
            continue
        for row in named_ranks(block, settings.named_genes):
            rank = row["rank_tested"]
            place = f"{rank:,} of {tested:,} tested" if rank else f"untested, {row['rank_all']:,} of {len(block):,}"
            p_value = "" if row["p_value"] is None else f", p {row['p_value']:.2g}, FDR {row['fdr']:.2g}"
            mean = f"mean {row['mean']:.3g} in {row['n_cells']:,} cells"
            lines.append(f"  {row['symbol']}: rank {place}; {mean}{p_value}")
    return "\n".join(lines)
