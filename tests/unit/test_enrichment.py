"""Pathway enrichment of the genes that move cells."""

import polars as pl
import pytest

from corpus.errors import UserError
from evaluate.stats_report import write_stats
from evaluate.stats_settings import StatsSettings
from tests.factories_stats import make_rows, write_scan

SETTINGS = StatsSettings(min_cells=5)


def test_enrichment_finds_the_set_that_moves_cells(tmp_path):
    pytest.importorskip("gseapy")
    frame = make_rows(donors=1)
    pushed = pl.col("ensembl_id").is_in([f"g{1040 + k}" for k in range(12)])
    x = pl.col("shift_beta")
    frame = frame.with_columns(pl.when(pushed).then(x + 0.02).otherwise(x))
    gmt = tmp_path / "sets.gmt"
    gmt.write_text(
        "pushed\tdescription\t" + "\t".join(f"GENE{1040 + k}" for k in range(12)) + "\n"
        "other\t\t" + "\t".join(f"Gene{1000 + 4 * k}" for k in range(15)) + "\n"
        "small\t\tGene1001\n"
    )
    uri = write_scan(tmp_path / "scan", frame)
    write_stats(uri, str(tmp_path / "out"), StatsSettings(gene_sets=str(gmt)))
    table = pl.read_csv(tmp_path / "out" / "enrichment.csv")
    assert table["gene_set"].to_list() == ["pushed", "other"]
    assert table["size"].to_list() == [12, 15]
    assert table["normalized_score"][0] > 1.5
    assert table["fdr"][0] < 0.01
    assert table["p_value"][1] > 0.05
    gmt.write_text("pushed\tdescription\n")
    with pytest.raises(UserError, match="line 1"):
        write_stats(uri, str(tmp_path / "x"), StatsSettings(gene_sets=str(gmt)))


def test_enrichment_without_gseapy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gseapy", None)
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("a\tb\tGene1001\n")
    with pytest.raises(UserError, match=r'pip install -e "\.\[enrichment\]"'):
        write_stats(write_scan(tmp_path / "scan", make_rows()), str(tmp_path / "x"), StatsSettings(gene_sets=str(gmt)))
