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
from corpus.schema import CLS, EOS
from evaluate.perturb import Edits, Sequences, build_sequences
from train.model import Classifier, Encoder
from train.packing import Packed, SpecialTokens, gene_limit, pack
from train.pooling import first_pool, mean_pool

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
    """

    similarity: np.ndarray
    shifts: np.ndarray
    probabilities: np.ndarray


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
        token_budget: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.encoder = encoder.to(self.device).eval()
        self.classifier = None if classifier is None else classifier.to(self.device).eval()
        self.max_length, self.special_tokens = max_length, special_tokens
        self.num_layers, self.embedding, self.precision = num_layers, embedding, precision
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
        pooled = first_pool(hidden, packed) if self.embedding == "cls" else mean_pool(hidden, packed)
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
            return Measured(np.zeros(0), np.zeros((0, len(centroids))), np.zeros((0, self.num_classes)))
        cells, edits = cells.take(cells_with_edits), [edits[cell] for cell in cells_with_edits]

        def scan_group(group: np.ndarray) -> Measured:
            return self._scan_group(cells.take(group), [edits[cell] for cell in group], target)

        parts = list(self._batches(np.minimum(cells.lengths, self.max_genes), scan_group))
        return Measured(*(np.concatenate([getattr(p, name) for p in parts]) for name in Measured.__dataclass_fields__))

    def _scan_group(self, cells: Cells, edits: list[Edits], centroids: Tensor) -> Measured:
        originals = self._originals(cells)
        cell_of_row = np.repeat(np.arange(len(cells)), [len(edit) for edit in edits])
        joined = Edits.concatenate(edits)
        values = np.zeros((len(joined), 1 + len(centroids) + self.num_classes))
        values[:, 0] = 1
        # Rows of one length make rectangles, which attention runs without masks.
        todo = np.flatnonzero(~joined.no_op)
        todo = todo[np.argsort(-joined.lengths[todo], kind="stable")]

        def measure(rows: np.ndarray) -> Tensor:
            return self._measure(originals, joined.take(todo[rows]), cell_of_row[todo[rows]], centroids)

        done = 0
        for found in self._batches(joined.lengths[todo], measure):
            values[todo[done : done + len(found)]] = found.cpu().numpy()
            done += len(found)
        similarity, shifts, probabilities = np.split(values, [1, 1 + len(centroids)], axis=1)
        return Measured(similarity[:, 0], shifts, probabilities)

    def _originals(self, cells: Cells) -> "_Originals":
        packed = pack(cells, self.max_length, self.special_tokens).to(self.device)
        hidden = self._run(packed)
        genes = hidden[packed.gene_rows].double()
        lengths = torch.from_numpy(np.minimum(cells.lengths, self.max_genes)).to(self.device)
        return _Originals(
            tokens=torch.from_numpy(cells.tokens.astype(np.int64)).to(self.device),
            token_starts=torch.from_numpy(cells.offsets[:-1]).to(self.device),
            input_lengths=lengths,
            hidden=genes,
            starts=lengths.cumsum(0) - lengths,
            sums=torch.nn.functional.pad(genes.cumsum(0), (0, 0, 1, 0)),
            first=first_pool(hidden, packed).double(),
            probabilities=self._probabilities(hidden, packed),
        )

    def _measure(self, originals: "_Originals", edits: Edits, cells: np.ndarray, centroids: Tensor) -> Tensor:
        """float64[rows, 1 + states + classes]: similarity, shifts, changes of probabilities."""
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
        # `gene_rows` says what mean_pool averages: here the genes that both inputs share and that were not perturbed.
        packed = pack_sequences(sequences, edits.lengths, self.special_tokens)
        hidden = self._run(packed)
        if self.embedding == "cls":
            after, before = first_pool(hidden, packed).double(), originals.first[cell]
        else:
            after, before = mean_pool(hidden, packed).double(), originals.mean(cell, removed, pooled_end)
        similarity = torch.nn.functional.cosine_similarity(after, before, dim=1)
        shifts = _cosines(after, centroids) - _cosines(before, centroids)
        # A classifier sees all genes of its input, perturbed ones too.
        whole = dataclasses.replace(packed, gene_rows=_gene_rows(packed))
        changes = self._probabilities(hidden, whole) - originals.probabilities[cell]
        return torch.cat([similarity[:, None], shifts, changes], dim=1)

    @property
    def num_classes(self) -> int:
        """Classes whose probabilities are read out."""
        return 0 if self.classifier is None else self.classifier.classifier.out_features

    def _probabilities(self, hidden: Tensor, packed: Packed) -> Tensor:
        """float64[cells, classes]."""
        if self.classifier is None:
            return torch.zeros(len(packed), 0, dtype=torch.float64, device=self.device)
        pooled = mean_pool(hidden, packed) if self.classifier.pooling == "mean" else first_pool(hidden, packed)
        logits = self.classifier.classifier(torch.tanh(self.classifier.bert.pooler["dense"](pooled)))
        return torch.softmax(logits.double(), dim=1)

    def _run(self, packed: Packed) -> Tensor:
        dtype = _DTYPES.get(self.precision)
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            hidden: Tensor = self.encoder(packed, self.num_layers)
        return hidden.float()

    def _batches(self, lengths: np.ndarray, run: Callable[[np.ndarray], Result]) -> Iterator[Result]:
        """Run consecutive rows under the token budget; smaller batches from then on if memory runs out."""
        start = 0
        while start < len(lengths):
            stop = _batch_end(lengths, start, self.token_budget)
            try:
                result = run(np.arange(start, stop))
            except torch.OutOfMemoryError as error:
                if stop - start == 1:
                    raise RunError(f"one sequence of {lengths[start]} genes does not fit into device memory") from error
                result = None
            if result is None:  # outside the except block, whose traceback would keep the batch's tensors alive
                self.token_budget = max(int(lengths[start:stop].sum()) // 2, 1)
                _log.warning("out of device memory: micro-batches of at most %d tokens from now on", self.token_budget)
                torch.cuda.empty_cache()
                continue
            yield result
            start = stop


@dataclass(frozen=True)
class _Originals:
    """Cells as they are: C cells of G genes together, I of them in the inputs; float64 or int64, on the device.

    `sums[i]` is the sum of `hidden[:i]`, so that a mean over any stretch of a cell costs two look-ups.
    """

    tokens: Tensor  # [G]
    token_starts: Tensor  # [C]
    input_lengths: Tensor  # [C]
    hidden: Tensor  # [I, d]
    starts: Tensor  # [C]
    sums: Tensor  # [I + 1, d]
    first: Tensor  # [C, d]
    probabilities: Tensor  # [C, classes]

    def mean(self, cell: Tensor, removed: Tensor, pooled_end: Tensor) -> Tensor:
        """Mean over the genes at places below `pooled_end` that are not in `removed`; float64[rows, d]."""
        start = self.starts[cell]
        total = self.sums[start + pooled_end] - self.sums[start]
        inside = removed < pooled_end[:, None]
        places = torch.where(inside, start[:, None] + removed, 0)
        total = total - (self.hidden[places] * inside[:, :, None]).sum(dim=1)
        return total / (pooled_end - inside.sum(dim=1))[:, None]


def _gene_rows(packed: Packed) -> Tensor:
    """bool[T]: all but <cls> and <eos>."""
    rows = torch.ones_like(packed.gene_rows)
    if packed.special_tokens == "none":
        return rows
    rows[packed.offsets[:-1]] = False
    rows[packed.offsets[1:] - 1] = False
    return rows


def _cosines(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Cosine of each vector [rows, d] with each centroid [states, d]; [rows, states]."""
    return torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(centroids, dim=1).T


def pack_sequences(sequences: Sequences, lengths: np.ndarray, special_tokens: SpecialTokens) -> Packed:
    """Put special tokens around perturbed sequences.

    Parameters
    ----------
    sequences
        On the device.
    lengths
        int64[rows] on the host, without special tokens.

    Returns
    -------
    A batch whose `gene_rows` are `sequences.pooled`.
    """
    if special_tokens == "none":
        return Packed(
            sequences.tokens, sequences.positions, sequences.offsets, sequences.pooled, lengths, special_tokens
        )
    device = sequences.tokens.device
    rows = torch.arange(len(lengths) + 1, device=device)
    offsets = sequences.offsets + 2 * rows
    total = len(sequences.tokens) + 2 * len(lengths)
    first, last = offsets[:-1], offsets[1:] - 1
    tokens = torch.zeros(total, dtype=torch.int64, device=device)
    positions, pooled = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    row = torch.repeat_interleave(rows[:-1], sequences.offsets.diff(), output_size=len(sequences.tokens))
    inner = first[row] + 1 + sequences.positions
    tokens[first], tokens[last], tokens[inner] = CLS, EOS, sequences.tokens
    positions[last], positions[inner] = last - first, sequences.positions + 1
    pooled[inner] = sequences.pooled
    return Packed(tokens, positions, offsets, pooled, lengths + 2, special_tokens)


def _batch_end(lengths: np.ndarray, start: int, budget: int) -> int:
    """End of the longest run of rows from `start` that holds at most `budget` tokens; at least one row."""
    fits = int(np.searchsorted(np.cumsum(lengths[start : start + budget]), budget, side="right"))
    return min(start + max(fits, 1), len(lengths))
