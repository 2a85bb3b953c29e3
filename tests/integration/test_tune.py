"""A search: space and settings in pure form, and once for real through Ray Tune."""

import json
import tomllib
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from corpus.errors import UserError
from corpus.reader import Corpus
from tests.factories import write_corpus
from train.model import MaskedLM
from train.model_folder import ModelCard, load_model, save_model
from train.presets import ModelSettings
from train.settings import FinetuneOptions, FinetuneSettings
from tune.settings import SpaceSettings, TuneSettings
from tune.space import apply_point, param_space, rounded, to_toml

pytestmark = pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning")


def test_point_is_laid_over_the_shared_settings():
    options = FinetuneOptions(epochs=7)
    point = {"optimizer.learning_rate": 0.00123456, "optimizer.schedule": "cosine", "freeze_layers": 2}
    applied = apply_point(options, point)
    assert (applied.epochs, applied.freeze_layers) == (7, 2)
    assert applied.optimizer.learning_rate == 0.00123
    assert applied.optimizer.schedule == "cosine"
    assert applied.optimizer.beta2 == options.optimizer.beta2
    assert rounded(point)["optimizer.learning_rate"] == 0.00123


def test_draws_stay_inside_the_space():
    space = SpaceSettings(learning_rate=(1e-4, 1e-2), warmup=(0.1, 0.1), freeze_layers=(0, 1))
    drawn = param_space(space)
    rates = [drawn["optimizer.learning_rate"].sample() for _ in range(200)]
    assert 1e-4 <= min(rates) < 3e-4
    assert 3e-3 < max(rates) <= 1e-2
    assert drawn["optimizer.warmup"] == 0.1
    assert {drawn["freeze_layers"].sample() for _ in range(50)} == {0, 1}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": (1e-2, 1e-3)}, "is above"),
        ({"weight_decay": (0.0, 0.1)}, "above 0"),
        ({"warmup": (0.0, 1.0)}, "between 0 and 1"),
        ({"schedule": ()}, "no choice"),
    ],
)
def test_bad_spaces_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        SpaceSettings(**values)


def test_settings_survive_toml():
    options = FinetuneOptions(label='odd "name"', split={"test_donors": ("a", "b")}, pooling=None)
    text = to_toml(options.model_dump(mode="json"))
    assert FinetuneOptions.model_validate(tomllib.loads(text)) == options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tune")
    write_corpus(folder / "corpus", num_cells=120, donors=("d1", "d2", "d3", "d4"))
    genes = Corpus(folder / "corpus").genes
    model = MaskedLM(ModelSettings(preset="tiny", hidden_size=16, max_length=24).bert_config(genes.vocab_size))
    card = ModelCard(kind="masked_lm", genes_hash=genes.hash, special_tokens="none", max_length=24)
    save_model(folder / "model", model, card, genes)
    return {"corpus": str(folder / "corpus"), "model": str(folder / "model"), "out": str(folder / "out")}


def search_settings(inputs: dict[str, str], **changes) -> TuneSettings:
    values = {
        **inputs,
        "trials": 3,
        "concurrent": 2,
        "space": {"learning_rate": (1e-3, 2e-2), "freeze_layers": (0, 1)},
        "finetune": {"epochs": 2, "batches": {"token_budget": 400}, "keep": {"log_steps": 2}},
    }
    return TuneSettings.model_validate({**values, **changes})


def test_freezing_more_layers_than_there_are_is_refused_before_any_trial(inputs, tmp_path):
    from tune.sweep import tune

    settings = search_settings({**inputs, "out": str(tmp_path)}, space={"freeze_layers": (9,)})
    with pytest.raises(UserError, match="has 2 layers"):
        tune(settings)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_search_end_to_end_and_again(inputs, ray_cluster, capsys):
    from tune.sweep import tune

    settings = search_settings(inputs)
    summary = tune(settings)
    out = Path(inputs["out"])
    table = pl.read_parquet(out / "trials.parquet")
    assert len(table) == 3
    assert set(table["state"]) <= {"completed", "stopped"}
    finished = table.filter(pl.col("state") == "completed")
    assert summary["best_trial"] == finished["trial"][0]
    assert finished["best_validation_macro_f1"][0] == finished["best_validation_macro_f1"].max()
    # Only the winner has seen the test cells.
    for trial in table["trial"]:
        metrics = out / "trials" / trial / "metrics.json"
        if metrics.exists():
            assert "test_accuracy" not in json.loads(metrics.read_text())
    assert 0 <= summary["best_metrics"]["test_accuracy"] <= 1
    assert summary["best_metrics"]["validation_macro_f1"] == pytest.approx(finished["best_validation_macro_f1"][0])
    best = tomllib.loads((out / "best.toml").read_text())
    assert (
        FinetuneSettings.model_validate({**best, **inputs}).optimizer.learning_rate
        == finished["optimizer.learning_rate"][0]
    )
    assert load_model(out / "best").card.kind == "classifier"

    # A second call does nothing; with the results removed, the finished trials are taken from the search itself.
    assert tune(settings) == summary
    assert "already finished" in capsys.readouterr().out
    (out / "summary.json").unlink()
    again = tune(settings)
    assert again["best_trial"] == summary["best_trial"]
    assert again["trials"] == summary["trials"]
    assert "going on with the search" in capsys.readouterr().out
