"""Cells of a corpus through a model, one row group at a time. No Ray: `evaluate.pipeline` spreads it over workers.

Batches hold cells of similar length and a budget of tokens, without padding; no cell sees another, so the result of a
cell does not depend on its batch.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from corpus.errors import UserError
from corpus.reader import Cells, Corpus
from evaluate.perturb_settings import ReadoutSettings
from train.batches import next_fit
from train.model import Classifier
from train.model_folder import LoadedModel, check_same_genes, load_model
from train.packing import Packed, gene_limit, pack
from train.pooling import first_pool, mean_pool

TOKEN_BUDGET = {"cuda": 262_144, "cpu": 16_384}

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EncodeJob:
    """What all workers of an encoding share; travels to them as it is.

    Parameters
    ----------
    corpus_number
        Manifest to read, so that all workers see the same cells whatever is added meanwhile.
    output
        "embedding" of the readout, or a classifier's "logits".
    token_budget
        None for the device's default.
    """

    corpus_uri: str
    corpus_number: int
    model_uri: str
    output: Literal["embedding", "logits"]
    readout: ReadoutSettings
    token_budget: int | None = None


class EncodeWorker:
    """Opens corpus and model once, then encodes row groups."""

    def __init__(self, job: EncodeJob, corpus: Corpus | None = None, model: LoadedModel | None = None) -> None:
        self.corpus = corpus or Corpus(job.corpus_uri, job.corpus_number)
        loaded = model or load_model(job.model_uri)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compute = make_compute(loaded, job.output, job.readout, self.device)
        self.card = loaded.card
        self.token_budget = job.token_budget or TOKEN_BUDGET[self.device.type]

    def run(self, group: int, rows: np.ndarray | None) -> np.ndarray:
        """Encode one row group.

        Parameters
        ----------
        rows
            int64: rows of the group, ascending; None for all.

        Returns
        -------
        float32[rows, width], in corpus order.
        """
        cells = self.corpus.read_row_group(group)
        return self.encode(cells if rows is None else cells.take(rows))

    def encode(self, cells: Cells) -> np.ndarray:
        """Encode some cells; float32[cells, width], in the order given."""
        limit = gene_limit(self.card.max_length, self.card.special_tokens)
        cells = cells.truncate(limit)
        lengths = cells.lengths + self.card.max_length - limit
        # Longest first: if memory does not suffice, it shows at once.
        order = np.argsort(-lengths, kind="stable")
        bounds = next_fit(lengths[order], self.token_budget)
        parts = [self._batch(cells.take(order[a:b])) for a, b in pairwise(bounds)]
        if not parts:
            raise ValueError("no cells")
        out = np.empty((len(cells), parts[0].shape[1]), dtype=np.float32)
        out[order] = np.concatenate(parts)
        return out

    def _batch(self, cells: Cells) -> np.ndarray:
        try:
            packed = pack(cells, self.card.max_length, self.card.special_tokens).to(self.device)
            return self.compute(packed).float().cpu().numpy()
        except torch.cuda.OutOfMemoryError:
            if len(cells) == 1:
                raise
        torch.cuda.empty_cache()
        self.token_budget = max(1, self.token_budget // 2)
        middle = np.arange(len(cells)) < len(cells) // 2
        return np.concatenate([self._batch(cells.take(np.flatnonzero(half))) for half in (middle, ~middle)])


def make_compute(
    loaded: LoadedModel, output: Literal["embedding", "logits"], readout: ReadoutSettings, device: torch.device
) -> Callable[[Packed], Tensor]:
    """Put a model on a device and fix what is read from it.

    Returns
    -------
    A function of a batch to float[B, width]; pooling is in float32.

    Raises
    ------
    UserError
        If the model has no such layer, no <cls>, or no classes.
    """
    model = loaded.model.to(device).eval()
    depth = num_layers(loaded, readout)
    if output == "logits" and not isinstance(model, Classifier):
        raise UserError(f"the model is a {loaded.card.kind}: only a classifier has classes")
    dtype = _DTYPES[readout.precision]

    def compute(packed: Packed) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype) if dtype else nullcontext():
            if output == "logits":
                assert isinstance(model, Classifier)
                return model.logits(packed)
            hidden = model.bert(packed, depth)
            return first_pool(hidden, packed) if readout.embedding == "cls" else mean_pool(hidden, packed)

    return compute


def num_layers(loaded: LoadedModel, readout: ReadoutSettings) -> int:
    """Layers to run for a readout.

    Raises
    ------
    UserError
        If the model has no such layer, or no <cls> to read.
    """
    if readout.embedding == "cls" and loaded.card.special_tokens != "cls_eos":
        raise UserError("readout.embedding: the model has no <cls> token; use mean")
    try:
        return readout.num_layers(loaded.model.bert.num_layers)
    except ValueError as error:
        raise UserError(f"readout.layer: {error}") from error


def open_inputs(corpus_uri: str, model_uri: str) -> tuple[Corpus, LoadedModel]:
    """Open a corpus and a model that belong together.

    Raises
    ------
    UserError
        If one is missing or damaged, if their vocabularies differ, or if the corpus has a cell without genes.
    """
    corpus, loaded = Corpus(corpus_uri), load_model(model_uri)
    check_same_genes(loaded.card, corpus)
    if not len(corpus):
        raise UserError(f"{corpus.store.uri}: the corpus has no cells")
    empty = np.flatnonzero(corpus.lengths == 0)
    if len(empty):
        name = corpus.obs(["cell_id"])["cell_id"][int(empty[0])]
        raise UserError(f"{corpus.store.uri}: {len(empty)} cell(s) without genes, the first is {name}")
    return corpus, loaded


def row_group_tasks(corpus: Corpus, cells: np.ndarray | None) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield (row group, rows in it) that hold the wanted cells (int64, unique and ascending); None for all cells."""
    bounds = corpus.row_group_offsets
    if cells is None:
        yield from ((group, None) for group in range(len(bounds) - 1))
        return
    for group in np.unique(np.searchsorted(bounds, cells, side="right") - 1).tolist():
        first, last = np.searchsorted(cells, bounds[group : group + 2])
        yield group, cells[first:last] - bounds[group]
