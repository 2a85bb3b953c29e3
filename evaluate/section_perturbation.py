"""Report section on in silico perturbation: which genes move cells towards the goal, and where named genes rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.store import Store
from evaluate import plots
from evaluate.page import Block, Details, Facts, Note, Picture, Pictures, Section, StoredPicture, Table, Text
from evaluate.report_inputs import read_json, read_table

_SINGLE_PRECISION = float(np.finfo(np.float32).eps)

_COLUMNS = {
    "symbol": "gene",
    "ensembl_id": "Ensembl id",
    "mean": "mean shift",
    "ci_low": "95 % from",
    "ci_high": "to",
    "excess": "above matched genes",
    "p_value": "p",
    "fdr": "FDR",
    "n_cells": "cells",
    "n_donors": "donors",
    "mean_rank": "mean rank",
}

_NAMED = {
    "mean": "mean shift",
    "ci_low": "95 % from",
    "ci_high": "to",
    "null_mean": "matched genes",
    "place": "place among them",
    "p_value": "p",
    "fdr": "FDR",
    "p_genes": "p among genes",
    "n_cells": "cells",
    "n_donors": "donors",
}
_NAMED_COLUMNS = ["gene", "rank among tested", "tested", "rank among all", "all", *_NAMED.values(), "test"]


def perturbation_section(
    perturb: str | None, stats: str | None, named: Sequence[str], top: int, maps: Sequence[str] = ()
) -> Section:
    """Describe a scan, its statistics, and maps of cells before and after.

    Parameters
    ----------
    maps
        Folders of `evaluate map`.
    named
        Symbols or Ensembl ids to look up, whatever their rank.
    top
        Rows from each end of the ranking.

    Raises
    ------
    UserError
        If a named folder lacks its files.
    """
    title = "In silico perturbation"
    blocks: list[Block] = []
    caveats = [
        "A perturbation here edits the model's input; no cell was touched. A shift says what the model associates with "
        "the change, not that the change would cause it, and it can be true of the data and false of the animal.",
        "Shifts are small differences of cosines. Abundant genes, and genes near the top of the ranking, tend to shift "
        "more whatever their function: compare a gene with matched ones before believing it.",
    ]
    if perturb is None:
        blocks.append(Note("Not run: the folder of `evaluate perturb` was not part of this report."))
    else:
        blocks += _scan_blocks(read_json(Store(perturb), "manifest.json"))
    drawn = _maps(maps)
    if stats is None:
        blocks += [Note("Not run: `evaluate stats` was not part of this report."), *drawn]
        return Section("perturbation", title, blocks, caveats=caveats)
    store = Store(stats)
    summary = read_json(store, "summary.json")
    genes = read_table(store, "genes.parquet", ["ensembl_id", "symbol"])
    if not {"state", "mean", "fdr", "p_value"} <= set(genes.columns):
        mode = (summary.get("settings") or {}).get("mode", "another mode")
        blocks += [Text(f"Statistics of the mode {mode}."), _plain_table(genes, 2 * top), *drawn]
        return Section("perturbation", title, blocks, caveats=caveats)
    state = str(genes["state"][0])
    block = genes.filter(pl.col("state") == state)
    goal = summary.get("goal")
    what = f"shift towards {goal}" if goal else "similarity to the unperturbed cell"
    threshold = float((summary.get("settings") or {}).get("fdr", 0.05))
    tested = block.filter(pl.col("p_value").is_not_null())
    called = pl.col("significant") if "significant" in tested.columns else pl.col("fdr") < threshold
    significant = tested.filter(called)
    below_noise = int(tested["below_noise"].sum()) if "below_noise" in tested.columns else 0
    blocks.append(
        Facts(
            [
                ("statistics", stats),
                ("measure", what),
                ("genes perturbed", len(block)),
                ("genes tested", len(tested)),
                (f"significant (FDR below {threshold:g}, above rounding)", len(significant)),
                ("tested genes whose effect is no larger than rounding", below_noise),
                ("model checksum", str(summary.get("model_checksum"))[:16]),
            ]
        )
    )
    blocks += _size_blocks(tested, summary)
    blocks += _test_blocks(block)
    highlight = _symbols(block, named)
    tiles = [("genes tested", f"{len(tested):,}", f"{len(significant):,} significant, {what}")]
    if named:
        table, named_tiles = _named(block, named)
        blocks.append(table)
        tiles += named_tiles
    if len(tested):
        blocks.append(_pictures(block, tested, what, threshold, highlight, top))
        ranked = tested.sort("mean", "ensembl_id", descending=[True, False])
        blocks.append(_gene_table(ranked.head(top), f"Tested genes of highest {what}."))
        blocks.append(
            _gene_table(ranked.tail(min(top, max(0, len(ranked) - top))).reverse(), f"Tested genes of lowest {what}.")
        )
    else:
        blocks.append(Note("No gene had enough cells for a test; nothing can be ranked with confidence."))
        ranked = block.sort("mean", "ensembl_id", descending=[True, False])
        blocks.append(_gene_table(ranked.head(top), f"Untested genes of highest {what}."))
    blocks += drawn
    others = [str(name) for name in genes["state"].unique(maintain_order=True) if name != state]
    for other in others:
        part = genes.filter((pl.col("state") == other) & pl.col("p_value").is_not_null())
        if len(part):
            part = part.sort("mean", "ensembl_id", descending=[True, False])
            blocks.append(_gene_table(part.head(min(top, 10)), f"Tested genes of highest shift towards {other}."))
    return Section("perturbation", title, blocks, tiles, caveats)


def _scan_blocks(manifest: dict[str, Any]) -> list[Block]:
    settings = manifest.get("settings", {})
    states = [f"{name} ({manifest.get('state_cells', {}).get(name, '?')} cells)" for name in manifest.get("states", [])]
    readout = settings.get("readout", {})
    facts = [
        ("perturbation", manifest.get("perturbation")),
        ("cells perturbed", manifest.get("num_cells")),
        ("perturbations", manifest.get("rows")),
        ("states (start, goal, others)", states),
        ("readout", f"{readout.get('embedding')} of layer {readout.get('layer')}, {readout.get('precision')}"),
        ("not applicable", [f"{number:,} {why}" for why, number in manifest.get("skipped", {}).items() if number]),
        ("scan", str(manifest.get("scan_id"))[:16]),
    ]
    return [Facts(facts)]


def _maps(folders: Sequence[str]) -> list[Block]:
    """Pictures of cells before and after, as `evaluate map` drew them."""
    pictures = []
    for folder in folders:
        store = Store(folder)
        if not store.exists("map.png"):
            raise UserError(f"{store.uri}/map.png: no such file")
        caption = (
            "Left: a UMAP keeps neighbours, not distances. Right: every cell on the line between the centroids of the "
            "two states."
        )
        pictures.append(StoredPicture(store.read_bytes("map.png"), "Cells before and after a perturbation", caption))
    return [Pictures(pictures)] if pictures else []


def _size_blocks(tested: pl.DataFrame, summary: dict[str, Any]) -> list[Block]:
    """Whether the shifts are large enough to mean anything."""
    if tested.is_empty():
        return []
    largest = float(tested["mean"].abs().max() or 0)  # type: ignore[arg-type]
    noise = (summary.get("noise") or {}).get("shift")
    facts: list[tuple[str, Any]] = [("largest mean shift", largest)]
    if noise is not None:
        facts.append(("shift by rounding alone", float(noise)))
    blocks: list[Block] = [Facts(facts)]
    floor = max(_SINGLE_PRECISION, float(noise or 0))
    if summary.get("goal") and largest < floor:
        blocks.append(
            Note(
                f"No gene shifts the cells by more than {largest:.1e}, which is no more than rounding ({floor:.1e}): "
                "to this model the states are the same. The order of the genes below says nothing about biology."
            )
        )
    return blocks


def _test_blocks(block: pl.DataFrame) -> list[Block]:
    """How genes were tested; pooled cells are a warning."""
    if "test" not in block.columns:
        return []
    counts = block["test"].value_counts().sort(["count", "test"], descending=[True, False])
    blocks: list[Block] = [
        Table(["test", "genes"], [list(row) for row in counts.iter_rows()], "How genes were tested.")
    ]
    if block.filter(pl.col("p_value").is_not_null())["test"].str.contains("cells pooled").any():
        blocks.append(
            Note(
                "There are too few donors to test over donors, so cells were pooled. Cells of one animal are not "
                "independent: these p-values are too small to stand for the population."
            )
        )
    return blocks


def _named(block: pl.DataFrame, named: Sequence[str]) -> tuple[Table, list[tuple[str, str, str]]]:
    """Ranks of genes that the reader asked for, among the tested genes and among all, 1 being the highest mean."""
    rows: list[list[Any]] = []
    tiles = []
    for name in named:
        found = block.filter((pl.col("symbol").str.to_lowercase() == name.lower()) | (pl.col("ensembl_id") == name))
        if found.is_empty():
            rows.append([name, *[None] * (len(_NAMED_COLUMNS) - 2), "in no perturbed cell"])
            tiles.append((f"rank of {name}", "–", "not among the perturbed genes"))
            continue
        gene = found.row(0, named=True)
        tested = block.filter(pl.col("p_value").is_not_null())
        ranks = [
            None if out_of is tested and gene["p_value"] is None else int((out_of["mean"] > gene["mean"]).sum()) + 1
            for out_of in (tested, block)
        ]
        remark = str(gene.get("test") or "")
        rows.append(
            [
                gene["symbol"],
                ranks[0],
                len(tested),
                ranks[1],
                len(block),
                *(gene.get(column) for column in _NAMED),
                remark,
            ]
        )
        best, total = (ranks[0], len(tested)) if ranks[0] is not None else (ranks[1], len(block))
        kind = "tested" if ranks[0] is not None else "perturbed (not tested)"
        tiles.append((f"rank of {gene['symbol']}", f"{best:,}", f"of {total:,} {kind} genes"))
    return Table(_NAMED_COLUMNS, rows, "Named genes, wherever they rank (1 is the highest mean shift)."), tiles


def _symbols(block: pl.DataFrame, named: Sequence[str]) -> list[str]:
    wanted = {name.lower() for name in named}
    found = block.filter(pl.col("symbol").str.to_lowercase().is_in(wanted) | pl.col("ensembl_id").is_in(list(named)))
    return found["symbol"].to_list()


def _pictures(
    block: pl.DataFrame, tested: pl.DataFrame, what: str, threshold: float, highlight: Sequence[str], top: int
) -> Pictures:
    has_excess = "excess" in block.columns and block["excess"].null_count() < len(block)
    effect = pl.coalesce("excess", "mean") if has_excess else pl.col("mean")
    volcano = plots.volcano(
        block.select(effect).to_series().to_numpy(),
        block["fdr"].fill_null(np.nan).to_numpy(),
        block["symbol"].to_list(),
        effect_label=f"{what}, minus that of matched genes" if has_excess else what,
        threshold=threshold,
        significant=block["significant"].to_numpy() if "significant" in block.columns else None,
        highlight=highlight,
    )
    bars = plots.gene_bars(
        tested["mean"].to_numpy(),
        tested["ci_low"].fill_null(np.nan).to_numpy(),
        tested["ci_high"].fill_null(np.nan).to_numpy(),
        tested["symbol"].to_list(),
        effect_label=f"mean {what}",
        num_each=min(top, 15),
        highlight=highlight,
    )
    return Pictures(
        [
            Picture(
                volcano,
                f"Volcano plot: {what} against significance",
                "Named genes are circled. FDR: Benjamini and Hochberg.",
            ),
            Picture(bars, f"Genes of highest and lowest {what}", "Tested genes; lines are 95 % intervals."),
        ]
    )


def _gene_table(genes: pl.DataFrame, caption: str) -> Table:
    columns = [name for name in _COLUMNS if name in genes.columns]
    rows = [list(row) for row in genes.select(columns).iter_rows()]
    return Table([_COLUMNS[name] for name in columns], rows, caption)


def _plain_table(genes: pl.DataFrame, rows: int) -> Block:
    if genes.is_empty():
        return Details("Genes", "none")
    return Table(
        genes.columns,
        [list(row) for row in genes.head(rows).iter_rows()],
        f"The first {min(rows, len(genes))} of {len(genes)} rows.",
    )
