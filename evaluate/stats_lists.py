"""A joint list of genes against random lists that match it in size, detection and rank (`evaluate.matched_lists`)."""

import numpy as np
import polars as pl

from corpus.errors import UserError
from evaluate.shifts import ScanManifest
from evaluate.stats import KEYS, TOO_FEW_CELLS
from evaluate.stats_settings import StatsSettings

OVER_LISTS = "against random lists matched in size, detection and rank"
TOO_FEW_LISTS = "none: random lists in too few cells"
MIN_LISTS = 19
"""Random lists below which no p-value could be 0.1 or less."""


def joint_target(manifest: ScanManifest) -> str | None:
    """Key of the list of a joint scan that was scanned with random ones; None for other scans."""
    change = manifest.settings.get("perturbation")
    if not isinstance(change, dict) or not change.get("null_lists"):
        return None
    genes = change["genes"]
    assert isinstance(genes, list)
    return "+".join(map(str, genes))


def compare_list(table: pl.DataFrame, target: str, settings: StatsSettings) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Test a list by its place among random ones.

    Parameters
    ----------
    table
        As `genes_from_sums` gives it for the list and the random ones.
    target
        Key of the list.

    Returns
    -------
    target
        Its row: `null_mean` and `null_size` are of the M random lists in at least `min_cells` cells, `excess` is the
        mean minus theirs, and `p_value` (1 + hits) / (M + 1) on the nearer side, doubled, where a hit is a random list
        whose mean is as extreme.
    null
        The rows of the random lists.

    Raises
    ------
    UserError
        If the list was perturbed in no cell.
    """
    is_target = pl.col(KEYS.gene) == target
    row, null = table.filter(is_target), table.filter(~is_target)
    if row.is_empty():
        raise UserError(f"{target}: no cell has the whole list: nothing to test")
    means = null.filter(pl.col("n_cells") >= settings.min_cells)["mean"].to_numpy()
    mean, number = float(row["mean"].item()), len(means)
    p_value, test = None, OVER_LISTS
    if row["n_cells"].item() < settings.min_cells:
        test = TOO_FEW_CELLS
    elif number < MIN_LISTS:
        test = TOO_FEW_LISTS
    else:
        hits = min((means >= mean).sum(), (means <= mean).sum())
        p_value = min(1.0, 2 * (1 + int(hits)) / (number + 1))
    null_mean = float(np.mean(means)) if number else None
    changed = {
        "null_mean": null_mean,
        "excess": None if null_mean is None else mean - null_mean,
        "p_value": p_value,
        "fdr": p_value,
        "p_genes": None,
    }
    row = row.with_columns(
        *(pl.lit(value, pl.Float64).alias(name) for name, value in changed.items()),
        pl.lit(number, row.schema["null_size"]).alias("null_size"),
        pl.lit(None, row.schema["null_genes"]).alias("null_genes"),
        pl.lit(test).alias("test"),
    )
    return row, null
