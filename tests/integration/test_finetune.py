"""Fine-tuning in this process: pretrained weights, labels, splits, frozen layers, predictions, resume."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from corpus.errors import UserError
from corpus.store import Store
from tests.factories import write_corpus
from train import loop, output
from train.finetune import FinetuneTask
from train.model import Classifier, MaskedLM
from train.model_folder import ModelCard, load_model, save_model
from train.presets import ModelSettings
from train.settings import FinetuneSettings
from train.split import TEST, TRAIN, VALIDATION
from train.world import single_process

CPU = torch.device("cpu")

# DeepSpeed uses parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "corpus"
    return write_corpus(folder, num_cells=120, donors=("d1", "d2", "d3", "d4", "d5"))


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """An untrained model: what matters here is that its very weights are taken."""
    from corpus.reader import Corpus

    genes = Corpus(corpus).genes
    settings = ModelSettings(preset="tiny", num_layers=2, hidden_size=16, num_heads=2, max_length=24)
    torch.manual_seed(11)
    model = MaskedLM(settings.bert_config(genes.vocab_size))
    card = ModelCard(kind="masked_lm", genes_hash=genes.hash, special_tokens="none", max_length=24, preset="tiny")
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, model, card, genes)
    return folder


def make_settings(corpus: Path, base: Path, out: Path, **changes) -> FinetuneSettings:
    values = {
        "corpus": str(corpus),
        "model": str(base),
        "out": str(out),
        "epochs": 3,
        "batches": {"token_budget": 200, "window_row_groups": 2},
        "optimizer": {"learning_rate": 1e-2},
        "keep": {"log_steps": 2, "progress_s": 0},
    }
    return FinetuneSettings.model_validate({**values, **changes})


def train(settings: FinetuneSettings, emit=lambda line: None, report=lambda record: None) -> dict:
    task = FinetuneTask(settings)
    output.claim(Store(settings.out), task.identity())
    return loop.run(task, settings.out, single_process(CPU), emit=emit, report=report)


def encoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k.startswith("bert.") and not k.startswith("bert.pooler.")}


def test_encoder_before_the_first_step_is_the_checkpoint(corpus, base, tmp_path):
    # F1: the encoder is really loaded, tensor by tensor.
    start = encoder(FinetuneTask(make_settings(corpus, base, tmp_path / "out")).build_model().state_dict())
    pretrained = encoder(load_model(base).model.state_dict())
    assert start.keys() == pretrained.keys()
    for name in start:
        assert torch.equal(start[name], pretrained[name]), name


@pytest.fixture(scope="module")
def trained(corpus, base, tmp_path_factory) -> tuple[Path, dict, list[dict]]:
    out = tmp_path_factory.mktemp("trained") / "classifier"
    records: list[dict] = []
    metrics = train(make_settings(corpus, base, out, epochs=20), report=records.append)
    return out, metrics, records


def test_metrics_and_split_are_written(trained, corpus):
    out, metrics, _ = trained
    written = json.loads((out / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics))
    for part in (TRAIN, VALIDATION, TEST):
        assert 0 <= written[f"{part}_accuracy"] <= 1
    assert written["train_macro_f1"] > 0.8
    split = pl.read_parquet(out / "split.parquet")
    assert split.columns == ["cell_id", "split"]
    assert split["split"].value_counts().sort("split")["split"].to_list() == ["test", "train", "validation"]
    assert dict(split["split"].value_counts().iter_rows()) == {k: v for k, v in written["split"]["cells"].items() if v}


def test_best_epoch_by_validation_is_what_is_saved(trained, corpus, base):
    out, metrics, records = trained
    best = max(record["validation_macro_f1"] for record in records)
    assert records[-1]["best_validation_macro_f1"] == best
    assert metrics["validation_macro_f1"] == pytest.approx(best)
    # The saved folder, opened anew, gives the figures of metrics.json.
    loaded = load_model(out)
    task = FinetuneTask(make_settings(corpus, base, out))
    cells = task.split.cells(TEST)
    predicted = task.predict(loaded.model, cells, single_process(CPU))
    assert (predicted == task.labels[cells]).mean() == pytest.approx(metrics["test_accuracy"])


def test_label_map_is_sorted_and_saved(trained):
    out, *_ = trained
    assert list(load_model(out).card.label_map.items()) == [("alpha", 0), ("beta", 1), ("delta", 2)]
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "alpha", "1": "beta", "2": "delta"}


def test_stop_and_go_keeps_the_best_weights(corpus, base, tmp_path):
    class Stop(Exception):
        pass

    def stop(record: dict) -> None:
        if record["epoch"] == 3:
            raise Stop

    whole, stopped = (make_settings(corpus, base, tmp_path / name, epochs=4) for name in ("whole", "stopped"))
    expected = train(whole)
    with pytest.raises(Stop):
        train(stopped, report=stop)
    found = train(stopped)
    for name in ("validation_macro_f1", "test_macro_f1", "train_accuracy", "steps"):
        assert found[name] == expected[name]
    one, other = (load_model(tmp_path / name) for name in ("whole", "stopped"))
    assert one.checksum == other.checksum


def test_frozen_layers_do_not_move_and_the_others_do(corpus, base, tmp_path):
    out = tmp_path / "out"
    train(make_settings(corpus, base, out, epochs=1, freeze_layers=1))
    before, after = load_model(base).model.state_dict(), load_model(out).model.state_dict()
    for name in encoder(after):
        frozen = name.startswith(("bert.embeddings.", "bert.encoder.layer.0."))
        assert torch.equal(before[name], after[name]) == frozen, name


@pytest.mark.parametrize("budget", [24, 100, 10_000])
def test_every_evaluation_cell_is_predicted_once_whatever_the_batches(corpus, base, tmp_path, budget):
    # F5: no cell of a last small batch is lost.
    task = FinetuneTask(make_settings(corpus, base, tmp_path / "out", batches={"token_budget": budget}))
    cells = np.flatnonzero(task.labels >= 0)[:37]
    model = task.build_model().eval()
    predicted = task.predict(model, cells, single_process(CPU))
    assert len(predicted) == 37
    alone = [task.predict(model, cells[i : i + 1], single_process(CPU))[0] for i in (0, 17, 36)]
    assert predicted[[0, 17, 36]].tolist() == alone


def test_equal_logits_give_the_lowest_class(corpus, base, tmp_path):
    task = FinetuneTask(make_settings(corpus, base, tmp_path / "out"))
    model = task.build_model().eval()
    assert isinstance(model, Classifier)
    torch.nn.init.zeros_(model.classifier.weight)
    assert set(task.predict(model, np.arange(10), single_process(CPU))) == {0}


def test_rare_labels_are_left_out_and_counted(tmp_path, base, corpus):
    settings = make_settings(corpus, base, tmp_path / "out", min_cells=10_000)
    with pytest.raises(UserError, match="two are needed"):
        FinetuneTask(settings)
    donors_as_labels = make_settings(
        corpus, base, tmp_path / "out", label="donor_id", min_cells=25, split={"by": "cell"}
    )
    with pytest.raises(UserError, match="two are needed"):
        FinetuneTask(donors_as_labels)


def test_unknown_label_column_lists_the_columns(corpus, base, tmp_path):
    with pytest.raises(UserError, match="cell_type"):
        FinetuneTask(make_settings(corpus, base, tmp_path / "out", label="nonsense"))


def test_balanced_class_weights_average_to_one(corpus, base, tmp_path):
    task = FinetuneTask(make_settings(corpus, base, tmp_path / "out", class_weights="balanced"))
    weights = task.class_weights[torch.from_numpy(task.labels[task.train_cells])]
    assert float(weights.mean()) == pytest.approx(1.0)


def test_model_of_another_vocabulary_is_refused_with_both_hashes(base, tmp_path):
    other = write_corpus(tmp_path / "other", num_genes=60)
    with pytest.raises(UserError, match=load_model(base).genes.hash):
        FinetuneTask(make_settings(other, base, tmp_path / "out"))


def test_too_many_frozen_layers_are_refused(corpus, base, tmp_path):
    with pytest.raises(UserError, match="has 2 layers"):
        FinetuneTask(make_settings(corpus, base, tmp_path / "out", freeze_layers=3))
