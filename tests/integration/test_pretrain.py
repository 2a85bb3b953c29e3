"""Pretraining in this process: stop-and-go, damaged checkpoints, weighting; and once through Ray with two workers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from corpus.errors import RunError, UserError
from corpus.store import Store
from tests.factories import write_corpus
from train import checkpoint, loop, output
from train.model_folder import load_model
from train.pretrain import PretrainTask
from train.settings import PretrainSettings, settings_hash
from train.world import World, single_process

CPU = torch.device("cpu")

# DeepSpeed uses parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("pretrain") / "corpus", num_cells=90, donors=())


def make_settings(corpus: Path, out: Path, **changes) -> PretrainSettings:
    values = {
        "corpus": str(corpus),
        "out": str(out),
        "epochs": 4,
        "model": {"preset": "tiny", "num_layers": 1, "hidden_size": 16, "max_length": 24, "dropout": 0.1},
        "batches": {"token_budget": 150, "accumulation": 2, "window_row_groups": 2},
        "optimizer": {"learning_rate": 1e-2},
        "keep": {"log_steps": 2, "checkpoint_steps": 3, "progress_s": 0},
    }
    return PretrainSettings.model_validate({**values, **changes})


class Stop(Exception):
    """Stands for a kill at a known step."""


def stop_at(step: int) -> Callable[[str], None]:
    def emit(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise Stop

    return emit


def train(settings: PretrainSettings, emit: Callable[[str], None] = lambda line: None) -> dict:
    task = PretrainTask(settings)
    output.claim(Store(settings.out), task.identity())
    return loop.run(task, settings.out, single_process(CPU), emit=emit, report=lambda record: None)


def curve(out: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "model"
    train(make_settings(corpus, out))
    return out


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_stop_and_go_is_bit_identical(corpus, tmp_path, zero_stage):
    # Interrupted in the first epoch and in the last (R8).
    whole, stopped = (
        make_settings(corpus, tmp_path / name, engine={"zero_stage": zero_stage}) for name in ("whole", "stopped")
    )
    train(whole)
    for step in (4, curve(tmp_path / "whole")[-2][0]):
        with pytest.raises(Stop):
            train(stopped, stop_at(step))
    lines: list[str] = []
    train(stopped, lines.append)
    assert any("resuming from" in line for line in lines)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_loss_falls_and_folder_is_whole(undisturbed, corpus):
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    losses = [loss for _, loss in curve(undisturbed)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02
    assert math.isfinite(metrics["heldout_loss"])
    assert metrics["unigram_loss"] < math.log(80) + 0.5
    loaded = load_model(undisturbed)
    assert loaded.card.training["steps"] == metrics["steps"]
    assert loaded.card.genes_hash == PretrainTask(make_settings(corpus, undisturbed)).corpus.genes.hash
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())][-1].endswith(
        f"{metrics['steps']:08d}"
    )
    assert len(list((undisturbed / "checkpoints").iterdir())) == 2
    assert list((undisturbed / "tensorboard").iterdir())


def test_unigram_loss_by_hand(corpus, tmp_path):
    task = PretrainTask(make_settings(corpus, tmp_path / "model"))
    genes = task.corpus.genes
    seen = task.corpus.read_cells(task.train_cells).truncate(24).tokens
    counts = {int(token): 1 for token in genes.tokens}
    for token in seen.tolist():
        counts[token] += 1
    total = sum(counts.values())
    labels = task.prepare(task.corpus.read_cells(task.held_out), epoch=0).labels.tolist()
    expected = sum(-math.log(counts[label] / total) for label in labels) / len(labels)
    assert task.unigram_loss == pytest.approx(expected)


def test_evaluation_does_not_depend_on_the_batch_size(corpus, tmp_path):
    found = []
    for budget in (24, 10_000):
        task = PretrainTask(make_settings(corpus, tmp_path / "model", batches={"token_budget": budget}))
        model = task.build_model().eval()
        found.append(task.evaluate(model, World(0, 1, CPU)))
    assert found[0]["heldout_loss"] == pytest.approx(found[1]["heldout_loss"], rel=1e-6)
    assert found[0]["heldout_accuracy"] == found[1]["heldout_accuracy"]


def test_held_out_cells_are_never_trained_on(corpus, tmp_path):
    task = PretrainTask(make_settings(corpus, tmp_path / "model", held_out={"fraction": 0.2}))
    assert not np.intersect1d(task.train_cells, task.held_out).size
    assert len(task.held_out) == 18


def test_second_call_does_nothing_and_other_settings_are_refused(corpus, undisturbed):
    settings = make_settings(corpus, undisturbed)
    done = output.claim(Store(undisturbed), PretrainTask(settings).identity())
    assert done is not None
    other = make_settings(corpus, undisturbed, epochs=5)
    with pytest.raises(UserError, match=r"epochs \(4 there, 5 now\)"):
        output.claim(Store(undisturbed), PretrainTask(other).identity())


def test_a_loss_that_is_no_number_stops_the_run(corpus, tmp_path):
    settings = make_settings(corpus, tmp_path / "model", optimizer={"learning_rate": 1e30, "clip": 0})
    with pytest.raises(RunError, match="loss is"):
        train(settings)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "deleted":
            path.unlink()
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "bit flipped":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory) -> tuple[PretrainSettings, PretrainTask, list[str]]:
    """A run with two checkpoints, stopped before its end."""
    settings = make_settings(corpus, tmp_path_factory.mktemp("interrupted") / "model", engine={"zero_stage": 1})
    with pytest.raises(Stop):
        train(settings, stop_at(8))
    files = [path.name for path in (Path(settings.out) / "checkpoints" / "step-00000006").iterdir()]
    return settings, PretrainTask(settings), sorted(files)


def newest(settings: PretrainSettings, task: PretrainTask, folder: Path) -> tuple[int | None, list[str]]:
    """Step of the checkpoint that is used, and why others are not."""
    identity = settings_hash(task.identity())
    with checkpoint.open_newest(Store(folder), single_process(CPU), identity) as (found, skipped):
        return (found.manifest.step if found else None), skipped


@pytest.mark.parametrize("how", ["deleted", "truncated", "bit flipped"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(interrupted, tmp_path, how):
    settings, task, files = interrupted
    partition = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert set(files) == {checkpoint.MANIFEST, checkpoint.LOG, "mp_rank_00_model_states.pt", partition}
    for name in files:
        folder = tmp_path / name
        shutil.copytree(settings.out, folder)
        damage(folder / "checkpoints" / "step-00000006" / name, how)
        step, skipped = newest(settings, task, folder)
        assert step == 3, skipped
        assert len(skipped) == 1
        assert name in skipped[0]
        assert "step-00000006" in skipped[0]


def test_no_bit_of_a_manifest_can_change_unnoticed(interrupted, tmp_path):
    settings, task, _ = interrupted
    shutil.copytree(settings.out, tmp_path / "model")
    path = tmp_path / "model" / "checkpoints" / "step-00000006" / checkpoint.MANIFEST
    sound = path.read_bytes()
    for place in range(0, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << place % 8]) + sound[place + 1 :])
        step, skipped = newest(settings, task, tmp_path / "model")
        assert step == 3, place
        assert checkpoint.MANIFEST in skipped[0]


def test_checkpoint_of_other_settings_is_skipped(interrupted):
    settings, *_ = interrupted
    other = settings.model_copy(update={"seed": 7})
    step, skipped = newest(other, PretrainTask(other), Path(settings.out))
    assert step is None
    assert len(skipped) == 2
    assert "other settings" in skipped[0]
