"""Splits: no donor on two sides unless that is said (F6)."""

import numpy as np
import polars as pl
import pytest

from corpus.errors import UserError
from train.settings import HeldOutSettings, SplitSettings
from train.split import EXCLUDED, TEST, TRAIN, VALIDATION, group_names, hold_out, split_labelled


def labelled(donors: list[str], sizes: list[int], num_labels: int = 3):
    groups = np.repeat(np.array(donors, dtype=object), sizes)
    labels = np.arange(len(groups)) % num_labels
    return groups, labels, np.ones(len(groups), dtype=bool)


def sides_of(groups: np.ndarray, parts: np.ndarray) -> dict[str, set[str]]:
    return {group: set(parts[groups == group]) - {EXCLUDED} for group in np.unique(groups)}


@pytest.mark.parametrize("seed", range(5))
def test_three_donors_or_more_are_kept_whole(seed):
    groups, labels, usable = labelled([f"d{i}" for i in range(10)], [30, 20, 50, 10, 40, 30, 20, 30, 20, 50])
    usable[::7] = False
    split = split_labelled(groups, labels, usable, SplitSettings(), seed)
    assert all(len(sides) == 1 for sides in sides_of(groups, split.parts).values())
    assert split.how == "donor"
    assert (split.parts[~usable] == EXCLUDED).all()
    shares = [len(split.cells(part)) / usable.sum() for part in (TRAIN, VALIDATION, TEST)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.05)


def test_exactly_three_donors_give_one_each():
    groups, labels, usable = labelled(["a", "b", "c"], [60, 12, 9])
    split = split_labelled(groups, labels, usable, SplitSettings(), 0)
    assert split.groups == {TRAIN: ["a"], VALIDATION: split.groups[VALIDATION], TEST: split.groups[TEST]}
    assert sorted(split.groups[VALIDATION] + split.groups[TEST]) == ["b", "c"]


def test_arrangement_prefers_training_cells_of_every_class():
    # Class 2 occurs in donor "only" alone, which therefore has to train.
    groups, labels, usable = labelled(["a", "b", "c", "only"], [30, 30, 30, 30], num_labels=2)
    labels[groups == "only"] = 2
    for seed in range(10):
        split = split_labelled(groups, labels, usable, SplitSettings(), seed)
        assert "only" in split.groups[TRAIN]


def test_two_donors_one_measures_and_the_other_is_divided():
    groups, labels, usable = labelled(["big", "small"], [100, 60])
    split = split_labelled(groups, labels, usable, SplitSettings(), 0)
    assert set(split.parts[groups == "small"]) == {TEST}
    assert set(split.parts[groups == "big"]) == {TRAIN, VALIDATION}
    assert "warning" in split.notes[0]
    assert set(labels[split.cells(VALIDATION)]) == {0, 1, 2}


@pytest.mark.parametrize(("groups", "words"), [(None, "no donors"), (np.full(90, "one", dtype=object), "one donor")])
def test_fewer_donors_are_divided_by_class_with_a_warning(groups, words):
    labels = np.repeat([0, 1, 2], [60, 26, 4])
    split = split_labelled(groups, labels, np.ones(90, bool), SplitSettings(), 0)
    assert split.how == "cell"
    assert "warning" in split.notes[0]
    assert words in split.notes[0]
    for part in (TRAIN, VALIDATION, TEST):
        assert set(labels[split.cells(part)]) == {0, 1, 2}


def test_donor_split_that_was_asked_for_is_not_replaced():
    groups, labels, usable = labelled(["a"], [30])
    with pytest.raises(UserError, match="one donor"):
        split_labelled(groups, labels, usable, SplitSettings(by="donor"), 0)


def test_named_donors():
    groups, labels, usable = labelled(["x / a", "x / b", "x / c"], [20, 20, 20])
    settings = SplitSettings(test_donors=("c",), validation_donors=("x / b",))
    split = split_labelled(groups, labels, usable, settings, 0)
    assert split.groups == {TRAIN: ["x / a"], VALIDATION: ["x / b"], TEST: ["x / c"]}
    with pytest.raises(UserError, match="no donor 'z'"):
        split_labelled(groups, labels, usable, SplitSettings(test_donors=("z",)), 0)


def test_equal_donor_names_of_two_datasets_are_two_donors():
    obs = pl.DataFrame({"dataset_id": ["x", "y", "y"], "donor_id": ["d1", "d1", None]})
    assert group_names(obs, ["dataset_id", "donor_id"]).tolist() == ["x / d1", "y / d1", "y / unknown"]


def test_same_seed_same_split():
    groups, labels, usable = labelled([f"d{i}" for i in range(6)], [20] * 6)
    first, again, other = (split_labelled(groups, labels, usable, SplitSettings(), seed) for seed in (1, 1, 2))
    assert first.parts.tolist() == again.parts.tolist()
    assert first.parts.tolist() != other.parts.tolist()


def held_out(donors: list[str | None], sizes: list[int], **settings):
    obs = pl.DataFrame({"dataset_id": ["x"] * sum(sizes), "donor_id": np.repeat(np.array(donors, object), sizes)})
    split = hold_out(obs, np.ones(len(obs), bool), HeldOutSettings(**settings), seed=0)
    return split, obs["donor_id"].to_numpy()


def test_held_out_by_donor_where_there_are_many():
    split, donors = held_out([f"d{i}" for i in range(40)], [25] * 40)
    assert split.how == "donor"
    assert all(len(sides) == 1 for sides in sides_of(donors, split.parts).values())
    assert len(split.cells(VALIDATION)) == pytest.approx(50, abs=25)


def test_held_out_by_cell_where_a_donor_would_be_too_much():
    split, _ = held_out(["a", "b"], [500, 500])
    assert split.how == "cell"
    assert len(split.cells(VALIDATION)) == 50
    assert "drawn one by one" in split.notes[-1]


def test_held_out_by_donor_on_request_takes_a_large_one():
    split, donors = held_out(["a", "b"], [500, 400], by="donor")
    assert set(donors[split.cells(VALIDATION)]) == {"b"}
    with pytest.raises(UserError, match="one dataset only"):
        held_out(["a", "b"], [500, 400], by="dataset")
