"""A scan made ready: inputs checked against each other, cells chosen, work units planned. No Ray."""

import hashlib
from typing import Any

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.hashing import digest_json
from corpus.reader import Corpus
from corpus.store import Store
from evaluate.matched_lists import draw_lists, find_places
from evaluate.perturb_settings import ScanSettings, read_gene_list
from evaluate.scan_plan import label_columns, plan_units, select_cells
from evaluate.scan_worker import Job
from evaluate.shifts import shifts_schema
from train.model_folder import LoadedModel, check_same_genes, load_model
from train.packing import gene_limit


class Scan:
    """A scan made ready: inputs opened and checked, cells chosen, work units planned; nothing run or written yet.

    Raises
    ------
    UserError
        If inputs do not fit each other, or a setting names a gene, state, column or layer that there is not.
    """

    def __init__(self, settings: ScanSettings, corpus_uri: str, model_uri: str, out_uri: str) -> None:
        self.settings, self.out = settings, Store(out_uri)
        self.corpus, self.model = Corpus(corpus_uri), load_model(model_uri)
        check_same_genes(self.model.card, self.corpus)
        _check_readout(settings, self.model)
        self.corpus_sha256 = hashlib.sha256(self.corpus.manifest.to_json()).hexdigest()
        columns = label_columns(settings.cells, settings.states)
        fixed = set(shifts_schema([], [], [], joint=False).names)
        if taken := fixed.intersection(columns):
            raise UserError(f"cells.group_by: {', '.join(sorted(taken))} is a column of the shifts table already")
        of_states = [settings.states.column] if settings.states else []
        asked = [*of_states, *settings.cells.group_by, *settings.cells.filters, "length"]
        obs = self.corpus.obs(list(dict.fromkeys(asked)))
        lengths = obs["length"].to_numpy().astype(np.int64)
        self.selection = select_cells(obs, lengths, settings.cells, settings.states)
        # Names of cells are long: of those that are not scanned they are not kept.
        self._obs = self.corpus.obs(["cell_id", "donor_id", *columns])[self.selection.cells]
        self.max_genes = gene_limit(self.model.card.max_length, self.model.card.special_tokens)
        self.job = self._job(model_uri, columns)
        self.scan_id = self._scan_id()
        self.input_lengths = np.minimum(lengths[self.selection.cells], self.max_genes)
        self.num_sets = self.job.num_sets(self.input_lengths)
        self._check_gene_rows()
        self.units = plan_units(
            self.scan_id, self.selection.cells, self.num_sets, self.input_lengths, settings.engine.unit_tokens
        )

    def obs_of(self, cells: np.ndarray) -> pl.DataFrame:
        """`cell_id`, `donor_id` and the label columns of some of the scanned cells (int64, ascending)."""
        return self._obs[np.searchsorted(self.selection.cells, cells)]

    @property
    def gene_rows(self) -> int:
        """Upper bound of the rows of gene_shifts/; 0 without it."""
        asked = self.settings.gene_shifts
        if asked is None or self.job.affected is None:
            return 0
        per_set = np.minimum(self.input_lengths, self.job.affected.sum())
        if asked.most_changed is not None:
            per_set = np.minimum(per_set, asked.most_changed)
        return int((self.num_sets * per_set).sum())

    def _check_gene_rows(self) -> None:
        asked = self.settings.gene_shifts
        if asked is not None and self.gene_rows > asked.max_rows:
            raise UserError(
                f"gene_shifts: up to {self.gene_rows:,} rows, max_rows is {asked.max_rows:,}: name the genes in "
                "gene_shifts.affected, keep only the gene_shifts.most_changed, perturb less, or raise max_rows"
            )

    def _job(self, model_uri: str, columns: list[str]) -> Job:
        change, genes = self.settings.perturbation, self.corpus.genes
        names = read_gene_list(change.genes_file) if change.genes_file else change.genes
        listed = None
        if names != "all":
            # A gene named twice, or by symbol and by id, is one gene.
            listed = np.array(list(dict.fromkeys(genes.find(name) for name in names)), dtype=np.int64)
        allowed = np.ones(genes.vocab_size, dtype=bool)
        if listed is None and change.min_cells > 1:
            allowed = count_detections(self.corpus, self.selection.cells, self.max_genes) >= change.min_cells
        null_sets = None
        if listed is not None and change.null_lists:
            places = find_places(self.corpus.iter_cells(self.selection.cells), genes.vocab_size, self.max_genes)
            try:
                null_sets = draw_lists(listed, genes.tokens, places, change.null_lists, self.settings.cells.seed)
            except ValueError as error:
                raise UserError(f"perturbation.null_lists: {error}") from error
        affected, asked = None, self.settings.gene_shifts
        if asked is not None:
            affected = np.full(genes.vocab_size, asked.affected == "all")
            affected[[genes.find(name) for name in asked.affected if asked.affected != "all"]] = True
        return Job(
            model_uri=model_uri,
            corpus_uri=self.corpus.store.uri,
            corpus_number=self.corpus.manifest.number,
            out_uri=self.out.uri,
            perturbation=change,
            readout=self.settings.readout,
            engine=self.settings.engine,
            listed=listed,
            anchor=None if change.anchor is None else genes.find(change.anchor),
            allowed=allowed,
            columns=columns,
            states=self.settings.states.names if self.settings.states else [],
            labels=list(self.model.card.label_map or {}) if self.settings.readout.probabilities else [],
            affected=affected,
            most_changed=asked.most_changed if asked else None,
            null_sets=null_sets,
        )

    def _scan_id(self) -> str:
        return digest_json(
            {
                "format": 1,
                "readout": self.readout_id,
                "settings": self.described,
                "cells": self.selection.cells.tolist(),
                "states": {state: cells.tolist() for state, cells in self.selection.state_cells.items()},
                "allowed": hashlib.sha256(self.job.allowed.tobytes()).hexdigest(),
            },
            32,
        )

    @property
    def readout_id(self) -> str:
        """Hash of what an embedding of a cell of the corpus depends on."""
        readout = self.settings.readout.model_dump(mode="json")
        return digest_json({"model": self.model.checksum, "corpus": self.corpus_sha256, "readout": readout}, 32)

    @property
    def described(self) -> dict[str, Any]:
        """Settings that affect the result; genes by Ensembl id, whichever way they were named."""
        settings = self.settings.model_dump(mode="json", exclude={"engine"})
        id_of = dict(zip(self.corpus.genes.tokens.tolist(), self.corpus.genes.ensembl_ids, strict=True))
        change = settings["perturbation"]
        del change["genes_file"]
        if settings["gene_shifts"] is not None:
            del settings["gene_shifts"]["max_rows"]  # refuses, and changes nothing
        if self.job.listed is not None:
            change["genes"] = [id_of[token] for token in self.job.listed.tolist()]
        if self.job.anchor is not None:
            change["anchor"] = id_of[self.job.anchor]
        return settings


def _check_readout(settings: ScanSettings, model: LoadedModel) -> None:
    if settings.readout.embedding == "cls" and model.card.special_tokens != "cls_eos":
        raise UserError('readout.embedding "cls": the model has no <cls> token; use "mean"')
    if settings.readout.probabilities and model.card.kind != "classifier":
        raise UserError("readout.probabilities: the model is no classifier")
    total = model.model.bert.num_layers
    try:
        number = settings.readout.num_layers(total)
    except ValueError as error:
        raise UserError(f"readout.{error}") from error
    if settings.readout.probabilities and number != total:
        raise UserError('readout.probabilities: the classes are read from layer "last"')


def count_detections(corpus: Corpus, cells: np.ndarray, max_genes: int) -> np.ndarray:
    """int64[vocab_size]: how many of the cells have each gene in the model's input."""
    counts = np.zeros(corpus.genes.vocab_size, dtype=np.int64)
    for batch in corpus.iter_cells(cells):
        counts += np.bincount(batch.truncate(max_genes).tokens, minlength=len(counts))
    return counts
