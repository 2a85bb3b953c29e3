"""Floating-point operations against torch's own counter, and the names of GPUs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

from train.flops import named_peak, peak_flops, training_flops
from train.presets import ModelSettings


def test_the_formula_is_what_torch_counts_in_stock_transformers():
    config = ModelSettings(preset="tiny", dropout=0, attention_dropout=0).bert_config(300)
    config._attn_implementation = "eager"  # torch does not count its fused CPU attention
    stock = BertForMaskedLM(config)
    tokens = torch.randint(4, 300, (3, 40))
    counter = FlopCounterMode(display=False)
    with counter:
        stock(input_ids=tokens, labels=tokens).loss.backward()
    assert counter.get_total_flops() == training_flops(config, np.full(3, 40), scored=3 * 40)


def test_the_published_sizes_cost_what_the_literature_says():
    config = ModelSettings(preset="mouse-6l").bert_config(56_084)
    lengths = np.full(100, 2_048)
    per_token = training_flops(config, lengths, scored=round(0.15 * lengths.sum())) / lengths.sum()
    assert per_token == pytest.approx(69.6e6, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_gpus_are_known_by_name(name, tflops):
    assert named_peak(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak_unless_the_user_gives_one():
    assert named_peak("NVIDIA L400") is None
    assert peak_flops(torch.device("cpu"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "fp32", 0.5) == 5e11
