"""What there is to do: sources looked at once, and cut into work units. All is pure but `inspect`."""

import math
from itertools import pairwise
from pathlib import PurePosixPath

import polars as pl

from corpus.errors import UserError
from corpus.hashing import digest_json, digest_table
from corpus.manifest import Record
from corpus.schema import FORMAT_VERSION
from corpus.species import load_genes
from corpus.store import match_uris, split_uri
from ingest.formats import guess_format
from ingest.mapping import GeneMapper, read_aliases
from ingest.open import open_source
from ingest.settings import IngestSettings, Mapping, Source


class MappingReport(Record):
    """Where the features of a source went."""

    features: int
    mapped: int
    unmapped: int
    ambiguous: int
    duplicates_summed: int
    steps: dict[str, int]
    unmapped_examples: list[str]
    any_case: dict[str, str]


class Inspection(Record):
    """A source as found."""

    source: Source
    dataset_id: str
    sha256: str
    size_bytes: int
    num_cells: int
    num_entries: int
    layer: str
    mapping: MappingReport


class WorkUnit(Record):
    """A row range of one source; `cells_id` names everything that decides its cells in gene order."""

    inspection: Inspection
    start: int
    stop: int
    cells_id: str

    @property
    def cells(self) -> str:
        """Path inside the corpus of the unit's cells in gene order."""
        return f"cells/{self.cells_id}.parquet"


def expand(sources: list[Source]) -> list[Source]:
    """Replace patterns by the files that match, and give every source its dataset id.

    Raises
    ------
    UserError
        If nothing matches, or two sources get the same dataset id.
    """
    found: list[Source] = []
    for source in sources:
        uris = match_uris(source.uri)
        if not uris:
            raise UserError(f"{source.uri}: no file matches")
        if source.dataset_id is not None and len(uris) > 1:
            raise UserError(f"{source.uri}: dataset_id {source.dataset_id!r} is one name for {len(uris)} files")
        for uri in uris:
            # The folder's part of the name stays out: a corpus must not depend on where its sources lay.
            stem = PurePosixPath(uri).name.removesuffix(f".{guess_format(source.model_copy(update={'uri': uri}))}")
            found.append(source.model_copy(update={"uri": uri, "dataset_id": source.dataset_id or stem}))
    names = [source.dataset_id for source in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = found[names.index(name)].uri
            raise UserError(f"{found[i].uri}: dataset_id {name!r} is taken by {first}; set `dataset_id`")
    return found


def load_mapper(mapping: Mapping) -> tuple[pl.DataFrame, GeneMapper]:
    """Gene table of the species, and the mapper that the settings ask for."""
    genes = load_genes(mapping.species)
    aliases = None if mapping.aliases is None else read_aliases(mapping.aliases)
    return genes, GeneMapper(genes, aliases, case_insensitive=mapping.case_insensitive)


def mapping_hash(mapping: Mapping) -> str:
    """Hash of the tables and rules by which names become genes (not of where the tables lie)."""
    tables = [load_genes(mapping.species)]
    if mapping.aliases is not None:
        tables.append(read_aliases(mapping.aliases))
    return digest_json([*(digest_table(table.to_arrow()) for table in tables), mapping.case_insensitive])


def inspect(source: Source, mapper: GeneMapper, settings: Mapping) -> Inspection:
    """Look at a source: content hash, size, layer, gene names.

    Raises
    ------
    UserError
        If it is missing or broken, its hash is not the expected one, cell names repeat, or too few genes are mapped.
    """
    store, name = split_uri(source.uri)
    sha256 = store.sha256(name)
    if source.sha256 is not None and sha256 != source.sha256:
        raise UserError(f"{source.uri}: SHA-256 is {sha256}, expected {source.sha256}")
    matrix = open_source(source)
    try:
        barcodes = matrix.barcodes()
        if len(set(barcodes)) != len(barcodes):
            names = pl.Series(barcodes)
            repeated = names.filter(names.is_duplicated())[0]
            raise UserError(f"{source.uri}: cell name {repeated!r} occurs more than once; cell names must be unique")
        genes = mapper.map(matrix.features)
        if genes.coverage < settings.min_gene_coverage:
            raise UserError(
                f"{source.uri}: only {genes.coverage:.1%} of {len(genes.rows)} gene names are {settings.species} genes "
                f"(least: mapping.min_gene_coverage = {settings.min_gene_coverage:.0%}); not mapped, for example: "
                f"{', '.join(genes.unmapped[:5])}. Check mapping.species and gene_column, or give mapping.aliases"
            )
        return Inspection(
            source=source,
            dataset_id=source.dataset_id or "",
            sha256=sha256,
            size_bytes=store.size(name),
            num_cells=matrix.num_cells,
            num_entries=matrix.num_entries,
            layer=matrix.layer,
            mapping=MappingReport(
                features=len(genes.rows),
                mapped=int((genes.rows >= 0).sum()),
                unmapped=genes.steps.get("unmapped", 0),
                ambiguous=genes.steps.get("ambiguous", 0),
                duplicates_summed=genes.duplicates,
                steps=genes.steps,
                unmapped_examples=genes.unmapped,
                any_case=genes.any_case,
            ),
        )
    finally:
        matrix.close()


def cut(inspections: list[Inspection], settings: IngestSettings) -> list[WorkUnit]:
    """Cut sources into units of about `entries_per_unit` non-zero counts, by rows.

    The ids depend on contents and settings, never on paths, so a moved source is not ingested again.
    """
    genes = mapping_hash(settings.mapping)
    units = []
    for found in inspections:
        per_cell = max(found.num_entries / max(found.num_cells, 1), 1.0)
        rows = max(int(settings.entries_per_unit / per_cell), 1)
        # Equal parts, so that no unit is a small rest.
        parts = max(math.ceil(found.num_cells / rows), 1)
        edges = [round(part * found.num_cells / parts) for part in range(parts + 1)]
        for start, stop in pairwise(edges):
            decides = {
                "format": FORMAT_VERSION,
                "source": found.sha256,
                "rows": [start, stop],
                "layer": found.layer,
                "dataset": found.dataset_id,
                "genes": genes,
                "gene_column": found.source.gene_column,
                "obs": [found.source.obs, found.source.labels, settings.extra_obs],
            }
            units.append(WorkUnit(inspection=found, start=start, stop=stop, cells_id=digest_json(decides)))
    return units


def plan_hash(units: list[WorkUnit], settings: IngestSettings, frozen_genes: str | None = None) -> str:
    """Name of the whole run: the same plan gives the same shards."""
    rules = {
        "units": [unit.cells_id for unit in units],
        "quality_control": settings.quality_control.model_dump(),
        "vocabulary": settings.vocabulary.model_dump(),
        "min_count_coverage": settings.mapping.min_count_coverage,
        "frozen_genes": frozen_genes,
    }
    return digest_json(rules)
