"""Which genes a cell must guess in an epoch: a pure function of (seed, epoch, cell number, position).

Nothing is drawn from a stream that batches share, so the mask of a cell does not depend on its batch mates, the rank,
the number of workers, or where a run was resumed. Each cell and epoch has its own SplitMix64 sequence (Steele, Lea,
Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), of which position p owns three outputs from 3p.

Tokens are selected independently of each other, as in the published models; a short cell may therefore have none
selected. It then adds nothing to a loss that is weighted per masked token.
"""

from dataclasses import dataclass

import numpy as np

from corpus.reader import Cells
from corpus.schema import MASK

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_SELECT, _REPLACE, _WHICH_GENE = 0, 1, 2
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
        `packed.gene_row_numbers[entries]`.
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
    lengths = cells.lengths
    keys = np.repeat(_cell_keys(seed, epoch, cells.index), lengths)
    positions = np.arange(len(cells.tokens)) - np.repeat(cells.offsets[:-1], lengths)
    entries = np.flatnonzero(_below(_draw(keys, positions, _SELECT), probability))
    keys, positions = keys[entries], positions[entries]

    action = _draw(keys, positions, _REPLACE)
    masked = _below(action, mask_share)
    replaced = ~masked & _below(action, mask_share + random_share)
    tokens = cells.tokens.copy()
    tokens[entries[masked]] = mask_token
    which = _draw(keys[replaced], positions[replaced], _WHICH_GENE) % np.uint64(len(gene_tokens))
    tokens[entries[replaced]] = gene_tokens[which]
    hidden = Cells(cells.index, cells.offsets, tokens, cells.counts)
    return MaskedCells(hidden, entries, cells.tokens[entries].astype(np.int64))


def _cell_keys(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """Seed of each cell's sequence, uint64[cells]: seed, epoch and cell number enter one after the other."""
    key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    key = _mix(key + np.uint64(epoch))
    return _mix(key + index.astype(np.uint64))


def _draw(keys: np.ndarray, positions: np.ndarray, lane: int) -> np.ndarray:
    """Output `3 * position + lane` of the SplitMix64 sequence with this seed, uint64."""
    step = positions.astype(np.uint64) * _DRAWS_PER_TOKEN + np.uint64(lane + 1)
    return _finalise(keys + step * _GOLDEN_GAMMA)


def _mix(x: np.ndarray) -> np.ndarray:
    return _finalise(x + _GOLDEN_GAMMA)


def _finalise(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's output function (Stafford's variant 13), wrapping modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _below(draws: np.ndarray, probability: float) -> np.ndarray:
    """Bernoulli outcomes, bool, by comparing the upper 53 bits: 0 never and 1 always happens."""
    return (draws >> np.uint64(11)) < np.uint64(round(probability * 2**53))
