"""SIGKILL a real `python -m ingest run`, run it again: the files of a run that nobody disturbed (R1, R4, R12)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus.manifest import Manifest
from corpus.reader import Corpus
from corpus.settings import main
from corpus.store import Store
from ingest.__main__ import VERBS
from ingest.verify import verify
from tests.factories_ingest import Toy, write_toy

# Several runs, each of which starts a cluster of its own; a busy machine takes longer than Ray's 30 s for that.
pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1_800)]
PATIENT = os.environ | {"RAY_raylet_start_wait_time_s": "180"}


def command(config: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "ingest", "run", "--config", str(config), "--out", str(out)]


def ingest(config: Path, out: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, out), cwd=repository, env=PATIENT, capture_output=True, text=True, check=False
    )


def content(out: Path) -> list[tuple[str, str]]:
    return [(unit.unit_id, unit.sha256) for unit in Manifest.read(Store(out)).units]


def files(out: Path, folder: str) -> int:
    return sum(not path.name.startswith(".") for path in (out / folder).glob("*"))


def write_config(folder: Path, toys: list[Toy], entries: int) -> Path:
    lines = [f"entries_per_unit = {entries}"]
    for toy in toys:
        lines += ["[[sources]]", f'uri = "{toy.path}"', 'obs = {cell_type = "celltype"}']
    (folder / "config.toml").write_text("\n".join(lines))
    return folder / "config.toml"


def killed(config: Path, out: Path, repository: Path, when: Callable[[Path], bool]) -> bool:
    """Run until something is there, then kill the driver with SIGKILL; False if it ended before."""
    log = out.with_suffix(".log")
    with log.open("w") as stream:
        process = subprocess.Popen(command(config, out), cwd=repository, env=PATIENT, stdout=stream, stderr=stream)
    deadline, early = time.monotonic() + 600, True
    try:
        while early and not when(out):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
            early = process.poll() is None
    finally:
        process.kill()
        process.wait()
    return early


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    toys = [write_toy(folder, f"toy{i}", num_cells=120, seed=i) for i in range(3)]
    return write_config(folder, toys, 1_200)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> list[tuple[str, str]]:
    """Made on the cluster of the tests, which is already up, and in this process."""
    out = tmp_path_factory.mktemp("undisturbed") / "corpus"
    assert main("ingest", VERBS, ["run", "--config", str(config), "--out", str(out)]) == 0
    assert len(Manifest.read(Store(out)).units) >= 9
    assert len(set(Corpus(out).obs(["cell_id"])["cell_id"])) == len(Corpus(out)) > 300
    return content(out)


def test_a_run_killed_again_and_again_ends_like_an_undisturbed_one(
    config: Path, undisturbed: list[tuple[str, str]], tmp_path: Path, repository: Path
) -> None:
    """One corpus, killed while cells are extracted, and again when the first shard is there."""
    out = tmp_path / "corpus"
    assert killed(config, out, repository, lambda out: files(out, "cells") >= 3)
    assert 3 <= files(out, "cells") < len(undisturbed)
    assert not files(out, "shards")
    # The rest of so small a corpus may be done before the signal arrives: then the manifest is there, and right.
    killed(config, out, repository, lambda out: files(out, "shards") >= 1)
    assert files(out, "shards") >= 1
    for number in Manifest.numbers(Store(out)):
        assert number == 1
        assert content(out) == undisturbed
    done = ingest(config, out, repository)
    assert done.returncode == 0, done.stderr
    assert content(out) == undisturbed
    assert not [check for check in verify(str(out)) if check.faults]
    assert not list((out / "cells").glob("*.parquet"))


@pytest.mark.nightly
@pytest.mark.timeout(3_000)
def test_kills_at_many_moments(
    undisturbed: list[tuple[str, str]], config: Path, tmp_path: Path, repository: Path
) -> None:
    units = len(undisturbed)
    for folder in ("cells", "shards"):
        for share in (0.2, 0.35, 0.5, 0.8, 1.0):
            out = tmp_path / f"{folder}-{share}"
            killed(config, out, repository, lambda out, n=share * units, f=folder: files(out, f) >= n)
            done = ingest(config, out, repository)
            assert done.returncode == 0, done.stderr
            assert content(out) == undisturbed
            assert not [check for check in verify(str(out)) if check.faults]


@pytest.mark.nightly
@pytest.mark.timeout(1_000)
def test_workers_are_killed_while_the_run_goes_on(
    config: Path, undisturbed: list[tuple[str, str]], tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "corpus"
    with (tmp_path / "log").open("w") as stream:
        process = subprocess.Popen(command(config, out), cwd=repository, env=PATIENT, stdout=stream, stderr=stream)
    kills = 0
    while process.poll() is None:
        time.sleep(3)
        for worker in _descendants(process.pid):
            name = Path(f"/proc/{worker}/cmdline").read_bytes().decode(errors="replace")
            if kills < 6 and ("ray::" in name or "sandbox_worker" in name):
                os.kill(worker, signal.SIGKILL)
                kills += 1
                break
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert kills > 0
    assert content(out) == undisturbed


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children += [int(child) for child in (task / "children").read_text().split()]
        except FileNotFoundError:
            continue
    return children + [inner for child in children for inner in _descendants(child)]
