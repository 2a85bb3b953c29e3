"""Self-attention over packed cells: every token sees its whole cell and nothing else.

Shape letters: T packed tokens, H heads, K width of a head, n cells and L tokens of one rectangle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corpus.errors import UserError
from train.packing import Packed

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.11
    varlen_attn = None  # type: ignore[assignment]

Backend = Literal["auto", "padded", "varlen"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_UNBOUNDED = 1 << 62


class Limits(NamedTuple):
    """How cells are grouped into rectangles."""

    min_fill: float
    """Shortest cell of a rectangle as a share of its longest: attention is quadratic, so the bound is on length."""
    max_scores: int
    """Largest n * L * L of a rectangle of more than one cell."""


def _limits(device: torch.device, dropout: float) -> Limits:
    if device.type != "cpu":
        return Limits(min_fill=1 / 2, max_scores=_UNBOUNDED)  # fewer and larger kernels; not measured
    # Measured on lengths 64 to 1,250. The CPU kernel has no dropout: scores then become explicit, and large rectangles
    # fall out of the cache (1.5 times the time at 4 Mi scores).
    return Limits(min_fill=0.9, max_scores=1 << 20 if dropout else _UNBOUNDED)


def make_attention(packed: Packed, dtype: torch.dtype, dropout: float, backend: Backend = "auto") -> Attend:
    """Choose how the cells of a batch are attended to; one choice serves all layers.

    Parameters
    ----------
    packed
        The batch, on the device where attention will run.
    dtype
        Precision of queries, keys and values.
    dropout
        Probability with which an attention weight is dropped; 0 outside training.
    backend
        "varlen" is torch's variable-length flash kernel (CUDA, half precision, no dropout), "padded" is scaled dot
        product attention over rectangles of similar length (any device), "auto" takes the first that can do it.

    Returns
    -------
    A function of queries, keys and values, float[T, H, K] each, to float[T, H, K].

    Raises
    ------
    UserError
        If "varlen" was asked for and cannot do it.
    """
    obstacle = _varlen_obstacle(packed.tokens.device, dtype, dropout)
    if backend == "varlen" and obstacle:
        raise UserError(f"attention backend 'varlen': {obstacle}")
    if backend == "padded" or obstacle:
        return PaddedAttention(packed, dropout)
    return _varlen_attention(packed)


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, dropout: float) -> str | None:
    if varlen_attn is None:
        return f"needs torch 2.11 or later, found {torch.__version__}"
    if device.type != "cuda":
        return f"runs on CUDA only, the batch is on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, found {dtype}"
    if dropout:
        return f"has no attention dropout: set attention_dropout = 0 (found {dropout})"
    return None


def _varlen_attention(packed: Packed) -> Attend:
    bounds, longest = packed.cu_seqlens, packed.max_length

    def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        return cast("Tensor", varlen_attn(q_THK, k_THK, v_THK, bounds, bounds, longest, longest))

    return attend


@dataclass(frozen=True)
class Rectangle:
    """Cells of similar length, padded to the longest of them."""

    num_cells: int
    length: int
    mask: Tensor | None
    """bool[n, 1, 1, L]: True at real tokens; None where all cells fill the rectangle."""

    def rows(self, x_RHK: Tensor) -> Tensor:
        """View this rectangle's rows as [n, H, L, K]."""
        return x_RHK.unflatten(0, (self.num_cells, self.length)).transpose(1, 2)


class PaddedAttention:
    """Scaled dot product attention over rectangles of cells; exact, whatever the padding."""

    def __init__(self, packed: Packed, dropout: float) -> None:
        self.dropout = dropout
        device = packed.tokens.device
        groups = group_by_length(packed.lengths, _limits(device, dropout))
        self.rectangles = [_rectangle(packed.lengths[cells], device) for cells in groups]
        self.sizes = [rectangle.num_cells * rectangle.length for rectangle in self.rectangles]
        # Rows of the batch in rectangle order (padding repeats row 0, and is masked), and the way back. Cells of one
        # length stay in their order, and nothing needs to move.
        self.to_rectangles: Tensor | None = None
        self.to_packed: Tensor | None = None
        if not packed.is_rectangle:
            there, back = _row_orders(packed.lengths, groups)
            self.to_rectangles = torch.from_numpy(there).to(device, non_blocking=True)
            self.to_packed = torch.from_numpy(back).to(device, non_blocking=True)

    def __call__(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Attend; float[T, H, K] in and out."""
        if self.to_rectangles is not None:
            q_THK, k_THK, v_THK = (x.index_select(0, self.to_rectangles) for x in (q_THK, k_THK, v_THK))
        # split, not slices: the backward of each slice would fill a gradient of the whole batch with zeros.
        parts = zip(self.rectangles, *(x.split(self.sizes) for x in (q_THK, k_THK, v_THK)), strict=True)
        outputs = [self._attend(rectangle, q, k, v) for rectangle, q, k, v in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out if self.to_packed is None else out.index_select(0, self.to_packed)

    def _attend(self, rectangle: Rectangle, q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor) -> Tensor:
        q, k, v = (rectangle.rows(x) for x in (q_RHK, k_RHK, v_RHK))
        out_nHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=rectangle.mask, dropout_p=self.dropout)
        return out_nHLK.transpose(1, 2).flatten(0, 1)


def group_by_length(lengths: np.ndarray, limits: Limits) -> list[np.ndarray]:
    """Cut cells, longest first, into groups that can share a rectangle.

    Parameters
    ----------
    lengths
        int64[B].
    limits
        Bounds of a rectangle.

    Returns
    -------
    Groups of cell numbers, int64 each, together every cell once.
    """
    order = np.argsort(-lengths, kind="stable")
    starts = [0]
    for place, length in enumerate(lengths[order].tolist()):
        first = starts[-1]
        longest = int(lengths[order[first]])
        too_ragged = length < limits.min_fill * longest
        too_large = (place + 1 - first) * longest**2 > limits.max_scores
        if place > first and (too_ragged or too_large):
            starts.append(place)
    return np.split(order, starts[1:])


def _rectangle(lengths: np.ndarray, device: torch.device) -> Rectangle:
    longest = int(lengths.max())
    if (lengths == longest).all():
        return Rectangle(len(lengths), longest, None)
    mask_nL = np.arange(longest) < lengths[:, None]
    mask = torch.from_numpy(mask_nL).to(device, non_blocking=True)
    return Rectangle(len(lengths), longest, mask[:, None, None, :])


def _row_orders(lengths: np.ndarray, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Packed row of each rectangle row (int64[R], 0 at padding), rectangle row of each packed row (int64[T])."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    parts = []
    for cells in groups:
        places = np.arange(lengths[cells].max())
        parts.append(np.where(places < lengths[cells, None], offsets[cells, None] + places, -1).ravel())
    there = np.concatenate(parts)
    real = np.flatnonzero(there >= 0)
    back = np.empty(offsets[-1], dtype=np.int64)
    back[there[real]] = real
    return np.maximum(there, 0), back
