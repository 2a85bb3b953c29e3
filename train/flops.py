"""Floating-point operations of training, and how much of a device's peak they are (MFU).

Model FLOP utilisation (Chowdhery et al., "PaLM", 2022, arXiv:2204.02311, appendix B) counts what the mathematics needs,
not what a kernel happens to do: padding, recomputation and rows that no loss reads do not count.
"""

import re
from typing import Protocol

import numpy as np
import torch

# Dense bf16 tensor-core peak of one device, TFLOP/s, from the makers' data sheets (without sparsity).
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


class Sizes(Protocol):
    """What of a `BertConfig` decides the work."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int


def training_flops(config: Sizes, lengths: np.ndarray, scored: int) -> float:
    """Operations of one forward and backward pass of masked-LM training without padding.

    Per token and layer the forward pass takes 2 (4 d^2 + 2 d f) for the linear maps and 4 n d for attention to the n
    tokens of its cell; per scored token the head takes 2 (d^2 + d V). The backward pass takes twice the forward pass.

    Parameters
    ----------
    config
        d = hidden_size, f = intermediate_size, V = vocab_size.
    lengths
        int64[cells]: tokens of each cell, special tokens included.
    scored
        Tokens that the head predicts.
    """
    d, f = config.hidden_size, config.intermediate_size
    tokens, pairs = float(lengths.sum()), float(np.square(lengths.astype(np.float64)).sum())
    layer = tokens * 2 * (4 * d * d + 2 * d * f) + pairs * 4 * d
    head = scored * 2 * (d * d + d * config.vocab_size)
    return 3 * (config.num_hidden_layers * layer + head)


def peak_flops(device: torch.device, precision: str, tflops: float | None = None) -> float | None:
    """Peak of one device in operations per second.

    Parameters
    ----------
    tflops
        The user's own figure, which wins.

    Returns
    -------
    None where the peak is not known: CPUs, unlisted GPUs, and precisions other than bf16.
    """
    if tflops is not None:
        return tflops * 1e12
    if device.type != "cuda" or precision != "bf16":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Peak in operations per second of a GPU by the name that CUDA gives it, e.g. "NVIDIA H100 80GB HBM3"."""
    for known, tflops in _PEAK_TFLOPS.items():
        words = known.split()
        if all(re.search(rf"(?<![A-Z0-9]){word}(?![A-Z0-9])", name, re.IGNORECASE) for word in words):
            return tflops * 1e12
    return None
