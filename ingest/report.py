"""The account of a run: every cell and every feature of every dataset, kept or not, and why."""

from collections import Counter
from collections.abc import Mapping, Sequence

from corpus.manifest import Record, Unit
from ingest.plan import Inspection
from ingest.quality import Bounds


class MappingShare(Record):
    """Mapping of one dataset, with its counts."""

    features: int
    mapped: int
    unmapped: int
    ambiguous: int
    duplicates_summed: int
    steps: dict[str, int]
    umi_share_mapped: float
    unmapped_examples: list[str]
    any_case: dict[str, str]


class DatasetReport(Record):
    """One dataset."""

    source: str
    source_sha256: str
    layer: str
    cells_read: int
    cells_kept: int
    dropped: dict[str, int]
    qc_bounds: Bounds
    mapping: MappingShare


class Report(Record):
    """One run: `reports/<manifest number>.json` in the corpus."""

    number: int
    num_genes: int
    num_cells: int
    num_tokens: int
    datasets: dict[str, DatasetReport]

    @property
    def path(self) -> str:
        """Where the report lies inside a corpus."""
        return f"reports/{self.number:06d}.json"

    def lines(self) -> list[str]:
        """The account as text."""
        text = []
        for name, dataset in self.datasets.items():
            mapping = dataset.mapping
            text.append(f"{name}: {dataset.cells_kept:,} of {dataset.cells_read:,} cells kept ({dataset.layer})")
            text += [f"  dropped, {rule}: {number:,}" for rule, number in dataset.dropped.items()]
            text.append(
                f"  genes: {mapping.mapped:,} of {mapping.features:,} features mapped "
                f"({mapping.umi_share_mapped:.2%} of counts); "
                + ", ".join(f"{step} {number:,}" for step, number in mapping.steps.items())
                + f"; {mapping.duplicates_summed:,} duplicates summed"
            )
        text.append(f"corpus: {self.num_cells:,} cells, {self.num_genes:,} genes, {self.num_tokens:,} tokens")
        return text


def account(
    number: int,
    num_genes: int,
    inspections: Sequence[Inspection],
    units: Sequence[Unit],
    bounds: Mapping[str, Bounds],
    count_shares: Mapping[str, float],
) -> Report:
    """Add up a run's units by dataset."""
    datasets = {}
    for found in inspections:
        own = [unit for unit in units if unit.dataset_id == found.dataset_id]
        dropped = sum((Counter(unit.dropped) for unit in own), Counter())
        datasets[found.dataset_id] = DatasetReport(
            source=found.source.uri,
            source_sha256=found.sha256,
            layer=found.layer,
            cells_read=found.num_cells,
            cells_kept=sum(unit.rows for unit in own),
            dropped=dict(sorted(dropped.items())),
            qc_bounds=bounds[found.dataset_id],
            mapping=MappingShare(
                **found.mapping.model_dump(), umi_share_mapped=round(count_shares[found.dataset_id], 6)
            ),
        )
    return Report(
        number=number,
        num_genes=num_genes,
        num_cells=sum(unit.rows for unit in units),
        num_tokens=sum(unit.num_tokens for unit in units),
        datasets=datasets,
    )
