"""Which genes a cell must guess in an epoch: a pure function of (seed, epoch, cell number, position).

Nothing is drawn from a stream that batches share, so the mask of a cell does not depend on its batch mates, the rank,
the number of workers, or where a run was resumed. Each cell and epoch has its own SplitMix64 sequence (Steele, Lea,
Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), of which position p owns three outputs from 3p.

Tokens are selected independently of each other, as in the published models; a short cell may therefore have none
selected. It then adds nothing to a loss that is weighted per masked token.
"""

from dataclasses import dataclass

import numba
import numpy as np

from corpus.reader import Cells
from corpus.schema import MASK

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SELECT, _REPLACE, _WHICH_GENE = np.uint64(1), np.uint64(2), np.uint64(3)
_DRAWS_PER_TOKEN = np.uint64(3)


@dataclass(frozen=True)
class MaskedCells:
    """Cells with some genes hidden.

    Parameters
    ----------
    cells
        As given, with the selected tokens replaced.
    entries
        int64[M], ascending: which entries of `cells.tokens` were selected. In a packed batch their rows are
        `packed.rows_of(entries)`.
    labels
        int64[M]: the tokens that were there.
    """

    cells: Cells
    entries: np.ndarray
    labels: np.ndarray


def mask_tokens(
    cells: Cells,
    gene_tokens: np.ndarray,
    *,
    seed: int,
    epoch: int,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    mask_token: int = MASK,
) -> MaskedCells:
    """Select genes to predict (Devlin et al., NAACL 2019): most become <mask>, some a random gene, the rest stay.

    Parameters
    ----------
    cells
        Genes only (special tokens come with packing), already truncated to what the model reads.
    gene_tokens
        uint16[genes]: a random replacement is uniform over these.
    seed, epoch
        Together with each cell's number in the corpus and each position, all that the draws depend on.
    probability
        Share of tokens selected.
    mask_share, random_share
        Shares of the selected tokens that become `mask_token` or a random gene; the rest keep their token.

    Raises
    ------
    ValueError
        If a share is not in 0..1, or the two replacement shares exceed 1.
    """
    if not (0 <= probability <= 1 and mask_share >= 0 and random_share >= 0 and mask_share + random_share <= 1):
        raise ValueError(f"shares out of range: {probability=}, {mask_share=}, {random_share=}")
    entries = np.empty(len(cells.tokens), np.int64)
    labels = np.empty(len(cells.tokens), np.int64)
    tokens = np.empty(len(cells.tokens), np.uint16)
    number = _mask(
        cells.tokens,
        cells.offsets,
        _cell_keys(seed, epoch, cells.index),
        gene_tokens,
        np.uint16(mask_token),
        _bound(probability),
        _bound(mask_share),
        _bound(mask_share + random_share),
        tokens,
        entries,
        labels,
    )
    hidden = Cells(cells.index, cells.offsets, tokens, cells.counts)
    return MaskedCells(hidden, entries[:number].copy(), labels[:number].copy())


def _cell_keys(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """Seed of each cell's sequence, uint64[cells]: seed, epoch and cell number enter one after the other."""
    key = _finalise(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN_GAMMA)
    key = _finalise(key + np.uint64(epoch) + _GOLDEN_GAMMA)
    mixed: np.ndarray = _finalise(key + index.astype(np.uint64) + _GOLDEN_GAMMA)
    return mixed


def _bound(probability: float) -> np.uint64:
    """Bernoulli outcomes compare the upper 53 bits of a draw with this: 0 never and 1 always happens."""
    return np.uint64(round(probability * 2**53))


@numba.vectorize([numba.uint64(numba.uint64)], cache=True)
def _finalise(x):  # type: ignore[no-untyped-def]
    """Apply SplitMix64's output function (Stafford's variant 13), wrapping modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * _FACTORS[0]
    x = (x ^ (x >> np.uint64(27))) * _FACTORS[1]
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _draw(key, position, lane):  # type: ignore[no-untyped-def]
    """Output `3 * position + lane` (from 1) of the SplitMix64 sequence with this seed, uint64."""
    return _finalise(key + (np.uint64(position) * _DRAWS_PER_TOKEN + lane) * _GOLDEN_GAMMA)


@numba.njit(cache=True, nogil=True)
def _mask(tokens, offsets, keys, genes, mask, select, to_mask, to_change, out, entries, labels):  # type: ignore[no-untyped-def]
    number = 0
    drop = np.uint64(11)
    for cell in range(len(keys)):
        for entry in range(offsets[cell], offsets[cell + 1]):
            position = entry - offsets[cell]
            token = tokens[entry]
            # Without a branch until something is selected: the entry is written, and overwritten by the next one.
            entries[number], labels[number], out[entry] = entry, token, token
            if _draw(keys[cell], position, _SELECT) >> drop < select:
                number += 1
                action = _draw(keys[cell], position, _REPLACE) >> drop
                if action < to_mask:
                    out[entry] = mask
                elif action < to_change:
                    out[entry] = genes[_draw(keys[cell], position, _WHICH_GENE) % np.uint64(len(genes))]
    return number
