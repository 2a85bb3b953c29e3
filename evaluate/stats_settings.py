"""Settings of the statistics of perturbation scans."""

from typing import Literal, Self

from pydantic import Field, model_validator

from corpus.settings import Settings

Mode = Literal["goal_state_shift", "vs_null", "mixture_model", "aggregate_data", "aggregate_gene_shifts"]


class StatsSettings(Settings):
    """Statistics of a scan; docs/statistics.md has the formulas."""

    mode: Mode = "goal_state_shift"
    """goal_state_shift: each gene (or set) towards each state; vs_null: against its shifts in the scan `null_shifts`;
    mixture_model: genes with and without impact, by their similarity; aggregate_data: the shifts of a given set of
    genes, cell by cell; aggregate_gene_shifts: effect on each other gene's embedding."""
    null_shifts: str | None = None
    """vs_null: folder of the other scan, of the same model."""
    compare: str | None = None
    """goal_state_shift: folder of another scan (another model's, say), to list agreement and changes of sign."""
    compat: Literal["none", "geneformer"] = "none"
    """geneformer: also write geneformer.csv, with the published columns, computed as published (cells as replicates, a
    pool that holds the tested gene)."""
    pool_size: int | None = Field(100_000, ge=1)
    """compat: shifts drawn, by `seed`, into the pool that a gene is compared with; `none` for all of them."""
    seed: int = 0
    """Of that draw."""
    min_cells: int = Field(10, ge=1)
    """Genes perturbed in fewer cells are listed without a test."""
    min_donors: int = Field(3, ge=2)
    """Donors that a test over donors needs; with fewer, cells are compared, and the table says so."""
    min_cells_per_donor: int = Field(1, ge=1)
    """Cells of a donor that a gene needs for the donor to count."""
    null_genes: int = Field(500, ge=20)
    """Other genes, nearest in detection and rank, that a gene is compared with."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Of the intervals."""
    fdr: float = Field(0.05, gt=0, lt=1)
    """False discovery rate below which a gene is called significant."""
    top: int = Field(20, ge=1)
    """Genes named in the summary and in the pictures."""
    named_genes: list[str] = []
    """Genes (symbols or Ensembl ids) that are drawn and reported wherever they rank."""
    gene_sets: str | None = None
    """GMT file (name, description, symbols; tab-separated) of gene sets to test for enrichment among the ranked genes;
    needs the optional extra `enrichment`."""

    @model_validator(mode="before")
    @classmethod
    def _none_is_none(cls, given: object) -> object:
        # TOML has no null.
        if isinstance(given, dict) and given.get("pool_size") == "none":
            return {**given, "pool_size": None}
        return given

    @model_validator(mode="after")
    def _fits_mode(self) -> Self:
        if (self.mode == "vs_null") == (self.null_shifts is None):
            raise ValueError('null_shifts is needed by mode = "vs_null", and by no other mode')
        for name in ("compare", "gene_sets"):
            if getattr(self, name) is not None and self.mode != "goal_state_shift":
                raise ValueError(f'{name} belongs to mode = "goal_state_shift"')
        return self
