"""Reading a corpus."""

import copy
from pathlib import Path

import numpy as np
import pytest

from corpus.errors import UserError
from corpus.reader import Cells, Corpus
from tests.factories import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(write_corpus(tmp_path_factory.mktemp("corpus"), num_cells=3_400, num_shards=3))


def test_cells_come_in_the_order_asked_for(corpus: Corpus) -> None:
    every = Cells.concatenate(list(corpus.iter_cells(counts=True)))
    assert every.index.tolist() == list(range(3_400))
    assert every.lengths.tolist() == corpus.lengths.tolist()
    wanted = np.array([3_399, 7, 7, 1_024, 1_133, 1_134])
    some = corpus.read_cells(wanted, counts=True)
    assert some.index.tolist() == wanted.tolist()
    for row, cell in enumerate(wanted):
        a, b = every.offsets[cell : cell + 2]
        c, d = some.offsets[row : row + 2]
        assert some.tokens[c:d].tolist() == every.tokens[a:b].tolist()
        assert some.counts is not None
        assert every.counts is not None
        assert some.counts[c:d].tolist() == every.counts[a:b].tolist()


def test_row_groups_are_small_and_tile_the_corpus(corpus: Corpus) -> None:
    sizes = np.diff(corpus.row_group_offsets)
    assert sizes.max() <= 1_024
    assert sizes.sum() == len(corpus) == 3_400
    assert [len(corpus.read_row_group(group)) for group in range(len(sizes))] == sizes.tolist()


def test_labels_are_in_cell_order_and_unknown_columns_are_named(corpus: Corpus) -> None:
    obs = corpus.obs(["cell_id", "cell_type", "length"])
    assert obs["cell_id"].to_list()[:2] == ["toy:cell0", "toy:cell1"]
    assert obs["cell_type"].to_list()[:4] == ["alpha", "beta", "delta", "alpha"]
    assert (obs["length"].to_numpy() == corpus.lengths).all()
    with pytest.raises(UserError, match="no column 'strain'; the corpus has cell_id"):
        corpus.obs(["strain"])


def test_truncation_keeps_the_head_of_each_cell() -> None:
    cells = Cells(np.arange(3), np.array([0, 3, 3, 8]), np.arange(8, dtype=np.uint16), np.arange(8, dtype=np.uint32))
    short = cells.truncate(2)
    assert short.tokens.tolist() == [0, 1, 3, 4]
    assert short.counts is not None
    assert short.counts.tolist() == [0, 1, 3, 4]
    assert short.offsets.tolist() == [0, 2, 2, 4]
    assert cells.truncate(5) is cells


def test_a_corpus_travels_and_a_missing_one_is_named(corpus: Corpus, tmp_path: Path) -> None:
    again = copy.deepcopy(corpus)  # by __getstate__, as pickle and Ray do
    assert again.lengths.tolist() == corpus.lengths.tolist()
    with pytest.raises(UserError, match="no corpus here"):
        Corpus(tmp_path)


def test_a_manifest_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path)
    path = folder / "manifests" / "000002.json"
    path.write_text('{"format_version": 1}')
    with pytest.raises(UserError, match=r"000002\.json: not a corpus manifest"):
        Corpus(folder)
    text = (folder / "manifests" / "000001.json").read_text()
    path.write_text(text.replace('"format_version": 1', '"format_version": 9').replace('"number": 1', '"number": 2'))
    with pytest.raises(UserError, match="format version 9"):
        Corpus(folder)
    assert len(Corpus(folder, 1)) == 60
