"""Which cells a scan perturbs, in which work units, and what that costs: pure, before any model runs."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from corpus.errors import UserError
from corpus.hashing import digest_json
from evaluate.perturb_settings import CellSettings, StateSettings


@dataclass(frozen=True)
class WorkUnit:
    """Some cells with all their perturbations, or one cell with a block of them.

    Parameters
    ----------
    unit_id
        Hash of the scan and of what follows: the name of the unit's file.
    cells
        int64[cells], ascending numbers in the corpus.
    first_set, last_set
        Range of each cell's gene sets; None at the end means all.
    tokens
        Upper bound of the tokens to run.
    """

    unit_id: str
    cells: np.ndarray
    first_set: int = 0
    last_set: int | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Selection:
    """Cells of a scan.

    Parameters
    ----------
    cells
        int64[cells], ascending: the cells to perturb.
    state_cells
        State to the cells of its centroid (int64, ascending), in the order start, goal, alternates.
    """

    cells: np.ndarray
    state_cells: dict[str, np.ndarray]


def label_columns(cells: CellSettings, states: StateSettings | None) -> list[str]:
    """Label columns that become columns of the shifts table, besides `donor_id`."""
    names = ([states.column] if states else []) + cells.group_by
    return [name for name in dict.fromkeys(names) if name != "donor_id"]


def select_cells(
    obs: pl.DataFrame, lengths: np.ndarray, cells: CellSettings, states: StateSettings | None
) -> Selection:
    """Choose the cells to perturb and those of the centroids.

    Every cell has one random number, drawn from the seed alone; a limit keeps the cells with the lowest ones. So a
    filter or another limit never changes which of two cells is preferred.

    Parameters
    ----------
    obs
        Label columns of all cells of the corpus, in order: those of the filters, groups and states.
    lengths
        int64[cells of the corpus]: genes of each.

    Raises
    ------
    UserError
        If nothing is left, or a state has no cells; the message says which values there are.
    """
    keep = lengths > 0
    for column, values in cells.filters.items():
        known = obs[column].cast(pl.String).is_in(values).fill_null(False)
        keep &= known.to_numpy()
        if not keep.any():
            raise UserError(f"cells.filters.{column}: no cell is left with {values}; {_values(obs[column])}")
    draw = np.random.default_rng(cells.seed).random(len(obs))
    state_cells: dict[str, np.ndarray] = {}
    chosen = np.flatnonzero(keep)
    if states is not None:
        labels = obs[states.column].cast(pl.String)
        for state in states.names:
            members = np.flatnonzero(keep & (labels == state).fill_null(False).to_numpy())
            if not len(members):
                raise UserError(f"state {state!r}: no cell has it in column {states.column}; {_values(labels)}")
            state_cells[state] = _lowest(members, draw, states.cells_per_state)
            if state == states.start:
                chosen = members
    if cells.max_per_group is not None:
        keys = obs[chosen].select(pl.col(name).cast(pl.String) for name in cells.group_by)
        groups = keys.with_row_index("row").group_by(cells.group_by).agg("row")["row"] if cells.group_by else None
        parts = [np.arange(len(chosen))] if groups is None else [group.to_numpy() for group in groups]
        chosen = np.sort(np.concatenate([_lowest(chosen[part], draw, cells.max_per_group) for part in parts]))
    return Selection(chosen, state_cells)


def _lowest(members: np.ndarray, draw: np.ndarray, limit: int) -> np.ndarray:
    return np.sort(members[np.argsort(draw[members], kind="stable")[:limit]])


def _values(labels: pl.Series) -> str:
    counts = labels.drop_nulls().cast(pl.String).value_counts(sort=True).head(12)
    found = ", ".join(f"{value} ({number})" for value, number in counts.iter_rows())
    return f"{labels.name} has {found}" if found else f"{labels.name} is empty in this corpus"


def plan_units(
    scan_id: str, cells: np.ndarray, num_sets: np.ndarray, input_lengths: np.ndarray, unit_tokens: int
) -> list[WorkUnit]:
    """Cut a scan into work units of about equal cost.

    Parameters
    ----------
    scan_id
        Hash of everything that affects the result.
    cells
        int64[cells], ascending.
    num_sets
        int64[cells]: gene sets of each cell (an upper bound).
    input_lengths
        int64[cells]: genes of each cell's input.
    unit_tokens
        Tokens that a unit should not exceed; a cell that costs more is cut into blocks of its sets.
    """
    return [
        WorkUnit(
            digest_json({"scan": scan_id, "cells": part.tolist(), "sets": [first, last]}, 32), part, first, last, tokens
        )
        for part, first, last, tokens in _parts(cells, num_sets, input_lengths, unit_tokens)
    ]


def _parts(
    cells: np.ndarray, num_sets: np.ndarray, lengths: np.ndarray, unit_tokens: int
) -> Iterator[tuple[np.ndarray, int, int | None, int]]:
    costs = num_sets * lengths
    start = total = 0
    for place, cost in enumerate(costs.tolist()):
        if total and total + cost > unit_tokens:
            yield cells[start:place], 0, None, total
            start, total = place, 0
        if cost > unit_tokens:
            num_blocks = -(-cost // unit_tokens)
            bounds = np.linspace(0, num_sets[place], num_blocks + 1).astype(int).tolist()
            for first, last in itertools.pairwise(bounds):
                # The bound may be short of what a cell really has; the last block takes the rest.
                end = None if last == bounds[-1] else last
                yield cells[place : place + 1], first, end, int((last - first) * lengths[place])
            start = place + 1
        else:
            total += cost
    if total:
        yield cells[start:], 0, None, total


def encoder_flops(passes: np.ndarray, lengths: np.ndarray, num_layers: int, hidden: int, feed_forward: int) -> float:
    """Floating-point operations of the encoder: `passes` sequences of each of `lengths` tokens.

    Per token and layer 2 * (4 d^2 + 2 d f) for the projections and 4 L d for attention over L tokens.
    """
    per_token = num_layers * (2 * (4 * hidden**2 + 2 * hidden * feed_forward) + 4 * hidden * lengths)
    return float((passes * lengths * per_token).sum())
