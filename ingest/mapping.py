"""From the gene names of a source to rows of the species' gene table."""

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.hashing import digest_json
from ingest.formats import GENE_EXPRESSION, OTHER_SPECIES, Features

# Old annotations write the copy on the Y chromosome of a pseudoautosomal gene as ENSGR and ten digits.
_ENSEMBL = re.compile(r"^(ENS[A-Z]*G(?:\d{11}|R\d{10}))(\.\d+)?$", re.IGNORECASE)
_PARTS = re.compile(r"[|;,\s]+|_+(?=ENS[A-Z]*GR?\d)|(?<=\d)_+", re.IGNORECASE)
_SPIKE_IN = re.compile(r"^ERCC-\d{5}$")
_ASSEMBLIES = {
    "mouse": ("mm9", "mm10", "mm39", "GRCm37", "GRCm38", "GRCm39"),
    "human": ("hg19", "hg38", "GRCh37", "GRCh38"),
}
_PREFIX = re.compile(rf"^({'|'.join(name for names in _ASSEMBLIES.values() for name in names)})_+(?=.)")
_EXAMPLES = 20
_MAPS_KEPT = 4


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
        no gene of this species (antibody, spike-in, other genome) and is left out of every count.
    steps
        How many features each step mapped or left: `ensembl_id`, `compound` (an id inside a longer name), `symbol`,
        `alias`, `any_case`, `unmapped`, `ambiguous`, `not_gene_expression`, `spike_in`, `other_species`.
    duplicates
        Mapped features beyond the first of their gene: their counts are summed.
    collisions
        `Ensembl id -> names` of some genes that several features are.
    unmapped
        Some names that were not mapped.
    any_case
        `name -> Ensembl id` of every match by the case-insensitive fallback.
    """

    rows: np.ndarray
    steps: dict[str, int]
    duplicates: int
    collisions: dict[str, list[str]]
    unmapped: list[str]
    any_case: dict[str, str]

    @property
    def coverage(self) -> float:
        """Share of the gene features that are mapped."""
        genes = int((self.rows >= -1).sum())
        return float((self.rows >= 0).sum() / genes) if genes else 0.0


class GeneMapper:
    """Maps names to rows of a gene table.

    The steps, in order: an Ensembl id in any case, with or without version; a longer name that holds one
    (`Xkr4_ENSMUSG00000051951.5`); a current symbol; an alias; a symbol, then an alias, in any case. A name that several
    genes share means the only one among them that is in `preferred`, or else the only protein-coding one, or else none.

    In a source most of whose symbols are in another case (upper-cased mouse genes), symbols in any case come before
    aliases: there `AGT` is Agt, although it is also an old name of another gene.

    Parameters
    ----------
    genes
        Gene table of the species (`corpus.species.load_genes`).
    aliases
        Lower-priority names: columns `alias`, `ensembl_id`; an alias may be a retired Ensembl id.
    case_insensitive
        Whether to match what is left in any case.
    species
        `mouse` and `human` know which assembly prefixes (`mm10_`, `GRCh38_`) are their own.
    preferred
        bool[genes]: the genes of a given vocabulary.
    """

    def __init__(
        self,
        genes: pl.DataFrame,
        aliases: pl.DataFrame | None = None,
        *,
        case_insensitive: bool = False,
        species: str = "",
        preferred: np.ndarray | None = None,
    ) -> None:
        self._ids = genes["ensembl_id"].to_list()
        self._row_of_id = {ensembl_id.upper(): row for row, ensembl_id in enumerate(self._ids)}
        self._own_assemblies = _ASSEMBLIES.get(species, ())
        coding = (genes["biotype"] == "protein_coding").fill_null(False).to_numpy()
        ranks = [coding] if preferred is None else [preferred, coding]
        self._by_symbol = _unambiguous(zip(genes["symbol"], range(len(genes)), strict=True), ranks)
        self._by_alias: dict[str, int] = {}
        self.unknown_aliases = 0
        """Rows of the alias table whose Ensembl id is no gene of the species."""
        if aliases is not None:
            named = aliases.select("alias", "ensembl_id").drop_nulls().iter_rows()
            pairs = [(alias, self._row_of_id.get(gene.upper(), -1)) for alias, gene in named]
            self.unknown_aliases = sum(row < 0 for _, row in pairs)
            self._by_alias = _unambiguous(((alias, row) for alias, row in pairs if row >= 0), ranks)
        self._maps: OrderedDict[str, GeneMap] = OrderedDict()
        self._by_lower: dict[str, int] = {}
        if case_insensitive:
            lowered = (symbol.lower() for symbol in genes["symbol"])
            self._by_lower = _unambiguous(zip(lowered, range(len(genes)), strict=True), ranks)
            aliases_lowered = ((alias.lower(), row) for alias, row in self._by_alias.items() if row >= 0)
            self._by_lower = _unambiguous(aliases_lowered, ranks) | self._by_lower

    def map(self, features: Features) -> GeneMap:
        """Map every feature of a source; the last few results are kept, for the other units of the source."""
        key = digest_json([features.names, features.kinds])
        if key not in self._maps:
            self._maps[key] = self._map(features)
            while len(self._maps) > _MAPS_KEPT:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def _map(self, features: Features) -> GeneMap:
        rows = np.full(len(features.names), -1, dtype=np.int32)
        steps: Counter[str] = Counter()
        unmapped: list[str] = []
        any_case: dict[str, str] = {}
        exact = sum(name in self._by_symbol for name in features.names)
        other_case = sum(name.lower() in self._by_lower for name in features.names) > 2 * exact
        for i, name in enumerate(features.names):
            kind = GENE_EXPRESSION if features.kinds is None else features.kinds[i]
            row, step = self._find(name, kind, other_case)
            rows[i] = row
            steps[step] += 1
            if step in {"unmapped", "ambiguous"} and len(unmapped) < _EXAMPLES:
                unmapped.append(name)
            if step == "any_case":
                any_case[name] = self._ids[row]
        mapped, number = np.unique(rows[rows >= 0], return_counts=True)
        collisions = {
            self._ids[row]: [features.names[i] for i in np.flatnonzero(rows == row)]
            for row in mapped[number > 1][:_EXAMPLES]
        }
        duplicates = int((number - 1).sum())
        return GeneMap(rows, dict(sorted(steps.items())), duplicates, collisions, unmapped, any_case)

    def _find(self, name: str, kind: str, other_case: bool) -> tuple[int, str]:
        if kind == OTHER_SPECIES:
            return -2, "other_species"
        if kind != GENE_EXPRESSION:
            return -2, "not_gene_expression"
        name = name.strip()
        prefix = _PREFIX.match(name) if "_" in name else None
        if prefix:
            if prefix[1] in self._own_assemblies:
                name = name[prefix.end() :]
            elif self._own_assemblies:
                return -2, "other_species"
            # A species of the user's own: nobody knows whose prefix it is, and the name stays unmapped.
        if name.startswith("ERCC-") and _SPIKE_IN.match(name):
            return -2, "spike_in"
        row = self._row_of_id.get(name.upper(), -1)  # before any pattern is tried: a source has 30,000 names
        row = self._by_id(name) if row < 0 else row
        if row >= 0:
            return row, "ensembl_id"
        if "ENS" in name.upper():
            row = self._by_part(name)
            if row >= 0:
                return row, "compound"
            match = _ENSEMBL.match(name)
            name = match[1].upper() if match else name  # a retired id may be an alias
        ambiguous = False
        last = [("alias", self._by_alias, name), ("any_case", self._by_lower, name.lower())]
        for step, table, key in [("symbol", self._by_symbol, name), *(reversed(last) if other_case else last)]:
            row = table.get(key, -1)
            if row >= 0:
                return row, step
            ambiguous |= key in table
        return -1, "ambiguous" if ambiguous else "unmapped"

    def _by_id(self, name: str) -> int:
        match = _ENSEMBL.match(name) if name[:3].upper() == "ENS" else None
        # Other species' ids (and users' own) may have another form: they count as they stand.
        return self._row_of_id.get((match[1] if match else name).upper(), -1)

    def _by_part(self, name: str) -> int:
        """Row of the only gene whose id is part of the name, or else whose symbol is; -1 if there is not just one."""
        parts = [part for part in _PARTS.split(name) if part]
        ids = [part for part in parts if _ENSEMBL.match(part)]
        if not ids or len(parts) == 1:
            return -1
        rows = {self._by_id(part) for part in ids} - {-1}
        rows = rows or {self._by_symbol.get(part, -1) for part in parts} - {-1}
        return rows.pop() if len(rows) == 1 else -1


def _unambiguous(pairs: Iterable[tuple[str, int]], ranks: Sequence[np.ndarray]) -> dict[str, int]:
    """Name to row. A name of several genes means the only one that the first mask (of those that hold any) holds."""
    found: dict[str, set[int]] = {}
    for name, row in pairs:
        found.setdefault(name, set()).add(row)
    table = {}
    for name, rows in found.items():
        for mask in ranks:
            if len(rows) > 1:
                rows = {row for row in rows if mask[row]} or rows
        table[name] = min(rows) if len(rows) == 1 else -1
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
