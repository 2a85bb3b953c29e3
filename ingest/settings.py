"""Settings of an ingest run."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from corpus.settings import Settings

SourceFormat = Literal["h5ad", "loom", "10x_h5", "mtx", "text", "rdata", "census"]


class Source(Settings):
    """One source file (or folder of a 10x matrix) and what is known about it."""

    uri: str
    """Local path, `s3://...` or `census://ORGANISM?QUERY`; a pattern with `*` stands for every file or folder that
    matches, each its own dataset."""
    dataset_id: str | None = None
    """Name of the dataset, unique in the corpus; the file name without its suffix by default."""
    format: SourceFormat | None = None
    """File format; guessed from the name by default."""
    species: str | None = None
    """Species whose genes are read where a file holds several; that of `mapping` by default, and no other."""
    layer: str | None = None
    """Matrix of raw counts. h5ad: `X`, `raw.X` or the name of a layer; by default `raw.X` where it exists, else `X`.
    loom: the name of a layer. R: the name of an object. Census: the name of an X layer, `raw` by default."""
    gene_column: str | None = None
    """Feature column that holds gene names or ids; by default the one with most Ensembl ids, else the index."""
    genomes: dict[str, str] = {}
    """Genome name or prefix to species, such as `{refA = "mouse"}`, for names that are not known."""
    orientation: Literal["genes_x_cells", "cells_x_genes"] | None = None
    """Which way a text matrix lies; by default the way in which more names are genes."""
    features: str | None = None
    """Name of the feature file beside a .mtx matrix, where it cannot be guessed."""
    barcodes: str | None = None
    """Name of the barcode file beside a .mtx matrix, where it cannot be guessed."""
    obs: dict[str, str] = {}
    """Corpus column to the source's column, such as `{cell_type = "celltype"}`; equal names need no entry."""
    labels: dict[str, str] = {}
    """Corpus column to a fixed label, such as `{tissue = "lung"}`, for all cells of the source."""
    obs_filters: dict[str, list[str]] = {}
    """This source's column to the values of cells to keep, such as `{filter_pass = ["1", "True"]}`."""
    sha256: str | None = None
    """Expected SHA-256 of the file (of a folder: the fingerprint that `ingest plan` shows)."""


Preset = Literal["published", "common"]

PRESETS: dict[str, dict[str, int | float | None]] = {
    "published": {
        "max_counts": 20_000,
        "min_genes": 7,
        "counts_sd": 3.0,
        "mito_counts_sd": 3.0,
        "max_mito_fraction": None,
    },
    "common": {
        "max_counts": None,
        "min_genes": 200,
        "counts_sd": None,
        "mito_counts_sd": None,
        "max_mito_fraction": 0.2,
    },
}
"""Thresholds by name: those of Mouse-Geneformer (Ito et al. 2025), and those that most tutorials start from."""


class Doublets(Settings):
    """Search for doublets, on the cells that passed the other rules (`pip install "scanpy[scrublet]"`)."""

    method: Literal["none", "scrublet"] = "none"
    """`scrublet` (Wolock et al., Cell Systems 8, 281-291, 2019) needs the optional extra `doublets`."""
    batch: str | None = None
    """Label column whose values are searched apart, such as `donor_id`: doublets form within a sample."""
    expected_rate: float = Field(0.05, gt=0, lt=1)
    """Share of doublets to expect."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Score above which a cell is dropped; by default the valley between the two peaks of simulated scores."""
    min_cells: int = Field(100, ge=50)
    """A smaller sample is not searched; the report says so."""
    max_cells: int = Field(50_000, ge=100)
    """A larger sample is refused, since one worker holds it in memory: name its parts with `batch`."""
    seed: int = 0
    """Seed of the simulated doublets."""


class QualityControl(Settings):
    """Which cells are kept; every dropped cell is counted under the first rule that drops it."""

    preset: Preset = "published"
    """Defaults of the thresholds: `published`, or `common` (200 genes, 20 % mitochondrial, no windows)."""
    obs_filters: dict[str, list[str]] = {}
    """Source's column to the values of cells to keep, such as `{filter_pass = ["1", "True"]}`, in every source that has
    the column; a source's own `obs_filters` must find its columns."""
    primary_data_only: bool = True
    """Drop cells whose `is_primary_data` is false: CELLxGENE's mark of a cell that another dataset holds too."""
    max_counts: int | None = Field(20_000, ge=1)
    """Highest total count of a cell (a stand-in for doublet removal); `none` to switch off."""
    min_genes: int = Field(7, ge=1)
    """Lowest number of detected genes; below 7, masking 15 % may hide none."""
    max_mito_fraction: float | None = Field(None, gt=0, le=1)
    """Highest share of mitochondrial counts; not part of the published rules."""
    counts_sd: float | None = Field(3.0, gt=0)
    """Total counts must lie within this many standard deviations of the dataset's mean; `none` to switch off."""
    mito_counts_sd: float | None = Field(3.0, gt=0)
    """The same for the counts (not the share) of mitochondrial genes."""
    doublets: Doublets = Doublets()
    """Search for doublets, off by default."""
    drop_duplicates: bool = True
    """Drop a cell whose counts equal those of an earlier cell of the corpus, gene by gene."""
    duplicate_min_genes: int = Field(50, ge=1)
    """Cells with fewer genes are never taken for duplicates: two real ones may well be equal by chance."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # TOML has no null, and on the command line everything is text.
        given = {key: None if value == "none" else value for key, value in given.items()}
        return {**PRESETS.get(given.get("preset", "published"), {}), **given}

    def thresholds(self) -> dict[str, Any]:
        """What decides about a cell once its source's own filters are applied; the preset's name does not."""
        return self.model_dump(exclude={"preset", "obs_filters", "primary_data_only"})


class Mapping(Settings):
    """How the names in a source become Ensembl ids."""

    species: str = "mouse"
    """`mouse`, `human`, or the path of a Parquet table of your own (see corpus/resources/README.md)."""
    aliases: Path | None = None
    """Table with columns `alias, ensembl_id` (csv, tsv or Parquet, may be gzipped), asked after current symbols."""
    case_insensitive: bool = False
    """As a last step, match symbols whatever their case; every such match is reported."""
    on_duplicates: Literal["sum", "refuse"] = "sum"
    """What to do where several features of a source are one gene: sum their counts, or stop and name them."""
    min_gene_coverage: float = Field(0.5, ge=0, le=1)
    """Refuse a source of whose genes a smaller share is mapped."""
    min_count_coverage: float = Field(0.7, ge=0, le=1)
    """Refuse a source of whose counts (UMIs) a smaller share falls on mapped genes."""


class Vocabulary(Settings):
    """Which mapped genes become tokens, and by which medians they are ranked."""

    biotypes: list[str] | None = None
    """Biotypes to keep, such as `["protein_coding", "miRNA"]` (human Geneformer); all by default."""
    dictionary: Path | None = None
    """A published vocabulary with its own tokens and medians: Parquet (`ensembl_id, token, median[, symbol]`), or the
    pickled token dictionary together with `dictionary_medians`."""
    dictionary_medians: Path | None = None
    """The pickled median dictionary that belongs to a pickled token dictionary."""
    corpus: str | None = None
    """URI of a corpus whose gene table and medians are used as they are (evaluation sets)."""
    medians: Literal["exact", "tdigest"] = "exact"
    """`tdigest` approximates medians as the published dictionaries do (optional extra `tdigest`); it depends on the cut
    into work units."""
    total: Literal["all_genes", "vocabulary"] = "all_genes"
    """What counts into a cell's total when medians are taken: all genes, or (published mouse code) those of the
    vocabulary. Given the medians, the order of a cell's genes does not depend on it."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Vocabulary":
        if self.dictionary_medians is not None and self.dictionary is None:
            raise ValueError("dictionary_medians needs dictionary")
        given = {"dictionary": self.dictionary, "corpus": self.corpus}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError("dictionary and corpus exclude each other: both bring a whole vocabulary")
        chosen = {name for name in ("biotypes", "medians", "total") if name in self.model_fields_set}
        changed = {name for name in chosen if getattr(self, name) != type(self).model_fields[name].default}
        if named and changed:
            raise ValueError(f"{named[0]} brings genes and medians of its own; {sorted(changed)[0]} has no place here")
        return self


class IngestSettings(Settings):
    """Everything that decides what a corpus holds."""

    sources: list[Source] = []
    """Source files."""
    sources_table: str | None = None
    """CSV table of further sources, a column for each setting of a source (`labels.tissue` for one label)."""
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
