"""Packing: length arithmetic, special tokens, positions."""

import numpy as np
import pytest
import torch

from corpus.reader import Cells
from corpus.schema import CLS, EOS
from train.packing import gene_limit, pack, pack_rectangle


def make_cells(lengths, *, first_cell=0, vocab_size=60, seed=0):
    """Random cells with these numbers of genes, tokens from 4 on."""
    rng = np.random.default_rng(seed)
    tokens = np.concatenate([rng.permutation(np.arange(4, vocab_size))[:length] for length in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Cells(np.arange(first_cell, first_cell + len(lengths)), offsets, tokens.astype(np.uint16))


def sequences(packed):
    return [packed.tokens[a:b].tolist() for a, b in zip(packed.offsets[:-1], packed.offsets[1:], strict=True)]


def test_without_special_tokens_a_batch_is_the_genes_end_to_end():
    cells = make_cells([3, 7, 1])
    packed = pack(cells, max_length=5)
    genes = np.split(cells.tokens, cells.offsets[1:-1])
    assert sequences(packed) == [genes[0].tolist(), genes[1][:5].tolist(), genes[2].tolist()]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert packed.gene_rows.all()
    assert packed.cell_of_row.tolist() == [0] * 3 + [1] * 5 + [2]
    assert packed.lengths.tolist() == [3, 5, 1]
    assert packed.max_length == 5
    assert packed.cu_seqlens.dtype == torch.int32
    assert len(packed) == 3


def test_cls_and_eos_use_two_of_the_places():
    cells = make_cells([3, 7])
    packed = pack(cells, max_length=6, special_tokens="cls_eos")
    genes = np.split(cells.tokens, cells.offsets[1:-1])
    assert gene_limit(6, "cls_eos") == 4
    assert sequences(packed) == [[CLS, *genes[0].tolist(), EOS], [CLS, *genes[1][:4].tolist(), EOS]]
    assert packed.tokens[packed.gene_rows].tolist() == [*genes[0].tolist(), *genes[1][:4].tolist()]
    assert packed.rows_of(np.arange(7)).tolist() == [1, 2, 3, 6, 7, 8, 9]
    assert packed.rows_of(np.array([2, 3, 6])).tolist() == [3, 6, 9]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("special_tokens", ["none", "cls_eos"])
def test_a_rectangle_equals_packing_its_cells(special_tokens):
    packed = pack(make_cells([6, 6, 6]), max_length=20, special_tokens=special_tokens)
    same = pack_rectangle(packed.tokens.view(3, -1), special_tokens)
    for name in ("tokens", "positions", "offsets", "gene_rows", "cell_of_row"):
        assert torch.equal(getattr(packed, name), getattr(same, name)), name
    assert packed.lengths.tolist() == same.lengths.tolist()
    assert packed.is_rectangle
    assert not pack(make_cells([6, 5]), max_length=20).is_rectangle


def test_a_cell_without_genes_is_refused():
    with pytest.raises(ValueError, match="at least one gene"):
        pack(make_cells([3, 0]), max_length=8)
    with pytest.raises(ValueError, match="at least one cell"):
        pack(make_cells([3]).take(np.zeros(0, np.int64)), max_length=8)
