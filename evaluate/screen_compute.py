"""A guess of what the deletion of each gene does, from a few passes a cell instead of one for each gene.

Deleting a gene does two things to the other genes: nobody attends to it any more, and those behind it move up one
position. Both are paths along which the cell's embedding can be differentiated.

Attention: multiplying a gene's attention weights, in all layers and heads and before they are normalised, by a gate g
leaves the cell as it is at g = 1 and takes the gene out at g = 0; the guess is minus the slope at 1. The idea is
attribution patching (Kramar et al., arXiv:2403.00745).

Position: the cell is run as it is, and with all genes behind a few places ("anchors") moved up. There the effect of the
move is known exactly. In between, each gene's own step is guessed from the slopes at the two anchors around it, and
the guesses of a stretch are made to add up to what is known. With one anchor, the cell as it is, there is only its
slope: the purely first-order guess, which is poor where the model's position embeddings are rough.

What is not linear is missed: attention that is saturated, and effects that cancel at the slope but not over the whole
way. A guess orders genes for an exact scan; it is no result.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.schema import CLS, EOS
from train.attention import Attend
from train.model import Encoder
from train.packing import SpecialTokens

_PAD_HEADS = 8  # flash kernels want widths of heads in eights


def guess_deletions(
    encoder: Encoder,
    genes: Tensor,
    centroids: Tensor,
    *,
    num_layers: int,
    special_tokens: SpecialTokens = "none",
    embedding: str = "mean",
    anchors: int = 1,
) -> Tensor:
    """Guess the shifts that the deletion of each gene of one cell would cause.

    Parameters
    ----------
    encoder
        In evaluation mode; its parameters need no gradient.
    genes
        int64[n]: the cell's input, on the encoder's device.
    centroids
        float64[states, d].
    embedding
        "mean" over genes, or "cls".
    anchors
        Sequences to run forward once, and backward once for each state.

    Returns
    -------
    float64[n, states]: cosine to each centroid, after minus before.
    """
    tokens = genes if special_tokens == "none" else F.pad(F.pad(genes, (1, 0), value=CLS), (0, 1), value=EOS)
    first = 0 if special_tokens == "none" else 1
    rows = slice(first, first + len(genes))
    parts = encoder.embeddings
    places = parts.position_embeddings.weight[: len(tokens)].detach()
    # Row k would get the position of row k - 1.
    steps = torch.zeros_like(places)
    steps[1:] = places[:-1] - places[1:]
    # At each anchor the rows behind it have moved; behind the last row there are none.
    last = torch.linspace(len(tokens) - 1, first, anchors).round().long().unique().flip(0)
    moved = torch.arange(len(tokens), device=tokens.device) > last.to(tokens.device)[:, None]
    with torch.no_grad():
        plain = parts.word_embeddings(tokens) + parts.token_type_embeddings(tokens.new_zeros(1)) + places
    inputs = (plain + moved[:, :, None] * steps).requires_grad_()
    gates = torch.zeros(moved.shape, device=tokens.device, requires_grad=True)  # logarithms of the gates
    with torch.enable_grad():
        hidden = parts.LayerNorm(inputs).flatten(0, 1)
        for layer in encoder.encoder["layer"][:num_layers]:  # type: ignore[index]
            hidden = layer(hidden, _gated_attention(gates))
        hidden = hidden.unflatten(0, moved.shape)
        pooled = hidden[:, 0].double() if embedding == "cls" else hidden[:, rows].double().mean(dim=1)
        cosines = F.normalize(pooled, dim=1) @ F.normalize(centroids, dim=1).T
    guesses = []
    for state in range(len(centroids)):
        slopes, of_gates = torch.autograd.grad(cosines[:, state].sum(), [inputs, gates], retain_graph=True)
        each = (slopes.double() * steps.double()).sum(dim=2)
        guess = _moves(cosines[:, state].detach(), each, last.tolist()) - _between(of_gates.double(), last.tolist())
        guesses.append(guess[rows])
    return torch.stack(guesses, dim=1)


def _moves(cosines: Tensor, each: Tensor, last: list[int]) -> Tensor:
    """Effect of moving up all rows behind each row.

    Parameters
    ----------
    cosines
        float64[anchors]: at each anchor.
    each
        float64[anchors, rows]: slope times step of each row.
    last
        Last row in its old place at each anchor, descending.
    """
    own = each[0].clone()
    for anchor, (stop, start) in enumerate(pairwise(last)):
        stretch = slice(start + 1, stop + 1)
        guessed = (each[anchor, stretch] + each[anchor + 1, stretch]) / 2
        known = cosines[anchor + 1] - cosines[anchor]
        own[stretch] = guessed + (known - guessed.sum()) / len(guessed)
    return own.sum() - own.cumsum(0)


def _between(values: Tensor, last: list[int]) -> Tensor:
    """Each row's value at its own place between the anchors, [rows], of values at the anchors, [anchors, rows]."""
    out = values[-1].clone()
    out[last[0] :] = values[0, last[0] :]
    for anchor, (stop, start) in enumerate(pairwise(last)):
        share = torch.linspace(0, 1, stop - start + 1, dtype=values.dtype, device=values.device)
        stretch = slice(start, stop + 1)
        out[stretch] = torch.lerp(values[anchor + 1, stretch], values[anchor, stretch], share)
    return out


def _gated_attention(gates_AT: Tensor) -> Attend:
    """Attention over A sequences of T tokens with a term for each key, as one more column of queries and keys."""

    def attend(q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor) -> Tensor:
        width = q_RHK.shape[-1]
        scale = width**-0.5
        column = (gates_AT.flatten() / scale).to(k_RHK.dtype)[:, None, None].expand(*k_RHK.shape[:2], 1)
        q = F.pad(torch.cat([q_RHK, torch.ones_like(column)], dim=-1), (0, _PAD_HEADS - 1))
        k = F.pad(torch.cat([k_RHK, column], dim=-1), (0, _PAD_HEADS - 1))
        v = F.pad(v_RHK, (0, _PAD_HEADS))
        q, k, v = (x.unflatten(0, gates_AT.shape).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)[..., :width]

    return attend
