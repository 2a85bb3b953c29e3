"""Pretraining on two workers of Ray Train: kills, stops and stalls change nothing but the time (R8, R14, P8)."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from ray.cluster_utils import Cluster

from corpus.store import Store
from tests.factories import write_corpus
from tests.worlds import run_world
from train import loop, output
from train.pretrain import PretrainTask
from train.settings import PretrainSettings
from train.world import World, single_process

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning"),
]

ENVIRONMENT = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
EPOCHS = 12
CONFIG = f"""
epochs = {EPOCHS}
[model]
preset = "tiny"
max_length = 32
dropout = 0.0
attention_dropout = 0.0
[batches]
token_budget = 200
[optimizer]
learning_rate = 5e-3
[engine]
zero_stage = 1
[workers]
count = 2
max_failures = 9
[held_out]
by = "cell"
[keep]
log_steps = 2
checkpoint_steps = 4
progress_s = 0
"""


def command(folder: Path, out: Path) -> list[str]:
    settings = ["--config", str(folder / "config.toml"), "--corpus", str(folder / "corpus"), "--out", str(out)]
    return [sys.executable, "-m", "train", "pretrain", *settings, "--debug"]


def curve(out: Path) -> list[tuple[int, float]]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line may be half written while the run goes on.
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not any(found >= step for found, _ in curve(out)):
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in driver.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Folder with a corpus, a configuration, and the model of a run that nothing happened to, not even Ray."""
    folder = tmp_path_factory.mktemp("resume")
    write_corpus(folder / "corpus", num_cells=300, donors=())
    (folder / "config.toml").write_text(CONFIG)
    values = {**tomllib.loads(CONFIG), "corpus": str(folder / "corpus"), "out": str(folder / "whole")}
    run_world(2, train_in_world, values)
    return folder


def train_in_world(world: World, values: dict[str, Any]) -> None:
    """What each worker of Ray Train does, on as many threads as there."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.size))
    task = PretrainTask(PretrainSettings.model_validate(values))
    if world.is_first:
        output.claim(Store(values["out"]), task.identity())
    world.barrier()
    loop.run(task, values["out"], world, emit=print, report=lambda record: None)


@contextlib.contextmanager
def running(folder: Path, out: Path, *options: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A run in the background and the file with all that it prints; killed when the block is left."""
    log = folder / f"{out.name}.log"
    with log.open("w") as stream:
        process = subprocess.Popen([*command(folder, out), *options], env=ENVIRONMENT, stdout=stream, stderr=stream)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def two_workers(process: subprocess.Popen) -> list[psutil.Process]:
    found = workers_of(psutil.Process(process.pid))
    assert len(found) == 2
    return found


def finish(folder: Path, out: Path) -> str:
    """Give the same command once more; it has to go on, and to end where the undisturbed run did."""
    done = subprocess.run(
        command(folder, out), check=True, env=ENVIRONMENT, timeout=400, capture_output=True, text=True
    )
    assert "resuming from" in done.stdout
    assert curve(out) == curve(folder / "whole")
    one, other = (safetensors.torch.load_file(path / "model.safetensors") for path in (folder / "whole", out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    return done.stdout


@pytest.mark.parametrize("shares", [(0.3,), pytest.param((0.1, 0.3, 0.5), marks=pytest.mark.slow)], ids=len)
def test_killed_workers_and_a_killed_driver_change_nothing(undisturbed, shares):
    out = undisturbed / f"killed-{len(shares)}"
    steps = curve(undisturbed / "whole")[-1][0]
    assert steps > 80
    with running(undisturbed, out) as (process, log):
        for share in shares:
            wait_for_step(out, int(share * steps), process)
            victim = two_workers(process)[0]
            victim.kill()
            victim.wait(60)
        # The log is cut back to the checkpoint that the run resumes from, and grows again.
        wait_for_step(out, int(0.7 * steps), process)
    # Ray itself may end an attempt on a machine that is very busy.
    assert log.read_text().count("resuming from") >= len(shares), log.read_text()
    assert not (out / "metrics.json").exists()
    finish(undisturbed, out)
    # A third call finds it done, and starts no cluster.
    again = subprocess.run(
        command(undisturbed, out), check=True, env=ENVIRONMENT, timeout=400, capture_output=True, text=True
    )
    assert "already finished" in again.stdout


def newest_step(out: Path) -> int:
    return max(int(path.parent.name.removeprefix("step-")) for path in out.glob("checkpoints/*/MANIFEST.json"))


@pytest.mark.slow
def test_sigterm_saves_and_a_silent_worker_is_named(undisturbed):
    out = undisturbed / "asked"
    # The driver is asked to end: all workers save after the same step.
    with running(undisturbed, out) as (process, log):
        wait_for_step(out, 6, process)
        process.terminate()
        assert process.wait(60) == 1
    stopped = re.search(r"stopped by request after step (\d+); the same command goes on from there", log.read_text())
    assert stopped, log.read_text()
    assert newest_step(out) == int(stopped[1])

    # One worker is asked.
    with running(undisturbed, out) as (process, log):
        wait_for_step(out, int(stopped[1]) + 4, process)
        two_workers(process)[1].terminate()
        assert process.wait(60) == 1
    stopped = re.search(r"stopped by request after step (\d+); the same command goes on from there", log.read_text())
    assert stopped, log.read_text()
    assert newest_step(out) == int(stopped[1])

    # One worker stands still (R14).
    with running(undisturbed, out, "--workers.timeout-s", "6", "--workers.max-failures", "0") as (process, log):
        wait_for_step(out, int(stopped[1]) + 4, process)
        victim = two_workers(process)[1]
        victim.suspend()
        deadline = time.monotonic() + 40
        try:
            while "this attempt ends" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            # Ray asks a worker that cannot answer for half a minute to go in peace.
            assert process.wait(200) == 1
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    text = log.read_text()
    named = rf"training failed for good: worker \d \(node \S+, process {victim.pid}\) has not been heard of for \d+ s"
    assert re.search(named, text), text
    finish(undisturbed, out)


@pytest.mark.slow
def test_a_notice_of_preemption_saves_before_the_machine_goes(undisturbed, monkeypatch):
    # Two raylets of one machine: the head with the driver, and a worker node that is drained as a spot market would.
    monkeypatch.setitem(ENVIRONMENT, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    out = undisturbed / "preempted"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2)
        monkeypatch.setitem(ENVIRONMENT, "RAY_ADDRESS", cluster.address)
        with running(undisturbed, out) as (process, log):
            wait_for_step(out, 6, process)
            notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            where = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "60"]
            ray = Path(sys.executable).with_name("ray")
            subprocess.run([ray, "drain-node", *where, *notice], check=True, env=ENVIRONMENT, timeout=60)
            deadline = time.monotonic() + 60
            while not (told := re.search(r"is about to be taken away: saving at step (\d+)", log.read_text())):
                assert time.monotonic() < deadline, log.read_text()
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            while newest_step(out) < int(told[1]):
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        cluster.shutdown()
    monkeypatch.delitem(ENVIRONMENT, "RAY_ADDRESS")
    finish(undisturbed, out)


def test_two_workers_of_one_micro_batch_are_one_worker_of_two(undisturbed):
    # The loss is weighted over the whole step (P8).
    values = {
        "corpus": str(undisturbed / "corpus"),
        "out": str(undisturbed / "single"),
        "epochs": EPOCHS,
        "model": {"preset": "tiny", "max_length": 32, "dropout": 0.0, "attention_dropout": 0.0},
        "batches": {"token_budget": 200, "accumulation": 2},
        "optimizer": {"learning_rate": 5e-3},
        "held_out": {"by": "cell"},
        "engine": {"zero_stage": 1},
        "keep": {"log_steps": 2},
    }
    task = PretrainTask(PretrainSettings.model_validate(values))
    output.claim(Store(values["out"]), task.identity())
    loop.run(task, values["out"], single_process(torch.device("cpu")), emit=print, report=lambda record: None)
    single, expected = curve(undisturbed / "single"), curve(undisturbed / "whole")
    assert [step for step, _ in single] == [step for step, _ in expected]
    assert [loss for _, loss in single] == pytest.approx([loss for _, loss in expected], rel=1e-3)
