"""The benchmarks compare like with like: every rung has the same loss, and every token of a corpus is counted once."""

import argparse
from itertools import takewhile

import numpy as np
import pytest

from benchmarks import loader, training
from corpus.reader import Corpus
from tests.factories import write_corpus
from train.presets import ModelSettings


def test_all_rungs_of_the_ladder_start_from_one_loss():
    options = argparse.Namespace(device="cpu", precision="fp32", token_budget=500)
    lengths = np.random.default_rng(0).integers(20, 70, 30)
    cells = training.draw_cells(lengths, 300, 64, np.random.default_rng(0))
    config = ModelSettings(preset="tiny", max_length=64).bert_config(300)
    rungs = list(takewhile(lambda rung: rung.name != "deepspeed", training.ladder(options, cells, config)))
    assert [rung.name for rung in rungs[:3]] == ["plain", "masked_head", "chunked_head"]
    for rung in rungs:
        assert rung.initial_loss == pytest.approx(rungs[0].initial_loss, rel=1e-5), rung.name
        before = [parameter.detach().clone() for parameter in rung.model.parameters()]
        rung.run(rung.batches[:1])
        assert any((now != then).any() for now, then in zip(rung.model.parameters(), before, strict=True)), rung.name


def test_the_loader_counts_the_tokens_of_the_corpus(tmp_path):
    corpus = Corpus(write_corpus(tmp_path / "corpus"))
    options = argparse.Namespace(corpus="toy", max_length=30, token_budget=200, threads=2, epochs=2)
    found = loader.measure(corpus, options)
    assert found["tokens_per_epoch"] == np.minimum(corpus.lengths, 30).sum()
    assert 0.1 < found["masked_share"] < 0.2
