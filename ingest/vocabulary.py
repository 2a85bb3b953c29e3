"""The vocabulary of a run: a given one (of this corpus, of another, or published), or one of our own from the cells."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from corpus.dictionaries import import_dictionary, read_dictionary
from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.manifest import Manifest
from corpus.medians import Histogram, exact_medians
from corpus.store import Store
from ingest import stages
from ingest.digests import DigestMerger
from ingest.plan import WorkUnit
from ingest.quality import Selection
from ingest.selection import Result, RunStage
from ingest.settings import Vocabulary


@dataclass(frozen=True)
class Given:
    """A vocabulary that exists before the run.

    Parameters
    ----------
    genes
        Its gene table.
    origin
        Where it comes from.
    without_median, without_token
        What an imported dictionary loses, by Ensembl id.
    """

    genes: GeneTable
    origin: str
    without_median: list[str] = field(default_factory=list)
    without_token: list[str] = field(default_factory=list)


def given_vocabulary(
    settings: Vocabulary, species: pl.DataFrame, added_to: tuple[Store, Manifest] | None = None
) -> Given | None:
    """Load the vocabulary that the settings name, or that of the corpus added to; None if it is to be built.

    Raises
    ------
    UserError
        If it is missing or broken, or if settings of a vocabulary come with a corpus that has one.
    """
    if added_to is not None:
        store, manifest = added_to
        if settings != Vocabulary():
            raise UserError(f"{store.uri} has its vocabulary already: leave out the settings under vocabulary")
        return Given(GeneTable.load(store, manifest.genes), "this corpus")
    if settings.corpus is not None:
        other = Store(settings.corpus)
        return Given(GeneTable.load(other, Manifest.read(other).genes), settings.corpus)
    if settings.dictionary is not None:
        found = import_dictionary(read_dictionary(settings.dictionary, settings.dictionary_medians), species)
        return Given(found.genes, str(settings.dictionary), found.without_median, found.without_token)
    return None


def mapping_genes(species: pl.DataFrame, given: GeneTable | None) -> pl.DataFrame:
    """Genes that names are mapped to: those of a given vocabulary in token order, then the others of the species.

    A published dictionary holds ids that a newer annotation has retired; data of its time holds them too.
    """
    if given is None:
        return species
    own = pl.DataFrame(given.table.select(["ensembl_id", "symbol", "biotype"])).join(
        species, on="ensembl_id", how="left", maintain_order="left", suffix="_now"
    )
    by_name = pl.col("symbol").str.contains("(?i)^mt-").fill_null(False)
    own = own.select(
        "ensembl_id",
        pl.coalesce("symbol", "symbol_now", "ensembl_id").alias("symbol"),
        pl.coalesce("biotype_now", "biotype").alias("biotype"),
        pl.coalesce(pl.col("is_mitochondrial"), by_name).alias("is_mitochondrial"),
    )
    return pl.concat([own, species.join(own, on="ensembl_id", how="anti", maintain_order="left")])


def wanted_genes(settings: Vocabulary, genes: pl.DataFrame, given: GeneTable | None) -> np.ndarray:
    """bool[genes]: which of the mapped genes can become tokens.

    Raises
    ------
    UserError
        If no gene has a biotype that the settings name.
    """
    if given is not None:
        return np.arange(len(genes)) < len(given.tokens)
    if settings.biotypes is None:
        return np.ones(len(genes), bool)
    unknown = set(settings.biotypes) - set(genes["biotype"])
    if unknown:
        raise UserError(f"vocabulary.biotypes: no gene has the biotype {sorted(unknown)[0]!r}")
    return genes["biotype"].is_in(settings.biotypes).to_numpy()


def build_vocabulary(
    settings: Vocabulary,
    genes: pl.DataFrame,
    wanted: np.ndarray,
    units: Sequence[WorkUnit],
    selections: Sequence[Selection],
    store: Store,
    run_stage: RunStage,
) -> GeneTable:
    """A vocabulary of our own: every wanted gene that a kept cell has, with its median over all kept cells.

    Raises
    ------
    UserError
        If no cell is kept, or none has a wanted gene.
    """
    tasks = list(zip(units, selections, strict=True))
    take = _tdigest_medians if settings.medians == "tdigest" else _exact_medians
    medians, n_cells = take(settings, wanted, tasks, store, run_stage)
    seen = genes.with_columns(median=medians, n_cells=n_cells).filter(pl.col("n_cells") > 0)
    if seen.is_empty():
        raise UserError("no cell passed quality control: see the rules under quality_control")
    return GeneTable.own(
        seen["ensembl_id"].to_list(),
        seen["symbol"].to_list(),
        seen["biotype"].to_list(),
        seen["median"].to_numpy(),
        seen["n_cells"].to_numpy(),
    )


_Tasks = list[tuple[WorkUnit, Selection]]


def _exact_medians(
    settings: Vocabulary, wanted: np.ndarray, tasks: _Tasks, store: Store, run_stage: RunStage
) -> tuple[np.ndarray, np.ndarray]:
    inside_only = settings.total == "vocabulary"

    def count(task: tuple[WorkUnit, Selection]) -> Result:
        position, number = stages.histogram(*task, store, wanted, inside_only)
        return {}, {"position": position, "number": number}

    histogram = Histogram(len(wanted))

    def add(_: int, result: Result) -> None:
        histogram.add_sparse(result[1]["position"], result[1]["number"])

    run_stage("count", count, tasks, add)
    low, high = histogram.median_bins()

    def middle(task: tuple[WorkUnit, Selection]) -> Result:
        genes, values = stages.middle_values(*task, store, wanted, inside_only, low, high)
        return {}, {"genes": genes, "values": values}

    middles = [arrays for _, arrays in run_stage("medians", middle, tasks).values()]
    medians = exact_medians(
        histogram,
        np.concatenate([arrays["genes"] for arrays in middles]),
        np.concatenate([arrays["values"] for arrays in middles]),
    )
    return medians, histogram.n_cells


def _tdigest_medians(
    settings: Vocabulary, wanted: np.ndarray, tasks: _Tasks, store: Store, run_stage: RunStage
) -> tuple[np.ndarray, np.ndarray]:
    inside_only = settings.total == "vocabulary"

    def digest(task: tuple[WorkUnit, Selection]) -> Result:
        return {}, stages.digests(*task, store, wanted, inside_only)

    merger = DigestMerger(len(wanted))
    run_stage("digests", digest, tasks, lambda position, result: merger.add(position, result[1]))
    return merger.medians(len(tasks))
