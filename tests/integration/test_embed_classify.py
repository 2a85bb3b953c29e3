"""Embedding and classification of a small corpus, against stock transformers and against hand-made cases."""

import json
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from transformers import BertForMaskedLM, BertForSequenceClassification

from corpus.errors import UserError
from corpus.reader import Corpus
from corpus.settings import parse
from evaluate.__main__ import VERBS
from evaluate.commands import ClassifyCommand, EmbedCommand
from evaluate.encode import EncodeJob, EncodeWorker
from evaluate.perturb_settings import ReadoutSettings
from tests.factories import write_corpus
from train.model import Classifier, MaskedLM, Pooling
from train.model_folder import ModelCard, save_model
from train.packing import SpecialTokens
from train.presets import ModelSettings

LABELS = {"alpha": 0, "beta": 1, "delta": 2}
MAX_LENGTH = 24  # shorter than many of the cells


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), num_cells=61, num_shards=3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", corpus_folder)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "c", corpus_folder, labels=LABELS)


def make_model(
    folder: Path,
    corpus_folder: Path,
    *,
    labels: dict[str, int] | None = None,
    special_tokens: SpecialTokens = "none",
    pooling: Pooling = "mean",
    split: bool = True,
) -> Path:
    """Save a tiny random model; a classifier gets a split by donor: d1 trains, d2 validates, d3 tests."""
    corpus = Corpus(corpus_folder)
    torch.manual_seed(3)
    settings = ModelSettings(preset="tiny", max_length=MAX_LENGTH, special_tokens=special_tokens)
    config = settings.bert_config(corpus.genes.vocab_size)
    model = MaskedLM(config) if labels is None else Classifier(config, len(labels), pooling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    head: dict[str, Any] = (
        {} if labels is None else {"label_map": labels, "pooling": pooling, "training": {"label": "cell_type"}}
    )
    card = ModelCard(
        kind="masked_lm" if labels is None else "classifier",
        genes_hash=corpus.genes.hash,
        special_tokens=special_tokens,
        max_length=MAX_LENGTH,
        **head,
    )
    save_model(folder, model, card, corpus.genes)
    if labels is not None and split:
        obs = corpus.obs(["cell_id", "donor_id"])
        parts = obs["donor_id"].replace_strict({"d1": "train", "d2": "validation", "d3": "test"})
        # Another order than the corpus's: cells are found by their ids.
        pl.DataFrame({"cell_id": obs["cell_id"], "split": parts}).reverse().write_parquet(folder / "split.parquet")
    return folder


def embed(corpus: Path, model: Path, out: Path, **settings: Any) -> anndata.AnnData:
    EmbedCommand(corpus=str(corpus), model=str(model), out=str(out), **settings).run()
    return anndata.read_h5ad(out)


def classify(corpus: Path, model: Path, out: Path, **settings: Any) -> tuple[pl.DataFrame, dict[str, Any]]:
    settings = {"baseline": {"components": 5}, **settings}
    ClassifyCommand(corpus=str(corpus), model=str(model), out=str(out), **settings).run()
    return pl.read_parquet(out / "predictions.parquet"), json.loads((out / "metrics.json").read_text())


def stock_hidden_states(model: Path, corpus: Path, cell: int, special_tokens: SpecialTokens) -> list[np.ndarray]:
    """Hidden states of one cell after each layer, genes only, by stock transformers."""
    stock = BertForMaskedLM.from_pretrained(model, attn_implementation="eager").eval()
    cells = Corpus(corpus).read_cells(np.array([cell]))
    tokens = cells.tokens.astype(np.int64).tolist()
    tokens = tokens[:MAX_LENGTH] if special_tokens == "none" else [2, *tokens[: MAX_LENGTH - 2], 3]
    with torch.no_grad():
        states = stock(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states]


@pytest.mark.parametrize(("layer", "place"), [("last", -1), ("second_to_last", -2)])
def test_embeddings_equal_stock_transformers(
    corpus_folder: Path, model_folder: Path, tmp_path: Path, layer: str, place: int
) -> None:
    found = embed(corpus_folder, model_folder, tmp_path / "e.h5ad", readout={"layer": layer}, umap={"enabled": False})
    embedding = found.obsm["X_geneformer"]
    assert embedding.dtype == np.float32
    for cell in range(0, 60, 6):
        expected = stock_hidden_states(model_folder, corpus_folder, cell, "none")[place].mean(axis=0)
        np.testing.assert_allclose(embedding[cell], expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_specials_are_left_out_of_the_mean(corpus_folder: Path, tmp_path: Path, pooling: str) -> None:
    model = make_model(tmp_path / "m", corpus_folder, special_tokens="cls_eos")
    found = embed(corpus_folder, model, tmp_path / "e.h5ad", readout={"embedding": pooling}, umap={"enabled": False})
    for cell in (0, 17, 60):
        states = stock_hidden_states(model, corpus_folder, cell, "cls_eos")[-1]
        expected = states[1:-1].mean(axis=0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(found.obsm["X_geneformer"][cell], expected, atol=1e-5)


def test_all_cells_in_corpus_order_with_their_labels(
    corpus_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "e.h5ad"
    found = embed(corpus_folder, model_folder, out, umap={"neighbors": 5})
    corpus = Corpus(corpus_folder)
    obs = corpus.obs(["cell_id", "cell_type", "donor_id", "n_counts"])
    assert found.obs_names.tolist() == obs["cell_id"].to_list()
    assert found.obs["cell_type"].tolist() == obs["cell_type"].to_list()
    assert found.obs["n_counts"].tolist() == obs["n_counts"].to_list()
    assert found.obsm["X_umap"].shape == (61, 2)
    assert np.isfinite(found.obsm["X_umap"]).all()
    facts = found.uns["geneformer"]
    card = json.loads((model_folder / "card.json").read_text())
    assert facts["model_checksum"] == card["sha256"]["model.safetensors"]
    assert facts["genes_hash"] == corpus.manifest.genes_hash
    assert facts["layer"] == "last"
    assert facts["cells"] == 61
    (record,) = (out.parent / "runs").iterdir()
    assert json.loads(record.read_text())["settings"]["umap"]["neighbors"] == 5
    # A second call re-uses the file, other settings do not silently get it.
    before = out.stat().st_mtime_ns
    embed(corpus_folder, model_folder, out, umap={"neighbors": 5})
    assert "nothing to do" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made otherwise"):
        embed(corpus_folder, model_folder, out, umap={"neighbors": 6})
    again = embed(corpus_folder, model_folder, out, umap={"neighbors": 5}, overwrite=True)
    np.testing.assert_array_equal(again.obsm["X_umap"], found.obsm["X_umap"])


def test_a_sample_is_seeded_recorded_and_equal_to_the_whole(
    corpus_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"umap": {"enabled": False}}
    whole = embed(corpus_folder, model_folder, tmp_path / "a.h5ad", **options)
    part = embed(corpus_folder, model_folder, tmp_path / "b.h5ad", max_cells=9, seed=5, **options)
    other = embed(corpus_folder, model_folder, tmp_path / "c.h5ad", max_cells=9, seed=6, **options)
    assert part.n_obs == 9
    assert (part.uns["geneformer"]["cells"], part.uns["geneformer"]["corpus_cells"]) == (9, 61)
    assert part.obs_names.tolist() != other.obs_names.tolist()
    rows = whole.obs_names.get_indexer(part.obs_names)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_allclose(part.obsm["X_geneformer"], whole.obsm["X_geneformer"][rows], atol=1e-5)


@pytest.mark.parametrize("budget", [1, 30, 100, 100_000])
def test_embeddings_do_not_depend_on_the_batch(corpus_folder: Path, model_folder: Path, budget: int) -> None:
    def run(token_budget: int, order: np.ndarray) -> np.ndarray:
        job = EncodeJob(str(corpus_folder), 1, str(model_folder), "embedding", ReadoutSettings(), token_budget)
        out = np.empty((61, 64), np.float32)
        out[order] = EncodeWorker(job).encode(Corpus(corpus_folder).read_cells(order))
        return out

    shuffled = np.random.default_rng(budget).permutation(61)
    np.testing.assert_allclose(run(budget, shuffled), run(400, np.arange(61)), atol=1e-5)


@pytest.mark.parametrize("num_cells", [1, 7, 8, 9])
def test_every_cell_is_predicted_whatever_the_batches(num_cells: int, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", num_cells=num_cells, num_shards=1, lengths=(8, 8))
    model = make_model(tmp_path / "c", corpus, labels=LABELS)
    # Batches of four cells, so the last holds 1, 3, 4 and 1 cells.
    predictions, metrics = classify(corpus, model, tmp_path / "out", workers={"token_budget": 32})
    assert predictions["cell_id"].to_list() == [f"toy:cell{i}" for i in range(num_cells)]
    assert predictions["predicted"].is_in(list(LABELS)).all()
    assert metrics["cells"]["corpus"] == num_cells


def test_probabilities_equal_stock_transformers(corpus_folder: Path, tmp_path: Path) -> None:
    """With first-token pooling our classifier is the stock one, label map included."""
    model = make_model(tmp_path / "c", corpus_folder, labels=LABELS, pooling="first")
    predictions, _ = classify(corpus_folder, model, tmp_path / "out")
    stock = BertForSequenceClassification.from_pretrained(model, attn_implementation="eager").eval()
    for cell in (0, 29, 60):
        tokens = Corpus(corpus_folder).read_cells(np.array([cell])).tokens[:MAX_LENGTH].astype(np.int64)
        with torch.no_grad():
            expected = stock(input_ids=torch.from_numpy(tokens)[None]).logits.softmax(dim=1)[0].numpy()
        row = predictions.row(cell, named=True)
        found = [row[f"probability_{stock.config.id2label[i]}"] for i in range(3)]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert row["predicted"] == stock.config.id2label[int(expected.argmax())]
        assert row["probability"] == pytest.approx(expected.max(), abs=1e-5)


def test_only_the_test_cells_are_scored_and_the_baseline_gets_the_training_cells(
    corpus_folder: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    predictions, metrics = classify(corpus_folder, classifier_folder, tmp_path / "out")
    test = predictions.filter(split="test")
    assert len(test) == 19  # the cells of donor d3
    assert metrics["model"]["num_cells"] == metrics["baseline"]["num_cells"] == 19
    assert metrics["model"]["accuracy"] == pytest.approx((test["label"] == test["predicted"]).mean())
    assert metrics["baseline"]["train_cells"] == predictions.filter(split="train").height == 21
    assert metrics["majority"]["accuracy"] == pytest.approx(7 / 19)  # alpha, the first of three equals
    assert [row["group"] for row in metrics["by_donor"]] == ["toy / d3"]
    assert np.sum(metrics["model"]["confusion"]["counts"]) == 19
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_the_label_map_of_the_card_decides(corpus_folder: Path, tmp_path: Path) -> None:
    """A label that the classifier does not know shifts no class number, and is counted."""
    labels = {"alpha": 0, "delta": 1, "gamma": 2}
    model = make_model(tmp_path / "c", corpus_folder, labels=labels)
    predictions, metrics = classify(corpus_folder, model, tmp_path / "out")
    assert metrics["unknown_labels"] == {"beta": 20}
    assert metrics["cells"]["unknown_label"] == 20
    assert metrics["labels"] == list(labels)
    scored = predictions.filter((pl.col("split") == "test") & (pl.col("label") != "beta"))
    assert metrics["model"]["num_cells"] == len(scored) == 13
    assert metrics["model"]["accuracy"] == pytest.approx((scored["label"] == scored["predicted"]).mean())
    assert any("gamma" in note for note in metrics["notes"])


def test_ties_go_to_the_first_class(corpus_folder: Path, tmp_path: Path) -> None:
    from evaluate.classify import Truth, predictions_table

    nothing = pl.Series([None, None], dtype=pl.String)
    truth = Truth(None, np.array([-1, -1]), nothing, {}, nothing)
    probabilities = np.array([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4]], np.float32)
    table = predictions_table(pl.Series(["a", "b"]), truth, probabilities, list(LABELS))
    assert table["predicted"].to_list() == ["alpha", "beta"]


def test_another_corpus_without_split_is_tested_whole(
    classifier_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "c"
    shutil.copytree(classifier_folder, model)
    (model / "split.parquet").unlink()
    _, metrics = classify(corpus_folder, model, tmp_path / "out")
    assert metrics["model"]["num_cells"] == 61
    assert metrics["baseline"] is None
    assert any("no baseline" in note for note in metrics["notes"])


def test_unlabelled_cells_are_predicted_and_not_scored(
    classifier_folder: Path, corpus_folder: Path, tmp_path: Path
) -> None:
    """The `tissue` column is empty in this corpus."""
    predictions, metrics = classify(corpus_folder, classifier_folder, tmp_path / "out", label="tissue")
    assert len(predictions) == 61
    assert metrics["model"] is None
    assert metrics["cells"]["unlabelled"] == 61
    assert not (tmp_path / "out" / "confusion.png").exists()


def test_a_finished_classification_is_reused_and_another_refused(
    corpus_folder: Path, classifier_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    classify(corpus_folder, classifier_folder, out)
    capsys.readouterr()
    classify(corpus_folder, classifier_folder, out)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed"):
        classify(corpus_folder, classifier_folder, out, seed=1)


@pytest.mark.ray
def test_workers_give_the_same_as_one_process(
    corpus_folder: Path, model_folder: Path, classifier_folder: Path, tmp_path: Path, ray_cluster: dict[str, float]
) -> None:
    options: dict[str, Any] = {"umap": {"enabled": False}}
    alone = embed(corpus_folder, model_folder, tmp_path / "a.h5ad", **options)
    several = embed(corpus_folder, model_folder, tmp_path / "b.h5ad", workers={"count": 2}, **options)
    np.testing.assert_allclose(several.obsm["X_geneformer"], alone.obsm["X_geneformer"], atol=1e-6)
    first, _ = classify(corpus_folder, classifier_folder, tmp_path / "c")
    second, _ = classify(corpus_folder, classifier_folder, tmp_path / "d", workers={"count": 2})
    assert first["predicted"].to_list() == second["predicted"].to_list()


def test_wrong_inputs_are_told_in_one_line(
    corpus_folder: Path, model_folder: Path, classifier_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no classes"):
        classify(corpus_folder, model_folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"must end in \.h5ad"):
        embed(corpus_folder, model_folder, tmp_path / "e.csv")
    with pytest.raises(UserError, match="no <cls>"):
        embed(corpus_folder, model_folder, tmp_path / "e.h5ad", readout={"embedding": "cls"})
    with pytest.raises(UserError, match="layer_7: the model has 2 layers"):
        embed(corpus_folder, model_folder, tmp_path / "e.h5ad", readout={"layer": "layer_7"})
    with pytest.raises(UserError, match=r"no column 'celltype'.*cell_type"):
        classify(corpus_folder, classifier_folder, tmp_path / "out", label="celltype")
    with pytest.raises(UserError, match="no corpus here"):
        embed(tmp_path / "nowhere", model_folder, tmp_path / "e.h5ad")
    other = write_corpus(tmp_path / "other", num_genes=81)
    with pytest.raises(UserError, match=f"{Corpus(other).genes.hash}.*{Corpus(corpus_folder).genes.hash}"):
        embed(other, model_folder, tmp_path / "e.h5ad")
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        embed(corpus_folder, damaged, tmp_path / "e.h5ad")
    assert not (tmp_path / "e.h5ad").exists()
    assert not list(tmp_path.glob(".part-*"))


def test_settings_come_from_flags() -> None:
    command = parse(
        "evaluate",
        "embed",
        VERBS["embed"],
        ["--corpus", "c", "--model", "m", "--out", "o.h5ad", "--umap.neighbors", "7"],
    )
    assert isinstance(command, EmbedCommand)
    assert command.umap.neighbors == 7
    with pytest.raises(UserError, match="middle"):
        parse(
            "evaluate",
            "embed",
            VERBS["embed"],
            ["--corpus", "c", "--model", "m", "--out", "o", "--readout.layer", "middle"],
        )
