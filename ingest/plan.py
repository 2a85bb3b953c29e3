"""What there is to do: sources looked at once, and cut into work units. All is pure but `inspect`."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.hashing import digest_json, digest_table
from corpus.manifest import Record
from corpus.schema import FORMAT_VERSION
from corpus.species import SPECIES
from corpus.store import match_uris
from ingest.formats import Features
from ingest.mapping import GeneMapper, read_aliases
from ingest.open import fingerprint, open_source, version
from ingest.readers.detect import dataset_name, guess_format
from ingest.settings import IngestSettings, Mapping, Source


class MappingReport(Record):
    """Where the features of a source went."""

    features: int
    mapped: int
    unmapped: int
    ambiguous: int
    duplicates_summed: int
    collisions: dict[str, list[str]]
    steps: dict[str, int]
    unmapped_examples: list[str]
    any_case: dict[str, str]


class Inspection(Record):
    """A source as found."""

    source: Source
    dataset_id: str
    sha256: str
    version: str
    size_bytes: int
    num_cells: int
    num_entries: int
    layer: str
    detected: dict[str, str] = {}
    obs_columns: list[str]
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
        # The question mark of a Census query is no pattern.
        uris = [source.uri] if source.uri.startswith("census://") else match_uris(source.uri)
        if not uris:
            raise UserError(f"{source.uri}: no file matches")
        if source.dataset_id is not None and len(uris) > 1:
            raise UserError(f"{source.uri}: dataset_id {source.dataset_id!r} is one name for {len(uris)} files")
        for uri in uris:
            one = source.model_copy(update={"uri": uri})
            one = one.model_copy(update={"format": guess_format(one)})
            found.append(one.model_copy(update={"dataset_id": source.dataset_id or dataset_name(one)}))
    names = [source.dataset_id for source in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = found[names.index(name)].uri
            raise UserError(f"{found[i].uri}: dataset_id {name!r} is taken by {first}; set `dataset_id`")
    return found


@dataclass(frozen=True)
class Names:
    """How names become genes in this run: small enough to send to a worker, which builds its mapper once.

    Parameters
    ----------
    settings
        Rules.
    genes
        Gene table to map to (`ingest.vocabulary.mapping_genes`).
    num_preferred
        As for `load_mapper`.
    hash
        `mapping_hash` of all this.
    """

    settings: Mapping
    genes: pl.DataFrame
    num_preferred: int
    hash: str

    @classmethod
    def of(cls, settings: Mapping, genes: pl.DataFrame, num_preferred: int = 0) -> "Names":
        """Hash the tables once."""
        return cls(settings, genes, num_preferred, mapping_hash(settings, genes, num_preferred))

    def mapper(self) -> GeneMapper:
        """The mapper, built once in a process: it takes half a second."""
        if self.hash not in _MAPPERS:
            _MAPPERS[self.hash] = load_mapper(self.settings, self.genes, self.num_preferred)
        return _MAPPERS[self.hash]


_MAPPERS: dict[str, GeneMapper] = {}


def load_mapper(mapping: Mapping, genes: pl.DataFrame, num_preferred: int = 0) -> GeneMapper:
    """Mapper that the settings ask for.

    Parameters
    ----------
    genes
        Gene table to map to; its first `num_preferred` rows are a given vocabulary, which shared names mean first.
    """
    return GeneMapper(
        genes,
        None if mapping.aliases is None else read_aliases(mapping.aliases),
        case_insensitive=mapping.case_insensitive,
        species=mapping.species,
        preferred=np.arange(len(genes)) < num_preferred if num_preferred else None,
    )


def mapping_hash(mapping: Mapping, genes: pl.DataFrame, num_preferred: int = 0) -> str:
    """Hash of the tables and rules by which names become genes (not of where the tables lie)."""
    tables = [genes]
    if mapping.aliases is not None:
        tables.append(read_aliases(mapping.aliases))
    rules = [mapping.species if mapping.species in SPECIES else "other", mapping.case_insensitive, num_preferred]
    return digest_json([*(digest_table(table.to_arrow()) for table in tables), *rules])


def inspect(source: Source, mapper: GeneMapper, settings: Mapping) -> Inspection:
    """Look at a source: content hash, size, layer, gene names.

    Raises
    ------
    UserError
        If it is missing or broken, its hash is not the expected one, cell names repeat, or too few genes are mapped.
    """
    if source.species not in {None, settings.species}:
        raise UserError(f"{source.uri}: its species is {source.species}, that of this corpus {settings.species}")
    source = source.model_copy(update={"species": settings.species})
    seen = version(source)
    sha256, size_bytes = fingerprint(source)
    if source.sha256 is not None and sha256 != source.sha256.lower():
        raise UserError(f"{source.uri}: SHA-256 is {sha256}, expected {source.sha256}")
    matrix = open_source(source, sha256, lambda names: mapper.map(Features(list(names))).coverage)
    try:
        # Found out once: workers that read the source's parts need not find out again.
        source = source.model_copy(update={"orientation": matrix.detected.get("orientation", source.orientation)})
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
        if genes.duplicates and settings.on_duplicates == "refuse":
            twice = "; ".join(f"{gene}: {', '.join(names)}" for gene, names in list(genes.collisions.items())[:5])
            raise UserError(
                f"{source.uri}: {genes.duplicates} features are genes that another feature is already "
                f"(mapping.on_duplicates = 'refuse'): {twice}"
            )
        return Inspection(
            source=source,
            dataset_id=source.dataset_id or "",
            sha256=sha256,
            version=seen,
            size_bytes=size_bytes,
            num_cells=matrix.num_cells,
            num_entries=matrix.num_entries,
            layer=matrix.layer,
            detected=matrix.detected,
            obs_columns=matrix.obs_columns(),
            mapping=MappingReport(
                features=len(genes.rows),
                mapped=int((genes.rows >= 0).sum()),
                unmapped=genes.steps.get("unmapped", 0),
                ambiguous=genes.steps.get("ambiguous", 0),
                duplicates_summed=genes.duplicates,
                collisions=genes.collisions,
                steps=genes.steps,
                unmapped_examples=genes.unmapped,
                any_case=genes.any_case,
            ),
        )
    finally:
        matrix.close()


def cut(inspections: list[Inspection], settings: IngestSettings, mapping: str) -> list[WorkUnit]:
    """Cut sources into units of about `entries_per_unit` non-zero counts, by rows.

    The ids depend on contents and settings, never on paths, so a moved source is not ingested again.

    Parameters
    ----------
    mapping
        `mapping_hash` of the run.
    """
    rules = settings.quality_control
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
                "mapping": mapping,
                "gene_column": found.source.gene_column,
                "genomes": found.source.genomes,
                "names": [found.source.features, found.source.barcodes],
                "obs": [found.source.obs, found.source.labels, settings.extra_obs],
                "filters": [found.source.obs_filters, rules.obs_filters, rules.primary_data_only],
            }
            units.append(WorkUnit(inspection=found, start=start, stop=stop, cells_id=digest_json(decides)))
    return units


def plan_hash(
    units: list[WorkUnit], settings: IngestSettings, given: str | None = None, added_to: str | None = None
) -> str:
    """Name of the whole run: the same plan gives the same shards.

    Parameters
    ----------
    given
        Hash of a vocabulary that exists before the run (not where it lies).
    added_to
        Plan of the manifest that is added to.
    """
    rules = {
        "units": [unit.cells_id for unit in units],
        "quality_control": settings.quality_control.thresholds(),
        "vocabulary": settings.vocabulary.model_dump(exclude={"dictionary", "dictionary_medians", "corpus"}),
        "min_count_coverage": settings.mapping.min_count_coverage,
        "given_vocabulary": given,
        "added_to": added_to,
    }
    return digest_json(rules)
