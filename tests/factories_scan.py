"""A corpus and a random model for scans, built in code."""

from pathlib import Path
from typing import Any

import torch

from corpus.reader import Corpus
from evaluate.perturb_settings import ScanSettings
from evaluate.scan_setup import Scan
from tests.factories import write_corpus
from train.model import MaskedLM
from train.model_folder import ModelCard, save_model
from train.presets import ModelSettings

LIMIT = 24
STATES = {"column": "cell_type", "start": "alpha", "goal": "beta", "alternates": ["delta"], "cells_per_state": 8}


def write_scan_inputs(folder: Path, num_cells: int = 60) -> tuple[str, str]:
    """Write a corpus and a model whose weights are so large that perturbations move its output well above rounding."""
    corpus = write_corpus(folder / "corpus", num_cells=num_cells, lengths=(4, 40))
    genes = Corpus(corpus).genes
    torch.manual_seed(0)
    config = ModelSettings(preset="tiny", max_length=LIMIT).bert_config(genes.vocab_size)
    config.initializer_range = 0.3
    card = ModelCard(kind="masked_lm", genes_hash=genes.hash, special_tokens="none", max_length=LIMIT)
    save_model(folder / "model", MaskedLM(config), card, genes)
    return str(corpus), str(folder / "model")


def make_scan(inputs: tuple[str, str], out: str | Path, **changes: Any) -> Scan:
    """A scan in this process, in several work units."""
    settings = {"states": STATES, "engine": {"workers": 0, "unit_tokens": 900}, **changes}
    return Scan(ScanSettings.model_validate(settings), *inputs, str(out))
