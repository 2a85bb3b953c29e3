"""Published vocabularies: what is read, what is refused, and that a pickle never runs anything."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus.dictionaries import import_dictionary, read_dictionary, read_pickled_dictionary
from corpus.errors import UserError
from corpus.genes import GeneTable
from corpus.species import load_genes
from tests.factories_vocabulary import HUMAN, IDS, RETIRED, dictionary, save


def test_a_published_vocabulary_keeps_its_tokens_and_has_no_cls() -> None:
    genes = import_dictionary(dictionary(), HUMAN).genes
    assert genes.tokens.tolist() == list(range(2, 33))
    assert genes.ensembl_ids == [*reversed(IDS[:30]), RETIRED]
    assert genes.special_tokens == {"<pad>": 0, "<mask>": 1}
    assert genes.vocab_size == 33
    assert np.isnan(genes.medians_by_token[:2]).all()
    assert genes.symbols[0] == HUMAN["symbol"][29]
    assert genes.find(RETIRED) == 32


def test_the_same_vocabulary_comes_from_parquet_and_from_pickles(tmp_path: Path) -> None:
    found = dictionary()
    expected = import_dictionary(found, HUMAN).genes.hash
    parquet = read_dictionary(save(found, tmp_path / "d.parquet"))
    assert import_dictionary(parquet, HUMAN).genes.hash == expected
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for number, value in ((int, float), (np.int64, np.float64), (np.int32, np.float64)):
            paths = tmp_path / "tokens.pkl", tmp_path / "medians.pkl"
            for path, values, kind in zip(paths, (found.tokens, found.medians), (number, value), strict=True):
                path.write_bytes(pickle.dumps({name: kind(n) for name, n in values.items()}, protocol))
            assert import_dictionary(read_dictionary(*paths), HUMAN).genes.hash == expected


def test_only_genes_with_token_and_median_are_ranked_and_losses_are_named() -> None:
    full = dictionary()
    tokens = {name: token for name, token in full.tokens.items() if name != IDS[3]}
    medians = {name: median for name, median in full.medians.items() if name != IDS[5]}
    found = import_dictionary(dictionary(tokens=tokens, medians=medians), HUMAN)
    assert found.without_token == [IDS[3]]
    assert found.without_median == [IDS[5]]
    assert {IDS[3], IDS[5]}.isdisjoint(found.genes.ensembl_ids)
    assert len(found.genes.tokens) == 29


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"medians": dict.fromkeys(IDS[:30], 0.0)}, "is not a positive number"),
        ({"medians": {name: float("nan") for name in IDS[:30]}}, "is not a positive number"),
        ({"tokens": dict.fromkeys(IDS[:30], 7)}, "have the same token 7"),
        (
            {"tokens": {"<pad>": 0, "<mask>": 40, **{name: i + 2 for i, name in enumerate(IDS[:30])}}},
            "<mask> has token 40",
        ),
        (
            {"tokens": {name: i for i, name in enumerate(IDS[:30])}, "medians": dict.fromkeys(IDS, 1.0)},
            "reserved for <pad>",
        ),
        ({"tokens": {IDS[0]: 70_000}}, "does not fit 16 bits"),
        ({"tokens": {"<bos>": 2, IDS[0]: 3}}, "unknown special token <bos>"),
    ],
)
def test_a_broken_vocabulary_does_not_load(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_dictionary(dictionary(**changes), HUMAN)


def test_a_vocabulary_of_another_species_is_refused() -> None:
    with pytest.raises(UserError, match=r"check mapping\.species"):
        import_dictionary(dictionary(), load_genes("mouse"))


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.parts = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


@pytest.mark.parametrize(
    "content",
    [
        Malice(os.system, "touch {marker}"),
        {"ENSG00000000003": Malice(os.mkdir, "{marker}")},
        {"ENSG00000000003": Malice(eval, "open('{marker}', 'w')")},
        {"a": Malice(getattr, "text", "upper")},
    ],
)
def test_a_malicious_pickle_is_refused_and_runs_nothing(content: Any, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "d.pkl"
    inner = content["ENSG00000000003"] if isinstance(content, dict) and "ENSG00000000003" in content else content
    if isinstance(inner, Malice):
        inner.parts = inner.parts[0], tuple(text.replace("{marker}", str(marker)) for text in inner.parts[1])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match="not a harmless pickled dictionary"):
            read_pickled_dictionary(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"a": 1})[:-3],
        # A memo slot of 2^32 - 1: the plain unpickler allocates tens of gigabytes.
        b"\x80\x03}r\xff\xff\xff\xff.",
        # Alters the reader of scalars instead of calling it.
        b"\x80\x03cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x03cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.",
        pickle.dumps(["a", "list"]),
        pickle.dumps({"a": "text"}),
        pickle.dumps({1: 2}),
        pickle.dumps({"a": True}),
        pickle.dumps({"a": np.array([1.0])}),
        pickle.dumps({"a": object}),
    ],
)
def test_anything_but_a_dictionary_of_numbers_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"d\.pkl"):
        read_pickled_dictionary(path)


def test_swapped_and_missing_pickles_are_told(tmp_path: Path) -> None:
    tokens, medians = tmp_path / "t.pkl", tmp_path / "m.pkl"
    tokens.write_bytes(pickle.dumps({"a": 2}))
    medians.write_bytes(pickle.dumps({"a": 2.5}))
    with pytest.raises(UserError, match="are the two files swapped"):
        read_dictionary(medians, tokens)
    with pytest.raises(UserError, match="dictionary_medians"):
        read_dictionary(tokens)


def test_a_gene_table_never_gives_a_gene_the_place_of_pad_or_mask() -> None:
    table = import_dictionary(dictionary(), HUMAN).genes.table
    low = table.set_column(0, table.schema.field("token"), [(np.arange(len(table)) + 1).astype(np.uint16)])
    with pytest.raises(UserError, match="reserved for <mask>"):
        GeneTable(low)
