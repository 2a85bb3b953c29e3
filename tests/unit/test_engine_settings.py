"""Learning rate, DeepSpeed configuration, loss weighting, output folder, metrics: the pure parts of training."""

import json

import numpy as np
import pytest
import torch

from corpus.errors import UserError
from corpus.store import Store
from train.engine import engine_config, make_optimizer, resolve_stage
from train.metrics import MetricsLog, Rates, duration, progress_line
from train.output import claim, publish
from train.schedule import learning_rate
from train.settings import BatchSettings, EngineSettings, FinetuneSettings, OptimizerSettings, PretrainSettings
from train.tasks import loss_scale


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_rises_then_follows_the_schedule(schedule):
    settings = OptimizerSettings(learning_rate=2.0, warmup=0.2, schedule=schedule)
    rates = [learning_rate(settings, done) for done in np.linspace(0.01, 1, 100)]
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.0)
    assert all(np.diff(rates)[:18] > 0)
    assert all(np.diff(rates)[20:] <= 1e-12)


def test_learning_rate_without_warmup_starts_high():
    assert learning_rate(OptimizerSettings(learning_rate=2.0, warmup=0.0), 0.25) == pytest.approx(1.5)


def test_engine_config_counts_agree():
    config = engine_config(EngineSettings(zero_stage=2), BatchSettings(accumulation=3), 1.0, "bf16", world_size=4)
    assert config["train_batch_size"] == 12
    assert config["zero_optimization"] == {"stage": 2}
    assert config["torch_autocast"]["enabled"]


@pytest.mark.parametrize(("parameters", "stage"), [(18_167_828, 0), (104_000_000, 0), (10**9, 1), (10**10, 3)])
def test_auto_partitions_large_models_only(parameters, stage):
    assert resolve_stage("auto", parameters) == stage
    assert resolve_stage(2, parameters) == 2


def test_offloading_needs_a_partitioning_stage():
    config = engine_config(EngineSettings(offload_optimizer=True), BatchSettings(), 1.0, "fp32", 1)
    assert config["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    with pytest.raises(UserError, match="offload_optimizer needs"):
        engine_config(EngineSettings(zero_stage=0, offload_optimizer=True), BatchSettings(), 1.0, "fp32", 1)


def test_own_deepspeed_json_is_laid_over(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"overlap_comm": False}, "gradient_clipping": 3.0}))
    engine = EngineSettings(zero_stage=1, deepspeed_json=str(path))
    config = engine_config(engine, BatchSettings(), 1.0, "fp32", world_size=1)
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert config["gradient_clipping"] == 3.0


@pytest.mark.parametrize(
    ("content", "words"), [('{"train_batch_size": 8}', "train_batch_size"), ("{", "not JSON"), ("[]", "an object")]
)
def test_bad_deepspeed_json_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words):
        engine_config(EngineSettings(deepspeed_json=str(path)), BatchSettings(), 1.0, "fp32", 1)


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, plain = make_optimizer(model, OptimizerSettings(weight_decay=0.1)).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert plain["weight_decay"] == 0.0


def test_loss_scale_gives_the_gradient_of_the_joined_batch():
    # P8: two ranks with two micro-batches each and unequal numbers of scored items. DeepSpeed adds up the gradients of
    # a rank and averages over ranks.
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    items = [torch.randn(n, 5, dtype=torch.float64) for n in (7, 1, 3, 0)]
    total = torch.tensor(float(sum(len(item) for item in items)), dtype=torch.float64)
    scale = loss_scale(2, total)
    ranks = []
    for micro_batches in (items[:2], items[2:]):
        summed = torch.zeros(5, dtype=torch.float64)
        for item in micro_batches:
            summed += torch.autograd.grad(((item @ weights) ** 2).sum() * scale, weights)[0]
        ranks.append(summed)
    averaged = torch.stack(ranks).mean(dim=0)
    joined = torch.autograd.grad(((torch.cat(items) @ weights) ** 2).mean(), weights)[0]
    torch.testing.assert_close(averaged, joined)


def test_loss_scale_of_a_step_without_weight_is_zero():
    assert loss_scale(2, torch.tensor(0.0)) == 0


def test_identity_leaves_out_places_workers_and_saving():
    settings = PretrainSettings(corpus="a", out="b", epochs=3)
    moved = settings.model_copy(update={"corpus": "c", "out": "d"})
    assert settings.identity() == moved.identity()
    assert settings.identity()["model"]["preset"] == "mouse-6l"
    assert not {"corpus", "out", "workers", "keep"} & settings.identity().keys()
    finetune = FinetuneSettings(corpus="a", model="m", out="b")
    assert "model" not in finetune.identity()


def test_a_claimed_folder_is_kept_for_its_run(tmp_path):
    store = Store(tmp_path / "out")
    one, two = {"settings": {"seed": 1, "epochs": 2}}, {"settings": {"seed": 2, "epochs": 2}}
    assert claim(store, one) is None
    assert claim(store, two) is None  # nothing was done yet, so other settings may take over
    store.create("checkpoints/step-00000001/x", b"")
    assert claim(store, two) is None
    with pytest.raises(UserError, match=r"seed \(2 there, 1 now\)"):
        claim(store, one)


def test_finished_run_is_returned_and_foreign_results_are_refused(tmp_path):
    store = Store(tmp_path / "out")
    claim(store, {"settings": {}})
    made = tmp_path / "made"
    made.mkdir()
    (made / "card.json").write_text("{}")
    publish(store, made, {"loss": 1.5})
    assert claim(store, {"settings": {}}) == {"loss": 1.5}
    other = Store(tmp_path / "other")
    other.create("metrics.json", b"{}")
    with pytest.raises(UserError, match="something else"):
        claim(other, {"settings": {}})


def test_publish_replaces_a_half_written_export_and_marks_the_end_last(tmp_path, monkeypatch):
    store = Store(tmp_path / "out")
    store.create("card.json", b"old")
    store.create("model.safetensors", b"half")
    made = tmp_path / "made"
    made.mkdir()
    for name in ("card.json", "model.safetensors", "config.json"):
        (made / name).write_text("new")
    order = []
    create = Store.create_from_file
    monkeypatch.setattr(
        Store, "create_from_file", lambda self, name, path: order.append(name) or create(self, name, path)
    )
    publish(store, made, {})
    assert order == ["config.json", "model.safetensors", "card.json", "metrics.json"]
    assert store.read_bytes("model.safetensors") == b"new"


def test_rates_are_per_second_of_the_interval():
    now = iter([0.0, 4.0, 6.0])
    rates = Rates(lambda: next(now))
    rates.waited(1.0)
    assert rates.take(400, 8) == {"tokens_per_s": 100.0, "cells_per_s": 2.0, "data_wait_share": 0.25}
    assert rates.take(400, 8)["tokens_per_s"] == 200.0


def test_mfu_is_told_where_the_peak_is_known_and_the_work_counted():
    now = iter([0.0, 2.0, 4.0])
    rates = Rates(lambda: next(now), peak=1e6)
    rates.worked(300_000)
    rates.worked(100_000)
    record = rates.take(400, 8)
    assert record["mfu"] == 0.2
    shown = {"step": 1, "epoch": 0.5, "loss": 2.0, "lr": 1e-3}
    line = progress_line(shown | record, epochs=1, steps=2, seconds_left=70)
    told = "200 tokens/s | 4.0 cells/s | MFU 20.0% | data wait 0.0% | 1 min 10 s left"
    assert line == f"step 1/2 | epoch 0.50/1 | loss 2.0000 | lr 1.00e-03 | {told}"
    without = rates.take(400, 8)
    assert "mfu" not in without
    assert "MFU" not in progress_line(shown | without, epochs=1, steps=2, seconds_left=70)


def test_metrics_log_continues_from_given_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    log = MetricsLog(Store(tmp_path), tmp_path / "scratch", b'{"step": 1}\n', step=1)
    log.write({"step": 2, "loss": 0.5})
    assert log.content() == b'{"step": 1}\n{"step": 2, "loss": 0.5}\n'
    log.close()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text
