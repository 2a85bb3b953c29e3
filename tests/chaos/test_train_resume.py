"""Pretraining on two workers of Ray Train: killed workers and drivers change nothing but the time it takes (R8, P8)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from corpus.store import Store
from tests.factories import write_corpus
from train import loop, output
from train.pretrain import PretrainTask
from train.settings import PretrainSettings
from train.world import single_process

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning"),
]

CONFIG = """
epochs = 6
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


def test_killed_worker_and_killed_driver_change_nothing(tmp_path):
    write_corpus(tmp_path / "corpus", num_cells=300, donors=())
    (tmp_path / "config.toml").write_text(CONFIG)
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}

    whole = tmp_path / "whole"
    subprocess.run(command(tmp_path, whole), check=True, env=environment, timeout=400)
    expected = curve(whole)
    steps = expected[-1][0]
    assert steps > 40

    disturbed = tmp_path / "disturbed"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(tmp_path, disturbed), env=environment, stdout=log, stderr=log)
        try:
            wait_for_step(disturbed, 10, process)
            victims = workers_of(psutil.Process(process.pid))
            assert len(victims) == 2
            victims[0].send_signal(signal.SIGKILL)
            victims[0].wait(60)
            # The log is cut back to the checkpoint that the run resumes from, and grows again.
            wait_for_step(disturbed, steps // 2, process)
        finally:
            process.kill()
            process.wait()
    text = (tmp_path / "log").read_text()
    assert "resuming from" in text, text
    assert not (disturbed / "metrics.json").exists()

    done = subprocess.run(
        command(tmp_path, disturbed), check=True, env=environment, timeout=400, capture_output=True, text=True
    )
    assert "resuming from" in done.stdout
    assert curve(disturbed) == expected
    one, other = (safetensors.torch.load_file(out / "model.safetensors") for out in (whole, disturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)

    # A third call finds it done, and starts no cluster.
    again = subprocess.run(
        command(tmp_path, disturbed), check=True, env=environment, timeout=400, capture_output=True, text=True
    )
    assert "already finished" in again.stdout

    # Two workers of one micro-batch are one worker of two: the loss is weighted over the whole step.
    values = {
        "corpus": str(tmp_path / "corpus"),
        "out": str(tmp_path / "single"),
        "epochs": 6,
        "model": {"preset": "tiny", "max_length": 32, "dropout": 0.0, "attention_dropout": 0.0},
        "batches": {"token_budget": 200, "accumulation": 2},
        "optimizer": {"learning_rate": 5e-3},
        "held_out": {"by": "cell"},
        "keep": {"log_steps": 2},
    }
    task = PretrainTask(PretrainSettings.model_validate(values))
    output.claim(Store(values["out"]), task.identity())
    loop.run(
        task, str(tmp_path / "single"), single_process(torch.device("cpu")), emit=print, report=lambda record: None
    )
    single = curve(tmp_path / "single")
    assert [step for step, _ in single] == [step for step, _ in expected]
    assert [loss for _, loss in single] == pytest.approx([loss for _, loss in expected], rel=1e-3)
