"""Settings of an ingest run."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from corpus.settings import Settings


class Source(Settings):
    """One source file and what is known about it."""

    uri: str
    """Local path or `s3://...`; a pattern with `*` stands for every file that matches, each its own dataset."""
    dataset_id: str | None = None
    """Name of the dataset, unique in the corpus; the file name without its suffix by default."""
    format: Literal["h5ad"] | None = None
    """File format; guessed from the name by default."""
    layer: str | None = None
    """Matrix of raw counts: `X`, `raw.X` or the name of a layer; by default `raw.X` where it exists, else `X`."""
    gene_column: str | None = None
    """Column of `var` that holds gene names or ids; by default the one with most Ensembl ids, else the index."""
    obs: dict[str, str] = {}
    """Corpus column to the source's column, such as `{cell_type = "celltype"}`; equal names need no entry."""
    labels: dict[str, str] = {}
    """Corpus column to a fixed label, such as `{tissue = "lung"}`, for all cells of the source."""
    sha256: str | None = None
    """Expected SHA-256 of the file."""


class QualityControl(Settings):
    """Which cells are kept; every dropped cell is counted under the first rule, in this order, that drops it."""

    max_counts: int = Field(20_000, ge=1)
    """Highest total count of a cell (a stand-in for doublet removal)."""
    min_genes: int = Field(7, ge=1)
    """Lowest number of detected genes; below 7, masking 15 % may hide none."""
    counts_sd: float | None = Field(3.0, gt=0)
    """Total counts must lie within this many standard deviations of the dataset's mean; `none` to switch off."""
    mito_counts_sd: float | None = Field(3.0, gt=0)
    """The same for the counts (not the share) of mitochondrial genes."""
    max_mito_fraction: float | None = Field(None, gt=0, le=1)
    """Highest share of mitochondrial counts; not part of the published rules."""


class Mapping(Settings):
    """How the names in a source become Ensembl ids."""

    species: str = "mouse"
    """`mouse`, `human`, or the path of a Parquet table of your own (see corpus/resources/README.md)."""
    aliases: Path | None = None
    """Table with columns `alias, ensembl_id` (csv, tsv or Parquet, may be gzipped), asked after current symbols."""
    case_insensitive: bool = False
    """As a last step, match symbols whatever their case; every such match is reported."""
    min_gene_coverage: float = Field(0.5, ge=0, le=1)
    """Refuse a source of whose genes a smaller share is mapped."""
    min_count_coverage: float = Field(0.7, ge=0, le=1)
    """Refuse a source of whose counts (UMIs) a smaller share falls on mapped genes."""


class Vocabulary(Settings):
    """Which mapped genes become tokens."""

    biotypes: list[str] | None = None
    """Biotypes to keep, such as `["protein_coding", "miRNA"]` (human Geneformer); all by default."""


class IngestSettings(Settings):
    """Everything that decides what a corpus holds."""

    sources: list[Source] = Field(min_length=1)
    """Source files."""
    extra_obs: list[str] = []
    """Label columns to carry beside the CELLxGENE ones."""
    quality_control: QualityControl = QualityControl()
    """Rules for cells."""
    mapping: Mapping = Mapping()
    """Rules for gene names."""
    vocabulary: Vocabulary = Vocabulary()
    """Rules for tokens."""
    entries_per_unit: int = Field(32_000_000, ge=1000)
    """Non-zero counts of one work unit: memory of a worker (about 30 bytes each) and size of a shard."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> "IngestSettings":
        named = [source.dataset_id for source in self.sources if source.dataset_id]
        repeated = {name for name in named if named.count(name) > 1}
        if repeated:
            raise ValueError(f"dataset_id {sorted(repeated)[0]!r} is given to more than one source")
        return self
