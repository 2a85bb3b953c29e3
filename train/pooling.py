"""From hidden states of tokens to one vector per cell."""

import torch
from torch import Tensor

from train.packing import Packed


def mean_pool(hidden_TD: Tensor, packed: Packed) -> Tensor:
    """Average the hidden states of each cell's genes; <cls> and <eos> stay out.

    Sums run in float32 whatever the precision of the hidden states.

    Parameters
    ----------
    hidden_TD
        float[T, D].
    packed
        The batch that they come from, on the same device.

    Returns
    -------
    float32[B, D].
    """
    weights_T1 = packed.gene_rows[:, None].to(torch.float32)
    weighted_TD = hidden_TD.float() * weights_T1
    if packed.is_rectangle:
        shape = (len(packed), packed.max_length, -1)
        return weighted_TD.view(shape).sum(dim=1) / weights_T1.view(shape).sum(dim=1)
    sums_BD = weighted_TD.new_zeros(len(packed), hidden_TD.shape[1]).index_add(0, packed.cell_of_row, weighted_TD)
    genes_B1 = weights_T1.new_zeros(len(packed), 1).index_add(0, packed.cell_of_row, weights_T1)
    return sums_BD / genes_B1


def first_pool(hidden_TD: Tensor, packed: Packed) -> Tensor:
    """Take the hidden state of each cell's first token: <cls>, or the top-ranked gene in a model without it.

    Returns
    -------
    float[B, D].
    """
    return hidden_TD[packed.offsets[:-1]]
