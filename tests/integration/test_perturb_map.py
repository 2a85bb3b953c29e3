"""`evaluate map`: the embeddings before and after are those of the edited cells, and the picture says where they go."""

import numpy as np
import polars as pl
import pytest
import torch
from transformers import BertModel

from corpus.errors import UserError
from corpus.reader import Corpus
from corpus.store import Store
from evaluate.map_commands import MapCommand
from evaluate.perturb_map import along, open_scan, write_map
from evaluate.perturb_settings import ScanSettings
from evaluate.scan import run_scan
from evaluate.scan_setup import Scan
from evaluate.settings import UmapSettings
from evaluate.shifts import ScanManifest, read_shifts
from tests.factories import write_corpus
from train.model import MaskedLM
from train.model_folder import ModelCard, save_model
from train.presets import ModelSettings

LIMIT = 24
GENE = "Gene10"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    corpus = write_corpus(folder / "corpus", num_cells=60, lengths=(10, 40))
    genes = Corpus(corpus).genes
    torch.manual_seed(0)
    config = ModelSettings(preset="tiny", max_length=LIMIT).bert_config(genes.vocab_size)
    config.initializer_range = 0.3
    card = ModelCard(kind="masked_lm", genes_hash=genes.hash, special_tokens="none", max_length=LIMIT)
    save_model(folder / "model", MaskedLM(config), card, genes)
    run(folder, "scan", {"kind": "delete"})
    return folder


def run(folder, name, change, states=True):
    asked = {"column": "cell_type", "start": "alpha", "goal": "beta", "alternates": ["delta"]} if states else None
    settings = ScanSettings.model_validate({"states": asked, "perturbation": change, "engine": {"workers": 0}})
    run_scan(Scan(settings, str(folder / "corpus"), str(folder / "model"), str(folder / name)))


def command(folder, out, scan="scan", **changes):
    places = {name: str(folder / name) for name in ("corpus", "model")}
    umap = UmapSettings(neighbors=5)
    return MapCommand(shifts=str(folder / scan), out=str(out), umap=umap, **{**places, **changes})


def test_cells_are_embedded_before_and_after(inputs, tmp_path):
    line = write_map(command(inputs, tmp_path, gene=GENE.lower()))
    table = pl.read_csv(tmp_path / "cells.csv")
    assert (tmp_path / "map.png").stat().st_size > 10_000
    assert f"delete {GENE} in {len(table)} cells" in line
    scanned = read_shifts(str(inputs / "scan"))[1].filter(pl.col("symbol") == GENE)
    assert set(table["cell_id"]) == set(scanned["cell_id"])
    corpus = Corpus(str(inputs / "corpus"))
    obs = corpus.obs(["cell_id", "cell_type"])
    net = BertModel.from_pretrained(inputs / "model", add_pooling_layer=False).eval()

    def embed(tokens):
        with torch.no_grad():
            return net(torch.tensor([tokens]), output_hidden_states=True).last_hidden_state[0].double().numpy().mean(0)

    inputs_of = [corpus.read_cells(np.array([cell])).tokens.tolist()[:LIMIT] for cell in range(60)]
    centroids = {
        state: np.mean([embed(inputs_of[cell]) for cell in np.flatnonzero(obs["cell_type"] == state)], axis=0)
        for state in ("alpha", "beta")
    }
    token = corpus.genes.find(GENE)
    for row in table[::4].iter_rows(named=True):
        tokens = inputs_of[obs["cell_id"].index_of(row["cell_id"])]
        before, after = embed(tokens), embed([each for each in tokens if each != token])
        assert row["moved_l2"] == pytest.approx(np.linalg.norm(after - before), rel=1e-3)
        for name, point in (("along_before", before), ("along_after", after)):
            way = centroids["beta"] - centroids["alpha"]
            assert row[name] == pytest.approx((point - centroids["alpha"]) @ way / (way @ way), abs=1e-3)
        cosines = [
            x @ centroids["beta"] / np.linalg.norm(x) / np.linalg.norm(centroids["beta"]) for x in (before, after)
        ]
        assert row["shift_beta"] == pytest.approx(cosines[1] - cosines[0], abs=1e-5)
    with pytest.raises(UserError, match="holds another map"):
        write_map(command(inputs, tmp_path, gene=GENE))


def test_the_line_runs_from_start_to_goal():
    start, goal = np.array([1.0, 1]), np.array([3.0, 1])
    np.testing.assert_allclose(along(np.array([[1.0, 5], [3, 0], [2, 2], [0, 1]]), start, goal), [0, 1, 0.5, -0.5])
    np.testing.assert_array_equal(along(np.array([[1.0, 5]]), start, start), [0])


def test_what_cannot_be_drawn_is_said(inputs, tmp_path):
    manifest = ScanManifest.read(Store(inputs / "scan"))
    with pytest.raises(UserError, match="name the gene"):
        open_scan(command(inputs, tmp_path), manifest)
    other = write_corpus(tmp_path / "other", num_cells=61, lengths=(10, 40))
    with pytest.raises(UserError, match="not the corpus of the scan"):
        open_scan(command(inputs, tmp_path, corpus=str(other), gene=GENE), manifest)
    run(inputs, "plain", {"genes": [GENE]}, states=False)
    with pytest.raises(UserError, match="no goal"):
        write_map(command(inputs, tmp_path, scan="plain", gene=GENE))
