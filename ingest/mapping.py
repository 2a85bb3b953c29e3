"""From the gene names of a source to rows of the species' gene table."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from corpus.errors import UserError
from ingest.formats import Features

_ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(\.\d+)?$", re.IGNORECASE)
_SPIKE_IN = re.compile(r"^ERCC-\d{5}$")
_EXAMPLES = 20


def ensembl_share(names: Sequence[str]) -> float:
    """Share of names that have the form of an Ensembl gene id, with or without version."""
    return sum(_ENSEMBL.match(name) is not None for name in names) / max(len(names), 1)


@dataclass(frozen=True)
class GeneMap:
    """Where each feature of a source goes.

    Parameters
    ----------
    rows
        int32[features]: row of the gene table; -1 for a gene that is counted but not mapped; -2 for a feature that is
        no gene (antibody, spike-in) and is left out of every count.
    steps
        How many features each step mapped or left: `ensembl_id`, `symbol`, `alias`, `any_case`, `unmapped`,
        `ambiguous`, `not_gene_expression`, `spike_in`.
    duplicates
        Mapped features beyond the first of their gene: their counts are summed.
    unmapped
        Some names that were not mapped.
    any_case
        `name -> Ensembl id` of every match by the case-insensitive fallback.
    """

    rows: np.ndarray
    steps: dict[str, int]
    duplicates: int
    unmapped: list[str]
    any_case: dict[str, str]

    @property
    def coverage(self) -> float:
        """Share of the gene features that are mapped."""
        genes = int((self.rows >= -1).sum())
        return float((self.rows >= 0).sum() / genes) if genes else 0.0


class GeneMapper:
    """Maps names to rows of a gene table.

    Parameters
    ----------
    genes
        Gene table of the species (`corpus.species.load_genes`).
    aliases
        Lower-priority names: columns `alias`, `ensembl_id`. An alias of several genes maps nothing.
    case_insensitive
        Whether to match what is left by symbol in any case.
    """

    def __init__(
        self, genes: pl.DataFrame, aliases: pl.DataFrame | None = None, *, case_insensitive: bool = False
    ) -> None:
        self._ids = genes["ensembl_id"].to_list()
        self._row_of_id = {ensembl_id: row for row, ensembl_id in enumerate(self._ids)}
        coding = (genes["biotype"] == "protein_coding").to_list()
        self._by_symbol = _unambiguous(zip(genes["symbol"], range(len(genes)), strict=True), coding)
        self._by_alias: dict[str, int] = {}
        if aliases is not None:
            named = aliases.select("alias", "ensembl_id").iter_rows()
            pairs = ((alias, self._row_of_id.get(gene)) for alias, gene in named)
            self._by_alias = _unambiguous(((alias, row) for alias, row in pairs if alias and row is not None), coding)
        self._by_lower: dict[str, int] = {}
        if case_insensitive:
            lowered = ((symbol.lower(), row) for symbol, row in self._by_symbol.items() if row >= 0)
            self._by_lower = _unambiguous(lowered, coding)

    def map(self, features: Features) -> GeneMap:
        """Map every feature of a source."""
        rows = np.full(len(features.names), -1, dtype=np.int32)
        steps: Counter[str] = Counter()
        unmapped: list[str] = []
        any_case: dict[str, str] = {}
        for i, name in enumerate(features.names):
            kind = "Gene Expression" if features.kinds is None else features.kinds[i]
            row, step = self._find(name, kind)
            rows[i] = row
            steps[step] += 1
            if step in {"unmapped", "ambiguous"} and len(unmapped) < _EXAMPLES:
                unmapped.append(name)
            if step == "any_case":
                any_case[name] = self._ids[row]
        mapped = rows[rows >= 0]
        return GeneMap(rows, dict(sorted(steps.items())), len(mapped) - len(np.unique(mapped)), unmapped, any_case)

    def _find(self, name: str, kind: str) -> tuple[int, str]:
        if kind != "Gene Expression":
            return -2, "not_gene_expression"
        if _SPIKE_IN.match(name):
            return -2, "spike_in"
        match = _ENSEMBL.match(name)
        if match:
            row = self._row_of_id.get(match[1].upper(), -1)
            return row, "ensembl_id" if row >= 0 else "unmapped"
        ambiguous = False
        for step, table, key in (
            ("symbol", self._by_symbol, name),
            ("alias", self._by_alias, name),
            ("any_case", self._by_lower, name.lower()),
        ):
            row = table.get(key, -1)
            if row >= 0:
                return row, step
            ambiguous |= key in table
        return -1, "ambiguous" if ambiguous else "unmapped"


def _unambiguous(pairs: Iterable[tuple[str, int]], coding: list[bool]) -> dict[str, int]:
    """Name to row. A name of several genes means its only protein-coding one; if there is no such, -1."""
    found: dict[str, set[int]] = {}
    for name, row in pairs:
        found.setdefault(name, set()).add(row)
    table = {}
    for name, rows in found.items():
        candidates = rows if len(rows) == 1 else {row for row in rows if coding[row]}
        table[name] = min(candidates) if len(candidates) == 1 else -1
    return table


def read_aliases(path: Path) -> pl.DataFrame:
    """Read a user's alias table.

    Raises
    ------
    UserError
        If the file is missing, unreadable or lacks a column.
    """
    try:
        if path.suffix == ".parquet":
            table = pl.read_parquet(path)
        else:
            separator = "," if ".csv" in path.suffixes else "\t"
            table = pl.read_csv(path, separator=separator, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: cannot read the alias table: {error}") from error
    missing = {"alias", "ensembl_id"} - set(table.columns)
    if missing:
        there = ", ".join(table.columns)
        raise UserError(f"{path}: the alias table lacks the column {sorted(missing)[0]!r}; it has {there}")
    return table
