"""Which cells of a run are kept: the rules of each dataset, then doublets, then duplicates, over all units."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import polars as pl

from corpus.genes import GeneTable
from corpus.manifest import Manifest
from corpus.store import Store
from ingest import neighbours
from ingest.doublets import DoubletSearch
from ingest.duplicates import gene_keys, later_copies
from ingest.plan import WorkUnit
from ingest.quality import Bounds, Selection
from ingest.settings import QualityControl

Result = tuple[dict[str, Any], dict[str, np.ndarray]]


class RunStage(Protocol):
    """Does a piece of work for every task, on the cluster."""

    def __call__(
        self,
        stage: str,
        work: Callable[[Any], Result],
        tasks: Sequence[Any] | None = None,
        consume: Callable[[int, Result], None] | None = None,
    ) -> dict[int, Result]:
        """Return results by position of the task (all units by default); `consume` takes them as they come instead."""


def select(
    units: Sequence[WorkUnit],
    store: Store,
    rules: QualityControl,
    bounds: Mapping[str, Bounds],
    genes: pl.DataFrame,
    wanted: np.ndarray,
    earlier: tuple[Manifest, GeneTable] | None,
    run_stage: RunStage,
) -> tuple[list[Selection], dict[str, dict[str, DoubletSearch]]]:
    """Decide about every cell of a run.

    Parameters
    ----------
    units
        In the order of the plan.
    bounds
        Windows by dataset id.
    genes, wanted
        Gene table of the cells files, and bool[genes]: which of them can become tokens.
    earlier
        The corpus that is added to: its cells come first when duplicates are sought.
    run_stage
        Runs workers.

    Returns
    -------
    One selection per unit, and the doublet searches by dataset and sample.
    """
    selections = [Selection(bounds[unit.inspection.dataset_id], rules) for unit in units]
    searches: dict[str, dict[str, DoubletSearch]] = {}
    if rules.doublets.method != "none":
        selections, searches = _without_doublets(units, store, rules, selections, len(genes), run_stage)
    if rules.drop_duplicates:
        selections = _without_duplicates(units, store, rules, selections, genes, wanted, earlier, run_stage)
    return selections, searches


def _with_drops(selection: Selection, rule: str, rows: np.ndarray) -> Selection:
    return replace(selection, drops={**selection.drops, rule: rows})


def _without_doublets(
    units: Sequence[WorkUnit],
    store: Store,
    rules: QualityControl,
    selections: list[Selection],
    num_genes: int,
    run_stage: RunStage,
) -> tuple[list[Selection], dict[str, dict[str, DoubletSearch]]]:
    names = list(dict.fromkeys(unit.inspection.dataset_id for unit in units))
    places = {name: [i for i, unit in enumerate(units) if unit.inspection.dataset_id == name] for name in names}
    tasks = [([units[i] for i in places[name]], [selections[i] for i in places[name]]) for name in names]
    settings = rules.doublets

    def work(task: tuple[list[WorkUnit], list[Selection]]) -> Result:
        found, searches = neighbours.search_doublets(*task, store, num_genes, settings)
        return {key: search.model_dump() for key, search in searches.items()}, {
            str(i): rows for i, rows in enumerate(found)
        }

    selected, accounts = list(selections), {}
    for position, (facts, arrays) in run_stage("doublets", work, tasks).items():
        name = names[position]
        accounts[name] = {key: DoubletSearch.model_validate(search) for key, search in facts.items()}
        for i, place in enumerate(places[name]):
            selected[place] = _with_drops(selected[place], "doublet", arrays[str(i)])
    return selected, accounts


def _without_duplicates(
    units: Sequence[WorkUnit],
    store: Store,
    rules: QualityControl,
    selections: list[Selection],
    genes: pl.DataFrame,
    wanted: np.ndarray,
    earlier: tuple[Manifest, GeneTable] | None,
    run_stage: RunStage,
) -> list[Selection]:
    least = rules.duplicate_min_genes
    keys = gene_keys(genes["ensembl_id"].to_list())
    before = [] if earlier is None else _earlier_keys(*earlier, store, least, run_stage)

    def work(task: tuple[WorkUnit, Selection]) -> Result:
        rows, found = neighbours.unit_keys(*task, store, wanted, keys, least)
        return {}, {"rows": rows, "keys": found}

    results = run_stage("compare", work, list(zip(units, selections, strict=True)))
    own = [results[position][1] for position in range(len(units))]
    start = sum(len(part) for part in before)
    copies = later_copies(np.concatenate([*before, *(arrays["keys"] for arrays in own)])) - start
    ends = np.cumsum([0, *(len(arrays["rows"]) for arrays in own)])
    selected = []
    for selection, arrays, first, last in zip(selections, own, ends[:-1], ends[1:], strict=True):
        own_copies = copies[np.searchsorted(copies, first) : np.searchsorted(copies, last)]
        rows = arrays["rows"][own_copies - first]
        selected.append(_with_drops(selection, "duplicate_of_another_cell", rows))
    return selected


def _earlier_keys(
    manifest: Manifest, table: GeneTable, store: Store, least: int, run_stage: RunStage
) -> list[np.ndarray]:
    by_token = np.zeros((table.vocab_size, 2), np.uint64)
    by_token[table.tokens] = gene_keys(table.ensembl_ids)

    def work(unit: Any) -> Result:
        return {}, {"keys": neighbours.shard_keys(unit, store, by_token, least)}

    results = run_stage("compare", work, manifest.units)
    return [results[position][1]["keys"] for position in range(len(manifest.units))]
