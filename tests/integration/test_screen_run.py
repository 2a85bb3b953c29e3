"""A whole screen: guesses, exact verification, agreement, resumption, and its order as the gene list of a scan."""

import json

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from corpus.errors import UserError
from corpus.settings import main
from evaluate.commands import ReportCommand
from evaluate.page import Note
from evaluate.perturb_commands import ScreenCommand
from evaluate.report import write_report
from evaluate.scan import run_scan
from evaluate.screen import run_screen
from evaluate.screen_settings import ScreenSettings
from evaluate.section_screen import screen_section
from evaluate.shifts import read_shifts
from tests.factories_scan import STATES, make_scan, write_scan_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_scan_inputs(tmp_path_factory.mktemp("inputs"))


def settings(**changes):
    values = {
        "states": STATES,
        "min_cells": 4,
        "verify": {"top": 8, "controls": 12},
        "engine": {"workers": 0, "unit_tokens": 900},
        **changes,
    }
    return ScreenSettings.model_validate(values)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("screen") / "out"
    return run_screen(settings(), *inputs, str(out)), out


def test_guesses_are_held_against_exact_deletions(inputs, finished, tmp_path):
    manifest, out = finished
    table = pl.read_parquet(out / "screen.parquet")
    run_scan(make_scan(inputs, tmp_path, perturbation={"min_cells": 4}))
    every = read_shifts(str(tmp_path))[1].group_by("ensembl_id").agg(pl.len(), pl.col("shift_beta").mean())
    both = table.join(every, on="ensembl_id")
    assert len(both) == len(table) == len(every) == manifest.genes
    assert (both["n_cells"] == both["len"]).all()
    verified = both.filter(pl.col("exact_beta").is_not_null())
    np.testing.assert_allclose(verified["exact_beta"], verified["shift_beta"], atol=1e-6)
    assert set(verified["ensembl_id"]) == {*manifest.top, *manifest.controls}
    assert (len(manifest.top), len(manifest.controls)) == (8, 12)
    assert manifest.top == table["ensembl_id"][:8].to_list()
    assert (np.diff(np.abs(table["guess_beta"])) <= 0).all()
    controls = both.filter(pl.col("ensembl_id").is_in(manifest.controls))
    expected = spearmanr(controls["guess_beta"], controls["shift_beta"]).statistic
    assert manifest.agreement["beta"].spearman_controls == pytest.approx(expected)
    assert list(manifest.agreement) == ["alpha", "beta", "delta"]
    # The screen is of use: far better than chance over all genes, also those that were not verified.
    assert spearmanr(both["guess_beta"], both["shift_beta"]).statistic > 0.6
    assert manifest.exact_passes < manifest.all_passes == both["len"].sum()


def test_order_is_a_gene_list(inputs, finished, tmp_path):
    _, out = finished
    names = (out / "genes.txt").read_text().split()
    assert names == pl.read_parquet(out / "screen.parquet")["ensembl_id"].to_list()
    (tmp_path / "top.txt").write_text("\n".join(names[:3]))
    run_scan(make_scan(inputs, tmp_path / "out", perturbation={"genes_file": str(tmp_path / "top.txt")}))
    assert set(read_shifts(str(tmp_path / "out"))[1]["ensembl_id"]) == set(names[:3])


def test_interrupted_screen_goes_on(inputs, finished, tmp_path):
    _, out = finished
    (unit, *_) = (out / "guesses").iterdir()
    (tmp_path / "guesses").mkdir()
    (tmp_path / "guesses" / unit.name).write_bytes(unit.read_bytes())
    run_screen(settings(), *inputs, str(tmp_path))
    for name in ("screen.json", "screen.parquet", "genes.txt"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    with pytest.raises(UserError, match="holds another screen"):
        run_screen(settings(anchors=2), *inputs, str(tmp_path))
    before = (tmp_path / "screen.json").stat().st_mtime_ns
    assert run_screen(settings(), *inputs, str(tmp_path)) == finished[0]
    assert (tmp_path / "screen.json").stat().st_mtime_ns == before


def test_too_few_genes_are_refused(inputs, tmp_path):
    with pytest.raises(UserError, match="scan them exactly"):
        run_screen(settings(verify={"top": 50, "controls": 50}), *inputs, str(tmp_path))


def test_the_report_shows_how_far_to_trust_it(finished, tmp_path):
    manifest, out = finished
    write_report(ReportCommand(out=str(tmp_path / "report.html"), screen=str(out)))
    page = (tmp_path / "report.html").read_text()
    assert "Screen of deletions" in page
    assert f"{manifest.agreement['delta'].spearman:.3f}" in page
    assert pl.read_parquet(out / "screen.parquet")["symbol"][0] in page
    weak = json.loads((out / "screen.json").read_bytes())
    weak["agreement"]["beta"]["spearman_controls"] = 0.3
    (tmp_path / "weak").mkdir()
    (tmp_path / "weak" / "screen.json").write_text(json.dumps(weak))
    (tmp_path / "weak" / "screen.parquet").write_bytes((out / "screen.parquet").read_bytes())
    notes = [block.text for block in screen_section(str(tmp_path / "weak"), 5).blocks if isinstance(block, Note)]
    assert notes == ["The rank correlation towards beta is only 0.30: use an exact scan of all genes instead."]


def test_the_verb(inputs, tmp_path, capsys):
    config = tmp_path / "screen.toml"
    config.write_text(
        'min_cells = 4\n[states]\ncolumn = "cell_type"\nstart = "alpha"\ngoal = "beta"\n'
        "[verify]\ntop = 5\ncontrols = 10\n[engine]\nworkers = 0\n"
    )
    corpus, model = inputs
    arguments = ["--config", str(config), "--corpus", corpus, "--model", model, "--out", str(tmp_path / "out")]
    assert main("evaluate", {"screen": ScreenCommand}, ["screen", *arguments]) == 0
    said = capsys.readouterr().out
    assert "rank correlation with exact deletions of 10 random genes" in said
    found = json.loads((tmp_path / "out" / "screen.json").read_bytes())
    assert found["goal"] == "beta"
