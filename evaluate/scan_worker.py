"""One worker of a scan: opens corpus and model once, then turns work units into committed files. No Ray."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch

from corpus.reader import Cells, Corpus
from corpus.store import Store
from evaluate.compat import as_published
from evaluate.gene_effects import gene_table
from evaluate.noise import NoiseFloor, measure_noise
from evaluate.perturb import Edits, cell_sets, gene_sets, plan_edits
from evaluate.perturb_settings import EngineSettings, PerturbationSettings, ReadoutSettings
from evaluate.scan_compute import Scanner
from evaluate.scan_plan import WorkUnit
from evaluate.shifts import UnitRecord, commit_unit, read_unit_record, shifts_schema, shifts_table, unit_path
from evaluate.states import state_mean
from train.model import Classifier
from train.model_folder import LoadedModel, load_model


@dataclass(frozen=True)
class Job:
    """What all workers of a scan share; travels to them as it is.

    Parameters
    ----------
    listed
        int64[genes]: tokens of the gene list; None for the genes of each cell.
    allowed
        bool[vocab_size]: genes scanned where there is no list.
    columns
        Label columns of the table besides `donor_id`.
    labels
        Classes whose probabilities are read out, in the order of the classifier.
    affected
        bool[vocab_size]: genes whose own embeddings are compared; None for none.
    most_changed
        How many of them are kept of each perturbation; None for all.
    null_sets
        int64[sets, k]: random lists that are perturbed as well as the one of a joint perturbation.
    """

    model_uri: str
    corpus_uri: str
    corpus_number: int
    out_uri: str
    perturbation: PerturbationSettings
    readout: ReadoutSettings
    engine: EngineSettings
    listed: np.ndarray | None
    anchor: int | None
    allowed: np.ndarray
    columns: list[str]
    states: list[str]
    labels: list[str]
    affected: np.ndarray | None = None
    most_changed: int | None = None
    null_sets: np.ndarray | None = None

    @cached_property
    def sets(self) -> np.ndarray | None:
        """Gene sets of every cell; None if they differ from cell to cell."""
        sets = gene_sets(self.perturbation, self.listed, self.anchor)
        return sets if self.null_sets is None or sets is None else np.concatenate([sets, self.null_sets])

    @property
    def joint(self) -> bool:
        """Whether a row can perturb several genes."""
        return self.perturbation.combine != "one_by_one"

    def num_sets(self, input_lengths: np.ndarray) -> np.ndarray:
        """int64[cells]: upper bound of the sets of cells with inputs of so many genes."""
        if self.sets is not None:
            return np.full(len(input_lengths), len(self.sets), dtype=np.int64)
        return input_lengths * 2 + 1 if self.joint else input_lengths


class ScanWorker:
    """See the module."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.corpus = Corpus(job.corpus_uri, job.corpus_number)
        self.out = Store(job.out_uri)
        self.scanner = make_scanner(load_model(job.model_uri), job)
        self._row_group: tuple[int, Cells] | None = None

    def centroid(self, cells: np.ndarray) -> np.ndarray:
        """Mean embedding of some cells (int64, ascending); float64[d]."""
        return state_mean(self.scanner, self.corpus, cells)

    def noise(self, cells: np.ndarray, centroids: np.ndarray) -> NoiseFloor:
        """Measure what rounding alone makes of perturbations of some cells (int64, ascending)."""
        read = self.corpus.read_cells(cells, counts=self.job.perturbation.fold_change is not None)
        edits, _ = self.edits(read, WorkUnit("", cells))
        return measure_noise(self.scanner, read, edits, centroids)

    def run(self, unit: WorkUnit, obs: pl.DataFrame, centroids: np.ndarray) -> UnitRecord:
        """Measure and commit one unit, unless its file is there already.

        Parameters
        ----------
        obs
            `cell_id`, `donor_id` and the label columns of the unit's cells.
        centroids
            float64[states, d].
        """
        if self.out.exists(unit_path(unit.unit_id)):
            return read_unit_record(self.out, unit.unit_id, self.job.affected is not None)
        cells = self._read(unit.cells)
        edits, skipped = self.edits(cells, unit)
        measured = self.scanner.scan(cells, edits, centroids)
        schema = shifts_schema(self.job.columns, self.job.states, self.job.labels, self.job.joint)
        table = shifts_table(obs, edits, measured, self.corpus.genes, self.job.perturbation.kind, schema)
        of_genes = None
        if self.job.affected is not None:
            kind = self.job.perturbation.kind
            of_genes = gene_table(obs, edits, measured.gene_effects, self.corpus.genes, kind, self.job.joint)
        return commit_unit(self.out, unit.unit_id, table, skipped, of_genes)

    def edits(self, cells: Cells, unit: WorkUnit) -> tuple[list[Edits], dict[str, int]]:
        """Plan the perturbations of a unit's cells; also the numbers of those that do not apply, by reason."""
        job, genes = self.job, self.corpus.genes
        planned: list[Edits] = []
        skipped = {"absent": 0, "nothing_left": 0}
        for first, last in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
            tokens = cells.tokens[first:last].astype(np.int64)
            counts = None if cells.counts is None else cells.counts[first:last]
            sets = job.sets
            if sets is None:
                sets = cell_sets(job.perturbation, tokens[: self.scanner.max_genes], job.allowed, job.anchor)
            sets = sets[unit.first_set : unit.last_set]
            edits, left_out = plan_edits(
                tokens, counts, sets, job.perturbation, genes.medians_by_token, self.scanner.max_genes
            )
            in_input = min(len(tokens), self.scanner.max_genes)
            edits, also = as_published(edits, in_input, self.scanner.max_genes, job.perturbation, job.readout.compat)
            planned.append(edits)
            for reason, number in [*left_out.items(), *also.items()]:
                skipped[reason] = skipped.get(reason, 0) + number
        return planned, skipped

    def _read(self, wanted: np.ndarray) -> Cells:
        """Read cells; units follow each other through the corpus, so the last row group is kept."""
        counts = self.job.perturbation.fold_change is not None
        groups = np.searchsorted(self.corpus.row_group_offsets, wanted, side="right") - 1
        parts = []
        for group in np.unique(groups).tolist():
            if self._row_group is None or self._row_group[0] != group:
                self._row_group = group, self.corpus.read_row_group(group, counts)
            cells = self._row_group[1]
            parts.append(cells.take(wanted[groups == group] - cells.index[0]))
        return Cells.concatenate(parts)


def make_scanner(model: LoadedModel, job: Job) -> Scanner:
    """Put a loaded model on this process's device."""
    readout = job.readout
    return Scanner(
        model.model.bert,
        classifier=model.model if readout.probabilities and isinstance(model.model, Classifier) else None,
        max_length=model.card.max_length,
        special_tokens=model.card.special_tokens,
        num_layers=readout.num_layers(model.model.bert.num_layers),
        embedding=readout.embedding,
        precision=readout.precision,
        affected=job.affected,
        most_changed=job.most_changed,
        compat=readout.compat,
        token_budget=job.engine.token_budget,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
