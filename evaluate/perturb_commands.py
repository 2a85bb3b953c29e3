"""The verbs `perturb` and `screen`. Imports wait until they run: torch and Ray would slow down `--help`."""

from pydantic import Field

from corpus.settings import Command, Uri
from evaluate.perturb_settings import (
    CellSettings,
    EngineSettings,
    GeneShiftSettings,
    PerturbationSettings,
    ReadoutSettings,
    ScanSettings,
    StateSettings,
)
from evaluate.screen_settings import ScreenSettings, VerifySettings


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
    gene_shifts: GeneShiftSettings | None = None
    """Effect on each other gene's embedding, as the table gene_shifts/."""
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
            gene_shifts=self.gene_shifts,
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


class ScreenCommand(Command):
    """Guess what every deletion would do from gradients, delete some genes exactly, and say how far to trust the order.

    A screen orders genes for an exact scan; its guesses are not results.
    """

    corpus: Uri
    """The corpus, a local folder or s3://..."""
    model: Uri
    """Model folder."""
    out: Uri
    """Folder of the screen; one that was stopped goes on from there."""
    states: StateSettings
    """Cell states; genes are ordered by their guessed shifts towards the goal."""
    anchors: int = Field(5, ge=1)
    """Sequences run for each cell, forward once and backward once for each state; more are better, 1 is poor."""
    min_cells: int = Field(10, ge=1)
    """Leave out genes in the input of fewer than this many of the scanned cells."""
    cells: CellSettings = CellSettings()
    readout: ReadoutSettings = ReadoutSettings()
    verify: VerifySettings = VerifySettings()
    engine: EngineSettings = EngineSettings()

    def run(self) -> None:
        """Screen and verify."""
        from evaluate.screen import run_screen

        settings = ScreenSettings(
            states=self.states,
            anchors=self.anchors,
            min_cells=self.min_cells,
            cells=self.cells,
            readout=self.readout,
            verify=self.verify,
            engine=self.engine,
        )
        found = run_screen(settings, self.corpus, self.model, self.out)
        agreement = found.agreement[found.goal]
        rank = "none" if agreement.spearman_controls is None else f"{agreement.spearman_controls:.2f}"
        print(
            f"screen: {found.genes:,} genes ordered by {found.forward_passes:,} passes instead of "
            f"{found.all_passes:,}; rank correlation with exact deletions of {len(found.controls)} random genes "
            f"{rank}, {agreement.top_overlap:.0%} of the {agreement.top} largest found\n{self.out}/genes.txt"
        )
