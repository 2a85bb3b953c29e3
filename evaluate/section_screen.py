"""Report section on a screen: how far its order of genes can be trusted."""

from typing import Any

from corpus.store import Store
from evaluate.page import Block, Facts, Note, Section, Table
from evaluate.report_inputs import read_json, read_table

_WEAK = 0.8


def screen_section(screen: str, top: int) -> Section:
    """Describe a screen and its agreement with exact deletions.

    Parameters
    ----------
    top
        Rows of the table of genes.

    Raises
    ------
    UserError
        If the folder lacks its files.
    """
    store = Store(screen)
    facts = read_json(store, "screen.json")
    goal = str(facts["goal"])
    genes = read_table(store, "screen.parquet", ["ensembl_id", "symbol", "n_cells", f"guess_{goal}", f"exact_{goal}"])
    agreement: dict[str, dict[str, Any]] = facts["agreement"]
    blocks: list[Block] = [
        Facts(
            [
                ("screen", screen),
                ("cells", facts["num_cells"]),
                ("genes ordered", facts["genes"]),
                ("passes of the screen", facts["forward_passes"]),
                ("passes of an exact scan", facts["all_passes"]),
                ("genes deleted exactly, to verify", len(facts["top"]) + len(facts["controls"])),
            ]
        ),
        Table(
            ["state", "rank correlation, random genes", "all verified genes", "same sign", "largest found", "of"],
            [
                [state, one["spearman_controls"], one["spearman"], one["same_sign"], one["top_overlap"], one["top"]]
                for state, one in agreement.items()
            ],
            "Guesses against exact deletions of the same genes in the same cells. The genes drawn at random speak for "
            "all genes.",
        ),
    ]
    found = agreement[goal]["spearman_controls"]
    if found is None or found < _WEAK:
        shown = "not defined" if found is None else f"only {found:.2f}"
        blocks.append(Note(f"The rank correlation towards {goal} is {shown}: use an exact scan of all genes instead."))
    names = ["symbol", "ensembl_id", "n_cells", f"guess_{goal}", f"exact_{goal}"]
    blocks.append(
        Table(
            ["gene", "Ensembl id", "cells", f"guessed shift to {goal}", "exact"],
            list(genes.select(names).head(top).iter_rows()),
            "The first genes of the order. A guess is no result; what counts is the exact scan.",
        )
    )
    caveat = (
        "The screen guesses the effect of deletions from gradients, to order genes for an exact scan. Genes chosen by "
        "it are no fair sample: p-values of a scan of them alone are too small."
    )
    return Section("screen", "Screen of deletions", blocks, caveats=[caveat])
