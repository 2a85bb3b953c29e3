"""`--plan`: what a scan would cost, counted from the cells; nothing is written."""

import re

import numpy as np

from corpus.reader import Corpus
from corpus.settings import main
from evaluate.perturb_commands import PerturbCommand
from tests.factories_scan import LIMIT, write_scan_inputs

LAYERS, WIDTH, FEED_FORWARD = 2, 64, 128


def test_plan_counts_passes_tokens_flops_and_rows(tmp_path, capsys):
    corpus, model = write_scan_inputs(tmp_path)
    config = tmp_path / "scan.toml"
    config.write_text(
        '[states]\ncolumn = "cell_type"\nstart = "alpha"\ngoal = "beta"\ncells_per_state = 7\n'
        "[engine]\nworkers = 2\nunit_tokens = 900\n[gene_shifts]\nmost_changed = 3\n"
    )
    arguments = [
        "--config",
        str(config),
        "--corpus",
        corpus,
        "--model",
        model,
        "--out",
        str(tmp_path / "out"),
        "--plan",
    ]
    assert main("evaluate", {"perturb": PerturbCommand}, ["perturb", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)
    opened = Corpus(corpus)
    chosen = opened.obs(["cell_type"])["cell_type"] == "alpha"
    lengths = np.minimum(opened.lengths[chosen.to_numpy()], LIMIT)
    assert said["cells"] == "20"
    assert said["cells of the centroids"] == "alpha 7, beta 7"
    assert said["passes, at most"] == f"{lengths.sum():,}"
    assert said["tokens"] == f"{(lengths**2).sum():,}"
    assert said["rows of gene_shifts, at most"] == f"{3 * lengths.sum():,}"
    per_token = LAYERS * (2 * (4 * WIDTH**2 + 2 * WIDTH * FEED_FORWARD) + 4 * WIDTH * lengths)
    assert said["encoder"] == f"{(lengths**2 * per_token).sum() / 1e12:,.2f} TFLOP"
    assert float(said["speed of one worker"].split()[0].replace(",", "")) > 0
    assert said["estimate"].endswith("with 2 worker(s)")
    assert not (tmp_path / "out").exists()


def test_plan_of_a_list_that_no_cell_has(tmp_path, capsys):
    """There is a speed to measure whatever applies."""
    corpus, model = write_scan_inputs(tmp_path)
    arguments = ["--corpus", corpus, "--model", model, "--out", str(tmp_path / "out"), "--plan"]
    genes = [f"Gene{number}" for number in range(1, 60)]
    arguments += [
        "--perturbation.combine",
        "joint",
        *(word for gene in genes for word in ("--perturbation.genes", gene)),
    ]
    assert main("evaluate", {"perturb": PerturbCommand}, ["perturb", *arguments]) == 0
    assert re.search(r"passes, at most +60\n", capsys.readouterr().out)
