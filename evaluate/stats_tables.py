"""Tables of genes from a scan that is read block by block: what is known of each gene, and how it was tested."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from corpus.errors import UserError
from evaluate.shift_blocks import ShiftBlocks
from evaluate.shifts import PROBABILITY, SHIFT, ScanManifest
from evaluate.stats import KEYS, Sums, assign_bins, genes_from_sums, merge, sum_block
from evaluate.stats_lists import compare_list, joint_target
from evaluate.stats_settings import StatsSettings

SIMILARITY = "similarity"
MITOCHONDRIAL = r"(?i)^mt-"
# Rps6ka1 and its like are kinases; pseudogenes (Rps10-ps1) keep the flag, as their reads are those of the gene.
RIBOSOMAL = r"(?i)^rp(?:sa|lp[0-2]|[sl]\d+(?:a|x|y\d|al|l\d?)?)(?:-ps\d*)?$"
NO_NULL = "none: no matched genes"
_MERGE_EVERY = 16


@dataclass(frozen=True)
class Measure:
    """Something that is tested.

    Parameters
    ----------
    name
        Of its block in the table of genes: a state, "similarity", or "prob_<label>".
    column
        Of the shifts table.
    noise
        Mean effects that are not larger are rounding.
    """

    name: str
    column: str
    noise: float = 0.0


def measures(manifest: ScanManifest) -> list[Measure]:
    """What a scan measured, the goal state first; without states, the similarity."""
    noise = manifest.noise
    shift, similarity, probability = (noise.shift, noise.similarity, noise.probability) if noise else (0.0, 0.0, 0.0)
    states = [*manifest.states[1:2], *manifest.states[:1], *manifest.states[2:]]
    found = [Measure(state, SHIFT + state, shift) for state in states] or [Measure(SIMILARITY, SIMILARITY, similarity)]
    return found + [Measure(PROBABILITY + label, PROBABILITY + label, probability) for label in manifest.labels]


def about_genes(scan: ShiftBlocks) -> pl.DataFrame:
    """Everything about genes but shifts, in one pass.

    Returns
    -------
    `ensembl_id`, `symbol`, `n_rows`; `mean_similarity`, `sd_similarity`; `mean_rank` (place in the cells that have the
    gene, 0 the top); `detection` (share of the scanned cells that were perturbed); `n_no_op` (cells in which nothing
    changed); `is_mitochondrial` and `is_ribosomal`, by symbol.

    Raises
    ------
    UserError
        If the scan has no rows.
    """
    placed = pl.col(KEYS.rank).filter(pl.col(KEYS.rank) >= 0).cast(pl.Float64)
    # Similarities lie close to 1: sums of the small loss keep their digits.
    loss = 1 - pl.col("similarity")
    parts = [
        block.group_by(KEYS.gene).agg(
            pl.col("symbol").first(),
            pl.len().cast(pl.Int64).alias("n_rows"),
            pl.col(KEYS.cell).n_unique().cast(pl.Int64).alias("n_cells"),
            loss.sum().alias("loss"),
            (loss**2).sum().alias("squares"),
            placed.sum().alias("rank_sum"),
            placed.count().cast(pl.Int64).alias("n_placed"),
            pl.col("no_op").sum().cast(pl.Int64).alias("n_no_op"),
        )
        for block in scan.blocks(["symbol", "similarity", "no_op"])
    ]
    if not parts:
        raise UserError(f"{scan.store.uri}: the scan has no rows: no perturbation applied to any cell")
    genes = (
        pl.concat(parts)
        .group_by(KEYS.gene, maintain_order=True)
        .agg(pl.col("symbol").first(), pl.exclude("symbol", KEYS.gene).sum())
    )
    symbol, n, n_placed = pl.col("symbol"), pl.col("n_rows"), pl.col("n_placed")
    variance = (pl.col("squares") - pl.col("loss") ** 2 / n).clip(0) / (n - 1)
    return genes.sort(KEYS.gene).select(
        KEYS.gene,
        "symbol",
        "n_rows",
        (1 - pl.col("loss") / n).alias("mean_similarity"),
        pl.when(n > 1).then(variance.sqrt()).alias("sd_similarity"),
        pl.when(n_placed > 0).then(pl.col("rank_sum") / n_placed).alias("mean_rank"),
        (pl.col("n_cells") / scan.manifest.num_cells).alias("detection"),
        "n_no_op",
        symbol.str.contains(MITOCHONDRIAL).alias("is_mitochondrial"),
        symbol.str.contains(RIBOSOMAL).alias("is_ribosomal"),
    )


def sum_scan(scan: ShiftBlocks, columns: Sequence[str], detections: pl.DataFrame) -> dict[str, Sums]:
    """Sums of each measured column over all cells, in one pass; memory grows with genes and donors alone."""
    parts: dict[str, list[Sums]] = {column: [] for column in columns}
    for block in scan.blocks(columns):
        binned = assign_bins(block, detections)
        for column, found in parts.items():
            found.append(sum_block(binned, column))
            if len(found) == _MERGE_EVERY:
                parts[column] = [merge(found)]
    return {column: merge(found) for column, found in parts.items()}


def genes_table(scan: ShiftBlocks, settings: StatsSettings) -> pl.DataFrame:
    """Test every gene (or set of genes) towards every state; see `genes_and_lists`."""
    return genes_and_lists(scan, settings)[0]


def genes_and_lists(scan: ShiftBlocks, settings: StatsSettings) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Test every gene (or set of genes) towards every state.

    The goal state comes first; within a state the order is as published: significant genes first, then by mean,
    descending, then by false discovery rate; genes without a test come last.

    A scan without states has one block of rows with `state` = "similarity", whose `mean` is the mean cosine between
    perturbed and original cells; without matched genes to compare with there is no test of it, as any edit changes an
    embedding. Changes of class probabilities follow as `state` = "prob_<label>".

    Returns
    -------
    genes
        `state, ensembl_id, symbol`; the columns of `genes_from_sums`; `below_noise` (the tested effect, `excess` or
        where there is none `mean`, is no larger than rounding); `significant` (`fdr` below the threshold, and not
        `below_noise`); those of `about_genes`.
    null_lists
        Of a joint list that was scanned with random ones: their rows, which `genes` then does not have.
    """
    about = about_genes(scan)
    detections = about.select(KEYS.gene, pl.col("n_rows").alias("detected"))
    asked = measures(scan.manifest)
    sums = sum_scan(scan, [measure.column for measure in asked], detections)
    target = joint_target(scan.manifest)
    parts, nulls = [], []
    for measure in asked:
        tested = genes_from_sums(sums[measure.column], settings)
        if target is not None:
            tested, null = compare_list(tested, target, settings)
            nulls.append(null.select(pl.lit(measure.name).alias("state"), KEYS.gene, "n_cells", "n_donors", "mean"))
        tested = tested.join(about.drop("n_rows", "sd_similarity"), on=KEYS.gene, how="left", validate="1:1")
        if measure.column == SIMILARITY:
            untested = pl.col("excess").is_null()
            tested = tested.with_columns(
                pl.when(~untested).then(pl.col(name)).alias(name) for name in ("p_value", "fdr", "p_genes")
            ).with_columns(pl.when(untested & pl.col("test").str.starts_with("none").not_()).then(pl.lit(NO_NULL))
                           .otherwise("test").alias("test"))  # fmt: skip
        below_noise = pl.coalesce("excess", "mean").abs() <= measure.noise
        significant = (pl.col("fdr") < settings.fdr).fill_null(False) & ~below_noise
        tested = tested.with_columns(
            pl.lit(measure.name).alias("state"), below_noise.alias("below_noise"), significant.alias("significant")
        )
        order = [pl.col("p_value").is_null(), pl.col("significant").not_(), -pl.col("mean"), "fdr", KEYS.gene]
        parts.append(tested.sort(order, nulls_last=True))
    genes = pl.concat(parts)
    null_lists = pl.concat(nulls) if nulls else None
    first = ["state", KEYS.gene, "symbol", "n_cells", "n_donors", "mean", "ci_low", "ci_high", "p_value", "fdr"]
    return genes.select(*first, pl.exclude(first)), null_lists
