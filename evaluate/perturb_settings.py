"""Settings of perturbation scans."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from corpus.settings import Settings

LAYERS = r"^(last|second_to_last|layer_[1-9]\d*|0|-[1-9]\d*)$"

Compat = Literal["none", "geneformer", "geneformer_v2"]


class PerturbationSettings(Settings):
    """What is done to which genes."""

    kind: Literal["delete", "overexpress", "knockdown", "activate", "knock_in"] = "delete"
    """delete removes a gene; overexpress puts it first; knockdown and activate move it down or up the ranking, by
    `rank_shift` places or by re-ranking after its count was multiplied by `fold_change`; knock_in puts it at `rank`."""
    genes: Literal["all"] | list[str] = "all"
    """"all": every gene of the cell's input; or a list of symbols and Ensembl ids."""
    genes_file: Path | None = None
    """Text file with one gene a line (# starts a comment), instead of `genes`."""
    combine: Literal["one_by_one", "joint", "pairs", "anchor"] = "one_by_one"
    """one_by_one: each gene alone; joint: the whole list at once; pairs: each gene and each pair of the list; anchor:
    the anchor, each gene, and the anchor with each gene."""
    anchor: str | None = None
    """Gene that combine = "anchor" pairs with the others."""
    null_lists: int = Field(0, ge=0)
    """joint: perturb so many random lists as well, each gene of the list replaced by one of like detection and rank, to
    test the list against them. 99 lists make 0.02 the lowest p-value."""
    absent: Literal["insert", "skip"] = "insert"
    """overexpress: what to do with a listed gene that the cell does not express."""
    require: Literal["all", "any"] = "all"
    """delete: whether a cell needs all genes of a set or any of them; the others are skipped and counted."""
    rank_shift: int | None = Field(None, ge=1)
    """knockdown, activate: number of places."""
    fold_change: float | None = Field(None, gt=0)
    """knockdown (below 1) and activate (above 1): factor on the gene's raw count, before the cell is ranked again."""
    rank: int | None = Field(None, ge=0)
    """knock_in: place of the gene afterwards, 0 is the top."""
    edit: Literal["after_truncation", "before_truncation"] = "after_truncation"
    """after_truncation (as published): the cell is what fits the model, then it is edited. before_truncation: the whole
    cell is edited, so that after a deletion the next gene moves up into the input."""
    min_cells: int = Field(1, ge=1)
    """genes = "all": leave out genes in the input of fewer than this many of the scanned cells."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        graded = self.kind in ("knockdown", "activate")
        if graded and (self.rank_shift is None) == (self.fold_change is None):
            raise ValueError(f"{self.kind} needs exactly one of rank_shift and fold_change")
        if not graded and (self.rank_shift is not None or self.fold_change is not None):
            raise ValueError("rank_shift and fold_change belong to knockdown and activate")
        if self.fold_change is not None and (self.fold_change < 1) != (self.kind == "knockdown"):
            raise ValueError("fold_change must be below 1 for knockdown and above 1 for activate")
        if (self.rank is None) == (self.kind == "knock_in"):
            raise ValueError("rank is needed by knock_in, and by no other kind")
        if (self.anchor is None) == (self.combine == "anchor"):
            raise ValueError('anchor is needed by combine = "anchor", and by no other combine')
        if self.genes_file is not None and self.genes != "all":
            raise ValueError("give either genes or genes_file")
        if self.lists_no_genes and self.combine in ("joint", "pairs"):
            raise ValueError(f'combine = "{self.combine}" needs a list of genes')
        if self.lists_no_genes and self.kind == "knock_in":
            raise ValueError("knock_in needs a list of genes")
        if self.null_lists and self.combine != "joint":
            raise ValueError('null_lists belongs to combine = "joint"')
        if self.genes == []:
            raise ValueError("genes: the list is empty")
        return self

    @property
    def lists_no_genes(self) -> bool:
        """Whether the genes are those of each cell."""
        return self.genes == "all" and self.genes_file is None

    @property
    def before_truncation(self) -> bool:
        """Whether the whole cell is edited."""
        return self.edit == "before_truncation"


class StateSettings(Settings):
    """Cell states towards which shifts are measured."""

    column: str
    """Label column that names the states, for example cell_type or disease."""
    start: str
    """State whose cells are perturbed."""
    goal: str
    """State towards which a shift is looked for."""
    alternates: list[str] = []
    """Further states to measure shifts towards."""
    cells_per_state: int = Field(1000, ge=1)
    """At most this many cells, drawn by seed, make a state's centroid."""

    @property
    def names(self) -> list[str]:
        """Start, goal, alternates: the order of all outputs."""
        return [self.start, self.goal, *self.alternates]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError("start, goal and alternates must be different states")
        return self


class CellSettings(Settings):
    """Which cells are perturbed."""

    filters: dict[str, list[str]] = {}
    """Label column to the values to keep. Holds for the cells of the centroids as well."""
    group_by: list[str] = []
    """Label columns that `max_per_group` counts in (with the start state); they become columns of the result."""
    max_per_group: int | None = Field(None, ge=1)
    """At most this many cells of each group (of all cells where there is no group), drawn by seed."""
    seed: int = 0


class ReadoutSettings(Settings):
    """What is read from the model."""

    layer: str = Field("last", pattern=LAYERS)
    """Hidden layer: last (as published), second_to_last, or layer_1, layer_2, ... With `compat` also the numbers of
    Geneformer, counted from the end: 0 is the last layer, -1 the second to last."""
    embedding: Literal["mean", "cls"] = "mean"
    """mean: over the unperturbed genes, the same before and after; cls: the <cls> token, where the model has it."""
    probabilities: bool = False
    """Of a classifier, also the change of each class's probability; needs layer = "last"."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the encoder. Pooling and cosines are always in higher precision."""
    compat: Compat = "none"
    """geneformer: give the numbers of the published mouse code, and geneformer_v2 those of human Geneformer V2, where
    they differ from what we hold to be right (docs/perturbation.md says where)."""

    @model_validator(mode="after")
    def _layer_has_a_name(self) -> Self:
        if self.compat == "none" and re.fullmatch(r"-?\d+", self.layer):
            raise ValueError(
                f'layer "{self.layer}" counts from the end, as Geneformer does: say last, second_to_last or layer_N, '
                'or set compat = "geneformer"'
            )
        return self

    def num_layers(self, total: int) -> int:
        """Layers to run, of `total`; ValueError if there are not so many."""
        named = {"last": total, "second_to_last": total - 1}
        if self.layer in named:
            number = named[self.layer]
        elif self.layer.startswith("layer_"):
            number = int(self.layer.removeprefix("layer_"))
        else:
            number = total + int(self.layer)
        if not 1 <= number <= total:
            raise ValueError(f"layer {self.layer}: the model has {total} layers")
        return number


class GeneShiftSettings(Settings):
    """The effect on each other gene's own embedding, as a table of its own."""

    affected: Literal["all"] | list[str] = "all"
    """Genes to look at, by symbol or Ensembl id, wherever a cell has them; "all" for every gene of each cell."""
    most_changed: int | None = Field(None, ge=1)
    """Of each perturbation in each cell keep only this many of them, the most changed ones. Means over cells are then
    of the cells in which a gene was among them."""
    max_rows: int = Field(100_000_000, ge=1)
    """Refuse to start a scan whose table could have more rows: all genes of a cell make the square of its length."""


class EngineSettings(Settings):
    """How the scan is run; nothing here changes what it computes, beyond rounding."""

    workers: int = Field(1, ge=0)
    """Ray actors; 0 runs in this process without Ray."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs of each actor; by default 1 if the cluster has any."""
    cpus_per_worker: float = Field(1.0, gt=0)
    token_budget: int | None = Field(None, ge=1)
    """Tokens in one micro-batch; halved when memory runs out. By default 262,144 on a GPU and 16,384 on a CPU."""
    unit_tokens: int = Field(2_000_000, ge=1)
    """Tokens to run in one work unit, which is what is committed at a time and lost by a kill."""
    report_every_s: float = Field(10.0, gt=0)
    """Seconds between progress lines."""


def read_gene_list(path: Path) -> list[str]:
    """Gene names of a text file, one a line; `#` starts a comment."""
    lines = (re.sub(r"#.*", "", line).strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


class ScanSettings(Settings):
    """A perturbation scan."""

    perturbation: PerturbationSettings = PerturbationSettings()
    states: StateSettings | None = None
    """Without states only the similarity to the unperturbed cell is measured, for all cells."""
    cells: CellSettings = CellSettings()
    readout: ReadoutSettings = ReadoutSettings()
    gene_shifts: GeneShiftSettings | None = None
    """Give it to get the table gene_shifts/ as well."""
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _published_perturbation(self) -> Self:
        change = self.perturbation
        if self.readout.compat != "none" and (
            change.kind not in ("delete", "overexpress")
            or change.combine not in ("one_by_one", "joint")
            or change.before_truncation
            or change.require == "any"
            or change.absent == "skip"
        ):
            raise ValueError(
                f'readout.compat = "{self.readout.compat}": the original has only delete and overexpress, one by one '
                "or joint, edited after truncation, of cells with all genes to delete, absent genes inserted"
            )
        return self
