"""Masked-gene pretraining as a task of the loop."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corpus.reader import Cells
from train.flops import training_flops
from train.masking import mask_tokens
from train.model import MaskedLM
from train.model_folder import ModelCard, save_model
from train.packing import gene_limit
from train.settings import PretrainSettings
from train.split import TRAIN, VALIDATION, hold_out
from train.start import make_start
from train.tasks import MicroBatch, batches_of, corpus_identity, open_corpus, pack_or_fill
from train.world import World

_FREQUENCY_CELLS = 50_000


class PretrainTask:
    """Predict masked genes.

    Parameters
    ----------
    settings
        Of the run.
    """

    command = "train pretrain"
    score: str | None = None

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.corpus = open_corpus(settings.corpus, settings.workers)
        self.start = make_start(settings.model, self.corpus, settings.init_from)
        self.max_length, self.special_tokens = self.start.max_length, self.start.special_tokens
        usable = self.corpus.lengths > 0
        self.split = hold_out(self.corpus.obs(["dataset_id", "donor_id"]), usable, settings.held_out, settings.seed)
        self.train_cells = self.split.cells(TRAIN)
        held_out = self.split.cells(VALIDATION)
        self.notes = list(self.split.notes)
        if not usable.all():
            self.notes.append(f"{int((~usable).sum()):,} cells without any gene are left out")
        if len(held_out) > settings.held_out.max_cells:
            rng = np.random.default_rng([settings.seed, 4])
            held_out = np.sort(rng.choice(held_out, settings.held_out.max_cells, replace=False))
            self.notes.append(f"evaluation runs on {len(held_out):,} of the held-out cells")
        self.held_out = held_out
        if self.start.weights is not None:
            fresh = self.start.weights.load_into(MaskedLM(self.start.config))
            untrained = f"; not in it and drawn anew: {', '.join(fresh)}" if fresh else ""
            self.notes.append(f"starting from {self.start.weights.source}{untrained}")

    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        weights = self.start.weights
        return {
            "command": self.command,
            "settings": self.settings.identity(),
            "corpus": corpus_identity(self.corpus),
        } | ({"init_from": weights.checksum} if weights is not None else {})

    def build_model(self) -> nn.Module:
        """Initialise from the seed, and put the checkpoint's weights over it if there is one."""
        torch.manual_seed(self.settings.seed)
        model = MaskedLM(self.start.config)
        if self.start.weights is not None:
            self.start.weights.load_into(model)
        return model

    def prepare(self, cells: Cells, epoch: int) -> MicroBatch:
        """Mask and pack."""
        cells = cells.truncate(gene_limit(self.max_length, self.special_tokens))
        masked = mask_tokens(
            cells,
            self.corpus.genes.tokens,
            seed=self.settings.seed,
            epoch=epoch,
            probability=self.settings.mask_probability,
        )
        packed = pack_or_fill(masked.cells, self)
        rows = packed.rows_of(masked.entries)
        scored = len(masked.labels)
        flops = training_flops(self.start.config, packed.lengths, scored) if len(cells) else 0.0
        return MicroBatch(cells.index, packed, torch.from_numpy(masked.labels), rows, scored, flops)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Sum over masked genes."""
        loss, correct = model(batch.packed, batch.rows, batch.labels)
        return loss, correct

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Held-out loss and accuracy under the masks of epoch 0, beside the loss of guessing by gene frequency."""
        totals = torch.zeros(3, dtype=torch.float64, device=world.device)
        with torch.no_grad():
            for batch in batches_of(self, self.held_out, world, lambda cells: self.prepare(cells, epoch=0)):
                loss, correct = self.loss(model, batch)
                if batch.weight:
                    totals += torch.stack([loss.double(), correct.double(), totals.new_tensor(batch.weight)])
        loss_sum, right, count = world.sum(totals).tolist()
        return {
            "heldout_loss": loss_sum / max(count, 1),
            "heldout_accuracy": right / max(count, 1),
            "unigram_loss": self.unigram_loss,
        }

    @cached_property
    def unigram_loss(self) -> float:
        """Cross-entropy, in nats, of the held-out labels under the gene frequencies of the training cells.

        What a model reaches that knows how common each gene is and looks at nothing else: add-one smoothed, over the
        first `gene_limit` genes of at most 50,000 training cells.
        """
        limit = gene_limit(self.max_length, self.special_tokens)
        cells = self.train_cells
        if len(cells) > _FREQUENCY_CELLS:
            cells = cells[np.linspace(0, len(cells) - 1, _FREQUENCY_CELLS).astype(np.int64)]
        genes = self.corpus.genes
        counts = np.zeros(genes.vocab_size)
        for part in self.corpus.iter_cells(cells):
            counts += np.bincount(part.truncate(limit).tokens, minlength=genes.vocab_size)
        share = (counts + 1) / (counts.sum() + len(genes.tokens))
        loss, number = 0.0, 0
        for part in self.corpus.iter_cells(self.held_out):
            labels = mask_tokens(
                part.truncate(limit),
                genes.tokens,
                seed=self.settings.seed,
                epoch=0,
                probability=self.settings.mask_probability,
            ).labels
            loss -= float(np.log(share[labels]).sum())
            number += len(labels)
        return loss / max(number, 1)

    def final_metrics(self, model: nn.Module, world: World, last: dict[str, float]) -> dict[str, Any]:
        """Return the last evaluation, which was of these weights, and how cells were held out."""
        weights = self.start.weights
        begun = {"init_from": {"file": weights.source, "sha256": weights.checksum}} if weights is not None else {}
        return {**last, **begun, "split": self.split.summary()}

    def save(self, folder: Path, state: dict[str, Tensor], metrics: dict[str, Any]) -> None:
        """Write the model folder."""
        card = ModelCard(
            kind="masked_lm",
            genes_hash=self.corpus.genes.hash,
            special_tokens=self.special_tokens,
            max_length=self.max_length,
            preset=self.settings.model.preset if self.start.weights is None else None,
            training=metrics,
        )
        model = self.build_model()
        assert isinstance(model, MaskedLM)
        save_model(folder, model, card, self.corpus.genes, state)
