"""Checkpoints in the background: training goes on, failures are told, counted and shared; stops and notices."""

import contextlib
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from corpus.errors import RunError
from corpus.store import Store
from tests.factories import write_corpus
from tests.worlds import run_world
from train import checkpoint, loop, output
from train.pretrain import PretrainTask
from train.settings import PretrainSettings
from train.world import World, single_process

# DeepSpeed uses parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning")

TOO_SMALL = 20_000  # bytes: the log fits, the state of the model does not


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("saver") / "corpus", num_cells=60, donors=())


def train(
    world: World, corpus: Path, out: Path, emit: Callable[[str], None], signals: loop.Signals | None = None, **keep
) -> None:
    values = {
        "corpus": str(corpus),
        "out": str(out),
        "epochs": 3,
        "model": {"preset": "tiny", "num_layers": 1, "hidden_size": 16, "max_length": 24},
        "batches": {"token_budget": 150},
        "engine": {"zero_stage": 1},
        "keep": {"log_steps": 1, "checkpoint_steps": 3, "progress_s": 0, **keep},
    }
    task = PretrainTask(PretrainSettings.model_validate(values))
    if world.is_first:
        output.claim(Store(str(out)), task.identity())
    world.barrier()
    loop.run(task, str(out), world, emit=emit, report=lambda record: None, signals=signals)


@pytest.fixture(scope="module")
def one() -> World:
    return single_process(torch.device("cpu"))


@pytest.fixture(scope="module")
def undisturbed(corpus, one, tmp_path_factory) -> dict[int, float]:
    out = tmp_path_factory.mktemp("undisturbed") / "model"
    train(one, corpus, out, lambda line: None)
    return curve(out)


def curve(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """Let this process write no file larger than a few bytes, as on a disk that is nearly full."""
    before, bytecode = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # Python would leave truncated .pyc files behind
    resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_SMALL, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = bytecode


def at(step: int, action: Callable[[], None], lines: list[str]) -> Callable[[str], None]:
    def emit(line: str) -> None:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            action()

    return emit


def test_training_goes_on_while_a_checkpoint_is_written(corpus, one, tmp_path, undisturbed, monkeypatch):
    gate, write = threading.Event(), Store.create_from_file

    def wait_then_write(store: Store, name: str, path: Path) -> bool:
        assert gate.wait(60)
        return write(store, name, path)

    manifest = tmp_path / "model" / checkpoint.folder_of(3) / checkpoint.MANIFEST
    monkeypatch.setattr(Store, "create_from_file", wait_then_write)
    seen: list[bool] = []

    def open_gate() -> None:
        # Two steps after it was due, the checkpoint is still on its way.
        seen.append(manifest.exists())
        gate.set()

    train(one, corpus, tmp_path / "model", at(5, open_gate, []), checkpoints=99)
    assert seen == [False]
    assert manifest.exists()
    assert curve(tmp_path / "model") == undisturbed


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(corpus, one, tmp_path, undisturbed):
    lines: list[str] = []
    limit = contextlib.ExitStack()
    limit.enter_context(small_files_only())
    try:
        train(one, corpus, tmp_path / "model", at(5, limit.close, lines), checkpoints=99)
    finally:
        limit.close()
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1
    assert "checkpoint of step 3 was not written" in warnings[0]
    assert "training goes on" in warnings[0]
    steps = checkpoint.steps(Store(tmp_path / "model"))
    assert 3 not in steps
    assert 6 in steps
    assert curve(tmp_path / "model") == undisturbed


def test_a_run_ends_when_checkpoints_fail_again_and_again(corpus, one, tmp_path):
    with small_files_only(), pytest.raises(RunError, match=r"2 checkpoint\(s\) in a row could not be written"):
        train(one, corpus, tmp_path / "model", lambda line: None, failed_checkpoints=2)


def test_a_request_to_stop_saves_first_and_the_same_command_goes_on(corpus, one, tmp_path, undisturbed):
    signals, lines = loop.Signals(), []
    with pytest.raises(RunError, match="stopped by request after step 5; the same command goes on"):
        train(one, corpus, tmp_path / "model", at(4, signals.stop.set, lines), signals)
    assert checkpoint.steps(Store(tmp_path / "model"))[-1] == 5
    train(one, corpus, tmp_path / "model", lines.append)
    assert any("resuming from" in line and "step 5" in line for line in lines)
    assert curve(tmp_path / "model") == undisturbed


def test_a_notice_of_preemption_saves_once_and_training_goes_on(corpus, one, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(loop, "_NOTICE_S", 0.0)
    asked, lines = [], []

    def preempted() -> str | None:
        asked.append(len(asked))
        return "the machine of worker 0 is about to be taken away" if len(asked) > 3 else None

    train(one, corpus, tmp_path / "model", lines.append, loop.Signals(preempted=preempted), checkpoints=99)
    assert [line for line in lines if "taken away" in line] == [
        "the machine of worker 0 is about to be taken away: saving at step 4"
    ]
    assert 4 in checkpoint.steps(Store(tmp_path / "model"))
    assert curve(tmp_path / "model") == undisturbed


def two_workers(world: World, corpus: Path, folder: Path) -> None:
    """One of two workers cannot write; then one of them is asked to stop. Both must end, and say the same."""
    said = []
    with contextlib.ExitStack() as limit:
        if world.rank == 1:
            limit.enter_context(small_files_only())
        try:
            train(world, corpus, folder / "full", lambda line: None, failed_checkpoints=1)
        except RunError as error:
            said.append(str(error))
    signals = loop.Signals()

    def moved(place: str) -> None:
        if world.rank == 1 and place == "step 2":
            signals.stop.set()

    told = World(world.rank, world.size, world.device, moved=moved)
    try:
        train(told, corpus, folder / "stopped", lambda line: None, signals)
    except RunError as error:
        said.append(str(error))
    (folder / f"said-{world.rank}").write_text("\n".join(said))


def test_what_happens_to_one_worker_happens_to_all(corpus, tmp_path):
    run_world(2, two_workers, corpus, tmp_path)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    full, stopped = said[0].splitlines()
    assert "worker 1: " in full
    assert "worker 0: " not in full
    assert checkpoint.steps(Store(tmp_path / "full")) == []
    assert stopped == "stopped by request after step 3; the same command goes on from there"
    assert checkpoint.steps(Store(tmp_path / "stopped"))[-1] == 3
