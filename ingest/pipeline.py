"""An ingest run, stage by stage: inspect, extract, survey, medians, publish, manifest.

Killed at any moment and run again, it goes on: every file is created whole or not at all, under a name that says what
is in it, and the manifest comes last (docs/corpus-format.md).
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import polars as pl

from corpus.errors import RunError, UserError
from corpus.genes import GeneTable
from corpus.manifest import Manifest, Unit
from corpus.medians import Histogram, exact_medians
from corpus.provenance import record_run
from corpus.schema import obs_names
from corpus.store import Store
from ingest import stages
from ingest.distribute import cluster, map_tasks
from ingest.mapping import GeneMapper
from ingest.plan import Inspection, WorkUnit, cut, expand, inspect, load_mapper, plan_hash
from ingest.progress import Progress
from ingest.quality import Bounds, Sums
from ingest.report import Report, account
from ingest.settings import IngestSettings, Mapping

logger = logging.getLogger(__name__)
_ERRORS_SHOWN = 5


@cache
def _cached_mapper(mapping: Mapping) -> tuple[pl.DataFrame, GeneMapper]:
    """Building the name tables takes half a second; a worker process does it once."""
    return load_mapper(mapping)


def plan(settings: IngestSettings) -> list[WorkUnit]:
    """Look at every source, on the cluster, and cut it into work units; changes nothing.

    Raises
    ------
    UserError
        For all sources that are missing or unusable, the first few by name.
    """
    sources = expand(settings.sources)
    mapping = settings.mapping

    def look(source: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return inspect(source, _cached_mapper(mapping)[1], mapping).model_dump(mode="json"), {}

    found: dict[int, Inspection] = {}
    problems: dict[int, UserError] = {}
    for position, facts, _ in map_tasks(sources, look):
        if isinstance(facts, UserError):
            problems[position] = facts
        else:
            found[position] = Inspection.model_validate(facts)
    _raise_all(problems)
    return cut([found[position] for position in sorted(found)], settings)


def run(settings: IngestSettings, out: str, *, frozen: Manifest | None = None) -> Report:
    """Ingest sources into a corpus.

    Parameters
    ----------
    settings
        Sources and rules.
    out
        URI of the corpus.
    frozen
        Manifest of the corpus at `out`, to add to it: its gene table is used as it is, its units stay.

    Returns
    -------
    The account of the run.

    Raises
    ------
    UserError
        If a source is unusable; nothing is published then.
    RunError
        If sums do not agree.
    """
    store = Store(out)
    with cluster():
        units = plan(settings)
        name = plan_hash(units, settings, None if frozen is None else frozen.plan)
        report = _published(store, name)
        if report is None:
            report = _Run(settings, store, units, frozen).publish(name)
        else:
            logger.info("%s: manifest %d already holds this run", out, report.number)
    for path in {unit.cells for unit in units}:
        if store.exists(path):
            store.remove(path)
    return report


def _published(store: Store, plan_name: str) -> Report | None:
    for number in Manifest.numbers(store):
        if Manifest.read(store, number).plan == plan_name:
            return Report.model_validate_json(store.read_bytes(f"reports/{number:06d}.json"))
    return None


class _Run:
    """The stages of one run over its work units."""

    def __init__(self, settings: IngestSettings, store: Store, units: list[WorkUnit], frozen: Manifest | None) -> None:
        self.settings, self.store, self.units, self.frozen = settings, store, units, frozen
        self.genes, _ = _cached_mapper(settings.mapping)
        self.inspections = list({unit.inspection.dataset_id: unit.inspection for unit in units}.values())
        if frozen is not None:
            taken = {unit.dataset_id for unit in frozen.units} & {found.dataset_id for found in self.inspections}
            if taken:
                raise UserError(f"{store.uri}: dataset {sorted(taken)[0]!r} is already in this corpus")

    def publish(self, plan_name: str) -> Report:
        """Run all stages; the manifest last."""
        number = max([0, *Manifest.numbers(self.store)]) + 1
        self._extract()
        bounds, shares = self._survey()
        vocabulary = self._vocabulary(bounds)
        vocabulary.save(self.store)
        units = self._rank(bounds, vocabulary)
        report = account(number, len(vocabulary.ensembl_ids), self.inspections, units, bounds, shares)
        record_run(
            self.store,
            "ingest run",
            self.settings,
            {found.source.uri: found.sha256 for found in self.inspections},
        )
        # The report before the manifest: a published manifest always has its account.
        text = report.to_json()
        if not self.store.create(report.path, text) and self.store.read_bytes(report.path) != text:
            raise RunError(f"{self.store.uri}/{report.path}: another run is publishing here; run again")
        Manifest(
            number=number,
            plan=plan_name,
            genes=vocabulary.path,
            genes_hash=vocabulary.hash,
            obs_columns=obs_names(self.settings.extra_obs),
            units=[*(self.frozen.units if self.frozen else []), *units],
        ).publish(self.store)
        return report

    def _map(
        self, stage: str, work: Callable[[WorkUnit], tuple[dict[str, Any], dict[str, np.ndarray]]]
    ) -> "dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]]":
        """Run a stage whose results are small."""
        results: dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]] = {}
        problems: dict[int, UserError] = {}
        progress = Progress(stage, len(self.units), sum(unit.stop - unit.start for unit in self.units))
        for position, facts, arrays in map_tasks(self.units, work):
            if isinstance(facts, UserError):
                problems[position] = facts
            else:
                results[position] = facts, arrays
            progress.add(self.units[position].stop - self.units[position].start)
        progress.done()
        _raise_all(problems)
        if len(results) != len(self.units):
            raise RunError(f"{stage}: {len(self.units) - len(results)} work units gave no result; run again")
        return results

    def _extract(self) -> None:
        store, extra, mapping = self.store, self.settings.extra_obs, self.settings.mapping

        def work(unit: WorkUnit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            stages.extract(unit, store, *_cached_mapper(mapping), extra)
            return {}, {}

        self._map("extract", work)

    def _survey(self) -> tuple[dict[str, Bounds], dict[str, float]]:
        """Quality-control window and share of mapped counts of every dataset."""
        store = self.store

        def work(unit: WorkUnit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            sums, all_counts, mapped = stages.survey(unit, store)
            return {"sums": sums.model_dump(), "counts": all_counts, "mapped": mapped}, {}

        sums: dict[str, Sums] = defaultdict(Sums)
        counts: dict[str, int] = defaultdict(int)
        mapped: dict[str, int] = defaultdict(int)
        for position, (facts, _) in self._map("survey", work).items():
            name = self.units[position].inspection.dataset_id
            sums[name] += Sums.model_validate(facts["sums"])
            counts[name] += facts["counts"]
            mapped[name] += facts["mapped"]
        least = self.settings.mapping.min_count_coverage
        shares = {name: mapped[name] / counts[name] if counts[name] else 0.0 for name in counts}
        for name, share in shares.items():
            if share < least:
                raise UserError(
                    f"dataset {name}: only {share:.1%} of its counts fall on mapped genes (least: "
                    f"mapping.min_count_coverage = {least:.0%}); check mapping.species, or give mapping.aliases"
                )
        return {name: Bounds.of(total, self.settings.quality_control) for name, total in sums.items()}, shares

    def _vocabulary(self, bounds: dict[str, Bounds]) -> GeneTable:
        """The frozen gene table, or one of our own from the exact medians of all kept cells."""
        if self.frozen is not None:
            return GeneTable.load(self.store, self.frozen.genes)
        store, rules = self.store, self.settings.quality_control
        biotypes = self.settings.vocabulary.biotypes
        wanted = np.ones(len(self.genes), bool)
        if biotypes is not None:
            unknown = set(biotypes) - set(self.genes["biotype"])
            if unknown:
                raise UserError(f"vocabulary.biotypes: no gene has the biotype {sorted(unknown)[0]!r}")
            wanted = self.genes["biotype"].is_in(biotypes).to_numpy()

        def count(unit: WorkUnit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            position, number = stages.histogram(unit, store, bounds[unit.inspection.dataset_id], rules, wanted)
            return {}, {"position": position, "number": number}

        histogram = Histogram(len(self.genes))
        for _, arrays in self._map("count", count).values():
            histogram.add_sparse(arrays["position"], arrays["number"])
        low, high = histogram.median_bins()

        def middle(unit: WorkUnit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            own = bounds[unit.inspection.dataset_id]
            genes, values = stages.middle_values(unit, store, own, rules, wanted, low, high)
            return {}, {"genes": genes, "values": values}

        middles = [arrays for _, arrays in self._map("medians", middle).values()]
        medians = exact_medians(
            histogram,
            np.concatenate([arrays["genes"] for arrays in middles]),
            np.concatenate([arrays["values"] for arrays in middles]),
        )
        seen = self.genes.with_columns(median=medians, n_cells=histogram.n_cells).filter(pl.col("n_cells") > 0)
        if seen.is_empty():
            raise UserError("no cell passed quality control: see the rules under quality_control")
        return GeneTable.own(
            seen["ensembl_id"].to_list(),
            seen["symbol"].to_list(),
            seen["biotype"].to_list(),
            seen["median"].to_numpy(),
            seen["n_cells"].to_numpy(),
        )

    def _rank(self, bounds: dict[str, Bounds], vocabulary: GeneTable) -> list[Unit]:
        store, rules = self.store, self.settings.quality_control
        columns = obs_names(self.settings.extra_obs)
        token_of_row = np.array([vocabulary.token_of.get(name, -1) for name in self.genes["ensembl_id"]], np.int32)

        def work(unit: WorkUnit) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            own = bounds[unit.inspection.dataset_id]
            made = stages.publish(unit, store, own, rules, vocabulary, token_of_row, columns)
            return made.model_dump(mode="json"), {}

        results = self._map("rank", work)
        units = [Unit.model_validate(results[position][0]) for position in range(len(self.units))]
        for unit in units:
            if unit.rows + sum(unit.dropped.values()) != unit.stop - unit.start:
                raise RunError(f"{unit.record}: kept and dropped cells do not add up to the unit's rows")
        return units


def _raise_all(problems: dict[int, UserError]) -> None:
    if problems:
        texts = [str(problems[position]) for position in sorted(problems)]
        more = len(texts) - _ERRORS_SHOWN
        raise UserError("; ".join(texts[:_ERRORS_SHOWN]) + (f"; and {more} more" if more > 0 else ""))
