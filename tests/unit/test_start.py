"""Pretraining from a checkpoint: its weights are in the model, and tokens that may mean other genes are refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertForMaskedLM

from corpus.errors import UserError
from corpus.genes import GENES_SCHEMA, GeneTable
from corpus.reader import Corpus
from tests.factories import write_corpus
from train.presets import ModelSettings
from train.pretrain import PretrainTask
from train.settings import PretrainSettings
from train.start import check_special_tokens, make_start

SIZES = ModelSettings(preset="tiny", num_layers=1, hidden_size=16, max_length=24)
V1_HEAD = 2
"""Where genes begin in the human Geneformer V1 vocabulary, which has neither <cls> nor <eos>."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("start") / "corpus", num_cells=40, donors=(), imported=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory, imported) -> Path:
    """A folder as stock transformers writes it."""
    folder = tmp_path_factory.mktemp("published") / "stock"
    torch.manual_seed(1)
    BertForMaskedLM(SIZES.bert_config(Corpus(imported).genes.vocab_size)).save_pretrained(folder)
    return folder


def make_task(corpus: Path, init_from: Path, out: Path, **model: object) -> PretrainTask:
    values = {"corpus": str(corpus), "out": str(out), "init_from": str(init_from), "model": model}
    return PretrainTask(PretrainSettings.model_validate(values | {"batches": {"token_budget": 400}}))


def test_a_stock_checkpoint_is_the_start(imported, published, tmp_path):
    task = make_task(imported, published, tmp_path, special_tokens="none", dropout=0.1)
    model = task.build_model().eval()
    stock = BertForMaskedLM.from_pretrained(published).eval()
    batch = task.prepare(task.corpus.read_cells(np.arange(5)), epoch=0)
    with torch.no_grad():
        loss, _ = model(batch.packed, batch.rows, batch.labels)
        expected = 0.0
        for cell in range(len(batch.packed)):
            first, last = batch.packed.offsets[cell : cell + 2].tolist()
            own = (batch.rows >= first) & (batch.rows < last)
            logits = stock(input_ids=batch.packed.tokens[None, first:last]).logits[0, batch.rows[own] - first]
            expected += torch.nn.functional.cross_entropy(logits, batch.labels[own], reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (task.max_length, task.start.config.hidden_dropout_prob) == (24, 0.1)
    assert task.notes[-1] == f"starting from {published}/model.safetensors"


def test_old_pickled_weights_are_read_and_name_the_run(imported, published, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text((published / "config.json").read_text())
    weights = BertForMaskedLM.from_pretrained(published).state_dict()
    torch.save(weights, tmp_path / "old/pytorch_model.bin")
    old = make_task(imported, tmp_path / "old", tmp_path, special_tokens="none")
    new = make_task(imported, published, tmp_path, special_tokens="none")
    for name, tensor in new.build_model().state_dict().items():
        assert torch.equal(tensor, old.build_model().state_dict()[name]), name
    # Another file, another run; a copy of the same file elsewhere is the same run.
    assert old.identity() != new.identity()
    assert old.identity()["settings"] == new.identity()["settings"]


def test_a_head_that_is_not_in_the_checkpoint_is_told(imported, published, tmp_path):
    BertForMaskedLM.from_pretrained(published).bert.save_pretrained(tmp_path / "bare")
    task = make_task(imported, tmp_path / "bare", tmp_path, special_tokens="none")
    assert "not in it and drawn anew: cls.predictions.bias, cls.predictions.transform.dense.weight" in task.notes[-1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "does not say whether its cells begin with <cls>"),
        ({"special_tokens": "none", "num_layers": 6}, "model.num_layers = 6, but .*num_hidden_layers = 1"),
        ({"special_tokens": "none", "max_length": 25}, "model.max_length = 25: .* has 24 positions"),
    ],
)
def test_contradictions_are_refused(imported, published, tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        make_task(imported, published, tmp_path, **model)


def test_a_vocabulary_of_the_corpus_is_no_published_one(published, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", num_cells=10, donors=())
    with pytest.raises(UserError, match=f"gene table {Corpus(corpus).genes.hash} .* is the corpus's own.*dictionary"):
        make_task(corpus, published, tmp_path, special_tokens="none")


def test_a_larger_vocabulary_is_another_one(published, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", num_cells=10, num_genes=81, donors=(), imported=True)
    with pytest.raises(UserError, match=r"has 84 tokens, the gene table .* has 85"):
        make_task(corpus, published, tmp_path, special_tokens="none")


def test_our_own_model_goes_on_with_its_genes_alone(imported, published, tmp_path):
    first = make_task(imported, published, tmp_path, special_tokens="cls_eos", max_length=20)
    weights = first.build_model().state_dict()
    first.save(tmp_path / "model", weights, {})
    task = make_task(imported, tmp_path / "model", tmp_path / "next")
    assert (task.max_length, task.special_tokens) == (20, "cls_eos")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in task.build_model().state_dict().items())
    assert json.loads((tmp_path / "model/card.json").read_text())["preset"] is None
    other = write_corpus(tmp_path / "other", num_cells=10, donors=(), seed=1)
    hashes = [Corpus(corpus).genes.hash for corpus in (other, imported)]
    with pytest.raises(UserError, match=f"gene table is {hashes[0]}, the model's is {hashes[1]}.*vocabulary.corpus"):
        make_task(other, tmp_path / "model", tmp_path / "next")


def test_cls_is_refused_where_the_vocabulary_has_a_gene_in_its_place():
    names = [f"ENSG{number:011d}" for number in range(5)]
    columns = [range(V1_HEAD, V1_HEAD + 5), names, names, ["protein_coding"] * 5, [1.0] * 5, [0] * 5]
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, GENES_SCHEMA, strict=True)]
    genes = GeneTable(pa.table(arrays, schema=GENES_SCHEMA))
    check_special_tokens(genes, "none", "corpus")
    with pytest.raises(UserError, match=r"has no <cls>: its first gene, ENSG00000000000, has token 2"):
        check_special_tokens(genes, "cls_eos", "corpus")


def test_without_a_checkpoint_the_settings_decide(imported):
    start = make_start(SIZES, Corpus(imported), None)
    assert (start.weights, start.config.num_hidden_layers, start.max_length) == (None, 1, 24)
