"""From names to genes, against a slow mapping of single names."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.errors import UserError
from corpus.species import load_genes
from ingest.formats import Features
from ingest.mapping import GeneMapper, read_aliases

IDS = [f"ENSMUSG{number:011d}" for number in range(1, 8)]
GENES = pl.DataFrame(
    {
        "ensembl_id": IDS,
        # Two genes are called Twin, one of them coding; two Pair are both coding; Apoe and APOE are different names.
        "symbol": ["Apoe", "Twin", "Twin", "Pair", "Pair", "mt-Nd1", IDS[6]],
        "biotype": ["protein_coding", "lncRNA", *["protein_coding"] * 4, "lncRNA"],
        "is_mitochondrial": [False] * 5 + [True, False],
    }
)


def mapped(names: list[str], kinds: list[str] | None = None, **options: object) -> list[int]:
    return GeneMapper(GENES, **options).map(Features(names, kinds)).rows.tolist()  # type: ignore[arg-type]


def step_of(name: str, **options: object) -> str:
    return next(iter(GeneMapper(GENES, **options).map(Features([name])).steps))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["", ".1", ".12"]), st.booleans()), min_size=1))
def test_versioned_half_versioned_and_lower_case_ids_are_the_clean_ones(features: list[tuple[int, str, bool]]) -> None:
    names = [(IDS[i].lower() if lower else IDS[i]) + version for i, version, lower in features]
    assert mapped(names) == mapped([IDS[i] for i, _, _ in features]) == [i for i, _, _ in features]


def test_symbols_keep_their_case_and_meet_the_coding_gene() -> None:
    assert mapped(["Apoe", " Apoe ", "APOE", "Twin", "Pair", "mt-Nd1"]) == [0, 0, -1, 2, -1, 5]
    assert step_of("Pair") == "ambiguous"
    assert step_of("APOE") == "unmapped"


def test_a_given_vocabulary_decides_first_between_genes_of_one_name() -> None:
    preferred = np.array([False, True, False, False, True, False, False])
    assert mapped(["Twin", "Pair", "Apoe"], preferred=preferred) == [1, 4, 0]


def test_any_case_is_asked_for_and_told() -> None:
    found = GeneMapper(GENES, case_insensitive=True).map(Features(["APOE", "Apoe", "TWIN", "MT-ND1", "PAIR"]))
    assert found.rows.tolist() == [0, 0, 2, 5, -1]
    assert found.any_case == {"APOE": IDS[0], "TWIN": IDS[2], "MT-ND1": IDS[5]}
    assert found.steps == {"ambiguous": 1, "any_case": 3, "symbol": 1}


def test_in_an_upper_cased_source_symbols_in_any_case_come_before_aliases() -> None:
    # "MT-ND1" is also an old name of another gene, "OLD" one of no other.
    table = pl.DataFrame({"alias": ["MT-ND1", "Old"], "ensembl_id": [IDS[0], IDS[6]]})
    mapper = GeneMapper(GENES, table, case_insensitive=True)
    assert mapper.map(Features(["APOE", "TWIN", "MT-ND1", "OLD"])).rows.tolist() == [0, 2, 5, 6]
    assert mapper.map(Features(["Apoe", "Twin", "MT-ND1", "OLD"])).rows.tolist() == [0, 2, 0, 6]


def test_aliases_come_after_symbols_and_reach_retired_ids() -> None:
    table = pl.DataFrame(
        {
            "alias": ["Twin", "AI255918", "Both", "Both", "ENSMUSG00000099999", "Ghost"],
            "ensembl_id": [IDS[0], IDS[0], IDS[3], IDS[4], IDS[3], "ENSMUSG00000088888"],
        }
    )
    mapper = GeneMapper(GENES, table)
    found = mapper.map(Features(["Twin", "AI255918", "Both", "ENSMUSG00000099999.4", "Ghost"]))
    assert found.rows.tolist() == [2, 0, -1, 3, -1]
    assert found.steps == {"alias": 2, "ambiguous": 1, "symbol": 1, "unmapped": 1}
    assert mapper.unknown_aliases == 1


@pytest.mark.parametrize(
    "name",
    [
        "Apoe_ENSMUSG00000000001.5",
        "ENSMUSG00000000001_Apoe",
        "ENSMUSG00000000001.2|Apoe",
        "Apoe;ENSMUSG00000000001",
        "ENSMUSG00000000001,ENSMUSG00000077777",
        "Apoe_ENSMUSG00000077777.1",
    ],
)
def test_an_id_inside_a_longer_name_counts(name: str) -> None:
    assert mapped([name]) == [0]
    assert step_of(name) == "compound"


def test_a_name_with_two_known_ids_maps_nothing() -> None:
    assert mapped([f"{IDS[0]}|{IDS[1]}"]) == [-1]
    assert mapped(["Ensa", "ENS", "ENSMUSG1"]) == [-1, -1, -1]


def test_prefixes_of_other_genomes_antibodies_and_spike_ins_are_no_genes() -> None:
    names = ["mm10___Apoe", f"GRCm38_{IDS[1]}.3", "GRCh38_APOE", "hg19_TP53", "ERCC-00002", "CD3", "Apoe"]
    kinds = ["Gene Expression"] * 5 + ["Antibody Capture", "Gene Expression"]
    found = GeneMapper(GENES, species="mouse").map(Features(names, kinds))
    assert found.rows.tolist() == [0, 1, -2, -2, -2, -2, 0]
    assert found.steps["other_species"] == 2
    assert found.coverage == 1.0
    # A species of the user's own: the prefix stays unresolved, and low coverage stops the file.
    assert mapped(["mm10___Apoe"], species="worm.parquet") == [-1]


def test_duplicates_are_counted_and_named() -> None:
    found = GeneMapper(GENES).map(Features(["Apoe", IDS[0], f"{IDS[0]}.2", IDS[1], "nothing"]))
    assert found.duplicates == 2
    assert found.collisions == {IDS[0]: ["Apoe", IDS[0], f"{IDS[0]}.2"]}
    assert found.coverage == 0.8


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*IDS, "Apoe", "Twin", "Pair", "x", "ERCC-00001", "mm10_Apoe", "hg38_A"])))
def test_the_account_adds_up(names: list[str]) -> None:
    found = GeneMapper(GENES, species="mouse").map(Features(names))
    assert sum(found.steps.values()) == len(names) == len(found.rows)
    lost = sum(found.steps.get(step, 0) for step in ("unmapped", "ambiguous"))
    assert (found.rows == -1).sum() == lost
    assert (found.rows >= 0).sum() - found.duplicates == len(np.unique(found.rows[found.rows >= 0]))


def test_every_symbol_of_the_mouse_table_is_mapped_as_a_slow_search_does() -> None:
    genes = load_genes("mouse")
    names = [*genes.sample(400, seed=1)["symbol"], "Gm1992", "Pakap", "Ptp4a1"]
    rows = GeneMapper(genes).map(Features(names)).rows
    for name, row in zip(names, rows, strict=True):
        same = genes.with_row_index().filter((pl.col("symbol") == name) | (pl.col("ensembl_id") == name))
        coding = same.filter(pl.col("biotype") == "protein_coding")
        chosen = same if len(same) == 1 else coding
        assert row == (chosen["index"][0] if len(chosen) == 1 else -1)


def test_a_broken_alias_table_is_named(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "aliases.tsv"
    path.write_text("alias\tgene\na\tb\n")
    with pytest.raises(UserError, match=r"aliases\.tsv: .* lacks the column 'ensembl_id'; it has alias, gene"):
        read_aliases(path)
    with pytest.raises(UserError, match="cannot read the alias table"):
        read_aliases(path.with_name("none.csv"))
