"""Cells laid end to end, without padding: what the model runs on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numba
import numpy as np
import torch
from torch import Tensor

from corpus.reader import Cells
from corpus.schema import CLS, EOS

SpecialTokens = Literal["none", "cls_eos"]

_NUM_SPECIAL: dict[SpecialTokens, int] = {"none": 0, "cls_eos": 2}


def gene_limit(max_length: int, special_tokens: SpecialTokens) -> int:
    """Genes that a sequence of `max_length` tokens has room for."""
    return max_length - _NUM_SPECIAL[special_tokens]


@dataclass(frozen=True, eq=False)
class Packed:
    """A batch of B cells as one sequence of T tokens; cell i holds rows `offsets[i]:offsets[i + 1]`.

    Parameters
    ----------
    tokens
        int64[T].
    positions
        int64[T]: place of a token in its own cell, from 0, special tokens counted.
    offsets
        int64[B + 1].
    gene_rows
        bool[T]: False at <cls> and <eos>.
    lengths
        int64[B] on the host: shapes follow from it, and reading them must not wait for the device.
    special_tokens
        What was put around the genes.
    """

    tokens: Tensor
    positions: Tensor
    offsets: Tensor
    gene_rows: Tensor
    lengths: np.ndarray
    special_tokens: SpecialTokens = "none"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest cell in this batch, special tokens included."""
        return int(self.lengths.max())

    @property
    def is_rectangle(self) -> bool:
        """Whether all cells have one length."""
        return bool((self.lengths == self.lengths[0]).all())

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32[B + 1]: `offsets` as attention kernels want them."""
        return self.offsets.to(torch.int32)

    @cached_property
    def cell_of_row(self) -> Tensor:
        """int64[T]: number, within the batch, of the cell that a row belongs to."""
        cells = torch.arange(len(self), device=self.tokens.device)
        return cells.repeat_interleave(self.offsets.diff(), output_size=len(self.tokens))

    def rows_of(self, entries: np.ndarray) -> Tensor:
        """int64[n] on the host: rows of some genes, given as entries (int64[n]) of the packed `Cells.tokens`."""
        extra = _NUM_SPECIAL[self.special_tokens]
        if not extra:
            return torch.from_numpy(entries)
        ends = np.cumsum(self.lengths - extra)
        return torch.from_numpy(entries + extra * np.searchsorted(ends, entries, side="right") + extra // 2)

    def to(self, device: torch.device | str) -> "Packed":
        """Copy to a device; `lengths` stays on the host."""
        names = ("tokens", "positions", "offsets", "gene_rows")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack(cells: Cells, max_length: int, special_tokens: SpecialTokens = "none") -> Packed:
    """Lay cells end to end.

    Parameters
    ----------
    cells
        Genes in rank order; each cell has at least one.
    max_length
        Longest sequence in tokens, special tokens included; a longer cell loses its lowest ranks.
    special_tokens
        "cls_eos" puts <cls> before and <eos> after the genes of each cell.

    Raises
    ------
    ValueError
        If there is no cell, or a cell without genes.
    """
    cells = cells.truncate(gene_limit(max_length, special_tokens))
    if not len(cells) or cells.lengths.min() == 0:
        raise ValueError("a batch needs at least one cell, and each cell at least one gene")
    lengths = cells.lengths + _NUM_SPECIAL[special_tokens]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    size = offsets[-1]
    tokens, positions, gene_rows = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, bool)
    _lay_out(cells.tokens, cells.offsets, special_tokens == "cls_eos", tokens, positions, gene_rows)
    return Packed(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        offsets=torch.from_numpy(offsets),
        gene_rows=torch.from_numpy(gene_rows),
        lengths=lengths,
        special_tokens=special_tokens,
    )


@numba.njit(cache=True, nogil=True)
def _lay_out(genes, offsets, with_special, tokens, positions, gene_rows):  # type: ignore[no-untyped-def]
    lead = 1 if with_special else 0
    row = 0
    for cell in range(len(offsets) - 1):
        size = offsets[cell + 1] - offsets[cell]
        end = row + size + 2 * lead
        # Views per cell, not indices into the whole: the compiler then copies many at a time.
        own_tokens, own_positions, own_genes = tokens[row:end], positions[row:end], gene_rows[row:end]
        for place in range(len(own_positions)):
            own_positions[place] = place
        own_genes[:] = True
        own_tokens[lead : lead + size] = genes[offsets[cell] : offsets[cell] + size]
        if with_special:
            own_tokens[0], own_tokens[-1] = CLS, EOS
            own_genes[0] = own_genes[-1] = False
        row = end


def pack_rectangle(tokens_BL: Tensor, special_tokens: SpecialTokens = "none") -> Packed:
    """Take sequences of one length, special tokens already in place, as a batch, on the device where they are.

    Parameters
    ----------
    tokens_BL
        int64[B, L]: with "cls_eos", column 0 holds <cls> and the last column <eos>.
    special_tokens
        What the sequences have around their genes.
    """
    num_cells, length = tokens_BL.shape
    device = tokens_BL.device
    positions = torch.arange(length, device=device)
    gene_rows = torch.ones(length, dtype=torch.bool, device=device)
    if special_tokens == "cls_eos":
        gene_rows = (positions > 0) & (positions < length - 1)
    return Packed(
        tokens=tokens_BL.reshape(-1),
        positions=positions.repeat(num_cells),
        offsets=torch.arange(num_cells + 1, device=device) * length,
        gene_rows=gene_rows.repeat(num_cells),
        lengths=np.full(num_cells, length, dtype=np.int64),
        special_tokens=special_tokens,
    )
