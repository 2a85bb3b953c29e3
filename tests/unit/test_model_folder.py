"""Model folders: what stock transformers makes of them, and what is refused."""

import json
import shutil

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification

from corpus.errors import UserError
from corpus.reader import Cells, Corpus
from tests.factories import make_genes, write_corpus
from train.model import Classifier, MaskedLM
from train.model_folder import (
    ModelCard,
    check_same_genes,
    label_numbers,
    load_model,
    load_pretrained_encoder,
    save_model,
)
from train.packing import pack
from train.presets import ModelSettings

SETTINGS = ModelSettings(preset="tiny", max_length=32)
LABELS = {"alpha": 0, "beta": 1, "delta": 2}


@pytest.fixture(scope="module")
def genes():
    return make_genes(40, np.random.default_rng(0))


def new_model(genes, kind="masked_lm", seed=0):
    torch.manual_seed(seed)
    config = SETTINGS.bert_config(genes.vocab_size)
    model = MaskedLM(config) if kind == "masked_lm" else Classifier(config, len(LABELS), "first")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms must leave a trace too
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def new_card(genes, kind="masked_lm", **changes):
    head = {} if kind == "masked_lm" else {"pooling": "first", "label_map": LABELS}
    values = {"kind": kind, "genes_hash": genes.hash, "special_tokens": "none", "max_length": 32, "preset": "tiny"}
    return ModelCard(**(values | head | changes))


@pytest.fixture
def folder(tmp_path, genes):
    save_model(tmp_path / "model", new_model(genes), new_card(genes, training={"steps": 3}), genes)
    return tmp_path / "model"


@pytest.fixture
def batch(genes):
    rng = np.random.default_rng(1)
    tokens = np.concatenate([rng.permutation(genes.tokens)[:20] for _ in range(3)])
    return pack(Cells(np.arange(3), np.arange(4) * 20, tokens), 32)


def edit_card(folder, **changes):
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["masked_lm", "classifier"])
def test_what_is_saved_is_what_is_loaded(tmp_path, genes, batch, kind):
    model = new_model(genes, kind)
    written = save_model(tmp_path / "model", model, new_card(genes, kind, training={"loss": 1.5}), genes)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.card == written
    assert loaded.card.training == {"loss": 1.5}
    assert loaded.genes.hash == genes.hash
    assert loaded.checksum == written.sha256["model.safetensors"]
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    state = loaded.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model.bert(batch), model.bert(batch))


def test_stock_masked_lm_loads_the_folder_and_gives_the_same_hidden_states(folder, genes, batch):
    stock, info = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    model = load_model(folder).model
    with torch.no_grad():
        expected = stock.eval().bert(input_ids=batch.tokens.view(3, 20)).last_hidden_state
        torch.testing.assert_close(model.bert(batch), expected.flatten(0, 1), atol=1e-5, rtol=0)
    assert stock.cls.predictions.decoder.weight is stock.bert.embeddings.word_embeddings.weight


def test_stock_classifier_loads_the_folder_with_its_labels(tmp_path, genes, batch):
    model = new_model(genes, "classifier")
    save_model(tmp_path / "model", model, new_card(genes, "classifier"), genes)
    stock, info = BertForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert stock.config.id2label == {0: "alpha", 1: "beta", 2: "delta"}
    with torch.no_grad():
        expected = stock.eval()(input_ids=batch.tokens.view(3, 20)).logits
        torch.testing.assert_close(model.logits(batch), expected, atol=1e-5, rtol=1e-5)


def test_a_folder_opens_from_another_file_system(folder, genes):
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/models/a", recursive=True)
    try:
        assert load_model("memory://models/a").checksum == load_model(folder).checksum
        assert load_pretrained_encoder("memory://models/a").checksum == load_model(folder).checksum
    finally:
        memory.rm("/models", recursive=True)


def test_a_finished_model_is_not_overwritten_and_a_cut_export_is(folder, genes):
    with pytest.raises(UserError, match="holds a model already"):
        save_model(folder, new_model(genes, seed=1), new_card(genes), genes)
    (folder / "card.json").unlink()
    other = save_model(folder, new_model(genes, seed=1), new_card(genes), genes)
    assert load_model(folder).checksum == other.sha256["model.safetensors"]


def test_gathered_weights_are_saved_in_place_of_the_modules(tmp_path, genes):
    weights = new_model(genes, seed=5).state_dict()
    save_model(tmp_path / "model", new_model(genes, seed=0), new_card(genes), genes, state_dict=weights)
    loaded = load_model(tmp_path / "model").model.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "card.json", "genes"])
def test_a_missing_file_is_named(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=name):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_is_named(folder, name, damage):
    data = bytearray((folder / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    else:
        del data[-10:]
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: damaged or changed"):
        load_model(folder)


def test_an_edited_gene_table_is_named(folder, genes):
    other = make_genes(41, np.random.default_rng(1))
    save_model(folder.parent / "other", new_model(other), new_card(other), other)
    shutil.copy(folder.parent / "other" / other.path, folder / genes.path)
    with pytest.raises(UserError, match=f"{genes.hash}.*the file was changed"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"kind": "oracle"}, "kind"),
        ({"format_version": 2}, "format_version"),
        ({"pooling": "mean"}, "neither pooling nor label_map"),
        ({"max_length": 33}, "exceeds the 32 positions"),
        ({"genes_hash": "0123456789abcdef"}, "0123456789abcdef.parquet: no such file"),
    ],
)
def test_a_wrong_card_is_named(folder, changes, message):
    edit_card(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_map": {"beta": 0, "alpha": 1}}, "sorted"),
        ({"label_map": {"alpha": 1, "beta": 2}}, "numbered"),
        ({"label_map": None}, "needs pooling and label_map"),
        ({"pooling": "cls"}, "cls_eos"),
    ],
)
def test_a_classifier_card_must_hold_together(genes, changes, message):
    with pytest.raises(ValueError, match=message):
        new_card(genes, "classifier", **changes)


def test_labels_are_numbered_in_sorted_order():
    assert list(label_numbers(["b", "c", "a", "b"]).items()) == [("a", 0), ("b", 1), ("c", 2)]


def test_parts_that_do_not_belong_together_are_not_saved(tmp_path, genes):
    other = make_genes(41, np.random.default_rng(1))
    with pytest.raises(ValueError, match="card says genes"):
        save_model(tmp_path / "a", new_model(genes), new_card(genes), other)
    with pytest.raises(ValueError, match="45 tokens in the gene table, 44 in the model"):
        save_model(tmp_path / "b", new_model(genes), new_card(other), other)
    with pytest.raises(ValueError, match="the card says classifier"):
        save_model(tmp_path / "c", new_model(genes), new_card(genes, "classifier"), genes)


def test_another_corpus_is_refused_with_both_hashes(tmp_path, genes):
    corpus = Corpus(write_corpus(tmp_path / "corpus", num_cells=6))
    card = new_card(genes)
    with pytest.raises(UserError, match=f"{corpus.genes.hash}.*{genes.hash}"):
        check_same_genes(card, corpus)
    check_same_genes(card.model_copy(update={"genes_hash": corpus.genes.hash}), corpus)


# Weights to start from.


def write_published(folder, model, rename=lambda name: name, extra=None):
    """Write a folder as published ones are: config.json and pytorch_model.bin, tied decoder included."""
    folder.mkdir()
    state = {rename(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(state | (extra or {}), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


@pytest.mark.parametrize("kind", ["masked_lm", "classifier"])
def test_a_classifier_starts_from_the_encoder_of_a_checkpoint(tmp_path, genes, kind):
    source = new_model(genes, kind)
    save_model(tmp_path / "model", source, new_card(genes, kind), genes)
    pretrained = load_pretrained_encoder(tmp_path / "model")
    target = Classifier(pretrained.config, 4)
    head = target.classifier.weight.clone()
    fresh = pretrained.load_into(target)
    for name, tensor in source.bert.state_dict().items():
        assert torch.equal(target.bert.state_dict()[name], tensor), name
    assert torch.equal(target.classifier.weight, head)
    pooler = [] if kind == "classifier" else ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert fresh == [*pooler, "classifier.weight", "classifier.bias"]


def test_a_published_checkpoint_is_read_with_its_old_names(tmp_path, genes, batch):
    source = new_model(genes)
    words = source.bert.embeddings.word_embeddings.weight
    folder = write_published(
        tmp_path / "published",
        source,
        rename=lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
        extra={
            "cls.predictions.decoder.weight": words,
            "cls.predictions.decoder.bias": source.cls["predictions"].bias,
            "bert.embeddings.position_ids": torch.arange(32)[None],
        },
    )
    pretrained = load_pretrained_encoder(folder)
    target = MaskedLM(pretrained.config).eval()
    assert pretrained.load_into(target) == []
    with torch.no_grad():
        assert torch.equal(target.bert(batch), source.bert(batch))


def test_a_checkpoint_written_by_stock_transformers_is_read(tmp_path, genes, batch):
    stock = BertForMaskedLM(SETTINGS.bert_config(genes.vocab_size)).eval()
    stock.save_pretrained(tmp_path / "stock")
    pretrained = load_pretrained_encoder(tmp_path / "stock")
    target = MaskedLM(pretrained.config).eval()
    assert pretrained.load_into(target) == []
    with torch.no_grad():
        expected = stock.bert(input_ids=batch.tokens.view(3, 20)).last_hidden_state
        torch.testing.assert_close(target.bert(batch), expected.flatten(0, 1), atol=1e-5, rtol=0)


def test_an_encoder_without_the_prefix_is_read(tmp_path, genes):
    source = new_model(genes)
    folder = write_published(tmp_path / "bare", source, rename=lambda name: name.removeprefix("bert."))
    assert MaskedLM(source.config).bert.state_dict().keys() == {
        name.removeprefix("bert.") for name in load_pretrained_encoder(folder).tensors if name.startswith("bert.")
    }


def test_a_missing_encoder_tensor_is_an_error(tmp_path, genes):
    source = new_model(genes)
    lost = "bert.encoder.layer.1.attention.self.key.weight"
    folder = write_published(tmp_path / "p", source, rename=lambda name: "lost" if name == lost else name)
    pretrained = load_pretrained_encoder(folder)
    with pytest.raises(UserError, match=f"missing, the first is {lost}"):
        pretrained.load_into(Classifier(pretrained.config, 3))


@pytest.mark.parametrize("positions", [16, 64])
def test_a_position_table_of_another_length_is_an_error(tmp_path, genes, positions):
    source = new_model(genes)
    source.config.max_position_embeddings = positions
    pretrained = load_pretrained_encoder(write_published(tmp_path / "p", source))
    with pytest.raises(UserError, match=rf"position_embeddings.*\(32, 64\).*\({positions}, 64\)"):
        pretrained.load_into(MaskedLM(pretrained.config))


def test_an_untied_decoder_is_an_error(tmp_path, genes):
    source = new_model(genes)
    other = torch.zeros_like(source.bert.embeddings.word_embeddings.weight)
    folder = write_published(tmp_path / "p", source, extra={"cls.predictions.decoder.weight": other})
    with pytest.raises(UserError, match="only tied"):
        load_pretrained_encoder(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "sillu", "config.json: .*'sillu'"),
        ("model_type", "gpt2", "config.json: model_type is 'gpt2'"),
        ("hidden_size", 63, "config.json: .*does not divide"),
    ],
)
def test_a_config_of_another_model_is_an_error(tmp_path, genes, key, value, message):
    folder = write_published(tmp_path / "p", new_model(genes))
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_pretrained_encoder(folder)


def test_weights_that_are_no_weights_are_refused(tmp_path, genes):
    folder = write_published(tmp_path / "p", new_model(genes))
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a readable"):
        load_pretrained_encoder(folder)
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="dictionary of tensors"):
        load_pretrained_encoder(folder)
    (folder / "model.safetensors").write_bytes(b"neither")
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable"):
        load_pretrained_encoder(folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, genes):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = write_published(tmp_path / "p", new_model(genes))
    torch.save({"weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_pretrained_encoder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_or_config_is_named(tmp_path, genes):
    folder = write_published(tmp_path / "p", new_model(genes))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_pretrained_encoder(folder)
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_pretrained_encoder(tmp_path / "nowhere")


def test_half_precision_weights_become_float32(tmp_path, genes):
    source = new_model(genes).half()
    pretrained = load_pretrained_encoder(write_published(tmp_path / "p", source))
    assert {tensor.dtype for tensor in pretrained.tensors.values()} == {torch.float32}


def test_our_own_damaged_weights_are_no_start(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.bias"] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="damaged or changed"):
        load_pretrained_encoder(folder)
