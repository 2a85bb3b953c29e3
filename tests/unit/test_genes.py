"""The frozen vocabulary."""

import numpy as np
import pyarrow as pa
import pytest

from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.store import Store

IDS = ["ENSMUSG00000000001", "ENSMUSG00000000003", "ENSMUSG00000000028"]


def make(symbols: list[str] | None = None, medians: list[float] | None = None) -> GeneTable:
    return GeneTable.own(
        IDS,
        symbols or ["Gnai3", "Pbsn", "Cdc45"],
        ["protein_coding"] * 3,
        np.array(medians or [1.0, 2.0, 0.5]),
        np.arange(3),
    )


def test_special_tokens_come_first_and_genes_in_id_order() -> None:
    genes = make()
    assert genes.tokens.tolist() == [4, 5, 6]
    assert genes.vocab_size == 7
    assert np.isnan(genes.medians_by_token[:4]).all()
    assert genes.medians_by_token[4:].tolist() == [1.0, 2.0, 0.5]
    with pytest.raises(ValueError, match="order"):
        GeneTable.own(IDS[::-1], ["a"] * 3, ["b"] * 3, np.ones(3), np.ones(3))


@pytest.mark.parametrize("median", [0.0, -1.0, np.nan, np.inf])
def test_a_median_that_is_no_positive_number_is_refused(median: float) -> None:
    with pytest.raises(UserError, match=f"{IDS[1]} is not a positive number"):
        make(medians=[1.0, median, 2.0])


def test_repeated_ids_and_too_many_genes_are_refused() -> None:
    with pytest.raises(UserError, match="occurs twice"):
        GeneTable.own([IDS[0], IDS[0]], ["a"] * 2, ["b"] * 2, np.ones(2), np.ones(2))
    many = [f"ENSMUSG{number:011d}" for number in range(65_533)]
    with pytest.raises(UserError, match="16-bit"):
        GeneTable.own(many, many, many, np.ones(len(many)), np.ones(len(many)))


def test_genes_are_found_by_id_and_symbol() -> None:
    genes = make()
    assert genes.find(IDS[1]) == genes.find("Pbsn") == genes.find("PBSN") == 5
    with pytest.raises(UserError, match="'Nope'"):
        genes.find("Nope")
    with pytest.raises(UserError, match="2 genes have this symbol"):
        make(["Gnai3", "Twin", "Twin"]).find("Twin")
    assert make(["Gnai3", "gnai3", "x"]).find("gnai3") == 5


def test_a_changed_file_is_refused(tmp_path: object) -> None:
    store = Store(str(tmp_path))
    genes, other = make(), make(medians=[1.0, 2.0, 0.75])
    genes.save(store)
    other.save(store)
    assert GeneTable.load(store, genes.path).table.equals(genes.table)
    assert genes.hash != other.hash
    (store / "genes").local_path().joinpath(f"{genes.hash}.parquet").write_bytes(store.read_bytes(other.path))
    with pytest.raises(UserError, match="the file was changed"):
        GeneTable.load(store, genes.path)


def test_the_hash_is_of_values_not_of_bytes() -> None:
    table = make().table
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert GeneTable(chunked.combine_chunks()).hash == make().hash
