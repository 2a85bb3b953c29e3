"""Tensors of a scan: the cells as they are, perturbed inputs with their special tokens, pooling in double precision."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corpus.schema import CLS, EOS
from evaluate.perturb import Sequences
from train.packing import Packed, SpecialTokens

_COSINE_ROWS = 1 << 16


@dataclass(frozen=True)
class Originals:
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


def mean_of_rows(hidden: Tensor, packed: Packed) -> Tensor:
    """Average the rows of each cell that `packed.gene_rows` names, summed in double precision; float64[cells, d].

    A shift is a difference of cosines near 1, so that the last digits of these means count.
    """
    kept = torch.where(packed.gene_rows[:, None], hidden, 0)
    if packed.is_rectangle:
        shape = (len(packed), packed.max_length)
        sums = kept.unflatten(0, shape).sum(dim=1, dtype=torch.float64)
        return sums / packed.gene_rows.unflatten(0, shape).sum(dim=1)[:, None]
    sums = torch.zeros(len(packed), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    sums = sums.index_add(0, packed.cell_of_row, kept.double())
    counts = torch.zeros(len(packed), dtype=torch.float64, device=hidden.device)
    return sums / counts.index_add(0, packed.cell_of_row, packed.gene_rows.double())[:, None]


def gene_rows(packed: Packed) -> Tensor:
    """bool[T]: all but <cls> and <eos>."""
    rows = torch.ones_like(packed.gene_rows)
    if packed.special_tokens == "none":
        return rows
    rows[packed.offsets[:-1]] = False
    rows[packed.offsets[1:] - 1] = False
    return rows


def cosines(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Cosine of each vector [rows, d] with each centroid [states, d]; [rows, states]."""
    return torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(centroids, dim=1).T


def paired_cosines(hidden: Tensor, rows: Tensor, other: Tensor, other_rows: Tensor) -> Tensor:
    """Cosine of `hidden[rows[i]]` and `other[other_rows[i]]`, float64[n], a bounded number of rows at a time."""
    parts = [
        torch.nn.functional.cosine_similarity(hidden[ours].double(), other[theirs], dim=1)
        for ours, theirs in zip(rows.split(_COSINE_ROWS), other_rows.split(_COSINE_ROWS), strict=True)
    ]
    return torch.cat(parts)


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
    inner = first[sequences.row] + 1 + sequences.positions
    tokens[first], tokens[last], tokens[inner] = CLS, EOS, sequences.tokens
    positions[last], positions[inner] = last - first, sequences.positions + 1
    pooled[inner] = sequences.pooled
    return Packed(tokens, positions, offsets, pooled, lengths + 2, special_tokens)
