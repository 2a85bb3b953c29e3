"""The account of a run: every cell and every feature of every dataset, kept or not, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence

from corpus.genes import GeneTable
from corpus.hashing import digest_json
from corpus.manifest import Record, Unit
from ingest.doublets import DoubletSearch
from ingest.histograms import EDGES, Histograms
from ingest.plan import Inspection
from ingest.quality import Bounds, CountShares
from ingest.settings import QualityControl, Vocabulary
from ingest.vocabulary import Given

OWN = "these cells"
"""Origin of a vocabulary that was built in the run."""


class MappingShare(Record):
    """Mapping of one dataset, with its counts."""

    features: int
    mapped: int
    unmapped: int
    ambiguous: int
    duplicates_summed: int
    collisions: dict[str, list[str]] = {}
    steps: dict[str, int]
    umi_share_mapped: float
    umi_share_in_vocabulary: float | None = None
    unmapped_examples: list[str]
    any_case: dict[str, str]


class DatasetReport(Record):
    """One dataset."""

    source: str
    source_sha256: str
    layer: str
    detected: dict[str, str] = {}
    cells_read: int
    cells_kept: int
    dropped: dict[str, int]
    qc_bounds: Bounds
    mapping: MappingShare
    obs_filters: dict[str, list[str]] = {}
    histograms: dict[str, Histograms] = {}
    doublets: dict[str, DoubletSearch] = {}


class VocabularyReport(Record):
    """Where the vocabulary comes from.

    Parameters
    ----------
    origin
        `these cells`, `this corpus`, the URI of another corpus, or the file of a dictionary.
    medians, total
        How medians of our own were taken; None for a given vocabulary.
    without_median, without_token
        What an imported dictionary lost.
    """

    origin: str
    hash: str
    special_tokens: dict[str, int]
    medians: str | None
    total: str | None
    without_median: list[str]
    without_token: list[str]


class Report(Record):
    """One run: `reports/<manifest number>-<hash>.json` in the corpus; the manifest names it."""

    number: int
    num_genes: int
    num_cells: int
    num_tokens: int
    datasets: dict[str, DatasetReport]
    vocabulary: VocabularyReport | None = None
    quarantined: dict[str, str] = {}
    histogram_edges: dict[str, list[float]] = {}

    @property
    def path(self) -> str:
        """Where the report lies inside a corpus: the report of a run that never finished is in nobody's way."""
        return f"reports/{self.number:06d}-{digest_json(self.model_dump(mode='json'), 8)}.json"

    def lines(self) -> list[str]:
        """The account as text."""
        text = []
        for name, dataset in self.datasets.items():
            mapping = dataset.mapping
            inside = mapping.umi_share_in_vocabulary
            found = ", ".join([dataset.layer, *(f"{what} {value}" for what, value in dataset.detected.items())])
            text.append(f"{name}: {dataset.cells_kept:,} of {dataset.cells_read:,} cells kept ({found})")
            text += [f"  dropped, {rule}: {number:,}" for rule, number in dataset.dropped.items()]
            text += [f"  kept only {column} in {', '.join(values)}" for column, values in dataset.obs_filters.items()]
            text += [f"  {_told(sample, search)}" for sample, search in dataset.doublets.items()]
            text.append(
                f"  genes: {mapping.mapped:,} of {mapping.features:,} features mapped "
                f"({mapping.umi_share_mapped:.2%} of counts); "
                + ", ".join(f"{step} {number:,}" for step, number in mapping.steps.items())
                + f"; {mapping.duplicates_summed:,} duplicates summed"
                + ("" if inside is None else f"; {inside:.2%} of counts fall on the vocabulary")
            )
            if mapping.any_case:
                pairs = ", ".join(f"{name} -> {gene}" for name, gene in list(mapping.any_case.items())[:5])
                text.append(f"  matched whatever their case: {len(mapping.any_case):,} names, such as {pairs}")
        if self.vocabulary is not None and self.vocabulary.origin != OWN:
            lost = len(self.vocabulary.without_median), len(self.vocabulary.without_token)
            text.append(
                f"vocabulary: {self.vocabulary.origin} ({self.vocabulary.hash}); "
                f"{lost[0]:,} genes without a median and {lost[1]:,} without a token are left out"
            )
        text += [f"NOT in the corpus: {name}: {why}" for name, why in self.quarantined.items()]
        text.append(f"corpus: {self.num_cells:,} cells, {self.num_genes:,} genes, {self.num_tokens:,} tokens")
        return text


def _told(sample: str, search: DoubletSearch) -> str:
    name = f"doublets in sample {sample!r}" if sample else "doublets"
    if search.skipped is not None:
        return f"{name}: not searched, {search.skipped}"
    if search.threshold is None:
        return f"{name}: none dropped, no valley divides the scores of the simulated ones; set a threshold"
    return f"{name}: {search.found:,} of {search.num_cells:,} cells score above {search.threshold:.3f}"


def describe(genes: GeneTable, settings: Vocabulary, given: Given | None) -> VocabularyReport:
    """Account of a vocabulary."""
    return VocabularyReport(
        origin=OWN if given is None else given.origin,
        hash=genes.hash,
        special_tokens=genes.special_tokens,
        medians=settings.medians if given is None else None,
        total=settings.total if given is None else None,
        without_median=[] if given is None else given.without_median,
        without_token=[] if given is None else given.without_token,
    )


def account(
    number: int,
    num_genes: int,
    vocabulary: VocabularyReport,
    rules: QualityControl,
    inspections: Sequence[Inspection],
    units: Sequence[Unit],
    bounds: Mapping[str, Bounds],
    shares: Mapping[str, CountShares],
    histograms: Mapping[str, tuple[Histograms, Histograms]],
    searches: Mapping[str, Mapping[str, DoubletSearch]],
) -> Report:
    """Add up a run's units by dataset."""
    datasets = {}
    for found in inspections:
        own = [unit for unit in units if unit.dataset_id == found.dataset_id]
        dropped = sum((Counter(unit.dropped) for unit in own), Counter())
        before, after = histograms[found.dataset_id]
        everywhere = {name: values for name, values in rules.obs_filters.items() if name in found.obs_columns}
        datasets[found.dataset_id] = DatasetReport(
            source=found.source.uri,
            source_sha256=found.sha256,
            layer=found.layer,
            detected=found.detected,
            cells_read=found.num_cells,
            cells_kept=sum(unit.rows for unit in own),
            dropped=dict(sorted(dropped.items())),
            qc_bounds=bounds[found.dataset_id],
            mapping=MappingShare(
                **found.mapping.model_dump(),
                umi_share_mapped=round(shares[found.dataset_id].mapped, 6),
                umi_share_in_vocabulary=round(shares[found.dataset_id].in_vocabulary, 6),
            ),
            obs_filters={**everywhere, **found.source.obs_filters},
            histograms={"before": before, "after": after},
            doublets=dict(searches.get(found.dataset_id, {})),
        )
    return Report(
        number=number,
        num_genes=num_genes,
        num_cells=sum(unit.rows for unit in units),
        num_tokens=sum(unit.num_tokens for unit in units),
        datasets=datasets,
        vocabulary=vocabulary,
        histogram_edges=EDGES,
    )
