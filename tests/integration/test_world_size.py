"""A run goes on with another number of workers, in every ZeRO stage (R10, R11)."""

import json
from pathlib import Path

import pytest
import torch

from corpus.store import Store
from tests.factories import write_corpus
from tests.worlds import run_world
from train import checkpoint, loop, output
from train.pretrain import PretrainTask
from train.settings import PretrainSettings
from train.world import World, single_process

# DeepSpeed uses parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning")


class Stop(Exception):
    """Stands for a kill at a known step."""


def train(world: World, corpus: Path, out: Path, stage: int, *, accumulation: int, stop_at: int | None) -> list[str]:
    values = {
        "corpus": str(corpus),
        "out": str(out),
        "epochs": 3,
        "model": {"preset": "tiny", "num_layers": 1, "hidden_size": 16, "max_length": 24, "dropout": 0.0},
        "batches": {"token_budget": 150, "accumulation": accumulation, "window_row_groups": 2},
        # A decay that would show if it were applied to biases and norms as well.
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.5},
        "engine": {"zero_stage": stage},
        "keep": {"log_steps": 1, "checkpoint_steps": 3, "progress_s": 0},
    }
    values["model"]["attention_dropout"] = 0.0
    task = PretrainTask(PretrainSettings.model_validate(values))
    if world.is_first:
        output.claim(Store(str(out)), task.identity())
    lines: list[str] = []
    try:
        loop.run(task, str(out), world, emit=lines.append, report=_Halt(stop_at))
    except Stop:
        assert stop_at is not None
    return lines


class _Halt:
    """Ends the run on all ranks together, at its first or second evaluation."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def __call__(self, record: dict) -> None:
        if self.epoch is not None and record["epoch"] >= self.epoch:
            raise Stop


def halves(world: World, corpus: Path, folder: Path, stages: tuple[int, ...]) -> None:
    """Two workers: begin the runs that one worker is to finish, and finish those that one worker has begun."""
    for stage in stages:
        train(world, corpus, folder / f"began-with-2-{stage}", stage, accumulation=1, stop_at=2)
        lines = train(world, corpus, folder / f"began-with-1-{stage}", stage, accumulation=2, stop_at=None)
        if world.is_first:
            (folder / f"began-with-1-{stage}" / "lines").write_text("\n".join(lines))


def quarters(world: World, corpus: Path, folder: Path, stop_at: int | None) -> None:
    for stage in (2, 3):
        train(world, corpus, folder / f"{stage}", stage, accumulation=1, stop_at=stop_at)


@pytest.mark.slow
def test_four_workers_to_three_to_two(tmp_path):
    # Three workers share steps of four micro-batches: one of them has two.
    corpus = write_corpus(tmp_path / "corpus", num_cells=120, donors=())
    one = single_process(torch.device("cpu"))
    train(one, corpus, tmp_path / "undisturbed", 0, accumulation=4, stop_at=None)
    expected = curve(tmp_path / "undisturbed")
    for size, stop_at in ((4, 1), (3, 2), (2, None)):
        run_world(size, quarters, corpus, tmp_path, stop_at)
    for stage in (2, 3):
        found = curve(tmp_path / f"{stage}")
        assert found.keys() == expected.keys()
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-5)


def curve(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.parametrize("stages", [(1, 3), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_two_workers_to_one_and_one_to_two(tmp_path, stages):
    corpus = write_corpus(tmp_path / "corpus", num_cells=50, donors=())
    one = single_process(torch.device("cpu"))
    train(one, corpus, tmp_path / "undisturbed", 0, accumulation=2, stop_at=None)
    expected = curve(tmp_path / "undisturbed")
    for stage in stages:
        train(one, corpus, tmp_path / f"began-with-1-{stage}", stage, accumulation=2, stop_at=2)
    run_world(2, halves, corpus, tmp_path, stages)
    for stage in stages:
        out = tmp_path / f"began-with-2-{stage}"
        lines = train(one, corpus, out, stage, accumulation=1, stop_at=None)
        assert any("written by 2 worker(s) and goes on with 1: steps stay the same 2 micro" in line for line in lines)
        lines = (tmp_path / f"began-with-1-{stage}" / "lines").read_text()
        assert "written by 1 worker(s) and goes on with 2: steps stay the same 2 micro-batches, 1 for each" in lines
        for out in (tmp_path / f"began-with-2-{stage}", tmp_path / f"began-with-1-{stage}"):
            # Resumed in the middle of the second epoch: the same steps, the same cells, the same losses.
            found = curve(out)
            assert found.keys() == expected.keys()
            assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-5), out.name
            assert (out / "metrics.json").exists()
    manifest = checkpoint.CheckpointManifest.model_validate_json(
        next((out / "checkpoints").glob(f"*/{checkpoint.MANIFEST}")).read_bytes()
    )
    assert manifest.per_step == 2
