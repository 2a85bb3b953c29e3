"""What the model says of perturbed cells: batches on one device, no Ray and no files.

Per cell the original input is run once; each perturbation is one sequence, built on the device, run through the encoder
up to the wanted layer and pooled there. Only one number per perturbation and state leaves the device.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from corpus.errors import RunError
from corpus.reader import Cells
from evaluate.gene_effects import GeneEffects
from evaluate.perturb import NONE, Edits, Sequences, build_sequences
from evaluate.perturb_settings import Compat
from evaluate.scan_tensors import Originals, cosines, gene_rows, mean_of_rows, pack_sequences, paired_cosines
from train.model import Classifier, Encoder
from train.packing import Packed, SpecialTokens, gene_limit, pack
from train.pooling import first_pool

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_BUDGETS = {"cuda": 262_144, "cpu": 16_384}


@dataclass(frozen=True)
class Measured:
    """Read-outs, one row a perturbation.

    Parameters
    ----------
    similarity
        float64[rows]: cosine between the perturbed and the original cell embedding.
    shifts
        float64[rows, states]: cosine to each state's centroid, after minus before.
    probabilities
        float64[rows, classes]: probability of each class, after minus before; no classes without a classifier.
    gene_effects
        How far each other gene's embedding moved; empty if it was not asked for.
    """

    similarity: np.ndarray
    shifts: np.ndarray
    probabilities: np.ndarray
    gene_effects: GeneEffects

    @staticmethod
    def concatenate(parts: "list[Measured]") -> "Measured":
        """Join the rows of several groups of cells."""
        starts = np.cumsum([0, *(len(part.similarity) for part in parts)])
        return Measured(
            np.concatenate([part.similarity for part in parts]),
            np.concatenate([part.shifts for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
            GeneEffects.concatenate(
                [part.gene_effects.of_rows(int(start)) for part, start in zip(parts, starts, strict=False)]
            ),
        )


class Scanner:
    """An encoder on its device, with what is read from it.

    Parameters
    ----------
    encoder
        Put into evaluation mode and moved to `device`.
    max_length
        Longest input in tokens, special tokens included.
    num_layers
        Layers to run.
    embedding
        "mean" over genes, or "cls".
    classifier
        Whose probabilities are read out; `encoder` is its own, and `num_layers` all of its layers.
    precision
        "float32", "bfloat16" or "float16" for the encoder.
    affected
        bool[vocab_size]: genes whose own embeddings are compared, before and after; None for none.
    most_changed
        Of each perturbation keep only this many of them, the least similar ones.
    compat
        Whose numbers to give, see `evaluate.compat`.
    token_budget
        Tokens of one micro-batch; by default by device. Halved for good each time the device runs out of memory.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_length: int,
        special_tokens: SpecialTokens,
        num_layers: int,
        embedding: str = "mean",
        classifier: Classifier | None = None,
        precision: str = "float32",
        affected: np.ndarray | None = None,
        most_changed: int | None = None,
        compat: Compat = "none",
        token_budget: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.encoder = encoder.to(self.device).eval()
        self.classifier = None if classifier is None else classifier.to(self.device).eval()
        self.max_length, self.special_tokens = max_length, special_tokens
        self.num_layers, self.embedding, self.precision = num_layers, embedding, precision
        self.affected = None if affected is None else torch.from_numpy(affected).to(self.device)
        self.most_changed, self.compat = most_changed, compat
        self.token_budget = token_budget or _BUDGETS.get(self.device.type, _BUDGETS["cpu"])

    @property
    def max_genes(self) -> int:
        """Genes that fit into an input."""
        return gene_limit(self.max_length, self.special_tokens)

    @torch.inference_mode()
    def embed(self, cells: Cells) -> np.ndarray:
        """Embed whole cells; float64[cells, d], in the order given."""
        lengths = np.minimum(cells.lengths, self.max_genes)
        parts = list(self._batches(lengths, lambda rows: self._embed(cells.take(rows))))
        return np.concatenate(parts) if parts else np.zeros((0, self.encoder.config.hidden_size))

    def _embed(self, cells: Cells) -> np.ndarray:
        packed = pack(cells, self.max_length, self.special_tokens).to(self.device)
        hidden = self._run(packed)
        pooled = first_pool(hidden, packed) if self.embedding == "cls" else mean_of_rows(hidden, packed)
        return pooled.double().cpu().numpy()

    @torch.inference_mode()
    def scan(self, cells: Cells, edits: list[Edits], centroids: np.ndarray) -> Measured:
        """Measure the perturbations of some cells.

        Parameters
        ----------
        cells
            Not truncated.
        edits
            One entry a cell.
        centroids
            float64[states, d].

        Returns
        -------
        Rows in the order of cells and edits. A perturbation that changes nothing (`no_op`) is not run: its similarity
        is exactly 1 and its shifts are exactly 0.
        """
        target = torch.from_numpy(centroids).to(self.device)
        cells_with_edits = np.flatnonzero([len(edit) > 0 for edit in edits])
        if not len(cells_with_edits):
            empty = np.zeros(0), np.zeros((0, len(centroids))), np.zeros((0, self.num_classes))
            return Measured(*empty, GeneEffects.empty())
        cells, edits = cells.take(cells_with_edits), [edits[cell] for cell in cells_with_edits]

        def scan_group(group: np.ndarray) -> Measured:
            return self._scan_group(cells.take(group), [edits[cell] for cell in group], target)

        parts = list(self._batches(np.minimum(cells.lengths, self.max_genes), scan_group))
        return Measured.concatenate(parts)

    def _scan_group(self, cells: Cells, edits: list[Edits], centroids: Tensor) -> Measured:
        originals = self._originals(cells)
        cell_of_row = np.repeat(np.arange(len(cells)), [len(edit) for edit in edits])
        joined = Edits.concatenate(edits)
        values = np.zeros((len(joined), 1 + len(centroids) + self.num_classes))
        values[:, 0] = 1
        effects = [GeneEffects.empty()]
        # Rows of one length make rectangles, which attention runs without masks.
        todo = np.flatnonzero(~joined.no_op)
        todo = todo[np.argsort(-joined.lengths[todo], kind="stable")]

        def measure(rows: np.ndarray) -> tuple[Tensor, GeneEffects]:
            return self._measure(originals, joined.take(todo[rows]), cell_of_row[todo[rows]], centroids)

        done = 0
        for found, of_genes in self._batches(joined.lengths[todo], measure):
            rows = todo[done : done + len(found)]
            values[rows] = found.cpu().numpy()
            effects.append(dataclasses.replace(of_genes, rows=rows[of_genes.rows]))
            done += len(found)
        similarity, shifts, probabilities = np.split(values, [1, 1 + len(centroids)], axis=1)
        return Measured(similarity[:, 0], shifts, probabilities, GeneEffects.concatenate(effects).in_order())

    def _originals(self, cells: Cells) -> Originals:
        packed = pack(cells, self.max_length, self.special_tokens).to(self.device)
        hidden = self._run(packed)
        genes = hidden[packed.gene_rows].double()
        lengths = torch.from_numpy(np.minimum(cells.lengths, self.max_genes)).to(self.device)
        return Originals(
            tokens=torch.from_numpy(cells.tokens.astype(np.int64)).to(self.device),
            token_starts=torch.from_numpy(cells.offsets[:-1]).to(self.device),
            input_lengths=lengths,
            hidden=genes,
            starts=lengths.cumsum(0) - lengths,
            sums=torch.nn.functional.pad(genes.cumsum(0), (0, 0, 1, 0)),
            first=first_pool(hidden, packed).double(),
            probabilities=self._probabilities(hidden, packed),
        )

    def _measure(
        self, originals: Originals, edits: Edits, cells: np.ndarray, centroids: Tensor
    ) -> tuple[Tensor, GeneEffects]:
        """float64[rows, 1 + states + classes]: similarity, shifts, changes of probabilities; and the genes' own."""
        cell, removed, targets, inserted, lengths, pooled_end = (
            torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)).to(self.device, non_blocking=True)
            for part in (cells, edits.removed, edits.targets, edits.inserted, edits.lengths, edits.pooled_end)
        )
        sequences = build_sequences(
            originals.tokens,
            originals.token_starts[cell],
            originals.input_lengths[cell],
            removed,
            targets,
            inserted,
            lengths,
            total=int(edits.lengths.sum()),
        )
        # `gene_rows` says what is averaged: here the genes that both inputs share and that were not perturbed.
        packed = pack_sequences(sequences, edits.lengths, self.special_tokens)
        hidden = self._run(packed)
        # A classifier sees all genes of its input, perturbed ones too.
        whole = dataclasses.replace(packed, gene_rows=gene_rows(packed))
        if self.embedding == "cls":
            after, before = first_pool(hidden, packed).double(), originals.first[cell]
        else:
            after, before = mean_of_rows(hidden, packed), originals.mean(cell, removed, pooled_end)
        similarity = torch.nn.functional.cosine_similarity(after, before, dim=1)
        effects = GeneEffects.empty()
        if self.affected is not None or self.compat == "geneformer":
            places, own = self._own_similarities(originals, hidden, packed, sequences, cell, pooled_end)
            if self.affected is not None:
                effects = self._effects(originals, edits, sequences, cell, places, own)
            if self.compat == "geneformer" and self.embedding == "mean":
                similarity = _mean_by_row(own, sequences.row[places], len(edits))
        if self.compat == "geneformer_v2" and self.embedding == "mean":
            after = mean_of_rows(hidden, whole)
            before = originals.mean(cell, torch.full_like(removed, NONE), pooled_end)
        shifts = cosines(after, centroids) - cosines(before, centroids)
        changes = self._probabilities(hidden, whole) - originals.probabilities[cell]
        return torch.cat([similarity[:, None], shifts, changes], dim=1), effects

    def _own_similarities(
        self,
        originals: Originals,
        hidden: Tensor,
        packed: Packed,
        sequences: Sequences,
        cell: Tensor,
        pooled_end: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Places in `sequences` of the unperturbed genes that both sides have, and the cosines of their embeddings."""
        compared = sequences.pooled & (sequences.source < pooled_end[sequences.row])
        places = compared.nonzero()[:, 0]
        # The place of a gene in the batch is its place in `sequences`, moved by the special tokens up to there.
        before_it = 0 if self.special_tokens == "none" else 2 * sequences.row[places] + 1
        original = originals.starts[cell[sequences.row[places]]] + sequences.source[places]
        return places, paired_cosines(hidden, places + before_it, originals.hidden, original)

    def _effects(
        self, originals: Originals, edits: Edits, sequences: Sequences, cell: Tensor, places: Tensor, own: Tensor
    ) -> GeneEffects:
        assert self.affected is not None
        row = sequences.row[places]
        # The published code names the gene that stood at this place before the deletion.
        named_by_place = self.compat == "geneformer" and bool((edits.targets == NONE).all())
        place = sequences.positions[places] if named_by_place else sequences.source[places]
        tokens = originals.tokens[originals.token_starts[cell[row]] + place]
        kept = self.affected[tokens]
        effects = GeneEffects(*(part[kept].cpu().numpy() for part in (row, tokens, own)))
        return effects if self.most_changed is None else effects.most_changed(self.most_changed)

    @property
    def num_classes(self) -> int:
        """Classes whose probabilities are read out."""
        return 0 if self.classifier is None else self.classifier.classifier.out_features

    def _probabilities(self, hidden: Tensor, packed: Packed) -> Tensor:
        """float64[cells, classes]."""
        if self.classifier is None:
            return torch.zeros(len(packed), 0, dtype=torch.float64, device=self.device)
        pooled = mean_of_rows(hidden, packed) if self.classifier.pooling == "mean" else first_pool(hidden, packed)
        pooled = pooled.to(hidden.dtype)
        logits = self.classifier.classifier(torch.tanh(self.classifier.bert.pooler["dense"](pooled)))
        return torch.softmax(logits.double(), dim=1)

    def _run(self, packed: Packed) -> Tensor:
        dtype = _DTYPES.get(self.precision)
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            hidden: Tensor = self.encoder(packed, self.num_layers)
        return hidden.float() if dtype else hidden

    def _batches(self, lengths: np.ndarray, run: Callable[[np.ndarray], Result]) -> Iterator[Result]:
        """Run consecutive rows under the token budget; smaller batches from then on if memory runs out."""
        start = 0
        while start < len(lengths):
            stop = _batch_end(lengths, start, self.token_budget)
            try:
                result = run(np.arange(start, stop))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if stop - start == 1:
                    raise RunError(f"one sequence of {lengths[start]} genes does not fit into memory") from error
                result = None
            if result is None:  # outside the except block, whose traceback would keep the batch's tensors alive
                self.token_budget = max(int(lengths[start:stop].sum()) // 2, 1)
                _log.warning("out of memory: micro-batches of at most %d tokens from now on", self.token_budget)
                torch.cuda.empty_cache()
                continue
            yield result
            start = stop


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether the device, or on a CPU the process, has no memory left.

    torch has an error of its own for devices; of the CPU's allocator it has only the message.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: " in str(error)


def _mean_by_row(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    sums = values.new_zeros(num_rows).index_add(0, row, values)
    return sums / values.new_zeros(num_rows).index_add(0, row, torch.ones_like(values))


def _batch_end(lengths: np.ndarray, start: int, budget: int) -> int:
    """End of the longest run of rows from `start` that holds at most `budget` tokens; at least one row."""
    fits = int(np.searchsorted(np.cumsum(lengths[start : start + budget]), budget, side="right"))
    return min(start + max(fits, 1), len(lengths))
