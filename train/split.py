"""Which cells are seen, which choose, which only measure. No donor is ever on two sides unless that is said."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from corpus.errors import UserError
from train.settings import HeldOutSettings, SplitSettings

TRAIN, VALIDATION, TEST, EXCLUDED = "train", "validation", "test", "excluded"
_TRIALS = 200


@dataclass(frozen=True)
class Split:
    """An assignment of every cell of a corpus.

    Parameters
    ----------
    parts
        str[cells]: `train`, `validation`, `test` or `excluded`.
    how
        "donor", "cell", or what else the rule was called, for the record.
    notes
        What the user should know: sizes, and warnings where cells of one donor fall on two sides.
    groups
        Names of the donors in each part, where the split was by donor.
    """

    parts: np.ndarray
    how: str
    notes: list[str]
    groups: dict[str, list[str]] = field(default_factory=dict)

    def cells(self, part: str) -> np.ndarray:
        """Cell numbers of a part, int64, ascending."""
        return np.flatnonzero(self.parts == part)

    def summary(self) -> dict[str, object]:
        """For metrics.json."""
        sizes = {part: int((self.parts == part).sum()) for part in (TRAIN, VALIDATION, TEST, EXCLUDED)}
        return {"by": self.how, "cells": sizes, "groups": self.groups, "notes": self.notes}


def group_names(obs: pl.DataFrame, columns: list[str]) -> np.ndarray:
    """Name each cell's group by several label columns; unknown labels share the name "unknown".

    Donor names repeat between datasets (F6), so the dataset is always one of the columns.
    """
    parts = [pl.col(name).cast(pl.String).fill_null("unknown") for name in columns]
    return obs.select(pl.concat_str(parts, separator=" / ").alias("group"))["group"].to_numpy()


def hold_out(obs: pl.DataFrame, usable: np.ndarray, settings: HeldOutSettings, seed: int) -> Split:
    """Split cells for pretraining: `train`, `validation` (held out), `excluded` (not usable).

    Parameters
    ----------
    obs
        `dataset_id` and `donor_id` of every cell.
    usable
        bool[cells].
    """
    rng = np.random.default_rng([seed, 1])
    parts = np.where(usable, TRAIN, EXCLUDED).astype(object)
    cells = np.flatnonzero(usable)
    if len(cells) < 2:
        raise UserError(f"held_out: {len(cells)} usable cell(s) cannot be split")
    notes: list[str] = []
    wanted = settings.fraction * len(cells)
    rule = "donor" if settings.by == "auto" else settings.by
    if rule != "cell":
        columns = ["dataset_id", "donor_id"] if rule == "donor" else ["dataset_id"]
        names = group_names(obs, columns)[cells]
        chosen = _pick_groups(names, wanted, rng, strict=settings.by != "auto")
        if chosen:
            parts[cells[np.isin(names, chosen)]] = VALIDATION
            held = int((parts == VALIDATION).sum())
            notes.append(f"{held:,} of {len(cells):,} cells held out: {len(chosen)} whole {rule}(s)")
            return Split(parts, rule, notes, {VALIDATION: sorted(chosen)})
        if settings.by != "auto":
            raise UserError(f"held_out.by: the corpus has one {rule} only; use --held-out.by cell")
        notes.append(f"no whole donors make up about {settings.fraction:.0%} of the cells")
    size = min(max(round(wanted), 1), len(cells) - 1)
    parts[rng.choice(cells, size, replace=False)] = VALIDATION
    notes.append(f"{size:,} of {len(cells):,} cells held out, drawn one by one")
    return Split(parts, "cell", notes)


def split_labelled(
    groups: np.ndarray | None, labels: np.ndarray, usable: np.ndarray, settings: SplitSettings, seed: int
) -> Split:
    """Split cells for fine-tuning.

    Parameters
    ----------
    groups
        str[cells]: dataset and donor of each cell; None if the corpus knows no donors.
    labels
        int64[cells]: class of each usable cell.
    usable
        bool[cells]: the others are `excluded`.

    Notes
    -----
    Three or more donors: whole donors train, choose and measure. Two: one of them measures, and the cells of the other
    are divided by class. Fewer: all cells are divided by class. Of 200 seeded arrangements of donors the one is taken
    that leaves the fewest classes without training cells, then without cells elsewhere, then comes closest to the
    wanted shares.
    """
    parts = np.where(usable, TRAIN, EXCLUDED).astype(object)
    cells = np.flatnonzero(usable)
    if len(cells) < 3:
        raise UserError(f"split: {len(cells)} labelled cell(s) are too few for training, validation and test")
    names = np.unique(groups[cells]) if groups is not None else np.zeros(0, object)
    if settings.test_donors:
        if groups is None:
            raise UserError("split.test_donors: the corpus has no donors in that column")
        return _by_name(parts, cells, groups, labels, settings, seed)
    if settings.by == "cell" or len(names) < 2 or groups is None:
        why = (
            "as asked" if settings.by == "cell" else "the corpus has one donor" if len(names) else "no donors are known"
        )
        if settings.by == "donor":
            raise UserError(f"split.by = donor: {why}; use --split.by cell, or another --split.donor-column")
        _by_cell(parts, cells, labels, {TEST: settings.test, VALIDATION: settings.validation}, seed)
        note = f"warning: split by cell ({why}): cells of one donor are on both sides, so scores are optimistic"
        return Split(parts, "cell", [note])
    counts = _label_counts(groups[cells], names, labels[cells])
    if len(names) == 2:
        return _two_donors(parts, cells, groups, labels, names, counts, settings, seed)
    chosen = _arrange(counts, settings, np.random.default_rng([seed, 2]))
    owner = {name: part for part, members in chosen.items() for name in names[members]}
    parts[cells] = [owner[name] for name in groups[cells]]
    members = {part: sorted(names[rows].tolist()) for part, rows in chosen.items()}
    return Split(parts, "donor", [f"split by donor: {', '.join(f'{len(v)} {k}' for k, v in members.items())}"], members)


def _pick_groups(names: np.ndarray, wanted: float, rng: np.random.Generator, *, strict: bool) -> list[str]:
    """Draw whole groups until about `wanted` cells are together; none if that cannot be had (unless strict)."""
    found, sizes = np.unique(names, return_counts=True)
    if len(found) < 2:
        return []
    chosen: list[str] = []
    taken = 0
    for i in rng.permutation(len(found)):
        if taken + sizes[i] <= 1.5 * wanted:
            chosen.append(str(found[i]))
            taken += int(sizes[i])
        if taken >= wanted:
            break
    if taken >= 0.5 * wanted:
        return chosen
    return [str(found[np.argmin(sizes)])] if strict else []


def _by_cell(parts: np.ndarray, cells: np.ndarray, labels: np.ndarray, shares: Mapping[str, float], seed: int) -> None:
    """Move a share of each class to each part; a class of three cells or more has some of them everywhere."""
    rng = np.random.default_rng([seed, 3])
    for label in np.unique(labels[cells]):
        members = rng.permutation(cells[labels[cells] == label])
        first = 0
        for part, share in shares.items():
            size = round(share * len(members))
            if size == 0 and len(members) > len(shares):
                size = 1
            parts[members[first : first + size]] = part
            first += size


def _two_donors(
    parts: np.ndarray,
    cells: np.ndarray,
    groups: np.ndarray,
    labels: np.ndarray,
    names: np.ndarray,
    counts: np.ndarray,
    settings: SplitSettings,
    seed: int,
) -> Split:
    # Train on the donor with more classes, then on the one with more cells.
    keep = max((0, 1), key=lambda i: (int((counts[i] > 0).sum()), int(counts[i].sum()), -i))
    train, test = str(names[keep]), str(names[1 - keep])
    parts[cells[groups[cells] == test]] = TEST
    own = cells[groups[cells] == train]
    _by_cell(parts, own, labels, {VALIDATION: settings.validation}, seed)
    note = f"warning: two donors: {test} is the test set; validation cells come from the training donor, {train}"
    return Split(parts, "donor (test), cell (validation)", [note], {TRAIN: [train], VALIDATION: [train], TEST: [test]})


def _by_name(
    parts: np.ndarray, cells: np.ndarray, groups: np.ndarray, labels: np.ndarray, settings: SplitSettings, seed: int
) -> Split:
    members: dict[str, list[str]] = {TRAIN: [], VALIDATION: [], TEST: []}
    wanted = {**dict.fromkeys(settings.validation_donors, VALIDATION), **dict.fromkeys(settings.test_donors, TEST)}
    names = np.unique(groups[cells]).tolist()
    for donor in wanted:
        if not any(name == donor or name.endswith(f" / {donor}") for name in names):
            raise UserError(f"split: no donor {donor!r}; there are {', '.join(names)}")
    for name in names:
        part = next((p for donor, p in wanted.items() if name == donor or name.endswith(f" / {donor}")), TRAIN)
        members[part].append(name)
        parts[cells[groups[cells] == name]] = part
    if not members[TRAIN]:
        raise UserError("split: every donor is named for validation or testing; none is left to train on")
    notes = ["split by the donors named in the settings"]
    if not members[VALIDATION]:
        own = cells[parts[cells] == TRAIN]
        _by_cell(parts, own, labels, {VALIDATION: settings.validation}, seed)
        notes.append("warning: no validation donors named: validation cells come from the training donors")
    return Split(parts, "donor", notes, members)


def _label_counts(groups: np.ndarray, names: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int64[donors, classes]: cells."""
    counts = np.zeros((len(names), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (np.searchsorted(names, groups), labels), 1)
    return counts


def _arrange(counts: np.ndarray, settings: SplitSettings, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Choose rows of donors for each part."""
    sizes = counts.sum(axis=1)
    total = sizes.sum()
    present = counts.sum(axis=0) > 0
    best: tuple[tuple[int, int, float], dict[str, np.ndarray]] | None = None
    for _ in range(_TRIALS):
        order = rng.permutation(len(counts))
        done = np.cumsum(sizes[order]) / total
        # At least one donor each, and the border nearest to the wanted share.
        test = 1 + int(np.argmin(np.abs(done[:-2] - settings.test)))
        middle = done[test:-1] - done[test - 1]
        validation = test + 1 + int(np.argmin(np.abs(middle - settings.validation)))
        rows = {TRAIN: order[validation:], VALIDATION: order[test:validation], TEST: order[:test]}
        shares = {part: sizes[members].sum() / total for part, members in rows.items()}
        lacking = {part: int((present & (counts[members].sum(axis=0) == 0)).sum()) for part, members in rows.items()}
        off = abs(shares[TEST] - settings.test) + abs(shares[VALIDATION] - settings.validation)
        score = (lacking[TRAIN], lacking[VALIDATION] + lacking[TEST], round(off, 9))
        if best is None or score < best[0]:
            best = (score, {part: np.sort(members) for part, members in rows.items()})
    assert best is not None
    return best[1]
