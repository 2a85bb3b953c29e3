"""Pictures of a table of genes: volcano, ranked bars, distributions over cells, and agreement of two scans."""

from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from evaluate import plots
from evaluate.plots_shifts import agreement_scatter, shift_distributions
from evaluate.shift_blocks import ShiftBlocks
from evaluate.stats import KEYS
from evaluate.stats_compat import draw_pool
from evaluate.stats_settings import StatsSettings
from evaluate.stats_tables import measures

_POOL = 20_000
_MOST_DRAWN = 24


def named_rows(block: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """Rows of the genes asked for, by symbol in any case or by Ensembl id."""
    lower = {name.lower() for name in names}
    asked = pl.col("symbol").str.to_lowercase().is_in(lower) | pl.col(KEYS.gene).is_in(names)
    return block.filter(asked)


def volcano_of(block: pl.DataFrame, effect: str, label: str, settings: StatsSettings) -> Figure:
    """Volcano plot of one measure; genes below the noise floor are grey, whatever their p-value."""
    return plots.volcano(
        block[effect].fill_null(np.nan).to_numpy(),
        block["fdr"].fill_null(np.nan).to_numpy(),
        block["symbol"].to_list(),
        effect_label=label,
        threshold=settings.fdr,
        significant=block["significant"].to_numpy(),
        highlight=named_rows(block, settings.named_genes)["symbol"].to_list(),
        num_labels=min(settings.top, 12),
    )


def goal_pictures(scan: ShiftBlocks, genes: pl.DataFrame, settings: StatsSettings) -> dict[str, Figure]:
    """Volcano, ranking and distributions of the goal state (of the similarity, without states)."""
    measure = measures(scan.manifest)[0]
    block = genes.filter(pl.col("state") == measure.name)
    goal = scan.manifest.states[1] if scan.manifest.states else None
    what = f"shift towards {goal}" if goal else "similarity to the unperturbed cell"
    has_null = block["excess"].null_count() < len(block)
    label = f"{what}, minus that of matched genes" if has_null else what
    block = block.with_columns(pl.col("excess").fill_null(pl.col("mean")).alias("effect"))
    tested = block.filter(pl.col("p_value").is_not_null())
    named = named_rows(block, settings.named_genes)
    ranking = plots.gene_bars(
        tested["mean"].to_numpy(),
        tested["ci_low"].fill_null(np.nan).to_numpy(),
        tested["ci_high"].fill_null(np.nan).to_numpy(),
        tested["symbol"].to_list(),
        effect_label=f"mean {what}",
        num_each=settings.top // 2,
        highlight=named["symbol"].to_list(),
    )
    drawn = _drawn_genes(block, named, min(settings.top, _MOST_DRAWN - len(named)))
    values = _values_of(scan, measure.column, drawn[KEYS.gene].to_list())
    pool = draw_pool(scan.blocks([measure.column]), measure.column, scan.manifest.rows, _POOL, settings.seed)
    distributions = shift_distributions(
        [(row["symbol"], values[row[KEYS.gene]]) for row in drawn.iter_rows(named=True)],
        pool,
        value_label=what,
        highlight=named["symbol"].to_list(),
    )
    return {
        "volcano.png": volcano_of(block, "effect", label, settings),
        "ranking.png": ranking,
        "distributions.png": distributions,
    }


def _drawn_genes(block: pl.DataFrame, named: pl.DataFrame, number: int) -> pl.DataFrame:
    """Genes of highest and lowest mean (tested ones, if there are any) and those asked for, by mean, descending."""
    tested = block.filter(pl.col("p_value").is_not_null())
    ranked = (tested if len(tested) else block).sort("mean", KEYS.gene, descending=[True, False])
    half = max(number, 2) // 2
    chosen = pl.concat([ranked.head(half), ranked.tail(half), named]).unique(KEYS.gene)
    return chosen.sort("mean", KEYS.gene, descending=[True, False])


def _values_of(scan: ShiftBlocks, value: str, genes: list[str]) -> dict[str, np.ndarray]:
    """Values over cells of some genes."""
    rows = [block.filter(pl.col(KEYS.gene).is_in(genes)).select(KEYS.gene, value) for block in scan.blocks([value])]
    frame = pl.concat(rows)
    parts = frame.partition_by(KEYS.gene, as_dict=True)
    return {gene: part[value].to_numpy().astype(np.float64) for (gene,), part in parts.items()}


def comparison_pictures(table: pl.DataFrame, compared: dict[str, Any]) -> dict[str, Figure]:
    """Means of two scans against each other, for the goal state."""
    rho = compared[table["state"][0]]["spearman"]
    figure = agreement_scatter(
        table["mean"].to_numpy(),
        table["mean_other"].to_numpy(),
        table["sign_flip"].to_numpy(),
        table["symbol"].to_list(),
        title=f"Spearman's rho {rho:.3f}, {int(table['sign_flip'].sum()):,} of {len(table):,} genes change sign",
    )
    return {"comparison.png": figure}
