"""An ingest run, stage by stage: inspect, extract, survey, medians, publish, manifest.

Killed at any moment and run again, it goes on: every file is created whole or not at all, under a name that says what
is in it, and the manifest comes last (docs/corpus-format.md).
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from corpus.errors import RunError, UserError
from corpus.genes import GeneTable
from corpus.manifest import Manifest, Unit
from corpus.provenance import record_run
from corpus.schema import obs_names
from corpus.species import load_genes
from corpus.store import Store
from ingest import digests, stages
from ingest.distribute import cluster, map_tasks
from ingest.doublets import require_library
from ingest.histograms import Histograms
from ingest.limits import Limits
from ingest.plan import Inspection, Names, WorkUnit, cut, expand, plan_hash
from ingest.problems import Problems
from ingest.progress import Progress
from ingest.quality import Bounds, CountShares, Selection, Sums
from ingest.report import Report, account, describe
from ingest.sandbox import SourceDiedError, read_safely
from ingest.selection import Result, select
from ingest.settings import IngestSettings
from ingest.sources_table import all_sources
from ingest.tasks import extract_unit, inspect_source
from ingest.vocabulary import Given, build_vocabulary, given_vocabulary, mapping_genes, wanted_genes

logger = logging.getLogger(__name__)


def prepare(settings: IngestSettings, added_to: tuple[Store, Manifest] | None = None) -> tuple[Names, Given | None]:
    """Load what a run maps names to, and the vocabulary, if one is given."""
    species = load_genes(settings.mapping.species)
    given = given_vocabulary(settings.vocabulary, species, added_to)
    genes = mapping_genes(species, None if given is None else given.genes)
    return Names.of(settings.mapping, genes, 0 if given is None else len(given.genes.tokens)), given


def plan(
    settings: IngestSettings,
    names: Names | None = None,
    limits: Limits | None = None,
    problems: Problems | None = None,
) -> list[WorkUnit]:
    """Look at every source, on the cluster, and cut it into work units; changes nothing.

    Parameters
    ----------
    names
        From `prepare`, if that is done already.
    limits
        What reading a source may cost.
    problems
        Collects the sources that are missing or unusable.

    Raises
    ------
    UserError, RunError
        For all such sources, the first few by name, unless they may be quarantined; see `Problems.settle`.
    """
    sources = expand(all_sources(settings))
    used = names or prepare(settings)[0]
    allowed, problems = limits or Limits(), problems or Problems()

    def look(source: Any) -> Result:
        return read_safely(allowed, source.uri, inspect_source, source, used), {}

    found: dict[int, Inspection] = {}
    errors: dict[int, UserError | SourceDiedError] = {}
    progress = Progress("inspect", len(sources), len(sources), what="sources")
    for position, facts, _ in map_tasks(sources, look):
        if isinstance(facts, UserError | SourceDiedError):
            errors[position] = facts
        else:
            found[position] = Inspection.model_validate(facts)
        progress.add(1)
    progress.done()
    for position in sorted(errors):
        problems.add(sources[position].dataset_id or "", errors[position])
    problems.settle(left=len(found))
    return cut([found[position] for position in sorted(found)], settings, used.hash)


def run(
    settings: IngestSettings,
    out: str,
    *,
    frozen: Manifest | None = None,
    limits: Limits | None = None,
    allow_quarantine: bool = False,
) -> Report:
    """Ingest sources into a corpus.

    Parameters
    ----------
    settings
        Sources and rules.
    out
        URI of the corpus.
    frozen
        Manifest of the corpus at `out`, to add to it: its gene table is used as it is, its units stay.
    limits
        What reading a source may cost.
    allow_quarantine
        Whether to go on without sources that cannot be read; report and manifest name them.

    Returns
    -------
    The account of the run.

    Raises
    ------
    UserError
        If a source is unusable; nothing is published then.
    RunError
        If a source made its reader die twice, if sums do not agree, or if a file of the corpus was changed.
    """
    store = Store(out)
    require_library(settings.quality_control.doublets)
    if settings.vocabulary.medians == "tdigest":
        digests.require_library()
    names, given = prepare(settings, None if frozen is None else (store, frozen))
    with cluster():
        problems = Problems(allow_quarantine)
        units = plan(settings, names, limits, problems)
        this = _Run(settings, store, units, frozen, names, given, limits or Limits(), problems)
        report = this.published()
        if report is None:
            report = this.publish()
        else:
            logger.info("%s: manifest %d already holds this run", out, report.number)
    for path in {unit.cells for unit in units}:
        if store.exists(path):
            store.remove(path)
    return report


class _Run:
    """The stages of one run over its work units."""

    def __init__(
        self,
        settings: IngestSettings,
        store: Store,
        units: list[WorkUnit],
        frozen: Manifest | None,
        names: Names,
        given: Given | None,
        limits: Limits,
        problems: Problems,
    ) -> None:
        self.settings, self.store, self.units, self.frozen = settings, store, units, frozen
        self.limits, self.problems = limits, problems
        self.names, self.given, self.genes = names, given, names.genes
        self.wanted = wanted_genes(settings.vocabulary, names.genes, given.genes if given else None)
        self.inspections = list({unit.inspection.dataset_id: unit.inspection for unit in units}.values())
        if frozen is not None:
            taken = {unit.dataset_id for unit in frozen.units} & {found.dataset_id for found in self.inspections}
            if taken:
                raise UserError(f"{store.uri}: dataset {sorted(taken)[0]!r} is already in this corpus")

    @property
    def plan_name(self) -> str:
        """Name of what this run makes; it changes when a source is set aside."""
        genes = self.given.genes.hash if self.given else None
        return plan_hash(self.units, self.settings, genes, self.frozen.plan if self.frozen else None)

    def published(self) -> Report | None:
        """Report of the manifest that holds this run already."""
        for number in Manifest.numbers(self.store):
            manifest = Manifest.read(self.store, number)
            if manifest.plan == self.plan_name:
                return Report.model_validate_json(self.store.read_bytes(manifest.report))
        return None

    def publish(self) -> Report:
        """Run all stages; the manifest last."""
        self._extract()
        bounds, shares = self._survey()
        if self.problems.quarantined:
            report = self.published()
            if report is not None:
                return report
        number = max([0, *Manifest.numbers(self.store)]) + 1
        earlier = (self.frozen, self.given.genes) if self.frozen and self.given else None
        rules = self.settings.quality_control
        selections, searches = select(
            self.units, self.store, rules, bounds, self.genes, self.wanted, earlier, self._map
        )
        vocabulary = self.given.genes if self.given else self._build_vocabulary(selections)
        vocabulary.save(self.store)
        units, histograms = self._rank(selections, vocabulary)
        report = account(
            number,
            len(vocabulary.tokens),
            describe(vocabulary, self.settings.vocabulary, self.given),
            rules,
            self.inspections,
            units,
            bounds,
            shares,
            histograms,
            searches,
        )
        report = report.model_copy(update={"quarantined": self._missing()})
        record_run(
            self.store,
            "ingest run",
            self.settings,
            {found.source.uri: found.sha256 for found in self.inspections},
        )
        # The report before the manifest: a published manifest always has its account.
        self.store.create_same(report.path, report.to_json())
        self._require_shards(units)
        Manifest(
            number=number,
            plan=self.plan_name,
            genes=vocabulary.path,
            genes_hash=vocabulary.hash,
            obs_columns=obs_names(self.settings.extra_obs),
            units=[*(self.frozen.units if self.frozen else []), *units],
            quarantined=report.quarantined,
            report=report.path,
        ).publish(self.store)
        return report

    def _require_shards(self, units: Sequence[Unit]) -> None:
        """Look once more before readers are told: somebody may have tidied up meanwhile."""
        there = set(self.store.names("shards"))
        gone = [unit.shard for unit in units if unit.shard.removeprefix("shards/") not in there]
        if gone:
            raise RunError(f"{self.store.uri}/{gone[0]}: was removed during the run ({len(gone)} such); run again")

    def _missing(self) -> dict[str, str]:
        """Datasets that could not be read, by this run or by earlier ones of this corpus, and are not in it."""
        earlier = self.frozen.quarantined if self.frozen else {}
        there = {found.dataset_id for found in self.inspections}
        return {name: why for name, why in earlier.items() if name not in there} | self.problems.quarantined

    def _set_aside(self, errors: Mapping[str, UserError | SourceDiedError]) -> None:
        """Take datasets out of the run, or end it; part of a dataset would look like all of it."""
        for dataset_id, error in errors.items():
            self.problems.add(dataset_id, error)
        bad = self.problems.quarantined
        self.inspections = [found for found in self.inspections if found.dataset_id not in bad]
        self.problems.settle(left=len(self.inspections))
        self.units = [unit for unit in self.units if unit.inspection.dataset_id not in bad]

    def _map(
        self,
        stage: str,
        work: Callable[[Any], Result],
        tasks: Sequence[Any] | None = None,
        consume: Callable[[int, Result], None] | None = None,
    ) -> dict[int, Result]:
        """Run a stage (`ingest.selection.RunStage`): results are small, or consumed as they come."""
        tasks = self.units if tasks is None else tasks
        results: dict[int, Result] = {}
        done = 0
        errors: dict[int, UserError | SourceDiedError] = {}
        sizes = [_num_cells(task) for task in tasks]
        progress = Progress(stage, len(tasks), sum(sizes))
        for position, facts, arrays in map_tasks(tasks, work):
            if isinstance(facts, UserError) or isinstance(facts, SourceDiedError):  # noqa: SIM101 - mypy narrows only so
                errors[position] = facts
            elif consume is not None:
                consume(position, (facts, arrays))
            else:
                results[position] = facts, arrays
            done += 1
            progress.add(sizes[position])
        progress.done()
        if done != len(tasks):
            raise RunError(f"{stage}: {len(tasks) - done} tasks gave no result; run again")
        if errors and tasks is not self.units:
            raise errors[min(errors)]
        if errors:
            # The first error of a dataset tells most: it is put in last.
            positions = sorted(errors, reverse=True)
            self._set_aside({self.units[position].inspection.dataset_id: errors[position] for position in positions})
        return results

    def _extract(self) -> None:
        store, names, limits = self.store, self.names, self.limits
        extra, rules = self.settings.extra_obs, self.settings.quality_control

        def work(unit: WorkUnit) -> Result:
            if store.exists(unit.cells):
                return {}, {}
            uri = unit.inspection.source.uri
            return read_safely(limits, uri, extract_unit, unit, store, names, extra, rules), {}

        self._map("extract", work)

    def _survey(self) -> tuple[dict[str, Bounds], dict[str, CountShares]]:
        """Quality-control window and mapped shares of counts of every dataset."""
        store, wanted = self.store, self.wanted

        def work(unit: WorkUnit) -> Result:
            sums, *counts = stages.survey(unit, store, wanted)
            return {"sums": sums.model_dump(), "counts": counts}, {}

        sums: dict[str, Sums] = defaultdict(Sums)
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        units = self.units
        for position, (facts, _) in self._map("survey", work).items():
            name = units[position].inspection.dataset_id
            sums[name] += Sums.model_validate(facts["sums"])
            counts[name] = [a + b for a, b in zip(counts[name], facts["counts"], strict=True)]
        least = self.settings.mapping.min_count_coverage
        shares = {name: CountShares.of(*numbers) for name, numbers in counts.items()}
        poor = {
            name: UserError(
                f"dataset {name}: only {share.mapped:.1%} of its counts fall on mapped genes (least: "
                f"mapping.min_count_coverage = {least:.0%}); check mapping.species, or give mapping.aliases"
            )
            for name, share in shares.items()
            if counts[name][0] and share.mapped < least  # without counts there is nothing to judge
        }
        if poor:
            self._set_aside(poor)
        return {name: Bounds.of(total, self.settings.quality_control) for name, total in sums.items()}, shares

    def _build_vocabulary(self, selections: list[Selection]) -> GeneTable:
        rules = self.settings.vocabulary
        return build_vocabulary(rules, self.genes, self.wanted, self.units, selections, self.store, self._map)

    def _rank(
        self, selections: list[Selection], vocabulary: GeneTable
    ) -> tuple[list[Unit], dict[str, tuple[Histograms, Histograms]]]:
        """Units in order, and the histograms of each dataset's cells, read and kept."""
        store = self.store
        columns = obs_names(self.settings.extra_obs)
        token_of_row = np.array([vocabulary.token_of.get(name, -1) for name in self.genes["ensembl_id"]], np.int32)

        def work(task: tuple[WorkUnit, Selection]) -> Result:
            made = stages.publish(*task, store, vocabulary, token_of_row, columns)
            read, kept = stages.histograms(task[0], made, store)
            return {"unit": made.model_dump(), "read": read.model_dump(), "kept": kept.model_dump()}, {}

        results = self._map("rank", work, list(zip(self.units, selections, strict=True)))
        facts = [results[position][0] for position in range(len(self.units))]
        units = [Unit.model_validate(fact["unit"]) for fact in facts]
        histograms = {found.dataset_id: (Histograms.empty(), Histograms.empty()) for found in self.inspections}
        for unit, fact in zip(units, facts, strict=True):
            read, kept = histograms[unit.dataset_id]
            more = (Histograms.model_validate(fact["read"]), Histograms.model_validate(fact["kept"]))
            histograms[unit.dataset_id] = read + more[0], kept + more[1]
        for unit in units:
            if unit.rows + sum(unit.dropped.values()) != unit.stop - unit.start:
                raise RunError(f"{unit.record}: kept and dropped cells do not add up to the unit's rows")
        return units, histograms


def _num_cells(task: Any) -> int:
    """Cells of a task: of a unit, of a published unit, or of all units in a list or tuple."""
    if isinstance(task, WorkUnit | Unit):
        return task.stop - task.start
    return sum(_num_cells(part) for part in task) if isinstance(task, list | tuple) else 0
