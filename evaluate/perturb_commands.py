"""The verbs `perturb` and `stats`. What they need is imported when they run: torch and Ray would slow down `--help`."""

from corpus.settings import Command, Uri
from evaluate.perturb_settings import (
    CellSettings,
    EngineSettings,
    PerturbationSettings,
    ReadoutSettings,
    ScanSettings,
    StateSettings,
    StatsSettings,
)


class PerturbCommand(Command):
    """Perturb genes in silico in cells of a corpus and measure how the cells' embeddings move."""

    corpus: Uri
    """The corpus, a local folder or s3://..."""
    model: Uri
    """Model folder."""
    out: Uri
    """Folder of the shifts tables; a scan that was stopped goes on from there."""
    plan: bool = False
    """Only print cells, passes, tokens, FLOPs and the time that they would take; write nothing."""
    perturbation: PerturbationSettings = PerturbationSettings()
    states: StateSettings | None = None
    """Cell states; without them only the similarity to the unperturbed cell is measured."""
    cells: CellSettings = CellSettings()
    readout: ReadoutSettings = ReadoutSettings()
    engine: EngineSettings = EngineSettings()

    def run(self) -> None:
        """Scan, or print the plan."""
        from evaluate.scan import run_scan
        from evaluate.scan_cost import print_plan
        from evaluate.scan_setup import Scan

        settings = ScanSettings(
            perturbation=self.perturbation,
            states=self.states,
            cells=self.cells,
            readout=self.readout,
            engine=self.engine,
        )
        scan = Scan(settings, self.corpus, self.model, self.out)
        if self.plan:
            print_plan(scan)
            return
        manifest = run_scan(scan)
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in manifest.skipped.items())
        print(
            f"perturb: {manifest.rows:,} perturbations of {manifest.num_cells:,} cells in {len(manifest.units)} units; "
            f"not applicable: {left_out}\n{scan.out.uri}"
        )


class StatsCommand(Command):
    """Turn the shifts of a scan into one row per gene: effect, interval, p-value, FDR; and pictures."""

    shifts: Uri
    """Folder of a finished scan."""
    out: Uri
    """Folder for genes.parquet, genes.csv, summary.json and the pictures."""
    stats: StatsSettings = StatsSettings()

    def run(self) -> None:
        """Test genes and write the tables."""
        from evaluate.stats_report import write_stats

        write_stats(self.shifts, self.out, self.stats)
