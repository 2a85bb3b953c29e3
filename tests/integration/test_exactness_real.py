"""Every perturbation and read-out on 50 real cells: the long size of tests/unit/test_perturb*.py."""

import json
import subprocess
import sys

import pytest

from benchmarks.perturbation_exactness import KINDS, PUBLISHED


@pytest.mark.nightly
@pytest.mark.network
@pytest.mark.timeout(3000)
def test_fifty_cells_of_mouse_pancreas(repository, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout

    run("ingest", "sample", "baron-mouse", "--out", tmp_path / "data")
    (tmp_path / "ingest.toml").write_text(
        f'[[sources]]\nuri = "{tmp_path / "data" / "baron-mouse.h5ad"}"\ndataset_id = "baron-mouse"\n'
    )
    run("ingest", "run", "--config", tmp_path / "ingest.toml", "--out", tmp_path / "corpus")
    said = run("benchmarks.perturbation_exactness", "--corpus", tmp_path / "corpus", "--max-genes", 1024)
    lines = [json.loads(line) for line in said.splitlines()]
    of_none = [line for line in lines if line["special_tokens"] == "none"]
    assert {line["perturbation"] for line in of_none} == set(KINDS)
    assert len(of_none) == len(KINDS) + 1 + 2 * len(PUBLISHED) + 1
    for line in lines:
        assert line["cells"] == 50
        assert line["comparisons"] >= 50
        assert line["max_abs_difference"] < 1e-5 < 1e-2 < line["largest_effect"], line
        assert line.get("max_abs_difference_of_genes", 0) < 1e-5, line
