"""A small published vocabulary of human genes."""

from pathlib import Path
from typing import Any

import polars as pl

from corpus.dictionaries import Dictionary
from corpus.species import load_genes

HUMAN_CODING = load_genes("human").filter(pl.col("biotype") == "protein_coding")[:300]
HUMAN = HUMAN_CODING[:40]
IDS = HUMAN["ensembl_id"].to_list()
RETIRED = "ENSGR0000182378"


def dictionary(**changes: Any) -> Dictionary:
    """Tokens against the order of ids, from 2 on, one of them retired from today's annotation."""
    names = [*reversed(IDS[:30]), RETIRED]
    tokens = {"<pad>": 0, "<mask>": 1} | {name: 2 + i for i, name in enumerate(names)}
    medians = {name: 0.5 + 0.25 * (i % 5) for i, name in enumerate(names)}
    return Dictionary("toy", changes.get("tokens", tokens), changes.get("medians", medians), {})


def save(found: Dictionary, path: Path) -> Path:
    table = {
        "ensembl_id": list(found.tokens),
        "token": list(found.tokens.values()),
        "median": [found.medians.get(name) for name in found.tokens],
    }
    pl.DataFrame(table).write_parquet(path)
    return path
