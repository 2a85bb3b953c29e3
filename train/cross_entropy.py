"""Cross-entropy of a linear layer with a large vocabulary, without ever holding all logits.

Gradients are computed chunk by chunk in the forward pass, while a chunk's logits are at hand: three matrix products per
chunk, nothing recomputed, and memory bounded by one chunk. The idea is that of Hsu et al., "Liger Kernel" (2024,
arXiv:2410.10989). Shape letters: M rows, D hidden width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Largest number of logits held at once, by kind of device. On a CPU (32 MiB) most of them stay in the cache between
the five times that each is touched. For CUDA (512 MiB) derived, not measured: no cache holds them, and each chunk costs
a dozen launches."""


def linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor, max_logits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropies of `softmax(hidden @ weight.T + bias)` against labels.

    Parameters
    ----------
    hidden_MD, weight_VD, bias_V
        float; the products run in the autocast precision if there is one, the softmax and all sums in float32.
    labels_M
        int64[M]; M may be 0, then the loss and its gradients are 0.
    max_logits
        Bound on rows times vocabulary of one chunk (one row at least); by default that of `MAX_LOGITS`.

    Returns
    -------
    loss: float32 scalar, in nats; correct: int64 scalar, rows whose highest logit is the label's.
    """
    if max_logits is None:
        max_logits = MAX_LOGITS.get(hidden_MD.device.type, MAX_LOGITS["cuda"])
    rows = max(1, max_logits // len(weight_VD))
    loss, correct = _LinearCrossEntropy.apply(hidden_MD, weight_VD, bias_V, labels_M, rows, torch.is_grad_enabled())
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor, labels_M: Tensor, rows: int, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        correct = labels_M.new_zeros(())
        if with_grad:
            grad_hidden_MD = torch.empty_like(hidden_MD)
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        # One buffer for all chunks: fresh memory would cost the system a page fault every 4 KiB.
        buffer_rV = hidden_MD.new_empty((min(rows, len(labels_M)), len(weight_VD)), dtype=torch.float32)
        precision = _precision(hidden_MD)
        for start in range(0, len(labels_M), rows):
            chunk = slice(start, start + rows)
            hidden_mD, labels_m1 = hidden_MD[chunk], labels_M[chunk, None]
            logits_mV = buffer_rV[: len(hidden_mD)]
            if precision == torch.float32:
                torch.addmm(bias_V, hidden_mD, weight_VD.T, out=logits_mV)
            else:
                logits_mV.copy_(F.linear(hidden_mD, weight_VD, bias_V))
            label_logit_m1 = logits_mV.gather(1, labels_m1)
            highest_m1, guess_m1 = logits_mV.max(dim=1, keepdim=True)
            softmax_mV = torch.softmax(logits_mV, dim=1, out=logits_mV)
            # The most probable gene's share is at least 1 / V, so that its logarithm, unlike a rare label's, is exact.
            logsumexp_m1 = highest_m1 - softmax_mV.gather(1, guess_m1).log_()
            loss += (logsumexp_m1 - label_logit_m1).sum()
            correct += (guess_m1 == labels_m1).sum()
            if with_grad:
                # d loss / d logits = softmax - one-hot(label), written over the softmax.
                error_mV = softmax_mV.scatter_add_(1, labels_m1, softmax_mV.new_full(labels_m1.shape, -1.0))
                grad_bias_V += error_mV.sum(dim=0)
                error_mV = error_mV.to(precision)
                grad_hidden_MD[chunk] = error_mV @ weight_VD
                if precision == torch.float32:
                    grad_weight_VD.addmm_(error_mV.T, hidden_mD)
                else:
                    grad_weight_VD += error_mV.T @ hidden_mD
        if with_grad:
            ctx.save_for_backward(grad_hidden_MD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V.to(bias_V.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor | None, ...]:
        grads = (grad_loss.to(grad.dtype) * grad for grad in ctx.saved_tensors)
        return *grads, None, None, None


def _precision(hidden: Tensor) -> torch.dtype:
    """Precision of matrix products with these hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
