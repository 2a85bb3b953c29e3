"""Cell classification on a pretrained encoder as a task of the loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.errors import UserError
from corpus.reader import Cells
from train.model import Classifier
from train.model_folder import ModelCard, PretrainedWeights, check_same_genes, label_numbers, load_model, save_model
from train.packing import gene_limit
from train.scores import confusion_counts, macro_f1
from train.settings import FinetuneSettings
from train.split import TEST, TRAIN, VALIDATION, group_names, split_labelled
from train.tasks import MicroBatch, batches_of, corpus_identity, open_corpus, pack_or_fill
from train.world import World

SPLIT = "split.parquet"


class FinetuneTask:
    """Predict a label of each cell.

    Parameters
    ----------
    settings
        Of the run.
    measured
        Parts that the finished model is scored on. A search leaves the test cells out until it has chosen.

    Raises
    ------
    UserError
        If the model was trained on another vocabulary, lacks encoder weights, or the labels cannot be split.
    """

    command = "train finetune"
    score = "validation_macro_f1"

    def __init__(self, settings: FinetuneSettings, measured: Sequence[str] = (TRAIN, VALIDATION, TEST)) -> None:
        self.settings = settings
        self.measured = tuple(measured)
        self.corpus = open_corpus(settings.corpus, settings.workers)
        loaded = load_model(settings.model)
        self.base = loaded.card
        check_same_genes(self.base, self.corpus)
        self.pretrained = PretrainedWeights(
            loaded.model.config, loaded.model.state_dict(), settings.model, loaded.checksum
        )
        num_layers = int(loaded.model.config.num_hidden_layers)
        if settings.freeze_layers > num_layers:
            raise UserError(f"freeze_layers: {settings.freeze_layers}, but the model has {num_layers} layers")
        self.max_length, self.special_tokens = self.base.max_length, self.base.special_tokens
        self.pooling = settings.pooling or ("cls" if self.special_tokens == "cls_eos" else "mean")
        obs = self.corpus.obs(list(dict.fromkeys(["dataset_id", settings.split.donor_column, settings.label])))
        self.notes: list[str] = []
        self.label_map, self.labels, self.left_out = self._number_labels(obs[settings.label])
        usable = self.labels >= 0
        donors = obs[settings.split.donor_column]
        groups = None
        if donors.null_count() < len(donors):
            groups = group_names(obs, ["dataset_id", settings.split.donor_column])
        self.split = split_labelled(groups, self.labels, usable, settings.split, settings.seed)
        self.notes += self.split.notes
        self.train_cells = self.split.cells(TRAIN)
        self.validation_cells = self.split.cells(VALIDATION)
        if not len(self.train_cells) or not len(self.validation_cells):
            raise UserError("split: it leaves no cells for training or for validation; change --split.*")
        names = sorted(self.label_map, key=self.label_map.__getitem__)
        unseen = np.bincount(self.labels[self.train_cells], minlength=len(names)) == 0
        if unseen.any():
            found = ", ".join(np.array(names)[unseen])
            self.notes.append(f"warning: no training cells of {found}: these classes cannot be learned")
        self.class_weights = torch.ones(len(names))
        if settings.class_weights == "balanced":
            counts = np.bincount(self.labels[self.train_cells], minlength=len(names))
            balanced = counts.sum() / (len(names) * np.maximum(counts, 1))
            self.class_weights = torch.from_numpy(balanced.astype(np.float32))

    def _number_labels(self, labels: pl.Series) -> tuple[dict[str, int], np.ndarray, dict[str, int]]:
        """Class numbers, int64[cells] with -1 for cells that take no part, and cells left out per reason."""
        settings = self.settings
        known = labels.cast(pl.String)
        empty = self.corpus.lengths == 0
        counts = dict(known.drop_nulls().value_counts().iter_rows())
        rare = {label: count for label, count in counts.items() if count < settings.min_cells}
        label_map = label_numbers([label for label in counts if label not in rare])
        if len(label_map) < 2:
            raise UserError(
                f"label {settings.label!r}: {len(label_map)} class(es) with at least {settings.min_cells} cells; "
                "two are needed"
            )
        numbers = known.replace_strict(label_map, default=-1, return_dtype=pl.Int64).to_numpy().copy()
        numbers[empty] = -1
        left_out = {f"fewer than {settings.min_cells} cells of {label}": rare[label] for label in sorted(rare)}
        if known.null_count():
            left_out["no label"] = known.null_count()
        if empty.any():
            left_out["no genes"] = int(empty.sum())
        for reason, count in left_out.items():
            self.notes.append(f"{count:,} cells left out: {reason}")
        return label_map, numbers, left_out

    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "command": self.command,
            "settings": self.settings.identity(),
            "corpus": corpus_identity(self.corpus),
            "model": self.pretrained.checksum,
        }

    def build_model(self) -> nn.Module:
        """Take the pretrained encoder, a new head, and freeze the lowest layers."""
        torch.manual_seed(self.settings.seed)
        model = Classifier(self.pretrained.config, len(self.label_map), self.pooling)
        self.pretrained.load_into(model)
        if self.settings.freeze_layers:
            layers = model.bert.encoder["layer"]
            assert isinstance(layers, nn.ModuleList)
            for part in (model.bert.embeddings, *layers[: self.settings.freeze_layers]):
                part.requires_grad_(False)
        return model

    def prepare(self, cells: Cells, epoch: int = 0) -> MicroBatch:
        """Pack; the epoch makes no difference."""
        cells = cells.truncate(gene_limit(self.max_length, self.special_tokens))
        packed = pack_or_fill(cells, self)
        labels = torch.from_numpy(self.labels[cells.index]) if len(cells) else torch.zeros(1, dtype=torch.int64)
        weight = float(self.class_weights[labels].double().sum()) if len(cells) else 0.0
        return MicroBatch(cells.index, packed, labels, None, weight)

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Sum over cells of the weighted cross-entropy."""
        logits = model(batch.packed).float()
        weights = self.class_weights.to(logits.device)
        loss = F.cross_entropy(logits, batch.labels, weight=weights, reduction="sum")
        return loss, (logits.argmax(dim=1) == batch.labels).sum()

    def predict(self, model: nn.Module, cells: np.ndarray, world: World) -> np.ndarray:
        """Predict classes, each cell exactly once.

        Returns
        -------
        int64[cells]; of equal logits the lowest class number wins.
        """
        votes = torch.zeros(2, len(cells), dtype=torch.float64)
        with torch.no_grad():
            for batch in batches_of(self, cells, world, self.prepare):
                logits = model(batch.packed).float()
                if batch.num_cells:
                    where = torch.from_numpy(np.searchsorted(cells, batch.index))
                    votes[0, where] = torch.from_numpy(logits.cpu().numpy().argmax(axis=1)).double()
                    votes[1, where] += 1
        predicted, times = world.sum(votes.to(world.device)).cpu().numpy()
        if not (times == 1).all():
            raise RuntimeError("a cell was predicted more or less than once")
        return predicted.astype(np.int64)

    def evaluate(self, model: nn.Module, world: World) -> dict[str, float]:
        """Accuracy and macro F1 on the validation cells."""
        return self._scores(model, world, VALIDATION)

    def _scores(self, model: nn.Module, world: World, part: str) -> dict[str, float]:
        cells = self.split.cells(part)
        if not len(cells):
            return {}
        truth, predicted = self.labels[cells], self.predict(model, cells, world)
        return {
            f"{part}_accuracy": float((truth == predicted).mean()),
            f"{part}_macro_f1": macro_f1(confusion_counts(truth, predicted, len(self.label_map))),
        }

    def final_metrics(self, model: nn.Module, world: World, last: dict[str, float]) -> dict[str, Any]:
        """Score the chosen weights; only here is the test part looked at."""
        scores = {name: score for part in self.measured for name, score in self._scores(model, world, part).items()}
        return {
            **scores,
            "label": self.settings.label,
            "classes": len(self.label_map),
            "left_out": self.left_out,
            "split": self.split.summary(),
        }

    def save(self, folder: Path, state: dict[str, Tensor], metrics: dict[str, Any]) -> None:
        """Write the classifier folder, and which cell was in which part."""
        card = ModelCard(
            kind="classifier",
            genes_hash=self.base.genes_hash,
            special_tokens=self.special_tokens,
            max_length=self.max_length,
            pooling=self.pooling,
            label_map=self.label_map,
            preset=self.base.preset,
            training=metrics,
        )
        model = self.build_model()
        assert isinstance(model, Classifier)
        save_model(folder, model, card, self.corpus.genes, state)
        parts = self.corpus.obs(["cell_id"]).with_columns(split=pl.Series(self.split.parts.astype(str)))
        pq.write_table(parts.to_arrow(), folder / SPLIT)
